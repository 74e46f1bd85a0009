"""
How layers of a model are exchanged for variants and given back: plan, build, swap, revert.

A plan is complete and checked before the model is touched, so a refused patch leaves it as it was.
"""

from __future__ import annotations

import copy
import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .config import EfficientAttentionConfig
from .dispatch import CHILD, NAME, PREVIOUS, PatchedForward
from .hosts import Host, HostCode, dispatching_modules, find_hosts, refusal
from .registry import build, config_from_dict, get_config_class, get_info
from .variant import EfficientAttention

Layers = str | int | Iterable[int] | None
Choice = str | EfficientAttentionConfig | Mapping[str, Any]


@dataclass(frozen=True)
class Swap:
    """One layer and the module that will serve it."""

    host: Host
    variant: EfficientAttention


def parse_layers(layers: Layers, count: int) -> list[int]:
    """
    Layer numbers from a number, a list, a range string ("2-5", "8-", "0,3-4") or None for all `count` layers.

    Raises:
        ValueError: what was given is no such thing, or names a layer that does not exist.
    """
    if layers is None:
        return list(range(count))
    if isinstance(layers, str):
        numbers: list[int] = []
        for piece in layers.split(","):
            match = re.fullmatch(r"\s*(\d+)\s*(?:(-)\s*(\d*)\s*)?", piece)
            if match is None:
                raise ValueError(
                    f"layers = {layers!r}: write ranges such as '2-5', '8-' or '0,3-4', or a list of numbers."
                )
            first = int(match[1])
            last = first if match[2] is None else int(match[3]) if match[3] else count - 1
            if last < first:
                raise ValueError(
                    f"layers = {layers!r}: the range {piece!r} is empty; the model has layers 0 to {count - 1}."
                )
            numbers += range(first, last + 1)
    elif isinstance(layers, int) and not isinstance(layers, bool):
        numbers = [layers]
    elif isinstance(layers, Iterable):
        numbers = list(layers)
    else:
        numbers = [layers]
    for number in numbers:
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < count:
            raise ValueError(f"layer {number!r} does not exist: the model has attention layers 0 to {count - 1}.")
    if len(set(numbers)) != len(numbers) or not numbers:
        raise ValueError(f"layers = {layers!r}: name each layer once, and at least one.")
    return sorted(numbers)


def make_config(choice: Choice, hyper: Mapping[str, Any] | None = None) -> EfficientAttentionConfig:
    """A config from a registry name and hyper-parameters, from a config, or from its dict."""
    hyper = dict(hyper or {})
    if isinstance(choice, str):
        return get_config_class(choice).from_kwargs(**hyper)
    if isinstance(choice, Mapping):
        return config_from_dict({**choice, **hyper})
    if isinstance(choice, EfficientAttentionConfig):
        if hyper:
            raise ValueError(
                f"hyper-parameters {sorted(hyper)} beside a ready {type(choice).__name__}: put them into the config."
            )
        return choice
    raise ValueError(
        f"a variant is given by name, config or dict, not by {type(choice).__name__}; see available_variants()."
    )


def plan(model: PreTrainedModel, choices: Mapping[Any, Choice]) -> tuple[list[Swap], dict[str, dict]]:
    """
    The swaps that a mapping layers -> variant asks for, modules built, and the mapping in its saved form.

    Raises:
        ValueError: anything that cannot be served, before the model is changed.
    """
    hosts = find_hosts(model)
    if not model._can_set_attn_implementation():
        raise ValueError(
            f"{type(model).__name__} does not dispatch its attention through AttentionInterface and would stay dense."
        )
    chosen: dict[int, EfficientAttentionConfig] = {}
    entries: list[tuple[list[int], EfficientAttentionConfig]] = []
    for layers, choice in choices.items():
        numbers = parse_layers(layers, len(hosts))
        config = make_config(choice)
        twice = [n for n in numbers if n in chosen]
        if twice:
            raise ValueError(f"layer {twice[0]} is given two variants; name each layer once.")
        config = _resolved(config, [hosts[n] for n in numbers])
        chosen.update(dict.fromkeys(numbers, config))
        entries.append((numbers, config))
    if not chosen:
        raise ValueError("no layer was named; give a variant for at least one.")
    swaps = []
    for index, number in enumerate(sorted(chosen)):
        host = replace(hosts[number], shape=replace(hosts[number].shape, patched_index=index))
        reason = refusal(host)
        if reason is not None:
            raise ValueError(
                f"attention layer {number} ({host.name}, {type(host.module).__name__}) {reason}; no variant can honour that. "
                "Leave the layer out with `layers=`, or use another model."
            )
        swaps.append(Swap(host, _build(chosen[number], host)))
    for numbers, config in entries:
        modules = [swap.variant for swap in swaps if swap.host.shape.layer in numbers]
        get_info(config.name).module_class.tie_parameters(modules)
    return swaps, {_spell(numbers): config.to_dict() for numbers, config in entries}


def _resolved(config: EfficientAttentionConfig, hosts: list[Host]) -> EfficientAttentionConfig:
    return get_info(config.name).module_class.resolve(config, hosts[0].shape)


