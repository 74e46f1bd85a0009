"""The oracle of `big_bird`."""

from __future__ import annotations

import torch

from .base import oracle, per_query_head, softmax_attention


@oracle
def naive_big_bird(query, key, value, *, config, scaling, causal, module):
    """
    A query of block i (of `block_size` tokens) sees the tokens, in a decoder those up to itself, of

        its window: blocks i - w + 1 .. i, in an encoder .. i + w - 1, w = `num_window_blocks`,
        the global blocks 0 .. `num_global_blocks` - 1; in an encoder a query of a global block sees all tokens,
        `num_random_blocks` further ones: slot s takes number hash(seed, layer, g, i, s) % a of the a blocks that are
        neither global nor in the window, and in a decoder before i; of key/value head g, none where a = 0.

    A block that two slots take counts once.
    """
    G, M, _ = key.shape
    N, size, w, everyone = query.shape[1], config.block_size, config.num_window_blocks, config.num_global_blocks
    visible = torch.zeros(G, N, M, dtype=torch.bool)
    for g in range(G):
        for n in range(N):
            t = M - N + n
            i, blocks = t // size, range(-(-M // size))
            if causal:
                blocks = range(i + 1)
            seen = {b for b in blocks if abs(i - b) < w or b < everyone or (not causal and i < everyone)}
            allowed = [b for b in blocks if b not in seen]
            for slot in range(config.num_random_blocks):
                if allowed:
                    seen.add(allowed[_hash(config.seed, module.host.layer, g, i, slot) % len(allowed)])
            visible[g, n] = torch.tensor([j // size in seen and (j <= t or not causal) for j in range(M)])
    return softmax_attention(query, key, value, per_query_head(query, visible), scaling)


def _hash(*numbers: int) -> int:
    x = 0
    for number in numbers:
        x = (x + number + 0x9E3779B9) % 2**32
        for _ in range(2):
            x = (x ^ x >> 16) * 0x45D9F3B % 2**32
        x ^= x >> 16
    return x
