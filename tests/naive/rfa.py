"""The oracle of `rfa`."""

from __future__ import annotations

import math

import torch

from .base import lower, oracle, per_query_head

FLOOR = 0.01  # smallest mean weight, of either sign: random weights can be negative


@oracle
def naive_rfa(query, key, value, *, config, scaling, causal, module, hidden=None):
    """
    Weights phi(q) . phi(k) over their sum, phi(x) = [sin(u), cos(u)] / sqrt(m / 2), u = sqrt(s) w . x / |x|, with the
    directions w = `module.directions` (G, m / 2, D) and log s = `module.log_scale` (G,). `scaling` is not used.

    With a gate g (G, N) of `hidden` (N, E), in a decoder, the weight of key j at t is also multiplied by
    r_tj = (1 - g_j) g_(j+1) ... g_t; without, r = 1. The sum of the weights over that of r is at least 0.01 away from 0.
    """
    N, M = query.shape[1], key.shape[1]

    def phi(x, w):
        u = x / x.norm(dim=-1, keepdim=True) @ w.transpose(1, 2)
        return torch.cat([u.sin(), u.cos()], -1) / math.sqrt(w.shape[1])

    w = module.directions.to(query.dtype) * module.log_scale.exp().sqrt()[:, None, None]
    phi_k = per_query_head(query, phi(key, w))
    recency = torch.ones(len(key), N, M, dtype=query.dtype)
    if config.gate and causal:
        g = (hidden @ module.gate.weight.T + module.gate.bias).sigmoid().T  # (G, N)
        rows = []
        for t in range(N):
            rows.append(torch.stack([(1 - g[:, j]) * g[:, j + 1 : t + 1].prod(1) for j in range(M)], 1))
        recency = torch.stack(rows, 1)
    recency = per_query_head(query, lower(recency, causal, 0.0))
    weights = phi(query, per_query_head(query, w)) @ phi_k.transpose(1, 2) * recency
    mean = weights.sum(-1, keepdim=True) / recency.sum(-1, keepdim=True)
    mean = torch.where(mean < 0, mean.clamp(max=-FLOOR), mean.clamp(min=FLOOR))
    return weights @ per_query_head(query, value) / recency.sum(-1, keepdim=True) / mean
