"""The oracle of `moe`."""

from __future__ import annotations

import math
from fractions import Fraction

import torch

from .base import oracle


@oracle
def naive_moe(hidden, experts, *, config, router, training=False):
    """
    One sequence without padding, hidden (N, E); `experts` are functions of one token (E,), `router` is (experts, E).

    A token takes the `top_k` experts of the highest probability p = softmax(router x), of equal ones the lower, and sums
    their outputs with weights p / sum of these p; with `top_k` = 1 with p / constant(p). In training with a
    `capacity_factor` c each expert serves its first ceil(c top_k N / experts) askers, tokens in order and a token's choices
    in order; an expert that is full gives nothing.
    """
    N, E = hidden.shape
    capacity = math.inf
    if training and config.capacity_factor is not None:
        capacity = math.ceil(Fraction(str(config.capacity_factor)) * config.top_k * N / len(experts))
    served = [0] * len(experts)
    rows = []
    for x in hidden:
        p = (router @ x).softmax(0)
        ranked = sorted(range(len(experts)), key=lambda e, p=p: (-p[e].item(), e))[: config.top_k]
        whole = p[ranked[0]].detach() if config.top_k == 1 else sum(p[e] for e in ranked)
        y = torch.zeros(E, dtype=hidden.dtype)
        for e in ranked:
            if served[e] < capacity:
                served[e] += 1
                y = y + p[e] / whole * experts[e](x)
        rows.append(y)
    return torch.stack(rows)
