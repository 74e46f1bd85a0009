"""
A router sends each token to `top_k` of E = `num_experts` feed-forwards:

    p = softmax(W_r x),    y = sum_{e in top_k(p)} g_e F_e(x),    g_e = p_e / sum_{top_k} p    (k = 1: p / stopgrad(p) = 1).

Fedus 2021, Switch Transformers (arXiv:2101.03961); Komatsuzaki 2022, sparse upcycling (arXiv:2212.05055). F_0 is the
pretrained feed-forward, which stays where it is, and the others start as its copies, so that the patched model computes what
it did. Of equal probabilities the lower expert wins. In training `balance` times the load-balance loss
(`ops/router.py`) over the real tokens joins the model's loss.

`capacity_factor` c, in training only: in a sequence of n real tokens an expert takes ceil(c k n / E) of them, in order of
position and all k choices of a token before the next token's; what comes later adds nothing, as in Switch. In eval no token
is ever dropped, and padded tokens count nowhere.

Cost: that of k feed-forwards per token (while `torch.export` looks on, of all E); parameters grow by (E - 1) feed-forwards. No
decoder state. Departures: Switch weighs a single expert by p, which would change the pretrained model; no jitter. Beside the
pretrained maps: the router, small and drawn from `seed`, and the copies. Adapters (LoRA) go to the experts,
`efficient_attn.experts.*`; one around a pretrained map would act on the tokens of all experts, which is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from ..config import VariantConfig, option
from ..ops.router import Router, balance_loss, best, share_of
from ..ops.rows import Texts
from ..registry import register_variant
from ..variant import EfficientFeedForward, FeedForwardShape


@dataclass(kw_only=True)
class MoeConfig(VariantConfig):
    """Hyper-parameters of `moe`."""

    num_experts: int = option(4, "feed-forwards, the pretrained one among them", minimum=1)
    top_k: int = option(1, "experts per token", minimum=1)
    capacity_factor: float | None = option(
        None, "tokens an expert takes in training, in multiples of an even share; None = all", minimum=0.0
    )
    balance: float = option(0.01, "weight of the load-balance loss", minimum=0.0)
    seed: int = option(0, "of the router's first weights", minimum=0)

    def validate(self) -> None:
        if self.top_k > self.num_experts:
            raise ValueError(
                f"MoeConfig.top_k = {self.top_k} is more than num_experts = {self.num_experts}; lower it, or add experts."
            )

    @classmethod
    def tiny(cls, causal: bool) -> MoeConfig:
        return cls(num_experts=3)

    @classmethod
    def variations(cls, causal: bool) -> list[MoeConfig]:
        return [cls(num_experts=4, top_k=2), cls(num_experts=3, top_k=3, capacity_factor=0.7)]


@dataclass(frozen=True)
class Route:
    """
    Where the T tokens of one input `x` go, each to k experts: the pairs of token and choice that an expert takes,
    pair = token k + choice, sorted by expert, how many each expert has, and the gates (T, k).
    """

    x: Tensor
    pairs: Tensor
    counts: list[int]
    gates: Tensor

    @property
    def k(self) -> int:
        return self.gates.shape[1]


@register_variant(
    "moe",
    family="sparse models",
    summary="each token goes through some of several feed-forwards, chosen by a router; joins any attention variant",
    paper="Fedus 2021, arXiv:2101.03961; Komatsuzaki 2022, arXiv:2212.05055",
)
class MixtureOfExperts(EfficientFeedForward):
    config_class = MoeConfig

    def __init__(self, config: MoeConfig, host: FeedForwardShape) -> None:
        super().__init__(config, host)
        self.router = Router(host.hidden_size, config.num_experts, seed=config.seed, layer=host.layer)
        self.experts = nn.ModuleList(nn.Module() for _ in range(config.num_experts - 1))
        self._route: Route | None = None  # from the first map that reads a layer's input to the last

    @classmethod
    def check_host(cls, config: MoeConfig, host: FeedForwardShape) -> None:
        if config.top_k > 1 and host.normed:
            raise ValueError(
                f"MoeConfig.top_k = {config.top_k}: the inner features of this feed-forward are normalised, which the features "
                "of several experts side by side cannot be; choose top_k = 1."
            )

    def take_over(self, maps: Mapping[str, nn.Module]) -> None:
        for expert in self.experts:
            for path, module in maps.items():
                _place(expert, path, copy.deepcopy(module))

    @torch.compiler.disable
    def project(self, path: str, pretrained: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        maps = [pretrained, *(expert.get_submodule(path) for expert in self.experts)]
        return self._back(maps, x) if path == self.host.maps[-1] else self._into(maps, x)

    def _into(self, maps: list[Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
        """x (..., E) -> (..., k F): the inner features of a token's experts, side by side; of fused maps part by part."""
        if self._route is None or self._route.x is not x:
            self._route = self._decide(x)
        route, inner = self._route, self.host.inner_size
        k = route.k
        rows = x.reshape(-1, x.shape[-1]).index_select(0, route.pairs // k)
        features = _spread(_by_expert(maps, rows, route.counts), route)
        if k > 1:
            features = features.view(-1, k, features.shape[1] // inner, inner).transpose(1, 2)
        return features.reshape(*x.shape[:-1], -1)

    def _back(self, maps: list[Callable[[Tensor], Tensor]], features: Tensor) -> Tensor:
        """features (..., k F) -> (..., E): the sum over a token's experts, times their gates."""
        route, self._route = self._route, None
        k = route.k
        rows = features.reshape(-1, self.host.inner_size).index_select(0, route.pairs)
        outputs = _by_expert(maps, rows, route.counts)
        outputs = _spread(outputs * route.gates.flatten()[route.pairs, None].to(outputs.dtype), route)
        outputs = outputs.view(-1, k, outputs.shape[1]).sum(1) if k > 1 else outputs
        outputs = outputs.view(*features.shape[:-1], -1)
        self.after_backward(route.x, outputs)
        return outputs

    def _decide(self, x: Tensor) -> Route:
        k, experts = self.config.top_k, self.config.num_experts
        probability = self.router(x.reshape(-1, x.shape[-1])).softmax(-1)
        chosen = best(probability, k)
        gates = torch.gather(probability, 1, chosen)
        gates = gates / (gates.detach() if k == 1 else gates.sum(1, keepdim=True))
        if torch.compiler.is_exporting():
            return self._to_all(x, torch.zeros_like(probability).scatter(1, chosen, gates))
        kept = None
        if self.training:
            kept = self._observe(probability, chosen)
        expert = chosen.flatten() if kept is None else torch.where(kept.flatten(), chosen.flatten(), experts)
        counts = torch.bincount(expert, minlength=experts + 1).tolist()[:experts]
        pairs = torch.argsort(expert, stable=True)[: sum(counts)]
        return Route(x, pairs, counts, gates)

    def _to_all(self, x: Tensor, gates: Tensor) -> Route:
        """All tokens to all experts, with gates (T, E) of 0 where not chosen: a route whose shapes ask no numbers."""
        if self.host.normed:
            raise ValueError(
                f"moe in layer {self.host.layer} cannot be exported: the inner features of this feed-forward are normalised, "
                "which those of several experts side by side cannot be."
            )
        tokens, experts = gates.shape
        pairs = torch.arange(gates.numel(), device=x.device).view(tokens, experts).T.flatten()
        return Route(x, pairs, [tokens] * experts, gates)

    def _observe(self, probability: Tensor, chosen: Tensor) -> Tensor | None:
        """Adds the load-balance loss; (T, k) bool, which choices the capacity leaves, or None where it leaves all."""
        tokens, k = len(chosen), self.config.top_k
        batch, length, real = (1, tokens, None) if self.tokens is None else self.tokens
        if batch * length != tokens:
            raise ValueError(
                f"moe in layer {self.host.layer}: attention was given {batch} x {length} tokens, the feed-forward {tokens}. "
                "In training a feed-forward must read whole sequences (chunk_size_feed_forward = 0)."
            )
        taken = torch.zeros_like(probability, dtype=torch.bool).scatter_(1, chosen, True)
        rows = [x.view(batch, length, -1) for x in (probability, taken)]
        self.add_loss(self.config.balance * balance_loss(*rows, real if isinstance(real, Tensor) else None))
        if self.config.capacity_factor is None:
            return None
        if not isinstance(real, Texts):
            return self._within_capacity(chosen.view(batch, length, k), real).view(tokens, k)
        kept = torch.ones_like(chosen, dtype=torch.bool)
        for places, used, _ in real.groups:
            kept[places[used]] = self._within_capacity(chosen[places], used)[used]
        return kept

    def _within_capacity(self, chosen: Tensor, real: Tensor | None) -> Tensor:
        """chosen (B, N, k), real (B, N) bool or None where all are -> (B, N, k) bool, what a row's experts have room for."""
        (batch, length, k), experts = chosen.shape, self.config.num_experts
        count = torch.full((batch,), length, device=chosen.device) if real is None else real.sum(1)
        capacity = share_of(count, self.config.capacity_factor, Fraction(k, experts))
        each = torch.nn.functional.one_hot(chosen.reshape(batch, length * k), experts)
        padded = torch.zeros(batch, length, dtype=torch.bool, device=chosen.device) if real is None else ~real
        each = each.masked_fill(padded.repeat_interleave(k, 1)[..., None], 0)
        before = torch.gather(each.cumsum(1) - each, 2, chosen.reshape(batch, length * k, 1))[..., 0]
        return ((before < capacity[:, None]) | padded.repeat_interleave(k, 1)).view(batch, length, k)


def _by_expert(maps: list[Callable[[Tensor], Tensor]], rows: Tensor, counts: list[int]) -> Tensor:
    """Each map on its stretch of the rows; in training also on an empty one, so that every parameter is part of a step."""
    pieces = list(zip(maps, rows.split(counts), strict=True))
    if not torch.is_grad_enabled():
        pieces = [piece for piece in pieces if len(piece[1])] or pieces[:1]
    return torch.cat([map_(part) for map_, part in pieces])


def _spread(rows: Tensor, route: Route) -> Tensor:
    """The rows of the pairs that experts take, at the places of all T k pairs; zeros for those none takes."""
    return rows.new_zeros(route.gates.numel(), rows.shape[1]).index_copy(0, route.pairs, rows)


def _place(module: nn.Module, path: str, child: nn.Module) -> None:
    """Makes `child` the submodule of `module` at a dotted path."""
    *way, leaf = path.split(".")
    for name in way:
        if not hasattr(module, name):
            module.add_module(name, nn.Module())
        module = getattr(module, name)
    module.add_module(leaf, child)
