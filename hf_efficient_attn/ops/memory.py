"""
An associative memory of segments (Munkhdalai 2024, Infini-attention, arXiv:2404.07143, eqs. 4-10): with phi(x) = elu(x) + 1,
keys k_j and what belongs to them u_j, it is the sums

    A = sum_j phi(k_j) u_j^T,    z = sum_j phi(k_j),    and a query reads phi(q) A / (phi(q) z).

Features exist for some `ROWS` tokens of heads at a time and are made again in the backward pass: per token nothing is kept
but what is given.

Letters: B batch, H query heads, G key/value heads, L segments of b tokens, D head size; memories are (B, G, L, D, D + 1), A
and as the last column z, in float32 or better.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from .features import positive
from .grain import at_once
from .precision import first_order, without_autocast

FLOOR = 1e-30  # of a normaliser
ROWS = 2**14  # tokens times rows and heads whose features exist at one time on a CPU, in whole segments


def written(key: Tensor, value: Tensor, size: int, lengths: Tensor | None = None) -> Tensor:
    """
    What each segment of `size` tokens of key and value (B, G, N, D) adds to a memory, (B, G, L, D, D + 1); of row i the first
    lengths[i] tokens. The last segment may be short.
    """
    return _Written.apply(key, value, _needed(size, key), lengths)


def mixed(local: Tensor, query: Tensor, memories: Tensor, gate: Tensor, there: Tensor, size: int) -> Tensor:
    """
    (1 - g) local + g phi(q) A / (phi(q) z), (B, H, N, D), where `there`, bool (B or 1, N), else local: of local and query (B,
    H, N, D), whose segment i of `size` tokens reads memory i, and g = sigmoid(gate), (H,). The last segment may be short.
    """
    return _Mixed.apply(local, query, memories, gate, there, _needed(size, query))


def _needed(size: int, x: Tensor) -> int:
    """A segment's size where x (B, H, N, D) has no whole one: a generated token is not filled up to it."""
    return max(1, min(size, x.shape[2]))


def features(x: Tensor) -> Tensor:
    """elu(x) + 1, in float32 or better."""
    return positive(x.to(torch.promote_types(x.dtype, torch.float32)))


def _slope(phi: Tensor) -> Tensor:
    """The slope of `features` where they are phi; overwrites them."""
    return phi.clamp_max_(1)


