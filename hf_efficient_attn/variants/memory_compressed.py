"""
`memory_compressed`: every c = `compression` tokens become one slot, by a convolution with stride c that acts on each
coordinate by itself:

    k~_j = sum_i w_i * k_{j c + i},  v~_j = sum_i w'_i * v_{j c + i},  i = 0..c - 1,  out_t = softmax(scaling q_t k~^T) v~.

Paper: Liu et al. 2018, Generating Wikipedia by Summarizing Long Sequences, arXiv:1801.10198. Strides are counted over real
tokens, from the first. A stretch with fewer than c of them is scaled to their number. Cost N^2 / c.

Decoder: `ops.summaries` joins the slots of complete segments with the exact part, a query's own segment, `exact_segments`
before it and `num_sinks` first tokens; `segment_size` is a multiple of c. Cost N^2 / c. State: the exact part and all slots,
O(N / c).

Dense limit: c = 1, untrained.
Parameters: `conv_k` and `conv_v` (G, c, D), which start as the mean; in a decoder `slot_bias`, one per query head, zero at the
start.
From the paper: its convolution mixes the coordinates of a head and has c = 3; ours does not, and its kernels belong to
key/value heads. Its decoder masks slots that reach beyond the query and sees the others alone; the exact part is ours,
`exact_segments=0, num_sinks=0` leaves a query its own segment. In models that rotate keys a mean over many tokens blurs their
high frequencies: prefer a low c there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..config import option
from ..ops.exact import sdpa
from ..ops.precision import first_order
from ..ops.summaries import SummaryConfig, summary_decoder
from ..registry import register_variant
from ..variant import EfficientAttention, HostShape
from .transformer_xl import TransformerXLConfig


@dataclass(kw_only=True)
class MemoryCompressedConfig(SummaryConfig):
    compression: int = option(8, "tokens per slot; segment_size is a multiple of it", minimum=1)

    def validate(self) -> None:
        if self.segment_size % self.compression:
            raise ValueError(
                f"MemoryCompressedConfig.segment_size = {self.segment_size} must be a multiple of compression = "
                f"{self.compression}, so that no slot lies across a border."
            )

    @classmethod
    def tiny(cls, causal: bool) -> MemoryCompressedConfig:
        return cls(compression=4, segment_size=8, num_sinks=3)

    @classmethod
    def variations(cls, causal: bool) -> list[MemoryCompressedConfig]:
        return [
            cls(compression=3, segment_size=6, num_sinks=7),
            cls(compression=5, segment_size=5, exact_segments=0, num_sinks=0),
            cls(compression=2, segment_size=4, exact_segments=2),
        ]

    @classmethod
    def dense_limit(cls, length: int, causal: bool) -> MemoryCompressedConfig:
        return cls(compression=1, segment_size=8)

    def window_only(self, causal: bool) -> TransformerXLConfig | None:
        """A decoder's exact part, and nothing else; an encoder has none."""
        return TransformerXLConfig(**self.exact_part()) if causal else None


@register_variant(
    "memory_compressed",
    family="down-sampling",
    summary="keys and values shortened by a strided convolution; in a decoder beside an exact window",
    paper="Liu 2018, arXiv:1801.10198",
)
class MemoryCompressedAttention(EfficientAttention):
    config_class = MemoryCompressedConfig
    linear_cost = False

    def __init__(self, config: MemoryCompressedConfig, host: HostShape) -> None:
        super().__init__(config, host)
        c = config.compression
        self.conv_k = nn.Parameter(torch.full((host.num_kv_heads, c, host.head_dim), 1 / c))
        self.conv_v = nn.Parameter(self.conv_k.detach().clone())
        if host.causal:
            self.slots = config.segment_size // c
            self.slot_bias = nn.Parameter(torch.zeros(host.num_heads))

    def attend(self, query, key, value, *, lengths, scaling, dropout, causal, state, hidden) -> Tensor:
        options = {"scaling": scaling, "dropout": dropout}
        if causal:
            rest = {"bias": self.slot_bias, "lengths": lengths, "state": state, **self.config.segments()}
            return summary_decoder(query, key, value, self, **rest, **options)
        n, c = key.shape[2], self.config.compression
        real = exists = None
        if lengths is not None or n % c:
            real = torch.arange(n + -n % c, device=key.device) < (n if lengths is None else lengths[:, None])
            real = real.view(-1, 1, n + -n % c)
            key, value = (pad(x, (0, 0, 0, -n % c)) for x in (key, value))
        if lengths is not None:
            exists = self.exists(real)
            exists |= ~exists.any(3, keepdim=True)  # a row without tokens: its output is discarded, but must be finite
        slots = self.summarise(key[:, :, None], value[:, :, None], real)
        return sdpa(query, *(x[:, :, 0] for x in slots), mask=exists, **options)

    def summarise(self, key: Tensor, value: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """key, value (B, G, n, b, D), real (B or 1, n, b) or None -> keys and values of the slots, (B, G, n, b / c, D)."""
        return self._convolve(key, self.conv_k, real), self._convolve(value, self.conv_v, real)

    def exists(self, real: Tensor) -> Tensor:
        """real (B or 1, n, b) -> (B or 1, 1, n, b / c): slots of at least one token."""
        return real.unflatten(2, (-1, self.config.compression)).any(3)[:, None]

    def _convolve(self, x: Tensor, weight: Tensor, real: Tensor | None) -> Tensor:
        c = self.config.compression
        accurate = torch.promote_types(x.dtype, torch.float32)
        if real is None:
            return _Convolution.apply(x.unflatten(3, (-1, c)), weight.to(accurate)).to(x.dtype)
        x = x.masked_fill(~real[:, None, ..., None], 0)
        slots = _Convolution.apply(x.unflatten(3, (-1, c)), weight.to(accurate))
        tokens = real.unflatten(2, (-1, c)).sum(3).clamp_min(1)
        return (slots * (c / tokens.to(accurate))[:, None, ..., None]).to(x.dtype)


class _Convolution(torch.autograd.Function):
    """x (B, G, n, r, c, D), weight (G, c, D) -> (B, G, n, r, D), without a product of the size of x."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        slots = x.new_zeros(*x.shape[:4], x.shape[5], dtype=weight.dtype)
        for i in range(x.shape[4]):
            slots.addcmul_(x[..., i, :], weight[:, i, None, None])
        return slots

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        of_x, of_weight = torch.empty_like(x), torch.empty_like(weight)
        for i in range(x.shape[4]):
            torch.mul(grad, weight[:, i, None, None], out=of_x[..., i, :])
            of_weight[:, i] = (grad * x[..., i, :]).sum((0, 2, 3))
        return of_x, of_weight
