"""The oracle of `funnel`."""

from __future__ import annotations

import torch

from .base import oracle, per_query_head


@oracle
def naive_funnel(query, key, value, *, config, scaling, causal, module=None):
    """
    Stretches of `pooling` positions. Encoder: the mean of a stretch's queries attends to all keys, and all its tokens
    receive that. Decoder: in one softmax, token t sees the keys before its stretch with the query of the stretch's first
    token, and those of its stretch up to itself with its own.

    The queries of positions that are not given (N < M) are zero.
    """
    N, M, p = query.shape[1], key.shape[1], config.pooling
    key, value = per_query_head(query, key), per_query_head(query, value)
    query = torch.cat([query.new_zeros(query.shape[0], M - N, query.shape[2]), query], 1)
    rows = []
    for t in range(M - N, M):
        start = t // p * p
        if causal:
            far = torch.einsum("hd,hjd->hj", query[:, start], key[:, :start])
            near = torch.einsum("hd,hjd->hj", query[:, t], key[:, start : t + 1])
            logits = torch.cat([far, near], 1)
        else:
            logits = torch.einsum("hd,hjd->hj", query[:, start : start + p].mean(1), key)
        weights = (scaling * logits).softmax(-1)
        rows.append(torch.einsum("hj,hjd->hd", weights, value[:, : weights.shape[1]]))
    return torch.stack(rows, 1)
