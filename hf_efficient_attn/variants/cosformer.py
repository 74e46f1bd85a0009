"""
`cosformer`: weights relu(q_t) . relu(k_j) cos(pi / 2 (t - j) / M) over their sum: nearer tokens count more. Since
cos(a - b) = cos a cos b + sin a sin b, they are products of 2 D features,
    phi(x_t) = [relu(x_t) cos(pi t / 2 M), relu(x_t) sin(pi t / 2 M)],    M = `max_length`.

Paper: Qin et al. 2022, cosFormer, arXiv:2202.08791. Cost N D^2: a decoder reads chunk by chunk, an encoder in closed
form. Decoder: sums (G, 2 D, D + 1), O(1). No dense limit: the kernel is another one than exp(q . k), and a patched model
must be trained. No parameters.

From the paper: M is fixed by the config, because it may not depend on the length of a call; more than M tokens raise. The
normaliser, which is 0 where a query has no feature in common with its keys, is at least 1e-6. Logits are not scaled
(`scaling` would cancel), and attention dropout is ignored: no probabilities are formed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..caching import column
from ..config import EfficientAttentionConfig, option
from ..ops.chunked_scan import attend_linearly
from ..ops.features import Features
from ..registry import register_variant
from ..variant import EfficientAttention, HostShape

UNBOUNDED = 4096  # `max_length` for a model that nothing limits


@dataclass(kw_only=True)
class CosformerConfig(EfficientAttentionConfig):
    max_length: int | None = option(
        None, "most tokens, over which the weight falls to 0; None: as many as the model can read, or 4096", minimum=1
    )

    @classmethod
    def tiny(cls, causal: bool) -> CosformerConfig:
        return cls(max_length=4096 if causal else 40)

    @classmethod
    def variations(cls, causal: bool) -> list[CosformerConfig]:
        return [cls(max_length=29)]


@register_variant(
    "cosformer",
    family="kernels",
    summary="features relu(x), weighed by the cosine of the distance",
    paper="Qin 2022, arXiv:2202.08791",
)
class CosformerAttention(EfficientAttention):
    config_class = CosformerConfig
    constant_state = True

    @classmethod
    def resolve(cls, config: CosformerConfig, host: HostShape) -> CosformerConfig:
        if config.max_length is not None:
            return config
        return replace(config, max_length=host.max_positions or UNBOUNDED)

    def attend(self, query, key, value, *, lengths, scaling, dropout, causal, state, hidden) -> Tensor:
        longest, n, before = self.config.max_length, query.shape[2], 0 if state is None else state.count
        end = before + n
        if isinstance(end, Tensor) or (lengths is not None and not torch.compiler.is_exporting()):
            end = int((before + (n if lengths is None else lengths)).max())
        if end > longest:
            raise ValueError(
                f"cosformer: {end} tokens, but max_length = {longest}: its weights reach no further. Set max_length to the "
                "longest input; the model's outputs depend on it, so train with it."
            )
        accurate = torch.promote_types(query.dtype, torch.float32)
        positions = column(before) + torch.arange(n, device=query.device)
        angles = (math.pi / 2 / longest * positions.to(accurate)).view(-1, 1, n, 1)
        tokens = torch.cat([angles.cos(), angles.sin()], 3)
        features = Features(
            _features, _features, 2 * self.host.head_dim, floor=1e-6, pulls=(_pull, _pull), tokens=tokens
        )
        return attend_linearly(query, key, value, features, causal=causal, lengths=lengths, state=state)


def _features(x: Tensor, tokens: Tensor) -> Tensor:
    """x (B, H, T, D), tokens (B or 1, 1, T, 2) -> (B, H, T, 2 D), which stand in rows."""
    cos, sin = tokens.mT.split(1, 2)
    x = x.mT.clamp_min(0)
    return torch.cat([x * cos, x * sin], 2).mT


def _pull(x: Tensor, tokens: Tensor, slope: Tensor) -> Tensor:
    cos, sin = tokens.split(1, 3)
    near, far = slope.chunk(2, 3)
    return (near * cos).addcmul_(far, sin).masked_fill_(x <= 0, 0)
