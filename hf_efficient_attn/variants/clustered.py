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

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..caching import Buffer, Count, Node, TokenStore, column
from ..config import EfficientAttentionConfig, option
from ..ops.exact import exact_attention
from ..ops.joint import HUGE, Part, joint_attention_and_lse
from ..ops.local import Blocks
from ..ops.rows import shift
from ..ops.sorted_band import Intervals, SortedBand
from ..ops.summaries import segments_of
from ..ops.tiles import largest_places
from ..registry import get_config_class, register_variant
from ..variant import EfficientAttention, HostShape

ROWS = 64  # mean queries that read one prefix of the keys, where chunks have fewer
SCORES = 2**18  # of those mean queries that exist at one time
STEP = 16  # new tokens up to which queries are not put into frames of whole chunks
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
        return get_config_class("block")(block_size=self.chunk_size, num_sinks=0) if causal else None


class Read(NamedTuple):
    """
    What the C clusters of I chunks read: output (B, H, I, C, D) and its log-sum-exp (B, H, I, C), without the keys in top
    (B, H, I, C, K) int64, slots of the largest logits first (K = 0 in the plain form; a key more than once where there are
    fewer than K). codes (B, H, I, C, bits + 1), see `k_means`.
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
        generator = torch.Generator().manual_seed(config.seed + 1_000_003 * host.layer)
        planes = torch.randn(host.head_dim, config.bits, generator=generator, device="cpu").bfloat16().float()
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
        output = _of_cluster(read.output, cluster)
        if self.config.improved:
            stand = torch.zeros(1, n, dtype=torch.int64, device=query.device)
            band = self._band(read.top, key, value, cluster, stand, torch.as_tensor(end).view(-1, 1), n // clusters)
            own, _ = joint_attention_and_lse(query, [band], **options)
            share = torch.sigmoid(_lse_of_top(means, key, read.top, end, options["scaling"]) - read.lse)
            output = torch.lerp(output, own.to(output), _of_cluster(share[..., None], cluster))
        output = output.to(query)
        if lengths is None:
            return output
        few = [x[:, :, :clusters] for x in (query, key, value)]
        exact = exact_attention(*few, lengths=lengths.clamp_max(clusters), causal=False, **options)
        return torch.where((lengths <= clusters)[:, None, None, None], pad(exact, (0, 0, 0, n - clusters)), output)

    def _decoder(self, query, key, value, lengths, state, **options) -> Tensor:
        (batch, _, n, _), b, device = query.shape, self.config.chunk_size, query.device
        tokens, offset = (TokenStore(), 0) if state is None else (state.store("tokens"), state.count)
        buffer = tokens.extend(key, value, lengths)
        read = self._of_chunks(query, buffer, lengths, state, **options)
        # Tokens move to slots of their own: slot 0 is the first of the chunk that the first query stands in.
        skip = offset % b
        count = min(read.lse.shape[2], -(-(n + (skip if isinstance(skip, int) else b - 1)) // b))
        read = read.of_chunks(slice(0, count))
        near = [shift(x, skip - offset, count * b) for x in (buffer.key, buffer.value)]
        if state is not None and n <= STEP:
            place = (column(skip) + torch.arange(n, device=device)).view(-1, n)
            slot, stand = torch.arange(count * b, device=device), (place // b).clamp_max(count - 1)
            seen = (slot <= place[..., None]) & (slot // b == stand[..., None])
            part, queries = Part(*near, mask=seen[:, None]), query
        else:
            part = Blocks(batch, 0, count, b).part(*near, causal=True)
            queries, stand = shift(query, skip, count * b), torch.arange(count * b, device=device)[None] // b
        if count == 1 and isinstance(offset, int) and offset < b:
            output, _ = joint_attention_and_lse(queries, [part], **options)
        else:
            cluster = self._nearest(queries, read.codes, stand)
            parts = [part]
            if self.config.improved:
                past = (column(offset - skip) + b * torch.arange(count, device=device)).view(-1, count)
                parts.append(
                    self._band(read.top, buffer.key, buffer.value, cluster, stand, past, b // read.lse.shape[3])
                )
            output, lse = joint_attention_and_lse(queries, parts, **options)
            share = torch.sigmoid(_of_cluster(read.lse[..., None], cluster) - lse[..., None])
            far = _of_cluster(read.output, cluster)
            output = torch.lerp(output.to(far), far, share.to(far)).to(query)
        return output if queries is query else shift(output, -skip, n)

    def _of_chunks(self, query, buffer: Buffer, lengths, state, **options) -> Read:
        """What there is for the queries of a call, by their chunks, from that of the first one on."""
        b, n, clusters = self.config.chunk_size, query.shape[2], self.config.num_clusters
        if state is None:
            begun, made = 0, (n - 1) // b
            chunks = query[:, :, : made * b].unflatten(2, (made, b))
        else:
            begun, ended = state.count // b, (state.count + (n if lengths is None else lengths)) // b
            made = (state.count % b + n) // b if isinstance(begun, int) else int((ended - begun).max())
            store = state.store("queries")
            asked = store.extend(query, query[..., :0], lengths)
            chunks = segments_of(asked.key, asked.first, begun, made, b)
            store.keep_from(ended * b, b)
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

    # Clusters

    @torch.no_grad()
    def _code(self, query: Tensor) -> Tensor:
        """(..., D) -> (..., bits + 1) float32: the code as 1 and -1, and a 1."""
        accurate = torch.promote_types(query.dtype, torch.float32)
        code = (query.to(accurate) @ self.planes.to(accurate) > 0).to(torch.float32)
        return pad(code.mul_(2).sub_(1), (0, 1), value=1.0)

    def _cluster(self, query: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """
        query (B, H, I, n, D), of which `lengths` (B,) are real -> the cluster of each, (B, H, I, n); codes as in `Read`, and
        the mean queries (B, H, I, C, D), float32 or better, zeros where a cluster has no member.
        """
        clusters, n, shape = self.config.num_clusters, query.shape[3], query.shape[:3]
        accurate = torch.promote_types(query.dtype, torch.float32)
        code, real = self._code(query), None
        if lengths is not None:
            real = (torch.arange(n, device=query.device) < lengths[:, None]).view(-1, 1, 1, n, 1)
            code = code * real
            lengths = lengths[:, None, None].expand(shape).flatten()
        labels, codes = k_means(code.flatten(0, 2), clusters, self.config.iterations, lengths)
        labels = labels.view(*shape, n)
        member = labels[..., None] == torch.arange(clusters, device=query.device)
        member = (member if real is None else member & real).to(accurate)
        counts = member.sum(3)[..., None]
        means = member.mT @ query.to(accurate) / counts.clamp_min(1)
        codes = codes.view(*shape, clusters, -1)
        codes[..., -1:].masked_fill_(counts == 0, ABSENT)
        return labels, codes, means

    @torch.no_grad()
    def _nearest(self, query: Tensor, codes: Tensor, stand: Tensor) -> Tensor:
        """
        query (B, H, T, D), those of chunk stand (1 or B, T) of the codes (B, H, I, C, bits + 1) -> the number of its cluster
        among I C, (B, H, T). More than `STEP` queries are whole chunks.
        """
        (batch, heads, chunks, clusters, _), code = codes.shape, self._code(query)
        if query.shape[2] > STEP:
            labels = (code.unflatten(2, (chunks, -1)) @ codes.mT).argmax(-1).flatten(2)
        else:
            scores = (code @ codes.flatten(2, 3).mT).unflatten(3, (chunks, clusters))
            index = stand[:, None, :, None, None].expand(batch, heads, -1, 1, clusters)
            labels = torch.gather(scores, 3, index)[:, :, :, 0].argmax(-1)
        return labels + clusters * stand[:, None]

    # What clusters read

    def _read(self, means, key, value, first: Count, step: int, **options) -> tuple[Tensor, Tensor, Tensor]:
        """The first three of `Read`. Chunk i of means (B, H, I, C, D) sees the keys (B, G, S, D) before first + i step."""
        (chunks, clusters), size = means.shape[2:4], key.shape[2]
        ends = (column(first) + step * torch.arange(chunks, device=key.device)).view(-1, chunks)
        ends, parts, width = ends.repeat_interleave(clusters, 1), [], max(1, ROWS // clusters)
        for begin in range(0, chunks, width):
            last = min(begin + width, chunks)
            span = begin * clusters, last * clusters
            end = first + (last - 1) * step if isinstance(first, int) else size
            cut = None if isinstance(first, int) and last == begin + 1 else ends[:, slice(*span)]
            parts.append(MeanRead.of(means.flatten(2, 3), key, value, self._top_k, span, end, cut))
        output, lse = joint_attention_and_lse(means.flatten(2, 3), parts, **options)
        read = output, lse, torch.cat([part.top for part in parts], 2)
        return tuple(x.unflatten(2, (chunks, clusters)) for x in read)

    def _band(self, top, key, value, cluster, stand, past, tile: int) -> SortedBand:
        """
        The part in which queries of a cluster (B, H, T) of chunk stand (1 or B, T) read its keys in `top`, of which there
        are past (1 or B, I) or K, if that is less; about `tile` queries do so together.
        """
        (batch, heads, _), (groups, size) = cluster.shape, key.shape[1:3]
        most, device = top.shape[4], key.device
        row = torch.arange(batch * heads, device=device).view(batch, heads, 1)
        order = (top.flatten(2) + row // (heads // groups) * size).flatten()
        low = (row * top.shape[2] * top.shape[3] + cluster) * most
        count = torch.gather(past.to(device).expand(batch, -1), 1, stand.expand(batch, -1)).clamp_max(most)
        intervals = Intervals(order, low, low + count[:, None])
        return SortedBand.of(key, value, intervals, min(max(tile, 8), 64))


@torch.no_grad()
def k_means(code: Tensor, clusters: int, iterations: int, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """
    Lloyd's algorithm with the Hamming distance. code (P, n, bits + 1): 1 and -1, and a last 1; zeros from lengths (P,) on.

    Returns the cluster of each, (P, n) int64, and the clusters' codes (P, C, bits + 1), whose last entry makes the product
    with a token's code larger for the lower one of clusters that are equally near.
    """
    index = torch.arange(clusters, device=code.device)
    lower = -index * 2.0 ** -(clusters - 1).bit_length()  # above -1, where products of codes are 2 apart; exact
    begin = index * (code.shape[1] if lengths is None else lengths[:, None]) // clusters
    centres = torch.gather(code, 1, begin.expand(len(code), -1)[..., None].expand(-1, -1, code.shape[2]))
    centres[..., -1] = lower
    for _ in range(iterations):
        scores = code @ centres.mT
        member = (scores == scores.amax(-1, keepdim=True)).to(code.dtype)  # of a padded token, all; it adds zeros
        sums = member.mT @ code
        moved = torch.where(sums >= 0, 1.0, -1.0)
        moved[..., -1] = lower
        centres = torch.where(sums[..., -1:] > 0, moved, centres)
    return (code @ centres.mT).argmax(-1), centres


@dataclass(frozen=True)
class MeanRead:
    """
    A part for `joint_attention`: some of the mean queries, those of `span`, read the first `end` keys (B, G, S, D), without
    those in top (B, H, R, K); each only those before cut (1 or B, R), where this is given. Their weights are formed, since
    what a mean query leaves out is its own and a mask costs a fused kernel more than it spares.
    """

    key: Tensor
    value: Tensor
    top: Tensor
    span: tuple[int, int]
    end: int
    cut: Tensor | None
    bias: None = None

    @staticmethod
    @torch.no_grad()
    def of(means: Tensor, key: Tensor, value: Tensor, most: int, span: tuple[int, int], end: int, cut: Tensor | None):
        """The part with the `most` keys that each of its means (B, H, .., D) has the largest products with as its `top`."""
        means, tops = means[:, :, slice(*span)], []
        part = MeanRead(key, value, means.new_zeros(*means.shape[:3], 0, dtype=torch.int64), span, end, cut)
        if most == 0:
            return part
        chunk = max(1, SCORES // max(1, means.shape[:2].numel() * end))
        for rows in torch.arange(means.shape[2]).split(chunk):
            piece = slice(int(rows[0]), int(rows[-1]) + 1)
            logits = part._logits(means[:, :, piece], key.to(means.dtype), 1.0, piece)
            tops.append(largest_places(logits.to(torch.float32), min(most, end)))
        return replace(part, top=pad(torch.cat(tops, 2), (0, most - tops[0].shape[3])))

    def accumulate(self, output: None, total: None, query, key, value, bias, scaling, dropout):
        """As `Part.accumulate`, of queries that no other part serves."""
        logits, kept = self._logits(query, key, scaling), None
        lse = logits.logsumexp(-1)
        weights = logits.sub_(lse.masked_fill(lse == float("-inf"), HUGE)[..., None]).exp_()
        if dropout:
            kept = torch.rand_like(weights) >= dropout
            weights.mul_(kept).div_(1 - dropout)
        return self._weighted(weights, value).view(query.shape), lse, kept

    def differentiate(self, grad, output, total, query, key, value, bias, scaling, dropout, kept):
        """As `Part.differentiate`; the gradients of key and value are of the first `end`."""
        grad, output, groups = grad.to(total.dtype), output.to(total.dtype), key.shape[1]
        weights = self._logits(query, key, scaling).sub_(total[..., None]).exp_()
        dweights = _grouped(grad, groups) @ value[:, :, : self.end].mT
        dweights = dweights.view(weights.shape)
        dropped = weights
        if dropout:
            dropped = weights * kept / (1 - dropout)
            dweights.mul_(kept).div_(1 - dropout)
        dv = _grouped(dropped, groups).mT @ _grouped(grad, groups)
        dlogits = dweights.sub_((grad * output).sum(-1, keepdim=True)).mul_(weights).mul_(scaling)
        dk = _grouped(dlogits, groups).mT @ _grouped(query, groups)
        return self._weighted(dlogits, key).view(query.shape), dk, dv, None

    def scatter(self, total: Tensor, x: Tensor) -> None:
        """Adds x, of the first `end` keys, to total (B, G, S, D)."""
        total[:, :, : self.end] += x

    def _logits(self, query: Tensor, key: Tensor, scaling: float, rows: slice = slice(None)) -> Tensor:
        """(B, H, r, end), of mean queries (B, H, r, D), the `rows` of this part; -inf at keys that they do not read."""
        logits = _grouped(query * scaling, key.shape[1]) @ key[:, :, : self.end].mT
        logits = logits.view(*query.shape[:3], -1)
        if self.cut is not None:
            slot = torch.arange(self.end, device=key.device)
            logits.masked_fill_((slot >= self.cut[:, rows, None])[:, None], float("-inf"))
        return logits.scatter_(3, self.top[:, :, rows], float("-inf"))

    def _weighted(self, weights: Tensor, x: Tensor) -> Tensor:
        """(B, H, r, end) and (B, G, S, D) -> (B, G, H / G r, D)."""
        return _grouped(weights, x.shape[1]) @ x[:, :, : self.end]


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(B, H, r, E) -> (B, G, H / G r, E)."""
    return x.unflatten(1, (groups, -1)).flatten(2, 3)


def _lse_of_top(means: Tensor, key: Tensor, top: Tensor, end: Count, scaling: float) -> Tensor:
    """The log-sum-exp (B, H, I, C) of the logits of means (B, H, I, C, D) with the keys in top (B, H, I, C, K)."""
    (batch, heads), (groups, size), most = top.shape[:2], key.shape[1:3], top.shape[4]
    row = torch.arange(batch * heads, device=key.device).view(batch, heads, 1, 1, 1)
    places = (top + row // (heads // groups) * size).flatten()
    keys = key.flatten(0, 2).index_select(0, places).view(*top.shape, -1).to(means.dtype)
    logits = (keys @ means[..., None])[..., 0] * scaling
    there = torch.arange(most, device=key.device) < torch.as_tensor(end, device=key.device).view(-1, 1)
    return logits.masked_fill(~there[:, None, None, None], float("-inf")).logsumexp(-1)


def _of_cluster(x: Tensor, cluster: Tensor) -> Tensor:
    """x (B, H, I, C, E) -> (B, H, T, E), what queries of these clusters (B, H, T), numbers among I C, have in common."""
    return torch.gather(x.flatten(2, 3), 2, cluster[..., None].expand(-1, -1, -1, x.shape[4]))
