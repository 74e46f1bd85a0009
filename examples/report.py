"""
What did the variants lose and what did they save? results.json -> a table, report.md and pareto.png.

    python examples/report.py runs/minilm-classification-.../results.json

Everything compares with the row `dense`: the same model with PyTorch's fused attention (SDPA), trained with the same
seed, steps and data.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from examples.objective import HIGHER_IS_BETTER

MIB = 2**20
DASH = "-"


def by_label(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows by their labels."""
    return {row["label"]: row for row in results["rows"]}


def quality_lost(results: dict[str, Any], row: dict[str, Any], when: str = "after") -> float | None:
    """
    What a row lost against dense, above 0 where it is worse: points of accuracy (of 100), or per cent of perplexity.
    None where either was not measured.
    """
    metric = results["metric"]
    own = (row[when] or {}).get(metric)
    dense = (by_label(results)["dense"][when] or {}).get(metric)
    if own is None or dense is None:
        return None
    return 100 * (dense - own) if HIGHER_IS_BETTER[metric] else 100 * (own / dense - 1)


def saved(results: dict[str, Any], row: dict[str, Any], part: str, figure: str) -> float | None:
    """The share, in per cent, of dense's cost that a row does without; below 0 where it costs more."""
    own, dense = _figure(row, part, figure), _figure(by_label(results)["dense"], part, figure)
    return None if own is None or not dense else 100 * (1 - own / dense)


def attention_share(results: dict[str, Any], row: dict[str, Any], part: str, figure: str) -> float | None:
    """The share, in per cent, of a row's cost that is attention's own: what is left of it when attention returns zeros."""
    zero = by_label(results).get("zero attention")
    own = _figure(row, part, figure)
    rest = None if zero is None else _figure(zero, part, figure)
    if own is None or rest is None or row.get("read_tokens") != zero.get("read_tokens"):
        return None
    return 100 * (1 - rest / own)


def columns(results: dict[str, Any]) -> list[str]:
    """The head of the summary table."""
    metric = results["metric"].replace("_", " ")
    unit = "points" if HIGHER_IS_BETTER[results["metric"]] else "%"
    head = [
        "",
        f"{metric} before",
        *([f"{metric} recovered"] if _recovers(results) else []),
        f"{metric} after",
        f"lost, {unit}",
        "train MiB",
        "memory saved, %",
        "train s/step",
        "time saved, %",
        "tokens/s",
        "inference s",
        "inference time saved, %",
    ]
    return head + (["cache MiB"] if _decodes(results) else [])


def lines(results: dict[str, Any]) -> list[list[str]]:
    """The body of the summary table, one line a row; a row that failed says so."""
    table = []
    for row in results["rows"]:
        name = row["label"] if row["status"] == "ok" else f"{row['label']} ({row['status']})"
        metric = results["metric"]
        train, inference = ("train_step", "inference")
        cells = [
            number((row["before"] or {}).get(metric)),
            *([number((row.get("recovered") or {}).get(metric))] if _recovers(results) else []),
            number((row["after"] or {}).get(metric)),
            signed(quality_lost(results, row, "after" if row["after"] else "before")),
            number(_figure(row, train, "peak_bytes"), MIB),
            signed(saved(results, row, train, "peak_bytes")),
            number(_figure(row, train, "seconds")),
            signed(saved(results, row, train, "seconds")),
            number(_figure(row, train, "tokens_per_second")),
            number(_figure(row, inference, "seconds")),
            signed(saved(results, row, inference, "seconds")),
        ]
        if _decodes(results):
            cells.append(number((row["cost"] or {}).get("cache_bytes_per_sequence"), MIB))
        table.append([name, *cells])
    return table


