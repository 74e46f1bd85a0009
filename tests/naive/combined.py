"""The oracle of `combined`."""

from __future__ import annotations

import math

import torch

from .base import naive_row, oracle


@oracle
def naive_combined(query, key, value, *, config, scaling, causal, module=None):
    """
    Part p of `parts` computes its own run of key/value groups, in order, with all their query heads.

    Shares are relative weights: with c_p the sum of the first p shares over the sum of all, part p owns the groups from
    floor(c_p G + 1/2) to floor(c_(p+1) G + 1/2). A part left without a group is an error. A list of dilations in a part
    counts that part's own key/value heads; `dense_below` of a part holds for its heads.
    """
    H, G = query.shape[0], key.shape[0]
    total = sum(share for _, share in config.parts)
    heads, taken, cumulated = [], 0, 0.0
    for index, (part, share) in enumerate(config.parts):
        cumulated += share
        end = math.floor(G * cumulated / total + 0.5)
        if end == taken:
            raise ValueError(f"part {index} ({part.name}) has no key/value group out of {G}")
        h = slice(taken * (H // G), end * (H // G))
        one = (query[h], key[taken:end], value[taken:end])
        inner = None if module is None else module.parts[index]
        heads.append(naive_row(part.name, *one, config=part, scaling=scaling, causal=causal, module=inner))
        taken = end
    return torch.cat(heads)
