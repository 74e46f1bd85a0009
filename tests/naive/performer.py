"""The oracle of `performer`."""

from __future__ import annotations

import math

from .base import lower, oracle, per_query_head

RELU_FLOOR = 1e-6  # smallest normaliser of the relu form, whose features can all be zero


@oracle
def naive_performer(query, key, value, *, config, scaling, causal, module):
    """
    Weights phi(q) . phi(k) over their sum, with the random directions w = `module.features` (G, m, D), norms applied.

    "softmax": phi(x) = exp(w . x - |x|^2 / 2) with x = sqrt(scaling) q or k, computed here as a log-sum-exp over
    features, so that nothing overflows and no epsilon is needed. "relu": phi(x) = relu(w . x) / sqrt(m), without
    `scaling` (it would cancel) and without epsilon; the normaliser is at least 1e-6, so that a query without any
    feature in common with its keys gets zero.
    """
    w = per_query_head(query, module.features.to(query.dtype))
    key, value = per_query_head(query, key), per_query_head(query, value)
    if config.kernel == "softmax":
        log_q, log_k = (
            math.sqrt(scaling) * x @ w.transpose(1, 2) - scaling * x.square().sum(-1, keepdim=True) / 2
            for x in (query, key)
        )
        log_weights = (log_q[:, :, None] + log_k[:, None]).logsumexp(-1)  # (H, N, M)
        return lower(log_weights, causal, -math.inf).softmax(-1) @ value
    phi_q, phi_k = ((x @ w.transpose(1, 2)).relu() / math.sqrt(w.shape[1]) for x in (query, key))
    weights = lower(phi_q @ phi_k.transpose(1, 2), causal, 0.0)
    return weights @ value / weights.sum(-1, keepdim=True).clamp(min=RELU_FLOOR)
