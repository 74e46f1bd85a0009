"""
`adaptive`: every key/value group of heads g learns which of several candidate variants serves it,

    out_g = sum_c softmax(gate_g / tau)_c candidate_c(q_g, k_g, v_g),     tau -> `final_temperature`,

until `harden` leaves to each group the candidate of its largest gate. From then on only chosen candidates exist: they run, for
their own groups, and they are what is saved.

The survey's pattern that the model chooses itself (Tay et al. 2020, arXiv:2009.06732), by the relaxation of Liu et al. 2018,
DARTS (arXiv:1806.09055): one gate, softened by a temperature, no second set of data.

Cost and decoder state: while soft the sum of all candidates; hardened the chosen ones, on their groups alone. Dense limit: all
candidates at theirs. Parameters: `gate` (G, candidates) starts at zero, the mean of the candidates, and those of the candidates
start as they do; nothing is closer to the dense layer before it is known which candidate is.

Temperature: tau = temperature (final_temperature / temperature)^min(1, steps / anneal_steps) falls geometrically. `steps`, a
buffer of the checkpoint, counts backward passes of training, and grows when one is through, so that training goes on where it
was saved. It is an integer: a temperature in half precision would be too coarse to fall.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..config import EfficientAttentionConfig, option
from ..registry import build, config_from_dict, get_config_class, get_info, register_variant
from ..variant import EfficientAttention, HostShape

MAPPING = "efficient_attention"  # the field of a patched model's config that maps layers to variants


@dataclass(kw_only=True)
class AdaptiveConfig(EfficientAttentionConfig):
    """Hyper-parameters of `adaptive`. A candidate is a config, its dict (with its name under "variant") or a name alone."""

    candidates: list = option(["sliding_window", "topk_blocks"], "the variants to choose from")
    temperature: float = option(1.0, "divides the gates at the first step", minimum=1e-3)
    final_temperature: float = option(0.1, "divides the gates from step `anneal_steps` on", minimum=1e-3)
    anneal_steps: int = option(1000, "backward passes over which the temperature falls", minimum=1)
    choices: list[int] = option([], "the candidate of each key/value head, by number; set by `harden`", minimum=0)

    def __post_init__(self) -> None:
        if isinstance(self.candidates, (list, tuple)):
            self.candidates = [_candidate(entry) for entry in self.candidates]
        super().__post_init__()

    def validate(self) -> None:
        if not self.candidates:
            raise ValueError("AdaptiveConfig.candidates is empty: give at least one variant.")
        if any(getattr(candidate, "sharing", None) == "layerwise" for candidate in self.candidates):
            raise ValueError(
                "AdaptiveConfig.candidates: a linformer with sharing = 'layerwise' has one projection for all layers, which "
                "choose apart. Give it sharing = 'headwise', 'key-value' or 'none'."
            )
        if self.final_temperature > self.temperature:
            raise ValueError(
                f"AdaptiveConfig.final_temperature = {self.final_temperature} is above temperature = {self.temperature}: the "
                "temperature falls. Give a lower one, or the same for a constant one."
            )
        if any(choice >= len(self.candidates) for choice in self.choices):
            raise ValueError(
                f"AdaptiveConfig.choices = {self.choices}: there are {len(self.candidates)} candidates, numbered from 0."
            )

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "candidates": [candidate.to_dict() for candidate in self.candidates]}

    @classmethod
    def tiny(cls, causal: bool) -> AdaptiveConfig:
        candidates = [candidate.tiny(causal) for candidate in cls().candidates]
        return cls(candidates=candidates, temperature=0.5, final_temperature=0.5)  # constant: two passes give the same

    @classmethod
    def variations(cls, causal: bool) -> list[AdaptiveConfig]:
        tiny = cls.tiny(causal)
        three = [*tiny.candidates, get_config_class("linformer").tiny(causal)]
        return [
            replace(tiny, choices=[1, 0]),
            replace(tiny, choices=[1, 1]),
            replace(tiny, candidates=three, temperature=2.0),
            replace(tiny, candidates=three, choices=[2, 0]),
        ]

    @classmethod
    def dense_limit(cls, length: int, causal: bool) -> AdaptiveConfig:
        return cls(candidates=[candidate.dense_limit(length, causal) for candidate in cls().candidates])

    def window_only(self, causal: bool) -> AdaptiveConfig | None:
        """Every candidate that contains a window replaced by that window."""
        windows = [candidate.window_only(causal) for candidate in self.candidates]
        if not any(windows):
            return None
        return replace(self, candidates=[w or own for w, own in zip(windows, self.candidates, strict=True)])


def _candidate(entry: Any) -> EfficientAttentionConfig:
    if isinstance(entry, str):
        entry = get_config_class(entry)()
    elif isinstance(entry, dict):
        entry = config_from_dict(entry)
    if not isinstance(entry, EfficientAttentionConfig) or isinstance(entry, AdaptiveConfig):
        raise ValueError(
            f"AdaptiveConfig.candidates: {entry!r} is no candidate; give configs, their dicts or names of attention variants "
            "other than 'adaptive'."
        )
    return entry


@register_variant(
    "adaptive",
    family="learnable patterns",
    summary="each key/value head learns which of several variants serves it",
    paper="Tay 2020, arXiv:2009.06732; Liu 2018, arXiv:1806.09055",
)
class AdaptiveAttention(EfficientAttention):
    """`adaptive`: `parts` maps the number of a candidate to its module; without `choices` there are `gate` and `steps`."""

    config_class = AdaptiveConfig
    linear_cost = False

    def __init__(self, config: AdaptiveConfig, host: HostShape) -> None:
        super().__init__(config, host)
        self.parts = nn.ModuleDict(
            {str(c): build(config.candidates[c], _serving(host, groups)) for c, groups in self.groups().items()}
        )
        if not config.choices:
            self.gate = nn.Parameter(torch.zeros(host.num_kv_heads, len(config.candidates)))
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @property
    def needs_hidden(self) -> bool:
        return any(part.needs_hidden for part in self.parts.values())

    @classmethod
    def check_host(cls, config: AdaptiveConfig, host: HostShape) -> None:
        if config.choices and len(config.choices) != host.num_kv_heads:
            raise ValueError(
                f"adaptive: choices = {config.choices} has {len(config.choices)} numbers, but the layer has "
                f"{host.num_kv_heads} key/value heads; give one for each of them."
            )
        for c, groups in _groups(config, host).items():
            shapes = [groups] if config.choices else [groups, groups[:1]]  # it may be left with any number of them
            for shape in shapes:
                get_info(config.candidates[c].name).module_class.check_host(config.candidates[c], _serving(host, shape))

    @classmethod
    def resolve(cls, config: AdaptiveConfig, host: HostShape) -> AdaptiveConfig:
        resolved = [get_info(own.name).module_class.resolve(own, host) for own in config.candidates]
        return replace(config, candidates=resolved)

    def groups(self) -> dict[int, list[int]]:
        """Candidate -> the key/value heads that it serves, for those that serve any."""
        return _groups(self.config, self.host)

    @property
    def temperature(self) -> Tensor:
        """What the gates are divided by at this step: a scalar, float32."""
        config = self.config
        progress = (self.steps / config.anneal_steps).clamp_max(1.0)
        return config.temperature * (config.final_temperature / config.temperature) ** progress

    def update_statistics(self, steps: Tensor) -> None:
        self.steps = self.steps + 1  # `steps` counts processes as well

    def attend(self, query, key, value, *, causal, state, hidden=None, **shared) -> Tensor:
        shared, size, soft = {**shared, "causal": causal}, self.host.group_size, not self.config.choices
        if soft:
            self.observe(steps=torch.ones_like(self.steps))
            accurate = torch.promote_types(self.gate.dtype, torch.float32)
            weights = (self.gate.to(accurate) / self.temperature).softmax(-1).repeat_interleave(size, 0)
        output, parts, order = None, [], []
        for c, groups in self.groups().items():
            part, inputs = self.parts[str(c)], (query, key, value)
            if len(groups) < self.host.num_kv_heads:
                heads = [g * size + h for g in groups for h in range(size)]
                order += heads
                inputs = [x[:, chosen] for x, chosen in zip(inputs, (heads, groups, groups), strict=True)]
            own = None
            if state is not None:
                own = state.part(f"part{c}", part.make_state)
            given = part.attend_from_below(*inputs, state=own, hidden=hidden if part.needs_hidden else None, **shared)
            part.after_backward(inputs[0], given)
            if not soft:
                parts.append(given)
                continue
            weighted = weights[:, c, None, None] * given
            output = weighted if output is None else output + weighted
        if soft:
            return output.to(query.dtype)
        return torch.cat(parts, 1)[:, torch.tensor(order).argsort().tolist()] if order else parts[0]

    def harden(self) -> None:
        """
        Leaves to each key/value head the candidate of its largest gate (of equal ones the first), and keeps of every
        candidate's parameters what belongs to its heads, as new tensors: an optimizer is to be made anew.

        Raises:
            ValueError: it is hardened already, or a candidate's parameters cannot be shared out over heads.
        """
        if self.config.choices:
            raise ValueError(f"adaptive: layer {self.host.layer} is hardened already, to {self.config.choices}.")
        config = replace(self.config, choices=self.gate.detach().float().argmax(-1).tolist())
        parts = {c: self._part_of(c, groups) for c, groups in _groups(config, self.host).items()}
        self.config, self.parts = config, nn.ModuleDict({str(c): part for c, part in parts.items()})
        del self.gate, self.steps

    def _part_of(self, c: int, groups: list[int]) -> EfficientAttention:
        """Candidate c for these key/value heads alone."""
        whole, count = self.parts[str(c)], self.host.num_kv_heads
        if len(groups) == count:
            return whole
        part = build(self.config.candidates[c], _serving(self.host, groups)).train(whole.training)
        part = part.to(device=self.gate.device, dtype=self.gate.dtype)
        sources = dict([*whole.named_parameters(), *whole.named_buffers()])
        with torch.no_grad():
            for name, x in [*part.named_parameters(), *part.named_buffers()]:
                source = sources[name]
                for axis, (now, then) in enumerate(zip(x.shape, source.shape, strict=True)):
                    if now == then:
                        continue
                    if then % count or now * count != then * len(groups):
                        raise ValueError(
                            f"adaptive: {name} of candidate {part.config.name!r} has {tuple(source.shape)} for {count} "
                            f"key/value heads and {tuple(x.shape)} for {len(groups)}, so it is not shared out over heads, and "
                            "the layer cannot be hardened. Choose other candidates."
                        )
                    kept = [g * (then // count) + i for g in groups for i in range(then // count)]
                    source = source.index_select(axis, torch.tensor(kept, device=source.device))
                x.copy_(source)
                x.requires_grad_(sources[name].requires_grad)
        return part


def harden(model: nn.Module) -> nn.Module:
    """
    Ends the choice of every `adaptive` layer of a patched model, in place; returns the model. Its config then says what each
    layer chose, so that `save_pretrained` writes chosen candidates alone and the Auto classes bring back just these.

    Raises:
        ValueError: the model has no `adaptive` layer that still chooses, one inside another variant, or a layer twice.
    """
    variants = [module for module in model.modules() if isinstance(module, EfficientAttention)]
    parts = {id(part) for variant in variants for part in variant.modules() if part is not variant}
    layers = [v for v in variants if isinstance(v, AdaptiveAttention) and not v.config.choices]
    if not layers:
        raise ValueError("no layer of this model is 'adaptive' and still chooses; there is nothing to harden.")
    inner = next((v for v in layers if id(v) in parts), None)
    if inner is not None:
        raise ValueError(
            f"layer {inner.host.layer}: 'adaptive' is part of another variant there, whose config cannot say what was chosen."
        )
    numbers = [layer.host.layer for layer in layers]
    twice = next((number for number in numbers if numbers.count(number) > 1), None)
    if twice is not None:
        raise ValueError(
            f"layer {twice} is there twice, and a config can say of one what was chosen: merge the copies that PEFT trains "
            "(modules_to_save) by merge_and_unload(), and harden parts of a model that were patched apart one by one."
        )
    for layer in layers:
        layer.harden()
    configs = {
        id(config): config for m in model.modules() if getattr(config := getattr(m, "config", None), MAPPING, None)
    }
    for config in configs.values():
        setattr(
            config,
            MAPPING,
            _hardened(getattr(config, MAPPING), [v for v in variants if isinstance(v, AdaptiveAttention)]),
        )
    return model


def _hardened(mapping: dict[str, Any], layers: list[AdaptiveAttention]) -> dict[str, Any]:
    """The saved mapping, with an entry of its own for each of these layers. A list holds several variants of a layer."""
    entries = [(key, one) for key, value in mapping.items() for one in (value if isinstance(value, list) else [value])]
    entries = [(key, one) for key, one in entries if one["variant"] != AdaptiveConfig.name]
    entries += [(str(layer.host.layer), layer.config.to_dict()) for layer in layers]
    grouped: dict[str, list] = {}
    for key, one in entries:
        grouped.setdefault(key, []).append(one)
    return {key: several if len(several) > 1 else several[0] for key, several in grouped.items()}


def _groups(config: AdaptiveConfig, host: HostShape) -> dict[int, list[int]]:
    """Candidate -> the key/value heads that it serves, for those that serve any."""
    heads = range(host.num_kv_heads)
    if not config.choices:
        return {c: list(heads) for c in range(len(config.candidates))}
    return {c: [g for g in heads if config.choices[g] == c] for c in sorted(set(config.choices))}


def _serving(host: HostShape, groups: list[int]) -> HostShape:
    """The layer as a candidate sees it that serves these key/value heads."""
    return replace(host, num_heads=len(groups) * host.group_size, num_kv_heads=len(groups))
