"""The oracle of `sinkhorn`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import oracle


@oracle
def naive_sinkhorn(query, key, value, *, config, scaling, causal, module):
    """
    Blocks of `block_size`. Block i scores its partner j by scaling / temperature x_i . W c_j, with c_j the mean of the
    block's keys, W = `module.pair[g]`, and x_i a mean over the group's query heads: of block i's first query (decoder,
    where only complete blocks j < i are partners) or of all its queries (encoder, where all j != i are).

    log S starts as the scores and is normalised `iterations` times over rows and then over columns, at last over rows.
    In a decoder the column sum that entry (i, j) is divided by has the rows up to i alone.

    Slot t of the partner of block i: sum_j S_ij k_jt / sum_j S_ij over the j that have a token t, and v alike; there is
    no slot t where no j has one. A query sees its own block (up to itself in a decoder), the partner's slots and, in a
    decoder, the sinks, in one softmax.
    """
    H, N, _ = query.shape
    G, M, _ = key.shape
    b, count = config.block_size, math.ceil(M / config.block_size)
    if M > N:  # the queries before the given ones are zeros, as the library has it
        query = torch.cat([query.new_zeros(H, M - N, query.shape[2]), query], 1)
    blocks = [list(range(i * b, min((i + 1) * b, M))) for i in range(count)]
    heads = []
    for g in range(G):
        group = query[g * (H // G) : (g + 1) * (H // G)]
        x = [group.mean(0)[block[0]] if causal else group[:, block].mean((0, 1)) for block in blocks]
        c = [key[g, block].mean(0) for block in blocks]
        scores = scaling / config.temperature * torch.stack(x) @ module.pair[g].to(key.dtype) @ torch.stack(c).T
        log_s = _normalised(scores, config.iterations, causal)
        partners = [_partner(log_s[i], i, key[g], value[g], b, causal) for i in range(count)]
        for q in group:
            rows = []
            for t in range(M - N, M):
                exact = (
                    [j for j in range(t + 1) if j // b == t // b or j < config.num_sinks] if causal else blocks[t // b]
                )
                k, v = (torch.cat([x[g, exact], *own]) for x, own in zip((key, value), partners[t // b], strict=True))
                rows.append((scaling * k @ q[t]).softmax(0) @ v)
            heads.append(torch.stack(rows))
    return torch.stack(heads)


def _partner(log_s, i, k, v, b, causal) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of the slots of block i's partner; log_s is row i."""
    keys, values = [], []
    for slot in range(b):
        holders = [j for j in range(len(log_s)) if (j < i if causal else j != i) and j * b + slot < len(k)]
        if holders:
            weights, tokens = log_s[holders].softmax(0), [j * b + slot for j in holders]
            keys.append(weights[None] @ k[tokens])
            values.append(weights[None] @ v[tokens])
    return keys, values


def _normalised(scores: Tensor, iterations: int, causal: bool) -> Tensor:
    """log S (blocks, blocks); what stands at a pair that are no partners means nothing."""
    pairs = [(i, j) for i in range(len(scores)) for j in range(len(scores)) if (j < i if causal else j != i)]

    def rows(log_s: Tensor) -> Tensor:
        over = {i: log_s[i, [c for a, c in pairs if a == i]].logsumexp(0) for i, _ in pairs}
        return log_s - torch.stack([over.get(i, log_s.new_zeros(())) for i in range(len(log_s))])[:, None]

    for _ in range(iterations):
        scores = rows(scores)
        over = {
            (i, j): scores[[a for a, c in pairs if c == j and (a <= i or not causal)], j].logsumexp(0) for i, j in pairs
        }
        zero = scores.new_zeros(())
        scores = scores - torch.stack(
            [torch.stack([over.get((i, j), zero) for j in range(len(scores))]) for i in range(len(scores))]
        )
    return rows(scores)
