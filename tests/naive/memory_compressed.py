"""The oracle of `memory_compressed`."""

from __future__ import annotations

import torch

from .base import oracle
from .summaries import with_summaries


@oracle
def naive_memory_compressed(query, key, value, *, config, scaling, causal, module):
    """
    A stretch of c = `compression` positions, cut from position 0 on, becomes one slot: sum_i w_i * k_i and sum_i w'_i * v_i
    over its real tokens, times c / (their number), where w = `module.conv_k[g]` and w' = `module.conv_v[g]`, (c, D), act on
    each coordinate by itself. Encoder: softmax attention over the slots of all stretches that hold a token. Decoder: the
    slots of segments before the exact part, without the sinks.
    """
    c = config.compression

    def slots_of(g, first, tokens):
        stretches = {}
        for n in tokens:
            stretches.setdefault(n // c, []).append(n)
        return [
            tuple(
                sum(weight[g, n % c].to(x.dtype) * x[g, n] for n in part) * c / len(part)
                for weight, x in ((module.conv_k, key), (module.conv_v, value))
            )
            for part in stretches.values()
        ]

    if causal:
        return with_summaries(query, key, value, slots_of, config=config, scaling=scaling, module=module)
    heads, share = [], query.shape[0] // key.shape[0]
    for h in range(query.shape[0]):
        keys, values = (torch.stack(x) for x in zip(*slots_of(h // share, 0, range(key.shape[1])), strict=True))
        heads.append((scaling * query[h] @ keys.T).softmax(-1) @ values)
    return torch.stack(heads)
