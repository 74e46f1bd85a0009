"""
How layers of a model are exchanged for variants and given back: plan, build, swap, revert.

A plan is complete and checked before the model is touched, so a refused patch leaves it as it was.
"""

from __future__ import annotations

import copy
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .config import VariantConfig
from .dispatch import CHILD, FEED_FORWARD, NAME, PREVIOUS, PatchedForward, PatchedLinear
from .hosts import (
    FeedForward,
    Host,
    HostCode,
    dispatching_modules,
    find_feed_forwards,
    find_hosts,
    hands_on_kwargs,
    is_linear_map,
    refusal,
)
from .registry import build, config_from_dict, get_config_class, get_info
from .variant import EfficientFeedForward, EfficientLayer

Layers = str | int | Iterable[int] | None
Choice = str | VariantConfig | Mapping[str, Any]
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # what a variant may compute in


@dataclass(frozen=True)
class Swap:
    """One layer's attention or feed-forward, and the module that will serve it."""

    host: Host | FeedForward
    variant: EfficientLayer


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
    else:
        numbers = list(layers) if isinstance(layers, Iterable) else [layers]
    numbers = [n.__index__() if hasattr(n, "__index__") and not isinstance(n, bool) else n for n in numbers]
    for number in numbers:
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < count:
            raise ValueError(f"layer {number!r} does not exist: the model has attention layers 0 to {count - 1}.")
    if len(set(numbers)) != len(numbers) or not numbers:
        raise ValueError(f"layers = {layers!r}: name each layer once, and at least one.")
    return sorted(numbers)


def make_config(choice: Choice, hyper: Mapping[str, Any] | None = None) -> VariantConfig:
    """A config from a registry name and hyper-parameters, from a config, or from its dict."""
    hyper = dict(hyper or {})
    if isinstance(choice, str):
        config = get_config_class(choice).from_kwargs(**hyper)
    elif isinstance(choice, Mapping):
        config = config_from_dict({**choice, **hyper})
    elif not isinstance(choice, VariantConfig):
        raise ValueError(
            f"a variant is given by name, config or dict, not by {type(choice).__name__}; see available_variants()."
        )
    elif hyper:
        raise ValueError(
            f"hyper-parameters {sorted(hyper)} beside a ready {type(choice).__name__}: put them into the config."
        )
    else:
        config = choice
    return replace(copy.deepcopy(config))  # the model's own, checked as it is now


def plan(model: PreTrainedModel, choices: Mapping[Any, Choice | list[Choice]]) -> tuple[list[Swap], dict[str, Any]]:
    """
    The swaps that a mapping layers -> variant (or a list of one per kind) asks for, modules built, and the mapping in its
    saved form.

    Raises:
        ValueError: anything that cannot be served, before the model is changed.
    """
    attention = {host.shape.layer: host for host in find_hosts(model)}
    hosts: dict[str, Mapping[int, Host | FeedForward]] = {"attention": attention}
    chosen: dict[tuple[str, int], VariantConfig] = {}
    entries: list[tuple[list[int], VariantConfig]] = []
    for layers, choice in (
        (k, c) for k, value in choices.items() for c in (value if isinstance(value, list) else [value])
    ):
        config = make_config(choice)
        kind = get_info(config.name).kind
        if is_patched(model, kind):
            raise ValueError(
                f"the {kind} of {type(model).__name__} is patched already; call unpatch_model(model) first."
            )
        if kind not in hosts:
            hosts[kind] = find_feed_forwards(model)
        numbers = list(hosts[kind]) if layers is None else parse_layers(layers, len(attention))
        for number in numbers:
            if number not in hosts[kind]:
                raise ValueError(
                    f"layer {number} has no {kind} of linear maps; it could be one of {list(hosts[kind])}."
                )
            if (kind, number) in chosen:
                raise ValueError(f"layer {number} is given two variants; name each layer once.")
        config = get_info(config.name).module_class.resolve(config, hosts[kind][numbers[0]].shape)
        chosen.update(((kind, number), config) for number in numbers)
        entries.append((numbers, config))
    if not chosen:
        raise ValueError("no layer was named; give a variant for at least one.")
    swaps = []
    for kind, places in hosts.items():
        for index, number in enumerate(sorted(n for k, n in chosen if k == kind)):
            host = replace(places[number], shape=replace(places[number].shape, patched_index=index))
            swaps.append(Swap(host, _build(model, chosen[kind, number], host)))
    for numbers, config in entries:
        module_class = get_info(config.name).module_class
        modules = [s.variant for s in swaps if s.host.shape.layer in numbers and s.variant.kind == module_class.kind]
        module_class.tie_parameters(modules)
    return swaps, saved_form((_spell(numbers), config.to_dict()) for numbers, config in entries)


