"""What the hyper-parameters of a variant are: a dataclass that checks itself and turns into JSON and back."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from typing import Any, ClassVar


def option(default: Any, help: str, *, minimum: float | None = None, maximum: float | None = None, choices=None) -> Any:
    """A dataclass field with its default, its meaning and its range (`minimum` and `maximum` included)."""
    metadata = {"help": help, "minimum": minimum, "maximum": maximum, "choices": choices}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class VariantConfig:
    """
    Base of every `<Name>Config`. A subclass is a dataclass whose fields are made by `option`.

    Raises:
        ValueError: a value of the wrong type or out of range, naming the field, the value and what is possible.
    """

    name: ClassVar[str] = ""  # the registry name, set at registration

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for spec in dataclasses.fields(self):
            self._check(spec, hints[spec.name])
        self.validate()

    def _check(self, spec: dataclasses.Field, hint: Any) -> None:
        value = getattr(self, spec.name)
        where = f"{type(self).__name__}.{spec.name}"
        if isinstance(value, int) and not isinstance(value, bool) and hint is float:
            value = float(value)
            setattr(self, spec.name, value)
        if not _fits(value, hint):
            raise ValueError(f"{where} = {value!r}: expected {_spell(hint)} ({spec.metadata.get('help', '')}).")
        low, high, choices = (spec.metadata.get(key) for key in ("minimum", "maximum", "choices"))
        if choices is not None and value not in choices:
            raise ValueError(f"{where} = {value!r}: choose one of {', '.join(map(repr, choices))}.")
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                if low is not None and number < low:
                    raise ValueError(f"{where} = {value!r}: must be at least {low} ({spec.metadata['help']}).")
                if high is not None and number > high:
                    raise ValueError(f"{where} = {value!r}: must be at most {high} ({spec.metadata['help']}).")

    def validate(self) -> None:
        """Checks that involve several fields; a subclass raises ValueError here."""

    @classmethod
    def options(cls) -> dict[str, str]:
        """Field name -> meaning, in order."""
        return {spec.name: spec.metadata.get("help", "") for spec in dataclasses.fields(cls)}

    @classmethod
    def from_kwargs(cls, **values: Any) -> VariantConfig:
        """As the constructor, but an unknown name raises ValueError with the nearest names that exist."""
        known = list(cls.options())
        for given in values:
            if given not in known:
                near = difflib.get_close_matches(given, known, n=2)
                hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
                raise ValueError(f"{cls.__name__} has no hyper-parameter {given!r}.{hint} It has: {', '.join(known)}.")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, the variant's name under "variant"; `registry.config_from_dict` reads it back."""
        return {"variant": self.name, **{spec.name: getattr(self, spec.name) for spec in dataclasses.fields(self)}}

    @classmethod
    def tiny(cls, causal: bool) -> VariantConfig:
        """Hyper-parameters that are sparse at a few dozen tokens; the contract suite runs every variant with them."""
        return cls()

    @classmethod
    def variations(cls, causal: bool) -> list[VariantConfig]:
        """Further tiny configs, one for each choice that `tiny` does not take; for a layer of two key/value heads."""
        return []


@dataclass(kw_only=True)
class EfficientAttentionConfig(VariantConfig):
    """Base of the configs of attention variants."""

    dense_below: int = option(
        0,
        "tokens; encoder rows shorter than this, and decoder queries at positions below it, attend exactly",
        minimum=0,
    )

    @classmethod
    def dense_limit(cls, length: int, causal: bool) -> EfficientAttentionConfig | None:
        """Hyper-parameters at which `length` tokens are attended exactly, or None where the variant has no such limit."""
        return None

    def window_only(self, causal: bool) -> EfficientAttentionConfig | None:
        """The control of a hybrid: the config of its exact window alone, or None where it has none in this direction."""
        return None

    @property
    def alternates(self) -> bool:
        """Whether every other patched layer computes something else."""
        return False


def _fits(value: Any, hint: Any) -> bool:
    if hint is Any:
        return True
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, args[0]) for item in value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def _spell(hint: Any) -> str:
    return (
        hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("NoneType", "None")
    )
