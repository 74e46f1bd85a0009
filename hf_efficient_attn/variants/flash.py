"""
`flash`: exact softmax attention, softmax(scaling q k^T) v, without ever forming the N x N weights.

Paper: Dao 2023, FlashAttention-2, arXiv:2307.08691 (Dao et al. 2022, arXiv:2205.14135; Rabe & Staats 2021,
arXiv:2112.05682). Cost N^2, memory O(N), forward and backward.

Rows are compacted first, so that padding is a length and a causal mask stays a triangle: PyTorch's fused kernels need
no mask. Where none applies (dropout on a CPU, a batch of unequal rows decoding together), queries go in chunks whose
weights are computed again in the backward pass.
Decoder: keys and values of all tokens, O(N). Dense limit: always. No parameters. The baseline of every report.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..caching import TokenStore
from ..config import EfficientAttentionConfig
from ..ops.exact import exact_attention
from ..registry import register_variant
from ..variant import EfficientAttention


@dataclass(kw_only=True)
class FlashConfig(EfficientAttentionConfig):
    """No hyper-parameters besides `dense_below`, which changes nothing here."""

    @classmethod
    def dense_limit(cls, length: int, causal: bool) -> FlashConfig:
        return cls()


@register_variant(
    "flash",
    family="exact",
    summary="exact softmax attention by fused kernels, memory linear in N",
    paper="Dao 2022, arXiv:2205.14135",
    also=("flash_attention",),
)
class FlashAttention(EfficientAttention):
    config_class = FlashConfig
    linear_cost = False

    def attend(self, query, key, value, *, lengths, scaling, dropout, causal, state, hidden) -> Tensor:
        options = {"scaling": scaling, "dropout": dropout, "causal": causal}
        if state is None:
            return exact_attention(query, key, value, lengths=lengths, **options)
        buffer = state.store("past", TokenStore).extend(key, value, lengths)
        return exact_attention(query, buffer.key, buffer.value, lengths=buffer.length, offset=buffer.new, **options)
