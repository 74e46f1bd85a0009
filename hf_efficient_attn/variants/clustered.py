"""
`clustered`: queries that are alike read by their mean. With c the mean query of i's cluster,

    plain:      out_i = softmax(scaling c K^T) V
    improved:   out_i = m softmax(scaling q_i K_T^T) V_T + sum_{j not in T} p_j v_j,    p = softmax(scaling c K^T),

T the `top_k` keys of largest p, and m the sum of p over T. Clusters: the code of a query is `bits` signs of random projections,
and k-means with the Hamming distance (`iterations` of Lloyd's) makes `num_clusters` of a row's queries.

Paper: Vyas et al. 2020, Fast Transformers with Clustered Attention, arXiv:2007.04825. Encoder: a row of at most `num_clusters`
tokens attends exactly, each query a cluster of its own. Cost N num_clusters D, and N num_clusters bits per iteration.

Decoder (the paper has none): chunks of `chunk_size` tokens, whose queries see their own chunk exactly, up to themselves. The
clusters for chunk s are those of the queries of chunk s - 1, and each c reads the keys before chunk s once. A query of chunk s
belongs to the cluster whose code is nearest to its own; one softmax joins its chunk with one further slot, of weight
sum_j exp(scaling c k_j) and value sum_j p_j v_j, over all j before the chunk; improved, over those not in T, and the keys in T
enter with the query's own logits. Chunk 0 sees itself only. Cost N^2 num_clusters / chunk_size. State: all tokens, O(N), the
queries of the chunk under way, and what the clusters for it read, so that a step reads its chunk, one slot and `top_k` keys.

Dense limit: improved, top_k >= N; plain, in an encoder, num_clusters >= N. No parameters; `planes` (D, bits), a buffer, is
drawn from a seed. Codes, clusters and T are constants of the backward pass; c is not.

From the paper: the codes of the first centroids are those of queries at equal distances, and a cluster without a member keeps
its code and is not read. Where keys outnumber queries, those that are not given count as zero. In models that rotate queries a
mean over distant tokens blurs their high frequencies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..caching import Buffer, Count, Node, RecentTokens, TokenStore, column
from ..config import EfficientAttentionConfig, option
from ..ops import few
from ..ops.codes import FEW, find_clusters, nearest_clusters
from ..ops.draws import normal, source
from ..ops.exact import exact_attention
from ..ops.largest import largest_products
from ..ops.precision import first_order, without_autocast
from ..ops.sorted_band import Intervals, interval_attention, interval_attention_and_lse
from ..ops.summaries import most_ended, segments_of
from ..registry import get_config_class, register_variant
from ..variant import EfficientAttention, HostShape

ABSENT = -1e6  # added to the score of a cluster without a member


@dataclass(kw_only=True)
class ClusteredConfig(EfficientAttentionConfig):
    """Hyper-parameters of `clustered`."""

    num_clusters: int = option(32, "clusters of an encoder's row, or of a decoder's chunk", minimum=1)
    improved: bool = option(True, "each query reads its cluster's `top_k` keys by itself")
    top_k: int = option(32, "of the paper's improved form, keys per cluster", minimum=1)
    chunk_size: int = option(512, "decoder: tokens whose queries are clustered together", minimum=1)
    iterations: int = option(10, "of k-means", minimum=0)
    bits: int = option(63, "of a query's code", minimum=1)
    seed: int = option(0, "of the planes that give the codes", minimum=0)

    @classmethod
    def tiny(cls, causal: bool) -> ClusteredConfig:
        return cls(num_clusters=3, top_k=4, chunk_size=5, iterations=2, bits=33)

    @classmethod
    def variations(cls, causal: bool) -> list[ClusteredConfig]:
        sizes = {"num_clusters": 3, "chunk_size": 8, "bits": 9}
        return [
            cls(improved=False, **sizes),
            cls(top_k=12, iterations=0, seed=3, **sizes),
            cls(num_clusters=12, top_k=2, chunk_size=4, bits=2),
            cls(num_clusters=1, improved=False, chunk_size=3, bits=1),
        ]

    @classmethod
    def dense_limit(cls, length: int, causal: bool) -> ClusteredConfig:
        return cls(num_clusters=3, top_k=max(length, 1), chunk_size=5)

    def window_only(self, causal: bool) -> EfficientAttentionConfig | None:
        """A decoder's own chunk, and nothing else; an encoder has none."""
        options = {"block_size": self.chunk_size, "num_sinks": 0, "dense_below": self.dense_below}
        return get_config_class("block")(**options) if causal else None


