"""
A router sends a share of the tokens through attention, and the others around it:

    l_i = w . x_i,    p_i = sigmoid(l_i),    S = the tokens that go through,
    output_i = p_i / stopgrad(p_i) softmax(scaling q_i K_S^T) V_S for i in S, else 0.

Raposo 2024, Mixture-of-Depths (arXiv:2404.02258). x is the layer's input. Encoder: S is the ceil(`capacity` n) tokens of the
highest l among the row's n real ones, of equal ones the earlier. Decoder, in training and after it: S is the tokens with
l >= `threshold`, a buffer that follows the (1 - capacity) quantile of l over real tokens in training, as the moving average of
each batch's, so that no token's way depends on a later one. In a half-precision model it moves in coarse steps.

Departures: the paper takes the top tokens of the whole sequence in training, which in a decoder looks ahead, and then trains
a predictor of that choice; the threshold needs neither. It sends every other block around with capacity 1/8, attention and
feed-forward together, in models trained so from the start: here it is the attention of the layers you name. The gate's value
is 1, with the gradient of p, so that a chosen token gets what the pretrained layer gave.

Cost: N^2 capacity^2. State: keys and values of the tokens that went through, O(capacity N). Dense limit: capacity 1 (the
threshold is -inf). New: the router, drawn from `seed` so that inputs of variance 1 have logits of variance 1, and the
threshold, which starts at the quantile of such logits. Of a pretrained layer the patched one leaves out what the skipped
tokens said and were told.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..caching import TokenStore, take
from ..config import EfficientAttentionConfig, option
from ..ops.exact import exact_attention
from ..ops.router import Router, share_of
from ..registry import register_variant
from ..variant import EfficientAttention, HostShape


@dataclass(kw_only=True)
class MixtureOfDepthsConfig(EfficientAttentionConfig):
    """Hyper-parameters of `mixture_of_depths`."""

    capacity: float = option(0.5, "share of the tokens that go through attention", minimum=0.0, maximum=1.0)
    decay: float = option(0.99, "decoder: of the moving average of the threshold", minimum=0.0, maximum=1.0)
    seed: int = option(0, "of the router's first weights", minimum=0)

    def validate(self) -> None:
        if self.capacity == 0:
            raise ValueError(
                "MixtureOfDepthsConfig.capacity = 0.0: no token would attend; give a share above 0, up to 1."
            )

    @classmethod
    def tiny(cls, causal: bool) -> MixtureOfDepthsConfig:
        # With this seed the tokens that the suite moves go through; two steps that it compares have one threshold.
        return cls(capacity=0.6, seed=2, decay=1.0)

    @classmethod
    def variations(cls, causal: bool) -> list[MixtureOfDepthsConfig]:
        return [cls(capacity=0.3), cls(capacity=0.8, seed=3), cls(capacity=1.0)]

    @classmethod
    def dense_limit(cls, length: int, causal: bool) -> MixtureOfDepthsConfig:
        return cls(capacity=1.0)


class ChosenTokens(TokenStore):
    """Keys and values of the tokens that went through; which of them a position count leaves is not kept."""

    def can_crop(self) -> bool:
        return False


@register_variant(
    "mixture_of_depths",
    family="sparse models",
    summary="a router sends a share of the tokens through attention and the others around it",
    paper="Raposo 2024, arXiv:2404.02258",
    also=("mod",),
)
class MixtureOfDepthsAttention(EfficientAttention):
    config_class = MixtureOfDepthsConfig
    needs_hidden = True
    linear_cost = False

    def __init__(self, config: MixtureOfDepthsConfig, host: HostShape) -> None:
        super().__init__(config, host)
        scale = host.hidden_size**-0.5
        self.router = Router(host.hidden_size, 1, seed=config.seed, layer=host.layer, deviation=scale)
        if host.causal:
            start = NormalDist().inv_cdf(1 - config.capacity) if config.capacity < 1 else -math.inf
            self.register_buffer("threshold", torch.tensor(start, device="cpu"))

    def attend(self, query, key, value, *, lengths, scaling, dropout, causal, state, hidden) -> Tensor:
        logits = self.router(hidden)[..., 0]
        real = None
        if lengths is not None:
            real = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
        chosen = self._above(logits, real) if causal else self._best(logits, real)
        places, counts = gathered(chosen)
        if state is not None and int(counts.max()) == 0:
            return torch.zeros_like(query)
        log_p = logsigmoid(logits).gather(1, places)[:, None, :, None]
        gate = (log_p - log_p.detach()).exp().to(query.dtype)  # where p itself would be 0, too
        query_in, key_in, value_in = (take(x, places) for x in (query, key, value))
        options = {"scaling": scaling, "dropout": dropout, "causal": causal}
        own = None if int(counts.min()) == places.shape[1] else counts  # rows that agree need no masks
        if state is None:
            output = exact_attention(query_in, key_in, value_in, lengths=own, **options)
        else:
            buffer = state.store("chosen", ChosenTokens).extend(key_in, value_in, own)
            output = exact_attention(
                query_in, buffer.key, buffer.value, lengths=buffer.length, offset=buffer.new, **options
            )
        return self._back(output * gate, places, counts, query)

    def _best(self, logits: Tensor, real: Tensor | None) -> Tensor:
        """(B, N) bool: the best real tokens of each row."""
        length = torch.full((len(logits),), logits.shape[1], device=logits.device) if real is None else real.sum(1)
        keep = share_of(length, self.config.capacity)[:, None]
        scores = logits if real is None else logits.masked_fill(~real, -math.inf)
        order = scores.sort(dim=1, descending=True, stable=True).indices
        rank = torch.arange(logits.shape[1], device=logits.device).expand_as(order)
        return torch.zeros_like(order).scatter_(1, order, rank) < keep

    def _above(self, logits: Tensor, real: Tensor | None) -> Tensor:
        """(B, N) bool: the real tokens whose logit reaches the threshold."""
        if self.training and self.config.capacity < 1:
            seen = logits.detach().flatten() if real is None else logits.detach()[real]
            if len(seen):
                number = seen.new_tensor(len(seen))
                self.observe(quantile=_quantile(seen, 1 - self.config.capacity) * number, number=number)
        above = logits >= self.threshold.to(logits.dtype)
        return above if real is None else above & real

    def update_statistics(self, quantile: Tensor, number: Tensor) -> None:
        target = (quantile / number).to(self.threshold.dtype)
        self.threshold = self.threshold + (1 - self.config.decay) * (target - self.threshold)

    @staticmethod
    def _back(output: Tensor, places: Tensor, counts: Tensor, like: Tensor) -> Tensor:
        used = torch.arange(places.shape[1], device=places.device) < counts[:, None]
        output = output.masked_fill(~used[:, None, :, None], 0).to(like.dtype)
        return torch.zeros_like(like).scatter(2, places[:, None, :, None].expand_as(output), output)


@torch.compiler.disable
def gathered(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """chosen (B, N) bool -> the places of the chosen in order, (B, most of any row), others behind them, and counts (B,)."""
    counts = chosen.sum(1)
    order = torch.argsort((~chosen).to(torch.int8), dim=1, stable=True)
    return order[:, : max(int(counts.max()), 1)], counts


def _quantile(x: Tensor, share: float) -> Tensor:
    """The value that a share of x lies below."""
    return x.sort().values[min(int(share * len(x)), len(x) - 1)]
