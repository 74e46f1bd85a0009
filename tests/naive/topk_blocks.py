"""The oracle of `topk_blocks`."""

from __future__ import annotations

import math

import torch

from .base import oracle, per_query_head, softmax_attention


@oracle
def naive_topk_blocks(query, key, value, *, config, scaling, causal, module=None):
    """
    A query sees its chosen blocks of `block_size` keys: its own block, block 0, and those with the best scores until
    there are `top_k` in all; with `top_k` = 1 its own block alone. Where own block and block 0 are one, it counts once.

    Score of a block: summary "mean" q . mean(k); "minmax" sum_d max(q_d min(k)_d, q_d max(k)_d), the bound of
    all q . k. Candidates are the complete blocks before the query's own (decoder) or all blocks of the row (encoder),
    whose last one is summarised over the tokens it has. `share_group`: the query heads of a key/value head choose
    together, by the sum of their scores. `query_block` > 1, encoder only, must divide `block_size`: so many successive
    queries choose together by the sum of their scores, over the queries that exist. Of equal scores the lower block
    wins. `scaling` > 0 has no say in it. Decoders have no sinks besides block 0, and ignore `query_block`.
    """
    H, N, _ = query.shape
    G, M, _ = key.shape
    size, width = config.block_size, 1 if causal else max(1, config.query_block)
    if size % width:
        raise ValueError(f"query_block {width} does not divide block_size {size}")
    scores = []  # of (H, N) per block
    for b in range(math.ceil(M / size)):
        block = per_query_head(query, key[:, b * size : (b + 1) * size].detach())  # (H, tokens, D)
        q = query.detach()
        if config.summary == "mean":
            scores.append((q * block.mean(1, keepdim=True)).sum(-1))
        else:
            scores.append(torch.maximum(q * block.amin(1, keepdim=True), q * block.amax(1, keepdim=True)).sum(-1))
    scores = torch.stack(scores, -1)  # (H, N, blocks)

    visible = torch.zeros(H, N, M, dtype=torch.bool, device=query.device)
    for h in range(H):
        g = h // (H // G)
        voters = range(g * (H // G), (g + 1) * (H // G)) if config.share_group else [h]
        for i in range(N):
            t = M - N + i
            together = [n for n in range(N) if (M - N + n) // width == t // width]
            score = sum(scores[v, n] for v in voters for n in together).tolist()
            own = t // size
            chosen = {own} if config.top_k == 1 else {own, 0}
            candidates = [b for b in range(own if causal else len(score)) if b not in chosen]
            candidates.sort(key=lambda b: (-score[b], b))
            chosen |= set(candidates[: config.top_k - len(chosen)])
            visible[h, i] = torch.tensor([j // size in chosen and (j <= t or not causal) for j in range(M)])
    return softmax_attention(query, key, value, visible, scaling)