class Read(NamedTuple):
    """
    What the C clusters of I chunks read: output (B, H, I, C, D) and its log-sum-exp (B, H, I, C), without the keys in top
    (B, H, I, C, K) int64, those of the largest logits (K = 0 in the plain form; 0 at the end where there are fewer). codes (B,
    H, I, C, bits + 1), see `codes.k_means`.
    """

    output: Tensor
    lse: Tensor
    top: Tensor
    codes: Tensor

    def of_chunks(self, index: slice | Tensor) -> Read:
        """Some of the chunks, or of each row one (B,)."""
        if isinstance(index, slice):
            return Read(*(x[:, :, index] for x in self))
        row = torch.arange(len(index), device=index.device)
        return Read(*(x[row, :, index][:, :, None] for x in self))


@register_variant(
    "clustered",
    family="learnable patterns",
    summary="queries of a cluster read by their mean, and the keys that it weighs most by themselves",
    paper="Vyas 2020, arXiv:2007.04825",
)
class ClusteredAttention(EfficientAttention):
    """`clustered`. S slots of the keys, C clusters, I chunks; an encoder's row is one chunk."""

    config_class = ClusteredConfig
    linear_cost = False  # in a decoder

    def __init__(self, config: ClusteredConfig, host: HostShape) -> None:
        super().__init__(config, host)
        planes = normal(source(config.seed, host.layer), host.head_dim, config.bits).bfloat16()
        self.register_buffer("planes", planes.to(torch.get_default_dtype()))

    @torch.compiler.disable
    def attend(self, query, key, value, *, lengths, scaling, dropout, causal, state, hidden) -> Tensor:
        options = {"scaling": scaling, "dropout": dropout}
        with torch.autocast(query.device.type, enabled=False):  # means and codes are not to be of half precision
            if causal:
                return self._decoder(query, key, value, lengths, state, **options)
            return self._encoder(query, key, value, lengths, **options)

    def _encoder(self, query, key, value, lengths, **options) -> Tensor:
        clusters, n = self.config.num_clusters, key.shape[2]
        if n <= clusters:
            return exact_attention(query, key, value, lengths=lengths, causal=False, **options)
        labels, codes, means = self._cluster(query[:, :, None], lengths)
        cluster, end = labels[:, :, 0], n if lengths is None else lengths
        read = Read(*self._read(means, key, value, end, 0, **options), codes)
        if self.config.improved:
            past = torch.as_tensor(end, device=key.device).view(-1, 1)
            own = interval_attention(query, key, value, [_of_top(read.top, cluster, past)], **options)
            every = torch.arange(clusters, device=key.device).expand(*query.shape[:2], -1)
            top = [_of_top(read.top, every, past)]  # what each mean itself gives the keys that its queries read instead
            given = key.to(means.dtype), value.to(means.dtype)
            _, lse = interval_attention_and_lse(means[:, :, 0], *given, top, scaling=options["scaling"], tile=1)
            share = _share(read.lse, lse[:, :, None])
            output = _Blend.apply(own, read.output, cluster, _of_cluster(share[..., None], cluster))
        else:
            output = _of_cluster(read.output, cluster).to(query)
        if lengths is None:
            return output
        short = [x[:, :, :clusters] for x in (query, key, value)]
        exact = exact_attention(*short, lengths=lengths.clamp_max(clusters), causal=False, **options)
        return torch.where((lengths <= clusters)[:, None, None, None], pad(exact, (0, 0, 0, n - clusters)), output)

    def _decoder(self, query, key, value, lengths, state, **options) -> Tensor:
        b, n, device = self.config.chunk_size, query.shape[2], query.device
        tokens, offset = (TokenStore(), 0) if state is None else (state.store("tokens"), state.count)
        buffer = tokens.extend(key, value, lengths)
        near, size = (buffer.key, buffer.value), buffer.key.shape[2]
        read = self._of_chunks(query, buffer, lengths, state, **options)
        position = (column(offset) + torch.arange(n, device=device)).view(-1, n)
        begin = position // b * b
        low, high = (x.clamp_max(size)[:, None].expand(query.shape[:3]) for x in (begin, position + 1))
        order = torch.arange(size, device=device).expand(len(query), key.shape[1], -1)
        rounds = [Intervals(order, low, high)]
        if isinstance(offset, int) and offset + n <= b:
            return interval_attention(query, *near, rounds, **options)
        stand = (position // b - column(offset // b)).clamp_max(read.lse.shape[2] - 1).expand(len(query), -1)
        cluster = nearest_clusters(query, self.planes, read.codes, stand, offset % b, b)
        if n <= FEW and few.has_kernel(query, *near, options["dropout"]):
            top = _of_cluster(read.top, cluster)
            until = top + (torch.arange(self._top_k) < begin[:, None, :, None])
            ranges = (torch.cat([x[..., None], y], 3) for x, y in ((low, top), (high, until)))
            output, lse = few.attend_ranges(query, *near, *ranges, b + self._top_k, scaling=options["scaling"])
        else:
            if self.config.improved:
                rounds.append(_of_top(read.top, cluster, begin))
            output, lse = interval_attention_and_lse(query, *near, rounds, **options)
        share = _share(_of_cluster(read.lse[..., None], cluster), lse[..., None])
        return _Blend.apply(output, read.output, cluster, share)

    def _of_chunks(self, query, buffer: Buffer, lengths, state, **options) -> Read:
        """What there is for the queries of a call, by their chunks, from that of the first one on."""
        b, n, clusters = self.config.chunk_size, query.shape[2], self.config.num_clusters
        if state is None:
            begun, made = 0, (n - 1) // b
            chunks = query[:, :, : made * b].unflatten(2, (made, b))
        else:
            begun, ended = state.count // b, (state.count + (n if lengths is None else lengths)) // b
            made = most_ended(state, b, n, lengths)
            store = state.store("queries", lambda: RecentTokens(b))
            asked = store.extend(query, query[..., :0], lengths)
            chunks = segments_of(asked.key, asked.first, begun, made, b)
            store.keep_from(ended * b)
        if state is not None and "read" in state.entries:
            read = Read(**state.entries["read"].entries)
        else:
            shape, accurate = (*query.shape[:2], 1, clusters), torch.promote_types(query.dtype, torch.float32)
            output, lse = query.new_zeros(*shape, query.shape[3], dtype=accurate), query.new_full(shape, float("-inf"))
            top = torch.zeros(*shape, self._top_k, dtype=torch.int64, device=query.device)
            read = Read(
                output, lse.to(accurate), top, output.new_zeros(*shape, self.config.bits + 1, dtype=torch.float32)
            )
        if made:
            _, codes, means = self._cluster(chunks, None)
            new = Read(*self._read(means, buffer.key, buffer.value, (begun + 1) * b, b, **options), codes)
            read = Read(*(torch.cat(pair, 2) for pair in zip(read, new, strict=True)))
        if state is not None:
            index = ended - begun
            last = read.of_chunks(slice(index, index + 1) if isinstance(index, int) else index)
            state.store("read", Node).entries.update(last._asdict())
        return read

    @property
    def _top_k(self) -> int:
        return self.config.top_k if self.config.improved else 0

    def _cluster(self, query: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """
        query (B, H, I, n, D), of which `lengths` (B,) are real -> the cluster of each, (B, H, I, n); codes as in `Read`, and
        the mean queries (B, H, I, C, D), float32 or better, zeros where a cluster has no member.
        """
        (*shape, n, size), clusters, device = query.shape, self.config.num_clusters, query.device
        labels, codes = find_clusters(query, self.planes, clusters, self.config.iterations, lengths)
        place = (labels.flatten(0, 2) + clusters * torch.arange(math.prod(shape), device=device)[:, None]).flatten()
        real = torch.ones(1, n, device=device) if lengths is None else torch.arange(n, device=device) < lengths[:, None]
        real = real.to(torch.promote_types(query.dtype, torch.float32)).view(-1, 1, 1, n).expand(*shape, n).flatten()
        sums, counts = real.new_zeros(len(codes.flatten(0, 3)), size), real.new_zeros(len(codes.flatten(0, 3)))
        index, given = place[:, None].expand(-1, size), query.to(real).reshape(-1, size)
        sums, counts = sums.scatter_add(0, index, given), counts.index_add(0, place, real)
        means = (sums / counts.clamp_min(1)[:, None]).view(*shape, clusters, size)
        codes[..., -1].masked_fill_(counts.view(*shape, clusters) == 0, ABSENT)
        return labels, codes, means

    def _read(self, means, key, value, first: Count, step: int, **options) -> tuple[Tensor, Tensor, Tensor]:
        """The first three of `Read`. Chunk i of means (B, H, I, C, D) sees the keys (B, G, S, D) before first + i step."""
        (batch, heads, chunks, clusters, _), device = means.shape, key.device
        ends = (column(first) + step * torch.arange(chunks, device=device)).view(-1, chunks)
        ends = ends.clamp_max(key.shape[2]).repeat_interleave(clusters, 1)
        means, key, value = means.flatten(2, 3), key.to(means.dtype), value.to(means.dtype)
        top = largest_products(means, key, ends, self._top_k)
        order = torch.arange(key.shape[2], device=device).expand(*key.shape[:2], -1)
        high = ends[:, None].expand(batch, heads, -1)
        rounds, apart = [Intervals(order, torch.zeros_like(high), high)], top if self.config.improved else None
        output, lse = interval_attention_and_lse(means, key, value, rounds, apart=apart, **options)
        return tuple(x.unflatten(2, (chunks, clusters)) for x in (output, lse, top))


def _of_top(top: Tensor, cluster: Tensor, past: Tensor) -> Intervals:
    """
    What queries of these clusters (B, H, T), numbers among I C, read of top (B, H, I, C, K): its first keys, as many as there
    are `past` (B or 1, 1 or T).
    """
    most, low = top.shape[4], cluster * top.shape[4]
    return Intervals(top.flatten(2), low, low + past[:, None].clamp_max(most))


def _share(far: Tensor, near: Tensor) -> Tensor:
    """The share of what is far, of log-sum-exps; 0 where there is nothing in either, as in a row without a token."""
    return torch.sigmoid(far - near.masked_fill(near == float("-inf"), 0))


class _Blend(torch.autograd.Function):
    """
    The share (B, H, T, 1) of what the queries' clusters (B, H, T), numbers among I C, read, (B, H, I, C, D), and for the rest
    their own, (B, H, T, D): what queries of a cluster have in common is spread over them for no longer than needed.
    """

    @staticmethod
    @without_autocast
    def forward(ctx, own, read, cluster, share):
        ctx.save_for_backward(own, read, cluster, share)
        far = _of_cluster(read, cluster)
        return torch.lerp(own.to(far), far, share.to(far)).to(own)

    @staticmethod
    @first_order
    @without_autocast
    def backward(ctx, grad):
        own, read, cluster, share = ctx.saved_tensors
        far = _of_cluster(read, cluster)
        grad = grad.to(far)
        of_share = (far.sub_(own) * grad).sum(-1, keepdim=True)
        of_read = torch.zeros_like(read).flatten(2, 3)
        of_read.scatter_add_(2, cluster[..., None].expand_as(far), torch.mul(grad, share, out=far))
        return (grad - far).to(own), of_read.view(read.shape), None, of_share.to(share)


def _of_cluster(x: Tensor, cluster: Tensor) -> Tensor:
    """x (B, H, I, C, E) -> (B, H, T, E), what queries of these clusters (B, H, T), numbers among I C, have in common."""
    return torch.gather(x.flatten(2, 3), 2, cluster[..., None].expand(-1, -1, -1, x.shape[4]))
