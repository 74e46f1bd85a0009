"""The oracle of `cluster_former`."""

from __future__ import annotations

import torch

from .base import oracle, pattern, softmax_attention


@oracle
def naive_cluster_former(query, key, value, *, config, scaling, causal, module):
    """
    A layer without `module.centroids` is a sliding window: decoder, t and `window` - 1 tokens before it and the sinks;
    encoder, `window` tokens on each side. In one with centroids (G, C, D) the cluster of a token is the centroid with the
    largest product with its key, of equal ones the lower. Decoder: t sees the `window` most recent tokens of its cluster,
    itself among them, and the sinks, which are in no cluster. Encoder: tokens sorted by (cluster, position) are cut into
    chunks of `chunk_size`; t sees its chunk.
    """
    if not hasattr(module, "centroids"):

        def near(t, j):
            return t - j < config.window if causal else abs(t - j) <= config.window

        return pattern(query, key, value, near, scaling=scaling, causal=causal, num_sinks=config.num_sinks)
    H, N, _ = query.shape
    G, M, _ = key.shape
    visible = torch.zeros(H, N, M, dtype=torch.bool, device=query.device)
    for h in range(H):
        g = h // (H // G)
        cluster = (key[g].detach() @ module.centroids[g].to(key.dtype).T).argmax(-1).tolist()
        order = sorted(range(M), key=lambda j: (cluster[j], j))
        for i in range(N):
            t = M - N + i
            if causal:
                members = [j for j in range(config.num_sinks, t + 1) if cluster[j] == cluster[t]]
                chosen = members[-config.window :] + list(range(min(config.num_sinks, t + 1)))
            else:
                chunk = order.index(t) // config.chunk_size
                chosen = order[chunk * config.chunk_size : (chunk + 1) * config.chunk_size]
            visible[h, i, chosen] = True
    return softmax_attention(query, key, value, visible, scaling)
