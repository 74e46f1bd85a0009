"""
Which variant for which layer: chosen on one text, judged on another.

    python -m examples.choose --model smollm2 --choose-on a.txt.gz --judge-on b.txt.gz --length 8192 \\
        --variants candidates.yaml --max-cost 0.33 --cost flops state --output results.json

`hf_efficient_attn.select_variants` finds the mapping on the first `--windows` stretches of the one text. The other text
gives the perplexity of dense attention, of the chosen mapping, and of every candidate in all layers; the file holds them
with in how many layers (or heads) each candidate stands, the share of dense attention's FLOPs, time, memory and, of
a decoder, state, and the curve of non-dominated mappings.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from examples.embedded import MODELS
from examples.perplexity import load, measure, stretches
from examples.rows import Help, add_row, check_counts, open_results, read_variants, run_program, swapped
from hf_efficient_attn.hosts import base_model, find_hosts
from hf_efficient_attn.selection import COSTS, DENSE, Budget, Selection, select_variants


def main(args: Sequence[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--model", default="smollm2", help=f"a Hub id, a folder, or one of: {', '.join(MODELS)}")
    parser.add_argument("--choose-on", required=True, help="a text file (also .gz)")
    parser.add_argument("--judge-on", required=True, help="another one")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a stretch")
    parser.add_argument("--windows", type=int, default=1, help="stretches of each text")
    add_choice(parser)
    options = parser.parse_args(args)
    check_counts(options, length=2, windows=1)
    budget = budget_of(parser, options)
    settings = vars(options) | {name: Path(getattr(options, name)).name for name in ("choose_on", "judge_on")}
    settings = {name: value for name, value in settings.items() if name not in ("variants", "output")}
    results = open_results(options.output, settings, "examples.choose", args)
    table = candidates(options)
    model, tokenizer = load(options.model, options.length)
    batches = [{"input_ids": ids} for ids in stretches(tokenizer, [options.choose_on], options.length, options.windows)]
    parts = stretches(tokenizer, [options.judge_on], options.length, options.windows)
    found = select_variants(model, batches, candidates=list(table.items()), budget=budget, per_head=options.per_head)

    def judge(row: dict, dense: dict) -> dict:
        return {"rise_percent": 100 * (row["perplexity"] / dense["perplexity"] - 1)}

    add_rows(results, model, found, table, lambda: measure(model, parts), judge, options.output)
    show(results, "perplexity", "rise_percent")
    return results


def add_choice(parser: argparse.ArgumentParser) -> None:
    """What is asked for: candidates, budget, and where results go."""
    parser.add_argument(
        "--variants", nargs="+", required=True, metavar="NAME|FILE", help="the candidates: names, and YAML files"
    )
    parser.add_argument("--max-loss", type=float, help="at most this relative rise of exp(loss), such as 0.02")
    parser.add_argument("--max-cost", type=float, help="at most this share of dense attention's cost")
    parser.add_argument("--cost", nargs="+", default=["flops"], choices=COSTS, help="of several the dearest counts")
    parser.add_argument("--per-head", action="store_true", help="choose for each key/value head, not for each layer")
    parser.add_argument("--output", type=Path, required=True, help="a JSON file that is not there yet")


def budget_of(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Budget:
    if options.output.exists():
        parser.error(f"{options.output} exists; give another name.")
    try:
        return Budget(max_loss=options.max_loss, max_cost=options.max_cost, cost=options.cost)
    except ValueError as error:
        parser.error(str(error))


def candidates(options: argparse.Namespace) -> dict[str, dict]:
    table = {label: config for label, config in read_variants(options.variants).items() if config is not None}
    if "chosen" in table:
        raise ValueError("a candidate is called 'chosen', as the row of the choice is; give it another label.")
    return table


def add_rows(
    results: dict,
    model: Any,
    found: Selection,
    table: dict[str, dict],
    measured: Callable[[], dict],
    judge: Callable[[dict, dict], dict],
    output: Path,
) -> None:
    """The mapping, the curve, and rows of what `measured` gives with dense, the choice and each candidate everywhere inside."""
    results["mapping"] = {layers: config.to_dict() for layers, config in found.mapping.items()}
    results["curve"] = [
        {"cost": p.cost, "predicted_percent": 100 * p.predicted, "measured_percent": _percent(p.measured)}
        for p in found.curve
    ]
    places, layers = len(found.chosen.labels), len(find_hosts(base_model(model)))
    rows = [(DENSE, {}, (DENSE,) * places, 0.0), ("chosen", found.mapping, found.chosen.labels, found.chosen.measured)]
    rows += [
        (label, {f"0-{layers - 1}": table[label]}, point.labels, point.measured)
        for label, point in zip(table, found.uniform, strict=True)
    ]
    for label, mapping, labels, rise in rows:
        with swapped(model, mapping):
            row = measured()
        row |= {"label": label, "places": {name: labels.count(name) for name in dict.fromkeys(labels)}}
        row["share"] = {kind: sum(found.costs[kind][name] for name in labels) / places for kind in found.costs}
        row |= judge(row, results["rows"][0] if results["rows"] else row)
        row["rise_percent_where_chosen"] = _percent(rise)
        add_row(results, row, output)


def _percent(rise: float | None) -> float | None:
    return None if rise is None else 100 * rise


def show(results: dict, metric: str, lost: str) -> None:
    table = Table(title="what was lost where it was judged, and of exp(loss) where it was chosen; costs beside dense's")
    costs = list(results["rows"][0]["share"])  # an encoder keeps no state
    for name in ("mapping", metric, "lost", "chosen on", *costs):
        table.add_column(name, justify="left" if name == "mapping" else "right")
    for row in results["rows"]:
        label = escape(row["label"])
        if label == "chosen":
            label += ": " + ", ".join(f"{n} x {escape(name)}" for name, n in row["places"].items())
        cells = [f"{row['share'][kind]:.2f}" for kind in costs]
        table.add_row(
            label, f"{row[metric]:.3f}", f"{row[lost]:+.1f}", f"{row['rise_percent_where_chosen']:+.1f} %", *cells
        )
    Console(width=130).print(table)


if __name__ == "__main__":
    run_program(main)
