"""
Layers take turns: the even ones of the patched layers attend to a sliding window, the odd ones to tokens of their cluster.

    c_j = argmax_c centroid_c . k_j / |k_j|
    decoder: output_t = softmax attention over the `window` most recent keys j <= t with c_j = c_t, and the first
        `num_sinks` tokens, which are in no cluster,
    encoder: tokens sorted by (c_j, j) and cut into chunks of `chunk_size`; softmax attention inside the chunk.

Wang 2020, Cluster-Former (arXiv:2009.06097). A token's cluster is that of its key, so that it always reads itself. Centroids
belong to key/value heads and are a buffer, `centroids` (G, num_clusters, D), of the odd layers: random directions at the
start, then the online spherical k-means of `ops.kmeans` over the keys of training.

Cost N (num_clusters + window) D, or N chunk_size D. State: all keys and values and a label for each key; in even layers
the window and the sinks. Dense limit: decoder, one cluster and window >= N; encoder, one chunk and window >= N. No learned
parameters.

From the paper: it clusters hidden states of a whole document, with k-means run between epochs, where here keys are
clustered per head and centroids follow every step; its sliding layers have a stride, these move by single tokens. The
paper is of encoders.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import EfficientAttentionConfig, option
from ..ops.kmeans import cluster_sums, draw_centroids, follow, nearest
from ..ops.local import Band, band_encoder, local_decoder, remember
from ..ops.sorted_band import Labels, interval_attention, past_attention
from ..registry import get_config_class, register_variant
from ..variant import EfficientAttention, HostShape

TILE = 256  # queries, at most; those of a chunk all read the same keys


@dataclass(kw_only=True)
class ClusterFormerConfig(EfficientAttentionConfig):
    """Hyper-parameters of `cluster_former`."""

    num_clusters: int = option(16, "centroids per key/value head", minimum=1)
    window: int = option(
        256,
        "decoder: tokens of the own cluster, or of the sliding window, itself first; encoder: sliding, per side",
        minimum=1,
    )
    chunk_size: int = option(256, "encoder: tokens of a chunk of the sorted order", minimum=1)
    alternate: bool = option(True, "even patched layers are sliding windows; False: all layers cluster")
    num_sinks: int = option(4, "decoder: first tokens, in no cluster, that every later one sees", minimum=0)
    decay: float = option(0.999, "of the centroids, per training step; 1: they stay", minimum=0.0, maximum=1.0)
    seed: int = option(0, "of the first centroids", minimum=0)

    @classmethod
    def tiny(cls, causal: bool) -> ClusterFormerConfig:
        fixed = {"decay": 1.0}  # the suite compares the gradients of successive steps
        return cls(num_clusters=3, window=4, chunk_size=5, alternate=False, num_sinks=2, **fixed)

    @classmethod
    def variations(cls, causal: bool) -> list[ClusterFormerConfig]:
        sizes = {"window": 3, "chunk_size": 4}
        return [
            cls(num_clusters=2, num_sinks=2, **sizes),  # the layer of the suite is an even one
            cls(num_clusters=1, alternate=False, num_sinks=0, **sizes),
            cls(num_clusters=5, alternate=False, window=1, chunk_size=1, seed=3),
        ]

    @property
    def alternates(self) -> bool:
        return self.alternate

    @classmethod
    def dense_limit(cls, length: int, causal: bool) -> ClusterFormerConfig:
        return cls(num_clusters=1, window=max(length, 1), chunk_size=max(length, 1), alternate=False)

    def window_only(self, causal: bool) -> EfficientAttentionConfig:
        """All layers sliding windows."""
        return get_config_class("sliding_window")(
            window=self.window, num_sinks=self.num_sinks, dense_below=self.dense_below
        )


@register_variant(
    "cluster_former",
    family="learnable patterns",
    summary="sliding windows and clusters of tokens in turn",
    paper="Wang 2020, arXiv:2009.06097",
)
class ClusterFormerAttention(EfficientAttention):
    """`cluster_former`."""

    config_class = ClusterFormerConfig

    def __init__(self, config: ClusterFormerConfig, host: HostShape) -> None:
        super().__init__(config, host)
        self.clusters = not config.alternate or host.patched_index % 2 == 1
        if self.clusters:
            shape = host.num_kv_heads, config.num_clusters, host.head_dim
            centroids = draw_centroids(*shape, config.seed, host.layer)
            self.register_buffer("centroids", centroids.to(torch.get_default_dtype()))

    def attend(self, query, key, value, *, lengths, scaling, dropout, causal, state, hidden) -> Tensor:
        config, options = self.config, {"scaling": scaling, "dropout": dropout}
        if not self.clusters and causal:
            pattern = Band(config.window)
            context = remember(state, key, value, pattern, num_sinks=config.num_sinks, lengths=lengths)
            return local_decoder(query, context, pattern, **options)
        if not self.clusters:
            return band_encoder(query, key, value, window=config.window, lengths=lengths, **options)
        labels, _ = nearest(key, self.centroids)
        if self.training and config.decay < 1:
            sums, counts = cluster_sums(key, labels, config.num_clusters, key.shape[1], lengths)
            self.observe(sums=sums, counts=counts)
        if causal:
            of_queries = labels.repeat_interleave(self.host.group_size, 1)
            return past_attention(
                query, key, value, of_queries[..., None], labels[..., None],
                count=config.num_clusters, window=config.window, num_sinks=config.num_sinks, lengths=lengths, state=state,
                **options,
            )  # fmt: skip
        return self._chunks(query, key, value, labels, lengths, **options)

    @torch.compiler.disable
    def _chunks(self, query, key, value, labels, lengths, **options) -> Tensor:
        size, used = self.config.chunk_size, None
        if lengths is not None:
            used = torch.arange(query.shape[2], device=query.device) < lengths[:, None]
        chunks = Labels.of(labels, self.config.num_clusters, used).chunks(size, query.shape[1], lengths)
        return interval_attention(query, key, value, [chunks], tile=min(size, TILE), **options)

    def update_statistics(self, sums: Tensor, counts: Tensor) -> None:
        self.centroids = follow(self.centroids, sums, counts, self.config.decay)
