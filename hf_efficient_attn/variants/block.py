"""
`block`: token t attends to its own block of b tokens, {j : j // b = t // b}; in a decoder to those with j <= t and to
the first `num_sinks` tokens of the sequence, in an encoder to the first `global_tokens` too, which attend to all tokens.

Paper: Parmar et al. 2018, Image Transformer, arXiv:1802.05751; Qiu et al. 2019, Blockwise self-attention,
arXiv:1911.02972. Cost N b. Blocks are counted over real tokens from the start of the row; the last may be shorter.
Decoder: the tokens of the current block and the sinks, O(b). Dense limit: b >= N. No parameters.

From the papers: sinks (Xiao et al. 2023, arXiv:2309.17453) and global tokens are ours, without them it is the plain form;
Qiu's permuted blocks in other heads are `combined` with another pattern.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..config import EfficientAttentionConfig, option
from ..ops.local import Segments, local_decoder, remember, segment_encoder
from ..registry import register_variant
from ..variant import EfficientAttention


@dataclass(kw_only=True)
class BlockConfig(EfficientAttentionConfig):
    block_size: int = option(256, "tokens per block", minimum=1)
    num_sinks: int = option(4, "first tokens that every later one sees, in decoders", minimum=0)
    global_tokens: int = option(0, "first tokens that see all and that all see, in encoders", minimum=0)

    @classmethod
    def tiny(cls, causal: bool) -> BlockConfig:
        return cls(block_size=6, num_sinks=2)

    @classmethod
    def variations(cls, causal: bool) -> list[BlockConfig]:
        return [] if causal else [cls(block_size=5, global_tokens=2), cls(block_size=4, global_tokens=7)]

    @classmethod
    def dense_limit(cls, length: int, causal: bool) -> BlockConfig:
        return cls(block_size=max(length, 1))


@register_variant(
    "block",
    family="fixed patterns",
    summary="own block of tokens, and sinks in a decoder",
    paper="Qiu 2019, arXiv:1911.02972",
)
class BlockAttention(EfficientAttention):
    config_class = BlockConfig
    constant_state = True

    def attend(self, query, key, value, *, lengths, scaling, dropout, causal, state, hidden) -> Tensor:
        config, options = self.config, {"scaling": scaling, "dropout": dropout}
        pattern = Segments(config.block_size)
        if not causal:
            everyone = config.global_tokens
            return segment_encoder(query, key, value, pattern, global_tokens=everyone, lengths=lengths, **options)
        context = remember(state, key, value, pattern, num_sinks=config.num_sinks, lengths=lengths)
        return local_decoder(query, context, pattern, **options)
