"""The oracle of `routing`."""

from __future__ import annotations

import torch

from .base import oracle, softmax_attention


@oracle
def naive_routing(query, key, value, *, config, scaling, causal, module):
    """
    The cluster of a vector is the centroid `module.centroids` (G, C, D) with the largest product with it, of equal ones
    the lower. Query t reads the keys of its cluster: decoder, the `window` most recent at or before t; encoder, the
    `window` whose unit vectors have the largest product with the centroid, of equal ones the earlier. And its own key. In
    a decoder the sinks are in no cluster, and every token from theirs on reads them.
    """
    H, N, _ = query.shape
    G, M, _ = key.shape
    visible = torch.zeros(H, N, M, dtype=torch.bool, device=query.device)
    sinks = config.num_sinks if causal else 0
    for h in range(H):
        g = h // (H // G)
        centroids = module.centroids[g].to(query.dtype)
        unit_keys = key[g].detach() / key[g].detach().norm(dim=-1, keepdim=True).clamp_min(1e-12)
        cluster_of_key = (unit_keys @ centroids.T).argmax(-1).tolist()
        for i in range(N):
            t = M - N + i
            c = int((centroids @ query[h, i].detach()).argmax())
            members = [j for j in range(sinks, M) if cluster_of_key[j] == c]
            if causal:
                chosen = [j for j in members if j <= t][-config.window :] + list(range(min(sinks, t)))
            else:
                closeness = (unit_keys @ centroids[c]).tolist()
                chosen = sorted(members, key=lambda j: (-closeness[j], j))[: config.window]
            visible[h, i, [*chosen, t]] = True
    return softmax_attention(query, key, value, visible, scaling)
