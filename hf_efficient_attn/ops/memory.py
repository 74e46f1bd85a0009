"""
An associative memory of segments (Munkhdalai 2024, Infini-attention, arXiv:2404.07143, eqs. 4-10): with phi(x) = elu(x) + 1,
keys k_j and what belongs to them u_j, it is the sums

    A = sum_j phi(k_j) u_j^T,    z = sum_j phi(k_j),    and a query reads phi(q) A / (phi(q) z).

Features exist for some `SPAN` tokens at a time and are made again in the backward pass: per token nothing is kept but what is
given.

Letters: B batch, H query heads, G key/value heads, L segments of b tokens, D head size; memories are (B, G, L, D, D + 1), A
and as the last column z, in float32 or better.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import elu

from .precision import first_order, without_autocast

FLOOR = 1e-30  # of a normaliser
SPAN = 1024  # tokens whose features exist at one time, in whole segments


def written(key: Tensor, value: Tensor, segments: int, lengths: Tensor | None = None) -> Tensor:
    """What each of L `segments` of key and value (B, G, L b, D) adds to a memory; of row i the first lengths[i] tokens."""
    return _Written.apply(key, value, segments, lengths)


def mixed(local: Tensor, query: Tensor, memories: Tensor, gate: Tensor, there: Tensor) -> Tensor:
    """
    (1 - g) local + g phi(q) A / (phi(q) z), (B, H, L b, D), where `there`, bool (B or 1, L b), else local: of local and query
    (B, H, L b, D), segment i of which reads memory i, and g = sigmoid(gate), (H,).
    """
    return _Mixed.apply(local, query, memories, gate, there)


def features(x: Tensor) -> Tensor:
    """elu(x) + 1, in float32 or better."""
    return elu(x.to(torch.promote_types(x.dtype, torch.float32))) + 1


def _slope(phi: Tensor) -> Tensor:
    """The slope of `features` where they are phi; overwrites them."""
    return phi.clamp_max_(1)


def _spans(tokens: int, segments: int) -> Iterator[tuple[slice, slice]]:
    """Some segments at a time, and their tokens."""
    size = tokens // segments
    step = max(1, SPAN // max(size, 1))
    for first in range(0, segments, step):
        last = min(first + step, segments)
        yield slice(first, last), slice(first * size, last * size)


def _cut(x: Tensor, segments: int, groups: int) -> Tensor:
    """(B, H, l b, E) -> (B, G, l, H / G b, E)."""
    return x.unflatten(2, (segments, -1)).unflatten(1, (groups, -1)).transpose(2, 3).flatten(3, 4)


def _joined(x: Tensor, heads: int) -> Tensor:
    """Inverse of `_cut`."""
    return x.unflatten(3, (heads // x.shape[1], -1)).transpose(2, 3).flatten(1, 2).flatten(2, 3)


class _Written(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, key, value, segments, lengths):
        ctx.save_for_backward(key, value, lengths)
        ctx.segments = segments
        parts = []
        for _, tokens in _spans(key.shape[2], segments):
            phi, v = _Written.pieces(ctx, tokens, key, value, lengths)
            parts.append(torch.cat([phi.mT @ v, phi.sum(-2)[..., None]], -1))
        return torch.cat(parts, 2)

    @staticmethod
    @first_order
    @without_autocast
    def backward(ctx, grad):
        key, value, lengths = ctx.saved_tensors
        of_key, of_value = torch.empty_like(key), torch.empty_like(value)
        for segments, tokens in _spans(key.shape[2], ctx.segments):
            phi, v = _Written.pieces(ctx, tokens, key, value, lengths)
            own = grad[:, :, segments]
            of_value[:, :, tokens] = (phi @ own[..., :-1]).flatten(2, 3)
            of_phi = (v @ own[..., :-1].mT).add_(own[..., None, :, -1])
            of_key[:, :, tokens] = of_phi.mul_(_slope(phi)).flatten(2, 3)  # 0 where phi was hidden
        return of_key, of_value, None, None

    @staticmethod
    def pieces(ctx, tokens: slice, key: Tensor, value: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """Features and values of these tokens, (B, G, l, b, D)."""
        size = key.shape[2] // ctx.segments
        phi = features(key[:, :, tokens])
        if lengths is not None:
            slot = torch.arange(tokens.start, tokens.stop, device=key.device)
            phi.masked_fill_((slot >= lengths[:, None])[:, None, :, None], 0)
        return phi.unflatten(2, (-1, size)), value[:, :, tokens].to(phi.dtype).unflatten(2, (-1, size))


class _Mixed(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, local, query, memories, gate, there):
        ctx.save_for_backward(local, query, memories, gate, there)
        output = torch.empty_like(local)
        for segments, tokens in _spans(query.shape[2], memories.shape[2]):
            phi, g, own = _Mixed.pieces(tokens, segments, local, query, memories, gate, there)
            read = phi @ memories[:, :, segments]
            recalled = read[..., :-1] / read[..., -1:].clamp_min(FLOOR)
            output[:, :, tokens] = _joined(torch.lerp(own, recalled, g), query.shape[1])
        return output

    @staticmethod
    @first_order
    @without_autocast
    def backward(ctx, grad):
        local, query, memories, gate, there = ctx.saved_tensors
        heads, groups, chosen = query.shape[1], memories.shape[1], torch.sigmoid(gate.to(memories.dtype))
        of_local, of_query = torch.empty_like(local), torch.empty_like(query)
        of_memories, of_gate = torch.empty_like(memories), torch.zeros_like(chosen)
        for segments, tokens in _spans(query.shape[2], memories.shape[2]):
            phi, g, own = _Mixed.pieces(tokens, segments, local, query, memories, gate, there)
            memory, given = memories[:, :, segments], _cut(grad[:, :, tokens], own.shape[2], groups).to(phi.dtype)
            read = phi @ memory
            normaliser = read[..., -1:].clamp_min(FLOOR)
            recalled = read[..., :-1] / normaliser
            of_local[:, :, tokens] = _joined(given * (1 - g), heads)
            slope = _joined((given * (recalled - own)).sum(-1, keepdim=True), heads)[..., 0]
            of_gate += (slope * there[:, None, tokens]).sum((0, 2))
            of_numerator = given * (g / normaliser)
            of_normaliser = -(of_numerator * recalled).sum(-1, keepdim=True) * (read[..., -1:] > FLOOR)
            of_read = torch.cat([of_numerator, of_normaliser], -1)
            of_memories[:, :, segments] = phi.mT @ of_read
            of_query[:, :, tokens] = _joined((of_read @ memory.mT).mul_(_slope(phi)), heads)
        return of_local, of_query, of_memories, (of_gate * chosen * (1 - chosen)).to(gate.dtype), None

    @staticmethod
    def pieces(tokens: slice, segments: slice, local, query, memories, gate, there) -> tuple[Tensor, Tensor, Tensor]:
        """Of these tokens features, g and local, (B, G, l, H / G b, .)."""
        count, groups = segments.stop - segments.start, memories.shape[1]
        phi = features(_cut(query[:, :, tokens], count, groups)).to(memories.dtype)
        chosen = torch.sigmoid(gate.to(memories.dtype))[:, None, None] * there[:, None, tokens, None]
        return phi, _cut(chosen, count, groups), _cut(local[:, :, tokens], count, groups).to(memories.dtype)
