"""
`funnel`: the queries of a stretch of p = `pooling` tokens become one.
    Encoder: their mean attends to all keys, and every token of the stretch receives the result.
    Decoder: the query of the stretch's first token reads all keys before the stretch; token t joins that, in one softmax, with
    what its own query reads of the stretch up to itself.

Paper: Dai et al. 2020, Funnel-Transformer, arXiv:2006.03236. Cost N^2 / p. A row's last stretch may be shorter; means are over
real queries.
Decoder: all keys and values, O(N), and what the current stretch read before it, so that p - 1 of p steps read p keys only.
Dense limit: p = 1. No parameters.

From the paper: keys and values keep their length and so do the layer's outputs, since the layers around it keep theirs; the
decoder form is ours, because a mean of queries would know later tokens. Where keys outnumber queries, those that are not given
count as zero. In models that rotate queries the mean over many tokens blurs their high frequencies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..caching import AttentionState, Count, TokenStore, column, take
from ..config import EfficientAttentionConfig, option
from ..ops.exact import exact_attention
from ..ops.joint import Part, joint_attention_and_lse
from ..ops.local import Blocks
from ..ops.rows import shift
from ..registry import register_variant
from ..variant import EfficientAttention

TILE = 256  # far queries that read the same keys, but for those inside their own tile


@dataclass(kw_only=True)
class FunnelConfig(EfficientAttentionConfig):
    pooling: int = option(4, "tokens per stretch, which share one query", minimum=1)

    @classmethod
    def tiny(cls, causal: bool) -> FunnelConfig:
        return cls(pooling=2)

    @classmethod
    def variations(cls, causal: bool) -> list[FunnelConfig]:
        return [cls(pooling=3), cls(pooling=40)]

    @classmethod
    def dense_limit(cls, length: int, causal: bool) -> FunnelConfig:
        return cls(pooling=1)


@register_variant(
    "funnel",
    family="down-sampling",
    summary="one query for a stretch of tokens",
    paper="Dai 2020, arXiv:2006.03236",
)
class FunnelAttention(EfficientAttention):
    """I stretches of p tokens."""

    config_class = FunnelConfig
    linear_cost = False

    def attend(self, query, key, value, *, lengths, scaling, dropout, causal, state, hidden) -> Tensor:
        options = {"scaling": scaling, "dropout": dropout}
        attend = self._decoder if causal else self._encoder
        return attend(query, key, value, lengths, state, **options)

    def _encoder(self, query, key, value, lengths: Tensor | None, state: None, **options) -> Tensor:
        p, n = self.config.pooling, query.shape[2]
        starts = torch.arange(0, n, p, device=query.device)
        size = (column(n if lengths is None else lengths) - starts).clamp(1, p).view(-1, 1, len(starts), 1)
        total = shift(query, 0, len(starts) * p).unflatten(2, (-1, p))
        total = total.sum(3, dtype=torch.promote_types(query.dtype, torch.float32))
        pooled = (total / size).to(query.dtype)
        output = exact_attention(pooled, key, value, lengths=lengths, causal=False, **options)
        return output.repeat_interleave(p, 2)[:, :, :n]

    def _decoder(self, query, key, value, lengths: Tensor | None, state: AttentionState | None, **options) -> Tensor:
        p, n, offset = self.config.pooling, query.shape[2], 0
        if state is not None:
            offset = state.count
            buffer = state.store("tokens", TokenStore).extend(key, value, lengths)
            key, value = buffer.key, buffer.value
        # Tokens move to slots of their own: slot 0 is the first of the stretch that the first query stands in.
        skip = offset % p
        count = -(-(n + (skip if isinstance(skip, int) else p - 1)) // p)
        framed = shift(query, skip, count * p).unflatten(2, (count, p))
        near = (shift(x, skip - offset, count * p).unflatten(2, (count, p)) for x in (key, value))
        output, lse = self._far(framed[:, :, :, 0], key, value, offset - skip, skip, state, **options)
        if state is not None:
            last = (skip + (n if lengths is None else lengths) - 1) // p
            state.entries.update(far_output=_at(output, last), far_lse=_at(lse[..., None], last)[..., 0])
        output = _join(framed, *near, output, lse, **options)
        return shift(output.flatten(2, 3), -skip, n)

    def _far(self, query, key, value, start: Count, skip: Count, state, **options) -> tuple[Tensor, Tensor]:
        """
        What the stretches read before them: output (B, H, I, D) and its log-sum-exp (B, H, I). query (B, H, I, D): of their
        first tokens, at positions start, start + p, ...; of the first stretch it is not known where `skip` > 0, but `state`
        knows what that read.
        """
        p, count = self.config.pooling, query.shape[2]
        known = [] if state is None else [state.entries.get(name) for name in ("far_output", "far_lse")]
        if isinstance(skip, int):
            if skip == 0:
                return _read_before(query, key, value, start, p, **options)
            if count == 1:
                return known
            new = _read_before(query[:, :, 1:], key, value, start + p, p, **options)
            return tuple(torch.cat(pair, 2) for pair in zip(known, new, strict=True))
        if count == 1 and not bool((skip == 0).any()):
            return known
        reach = column(start)[..., None] + p * torch.arange(count, device=query.device)[:, None]

        def visible(begin: int, end: int) -> Tensor:
            return (torch.arange(key.shape[2], device=key.device) < reach[:, begin:end])[:, None]

        output, lse = joint_attention_and_lse(query, [Part(key, value, mask=visible)], **options)
        if known[0] is None:  # no token came before
            return output, lse
        old = (skip > 0)[:, None, None] & (torch.arange(count, device=query.device) == 0)
        return torch.where(old[..., None], known[0], output), torch.where(old, known[1], lse)


def _read_before(query, key, value, start: int, p: int, **options) -> tuple[Tensor, Tensor]:
    """Query a of (B, H, I, D) sees the keys (B, G, M, D) before start + a p -> output and log-sum-exp, -inf of none."""
    batch, count, parts = query.shape[0], query.shape[2], []
    for tiles in Blocks.cover(batch, 0, count, TILE):
        inside = (tiles.size - 1) * p  # keys between a tile's first query and its last
        if inside:
            keys = Blocks(batch, start + tiles.start * p, tiles.count, tiles.size * p)
            parts.append(_inside(tiles, keys, key, value, p))
    for begin in range(0, count, TILE):
        if start + begin * p:
            parts.append(Part.of_slots(key, value, 0, start + begin * p, (begin, min(begin + TILE, count))))
    if not parts:
        accurate = torch.promote_types(query.dtype, torch.float32)
        return torch.zeros_like(query), query.new_full(query.shape[:3], float("-inf"), dtype=accurate)
    return joint_attention_and_lse(query, parts, **options)


def _inside(tiles: Blocks, keys: Blocks, key: Tensor, value: Tensor, p: int) -> Part:
    """Query a of a tile sees the first a p keys of its tile."""
    a, j = (torch.arange(x, device=key.device) for x in (tiles.size, keys.size - p))
    return Part(
        key, value, tiles.arrange, tiles.collect,
        mask=(j < p * a[:, None])[None, None],
        gather=lambda x: keys.windows(x, 0, -p),
        scatter=lambda total, x: keys.add_windows(total, x, 0),
        span=(tiles.start, tiles.start + tiles.count * tiles.size),
    )  # fmt: skip


def _join(query, key, value, far: Tensor, lse: Tensor, *, scaling: float, dropout: float) -> Tensor:
    """
    Softmax over the keys of a token's stretch up to itself and one more, with logit lse (B, H, I) and value far (B, H, I, D).
    query (B, H, I, p, D), key and value (B, G, I, p, D) -> (B, H, I, p, D).
    """
    groups, p, accurate = key.shape[1], query.shape[3], torch.promote_types(query.dtype, torch.float32)
    grouped = query.unflatten(1, (groups, -1)).transpose(2, 3).flatten(3, 4)  # (B, G, I, H / G p, D)
    with torch.autocast(query.device.type, enabled=False):
        logits = (grouped.to(accurate) @ key.mT.to(accurate)).unflatten(3, (-1, p)) * scaling
    later = torch.ones(p, p, dtype=torch.bool, device=query.device).triu(1)
    logits = logits.masked_fill(later, float("-inf"))
    weights = torch.dropout(logits.softmax(-1), dropout, dropout > 0).to(value.dtype)
    near = (weights.flatten(3, 4) @ value).unflatten(3, (-1, p)).transpose(2, 3).flatten(1, 2)
    share = torch.sigmoid(lse[..., None] - logits.logsumexp(-1).transpose(2, 3).flatten(1, 2))  # of the far key
    return torch.lerp(near.to(far.dtype), far[:, :, :, None], share[..., None].to(far.dtype))


def _at(x: Tensor, index: Count) -> Tensor:
    """Stretch `index` of (B, H, I, E) -> (B, H, 1, E); of rows that differ, one each."""
    if isinstance(index, int):
        return x[:, :, index : index + 1]
    return take(x, index.clamp_min(0)[:, None])
