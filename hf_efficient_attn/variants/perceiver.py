"""
`perceiver`: r learned latents L read the sequence, and every query attends to what they read:

    a = softmax(scaling L k^T),  k~ = a k,  v~ = a v,  out_t = softmax(scaling q_t k~^T) v~.

Paper: Jaegle et al. 2021, Perceiver IO, arXiv:2107.14795; Lee et al. 2019, Set Transformer, arXiv:1810.00825 (its induced
points). Encoder: the latents read a row's real tokens. Cost N r.

Decoder (the papers have none of this kind): the latents read each complete segment of `segment_size` tokens, and
`ops.summaries` joins the r slots of a segment with the exact part, a query's own segment, `exact_segments` before it and
`num_sinks` first tokens. Cost N^2 r / segment_size. State: the exact part and all slots, O(N r / segment_size).

Dense limit: decoder segment_size >= N; an encoder has none.
Parameters: `latents` (G, r, D), drawn from the standard normal distribution by `seed` and the layer; in a decoder `slot_bias`,
one per query head, zero at the start. An untrained encoder is far from dense, since its latents ask at random.
From the papers: latents belong to key/value heads and to one layer, and what they read is used once, as keys and values,
without layers of their own. In models that rotate keys what latents read is a mean over many rotations, whose high
frequencies are blurred.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..config import option
from ..ops.draws import normal, source
from ..ops.exact import exact_attention, sdpa
from ..ops.summaries import SoftmaxPool, SummaryConfig, summary_decoder
from ..registry import register_variant
from ..variant import EfficientAttention, HostShape
from .transformer_xl import TransformerXLConfig

LATENTS = 256, 16  # of an encoder, and of a decoder's segment


@dataclass(kw_only=True)
class PerceiverConfig(SummaryConfig):
    num_latents: int | None = option(
        None,
        "latents that read the text, in decoders each segment of it; "
        f"None: {LATENTS[0]} in an encoder, {LATENTS[1]} in a decoder",
        minimum=1,
    )
    seed: int = option(0, "of the latents", minimum=0)

    @classmethod
    def tiny(cls, causal: bool) -> PerceiverConfig:
        return cls(num_latents=3, segment_size=8, num_sinks=3)

    @classmethod
    def variations(cls, causal: bool) -> list[PerceiverConfig]:
        return [
            cls(num_latents=2, segment_size=5, num_sinks=7, seed=3),
            cls(num_latents=1, segment_size=6, exact_segments=0, num_sinks=0),
            cls(segment_size=4, exact_segments=2),
        ]

    @classmethod
    def dense_limit(cls, length: int, causal: bool) -> PerceiverConfig | None:
        return cls(segment_size=max(length, 1)) if causal else None

    def window_only(self, causal: bool) -> TransformerXLConfig | None:
        """A decoder's exact part, and nothing else; an encoder has none."""
        return TransformerXLConfig(**self.exact_part()) if causal else None


@register_variant(
    "perceiver",
    family="down-sampling",
    summary="what learned latents read of the text; in a decoder of each segment, beside an exact window",
    paper="Jaegle 2021, arXiv:2107.14795; Lee 2019, arXiv:1810.00825",
    also=("set_transformer",),
)
class PerceiverAttention(EfficientAttention):
    config_class = PerceiverConfig
    linear_cost = False  # in a decoder

    def __init__(self, config: PerceiverConfig, host: HostShape) -> None:
        super().__init__(config, host)
        start = normal(source(config.seed, host.layer), host.num_kv_heads, config.num_latents, host.head_dim)
        self.latents = nn.Parameter(start.to(torch.get_default_dtype()))
        if host.causal:
            self.slot_bias = nn.Parameter(torch.zeros(host.num_heads))

    @classmethod
    def resolve(cls, config: PerceiverConfig, host: HostShape) -> PerceiverConfig:
        return config if config.num_latents else replace(config, num_latents=LATENTS[host.causal])

    def attend(self, query, key, value, *, lengths, scaling, dropout, causal, state, hidden) -> Tensor:
        options = {"scaling": scaling, "dropout": dropout}
        if causal:
            pool = SoftmaxPool(self.latents * scaling)
            rest = {"bias": self.slot_bias, "lengths": lengths, "state": state, **self.config.segments()}
            return summary_decoder(query, key, value, pool, **rest, **options)
        latents = self.latents.to(key).repeat(key.shape[0], 1, 1, 1)  # memory of its own: a file may lie unaligned
        read = (exact_attention(latents, key, x, lengths=lengths, scaling=scaling, causal=False) for x in (key, value))
        return sdpa(query, *read, **options)
