"""
`hedgehog`: a learned feature map in place of the exponential, and the nearest tokens exactly. With
phi(x) = [softmax(W x), softmax(-W x)] of x = sqrt(scaling) q or k, D + D features,
    out_t = (s sum_near exp(a_tj - c_t) v_j + sum_far phi(q_t) . phi(k_j) v_j) / (the same with 1 for v_j),
where a = scaling q . k, c_t is the largest a_tj of the near keys and s = sigmoid(gate) is learned per head. Near are
    decoder: t, t - 1, ..., t - (window - 1) and the first `num_sinks` tokens of the sequence,
    encoder: t - window, ..., t + window;
far is every other key, in a decoder before t. window=0 is the feature map alone, for all keys.

Paper: Zhang et al. 2024, The Hedgehog & the Porcupine, arXiv:2402.04347; Zhang et al. 2025, LoLCATs, arXiv:2410.10254
(window). Cost N D^2 + N window D. Decoder: sums (G, 2 D, D + 1), the last `window` tokens and the sinks, O(1). Dense
limit: window >= N, where nothing is far.

New parameters: W, the identity, per query head for q and per key/value head for k; and gate, 2 per head, which gives
the near keys 0.88 of their weight. The map imitates the softmax once it is trained: distil it, or train the model.

From the papers: the window slides (LoLCATs also has one of two blocks); sinks are added to the near keys; an encoder has
a window too; x is scaled as the softmax's logits are. Attention dropout is ignored: the far keys have no probabilities.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..caching import Count, take
from ..config import EfficientAttentionConfig, option
from ..ops.chunked_scan import Sums, attend_linearly, read_past, stored_sums
from ..ops.features import Features
from ..ops.hybrid import Window, window_and_sums
from ..ops.hybrid_scan import has_kernel, hybrid_decoder, hybrid_encoder
from ..ops.local import Band, Context, remember
from ..registry import register_variant
from ..variant import EfficientAttention, HostShape
from .sliding_window import SlidingWindowConfig


@dataclass(kw_only=True)
class HedgehogConfig(EfficientAttentionConfig):
    window: int = option(
        64,
        "tokens read exactly: in a decoder itself and window - 1 before, in an encoder per side; 0 for none",
        minimum=0,
    )
    num_sinks: int = option(4, "first tokens that every later one reads exactly, in decoders with a window", minimum=0)

    @classmethod
    def tiny(cls, causal: bool) -> HedgehogConfig:
        return cls(window=4, num_sinks=2)

    @classmethod
    def variations(cls, causal: bool) -> list[HedgehogConfig]:
        return [cls(window=0), cls(window=5, num_sinks=0), cls(window=1, num_sinks=3)]

    @classmethod
    def dense_limit(cls, length: int, causal: bool) -> HedgehogConfig:
        return cls(window=max(length, 1))

    def window_only(self, causal: bool) -> SlidingWindowConfig | None:
        if self.window == 0:
            return None
        return SlidingWindowConfig(window=self.window, num_sinks=self.num_sinks, dense_below=self.dense_below)


@register_variant(
    "hedgehog",
    family="kernels",
    summary="learned softmax features for far tokens, the nearest ones and sinks exactly",
    paper="Zhang 2024, arXiv:2402.04347; Zhang 2025, arXiv:2410.10254",
    also=("lolcats",),
)
class HedgehogAttention(EfficientAttention):
    config_class = HedgehogConfig
    constant_state = True

    def __init__(self, config: HedgehogConfig, host: HostShape) -> None:
        super().__init__(config, host)
        identity = torch.eye(host.head_dim)
        self.query_map = nn.Parameter(identity.repeat(host.num_heads, 1, 1))
        self.key_map = nn.Parameter(identity.repeat(host.num_kv_heads, 1, 1))
        if config.window:
            self.gate = nn.Parameter(torch.full((host.num_heads,), 2.0))

    def attend(self, query, key, value, *, lengths, scaling, dropout, causal, state, hidden) -> Tensor:
        accurate = torch.promote_types(query.dtype, torch.float32)
        maps = tuple(math.sqrt(scaling) * x.to(accurate) for x in (self.query_map, self.key_map))
        features = Features(_query_features, _key_features, 2 * self.host.head_dim, maps)
        if self.config.window == 0:
            return attend_linearly(query, key, value, features, causal=causal, lengths=lengths, state=state)
        gate, w = self.gate.to(accurate).sigmoid(), self.config.window
        if not causal and has_kernel(query, None):
            return hybrid_encoder(query, key, value, w, maps, gate, lengths=lengths, scaling=scaling)
        if not causal:
            return self._encode(query, key, value, features, gate, lengths, scaling)
        context = remember(state, key, value, Band(w + 1), num_sinks=self.config.num_sinks, lengths=lengths)
        before = stored_sums(state)
        if has_kernel(query, state):
            context = context.framed(Band(w + 1)) if context.ends else context
            options = {"lengths": lengths, "before": before, "scaling": scaling}
            output, after = hybrid_decoder(query, context, w, maps, gate, **options)
        else:
            output, after = self._decode(query, context, features, gate, lengths, before, scaling)
        if state is not None:
            state.entries.update(total=after.total, top=after.top)
        return output

    def _decode(self, query, context: Context, features, gate, lengths, before: Sums | None, scaling):
        w, n = self.config.window, query.shape[2]
        key, value = (_last(x, context.new, w, n) for x in (context.key, context.value))
        first = context.first + context.new - w  # slot i holds what leaves the window of query i
        now = key[:, :, :n], value[:, :, :n]
        far, after = _read_far(query, *now, features, first, self.config.num_sinks, lengths, before)
        sinks, keys = (context.sink_key, context.sink_value), (key[:, :, 1:], value[:, :, 1:])
        window = Window(w - 1, 0, first + 1, first + w + n, sinks[0].shape[2])
        return window_and_sums(query, *keys, window, gate, far, sinks=sinks, scaling=scaling), after

    def _encode(self, query, key, value, features, gate, lengths, scaling):
        w, n = self.config.window, query.shape[2]

        def before(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            """What lies before the windows."""
            skip = min(w + 1, n)
            read, _ = read_past(query[:, :, skip:], key[:, :, : n - skip], value[:, :, : n - skip], features)
            return pad(read, (0, 0, skip, 0))

        def reverse(x: Tensor) -> Tensor:
            """Each row's real tokens the other way round."""
            if lengths is None:
                return x.flip(2)
            return take(x, (lengths[:, None] - 1 - torch.arange(n, device=x.device)).clamp_min(0))

        far = before(query, key, value) + reverse(before(reverse(query), reverse(key), reverse(value)))
        keys, none = tuple(pad(x, (0, 0, w, w)) for x in (key, value)), (key[:, :, :0], value[:, :, :0])
        window = Window(w, w, -w, n if lengths is None else lengths)
        return window_and_sums(query, *keys, window, gate, far, sinks=none, scaling=scaling)


