"""
What would the model do without attention? The control that every report carries.

softmax(q k^T) v becomes 0. The projections around it stay, so the difference in cost between a model and this control
is the cost of attention itself, and the difference in quality is what attention is worth on this task.
"""

from __future__ import annotations

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

ZERO_ATTENTION = "zero_attention"


def remove_attention(model: PreTrainedModel) -> PreTrainedModel:
    """
    Replaces the output of every attention layer by zeros, in place. Nothing is added to the weights.

    Raises:
        ValueError: the model does not dispatch its attention through Transformers' attention interface.
    """
    AttentionInterface.register(ZERO_ATTENTION, _zero_attention)
    AttentionMaskInterface.register(ZERO_ATTENTION, _no_mask)
    model.set_attn_implementation(ZERO_ATTENTION)
    if model.config._attn_implementation != ZERO_ATTENTION:
        raise ValueError(f"{type(model).__name__} cannot switch its attention, so it cannot be removed either.")
    return model


class _Zeros(torch.autograd.Function):
    """Zeros whose gradients are zeros: the projections' backward is computed as under real attention, nothing is kept."""

    @staticmethod
    def forward(ctx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        ctx.like = [(tensor.shape, tensor.dtype, tensor.device) for tensor in (query, key, value)]
        return query.new_zeros(*query.shape[:-1], value.shape[-1])

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)


def _zero_attention(module, query, key, value, attention_mask, **_ignored):
    """query (B, H, N, D), key and value (B, G, M, D) -> (B, N, H, D) of zeros, and no attention weights."""
    return _Zeros.apply(query, key, value).transpose(1, 2), None


def _no_mask(*_args, **_kwargs) -> None:
    return None
