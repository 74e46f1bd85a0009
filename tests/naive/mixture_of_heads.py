"""The oracle of `mixture_of_heads`."""

from __future__ import annotations

import torch

from .base import lower, oracle, softmax_attention


@oracle
def naive_mixture_of_heads(query, key, value, *, config, scaling, causal, module, hidden):
    """
    Token i runs the first `num_shared_heads` query heads and the `top_k` others of the highest probability
    p_i = softmax(`module.router.weight` hidden_i), of equal ones the lower head; its other heads give zeros.

    A chosen head's output is multiplied by 1 + p - constant(p). All keys and values are seen by every chosen head.
    """
    H, N, _ = query.shape
    M, shared = key.shape[1], config.num_shared_heads
    probability = (hidden @ module.router.weight.T).softmax(-1)  # (N, H - shared)
    gates = torch.zeros(H, N, dtype=query.dtype, device=query.device)
    gates[:shared] = 1
    for i in range(N):
        p = probability[i]
        ranked = sorted(range(H - shared), key=lambda h, p=p: (-p[h].item(), h))
        for h in ranked[: config.top_k]:
            gates[shared + h, i] = 1 + p[h] - p[h].detach()
    everything = lower(torch.ones(1, N, M, device=query.device), causal, 0).bool()
    return gates[..., None] * softmax_attention(query, key, value, everything, scaling)