def print_table(results: dict[str, Any], console: Console | None = None) -> None:
    """The summary on the terminal, in 80 columns, and what failed below it."""
    console = console or Console()
    table = Table(title=escape(_title(results)), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shown = [i for i, head in enumerate(columns(results)) if head != "tokens/s" and not head.startswith("inference")]
    for index in shown:
        table.add_column(columns(results)[index].replace(" ", "\n"), justify="right" if index else "left", no_wrap=True)
    styles = {"dense": "bold", "control": "dim", "variant": ""}
    for row, cells in zip(results["rows"], lines(results), strict=True):
        style = styles[row["kind"]] if row["status"] == "ok" else "red"
        table.add_row(*(escape(cells[index]) for index in shown), style=style)
    console.print(table)
    for sentence in _failures(results):
        console.print(f"[red]{escape(sentence)}")


def markdown(results: dict[str, Any]) -> str:
    """report.md: the summary, what failed, what attention itself costs, and how to read it all."""
    dataset, model, recipe = results["dataset"], results["model"], results["recipe"]
    facts = [
        f"`{model['name']}` ({model['class']}, {model['parameters']:,} parameters) on `{dataset['name']}`: "
        f"{dataset['train_examples']:,} training and {dataset['eval_examples']:,} evaluation examples, "
        f"{results['max_length']:,} tokens at most.",
        f"{recipe['steps']:,} steps of {recipe['examples_per_step']} examples, seed {results['seed']}, {results['device']}.",
    ]
    if recipe["warm_start_steps"]:
        facts.append(
            f"Every run starts from the dense model after {recipe['warm_start_steps']} steps on "
            f"{recipe.get('warm_start_length', results['max_length']):,} tokens; `before` is measured there."
        )
    parts = [
        f"# {_title(results)}",
        " ".join(facts),
        _markdown_table(columns(results), lines(results)),
        "\n".join(f"- {sentence}" for sentence in _failures(results)),
        "![quality lost against memory saved](pareto.png)" if _points(results, "train_step", "peak_bytes") else "",
        "## What attention itself costs",
        "Of each figure the part that disappears when attention returns zeros. Working memory is what a step holds above "
        "weights and optimizer state: activations, gradients, temporaries.",
        _markdown_table(*_attention_table(results)),
        *(_recovery(results) if _recovers(results) else []),
        "## How to read this",
        _reading(results),
        "## How it was made",
        f"```bash\n{results['command']}\n```",
        "Versions: "
        + ", ".join(f"{name} {version}" for name, version in results["versions"].items())
        + (f". Revision `{results['git_revision']}`." if results["git_revision"] else "."),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """pareto.png: quality lost over memory and over time saved, where there is anything to draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [("peak_bytes", "memory of a training step saved, %"), ("seconds", "time of a training step saved, %")]
    if not any(_points(results, "train_step", figure) for figure, _ in panels):
        return
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    marks = {"dense": ("s", "black"), "variant": ("o", "tab:blue"), "control": ("x", "tab:gray")}
    for axis, (key, name) in zip(axes, panels, strict=True):
        for row, x, y in _points(results, "train_step", key):
            marker, color = marks[row["kind"]]
            axis.scatter(x, y, marker=marker, color=color)
            axis.annotate(row["label"], (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)
        axis.axhline(0, color="lightgray", zorder=0)
        axis.axvline(0, color="lightgray", zorder=0)
        axis.set_xlabel(f"{name} (right is better)")
        axis.margins(0.15)
    unit = "points of accuracy" if HIGHER_IS_BETTER[results["metric"]] else "% of perplexity"
    axes[0].set_ylabel(f"lost against dense, {unit} (down is better)")
    figure.suptitle(_title(results))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def write(results: dict[str, Any], folder: Path) -> None:
    """report.md and pareto.png beside results.json."""
    plot(results, folder / "pareto.png")
    (folder / "report.md").write_text(markdown(results), encoding="utf-8")


def number(value: float | None, unit: float = 1) -> str:
    """Four significant figures; a dash where there is none."""
    if value is None:
        return DASH
    value /= unit
    return f"{value:,.0f}" if math.isfinite(value) and abs(value) >= 1000 else f"{value:.4g}"


def signed(value: float | None) -> str:
    """One decimal; a dash where there is none."""
    return DASH if value is None else f"{value:+.1f}"


def _figure(row: dict[str, Any], part: str, figure: str) -> float | None:
    return ((row["cost"] or {}).get(part) or {}).get(figure)


def _decodes(results: dict[str, Any]) -> bool:
    return any((row["cost"] or {}).get("cache_bytes_per_sequence") is not None for row in results["rows"])


def _recovers(results: dict[str, Any]) -> bool:
    return any(row.get("recovered") for row in results["rows"])


def _recovery(results: dict[str, Any]) -> list[str]:
    return [
        "## Attention transfer",
        "Before fine-tuning each variant's own parameters learned their layer's dense attention. The error is the squared "
        "distance from dense attention's output relative to its square, on a few texts, the mean over layers; a layer whose "
        "error rose went back half of its way, again where need be, or to where it began; `recovered` is the metric then.",
        _markdown_table(*_recovery_table(results)),
    ]


def _recovery_table(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    head = [
        "",
        "tokens",
        "error before",
        "error after",
        "layers, lowest to highest after",
        "part of the way",
        "put back",
    ]
    body = []
    for row in results["rows"]:
        recovery = row.get("recovery")
        if recovery is None:
            continue
        if not recovery["errors"]:
            body.append([row["label"], "0", DASH, DASH, recovery["note"], DASH, DASH])
            continue
        errors = [[layer["error"] for layer in recovery.get(name, [])] for name in ("errors_before", "errors")]
        means = [number(sum(of) / len(of)) if of else DASH for of in errors]  # early runs have no errors before
        span = f"{number(min(errors[1]))} to {number(max(errors[1]))}"
        ended = (str(len(recovery.get(name, []))) for name in ("shortened", "undone"))
        body.append([row["label"], f"{recovery['tokens']:,}", *means, span, *ended])
    return head, body


def _title(results: dict[str, Any]) -> str:
    return f"{results['model']['name']}, {results['task']}, {results['max_length']:,} tokens"


def _failures(results: dict[str, Any]) -> list[str]:
    sentences = [f"{row['label']} {row['status']}: {row['error']}" for row in results["rows"] if row["status"] != "ok"]
    return sentences + [f"{row['label']}: no cost: {row['cost_error']}" for row in results["rows"] if row["cost_error"]]


def _points(results: dict[str, Any], part: str, figure: str) -> list[tuple[dict[str, Any], float, float]]:
    """(row, saved, lost) of the rows that have both."""
    points = []
    for row in results["rows"]:
        x, y = saved(results, row, part, figure), quality_lost(results, row)
        if x is not None and y is not None and math.isfinite(y):
            points.append((row, x, y))
    return points


def _attention_table(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    head = [
        "",
        "train time, %",
        "train working memory, %",
        "train FLOPs, %",
        "inference time, %",
        "inference FLOPs, %",
        "train working MiB",
        "infer MiB",
    ]
    asked = [
        ("train_step", "seconds"),
        ("train_step", "working_bytes"),
        ("train_step", "flops"),
        ("inference", "seconds"),
        ("inference", "flops"),
    ]
    body = []
    for row in results["rows"]:
        if row["cost"] is None or row["label"] == "zero attention":
            continue
        shares = [attention_share(results, row, *what) for what in asked]
        sizes = [
            number(_figure(row, "train_step", "working_bytes"), MIB),
            number(_figure(row, "inference", "peak_bytes"), MIB),
        ]
        body.append([row["label"], *(DASH if share is None else f"{share:.1f}" for share in shares), *sizes])
    return head, body


def _reading(results: dict[str, Any]) -> str:
    items = [
        "`dense` is PyTorch's fused attention, `dense (eager)` the N x N form; memory and time saved are against `dense`.",
        "`before` is the pretrained model with the attention swapped, `after` is fine-tuned with the same seed, steps and "
        "data as dense. `dense` before is the control of a model left alone.",
        "`zero attention` returns zeros instead of attention: a variant that is no better gains nothing from its attention. "
        "`...: window only` is a hybrid without all but its window.",
        "Train MiB is the peak of one training step with weights, gradients and optimizer state, measured in a process of "
        "its own on full-length texts.",
    ]
    dense = (by_label(results)["dense"]["after"] or {}).get("accuracy")
    if dense is not None:
        count = results["dataset"]["eval_examples"]
        error = 100 * math.sqrt(dense * (1 - dense) / count)
        items.append(
            f"On {count} examples the standard error of an accuracy is about {error:.1f} points; smaller differences are noise."
        )
    return "\n".join(f"- {item}" for item in items)


def _markdown_table(head: list[str], body: list[list[str]]) -> str:
    if not body:
        return "Not measured."
    rows = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def main(args: list[str] | None = None) -> None:
    """Prints the table of a results.json and writes report.md and pareto.png beside it."""
    paths = [Path(argument) for argument in (sys.argv[1:] if args is None else args)]
    if len(paths) != 1 or not paths[0].is_file():
        raise SystemExit("usage: python examples/report.py RESULTS.json")
    results = json.loads(paths[0].read_text(encoding="utf-8"))
    print_table(results)
    write(results, paths[0].parent)


if __name__ == "__main__":
    main()
