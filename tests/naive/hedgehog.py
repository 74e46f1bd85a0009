"""The oracle of `hedgehog`."""

from __future__ import annotations

import math

import torch

from .base import lower, oracle, per_query_head


@oracle
def naive_hedgehog(query, key, value, *, config, scaling, causal, module):
    """
    phi(x) = [softmax(W x), softmax(-W x)], x = sqrt(scaling) q or k, with the matrices `module.query_map` (H, D, D) and
    `module.key_map` (G, D, D). Position t weighs near keys by sigmoid(gate) exp(a - c), a = scaling q k and c the largest
    a of its near keys, and all others it may see by phi(q) phi(k); the weights are divided by their sum. Near: the
    `window` positions up to t and the sinks (decoder), or `window` positions on each side (encoder). window=0: all are
    weighed by phi(q) phi(k).
    """

    def phi(x, w):
        y = math.sqrt(scaling) * x @ w.transpose(1, 2)
        return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1)

    N, M = query.shape[1], key.shape[1]
    phi_k = per_query_head(query, phi(key, module.key_map))
    weights = lower(phi(query, module.query_map) @ phi_k.transpose(1, 2), causal, 0.0)
    value = per_query_head(query, value)
    if config.window:
        t, j = torch.arange(M - N, M)[:, None], torch.arange(M)
        near = (t - j).abs() <= config.window
        if causal:
            near = (j <= t) & ((t - j < config.window) | (j < config.num_sinks))
        logits = scaling * query @ per_query_head(query, key).transpose(1, 2)
        logits = logits.masked_fill(~near, -math.inf)
        exact = torch.exp(logits - logits.amax(-1, keepdim=True))
        weights = torch.where(near, module.gate.sigmoid()[:, None, None] * exact, weights)
    return weights / weights.sum(-1, keepdim=True) @ value
