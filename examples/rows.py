"""What the reports of untrained variants share: which variants, swapped in for a while, and a file of rows that can go on."""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import hf_efficient_attn
from hf_efficient_attn import patched


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """A program's docstring as it stands, and the defaults that its texts do not tell."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        told = default is None or default is False or default == [] or "by default" in (action.help or "")
        return action.help if told else super()._get_help_string(action)


def read_variants(names: Sequence[str]) -> dict[str, dict | None]:
    """
    label -> config, None for dense; names of the registry, and YAML files label -> {variant: ..., ...}.

    Raises:
        SystemExit: with a sentence, where a file is none of these.
    """
    chosen: dict[str, dict | None] = {"dense": None}
    for name in names:
        if not name.endswith((".yaml", ".yml")):
            chosen.setdefault(name, {"variant": name})
            continue
        try:
            content = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            sys.exit(f"--variants {name}: {error}")
        if not isinstance(content, dict) or not all(isinstance(config, dict) for config in content.values()):
            sys.exit(f"--variants {name}: expected a mapping such as label: {{variant: block, block_size: 64}}.")
        chosen.update(content)
    return chosen


def run_program(main: Callable[[], Any]) -> None:
    """main(), whose ValueErrors and missing files become one sentence and an exit code."""
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def swapped(model: torch.nn.Module, variant: Any) -> AbstractContextManager:
    """The model with this variant inside, and as it was afterwards; None or an empty mapping changes nothing."""
    return patched(model, variant) if variant else nullcontext()


def seconds_ratio(model: torch.nn.Module, variant: Any, run: Callable[[], Any], repeats: int) -> float:
    """
    Seconds of run() with the variant inside over those without: the median of `repeats` neighbouring pairs, so that a
    machine that slows down meanwhile does so for both; 1 for no variant.
    """
    if variant is None:
        return 1.0
    ratios = []
    for _ in range(repeats):
        pair = []
        for inside in (None, variant):
            with swapped(model, inside):
                start = time.perf_counter()
                run()
                pair.append(time.perf_counter() - start)
        ratios.append(pair[1] / pair[0])
    return statistics.median(ratios)


def check_counts(options: argparse.Namespace, **least: int) -> None:
    """
    Raises:
        ValueError: an option, or one of its values, is below the least that makes sense.
    """
    for name, bound in least.items():
        given = getattr(options, name)
        if (smallest := min(given) if isinstance(given, list) else given) < bound:
            raise ValueError(f"--{name.replace('_', '-')} {smallest}: at least {bound}.")


def open_results(
    file: Path,
    settings: dict,
    program: str,
    args: Sequence[str] | None,
    variants: Mapping[str, dict | None] | None = None,
) -> dict:
    """
    The file's results, or new ones: `settings`, the `command`, `versions`, and `rows`.

    Raises:
        SystemExit: the file holds results of other settings, or of other `variants` under these labels.
    """
    results = {"settings": settings, "rows": []}
    if file.exists():
        results = json.loads(file.read_text(encoding="utf-8"))
        if results.get("settings") != settings:
            sys.exit(f"{program}: {file} holds another run, {results.get('settings')}; give another name.")
    for row in results["rows"]:
        if variants and row["config"] != variants.get(row["label"], row["config"]):
            sys.exit(
                f"{program}: {file} holds {row['label']!r} as {row['config']}, not {variants[row['label']]}; give the run "
                "another label, or another name to the file."
            )
    results["command"] = shlex.join(["python", "-m", program, *(args or sys.argv[1:])])
    results["versions"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_efficient_attn": hf_efficient_attn.__version__,
    }
    return results


def add_row(results: dict, row: dict, file: Path) -> None:
    """Adds the row and writes the file: beside the old one, and swaps."""
    results["rows"].append(row)
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(file.name + ".new")
    fresh.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    fresh.replace(file)
    print(json.dumps(row), flush=True)


def show(results: dict, title: str, columns: dict[str, str], **more: Callable[[dict], Any]) -> None:
    """
    Prints the rows, or the error of one that failed. `columns`: name -> what `str.format` makes of the row's entries, and of
    what `more` makes of the row; a dash where dense failed and there is nothing to compare with.
    """
    lead = [name for name in ("length", "label") if name in results["rows"][0]]
    table = Table(title=title)
    for name in lead + list(columns):
        left = name in ("label", "where")
        table.add_column("variant" if name == "label" else name, justify="left" if left else "right")
    for row in results["rows"]:
        cells = [row.get("error", "")[:60]]
        if "error" not in row:
            entries = row | {name: function(row) for name, function in more.items()}
            cells = [_cell(text, entries) for text in columns.values()]
        table.add_row(*(escape(cell) for cell in (*(str(row[name]) for name in lead), *cells)))
    Console(width=110).print(table)


def _cell(text: str, entries: Mapping[str, Any]) -> str:
    try:
        return text.format(**entries)
    except KeyError:
        return "-"
