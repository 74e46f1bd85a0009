"""
How Transformers' attention modules look: the one place that knows.

A host is a self-attention module that hands its heads to `AttentionInterface`. The rule that finds hosts needs no table of
architectures: a module whose `forward` names `ALL_ATTENTION_FUNCTIONS`, Transformers' table of attention functions.

The feed-forward of a layer is found by shape: of the linear maps that stand beside a host in its layer, one leads from an
inner width back to the hidden size, and all others lead into it.
"""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .variant import FeedForwardShape, HostShape

CROSS_ATTENTION = re.compile(r"cross|encoder_attn|EncDec|multihead_attn", re.IGNORECASE)
OTHER_SOURCES = (
    "key_value_states",
    "encoder_hidden_states",
    "cross_attention_states",
    "context",
    "context_hidden_states",
)
QUERY_NAMES = ("query", "queries", "q", "query_tensor")
KEY_NAMES = ("key", "keys", "k", "key_tensor")
CAUSAL_FACTORIES = {"create_causal_mask", "create_sliding_window_causal_mask", "create_chunked_causal_mask"}
BIDIRECTIONAL_FACTORIES = {"create_bidirectional_mask", "create_bidirectional_sliding_window_mask"}
POSITION_TABLE_WORDS = ("position", "wpe")


@dataclass(frozen=True)
class Host:
    """One self-attention module: its dotted name, the module, and what a variant has to know of it."""

    name: str
    module: nn.Module
    shape: HostShape


def base_model(model: nn.Module) -> PreTrainedModel:
    """
    The Transformers model in `model`: itself, or the one that a wrapper (PEFT, sentence_transformers, ...) holds.

    Raises:
        ValueError: there is none, or more than one side by side.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"a Transformers model is needed, not {model!r:.60} ({type(model).__name__}): load it first, as in "
            "AutoModelForCausalLM.from_pretrained(...)."
        )
    if isinstance(model, PreTrainedModel):
        return model
    found: list[tuple[str, PreTrainedModel]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(outer + ".") for outer, _ in found)
        if isinstance(module, PreTrainedModel) and not inside:
            found.append((name, module))
    if len(found) == 1:
        return found[0][1]
    inventory = ", ".join(name for name, _ in found) or "none"
    raise ValueError(
        f"{type(model).__name__} must be, or contain exactly one, Transformers PreTrainedModel; it contains: {inventory}. "
        "Pass that model itself."
    )


def dispatching_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module that calls `AttentionInterface`, self- and cross-attention, in the model's order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "config", None), PreTrainedConfig) and _dispatches(_own_class(module))
    }


@cache
def _dispatches(cls: type) -> bool:
    """Whether the forward of a class, or one that it calls by super(), names the table of attention functions."""
    for base in cls.__mro__:
        names = names_in(vars(base).get("forward"))
        if "ALL_ATTENTION_FUNCTIONS" in names:
            return True
        if "forward" in vars(base) and "super" not in names:
            return False
    return False


def names_in(function: Any) -> tuple[str, ...]:
    """The global names and attributes that a function's code mentions, decorators taken off."""
    return getattr(getattr(inspect.unwrap(function), "__code__", None), "co_names", ()) if function else ()


def find_hosts(model: nn.Module) -> list[Host]:
    """
    The model's self-attention layers, counted from 0 in order.

    Raises:
        ValueError: there is none, with the reason.
    """
    modules = {
        name: module
        for name, module in dispatching_modules(model).items()
        if not CROSS_ATTENTION.search(f"{name}.{_own_class(module).__name__}")
        and not getattr(module, "is_cross_attention", False)
    }
    if not modules:
        raise ValueError(
            f"{type(model).__name__} has no self-attention that Transformers dispatches through AttentionInterface, so there "
            "is nothing to patch. Models with attention of their own (BLOOM, DeBERTa, ...) are not supported."
        )
    limit = learned_positions(model)
    return [
        Host(name, module, _shape(model, name, module, index, len(modules), limit))
        for index, (name, module) in enumerate(modules.items())
    ]