def _spans(x: Tensor, size: int) -> Iterator[tuple[slice, slice]]:
    """Of x (B, H, N, D) some segments of `size` tokens at a time, and their tokens."""
    segments = -(-x.shape[2] // size)
    step = max(1, at_once(ROWS * x.shape[3], x.device) // max(1, x.shape[:2].numel() * size * x.shape[3]))
    for first in range(0, segments, step):
        last = min(first + step, segments)
        yield slice(first, last), slice(first * size, min(last * size, x.shape[2]))


def _cut(x: Tensor, size: int, groups: int) -> Tensor:
    """(B, H, n, E) -> (B, G, l, H / G size, E), zeros where the last segment is short."""
    x = pad(x, (0, 0, 0, -x.shape[2] % size)).unflatten(2, (-1, size))
    return x.unflatten(1, (groups, -1)).transpose(2, 3).flatten(3, 4)


def _joined(x: Tensor, heads: int, tokens: slice) -> Tensor:
    """Inverse of `_cut`, for so many tokens."""
    x = x.unflatten(3, (heads // x.shape[1], -1)).transpose(2, 3).flatten(1, 2).flatten(2, 3)
    return x[:, :, : tokens.stop - tokens.start]


class _Written(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, key, value, size, lengths):
        ctx.save_for_backward(key, value, lengths)
        ctx.size = size
        parts = []
        for _, tokens in _spans(key, size):
            phi, v = _Written.pieces(tokens, size, key, value, lengths)
            parts.append(torch.cat([phi.mT @ v, phi.sum(-2)[..., None]], -1))
        return torch.cat(parts, 2)

    @staticmethod
    @first_order
    @without_autocast
    def backward(ctx, grad):
        key, value, lengths = ctx.saved_tensors
        of_key, of_value, groups = torch.empty_like(key), torch.empty_like(value), key.shape[1]
        for segments, tokens in _spans(key, ctx.size):
            phi, v = _Written.pieces(tokens, ctx.size, key, value, lengths)
            own = grad[:, :, segments]
            of_value[:, :, tokens] = _joined(phi @ own[..., :-1], groups, tokens)
            of_phi = (v @ own[..., :-1].mT).add_(own[..., None, :, -1])
            of_key[:, :, tokens] = _joined(of_phi.mul_(_slope(phi)), groups, tokens)  # 0 where phi was hidden
        return of_key, of_value, None, None

    @staticmethod
    def pieces(tokens: slice, size: int, key: Tensor, value: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """Features and values of these tokens, (B, G, l, size, D)."""
        phi, groups = features(key[:, :, tokens]), key.shape[1]
        if lengths is not None:
            slot = torch.arange(tokens.start, tokens.stop, device=key.device)
            phi.masked_fill_((slot >= lengths[:, None])[:, None, :, None], 0)
        return _cut(phi, size, groups), _cut(value[:, :, tokens].to(phi.dtype), size, groups)


class _Mixed(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, local, query, memories, gate, there, size):
        ctx.save_for_backward(local, query, memories, gate, there)
        ctx.size, output, heads = size, torch.empty_like(local), query.shape[1]
        for segments, tokens in _spans(query, size):
            phi, g, own = _Mixed.pieces(tokens, size, local, query, memories, gate, there)
            read = phi @ memories[:, :, segments]
            recalled = read[..., :-1] / read[..., -1:].clamp_min(FLOOR)
            output[:, :, tokens] = _joined(torch.lerp(own, recalled, g), heads, tokens)
        return output

    @staticmethod
    @first_order
    @without_autocast
    def backward(ctx, grad):
        local, query, memories, gate, there = ctx.saved_tensors
        heads, groups, chosen = query.shape[1], memories.shape[1], torch.sigmoid(gate.to(memories.dtype))
        of_local, of_query = torch.empty_like(local), torch.empty_like(query)
        of_memories, of_gate = torch.zeros_like(memories), torch.zeros_like(chosen)
        for segments, tokens in _spans(query, ctx.size):
            phi, g, own = _Mixed.pieces(tokens, ctx.size, local, query, memories, gate, there)
            memory, given = memories[:, :, segments], _cut(grad[:, :, tokens], ctx.size, groups).to(phi.dtype)
            read = phi @ memory
            normaliser = read[..., -1:].clamp_min(FLOOR)
            recalled = read[..., :-1] / normaliser
            of_local[:, :, tokens] = _joined(given * (1 - g), heads, tokens)
            slope = _joined((given * (recalled - own)).sum(-1, keepdim=True), heads, tokens)[..., 0]
            of_gate += (slope * there[:, None, tokens]).sum((0, 2))
            of_read = given.mul_(g / normaliser)  # of the numerators
            of_normaliser = -(of_read * recalled).sum(-1, keepdim=True) * (read[..., -1:] > FLOOR)
            of_read = torch.cat([of_read, of_normaliser], -1)
            of_memories[:, :, segments] = phi.mT @ of_read
            of_query[:, :, tokens] = _joined((of_read @ memory.mT).mul_(_slope(phi)), heads, tokens)
        return of_local, of_query, of_memories, (of_gate * chosen * (1 - chosen)).to(gate.dtype), None, None

    @staticmethod
    def pieces(tokens: slice, size: int, local, query, memories, gate, there) -> tuple[Tensor, Tensor, Tensor]:
        """Of these tokens features, g and local, (B, G, l, H / G size, .)."""
        groups, dtype = memories.shape[1], memories.dtype
        phi = features(_cut(query[:, :, tokens], size, groups)).to(dtype)
        chosen = torch.sigmoid(gate.to(dtype))[:, None, None] * there[:, None, tokens, None]
        return phi, _cut(chosen, size, groups), _cut(local[:, :, tokens], size, groups).to(dtype)