def _last(x: Tensor, new: Count, w: int, n: int) -> Tensor:
    """The w slots before slot `new` and the n from it on: (B, G, w + n, D); there may be fewer before it."""
    if isinstance(new, int):
        return pad(x, (0, 0, w - new, 0)) if new < w else x[:, :, new - w :]
    return take(x, (new[:, None] - w + torch.arange(w + n, device=x.device)).clamp(0, x.shape[2] - 1))


def _read_far(query, key, value, features: Features, first: Count, sinks: int, lengths: Tensor | None, before):
    """
    What query i reads of slots 0..i, and the sums after all of them. Slot i holds position first + i; those before
    position `sinks` are not far.
    """
    n = query.shape[2]
    if isinstance(first, int):
        skip = min(max(sinks - first, 0), n)
        query, key, value = (x[:, :, skip:] for x in (query, key, value))
        lengths = None if lengths is None else (lengths - skip).clamp_min(0)
        read, after = read_past(query, key, value, features, real=lengths, before=before)
        return pad(read, (0, 0, skip, 0)), after
    slots = torch.arange(n, device=query.device)
    far = first[:, None] + slots >= sinks
    far = far if lengths is None else far & (slots < lengths[:, None])
    return read_past(query, key, value, features, real=far, before=before)


def _query_features(x: Tensor, w: Tensor, _: Tensor) -> Tensor:
    """x (B, H, T, D), w (H, D, D) -> (B, H, T, 2 D)."""
    return _softmaxes(x @ w.mT)


def _key_features(x: Tensor, _: Tensor, w: Tensor) -> Tensor:
    return _softmaxes(x @ w.mT)


def _softmaxes(x: Tensor) -> Tensor:
    return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)
