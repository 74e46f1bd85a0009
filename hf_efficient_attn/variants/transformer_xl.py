"""
`transformer_xl`: segments of b tokens with a memory of the m tokens before them. Token t of segment s = t // b attends
to its own segment, in a decoder up to itself, and to exactly [s b - m, s b); in a decoder also to the first `num_sinks`
tokens, in an encoder to the first `global_tokens`, which attend to all tokens themselves.

Paper: Dai et al. 2019, Transformer-XL, arXiv:1901.02860. Cost N (b + m). m may be any number; an encoder reads its
whole own segment and no later one.
Decoder: the current segment, the memory of the next and the sinks, O(m + b). The memory reaches across calls, and
gradients do not: stored keys and values are detached, which makes training call by call truncated back-propagation.
Dense limit: decoder m >= N, encoder b >= N. No parameters.

From the paper: positions are the host's own (keys arrive rotated or without position), not the paper's relative ones;
keys and values are stored instead of hidden states, which is the same layer by layer; sinks and global tokens are ours,
without them it is the plain form.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..config import EfficientAttentionConfig, option
from ..ops.local import Segments, local_decoder, remember, segment_encoder
from ..registry import register_variant
from ..variant import EfficientAttention
from .block import BlockConfig


@dataclass(kw_only=True)
class TransformerXLConfig(EfficientAttentionConfig):
    segment_size: int = option(256, "tokens per segment", minimum=1)
    memory_size: int = option(256, "tokens before a segment that it sees", minimum=0)
    num_sinks: int = option(4, "first tokens that every later one sees, in decoders", minimum=0)
    global_tokens: int = option(0, "first tokens that see all and that all see, in encoders", minimum=0)

    @classmethod
    def tiny(cls, causal: bool) -> TransformerXLConfig:
        return cls(segment_size=5, memory_size=7, num_sinks=2)

    @classmethod
    def variations(cls, causal: bool) -> list[TransformerXLConfig]:
        everyone = [] if causal else [cls(segment_size=4, memory_size=3, global_tokens=5)]
        return [cls(segment_size=8, memory_size=0), cls(segment_size=4, memory_size=10, num_sinks=0), *everyone]

    @classmethod
    def dense_limit(cls, length: int, causal: bool) -> TransformerXLConfig:
        if causal:
            return cls(segment_size=8, memory_size=length)
        return cls(segment_size=max(length, 1), memory_size=0)

    def window_only(self, causal: bool) -> BlockConfig:
        return BlockConfig(
            block_size=self.segment_size,
            num_sinks=self.num_sinks,
            global_tokens=self.global_tokens,
            dense_below=self.dense_below,
        )


@register_variant(
    "transformer_xl",
    family="recurrence",
    summary="own segment and a memory of the tokens before it, kept across calls",
    paper="Dai 2019, arXiv:1901.02860",
)
class TransformerXLAttention(EfficientAttention):
    config_class = TransformerXLConfig
    constant_state = True

    def attend(self, query, key, value, *, lengths, scaling, dropout, causal, state, hidden) -> Tensor:
        config, options = self.config, {"scaling": scaling, "dropout": dropout}
        pattern = Segments(config.segment_size, config.memory_size)
        if not causal:
            everyone = config.global_tokens
            return segment_encoder(query, key, value, pattern, global_tokens=everyone, lengths=lengths, **options)
        context = remember(state, key, value, pattern, num_sinks=config.num_sinks, lengths=lengths, detach=True)
        return local_decoder(query, context, pattern, **options)