def _own_class(module: nn.Module) -> type:
    return getattr(type(module), "dense_class", type(module))


def _shape(model: nn.Module, name: str, module: nn.Module, index: int, count: int, limit: int | None) -> HostShape:
    config = module.config
    heads = _first_int(module, "num_heads", "num_attention_heads", "n_heads", "n_head", "num_query_heads")
    heads = heads or _first_int(config, "num_attention_heads", "encoder_attention_heads")
    groups = _first_int(module, "num_key_value_groups")
    kv_heads = _first_int(module, "num_key_value_heads", "num_kv_heads")
    if kv_heads is None:
        kv_heads = heads // groups if heads and groups else heads
    width = _first_int(module, "embed_dim", "hidden_size", "all_head_size", "inner_dim", "dim")
    width = width or _first_int(config, "hidden_size", "d_model")
    head_dim = _first_int(module, "qk_head_dim", "head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
    head_dim = head_dim or _first_int(config, "head_dim") or (width // heads if width and heads else 0)
    return HostShape(
        num_heads=heads or 0,
        num_kv_heads=kv_heads or 0,
        head_dim=head_dim,
        hidden_size=_first_int(config, "hidden_size", "d_model") or width or 0,
        causal=_is_causal(model, name, module),
        layer=index,
        num_layers=count,
        max_positions=limit,
    )


def _is_causal(model: nn.Module, name: str, module: nn.Module) -> bool:
    """
    The direction of a layer: that of the mask which the nearest module around it with the same config makes (CLIP's text
    layers are told so call by call), else what the layer says of itself. A config may ask a decoder to read both ways.
    """
    causal = bool(getattr(module, "is_causal", False) or getattr(module, "is_decoder", False))
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        owner = model.get_submodule(".".join(parts[:depth]))
        made = set(names_in(getattr(_own_class(owner), "forward", None)))
        ways = {bool(made & CAUSAL_FACTORIES), bool(made & BIDIRECTIONAL_FACTORIES)}
        if getattr(owner, "config", None) is module.config and len(ways) == 2:
            causal = bool(made & CAUSAL_FACTORIES)
            break
    return causal and getattr(module.config, "is_causal", True) is not False


def _first_int(owner: Any, *names: str) -> int | None:
    for name in names:
        value = getattr(owner, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def refusal(host: Host) -> str | None:
    """Why no variant can serve this layer, or None: terms of its softmax that a variant would drop."""
    module = host.module
    unknown = [name for name in ("num_heads", "num_kv_heads", "head_dim") if not getattr(host.shape, name)]
    if unknown:
        return f"does not say its {' and '.join(unknown)}"
    parameters = inspect.signature(_own_class(module).forward).parameters
    other = [
        name for name in OTHER_SOURCES if name in parameters and parameters[name].default is inspect.Parameter.empty
    ]
    if other:
        return f"attends to tokens of another sequence beside its own ({other[0]})"
    if getattr(module, "attn_logit_softcapping", None) is not None:
        return "caps its logits (attn_logit_softcapping)"
    if getattr(module, "sinks", None) is not None:
        return "has learned sink logits (sinks)"
    if hasattr(module, "relative_attention_bias") or getattr(module, "has_relative_attention_bias", False):
        return "adds a relative position bias to its logits"
    if host.shape.causal and not hands_on_kwargs(_own_class(module)):
        return "does not hand its keyword arguments to the attention function, so a decoder state cannot reach it"
    value_dim = getattr(module, "v_head_dim", None)
    if isinstance(value_dim, int) and value_dim != host.shape.head_dim:
        return f"has values of size {value_dim} beside queries of size {host.shape.head_dim}"
    return None


@dataclass(frozen=True)
class HostCode:
    """
    What the source of an attention class says, read once per class: `parameters` of its forward without `self`; `hands_on`,
    whether its keyword arguments reach the attention function; `own_terms`, what its eager attention takes beyond the
    usual, which are terms of its softmax.
    """

    parameters: tuple[str, ...]
    hands_on: bool
    own_terms: tuple[str, ...]

    @staticmethod
    def of(cls: type) -> HostCode:
        eager = getattr(sys.modules[cls.__module__], "eager_attention_forward", None)
        usual = {"scaling", "dropout", "sliding_window", "kwargs"}
        taken = list(inspect.signature(eager).parameters)[5:] if eager else []
        parameters = tuple(inspect.signature(cls.forward).parameters)[1:]
        return HostCode(parameters, hands_on_kwargs(cls), tuple(name for name in taken if name not in usual))

    def arguments(self, args: tuple, kwargs: dict) -> dict[str, Any]:
        """What the named parameters of a call of forward are given, without those that are None."""
        given = dict(zip(self.parameters, args, strict=False))
        given.update({name: kwargs[name] for name in self.parameters if name in kwargs})
        return {name: value for name, value in given.items() if value is not None}


def hands_on_kwargs(cls: type) -> bool:
    """Whether the forward of an attention class gives its keyword arguments to the attention function."""
    if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(cls.forward).parameters.values()):
        return False
    try:
        source = inspect.getsource(inspect.unwrap(cls.forward))
    except (OSError, TypeError):
        return True  # no source to read: the check after every call still finds a layer that stayed dense
    return source.count("**kwargs") >= 2


def other_source(given: dict[str, Any]) -> str | None:
    """The argument by which an attention module is given keys that are not made of its queries' tokens, or None."""
    query = next((given[name] for name in QUERY_NAMES if name in given), None)
    key = next((name for name in KEY_NAMES if name in given), None)
    if query is not None and key is not None and given[key] is not query:
        return key
    return next((name for name in OTHER_SOURCES if name in given), None)


def cache_argument(args: tuple, kwargs: dict) -> Cache | None:
    """The cache that an attention module was called with, whatever its parameter is called."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)


def hidden_input(args: tuple, kwargs: dict) -> Any:
    """The hidden states (B, N, E) that an attention module was called with."""
    if args:
        return args[0]
    return next((kwargs[n] for n in ("hidden_states", "hidden_state", "query", "x") if n in kwargs), None)


# Feed-forwards


@dataclass(frozen=True)
class FeedForward:
    """
    The feed-forward of one layer: the smallest module around its linear maps with its dotted name, the maps by their paths
    in that module, the way back last, and the self-attention of the same layer, which runs before it.
    """

    name: str
    module: nn.Module
    maps: dict[str, nn.Module]
    attention: nn.Module
    shape: FeedForwardShape


def find_feed_forwards(model: nn.Module) -> dict[int, FeedForward]:
    """
    The feed-forwards of the model by the number of the attention layer they belong to; layers without one are left out.

    Raises:
        ValueError: no layer has one, or there is no attention that Transformers dispatches.
    """
    hosts, found = find_hosts(model), {}
    attending = list(dispatching_modules(model))
    for host in hosts:
        feed_forward = _feed_forward(model, host, hosts, attending)
        if feed_forward is not None:
            found[host.shape.layer] = feed_forward
    if not found:
        raise ValueError(
            f"no layer of {type(model).__name__} has a feed-forward of linear maps that lead from the hidden size to an inner "
            "width and back; one that is a mixture of experts already, or carries adapters, is not served."
        )
    return found


def _feed_forward(model: nn.Module, host: Host, hosts: list[Host], attending: list[str]) -> FeedForward | None:
    """Climbs from the attention to the module that holds a feed-forward as well, no further than its layer."""
    parts = host.name.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        layer = ".".join(parts[:depth])
        if isinstance(model.get_submodule(layer), PreTrainedModel) or any(
            other.name != host.name and other.name.startswith(layer + ".") for other in hosts
        ):
            return None
        beside = {
            f"{layer}.{name}": child
            for name, child in model.get_submodule(layer).named_children()
            if not any(f"{other}.".startswith(f"{layer}.{name}.") for other in attending)
        }
        maps = {
            path: module
            for name, child in beside.items()
            for path, module in child.named_modules(prefix=name)
            if _widths(module) is not None
        }
        order = _into_and_back(maps, host.shape.hidden_size)
        if order is None:
            continue
        owner = _common_owner(order)
        paths = [path[len(owner) + 1 :] for path in order]
        inner = _widths(maps[order[-1]])[0]
        own = {id(p) for module in maps.values() for p in module.parameters()}
        others = [p for child in beside.values() for p in child.parameters() if id(p) not in own]
        shape = FeedForwardShape(
            hidden_size=host.shape.hidden_size,
            inner_size=inner,
            maps=tuple(paths),
            layer=host.shape.layer,
            num_layers=len(hosts),
            normed=inner != host.shape.hidden_size and any(inner in p.shape for p in others),
        )
        named = dict(zip(paths, (maps[path] for path in order), strict=True))
        return FeedForward(owner, model.get_submodule(owner), named, host.module, shape)
    return None


def is_linear_map(cls: type) -> bool:
    """Whether modules of a class are the linear maps that a feed-forward is made of."""
    return issubclass(cls, (nn.Linear, Conv1D))


def _widths(module: nn.Module) -> tuple[int, int] | None:
    """Features in and out of a linear map."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return (module.nx, module.nf) if isinstance(module, Conv1D) else None


def _into_and_back(maps: dict[str, nn.Module], width: int) -> list[str] | None:
    """The names of linear maps, the one that leads back last, if they are a feed-forward on `width` features and no more."""
    widths = {name: _widths(module) for name, module in maps.items()}
    back = [name for name, (begin, end) in widths.items() if end == width != begin]
    if not back and set(widths.values()) == {(width, width)}:
        back = [list(widths)[-1]]
    into = [name for name in widths if name not in back]
    if len(back) != 1 or not into:
        return None
    inner = widths[back[0]][0]
    fits = all(widths[name][0] == width and widths[name][1] % inner == 0 for name in into)
    return [*into, back[0]] if fits else None


def _common_owner(names: list[str]) -> str:
    parts = [name.split(".")[:-1] for name in names]
    shared = 0
    while all(len(p) > shared and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    return ".".join(parts[0][:shared])


# Learned absolute positions


@dataclass(frozen=True)
class PositionTable:
    """An embedding of learned positions; its first `offset` rows stand for no position (RoBERTa, OPT, BART)."""

    name: str
    module: nn.Embedding
    offset: int


def position_tables(model: nn.Module) -> list[PositionTable]:
    """
    Every table of learned absolute positions of tokens in the model: not of pictures or sounds, not of places on a page
    (LayoutLM's x_position_embeddings), and not of sinusoids, which Transformers computes anew.
    """
    tables, other = [], []
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and module.main_input_name not in ("input_ids", "decoder_input_ids"):
            other.append(f"{name}." if name else "")
        leaf = name.rsplit(".", 1)[-1]
        apart = "relative" in name or leaf[:2] in ("x_", "y_", "h_", "w_") or "Sinusoidal" in type(module).__name__
        apart |= any(name.startswith(prefix) for prefix in other)
        if isinstance(module, nn.Embedding) and not apart and any(w in leaf for w in POSITION_TABLE_WORDS):
            padding = module.padding_idx
            offset = getattr(module, "offset", padding + 1 if padding is not None else 0)
            tables.append(PositionTable(name, module, offset))
    return tables


def learned_positions(model: nn.Module) -> int | None:
    """How many tokens the learned positions reach, or None where the model has none."""
    reach = [table.module.num_embeddings - table.offset for table in position_tables(model)]
    return min(reach) if reach else None
