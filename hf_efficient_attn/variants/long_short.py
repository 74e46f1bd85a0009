"""
`long_short`: a window, and r summaries of each segment outside it. A segment of b tokens is projected by weights that its own
keys choose, a = softmax over its tokens of k W:  k~ = a^T k,  v~ = a^T v. Token t attends, in one softmax, to

    the segments from the one that holds t - window + 1 on, exactly: in a decoder up to t, in an encoder to the end of the
        segment that holds t + window - 1,
    the summaries of every segment wholly outside, in a decoder before; and in a decoder to the first `num_sinks` tokens.

No token is seen twice and none is lost. A window counts the tokens on one side, the token itself the first of them.

Paper: Zhu et al. 2021, Long-Short Transformer, arXiv:2107.02192. Cost N (window + b) + N^2 r / b. Decoder: `ops.summaries`;
sinks stay out of the summaries. State: window, segment and the slots of all complete segments, O(window + b + N r / b).
Dense limit: window >= N, `dual_norm=False`.
Parameters: `proj` W (G, D, r), drawn from the normal distribution with deviation D^-1/2 by `seed` and the layer: where keys are
small, summaries start near means. In a decoder `slot_bias`, one per query head, zero at the start. With `dual_norm`
`near_norm` and `far_norm` (2, 2, G, D), weight and bias for keys and values, which start as 1 and 0.

From the paper: its encoder projects the whole text at once to r summaries, ours each segment to r of its own, so that no token
is in both; sinks and the bias are ours. `dual_norm=True` is the paper's layer norm of window and summaries by scales of
their own, here over the coordinates of a head; a pretrained model does not expect it. In models that rotate keys a summary of
a long segment blurs their high frequencies: segments are short.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, pad

from ..config import EfficientAttentionConfig, option
from ..ops.draws import normal, source
from ..ops.exact import exact_attention
from ..ops.joint import Part
from ..ops.local import Horizon, horizon_encoder
from ..ops.ranges import Tile, has_kernel, range_attention
from ..ops.summaries import SoftmaxPool, summary_decoder
from ..registry import register_variant
from ..variant import EfficientAttention, HostShape
from .transformer_xl import TransformerXLConfig


@dataclass(kw_only=True)
class LongShortConfig(EfficientAttentionConfig):
    window: int = option(256, "tokens on one side that are seen exactly, itself included, to whole segments", minimum=1)
    segment_size: int = option(64, "tokens of a segment", minimum=1)
    rank: int = option(4, "summaries of a segment", minimum=1)
    num_sinks: int = option(4, "first tokens that every later one sees exactly, in decoders", minimum=0)
    dual_norm: bool = option(False, "layer norms for window and summaries, as in the paper; no dense limit then")
    seed: int = option(0, "of the projection", minimum=0)

    @classmethod
    def tiny(cls, causal: bool) -> LongShortConfig:
        return cls(window=6, segment_size=4, rank=2, num_sinks=3)

    @classmethod
    def variations(cls, causal: bool) -> list[LongShortConfig]:
        return [
            cls(window=8, segment_size=4, rank=1, num_sinks=5, seed=3),
            cls(window=1, segment_size=5, rank=2, num_sinks=0),
            cls(window=5, segment_size=3, rank=2, dual_norm=True),
        ]

    @classmethod
    def dense_limit(cls, length: int, causal: bool) -> LongShortConfig:
        return cls(window=max(length, 1), segment_size=4)

    def window_only(self, causal: bool) -> TransformerXLConfig | None:
        """In a decoder the window of a segment's first token, for all of the segment; nothing has an encoder's window."""
        if not causal:
            return None
        return TransformerXLConfig(
            segment_size=self.segment_size,
            memory_size=Horizon.of(self.segment_size, self.window).memory,
            num_sinks=self.num_sinks,
            dense_below=self.dense_below,
        )


@register_variant(
    "long_short",
    family="low rank",
    summary="a window, and summaries of the segments outside it, weighted by their own keys",
    paper="Zhu 2021, arXiv:2107.02192",
)
class LongShortAttention(EfficientAttention):
    config_class = LongShortConfig
    linear_cost = False

    def __init__(self, config: LongShortConfig, host: HostShape) -> None:
        super().__init__(config, host)
        start = normal(source(config.seed, host.layer), host.num_kv_heads, host.head_dim, config.rank)
        self.proj = nn.Parameter((start * host.head_dim**-0.5).to(torch.get_default_dtype()))
        if host.causal:
            self.slot_bias = nn.Parameter(torch.zeros(host.num_heads))
        if config.dual_norm:
            one = torch.ones(1, 2, host.num_kv_heads, host.head_dim)
            self.near_norm = nn.Parameter(torch.cat([one, 0 * one]))
            self.far_norm = nn.Parameter(self.near_norm.detach().clone())

    def attend(self, query, key, value, *, lengths, scaling, dropout, causal, state, hidden) -> Tensor:
        config, options = self.config, {"scaling": scaling, "dropout": dropout}
        pool = _Summaries(self)
        if causal:
            return summary_decoder(
                query, key, value, pool, segment_size=config.segment_size, window=config.window,
                num_sinks=config.num_sinks, bias=self.slot_bias, lengths=lengths, state=state, exact=self._near, **options,
            )  # fmt: skip
        n, b = key.shape[2], config.segment_size
        if n <= config.window:
            return exact_attention(query, *self._near(key, value), lengths=lengths, causal=False, **options)
        segments, real = -(-n // b), None
        if lengths is not None or n % b:
            real = torch.arange(segments * b, device=key.device) < (n if lengths is None else lengths[:, None])
            real = real.view(-1, segments, b)
        slots = pool.summarise(*(pad(x, (0, 0, 0, -n % b)).unflatten(2, (-1, b)) for x in (key, value)), real)
        slots = tuple(x.flatten(2, 3) for x in slots)
        exists = None if lengths is None else pool.exists(real).flatten(2, 3)  # (B, 1, slots)
        return self._join(query, self._near(key, value), slots, exists, lengths, **options)

    def _join(self, query, near, slots, exists, lengths, *, scaling, dropout) -> Tensor:
        """An encoder's window and slots, (B, G, S, D), of which `exists` (B, 1, S) bool or None says which there are."""
        tiles, device = list(self._tiles(query.shape[2])), query.device
        if has_kernel(query, dropout):
            bias = torch.zeros(1, 1, slots[0].shape[2], device=device)
            if exists is not None:
                bias = bias.masked_fill(~exists, float("-inf"))
            return range_attention(query, near, slots, bias, tiles, lengths=lengths, scaling=scaling)
        pattern, segment = Horizon.of(self.config.segment_size, self.config.window), self.config.segment_size
        slot = torch.arange(slots[0].shape[2], device=device) // self.config.rank

        def visible(begin: int, end: int) -> Tensor:
            t = torch.arange(begin, end, device=device)[:, None]
            seen = (slot < pattern.begin_of(t) // segment) | (slot >= pattern.end_of(t) // segment)
            return seen[None, None] if exists is None else seen & exists[:, :, None]

        far = Part(*slots, mask=visible)
        return horizon_encoder(query, *near, pattern, lengths=lengths, far=far, scaling=scaling, dropout=dropout)

    def _tiles(self, n: int) -> Iterator[Tile]:
        """Stretches of n queries that see the same segments exactly."""
        b, r, first = self.config.segment_size, self.config.rank, 0
        pattern = Horizon.of(b, self.config.window)
        while first < n:
            begin, end = max(pattern.begin_of(first), 0), pattern.end_of(first)
            last = min(pattern.until(first), end - self.config.window + 1, n)
            yield Tile(first, last, begin, min(end, n), n, begin // b * r, min(end // b, -(-n // b)) * r)
            first = last

    def _near(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm("near_norm", key, value)

    def norm(self, name: str, *pair: Tensor) -> tuple[Tensor, Tensor]:
        """key and value (B, G, ..., D) through their layer norms, where there are any."""
        if not self.config.dual_norm:
            return pair
        normed = []
        for x, (weight, bias) in zip(pair, getattr(self, name).unbind(1), strict=True):
            accurate = torch.promote_types(x.dtype, torch.float32)
            shape = (weight.shape[0], *(1,) * (x.ndim - 3), weight.shape[1])
            y = layer_norm(x.to(accurate), x.shape[-1:]) * weight.to(accurate).view(shape) + bias.to(accurate).view(
                shape
            )
            normed.append(y.to(x.dtype))
        return tuple(normed)


class _Summaries(SoftmaxPool):
    """The slots of a layer's segments."""

    def __init__(self, layer: LongShortAttention) -> None:
        super().__init__(layer.proj.mT)
        object.__setattr__(self, "layer", layer)

    def summarise(self, key: Tensor, value: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.layer.norm("far_norm", *super().summarise(key, value, real))
