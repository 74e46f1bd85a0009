"""The oracle of `clustered`."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import oracle, per_query_head


@oracle
def naive_clustered(query, key, value, *, config, scaling, causal, module):
    """
    The code of a query is the signs of its products with `module.planes` (D, bits); `k_means` puts queries into clusters.
    With c the mean query of a cluster, and j one of the keys that it reads,

    Encoder: plain, i receives softmax_j(scaling c k_j) V of its cluster. `improved`, the total weight that this gives to
    the `top_k` keys with the largest logits is shared out among them by i's own softmax over them. Up to `num_clusters`
    tokens attend exactly.

    Decoder: chunks of `chunk_size`. In one softmax t sees its own chunk up to itself and all keys before its chunk, these
    with the logits of c; `improved`, with its own for the `top_k` of them. c is, of the clusters that the queries of the
    chunk before fall into, the one whose code is nearest to t's.

    The queries of positions that are not given (N < M) are zero.
    """
    H, N, D = query.shape
    M = key.shape[1]
    query = torch.cat([query.new_zeros(H, M - N, D), query], 1)
    heads = zip(query, per_query_head(query, key), per_query_head(query, value), strict=True)
    form = _decoder if causal else _encoder
    return torch.stack([form(q, k, v, config, scaling, module.planes.to(q.dtype)) for q, k, v in heads])[:, M - N :]


def k_means(codes: Tensor, clusters: int, iterations: int) -> tuple[list[int], list[Tensor]]:
    """
    The clusters of codes (n, bits) bool by Lloyd's algorithm with the Hamming distance, of equally near ones the lower, and
    the codes of the clusters: at first those of tokens c n // clusters, later each bit that of most members, of as
    many 1 as 0 the 1; a cluster without a member keeps its own.
    """
    centres = [codes[c * len(codes) // clusters] for c in range(clusters)]
    for _ in range(iterations):
        labels = [nearest(code, centres) for code in codes]
        for c in range(clusters):
            members = codes[[i for i, label in enumerate(labels) if label == c]]
            if len(members):
                centres[c] = 2 * members.sum(0) >= len(members)
    return [nearest(code, centres) for code in codes], centres


def nearest(code: Tensor, centres: list[Tensor]) -> int:
    distances = [int((code != centre).sum()) for centre in centres]
    return distances.index(min(distances))


def best(logits: Tensor, top_k: int) -> list[int]:
    """The largest `top_k`, of equal ones the earlier, in order of position."""
    logits = logits.tolist()
    return sorted(sorted(range(len(logits)), key=lambda j: (-logits[j], j))[:top_k])


def _encoder(q: Tensor, k: Tensor, v: Tensor, config, scaling, planes) -> Tensor:
    if len(k) <= config.num_clusters:
        return (scaling * q @ k.T).softmax(-1) @ v
    labels, _ = k_means(q.detach() @ planes > 0, config.num_clusters, config.iterations)
    rows = []
    for t, label in enumerate(labels):
        members = [i for i in range(len(q)) if labels[i] == label]
        logits = scaling * k @ q[members].mean(0)
        weights = logits.softmax(-1)
        if config.improved:
            top = best(logits, config.top_k)
            own = weights[top].sum() * (scaling * k[top] @ q[t]).softmax(-1)
            weights = weights.index_put((torch.tensor(top),), own)
        rows.append(weights @ v)
    return torch.stack(rows)


def _decoder(q: Tensor, k: Tensor, v: Tensor, config, scaling, planes) -> Tensor:
    size, codes = config.chunk_size, q.detach() @ planes > 0
    rows = []
    for t in range(len(q)):
        start = t // size * size
        logits = scaling * k[: t + 1] @ q[t]
        if start:
            before = range(start - size, start)
            labels, centres = k_means(codes[before.start : before.stop], config.num_clusters, config.iterations)
            there = sorted(set(labels))
            label = there[nearest(codes[t], [centres[c] for c in there])]
            mean = q[[i for i, other in zip(before, labels, strict=True) if other == label]].mean(0)
            far = scaling * k[:start] @ mean
            top = best(far, config.top_k) if config.improved else []
            logits = torch.cat([far.index_put((torch.tensor(top, dtype=torch.int64),), logits[top]), logits[start:]])
        rows.append(logits.softmax(-1) @ v[: t + 1])
    return torch.stack(rows)
