"""
Online spherical k-means: tokens belong to the nearest of C unit centroids per key/value head, which follow them,
    label(x) = argmax_c centroid_c . x / |x|,
    centroid_c <- unit(decay centroid_c + (1 - decay) mean of the unit vectors of label c).

Roy et al. 2020, Routing Transformer, arXiv:2003.05997, section 4.1. Centroids are a buffer, drawn from a seed, and move after
the backward pass of a training forward (see `auxiliary`); a cluster without a token stays where it is.

Letters: B batch, H heads (a multiple of G), G key/value heads, N tokens, D head size, C clusters.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .draws import normal, source

TINY = 1e-12  # the least length that a vector is divided by


def draw_centroids(groups: int, clusters: int, size: int, seed: int, layer: int) -> Tensor:
    """(G, C, D), uniform on the unit sphere; rounded to bfloat16, so that a cast of the model leaves them alone."""
    return normalize(normal(source(seed, layer), groups, clusters, size), dim=-1).bfloat16().float()


@torch.no_grad()
def nearest(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """
    x (B, H, N, D), centroids (G, C, D) -> the cluster of each token, (B, H, N) int64, of equally near ones the lower, and
    its cosine (B, H, N).
    """
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        grouped = x.unflatten(1, (centroids.shape[0], -1)).flatten(2, 3)
        best, labels = largest(centroids.to(x.dtype) @ grouped.mT)  # of (B, G, C, H / G * N)
        cosine = best.view(x.shape[:3]) / torch.linalg.vector_norm(x, dim=-1).clamp_min(TINY)
        return labels.view(x.shape[:3]), cosine


def largest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """(..., C, M) -> the maximum over C and its place, (..., M), of equal ones the first. Several times faster than `max`."""
    best = scores.amax(-2, keepdim=True)
    index = torch.arange(scores.shape[-2], device=scores.device, dtype=torch.float32)[:, None]
    place = (scores < best).to(torch.float32).mul_(scores.shape[-2]).add_(index).amin(-2)
    return best.squeeze(-2), place.to(torch.int64)


@torch.no_grad()
def cluster_sums(
    x: Tensor, labels: Tensor, clusters: int, groups: int, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The unit vectors of real tokens of x (B, H, N, D) summed by cluster, (G, C, D), and how many they are, (G, C, 1)."""
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        weight = torch.linalg.vector_norm(x, dim=-1).clamp_min(TINY).reciprocal()
        if lengths is not None:
            absent = (torch.arange(x.shape[2], device=x.device) >= lengths[:, None])[:, None]
            weight, labels = weight.masked_fill(absent, 0), labels.masked_fill(absent, clusters)
        x, weight, labels = (y.unflatten(1, (groups, -1)).transpose(0, 1).flatten(1, 3) for y in (x, weight, labels))
        member = labels[:, None] == torch.arange(clusters, device=x.device)[:, None]  # (G, C, B H / G N)
        return (member * weight[:, None]) @ x, member.sum(2)[..., None].to(x.dtype)


def follow(centroids: Tensor, sums: Tensor, counts: Tensor, decay: float) -> Tensor:
    """The centroids after a step, (G, C, D); in float32 also where the model is of half precision, whose steps are coarser."""
    centroids = centroids.to(sums.dtype)
    moved = normalize(decay * centroids + (1 - decay) * sums / counts.clamp_min(1), dim=-1)
    return torch.where(counts > 0, moved, centroids)
