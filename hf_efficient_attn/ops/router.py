"""
Routers: which choices a token gets, by scores that are linear in the layer's input; float32 or better throughout.

The load-balance loss (Fedus 2021, Switch, arXiv:2101.03961) of E choices, over T real tokens with k choices each:
    E sum_e f_e P_e,    f_e = the share of the T k choices that fell on e,    P_e = mean of the probabilities of e;
it is 1 where all are used alike, and its gradient goes through P.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .draws import normal, source


class Router(nn.Module):
    """
    hidden (..., E) -> logits (..., choices). Weights start normal with standard deviation `deviation`, drawn from the seed
    and the layer's number; a bias, if there is to be one, as `bias`.
    """

    def __init__(
        self,
        hidden_size: int,
        choices: int,
        *,
        seed: int = 0,
        layer: int = 0,
        deviation: float = 0.02,
        bias: float | None = None,
    ) -> None:
        super().__init__()
        start = deviation * normal(source(seed, layer), choices, hidden_size)
        self.weight = nn.Parameter(start.to(torch.get_default_dtype()))
        self.bias = None if bias is None else nn.Parameter(torch.full((choices,), bias))

    def forward(self, hidden: Tensor) -> Tensor:
        accurate = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.to(accurate)
            return linear(hidden.to(accurate), self.weight.to(accurate), bias)


def best(scores: Tensor, count: int) -> Tensor:
    """(..., E) -> (..., count) int64, the places of the highest scores in order; of equal ones the lower comes first."""
    if torch.compiler.is_exporting():  # ONNX has no stable sort, and takes the lower of equal ones by itself
        return scores.topk(count).indices
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def share_of(count: Tensor, share: float, times: Fraction | int = 1) -> Tensor:
    """ceil(share x times x count), int64 and exact: `share` is the decimal that it is written as."""
    exact = (Fraction(str(share)) * times).limit_denominator(10**6)
    return -(-count * exact.numerator // exact.denominator)


def balance_loss(probability: Tensor, chosen: Tensor, real: Tensor | None) -> Tensor:
    """probability (..., E), chosen (..., E) bool, real (...) bool or None where all are -> a scalar, 0 without tokens."""
    chosen = chosen.to(probability.dtype)
    if real is not None:
        probability, chosen = probability * real[..., None], chosen * real[..., None]
    chosen, probability = chosen.flatten(0, -2).sum(0), probability.flatten(0, -2).sum(0)
    share = chosen / chosen.sum().clamp_min(1)
    return len(share) * (share * probability).sum() / probability.detach().sum().clamp_min(1)
