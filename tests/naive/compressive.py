"""The oracle of `compressive`."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import oracle


@oracle
def naive_compressive(query, key, value, *, config, scaling, causal, module):
    """
    t of segment s sees its segment (up to itself in a decoder), the `memory_size` positions before the segment's start,
    the first positions (`num_sinks` in a decoder, up to t; `global_tokens` in an encoder, where these see all positions and
    no slots), and the newest `compressed_size` of the slots before the memory.

    Slot j stands for positions [j c, (j + 1) c), c = `compression_rate`, and is visible where these lie wholly before the
    memory. Its key and value are the mean, the maximum, or (conv) sum_i x_{j c + i} W[g, i] with W = `module.conv_k` and
    `module.conv_v`, (G, c, D, D). Those first positions stay out of slots: the mean and the
    maximum are over the others, the sum of a convolution is multiplied by c / (number of the others), and a slot of them
    alone does not exist.

    Tokens and slots share one softmax; in a decoder slots of query head h have `module.slot_bias[h]` added to their logits.
    """
    H, N, _ = query.shape
    G, M, _ = key.shape
    b, c, everyone = config.segment_size, config.compression_rate, config.num_sinks if causal else config.global_tokens
    slots = [[n for n in range(j * c, (j + 1) * c) if n >= everyone] for j in range(M // c)]
    seen = []  # of each query: which tokens, which slots
    for t in range(M - N, M):
        if not causal and t < everyone:
            seen.append([True] * M + [False] * len(slots))
            continue
        start = t // b * b
        begin, end = start - config.memory_size, t + 1 if causal else start + b
        exact = [j < end and (j >= begin or j < everyone) for j in range(M)]
        newest = range(begin // c - config.compressed_size, begin // c)
        seen.append(exact + [j in newest and len(tokens) > 0 for j, tokens in enumerate(slots)])
    seen = torch.tensor(seen)
    heads = []
    for h in range(H):
        g = h // (H // G)
        keys, values = (
            torch.cat([x[g]] + [_compress(config, x[g], tokens, weight, g)[None] for tokens in slots])
            for x, weight in ((key, getattr(module, "conv_k", None)), (value, getattr(module, "conv_v", None)))
        )
        is_slot = torch.arange(len(keys)) >= M
        logits = scaling * query[h] @ keys.T
        if causal:
            logits = logits + is_slot * module.slot_bias[h].to(key.dtype)
        heads.append(logits.masked_fill(~seen, -torch.inf).softmax(-1) @ values)
    return torch.stack(heads)


def _compress(config, x: Tensor, tokens: list[int], weight: Tensor | None, g: int) -> Tensor:
    """x (M, D) -> (D,)."""
    if not tokens:
        return torch.zeros_like(x[0])
    if config.compression == "mean":
        return x[tokens].mean(0)
    if config.compression == "max":
        return x[tokens].amax(0)
    c = config.compression_rate
    return sum(x[n] @ weight[g, n % c].to(x.dtype) for n in tokens) * c / len(tokens)