def _build(config: EfficientAttentionConfig, host: Host) -> EfficientAttention:
    try:
        variant = build(config, host.shape)
    except ValueError as error:
        raise ValueError(f"attention layer {host.shape.layer} ({host.name}): {error}") from error
    weight = next((p for p in host.module.parameters() if p.is_floating_point()), None)
    if weight is not None:
        hooked = any(hasattr(part, "_hf_hook") for part in host.module.modules())
        if weight.device.type == "meta" and hooked:
            raise ValueError(
                f"attention layer {host.shape.layer} is offloaded; patch the model before its weights are."
            )
        variant = variant.to(device=weight.device, dtype=weight.dtype)
    return variant.train(host.module.training)


def _spell(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def swap_layers(model: PreTrainedModel, swaps: list[Swap], outer: nn.Module | None = None) -> None:
    """
    Puts the variants in place. Every dispatching module of the model remembers what it ran before. `outer` is a wrapper
    around the model, if there is one.
    """
    modules = dispatching_modules(model)
    for swap in swaps:
        _check_instance_forward(swap.host)
    _own_configs(model if outer is None else outer)
    previous = {name: module.config._attn_implementation for name, module in modules.items()}
    model.set_attn_implementation(NAME)
    stayed = [name for name, module in modules.items() if module.config._attn_implementation != NAME]
    if stayed:
        _set_implementations(modules, previous)
        raise ValueError(
            f"{type(model).__name__} keeps its own attention implementation in {stayed[0]}; it cannot be patched."
        )
    for name, module in modules.items():
        setattr(module, PREVIOUS, previous[name])
    for swap in swaps:
        module = swap.host.module
        module.__class__ = efficient_class(type(module))
        module.add_module(CHILD, swap.variant)
        _rebind_forward(module)


def revert_layers(model: PreTrainedModel) -> None:
    """Takes every variant out again; the model is what it was, bit for bit."""
    modules = dispatching_modules(model)
    previous = {name: getattr(module, PREVIOUS) for name, module in modules.items()}
    for module in modules.values():
        delattr(module, PREVIOUS)
        if isinstance(module, PatchedForward):
            delattr(module, CHILD)
            module.__class__ = module.dense_class
            _rebind_forward(module)
    _set_implementations(modules, previous)
    for part in model.modules():  # a model without attention of its own shares or mirrors one that has
        if isinstance(part, PreTrainedModel) and part.config._attn_implementation == NAME:
            part.config._attn_implementation_internal = next(iter(previous.values()))


def _own_configs(model: nn.Module) -> None:
    """Two models may hold one config object; a patch writes into it, so this model gets copies, related as before."""
    copies: dict[int, Any] = {}
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, PreTrainedConfig):
                setattr(module, name, copy.deepcopy(value, copies))


def _set_implementations(modules: dict[str, nn.Module], names: dict[str, str]) -> None:
    for name, module in modules.items():
        module.config._attn_implementation_internal = names[name]


def _check_instance_forward(host: Host) -> None:
    """A forward on the instance bypasses the class; Accelerate's hooks are known, anything else is refused."""
    attributes = vars(host.module)
    if "forward" in attributes and "_old_forward" not in attributes and not _is_bound_forward(host.module):
        raise ValueError(
            f"attention layer {host.shape.layer} ({host.name}) has a forward of its own set on the instance, which a patch "
            "would not reach. Remove it first."
        )


def _is_bound_forward(module: nn.Module) -> bool:
    """Whether the instance holds the forward of its own class, as Accelerate leaves it behind with a hook it takes off."""
    forward = vars(module).get("forward")
    own = [vars(cls).get("forward") for cls in (PatchedForward, *type(module).__mro__)]
    return isinstance(forward, types.MethodType) and forward.__self__ is module and forward.__func__ in own


def _rebind_forward(module: nn.Module) -> None:
    """Accelerate's hook calls the forward that it found on the instance: let it find the class's present one."""
    if "_old_forward" in vars(module):
        module._old_forward = types.MethodType(type(module).forward, module)
    elif _is_bound_forward(module):
        del module.forward


@cache
def efficient_class(dense_class: type) -> type:
    """`EfficientLlamaAttention`, a subclass of `LlamaAttention` that goes through `PatchedForward`."""
    if issubclass(dense_class, PatchedForward):
        raise ValueError("this layer is patched already; call unpatch_model(model) first.")
    return type(
        f"Efficient{dense_class.__name__}",
        (PatchedForward, dense_class),
        {
            "dense_class": dense_class,
            "host_code": HostCode.of(dense_class),
            "__module__": __name__,
            "__doc__": f"{dense_class.__name__} whose attention is the variant in its child `{CHILD}`.",
            "__reduce_ex__": _reduce,
        },
    )


def _reduce(self, protocol):
    """Pickled and copied by the class it was made from, so that another process can make it again."""
    return _remake, (type(self).dense_class,), self.__dict__.copy()


def _remake(dense_class: type) -> nn.Module:
    cls = efficient_class(dense_class)
    return cls.__new__(cls)
