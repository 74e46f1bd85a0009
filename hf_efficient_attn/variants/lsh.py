"""
Tokens are hashed, and a query attends to keys of its own bucket:

    bucket(x) = argmax [x R; -x R],  R (D, num_buckets / 2) ~ N(0, 1),
    output_t = softmax attention over key t and, of the keys j with bucket(k_j) = bucket(q_t) in any of `num_hashes` rounds,
        decoder: each round's `window` most recent at or before t, and the first `num_sinks` tokens, which are in no bucket,
        encoder: each round's nearest `window` on each side of t,
each key once: what a later round finds again is left out, which is what subtracting the logarithm of how often a key was
seen amounts to.

Kitaev 2020, Reformer (arXiv:2001.04451); Daras 2020, SMYRF (arXiv:2010.05315), for q and k that are not the same. Directions
are hashed, and of an encoder's keys those of k - mean k over the row's real tokens: the softmax of a query does not change
with what all keys share, but their buckets do. `inner_products` = True is SMYRF's own form, of encoders: it hashes
q' = [q, 0, sqrt(m - |q|^2)] and k' = [k, sqrt(m - |k|^2), 0], which have the same length; m = max |q|^2 + max |k|^2 over the
row's real tokens, and the query heads of a key/value head. Made for hashes that sort, it leaves q' and k' nearly orthogonal,
so that they share buckets little more often than by chance.

Rotations belong to key/value heads and are a buffer, `rotations` (G, num_hashes, D + 2, num_buckets / 2), drawn from `seed`
and saved with the model, rounded to bfloat16, so that a cast of the model leaves them alone; without `inner_products` the
first D rows are used.

`shared_qk` = True is Reformer's own form, of encoders: the key of a token is its query's direction q / |q|, the host's
keys are not used, tokens sorted by (bucket, position) are cut into chunks of `window`, and a token reads its chunk and the
one before it, without regard to buckets; itself only where it reads nothing else. It suits models that are trained so.

Cost N num_hashes (num_buckets + 2 window) D. State: all keys and values, and num_hashes labels for each key. Dense limit:
num_buckets = 1, window >= N. No learned parameters.

From the papers: centred keys; sinks, which pretrained decoders need (Xiao 2023); the sorted order is not cut into chunks
(but with `shared_qk`), because in a decoder a later token would move the borders of the chunks of earlier ones; the first
chunk does not read the last one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..config import EfficientAttentionConfig, option
from ..ops.draws import normal, source
from ..ops.kmeans import largest
from ..ops.sorted_band import Labels, interval_attention, near_attention, past_attention
from ..registry import register_variant
from ..variant import EfficientAttention, HostShape


@dataclass(kw_only=True)
class LshConfig(EfficientAttentionConfig):
    """Hyper-parameters of `lsh`."""

    num_buckets: int = option(32, "buckets of a round, an even number, or 1", minimum=1)
    num_hashes: int = option(2, "rounds of hashing", minimum=1)
    window: int = option(
        128,
        "keys per round: in a decoder at or before the query, in an encoder per side; with shared_qk of a chunk",
        minimum=1,
    )
    num_sinks: int = option(
        4, "decoder: first tokens, in no bucket, that every later one sees; 0: as in the paper", minimum=0
    )
    shared_qk: bool = option(
        False, "encoders: queries serve as keys too, in chunks of the sorted order, as in Reformer"
    )
    inner_products: bool = option(
        False, "encoders: hash by inner product, as in SMYRF, in place of the directions of centred keys"
    )
    seed: int = option(0, "of the rotations", minimum=0)

    def validate(self) -> None:
        if self.num_buckets > 1 and self.num_buckets % 2:
            raise ValueError(f"LshConfig.num_buckets = {self.num_buckets}: give an even number, or 1 for no hashing.")

    @classmethod
    def tiny(cls, causal: bool) -> LshConfig:
        return cls(num_buckets=2, num_hashes=3, window=3, num_sinks=2)

    @classmethod
    def variations(cls, causal: bool) -> list[LshConfig]:
        return [
            cls(num_buckets=4, num_hashes=1, window=2, num_sinks=0, seed=3),
            cls(num_buckets=6, num_hashes=3, window=5, inner_products=not causal),
            cls(num_buckets=1, num_hashes=2, window=3),
        ]

    @classmethod
    def dense_limit(cls, length: int, causal: bool) -> LshConfig:
        return cls(num_buckets=1, num_hashes=1, window=max(length, 1))


@register_variant(
    "lsh",
    family="learnable patterns",
    summary="a query attends to keys of its own bucket, by angular hashing",
    paper="Kitaev 2020, arXiv:2001.04451; Daras 2020, arXiv:2010.05315",
    also=("reformer", "smyrf"),
)
class LshAttention(EfficientAttention):
    """`lsh`. R is `num_hashes`."""

    config_class = LshConfig

    @classmethod
    def check_host(cls, config: LshConfig, host: HostShape) -> None:
        if config.shared_qk and host.causal:
            raise ValueError(
                "lsh: shared_qk = True sorts and cuts the whole text, so that a token would depend on later ones; it is "
                "for bidirectional layers. Use shared_qk = False here."
            )
        if config.inner_products and host.causal:
            raise ValueError(
                "lsh: inner_products = True measures norms over the whole text, so that a token would depend on later "
                "ones; it is for bidirectional layers. Use inner_products = False here."
            )

    def __init__(self, config: LshConfig, host: HostShape) -> None:
        super().__init__(config, host)
        shape = host.num_kv_heads, config.num_hashes, host.head_dim + 2, config.num_buckets // 2
        rotations = normal(source(config.seed, host.layer), *shape).bfloat16()
        self.register_buffer("rotations", rotations.to(torch.get_default_dtype()))

    def attend(self, query, key, value, *, lengths, scaling, dropout, causal, state, hidden) -> Tensor:
        config = self.config
        options = {"lengths": lengths, "scaling": scaling, "dropout": dropout}
        if config.shared_qk:
            return self._reformer(query, value, **options)
        with torch.no_grad():
            if causal:
                labels = self._hash(query), self._hash(key)
            elif config.inner_products:
                lacks = _completions(query, key)
                labels = self._hash(query, lacks[0], -1), self._hash(key, lacks[1], -2)
            else:
                labels = self._hash(query), self._hash(_centred(key, lengths))
        sizes = {"count": config.num_buckets, "window": config.window}
        if causal:
            sizes["num_sinks"] = config.num_sinks
            return past_attention(query, key, value, *labels, state=state, **sizes, **options)
        return near_attention(query, key, value, *labels, **sizes, **options)

    @torch.no_grad()
    def _hash(self, x: Tensor, extra: Tensor | None = None, row: int = -1) -> Tensor:
        """x (B, H, N, D) and the coordinate `extra` (B, H, N) that belongs to a row of the rotations -> (B, H, N, R)."""
        rounds, half = self.config.num_hashes, self.config.num_buckets // 2
        if half == 0:
            return torch.zeros(*x.shape[:3], rounds, dtype=torch.int64, device=x.device)
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            rotations = self.rotations.to(x.dtype)
            groups = rotations.shape[0]
            grouped = x.unflatten(1, (groups, -1)).flatten(2, 3)  # (B, G, H / G * N, D)
            if extra is not None:
                extra = extra.unflatten(1, (groups, -1)).flatten(2)[:, :, None]
            labels = []
            for r in range(rounds):  # one at a time: the scores of all would be larger than queries and keys
                scores = rotations[:, r, :-2].mT @ grouped.mT  # (B, G, half, H / G * N)
                if extra is not None:
                    scores += rotations[:, r, row, :, None] * extra
                place = largest(scores.abs())[1]
                negative = torch.gather(scores, 2, place[:, :, None])[:, :, 0] < 0
                labels.append((place + half * negative).view(x.shape[:3]))
        return torch.stack(labels, 3)

    def _reformer(self, query, value, *, lengths, scaling, dropout) -> Tensor:
        accurate = query.to(torch.promote_types(query.dtype, torch.float32))  # in half precision a length may be 0
        key, labels = normalize(accurate, dim=-1).to(query), self._hash(query)
        value = value.repeat_interleave(self.host.group_size, 1)  # of each query head, as its keys
        return _chunks(query, key, value, labels, self.config, lengths, scaling=scaling, dropout=dropout)


@torch.compiler.disable
def _chunks(query, key, value, labels, config: LshConfig, lengths, **options) -> Tensor:
    position = torch.arange(query.shape[2], device=query.device).expand(labels.shape[:3])
    used = None if lengths is None else position[:, 0] < lengths[:, None]
    rounds, alone = [], torch.ones_like(position, dtype=torch.bool)
    for r in range(config.num_hashes):
        order = Labels.of(labels[..., r], config.num_buckets, used)
        rounds.append(order.chunks(config.window, query.shape[1], lengths, back=1))
        alone &= rounds[-1].high - rounds[-1].low == 1
    own = torch.where(alone, position, -1)
    return interval_attention(query, key, value, rounds, own=own, apart=position[..., None], **options)


def _centred(key: Tensor, lengths: Tensor | None) -> Tensor:
    """key (B, G, N, D) less its mean over real tokens; padded tokens are zeros."""
    key = key.to(torch.promote_types(key.dtype, torch.float32))  # in which sums of half precision cannot overflow
    n = key.shape[2] if lengths is None else lengths.clamp_min(1)[:, None, None, None]
    return key - key.sum(2, keepdim=True) / n


def _completions(query: Tensor, key: Tensor) -> list[Tensor]:
    """The coordinates (B, H, N), (B, G, N) that give queries and keys one length; padded tokens, zeros, are not the longest."""
    groups = key.shape[1]
    squares = [x.to(torch.promote_types(x.dtype, torch.float32)).square().sum(-1) for x in (query, key)]
    longest = sum(x.unflatten(1, (groups, -1)).flatten(2).amax(2, keepdim=True) for x in squares)  # (B, G, 1)
    return [(longest.repeat_interleave(x.shape[1] // groups, 1) - x).clamp_min(0).sqrt() for x in squares]
