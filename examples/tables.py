"""
Tables of README.md and docs/ are made from results files.

    python -m examples.tables            # writes them
    python -m examples.tables --check    # names the files that are out of date, and exits 1

A table stands between `<!-- table: KIND LABEL; LABEL; ... -->` and `<!-- end -->`; without labels all rows are shown. KINDs:

- `decoders_2048`, `decoders_8192`: results of examples/perplexity.py; `encoders_2048`, `authors_2048`: of embeddings.py;
  `onnx`: of export_onnx.py; `passkey`, `passkey_blocks`: of passkey.py; `speed`, `decoding`: of benchmarks/attention.py
  and decoding.py
- `kernels`: the label is a file of results of benchmarks/attention.py, beside which `..._pytorch` has those without kernels
- `finetune`: the first label is a folder of results of examples/finetune.py, the others are its rows
- `choose`: the label is a file of results of examples/choose.py or choose_encoder.py
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

from examples.objective import HIGHER_IS_BETTER
from examples.report import number, quality_lost, signed
from hf_efficient_attn import available_variants

ROOT = Path(__file__).resolve().parents[1]
MARKED = re.compile(r"(<!-- table: (\w+) ?([^>]*?) ?-->\n).*?(<!-- end -->)", re.DOTALL)


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(args)
    stale = []
    for file in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = file.read_text(encoding="utf-8")
        fresh = rewritten(text)
        if fresh != text:
            stale.append(file)
            if not options.check:
                file.write_text(fresh, encoding="utf-8")
    for file in stale:
        print(f"{file.relative_to(ROOT)}: {'out of date' if options.check else 'written'}")
    return 1 if stale and options.check else 0


def rewritten(text: str) -> str:
    """The text with every table as its results file has it now."""

    def table(match: re.Match) -> str:
        labels = [label.strip() for label in match[3].split(";") if label.strip()]
        return match[1] + TABLES[match[2]](match[2], labels) + match[4]

    return MARKED.sub(table, text)


def _rows(name: str, labels: list[str]) -> tuple[dict, list[dict]]:
    """The results and the rows asked for, in the order asked for; a label that is not there raises KeyError."""
    results = json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))
    rows = {row["label"]: row for row in results["rows"]}
    return results, [rows[label] for label in labels or sorted(rows, key=lambda label: _place(rows[label]["config"]))]


def _place(config: dict | None) -> int:
    """Dense first, then variants as the registry has them, family by family."""
    return -1 if config is None else list(available_variants()).index(config["variant"])


def _decoders(name: str, labels: list[str]) -> str:
    results, rows = _rows(name, labels)
    lines = [["variant", "perplexity", "rise", "time", "peak memory", "cache"]]
    for row in rows:
        if "error" in row:
            lines.append([f"`{row['label']}`", row["error"], "", "", "", ""])
            continue
        ratios = f"{row['seconds_ratio']:.2f}", f"{row['peak_ratio']:.2f}", f"{row['cache_ratio']:.3f}"
        lines.append([f"`{row['label']}`", f"{row['perplexity']:,.2f}", f"{row['rise_percent']:+,.1f} %", *ratios])
    return _table(lines) + _made(
        results,
        f"{rows[0]['length']:,} tokens; time and peak memory of the body, and bytes of the cache, over those of dense",
    )


def _encoders(name: str, labels: list[str]) -> str:
    results, rows = _rows(name, labels)
    lines = [["variant", "fidelity", "probe accuracy", "time", "peak memory"]]
    for row in rows:
        if "error" in row:
            lines.append([f"`{row['label']}`", row["error"], "", "", ""])
            continue
        figures = [f"{row['fidelity']:.3f}", f"{row['probe_accuracy']:.3f}"]
        lines.append([f"`{row['label']}`", *figures, *(f"{row[f'{c}_ratio']:.2f}" for c in ("seconds", "peak"))])
    return _table(lines) + _made(results, "time and memory over those of dense")


def _onnx(name: str, labels: list[str]) -> str:
    results, rows = _rows(name, labels)
    lines = [["variant", "time", "memory", "MiB"]]
    for row in rows:
        ratios = f"{row['seconds_ratio']:.2f}", f"{row['run_ratio']:.2f}"
        lines.append([f"`{row['label']}`", *ratios, f"{row['run_bytes'] / 2**20:,.0f}"])
    return _table(lines) + f"\nMade by `{results['command']}`.\n"


def _passkey(name: str, labels: list[str]) -> str:
    results = json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))
    found = {(row["label"], row["length"]): row for row in results["rows"]}
    lengths = sorted({length for _, length in found})
    lines = [["variant", *(f"{length:,}" for length in lengths)]]
    for label in labels or dict.fromkeys(label for label, _ in found):
        rows = [found[label, length] for length in lengths]
        lines.append([f"`{label}`", *(row.get("error") or f"{row['found']:.2f} ({row['tokens']:.2f})" for row in rows)])
    said = "Share of numbers found (of their digits, each after the right ones before it), untrained, by length."
    return _table(lines) + f"\n{said} Made by `{results['command']}`.\n"


def _finetune(name: str, labels: list[str]) -> str:
    results = json.loads((ROOT / "results" / labels[0] / "results.json").read_text(encoding="utf-8"))
    metric = results["metric"]
    stages = [stage for stage in ("before", "recovered", "after") if any(row.get(stage) for row in results["rows"])]
    lines = [["", *(f"{metric} {stage}" for stage in stages), "lost", "tokens of transfer", "of fine-tuning"]]
    rows = {
        row["label"]: row for row in results["rows"] if row["before"] is not None
    }  # else measured for its cost only
    for row in [rows[label] for label in labels[1:] or rows]:
        name = row["label"] if row["status"] == "ok" else f"{row['label']} ({row['status']})"
        stage = "after" if row["after"] else "before"
        tokens = ((row[part] or {}).get("tokens") or 0 for part in ("recovery", "training"))
        scores = [number((row[stage] or {}).get(metric)) for stage in stages]
        lines.append([f"`{name}`", *scores, signed(quality_lost(results, row, stage)), *(f"{n:,}" for n in tokens)])
    unit = "points" if HIGHER_IS_BETTER[metric] else "%"
    return _table(lines) + f"\nLost against dense at the same stage, {unit}. Made by `{results['command']}`.\n"


def _choose(name: str, labels: list[str]) -> str:
    results = json.loads((ROOT / "results" / f"{labels[0]}.json").read_text(encoding="utf-8"))
    metric = "perplexity" if "perplexity" in results["rows"][0] else "accuracy"
    costs = ("flops", "time", *(("state",) if metric == "perplexity" else ()))  # which encoders do not keep
    lines = [["", metric, "lost", *("FLOPs" if kind == "flops" else kind for kind in costs)]]
    for row in results["rows"]:
        places = ", ".join(f"{count} x `{label}`" for label, count in row["places"].items())
        name = f"chosen: {places}" if row["label"] == "chosen" else f"`{row['label']}`"
        lost = f"{row['rise_percent']:+.1f} %" if metric == "perplexity" else f"{row['lost_points']:+.1f} points"
        shares = [f"{row['share'][kind]:.2f}" for kind in costs]
        lines.append([name, number(row[metric]), lost, *shares])
    return _table(lines) + f"\nShares of dense attention's. Made by `{results['command']}`.\n"


def _attention(name: str) -> dict[tuple[str, str, str], float]:
    """(variant, mode, metric) -> value of results of benchmarks/attention.py."""
    with (ROOT / "results" / f"{name}.csv").open(encoding="utf-8") as file:
        return {(row["variant"], row["mode"], row["metric"]): float(row["value"]) for row in csv.DictReader(file)}


def _speed(name: str, labels: list[str]) -> str:
    values = _attention("attention_cpu")
    lines = [["variant", "encoder", "decoder", "peak memory, encoder", "decoder"]]
    for variant in labels or dict.fromkeys(variant for variant, *_ in values):
        speeds = [f"{values[variant, mode, 'speedup']:.2f}x" for mode in ("encoder", "decoder")]
        peaks = [f"{values[variant, mode, 'peak_ratio']:.2f}" for mode in ("encoder", "decoder")]
        lines.append([f"`{variant}`", *speeds, *peaks])
    return _table(lines)


def _kernels(name: str, labels: list[str]) -> str:
    with_kernels, without = _attention(labels[0]), _attention(f"{labels[0]}_pytorch")
    variants, modes = (list(dict.fromkeys(key[i] for key in with_kernels)) for i in (0, 1))
    lines = [["variant"]]
    for mode in modes:
        of_mode = f", {mode}" if len(modes) > 1 else ""
        lines[0] += [f"speed{of_mode}", "without kernels", f"peak memory{of_mode}", "without kernels"]
    for variant in variants:
        cells = [f"`{variant}`"]
        for mode, metric in product(modes, ("speedup", "peak_ratio")):
            cells += [f"{x[variant, mode, metric]:.2f}{'x' * (metric == 'speedup')}" for x in (with_kernels, without)]
        lines.append(cells)
    return _table(lines)


def _decoding(name: str, labels: list[str]) -> str:
    with (ROOT / "results" / "decoding_cpu.csv").open(encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    values = {(row["variant"], row["metric"], int(row["length"])): float(row["value"]) for row in found}
    lengths = sorted({length for _, _, length in values})
    lines = [["variant", *(f"{word}, {n:,} tokens" for n in lengths for word in ("speed", "state"))]]
    for variant in labels or dict.fromkeys(row["variant"] for row in found):
        cells = [(values[variant, "token_speedup", n], values[variant, "state_ratio", n]) for n in lengths]
        lines.append([f"`{variant}`", *(text for speed, state in cells for text in (f"{speed:.1f}x", f"{state:.2f}"))])
    return _table(lines)


def _table(lines: list[list[str]]) -> str:
    head, *body = ["| " + " | ".join(cells) + " |" for cells in lines]
    rule = "| --- " + "| ---: " * (len(lines[0]) - 1) + "|"
    return "\n".join(["", head, rule, *body, ""])


def _made(results: dict, words: str) -> str:
    return f"\nUntrained, {words}. Made by `{results['command']}`.\n"


TABLES: dict[str, Callable[[str, list[str]], str]] = {
    "decoders_2048": _decoders,
    "decoders_8192": _decoders,
    "encoders_2048": _encoders,
    "authors_2048": _encoders,
    "onnx": _onnx,
    "passkey": _passkey,
    "passkey_blocks": _passkey,
    "finetune": _finetune,
    "choose": _choose,
    "speed": _speed,
    "kernels": _kernels,
    "decoding": _decoding,
}

if __name__ == "__main__":
    sys.exit(main())
