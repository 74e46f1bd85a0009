"""
`rfa`: softmax attention of normalised queries and keys, estimated by m random Fourier features. With x^ = x / |x|,
    exp(s q^ . k^) ~ phi(q) . phi(k) up to a factor that cancels,  phi(x) = [sin u, cos u] / sqrt(m / 2),  u = sqrt(s) w . x^,
for m / 2 directions w ~ N(0, I_D) and a learned inverse temperature s. gate=True (decoders) lets the past fade: with
g_t = sigmoid(W hidden_t + b), the sums become S_t = g_t S_(t-1) + (1 - g_t) phi(k_t) [v_t, 1]^T.

Paper: Peng et al. 2021, Random Feature Attention, arXiv:2103.02143. Cost N m D. Decoder: sums (G, m, D + 1), with a gate
two numbers per head more, O(1). No dense limit: it tends to the softmax of the normalised queries and keys, the error
falling as 1 / sqrt(m), and a patched model must be trained.

New parameters: log s per key/value head, 0; W, 0, and b, 6, per key/value head, so that g starts at 0.9975. Directions
belong to key/value heads and are a buffer, `directions` (G, m / 2, D), drawn from `seed` and saved with the model; they
are rounded to bfloat16, so that a cast of the model leaves them alone.

From the paper: one temperature per head instead of one per coordinate. Features have both signs, and so may have the
normaliser; its mean per key, weighed as the gate does, is kept at least 0.01 away from 0. `scaling` is not used, and
attention dropout is ignored: no probabilities are formed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, normalize

from ..caching import column
from ..config import EfficientAttentionConfig, option
from ..ops.chunked_scan import Weights, attend_linearly
from ..ops.draws import normal, source
from ..ops.features import Features, project
from ..ops.precision import widest
from ..ops.router import Router
from ..registry import register_variant
from ..variant import EfficientAttention, HostShape

FLOOR = 0.01  # smallest mean of phi(q) . phi(k) over the keys


@dataclass(kw_only=True)
class RfaConfig(EfficientAttentionConfig):
    num_features: int = option(256, "random features per key/value head, sines and cosines, an even number", minimum=2)
    gate: bool = option(False, "whether the past fades by a gate that reads the layer's input, in decoders")
    seed: int = option(0, "of the random directions", minimum=0)

    def validate(self) -> None:
        if self.num_features % 2:
            raise ValueError(
                f"RfaConfig.num_features = {self.num_features}: half are sines and half cosines; give an even number."
            )

    @classmethod
    def tiny(cls, causal: bool) -> RfaConfig:
        return cls(num_features=12, gate=True)

    @classmethod
    def variations(cls, causal: bool) -> list[RfaConfig]:
        return [cls(num_features=10, seed=5), cls(num_features=6, gate=True)]


@register_variant(
    "rfa",
    family="kernels",
    summary="random Fourier features of normalised queries and keys, with a recency gate if wished",
    paper="Peng 2021, arXiv:2103.02143",
)
class RfaAttention(EfficientAttention):
    config_class = RfaConfig
    constant_state = True

    def __init__(self, config: RfaConfig, host: HostShape) -> None:
        super().__init__(config, host)
        shape = (host.num_kv_heads, config.num_features // 2, host.head_dim)
        directions = normal(source(config.seed, host.layer), *shape)
        self.register_buffer("directions", directions.bfloat16().to(torch.get_default_dtype()))
        self.log_scale = nn.Parameter(torch.zeros(host.num_kv_heads))
        if self.needs_hidden:
            self.gate = Router(host.hidden_size, host.num_kv_heads, deviation=0.0, bias=6.0)

    @property
    def needs_hidden(self) -> bool:
        return self.config.gate and self.host.causal

    def attend(self, query, key, value, *, lengths, scaling, dropout, causal, state, hidden) -> Tensor:
        n, accurate = query.shape[2], torch.promote_types(query.dtype, torch.float32)
        w = self.directions.to(accurate) * (self.log_scale.to(accurate) / 2).exp()[:, None, None]
        options = {"causal": causal, "lengths": lengths, "state": state}
        if self.needs_hidden:
            features = Features(_features, _features, self.config.num_features, (w[None],), floor=FLOOR)
            weights, log_left = self._weights(hidden.to(accurate), lengths, state)
            output = attend_linearly(query, key, value, features, weights=weights, **options)
            if state is not None:  # weights are counted from the end of the call on
                state.entries["log_left"] = state.entries.get("log_left", 0) + log_left
                state.entries["top"] = (state.entries["top"] + log_left.detach()[..., None]).to(accurate)
                if log_left.requires_grad:  # the logarithm that sums are relative to gets no gradient; they do, times 1
                    one = (log_left - log_left.detach()).exp()
                    state.entries["total"] = state.entries["total"] * one[..., None, None].to(accurate)
            return output
        if causal:
            keys = column(0 if state is None else state.count) + torch.arange(1, n + 1, device=query.device)
        else:
            keys = torch.as_tensor(n if lengths is None else lengths, device=query.device).view(-1, 1).expand(-1, n)
        share = (1 / keys.to(accurate)).view(-1, 1, n, 1)
        features = Features(_shared, _unshared, self.config.num_features, (w[None],), floor=FLOOR, tokens=share)
        return attend_linearly(query, key, value, features, **options)

    def _weights(self, hidden: Tensor, lengths: Tensor | None, state) -> tuple[Weights, Tensor]:
        """
        Of the tokens, counted from the call's start on; and the logarithm (B, G) of the share that the call leaves of the
        sums before it.
        """
        given = self.gate(hidden).mT.to(
            widest(hidden.device)
        )  # logarithms add up over the whole text, and differences are what counts
        log_left = logsigmoid(given).cumsum(2)
        all_left = (
            log_left if state is None else log_left + state.entries.get("log_left", log_left.new_zeros(1))[..., None]
        )
        sum_of_weights = (-torch.expm1(all_left)).clamp_min(torch.finfo(hidden.dtype).tiny)
        weights = Weights(log_left - sum_of_weights.log(), logsigmoid(-given) - log_left)
        if lengths is None:
            return weights, log_left[..., -1]
        last = torch.nn.functional.pad(log_left, (1, 0)).gather(
            2, lengths.view(-1, 1, 1).expand(-1, log_left.shape[1], 1)
        )
        return weights, last[..., 0]


class _Waves(torch.autograd.Function):
    """u (..., m / 2, T) -> sin and cos of u, (..., m, T): each is the other's gradient."""

    @staticmethod
    def forward(ctx, u: Tensor) -> Tensor:
        waves = torch.cat([u.sin(), u.cos()], -2)
        ctx.save_for_backward(waves)
        return waves

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        sin, cos = ctx.saved_tensors[0].chunk(2, -2)
        of_sin, of_cos = grad.chunk(2, -2)
        return (of_sin * cos).addcmul_(of_cos, sin, value=-1)


def _features(x: Tensor, w: Tensor) -> Tensor:
    """x (B, H, T, D), w (1, G, m / 2, D) -> (B, H, T, m), which stand in rows."""
    return _Waves.apply(project(normalize(x, dim=-1), w).mT).mT / math.sqrt(w.shape[2])


def _shared(x: Tensor, share: Tensor, w: Tensor) -> Tensor:
    """Of queries: what they read is a mean over the keys."""
    return _features(x, w) * share


def _unshared(x: Tensor, share: Tensor, w: Tensor) -> Tensor:
    return _features(x, w)
