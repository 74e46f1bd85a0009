"""The oracle of `cosformer`."""

from __future__ import annotations

import math

import torch

from .base import lower, oracle, per_query_head

FLOOR = 1e-6  # smallest normaliser: features can all be zero


@oracle
def naive_cosformer(query, key, value, *, config, scaling, causal, module=None):
    """
    Weights relu(q_t) . relu(k_j) cos(pi / 2 (t - j) / `max_length`) over their sum, which is at least 1e-6; `scaling` is
    not used.
    """
    N, M = query.shape[1], key.shape[1]
    distance = torch.arange(M - N, M, device=query.device)[:, None] - torch.arange(M, device=query.device)
    weights = query.relu() @ per_query_head(query, key).relu().transpose(1, 2)
    weights = lower(weights * torch.cos(math.pi / 2 * distance.to(query.dtype) / config.max_length), causal, 0.0)
    return weights @ per_query_head(query, value) / weights.sum(-1, keepdim=True).clamp(min=FLOOR)
