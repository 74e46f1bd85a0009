"""
Which runs does a report hold? From names, YAML files and mappings to one `RunSpec` for each row.

A YAML file maps labels to runs:

    window-128: {variant: sliding_window, window: 128}
    dense-512: {variant: dense, read_tokens: 512}
    long: {variant: block, read_tokens: 2048, micro_batch: 2}
    top-only: {variant: linformer, rank: 64, layers: "3-5"}
    mixture: {"0-2": sliding_window, "3-5": {variant: linformer, rank: 64}}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from hf_efficient_attn.registry import config_from_dict

DENSE, EAGER, ZERO = "dense", "dense (eager)", "zero attention"

# Names in the output folder that a run's own folder cannot have.
TAKEN = ("", ".", "..", "base", "base.new", "warm_start", "arguments.json", "results.json", "report.md", "pareto.png")


@dataclass(frozen=True)
class RunSpec:
    """
    One row of the report.

    Attributes:
        label: its name in tables and folders.
        kind: "dense", "variant" or "control".
        patch: what `examples.models.install` puts into the model; plain JSON types.
        control_of: the label of the variant that a control belongs to, or None where it stands beside all.
        max_length: tokens this run reads, where it differs from the other runs.
        micro_batch: texts this run reads at a time, where it differs; it accumulates their gradients to the same step.
    """

    label: str
    kind: str
    patch: dict[str, Any] | None = None
    control_of: str | None = None
    max_length: int | None = None
    micro_batch: int | None = None

    @property
    def folder(self) -> str:
        """The label as a folder's name."""
        return "".join(c if c.isalnum() or c in "-_." else "_" for c in self.label)


def read_runs(entries: Sequence[str | dict[str, Any]]) -> list[RunSpec]:
    """
    The runs that `entries` ask for, dense first.

    Args:
        entries: variants' names, paths of YAML files, or mappings label -> run as in those files.

    Raises:
        ValueError: an unknown variant or hyper-parameter, a malformed entry, two runs of one label, or a label that the
            program needs.
    """
    runs = [RunSpec(DENSE, "dense")]
    for entry in entries:
        if entry == DENSE:
            continue
        if isinstance(entry, str) and not entry.lower().endswith((".yaml", ".yml", ".json")):
            runs.append(_run(entry, {"variant": entry}))
            continue
        mapping = _load(entry) if isinstance(entry, str) else entry
        runs += [_run(str(label), value) for label, value in mapping.items()]
    folders = [run.folder for run in runs] + [RunSpec(label, "control").folder for label in (EAGER, ZERO)]
    for run in runs:
        if folders.count(run.folder) > 1:
            raise ValueError(f"two runs are labelled {run.label!r}; give each its own label in a YAML file.")
        if run.folder in TAKEN:
            raise ValueError(f"run {run.label!r}: the output folder needs this name itself; choose another label.")
    return runs


def stored_run(given: dict[str, Any]) -> RunSpec:
    """
    A run as an earlier version wrote it: fields that its variants have got since have their defaults.

    Raises:
        ValueError: a variant or a hyper-parameter that there is no more.
    """
    patch = None if given["patch"] is None else dict(given["patch"])
    if patch and "config" in patch:
        patch["config"] = _config(given["label"], patch["config"])
    if patch and "mapping" in patch:
        patch["mapping"] = {layers: _config(given["label"], config) for layers, config in patch["mapping"].items()}
    return RunSpec(**{**given, "patch": patch})


def with_controls(runs: Sequence[RunSpec], which: str, causal: bool) -> list[RunSpec]:
    """
    The runs, each hybrid followed by its window alone (`which` = "all"), zero attention last ("all" or "zero").

    `causal` is the model's direction: some variants contain a window in decoders only.
    """
    if which == "none":
        return list(runs)
    both = [run for spec in runs for run in (spec, *(_window_only(spec, causal) if which == "all" else ()))]
    return [*both, RunSpec(ZERO, "control", {"zero_attention": True})]


def _load(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise ValueError(f"--variants {path}: no such file.")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"--variants {path}: not YAML: {error}") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(
            f"--variants {path}: expected a mapping from labels to variants, as in {{label: {{variant: block}}}}."
        )
    return content


def _run(label: str, value: Any) -> RunSpec:
    if isinstance(value, str):
        value = {"variant": value}
    if not isinstance(value, dict) or not value:
        raise ValueError(f"run {label!r}: expected a variant's name or a mapping, got {value!r}.")
    if "variant" not in value:
        return RunSpec(label, "variant", {"mapping": {str(k): _config(label, v) for k, v in value.items()}})
    options = dict(value)
    reads = {}
    for name, field, what in (("read_tokens", "max_length", "tokens"), ("micro_batch", "micro_batch", "texts")):
        reads[field] = given = options.pop(name, None)
        if given is not None and (not isinstance(given, int) or given < 1):
            raise ValueError(f"run {label!r}: {name} = {given!r} must be a positive number of {what}.")
    layers = options.pop("layers", None)
    if options["variant"] == DENSE:
        if options.keys() - {"variant"} or layers is not None:
            raise ValueError(f"run {label!r}: dense takes no other options than read_tokens and micro_batch.")
        return RunSpec(label, "dense", **reads)
    return RunSpec(label, "variant", {"config": _config(label, options), "layers": layers}, **reads)


def _config(label: str, value: Any) -> dict[str, Any]:
    """The variant's config, checked, as plain JSON types."""
    if isinstance(value, str):
        value = {"variant": value}
    if not isinstance(value, dict):
        raise ValueError(f"run {label!r}: expected a variant's name or a mapping, got {value!r}.")
    try:
        return config_from_dict(value).to_dict()
    except ValueError as error:
        raise ValueError(f"run {label!r}: {error}") from error


def _window_only(run: RunSpec, causal: bool) -> list[RunSpec]:
    """The control of a hybrid: its exact window without the rest."""
    if run.kind != "variant":
        return []
    if "mapping" in run.patch:
        windows = {layers: _window(config, causal) for layers, config in run.patch["mapping"].items()}
        if not any(windows.values()):
            return []
        patch = {"mapping": {layers: windows[layers] or config for layers, config in run.patch["mapping"].items()}}
    else:
        window = _window(run.patch["config"], causal)
        if window is None:
            return []
        patch = {"config": window, "layers": run.patch["layers"]}
    return [replace(run, label=f"{run.label}: window only", kind="control", patch=patch, control_of=run.label)]


def _window(config: dict[str, Any], causal: bool) -> dict[str, Any] | None:
    window = config_from_dict(config).window_only(causal)
    return None if window is None else window.to_dict()
