"""The oracle of `nystrom`."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import oracle, per_query_head, softmax_attention


@oracle
def naive_nystrom(query, key, value, *, config, scaling, causal, module):
    """
    Encoder: token t belongs to stretch t m // M, m = `num_landmarks`; q~ and k~ are the means over stretches, and the output
    softmax(Q K~) Z softmax(Q~ K) V, Z being `iterations` steps towards the inverse of softmax(Q~ K~). Up to m tokens attend
    exactly.

    Decoder: q~_i and k~_i are the means over segment i of `segment_size` tokens without the n - n_i sinks among them.
    Landmark i reads segments 0..i, again without sinks: A_ij of weight n_j exp(scaling q~_i k~_j), j <= i, normalised, and
    B_i = softmax(q~_i K) V, V~_i the mean value. W solves (A + ridge) W = B + ridge V~. In one softmax t sees the exact part of
    `exact_segments` and sinks, and of every earlier segment with n_j > 0 the landmark k~_j with value W_j, to whose logit
    log n_j and `module.slot_bias` are added.

    With `conv_kernel` = c sum_i `module.conv`[g, i] v_{t + i - c // 2} is added, in a decoder v_{t + i - c + 1}. The queries of
    positions that are not given (N < M) are zero.
    """
    H, N, D = query.shape
    M = key.shape[1]
    query = torch.cat([query.new_zeros(H, M - N, D), query], 1)
    value_of_head = per_query_head(query, value)
    form = _decoder if causal else _encoder
    out = torch.stack(
        [
            form(q, k, v, config, scaling, module, h)
            for h, (q, k, v) in enumerate(zip(query, per_query_head(query, key), value_of_head, strict=True))
        ]
    )
    if config.conv_kernel:
        c = config.conv_kernel
        for i in range(c):
            by = i - (c - 1 if causal else c // 2)
            there = [t for t in range(M) if 0 <= t + by < M]
            moved = torch.zeros_like(value_of_head)
            moved[:, there] = value_of_head[:, [t + by for t in there]]
            out = out + per_query_head(query, module.conv[:, i, None, None].to(out.dtype)) * moved
    return out[:, M - N :]


def _encoder(q: Tensor, k: Tensor, v: Tensor, config, scaling, module, h) -> Tensor:
    M, m = len(k), config.num_landmarks
    if m >= M:
        every = torch.ones(M, M, dtype=torch.bool)
        return softmax_attention(q[None], k[None], v[None], every, scaling)[0]
    stretches = [[t for t in range(M) if t * m // M == i] for i in range(m)]
    q_mean, k_mean = (torch.stack([x[part].mean(0) for part in stretches]) for x in (q, k))
    first, middle, last = ((scaling * a @ b.T).softmax(-1) for a, b in ((q, k_mean), (q_mean, k_mean), (q_mean, k)))
    z, one = middle.T / (middle.abs().sum(0).max() * middle.abs().sum(1).max()), torch.eye(m, dtype=q.dtype)
    for _ in range(config.iterations):
        az = middle @ z
        z = 0.25 * z @ (13 * one - az @ (15 * one - az @ (7 * one - az)))
    return first @ z @ (last @ v)


def _decoder(q: Tensor, k: Tensor, v: Tensor, config, scaling, module, h) -> Tensor:
    M, b, sinks = len(k), config.segment_size, config.num_sinks
    segments = [[t for t in range(i * b, i * b + b) if t >= sinks] for i in range(M // b)]
    counts = [len(part) for part in segments]
    k_mean, values = {}, {}
    for i, part in enumerate(segments):
        if not part:
            continue
        q_mean, k_mean[i] = q[part].mean(0), k[part].mean(0)
        tokens = list(range(sinks, (i + 1) * b))
        read = (scaling * k[tokens] @ q_mean).softmax(0) @ v[tokens]
        logits = torch.stack([scaling * k_mean[j] @ q_mean for j in k_mean])
        row = (logits + torch.tensor([counts[j] for j in k_mean]).to(q.dtype).log()).softmax(0)
        earlier = sum((weight * values[j] for weight, j in zip(row[:-1], values, strict=True)), torch.zeros_like(read))
        values[i] = (read + config.ridge * v[part].mean(0) - earlier) / (row[-1] + config.ridge)
    rows = []
    for t in range(M):
        begin = max(0, (t // b - config.exact_segments) * b)
        exact = [j for j in range(t + 1) if j >= begin or j < sinks]
        far = [j for j in values if j < begin // b]
        logits = [scaling * k[j] @ q[t] for j in exact]
        logits += [
            scaling * k_mean[j] @ q[t] + module.slot_bias[h].to(q.dtype) + q.new_tensor(counts[j]).log() for j in far
        ]
        rows.append(torch.stack(logits).softmax(0) @ torch.stack([*v[exact], *(values[j] for j in far)]))
    return torch.stack(rows)
