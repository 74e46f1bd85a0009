"""
`combined`: different variants in different heads of one layer. Part p of `parts` serves its own run of key/value heads and
all query heads that read them, and the outputs stand side by side, heads in the layer's order.

Child 2019, Sparse Transformer (arXiv:1904.10509), its heads with distinct patterns; Ho 2019, Axial Transformers
(arXiv:1912.12180); the survey's "combination of patterns". Cost and decoder state: the sum of the parts. Dense limit: every
part at its own. Parameters and their start: those of the parts.

Shares are relative: with G key/value heads, part p gets share_p G / (sum of shares) of them, rounded by the largest
remainder (the earlier part on a tie). A part may be `combined` itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..config import EfficientAttentionConfig, option
from ..registry import build, config_from_dict, get_config_class, get_info, register_variant
from ..variant import EfficientAttention, HostShape


@dataclass(kw_only=True)
class CombinedConfig(EfficientAttentionConfig):
    """
    Hyper-parameters of `combined`. A part is [variant, share]; the variant is a config, its dict (with its name under
    "variant") or a name alone. A variant without a share has share 1.
    """

    parts: list = option([["block", 1], ["strided", 1]], "[variant, share] of each part, in the order of the heads")

    def __post_init__(self) -> None:
        if isinstance(self.parts, (list, tuple)):
            self.parts = [_part(entry) for entry in self.parts]
        super().__post_init__()

    def validate(self) -> None:
        if not self.parts:
            raise ValueError("CombinedConfig.parts is empty: give at least one [variant, share].")

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "parts": [[part.to_dict(), share] for part, share in self.parts]}

    def groups(self, num_kv_heads: int) -> list[int]:
        """
        How many key/value heads each part gets.

        Raises:
            ValueError: a part is left with none.
        """
        total = sum(share for _, share in self.parts)
        quotas = [share * num_kv_heads / total for _, share in self.parts]
        groups = [int(quota) for quota in quotas]
        by_remainder = sorted(range(len(quotas)), key=lambda i: groups[i] - quotas[i])
        for i in by_remainder[: num_kv_heads - sum(groups)]:
            groups[i] += 1
        if 0 in groups:
            names = ", ".join(f"{part.name} {share:g}" for part, share in self.parts)
            raise ValueError(
                f"combined: the shares ({names}) leave {self.parts[groups.index(0)][0].name!r} without a head, because the "
                f"layer has {num_kv_heads} key/value head{'s' if num_kv_heads > 1 else ''}. Every part needs at least one: "
                "give fewer parts or more equal shares."
            )
        return groups

    @classmethod
    def tiny(cls, causal: bool) -> CombinedConfig:
        return cls(parts=[[part.tiny(causal), share] for part, share in cls().parts])

    @classmethod
    def dense_limit(cls, length: int, causal: bool) -> CombinedConfig:
        return cls(parts=[[part.dense_limit(length, causal), share] for part, share in cls().parts])

    def window_only(self, causal: bool) -> CombinedConfig | None:
        """Every part that contains a window replaced by that window."""
        windows = [part.window_only(causal) for part, _ in self.parts]
        if not any(windows):
            return None
        return replace(self, parts=[[w or part, share] for w, (part, share) in zip(windows, self.parts, strict=True)])


def _part(entry: Any) -> list:
    variant, share = entry if isinstance(entry, (list, tuple)) and len(entry) == 2 else (entry, 1)
    if isinstance(variant, str):
        variant = get_config_class(variant)()
    elif isinstance(variant, dict):
        variant = config_from_dict(variant)
    if (
        not isinstance(variant, EfficientAttentionConfig)
        or isinstance(share, bool)
        or not isinstance(share, (int, float))
    ):
        raise ValueError(
            f"CombinedConfig.parts: {entry!r} is not [variant, share]; the variant is a config, its dict or a name, the "
            "share a number."
        )
    if not 0 < share < float("inf"):
        raise ValueError(
            f"CombinedConfig.parts: the share of {variant.name!r} is {share}; it must be a positive number."
        )
    return [variant, share]


@register_variant(
    "combined",
    family="fixed patterns",
    summary="different variants in different heads of one layer",
    paper="Child 2019, arXiv:1904.10509; Ho 2019, arXiv:1912.12180",
    also=("axial",),
)
class CombinedAttention(EfficientAttention):
    """`combined`: `parts` are the variants' modules, `groups` how many key/value heads each serves."""

    config_class = CombinedConfig
    linear_cost = False

    def __init__(self, config: CombinedConfig, host: HostShape) -> None:
        super().__init__(config, host)
        self.groups = config.groups(host.num_kv_heads)
        self.parts = nn.ModuleList(build(part, shape) for part, shape in _shapes(config, host))

    @property
    def needs_hidden(self) -> bool:
        return any(part.needs_hidden for part in self.parts)

    @classmethod
    def check_host(cls, config: CombinedConfig, host: HostShape) -> None:
        for part, shape in _shapes(config, host):
            get_info(part.name).module_class.check_host(part, shape)

    @classmethod
    def resolve(cls, config: CombinedConfig, host: HostShape) -> CombinedConfig:
        parts = [get_info(part.name).module_class.resolve(part, shape) for part, shape in _shapes(config, host)]
        return replace(config, parts=[[part, share] for part, (_, share) in zip(parts, config.parts, strict=True)])

    @classmethod
    def tie_parameters(cls, modules: list[CombinedAttention]) -> None:
        for parts in zip(*(module.parts for module in modules), strict=True):
            type(parts[0]).tie_parameters(list(parts))

    def attend(self, query, key, value, *, lengths, scaling, dropout, causal, state, hidden=None) -> Tensor:
        shared = {"lengths": lengths, "scaling": scaling, "dropout": dropout, "causal": causal}
        queries = query.split([count * self.host.group_size for count in self.groups], 1)
        keys, values = key.split(self.groups, 1), value.split(self.groups, 1)
        outputs = []
        for i, part in enumerate(self.parts):
            own = None
            if state is not None:
                own = state.part(f"part{i}", part.make_state)
            seen = hidden if part.needs_hidden else None
            outputs.append(part.attend_from_below(queries[i], keys[i], values[i], state=own, hidden=seen, **shared))
            part.after_backward(queries[i], outputs[-1])
        return torch.cat(outputs, 1)


def _shapes(config: CombinedConfig, host: HostShape) -> list[tuple[EfficientAttentionConfig, HostShape]]:
    """Each part's config, and the layer that it serves."""
    return [
        (part, replace(host, num_heads=groups * host.group_size, num_kv_heads=groups))
        for (part, _), groups in zip(config.parts, config.groups(host.num_kv_heads), strict=True)
    ]
