"""The public calls that change a model: `patch_model`, `unpatch_model`, `patched`, and `describe`, which looks at one."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from .config import VariantConfig
from .dispatch import CHILD
from .hosts import base_model, find_hosts
from .modeling import adopt, release
from .swapping import Layers, is_patched, make_config
from .variant import EfficientLayer

Model = TypeVar("Model", bound=nn.Module)

KINDS = ("attention", "feed-forward")
STRATEGIES: dict[str, Callable[..., Mapping[Any, Any]]] = {}  # name -> (model, **keywords) -> a mapping to patch with


def patch_model(
    model: Model,
    variant: str | VariantConfig | Mapping[Any, Any],
    *,
    layers: Layers = None,
    **hyper: Any,
) -> Model:
    """
    Swaps the self-attention of a pretrained Transformers model for an efficient variant, or its feed-forwards for `moe`, in
    place; returns the model. A model can have one of each, from one call or from two.

    variant: a registry name (`available_variants()`), with hyper-parameters as keywords; a config; or a mapping from layers
        to names, configs or config dicts, such as {"0-5": "sliding_window", "6-11": LinformerConfig(rank=64)}, or to lists
        of an attention and a feed-forward variant; or "auto", with the keywords `data` and `budget`, and others of
        `selection.select_variants` if wished: what that finds.
    layers: attention layers counted from 0, as a list or a range string ("2-5", "8-"); None for all. Layers that are not
        named, and all cross-attention, stay as they are. A feed-forward has the number of the attention before it.

    Pretrained weights keep their names and places; what a variant adds lies under `<layer>.efficient_attn.`. The model's
    config records the patch, so `save_pretrained`, `push_to_hub` and the Auto classes bring it back.

    Raises:
        ValueError: an unknown variant, hyper-parameter or layer, a value out of range, a model that is patched already or
            cannot be, or a combination that cannot work. The model is unchanged then.
    """
    base = base_model(model)
    _refuse_distributed(model)
    if isinstance(variant, Mapping) and "variant" not in variant:
        if layers is not None or hyper:
            raise ValueError("a mapping names its own layers and hyper-parameters; leave out `layers` and keywords.")
        choices: Mapping[Any, Any] = variant
    elif isinstance(variant, str) and variant in STRATEGIES:
        choices = STRATEGIES[variant](model, layers=layers, **hyper)
        if not choices:
            raise ValueError(
                f"{variant!r} found nothing better than dense attention within the budget; the model stays as it is."
            )
    else:
        choices = {as_key(layers): make_config(variant, hyper)}
    if base.base_model is base and (whole := _whole_of(base)) is not None:
        raise ValueError(
            f"this {type(base).__name__} is part of a {type(whole).__name__}, which would be saved as a dense model: patch the "
            f"{type(whole).__name__} and choose among its layers with `layers=`, or patch a part before it is built in."
        )
    adopt(base, choices, model)
    return model


def _refuse_distributed(model: nn.Module) -> None:
    """Wrappers that share out parameters know those that were there, and put classes of their own into the model."""
    names = {cls.__name__ for module in model.modules() for cls in type(module).__mro__}
    found = names & {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}
    if found:
        raise ValueError(
            f"the model is distributed already ({', '.join(found)}): patch, and unpatch, before it is wrapped."
        )


def _whole_of(base: PreTrainedModel) -> PreTrainedModel | None:
    """A Transformers model that `base` is a part of. A module does not know who holds it, so the garbage collector is asked."""
    if not _holders(base):
        return None
    gc.collect()  # one that nobody uses any more does not count
    above = [base]
    while above:
        found = _holders(above.pop())
        whole = next((module for module in found if isinstance(module, PreTrainedModel)), None)
        if whole is not None:
            return whole
        above += found
    return None


def _holders(module: nn.Module) -> list[nn.Module]:
    """The modules of which `module` is a child."""
    tables = [x for x in gc.get_referrers(module) if isinstance(x, dict) and _holds_children(x)]
    if not tables:
        return []
    owners = gc.get_referrers(*tables)  # modules, or their attributes
    owners += gc.get_referrers(*(x for x in owners if isinstance(x, dict) and "_modules" in x))
    return [x for x in owners if isinstance(x, nn.Module) and any(x._modules is table for table in tables)]


def _holds_children(x: dict) -> bool:
    return all(part is None or isinstance(part, nn.Module) for part in x.values())


def unpatch_model(model: Model) -> Model:
    """
    Gives every patched layer its dense attention back, bit for bit, in place; returns the model. What the variants had
    learned is dropped with them.

    Raises:
        ValueError: the model is not patched.
    """
    base = base_model(model)
    _refuse_distributed(model)
    if not is_patched(base):
        raise ValueError(f"{type(base).__name__} is not patched.")
    release(base)
    return model


@contextmanager
def patched(model: Model, variant: Any, *, layers: Layers = None, **hyper: Any) -> Iterator[Model]:
    """`patch_model` for the length of a `with` block; what the model was patched with before stays."""
    base = base_model(model)
    before = [kind for kind in KINDS if is_patched(base, kind)]
    patch_model(model, variant, layers=layers, **hyper)
    try:
        yield model
    finally:
        for kind in KINDS:
            if kind not in before and is_patched(base, kind):
                release(base, kind)


@dataclass(frozen=True)
class LayerDescription:
    """
    The attention of a layer, or its feed-forward where that is patched: `variant` is None where it is dense;
    `added_parameters` counts what the variant brought, without what an earlier layer shares with it.
    """

    layer: int
    name: str
    variant: str | None
    hyper_parameters: dict[str, Any]
    added_parameters: int

    @classmethod
    def of(cls, layer: int, name: str, variant: EfficientLayer | None, counted: set[nn.Parameter]) -> LayerDescription:
        """`counted` holds the parameters of earlier layers, and gets those of this one."""
        settings = {} if variant is None else variant.config.to_dict()
        named = [] if variant is None else variant.named_parameters()
        own = {
            p for name, p in named if not name.startswith("original_module.")
        } - counted  # of which PEFT trains a copy
        counted |= own
        added = sum(p.numel() for p in own)
        return cls(layer, name, settings.pop("variant", None), settings, added)


class Description(list):
    """A list of `LayerDescription`, one per attention layer and patched feed-forward; printed as a table."""

    def __str__(self) -> str:
        rows = [("layer", "module", "variant", "added", "hyper-parameters")]
        for row in self:
            hyper = ", ".join(f"{k}={v}" for k, v in row.hyper_parameters.items())
            rows.append((str(row.layer), row.name, row.variant or "dense", f"{row.added_parameters:,}", hyper))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[4]]) for row in rows)


def describe(model: nn.Module) -> Description:
    """What every attention layer of a model runs, and every patched feed-forward; works on dense models, too."""
    base, counted = base_model(model), set()
    hosts = [(host.shape.layer, host.name, getattr(host.module, CHILD, None)) for host in find_hosts(base)]
    rows = [LayerDescription.of(*host, counted) for host in hosts]
    for name, module in base.named_modules():
        variant = getattr(module, CHILD, None)
        if getattr(variant, "kind", None) == "feed-forward":
            rows.append(LayerDescription.of(variant.host.layer, name, variant, counted))
    return Description(sorted(rows, key=lambda row: row.layer))


def as_key(layers: Layers) -> Any:
    """A hashable form of `layers` for a mapping of one entry."""
    return tuple(layers) if isinstance(layers, Iterable) and not isinstance(layers, str) else layers
