"""The oracle of `infini`."""

from __future__ import annotations

import torch
from torch.nn.functional import elu

from .base import oracle, softmax_attention


@oracle
def naive_infini(query, key, value, *, config, scaling, causal, module):
    """
    Local attention inside the segment of `segment_size` (up to itself and with the sinks, in a decoder; with the first
    `global_tokens` in an encoder, whose own output is attention to all positions and nothing else), mixed with what
    the query reads from an associative memory A, z of other segments: those before its own in a decoder, all others in
    an encoder. With phi(x) = elu(x) + 1 and g = sigmoid(`module.gate[h]`) of query head h,

        out = (1 - g) local + g phi(q) A / (phi(q) z),      local alone while the memory is empty.

    A segment adds sum_j phi(k_j) to z and to A, rule "plain": sum_j phi(k_j) v_j^T; "delta": sum_j phi(k_j)
    (v_j - phi(k_j) A / (phi(k_j) z))^T with A and z as they were before the segment, 0 where they are empty.
    """
    H, N, D = query.shape
    G, M, _ = key.shape
    b, everyone = config.segment_size, config.num_sinks if causal else config.global_tokens
    segments = [range(begin, min(begin + b, M)) for begin in range(0, M, b)]
    visible = torch.tensor(
        [
            [
                j <= t and (j // b == t // b or j < everyone) if causal else j // b == t // b or min(t, j) < everyone
                for j in range(M)
            ]
            for t in range(M - N, M)
        ]
    )
    local = softmax_attention(query, key, value, visible, scaling)
    heads = []
    for h in range(H):
        g = h // (H // G)
        gate, rows = torch.sigmoid(module.gate[h].to(query.dtype)), []
        memories = []  # of each segment
        for s in range(len(segments)):
            A, z = key.new_zeros(D, D), key.new_zeros(D)
            for other in range(s) if causal else [o for o in range(len(segments)) if o != s]:
                phi, v = elu(key[g, segments[other]]) + 1, value[g, segments[other]]
                known = phi @ A / (phi @ z)[:, None] if config.rule == "delta" and z.any() else torch.zeros_like(v)
                A, z = A + phi.T @ (v - known), z + phi.sum(0)
            memories.append((A, z))
        for i in range(N):
            A, z = memories[(M - N + i) // b]
            phi = elu(query[h, i]) + 1
            alone = not z.any() or (not causal and M - N + i < everyone)
            rows.append(local[h, i] if alone else (1 - gate) * local[h, i] + gate * phi @ A / (phi @ z))
        heads.append(torch.stack(rows))
    return torch.stack(heads)
