"""
Softmax attention of few queries that each read ranges of stored keys of their own, as generated tokens do. On a CPU, in float32
and without gradients, a kernel reads them where they lie (kernels/few.c); else they are copied side by side.

Letters: B batch, H query heads, G key/value heads, N queries, S stored keys, D head size, C ranges of a query.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .. import kernels
from ..caching import pick
from .exact import sdpa

ENOUGH = 2**20  # products of queries with numbers of keys that are worth another thread


def attend_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    size: int,
    chosen: Tensor,
    valid: Tensor,
    position: Tensor,
    *,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """
    query (B, H, N, D), at `position` (B or 1, N); key, value (B, G, S, D) -> (B, H, N, D): a query sees the keys up to its own
    of its own block of `size` and of those blocks `chosen`, int64 (B or 1, H or G, N, C), that are `valid`, bool and alike.
    """
    position = position[:, None, :, None]
    own = (position // size).expand(*chosen.shape[:3], 1)
    begin = torch.cat([own, torch.where(valid, chosen, key.shape[2])], 3) * size
    begin = begin.repeat_interleave(query.shape[1] // begin.shape[1], 1).expand(*query.shape[:3], -1)
    end = torch.minimum(begin + size, position + 1)  # before `begin` where there is no block
    if has_kernel(query, key, value, dropout):
        return _by_kernel(query, key, value, begin, end, begin.shape[3] * size, scaling)
    slots = begin[..., None] + torch.arange(size, device=key.device)
    return _copied(query, key, value, slots.flatten(3), (slots < end[..., None]).flatten(3), scaling, dropout)


def attend_slots(
    query: Tensor, key: Tensor, value: Tensor, slots: Tensor, seen: Tensor, *, scaling: float, dropout: float = 0.0
) -> Tensor:
    """
    query (B, H, N, D); key, value (B, G, S, D) -> (B, H, N, D): a query sees its `slots`, int64 (B, H or 1, N, K), any number
    where `seen`, bool and alike, is False. A slot seen twice counts twice; a query that sees none gets zeros.
    """
    slots, seen = (x.expand(*query.shape[:3], -1) for x in (slots, seen))
    if has_kernel(query, key, value, dropout):
        return _by_kernel(query, key, value, slots, slots + seen, slots.shape[3], scaling)
    return _copied(query, key, value, slots, seen, scaling, dropout)


def attend_ranges(
    query: Tensor, key: Tensor, value: Tensor, begin: Tensor, end: Tensor, most: int, *, scaling: float
) -> tuple[Tensor, Tensor]:
    """
    query (B, H, N, D); key, value (B, G, S, D) -> (B, H, N, D) and the log-sum-exp (B, H, N) of its logits: a query sees, where
    `has_kernel`, its ranges of slots, int64 (B, H, N, C) begin..end-1, of `most` slots in all at most.
    """
    lse = query.new_empty(query.shape[:3])
    return _by_kernel(query, key, value, begin, end, most, scaling, lse), lse


def recent_ranges(
    query_labels: Tensor, key_labels: Tensor, position: Tensor, window: int, num_sinks: int
) -> tuple[Tensor, Tensor]:
    """
    For queries at `position` (B, N) with labels (B, H, N, R) the ranges that `attend_ranges` takes, of slots with labels (B, G,
    S, R) int32: the first `num_sinks`, in no round; the query's own; and of each round the `window` most recent ones of its
    label, its own among them. Each slot once. Where `has_kernel`.
    """
    (batch, heads, n, rounds), groups = query_labels.shape, key_labels.shape[1]
    begin, end = (torch.empty(batch, heads, n, rounds * window + 2, dtype=torch.int64) for _ in range(2))
    key_labels = key_labels if key_labels.stride(3) == 1 else key_labels.contiguous()
    given = query_labels.to(torch.int32).contiguous(), key_labels, *key_labels.stride()[:3], position.contiguous()
    sizes = batch * heads, heads, groups, n, rounds, window, num_sinks
    kernels.call(kernels.load("few").few_recent, *given, *sizes, begin, end)
    return begin, end


def has_kernel(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether the kernel can serve these queries."""
    plain = dropout == 0 and not torch.is_grad_enabled() and {x.dtype for x in (query, key, value)} == {torch.float32}
    return plain and not torch.compiler.is_compiling() and kernels.serving("few", query) is not None


def _by_kernel(
    query, key, value, begin: Tensor, end: Tensor, most: int, scaling: float, lse: Tensor | None = None
) -> Tensor:
    heads, n, dim = query.shape[1:]
    lines, count = len(query) * heads, begin.shape[3]
    query, key, value = query.contiguous(), kernels.readable(key), kernels.readable(value)
    begin, end = begin.contiguous(), end.contiguous()
    output, function = torch.empty_like(query), kernels.load("few").few_forward
    sizes = heads, key.shape[1], n, count, most, dim, float(scaling)

    def job(lines: tuple[int, int]) -> None:
        given = query, key, *key.stride()[:3], value, *value.stride()[:3], begin, end
        kernels.call(function, *given, *lines, *sizes, output, lse)

    pieces = max(1, min(torch.get_num_threads(), lines, lines * n * most * dim // ENOUGH))
    edges = pairwise(lines * i // pieces for i in range(pieces + 1))
    if pieces == 1:
        job(*edges)
    else:
        kernels.in_parallel(job, edges)
    return output


def _copied(query, key, value, slots: Tensor, seen: Tensor, scaling: float, dropout: float) -> Tensor:
    batch, heads, n, _ = query.shape
    slots = slots.clamp(0, key.shape[2] - 1).reshape(batch, key.shape[1], -1)
    key, value = (pick(x, slots).view(batch, heads * n, -1, x.shape[3]) for x in (key, value))
    mask = seen.reshape(batch, heads * n, 1, -1)
    output = sdpa(query.reshape(batch, heads * n, 1, -1), key, value, mask=mask, scaling=scaling, dropout=dropout)
    return output.view(query.shape)