def saved_form(entries: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The mapping of these entries; where the same layers have an attention and a feed-forward variant, a list of both."""
    mapping: dict[str, Any] = {}
    for layers, saved in entries:
        mapping[layers] = saved if layers not in mapping else [*as_list(mapping[layers]), *as_list(saved)]
    return mapping


def layer_names(model: nn.Module) -> dict[str, str]:
    """Numbers of attention layers -> their dotted name in the model, with * for a number in it."""
    layers: dict[str, list[int]] = {}
    for host in find_hosts(model):
        layers.setdefault(re.sub(r"\.\d+(?=\.)", ".*", host.name), []).append(host.shape.layer)
    return {_spell(numbers): name for name, numbers in layers.items()}


def as_list(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def _build(model: PreTrainedModel, config: VariantConfig, host: Host | FeedForward) -> EfficientLayer:
    layer = f"{get_info(config.name).kind} layer {host.shape.layer}"
    if isinstance(host, Host) and (reason := refusal(host)) is not None:
        raise ValueError(
            f"{layer} ({host.name}, {type(host.module).__name__}) {reason}; no variant can honour that. "
            "Leave the layer out with `layers=`, or use another model."
        )
    try:
        variant = build(config, host.shape)
    except ValueError as error:
        raise ValueError(f"{layer} ({host.name}): {error}") from error
    if getattr(variant, "needs_hidden", False) and not hands_on_kwargs(type(host.module)):
        raise ValueError(
            f"{layer} ({host.name}) does not hand its keyword arguments to the attention function, so its input cannot reach "
            f"{config.name!r}, which reads it."
        )
    parts = _exchanged(host)
    weights = [x for part in parts for x in (*part.parameters(), *part.buffers())]
    if weights:
        hooked = any(hasattr(module, "_hf_hook") for part in parts for module in part.modules())
        if weights[0].device.type == "meta" and hooked:
            raise ValueError(
                f"{layer} is offloaded. Patch the model on one device and save it; the patched checkpoint can be loaded with a "
                "device_map."
            )
        variant = variant.to(**placing(weights, model))
    if isinstance(host, FeedForward):
        variant.take_over(host.maps)
    return variant.train(host.module.training)


def placing(weights: Sequence[Tensor], model: PreTrainedModel) -> dict[str, Any]:
    """Device and dtype of what is added to a layer of these weights; quantised layers may have no float."""
    dtype = next((x.dtype for x in weights if x.dtype in FLOATS), model.dtype)
    return {"device": next((x.device for x in weights if x.device.type == "meta"), weights[0].device), "dtype": dtype}


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
    for swap in swaps:
        for module in _exchanged(swap.host):
            _check_instance_forward(swap.host, module)
    if not is_patched(model):
        _dispatch(model, model if outer is None else outer)
    for swap in swaps:
        swap.host.module.add_module(CHILD, swap.variant)
        if isinstance(swap.host, FeedForward):
            setattr(swap.host.attention, FEED_FORWARD, (swap.host.module, exchange_maps))
        else:
            _exchange(swap.host.module)
    if not LOADING.get():
        exchange_maps(swap.host.module for swap in swaps)


LOADING = ContextVar("LOADING", default=False)


@contextmanager
def loading() -> Iterator[None]:
    """
    Inside the block linear maps of patched feed-forwards stay what they are: a quantiser, which exchanges them between a
    model's making and its loading, passes over classes that it does not know. `exchange_maps` follows.
    """
    token = LOADING.set(True)
    try:
        yield
    finally:
        LOADING.reset(token)


def exchange_maps(owners: Iterable[nn.Module]) -> None:
    """
    Has every linear map of patched feed-forwards ask its variant; other modules are passed over.

    Raises:
        ValueError: a quantiser has put something there that is no linear map of PyTorch.
    """
    for owner in list(owners):
        variant = getattr(owner, CHILD, None)
        for path in variant.host.maps if isinstance(variant, EfficientFeedForward) else ():
            module = owner.get_submodule(path)
            if isinstance(module, PatchedLinear) or hasattr(module, "base_layer"):  # an adapter, which speaks up itself
                continue
            try:
                if not is_linear_map(type(module)):
                    raise TypeError
                _exchange(module)
            except TypeError as error:  # also of a class that has no room for another
                raise ValueError(
                    f"a patched feed-forward cannot be served by a {type(module).__name__}, as {path!r} is; of quantisers, "
                    "bitsandbytes' maps can."
                ) from error
            setattr(module, FEED_FORWARD, (owner, path))


def _exchange(module: nn.Module) -> None:
    module.__class__ = efficient_class(type(module))
    _rebind_forward(module)


def _exchanged(host: Host | FeedForward) -> list[nn.Module]:
    """The modules that change their class."""
    return [host.module] if isinstance(host, Host) else list(host.maps.values())


def _dispatch(model: PreTrainedModel, outer: nn.Module) -> None:
    """Has all attention of the model, dense or not, go through this library's function."""
    modules = dispatching_modules(model)
    _own_configs(outer)
    previous = {name: module.config._attn_implementation for name, module in modules.items()}
    parts = {name: part for name, part in model.named_modules() if isinstance(part, PreTrainedModel)}
    of_parts = {name: part.config._attn_implementation for name, part in parts.items()}
    able = model._can_set_attn_implementation()  # not where the source of its class cannot be read, as in a notebook
    if able:
        model.set_attn_implementation(NAME)
    for part in parts.values():  # Transformers 5.17 passes over copies of the model's config and marks others
        left = type(part.config) is type(model.config) or not able
        if left and part.config._attn_implementation != NAME and part._can_set_attn_implementation():
            part.set_attn_implementation(NAME)
        vars(part.config).pop("_attn_was_changed", None)
    stayed = [name for name, module in modules.items() if module.config._attn_implementation != NAME]
    if stayed:
        _set_implementations(parts, of_parts)
        _set_implementations(modules, previous)
        raise ValueError(
            f"{type(model).__name__} keeps its own attention implementation in {stayed[0]}; it cannot be patched."
        )
    for name, module in modules.items():
        setattr(module, PREVIOUS, previous[name])


def dispatch_again(model: PreTrainedModel) -> None:
    """Attention was given other implementations: dense layers run those from now on, through this library's function."""
    modules = dispatching_modules(model).values()
    for module in modules:
        if module.config._attn_implementation != NAME:
            setattr(module, PREVIOUS, module.config._attn_implementation)
    for module in (model, *modules):
        module.config._attn_implementation_internal = NAME


def is_patched(model: nn.Module, kind: str | None = None) -> bool:
    """Whether the model has a variant (of a kind) in any of its layers."""
    variants = [module for module in model.modules() if isinstance(module, EfficientLayer)]
    return any(kind in (None, variant.kind) for variant in variants)


def revert_layers(model: PreTrainedModel, kind: str | None = None) -> None:
    """Takes every variant (of a kind) out again; without any the model is what it was, bit for bit."""
    for module in list(model.modules()):
        if hasattr(module, CHILD) and kind in (None, getattr(module, CHILD).kind):
            delattr(module, CHILD)
        patched = PatchedForward if isinstance(module, PatchedForward) else PatchedLinear
        if isinstance(module, patched) and kind in (None, "attention" if patched is PatchedForward else "feed-forward"):
            module.__class__ = module.dense_class
            _rebind_forward(module)
        if kind in (None, "feed-forward"):
            module.__dict__.pop(FEED_FORWARD, None)
    if is_patched(model):
        return
    modules = {name: module for name, module in dispatching_modules(model).items() if hasattr(module, PREVIOUS)}
    previous = {name: getattr(module, PREVIOUS) for name, module in modules.items()}
    for module in modules.values():
        delattr(module, PREVIOUS)
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


def _check_instance_forward(host: Host | FeedForward, module: nn.Module) -> None:
    """A forward on the instance bypasses the class; Accelerate's hooks are known, anything else is refused."""
    attributes = vars(module)
    if "forward" in attributes and "_old_forward" not in attributes and not _is_bound_forward(module):
        raise ValueError(
            f"layer {host.shape.layer} ({host.name}) has a forward of its own set on the instance, which a patch "
            "would not reach. Remove it first."
        )


def _is_bound_forward(module: nn.Module) -> bool:
    """Whether the instance holds the forward of its own class, as Accelerate leaves it behind with a hook it takes off."""
    forward = vars(module).get("forward")
    own = [vars(cls).get("forward") for cls in (PatchedForward, PatchedLinear, *type(module).__mro__)]
    return isinstance(forward, types.MethodType) and forward.__self__ is module and forward.__func__ in own


def _rebind_forward(module: nn.Module) -> None:
    """Accelerate's hook calls the forward that it found on the instance: let it find the class's present one."""
    if "_old_forward" in vars(module):
        module._old_forward = types.MethodType(type(module).forward, module)
    elif _is_bound_forward(module):
        del module.forward


@cache
def efficient_class(dense_class: type) -> type:
    """
    `EfficientLlamaAttention`, a subclass of `LlamaAttention` that goes through `PatchedForward`; `EfficientLinear` alike
    through `PatchedLinear`.
    """
    if issubclass(dense_class, (PatchedForward, PatchedLinear)):
        raise ValueError("this layer is patched already; call unpatch_model(model) first.")
    members = {"dense_class": dense_class, "__module__": __name__, "__reduce_ex__": _reduce}
    if is_linear_map(dense_class):
        mixin, members["__doc__"] = PatchedLinear, f"{dense_class.__name__} of a feed-forward that a variant serves."
    else:
        mixin, members["host_code"] = PatchedForward, HostCode.of(dense_class)
        members["__doc__"] = f"{dense_class.__name__} whose attention is the variant in its child `{CHILD}`."
    return type(f"Efficient{dense_class.__name__}", (mixin, dense_class), members)


def _reduce(self, protocol):
    """Pickled and copied by the class it was made from, so that another process can make it again."""
    return _remake, (type(self).dense_class,), self.__dict__.copy()


def _remake(dense_class: type) -> nn.Module:
    cls = efficient_class(dense_class)
    return cls.__new__(cls)
