"""Which variants exist: name -> config class and module class. Third parties register the same way."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .config import VariantConfig
from .variant import EfficientLayer

FAMILIES = (
    "exact",
    "fixed patterns",
    "learnable patterns",
    "low rank",
    "kernels",
    "recurrence",
    "down-sampling",
    "sparse models",
)


@dataclass(frozen=True)
class VariantInfo:
    """One row of the registry. `paper` is "Authors year, arXiv id"; `also`: what others call the mechanism."""

    name: str
    family: str
    summary: str
    paper: str
    config_class: type[VariantConfig]
    module_class: type[EfficientLayer]
    also: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """What of a layer it replaces: "attention" or "feed-forward"."""
        return self.module_class.kind


_REGISTRY: dict[str, VariantInfo] = {}


def register_variant(
    name: str, *, family: str, summary: str, paper: str, also: tuple[str, ...] = ()
) -> Callable[[type], type]:
    """
    Class decorator for an `EfficientAttention` (or `EfficientFeedForward`) whose `config_class` holds its hyper-parameters.

    Raises:
        ValueError: the name is taken or not a lower-case identifier, the family is not one of `FAMILIES`, or the config class
            is another variant's.
        TypeError: the class or its config class has the wrong base.
    """
    if not name.isidentifier() or name != name.lower():
        raise ValueError(f"variant name {name!r}: use a lower-case identifier such as 'sliding_window'.")
    if name in _REGISTRY:
        raise ValueError(f"variant {name!r} is registered already, by {_REGISTRY[name].module_class.__module__}.")
    if family not in FAMILIES:
        raise ValueError(f"variant {name!r}: family {family!r} is not one of {', '.join(FAMILIES)}.")

    def decorate(module_class: type) -> type:
        config_class = getattr(module_class, "config_class", None)
        if not issubclass(module_class, EfficientLayer):
            raise TypeError(f"{module_class.__name__} must derive from EfficientAttention or EfficientFeedForward.")
        if not (isinstance(config_class, type) and issubclass(config_class, VariantConfig)):
            raise TypeError(f"{module_class.__name__}.config_class must derive from VariantConfig.")
        taken = next((info.name for info in _REGISTRY.values() if info.config_class is config_class), None)
        if taken is not None:  # which would be built as this one
            raise ValueError(
                f"variant {name!r}: {config_class.__name__} is the config of {taken!r}; give {module_class.__name__} a "
                "`config_class` of its own, which may derive from it."
            )
        config_class.name = name
        _REGISTRY[name] = VariantInfo(name, family, summary, paper, config_class, module_class, also)
        return module_class

    return decorate


def unregister_variant(name: str) -> None:
    """Takes a third party's variant out of the registry."""
    get_info(name)
    del _REGISTRY[name]


def available_variants(kind: str | None = None) -> dict[str, VariantInfo]:
    """
    Every registered variant, or those of a kind, "attention" or "feed-forward", in the survey's order of families: name ->
    `VariantInfo`.
    """
    if kind not in (None, "attention", "feed-forward"):
        raise ValueError(f"kind {kind!r}: choose 'attention' or 'feed-forward', or None for both.")
    wanted = [item for item in _REGISTRY.items() if kind in (None, item[1].kind)]
    return dict(sorted(wanted, key=lambda item: FAMILIES.index(item[1].family)))


def get_info(name: str) -> VariantInfo:
    """The registry's row for `name`; ValueError with the nearest names where there is none."""
    if name not in _REGISTRY:
        if name == "dense":
            raise ValueError("'dense' is no variant: layers that are not named stay dense, so leave them out.")
        near = [info.name for info in _REGISTRY.values() if _plain(name) in map(_plain, info.also)]
        near = near or difflib.get_close_matches(str(name), _REGISTRY, n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(f"unknown variant {name!r}.{hint} Available: {', '.join(available_variants())}.")
    return _REGISTRY[name]


def _plain(name: object) -> str:
    """Letters alone: Streaming-LLM is streaming_llm."""
    return re.sub("[^a-z]", "", str(name).lower())


def get_config_class(name: str) -> type[VariantConfig]:
    """The `<Name>Config` of a variant."""
    return get_info(name).config_class


def config_from_dict(data: dict[str, Any]) -> VariantConfig:
    """Inverse of `VariantConfig.to_dict`; unknown variants and fields raise ValueError."""
    values = dict(data)
    if "variant" not in values:
        raise ValueError(f"a variant's config needs the key 'variant', got {sorted(values)}.")
    return get_config_class(values.pop("variant")).from_kwargs(**values)


def build(config: VariantConfig, host) -> EfficientLayer:
    """The module of a config for what `host` describes: an attention layer (`HostShape`) or a `FeedForwardShape`."""
    module_class = get_info(config.name).module_class
    return module_class(module_class.resolve(config, host), host)
