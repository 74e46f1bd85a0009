"""
Codes of vectors, the signs of their products with planes, and clusters of codes by the Hamming distance. On a CPU a kernel
packs codes into bits and counts them (kernels/codes.c); elsewhere they are rows of 1 and -1, whose products count them.

Letters: B batch, H heads, I chunks, n vectors of a chunk, D their size, C clusters.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import kernels
from ..caching import Count
from .rows import shift

FEW = 8  # vectors that are not put into frames of whole chunks, and not worth a kernel's call for each head
WORD = 64  # bits


@torch.no_grad()
def find_clusters(
    x: Tensor, planes: Tensor, clusters: int, iterations: int, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """
    `k_means` of the codes of each chunk of x (B, H, I, n, D), whose first `lengths` (B,) vectors are real, by planes (D, bits)
    -> the cluster of each, (B, H, I, n) int64, of those that are not real any; and codes (B, H, I, C, bits + 1).
    """
    shape, n = x.shape[:3], x.shape[3]
    if (library := kernels.serving("codes", x)) is not None:
        return _cluster_bits(library, x, planes, clusters, iterations, lengths)
    code = _signs(x, planes)
    if lengths is not None:
        code = code * (torch.arange(n, device=x.device) < lengths[:, None]).view(-1, 1, 1, n, 1)
        lengths = lengths[:, None, None].expand(shape).flatten()
    labels, codes = k_means(code.flatten(0, 2), clusters, iterations, lengths)
    return labels.view(*shape, n), codes.view(*shape, clusters, -1)


@torch.no_grad()
def nearest_clusters(x: Tensor, planes: Tensor, codes: Tensor, stand: Tensor, skip: Count, size: int) -> Tensor:
    """
    x (B, H, T, D), vectors in successive chunks of `size`, stand (B, T), the first of them `skip` after its chunk's begin ->
    (B, H, T) int64, for each the nearest of its chunk's codes (B, H, I, C, bits + 1), numbered among I C.
    """
    (batch, heads, chunks, clusters, _), n = codes.shape, x.shape[2]
    if n > FEW and (library := kernels.serving("codes", x)) is not None:
        return _nearest_bits(library, x, planes, codes, stand)
    code = _signs(x, planes)
    if n > FEW:
        frames = min(chunks, -(-(n + (skip if isinstance(skip, int) else size - 1)) // size))
        code = shift(code, skip, frames * size).unflatten(2, (frames, size))
        labels = (code @ codes[:, :, :frames].mT).argmax(-1).flatten(2)
        labels = shift(labels[..., None], -skip, n)[..., 0]
    else:
        scores = (code @ codes.flatten(2, 3).mT).unflatten(3, (chunks, clusters))
        index = stand[:, None, :, None, None].expand(batch, heads, -1, 1, clusters)
        labels = torch.gather(scores, 3, index)[:, :, :, 0].argmax(-1)
    return labels + clusters * stand[:, None]


def k_means(code: Tensor, clusters: int, iterations: int, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """
    Lloyd's algorithm with the Hamming distance. code (P, n, bits + 1): 1 and -1, and a last 1; zeros from lengths (P,) on.
    Clusters begin as the codes at equal distances; one without a member keeps its code.

    Returns the cluster of each, (P, n) int64, and the clusters' codes (P, C, bits + 1), whose last entry makes the product
    with a vector's code larger for the lower one of clusters that are equally near.
    """
    index = torch.arange(clusters, device=code.device)
    begin = index * (code.shape[1] if lengths is None else lengths[:, None]) // clusters
    centres = torch.gather(code, 1, begin.expand(len(code), -1)[..., None].expand(-1, -1, code.shape[2]))
    centres[..., -1] = lower = _lower(clusters, code.device)
    for _ in range(iterations):
        scores = code @ centres.mT
        member = (scores == scores.amax(-1, keepdim=True)).to(code.dtype)  # of a padded vector, all; it adds zeros
        sums = member.mT @ code
        moved = torch.where(sums >= 0, 1.0, -1.0)
        moved[..., -1] = lower
        centres = torch.where(sums[..., -1:] > 0, moved, centres)
    return (code @ centres.mT).argmax(-1), centres


def _lower(clusters: int, device: torch.device | None = None) -> Tensor:
    """(C,): above -1, where products of codes are 2 apart; exact."""
    return -torch.arange(clusters, device=device) * 2.0 ** -(clusters - 1).bit_length()


def _signs(x: Tensor, planes: Tensor) -> Tensor:
    """(..., D) -> (..., bits + 1) float32: the code as 1 and -1, and a 1."""
    accurate = torch.promote_types(x.dtype, torch.float32)
    code = (x.to(accurate) @ planes.to(accurate) > 0).to(torch.float32)
    return pad(code.mul_(2).sub_(1), (0, 1), value=1.0)


def _bits(library, x: Tensor, planes: Tensor) -> Tensor:
    """x (n, D) -> (n, words) int64, a kernel's code of each; planes as `_whole` gives them."""
    x = x.float().contiguous()
    codes = torch.empty(len(x), planes.shape[1] // WORD, dtype=torch.int64)
    kernels.call(library.sign_codes, x, *x.shape, planes, codes.shape[1], codes)
    return codes


def _whole(planes: Tensor) -> Tensor:
    """Planes of whole words, (D, 64 words)."""
    return pad(planes.float(), (0, -planes.shape[1] % WORD)).contiguous()


def _cluster_bits(library, x, planes, clusters: int, iterations: int, lengths) -> tuple[Tensor, Tensor]:
    (batch, heads, chunks, n, _), bits = x.shape, planes.shape[1]
    planes, lower = _whole(planes), _lower(clusters)
    labels = torch.zeros(batch, heads, chunks, n, dtype=torch.int64)
    codes = torch.empty(batch, heads, chunks, clusters, bits + 1)
    counts = [n] * batch if lengths is None else lengths.tolist()

    def job(b: int, h: int) -> None:
        code, words = _bits(library, x[b, h].flatten(0, 1), planes), planes.shape[1] // WORD
        ones = torch.empty(clusters * (WORD * words + 1), dtype=torch.int32)
        centres = torch.empty(clusters, words, dtype=torch.int64)
        for i in range(chunks):
            sizes = counts[b], words, clusters, iterations
            kernels.call(library.cluster_codes, code[i * n :], *sizes, ones, centres, labels[b, h, i])
            kernels.call(library.spread_codes, centres, clusters, words, bits, lower, codes[b, h, i])

    kernels.for_each_head(job, batch, heads)
    return labels, codes


def _nearest_bits(library, x, planes, codes, stand) -> Tensor:
    (batch, heads, chunks, clusters, _), bits = codes.shape, planes.shape[1]
    planes, codes, stand = _whole(planes), codes.contiguous(), stand.contiguous()
    labels = torch.empty(x.shape[:3], dtype=torch.int64)

    def job(b: int, h: int) -> None:
        code, words = _bits(library, x[b, h], planes), planes.shape[1] // WORD
        packed, last = torch.empty(chunks * clusters, words, dtype=torch.int64), torch.empty(chunks * clusters)
        sizes = chunks, clusters, bits
        kernels.call(
            library.nearest_codes, code, stand[b], len(code), words, codes[b, h], *sizes, packed, last, labels[b, h]
        )

    kernels.for_each_head(job, batch, heads)
    return labels
