"""What the oracles of decoders with summaries share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def with_summaries(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots_of: Callable[[int, int, list[int]], list[tuple[Tensor, Tensor]]],
    *,
    config,
    scaling: float,
    module,
    begin_of: Callable[[int], int] | None = None,
) -> Tensor:
    """
    A decoder: t sees exactly [begin, t] and the first `num_sinks` positions up to t, begin = begin_of(t) or else the start of
    the segment `exact_segments` before its own, at least 0. Every segment before that gives its slots: slots_of(g, first,
    tokens) are keys and values (D,) made of `tokens`, the segment's positions first, first + 1, ... without the sinks. One
    softmax; slots of query head h have `module.slot_bias[h]` added to their logits.
    """
    H, N, _ = query.shape
    G, M, _ = key.shape
    size = config.segment_size
    heads = []
    for h in range(H):
        g, rows = h // (H // G), []
        slots = {
            first: slots_of(g, first, [j for j in range(first, first + size) if j >= config.num_sinks])
            for first in range(0, M - size + 1, size)
        }
        for i in range(N):
            t = M - N + i
            begin = (t // size - config.exact_segments) * size if begin_of is None else begin_of(t)
            begin = max(0, begin)
            exact = [j for j in range(t + 1) if j >= begin or j < config.num_sinks]
            seen = [slot for first in range(0, begin, size) for slot in slots[first]]
            keys = torch.stack([*key[g, exact], *(k for k, _ in seen)])
            values = torch.stack([*value[g, exact], *(v for _, v in seen)])
            logits = scaling * keys @ query[h, i]
            bias = module.slot_bias[h].to(key.dtype) * (torch.arange(len(keys)) >= len(exact))
            rows.append((logits + bias).softmax(0) @ values)
        heads.append(torch.stack(rows))
    return torch.stack(heads)
