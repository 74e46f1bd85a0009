"""
`sliding_window`: token t attends to its neighbours. With window w and dilation d,
    decoder: t, t - d, ..., t - (w - 1) d and the first `num_sinks` tokens of the sequence,
    encoder: t, t +- d, ..., t +- w d and the first `global_tokens` tokens, which attend to all tokens themselves;
a token of two of these sets counts once.

Paper: Beltagy et al. 2020, Longformer, arXiv:2004.05150; Xiao et al. 2023, StreamingLLM, arXiv:2309.17453 (sinks).
Cost N w (encoder 2 N w). Computed in blocks of w, so that one block before (and one after) is all that a token needs; a
dilated window is a plain one on each residue class of positions mod d.
Decoder: the last w d tokens and the sinks, O(w d), constant however long the sequence. Dense limit: w >= N, d = 1.
No parameters.

From the papers: global tokens share the projections of the others; StreamingLLM's positions relative to the cache are
not reproduced, because keys arrive rotated. Encoders ignore `num_sinks`, decoders `global_tokens`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import EfficientAttentionConfig, option
from ..ops.local import Band, band_encoder, local_decoder, remember
from ..registry import register_variant
from ..variant import EfficientAttention, HostShape


@dataclass(kw_only=True)
class SlidingWindowConfig(EfficientAttentionConfig):
    window: int = option(256, "tokens: in a decoder itself and window - 1 before, in an encoder per side", minimum=1)
    dilation: int | list[int] = option(
        1, "distance of neighbours in the window; a list has one per key/value head", minimum=1
    )
    num_sinks: int = option(4, "first tokens that every later one sees, in decoders", minimum=0)
    global_tokens: int = option(0, "first tokens that see all and that all see, in encoders", minimum=0)

    @classmethod
    def tiny(cls, causal: bool) -> SlidingWindowConfig:
        return cls(window=5, num_sinks=2, global_tokens=3)

    @classmethod
    def variations(cls, causal: bool) -> list[SlidingWindowConfig]:
        dilated = {"window": 3, "num_sinks": 2, "global_tokens": 1}
        return [cls(dilation=2, **dilated), cls(dilation=[1, 3], **dilated), cls(window=7, num_sinks=0), cls(window=1)]

    @classmethod
    def dense_limit(cls, length: int, causal: bool) -> SlidingWindowConfig:
        return cls(window=max(length, 1))

    def validate(self) -> None:
        if self.dilation == []:
            raise ValueError("SlidingWindowConfig.dilation = []: give one number, or one for each key/value head.")


@register_variant(
    "sliding_window",
    family="fixed patterns",
    summary="the nearest tokens, dilated if wished, with sinks (decoder) or global tokens (encoder)",
    paper="Beltagy 2020, arXiv:2004.05150; Xiao 2023, arXiv:2309.17453",
    also=("longformer", "streaming_llm"),
)
class SlidingWindowAttention(EfficientAttention):
    config_class = SlidingWindowConfig
    constant_state = True

    @classmethod
    def check_host(cls, config: SlidingWindowConfig, host: HostShape) -> None:
        if isinstance(config.dilation, list) and len(config.dilation) != host.num_kv_heads:
            raise ValueError(
                f"sliding_window: dilation = {config.dilation} has {len(config.dilation)} numbers, but the layer has "
                f"{host.num_kv_heads} key/value heads; give one number for each of them, or one for all."
            )

    def attend(self, query, key, value, *, lengths, scaling, dropout, causal, state, hidden) -> Tensor:
        config, options = self.config, {"scaling": scaling, "dropout": dropout}
        if causal:
            furthest = Band(config.window, max(self.dilations))
            context = remember(state, key, value, furthest, num_sinks=config.num_sinks, lengths=lengths)

        def head_group(dilation: int, heads: Tensor | None) -> Tensor:
            """The output of some key/value heads' queries, which share a dilation; None for all heads."""
            q = query if heads is None else query.unflatten(1, (key.shape[1], -1))[:, heads].flatten(1, 2)
            pick = (lambda x: x) if heads is None else (lambda x: x[:, heads])
            if causal:
                return local_decoder(q, context.map(pick), Band(config.window, dilation), **options)
            return band_encoder(
                q, pick(key), pick(value), window=config.window, dilation=dilation,
                global_tokens=config.global_tokens, lengths=lengths, **options,
            )  # fmt: skip

        kinds = sorted(set(self.dilations))
        if len(kinds) == 1:
            return head_group(kinds[0], None)
        dilations = torch.tensor(self.dilations, device=query.device)
        heads = [(dilations == d).nonzero()[:, 0] for d in kinds]
        output = torch.cat([head_group(d, index) for d, index in zip(kinds, heads, strict=True)], 1)
        order = torch.cat(heads).argsort()
        return output.unflatten(1, (key.shape[1], -1))[:, order].flatten(1, 2)

    @property
    def dilations(self) -> list[int]:
        """One per key/value head."""
        given = self.config.dilation
        return given if isinstance(given, list) else [given] * self.host.num_kv_heads
