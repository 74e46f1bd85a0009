"""
Queries and keys are clustered, and a query attends to keys of its own cluster:

    c(x) = argmax_c centroid_c . x / |x|
    output_t = softmax attention over the chosen keys j with c(k_j) = c(q_t), and over key t in any case, once.

Chosen are, in a decoder, the `window` most recent of them at or before t, beside the first `num_sinks` tokens, which are in
no cluster and read by all (pretrained decoders need them: Xiao 2023), and in an encoder the `window` nearest to the
centroid, the same for all queries of the cluster. A cluster may have queries and no keys; then a query reads itself.

Roy 2020, Routing Transformer (arXiv:2003.05997). Centroids belong to key/value heads and are a buffer, `centroids`
(G, num_clusters, D): random directions at the start, then the online spherical k-means of `ops.kmeans` over queries and
keys of training. Cost N (num_clusters + window) D. State: all keys and values and a label for each key. Dense limit: one
cluster, window >= N. No learned parameters.

From the paper: its decoder picks the `window` best of the whole sequence, which shows a token what comes after it, so the
most recent are picked here; and its encoder drops queries that are not among the `window` best of a cluster, so that some
tokens receive nothing and others are counted twice, where here every query is served once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import EfficientAttentionConfig, option
from ..ops.kmeans import cluster_sums, draw_centroids, follow, nearest
from ..ops.sorted_band import Intervals, Labels, interval_attention, past_attention
from ..registry import register_variant
from ..variant import EfficientAttention, HostShape

TILE = 256  # queries; those of a cluster all read the same keys


@dataclass(kw_only=True)
class RoutingConfig(EfficientAttentionConfig):
    """Hyper-parameters of `routing`."""

    num_clusters: int = option(16, "centroids per key/value head", minimum=1)
    window: int = option(256, "keys of its cluster that a query reads", minimum=1)
    num_sinks: int = option(
        4, "decoder: first tokens, in no cluster, that every later one sees; 0: as in the paper", minimum=0
    )
    decay: float = option(0.999, "of the centroids, per training step; 1: they stay", minimum=0.0, maximum=1.0)
    seed: int = option(0, "of the first centroids", minimum=0)

    @classmethod
    def tiny(cls, causal: bool) -> RoutingConfig:
        return cls(
            num_clusters=3, window=4, num_sinks=2, decay=1.0
        )  # the suite compares the gradients of successive steps

    @classmethod
    def variations(cls, causal: bool) -> list[RoutingConfig]:
        return [
            cls(num_clusters=1, window=3, num_sinks=0),
            cls(num_clusters=5, window=1, seed=3),
            cls(num_clusters=2, window=64),
        ]

    @classmethod
    def dense_limit(cls, length: int, causal: bool) -> RoutingConfig:
        return cls(num_clusters=1, window=max(length, 1))


@register_variant(
    "routing",
    family="learnable patterns",
    summary="a query attends to keys of its own cluster",
    paper="Roy 2020, arXiv:2003.05997",
)
class RoutingAttention(EfficientAttention):
    """`routing`."""

    config_class = RoutingConfig

    def __init__(self, config: RoutingConfig, host: HostShape) -> None:
        super().__init__(config, host)
        shape = host.num_kv_heads, config.num_clusters, host.head_dim
        centroids = draw_centroids(*shape, config.seed, host.layer)
        self.register_buffer("centroids", centroids.to(torch.get_default_dtype()))

    def attend(self, query, key, value, *, lengths, scaling, dropout, causal, state, hidden) -> Tensor:
        options = {"scaling": scaling, "dropout": dropout}
        query_labels, _ = nearest(query, self.centroids)
        key_labels, closeness = nearest(key, self.centroids)
        if self.training and self.config.decay < 1:
            self._observe(query, key, query_labels, key_labels, lengths)
        if causal:
            return past_attention(
                query, key, value, query_labels[..., None], key_labels[..., None],
                count=self.config.num_clusters, window=self.config.window, num_sinks=self.config.num_sinks, lengths=lengths,
                state=state, **options,
            )  # fmt: skip
        return self._read_nearest(query, key, value, query_labels, key_labels, closeness, lengths, **options)

    def _observe(self, query, key, query_labels, key_labels, lengths) -> None:
        shape = self.config.num_clusters, key.shape[1], lengths
        of_queries, of_keys = cluster_sums(query, query_labels, *shape), cluster_sums(key, key_labels, *shape)
        self.observe(sums=of_queries[0] + of_keys[0], counts=of_queries[1] + of_keys[1])

    def update_statistics(self, sums: Tensor, counts: Tensor) -> None:
        self.centroids = follow(self.centroids, sums, counts, self.config.decay)

    @torch.compiler.disable
    def _read_nearest(self, query, key, value, query_labels, key_labels, closeness, lengths, **options) -> Tensor:
        """Encoder: a query of cluster c reads the `window` keys of c nearest to its centroid, and its own."""
        n, clusters = query.shape[2], self.config.num_clusters
        position = torch.arange(n, device=query.device)
        live = None if lengths is None else position < lengths[:, None]
        if live is not None:
            key_labels = key_labels.masked_fill(~live[:, None], clusters)
        # Keys are labelled in order of closeness, so that those of one label keep it; `order` leads back to their places.
        nearer = torch.argsort(closeness, dim=-1, descending=True, stable=True)
        labels = Labels.of(torch.gather(key_labels, 2, nearer), clusters)
        order = torch.gather(nearer, 2, labels.order)
        low, _, stop = labels.ranks(query_labels, position.new_zeros(len(query), 1), live)
        read = Intervals(order, low, torch.minimum(low + self.config.window, stop))
        rank = read.ranks().repeat_interleave(query.shape[1] // key.shape[1], 1)
        own = torch.where((rank < read.low) | (rank >= read.high), position, -1)
        return interval_attention(query, key, value, [read], own=own, tile=TILE, **options)
