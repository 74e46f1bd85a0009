"""
The model card of a converted checkpoint: one row of a `results.json` -> Markdown with the Hub's metadata.

    python -m hf_efficient_attn.hub results.json linformer -o model_cards/minilm-linformer.md

A card says what was patched, what it cost in quality and what it saved, next to dense attention and the controls of the
same run. Every figure comes from the results; nothing is written by hand. To publish a checkpoint with its card:

    model.push_to_hub(repo_id); tokenizer.push_to_hub(repo_id)
    ModelCard(model_card(results, label, repo_id=repo_id)).push_to_hub(repo_id)
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from huggingface_hub import EvalResult, ModelCardData

from .registry import available_variants

# task of the fine-tune -> the Hub's pipeline tag, the Auto class that loads the checkpoint
TASKS = {
    "classification": ("text-classification", "AutoModelForSequenceClassification"),
    "masked-lm": ("fill-mask", "AutoModelForMaskedLM"),
    "causal-lm": ("text-generation", "AutoModelForCausalLM"),
}
MIB = 2**20


def model_card(results: dict[str, Any], label: str, repo_id: str | None = None) -> str:
    """
    The card of the row `label` of `results`, as `examples/finetune.py` writes them. `repo_id` is where the checkpoint
    will be found; without one the card shows a placeholder.

    Raises:
        ValueError: `results` are not of the schema, there is no such label, or the row has nothing to publish because
            it is a control, is dense, or did not finish.
    """
    row = _row(results, label)
    names = _variant_names(row)
    sections = [
        f"---\n{_metadata(results, row, names).to_yaml()}\n---",
        f"# {results['model']['name']} with {' and '.join(names)} attention",
        _introduction(results, names),
        "## What was changed\n\n" + _layers_table(row) + _papers(names),
        "## How to load it\n\n" + _loading(results, repo_id),
        "## Quality\n\n" + _quality(results, row),
        "## Memory and time\n\n" + _cost(results, row),
        "## How it was made\n\n" + _provenance(results, row),
        "## Caveats\n\n" + _caveats(results, row, names),
    ]
    return "\n\n".join(sections) + "\n"


def _row(results: dict[str, Any], label: str) -> dict[str, Any]:
    needed = {"model", "task", "dataset", "rows", "command", "versions", "seed", "recipe", "precision"}
    if missing := sorted(needed - results.keys()):
        raise ValueError(
            f"these results have no {', '.join(map(repr, missing))}; a card is made from the results.json of "
            "examples/finetune.py."
        )
    rows = {row["label"]: row for row in results["rows"]}
    if label not in rows:
        raise ValueError(f"no row is labelled {label!r}; the labels are: {', '.join(map(repr, rows))}.")
    row = rows[label]
    if row["kind"] != "variant":
        publishable = [name for name, other in rows.items() if other["kind"] == "variant"]
        raise ValueError(
            f"{label!r} is a {row['kind']} row and makes no checkpoint of its own; choose a variant: "
            f"{', '.join(map(repr, publishable)) or 'there is none in these results'}."
        )
    if row["status"] != "ok":
        raise ValueError(f"{label!r} has the status {row['status']!r} ({row['error']}); there is nothing to publish.")
    return row


def _variant_names(row: dict[str, Any]) -> list[str]:
    """The row's variants in order of their first layer."""
    return list(dict.fromkeys(layer["variant"] for layer in row["layers"]))


def _metadata(results: dict[str, Any], row: dict[str, Any], names: list[str]) -> ModelCardData:
    pipeline_tag, _ = TASKS[results["task"]]
    dataset = results["dataset"]
    evaluations = [
        EvalResult(
            task_type=pipeline_tag,
            dataset_type=dataset["name"],
            dataset_name=dataset["name"],
            dataset_split=dataset.get("split"),
            metric_type=metric,
            metric_name=metric.replace("_", " "),
            metric_value=value,
        )
        for metric, value in (_after(row) or row["before"]).items()
    ]
    return ModelCardData(
        base_model=results["model"].get("base_model"),
        library_name="transformers",
        tags=["efficient-attention", *names],
        pipeline_tag=pipeline_tag,
        metrics=[evaluation.metric_type for evaluation in evaluations],
        model_name=f"{results['model']['name']}-{row['label']}",
        eval_results=evaluations,
    )


def _introduction(results: dict[str, Any], names: list[str]) -> str:
    known = available_variants()
    summaries = [f"`{name}`: {known[name].summary}" for name in names if name in known]
    base = results["model"].get("base_model")
    origin = f"[{base}](https://huggingface.co/{base})" if base else f"`{results['model']['name']}`"
    opening = f"The weights of {origin} with self-attention replaced in place by `hf_efficient_attn`."
    return "\n".join([opening, *([""] if summaries else []), *(f"- {summary}" for summary in summaries)])


def _layers_table(row: dict[str, Any]) -> str:
    """The patched layers; those that are configured alike share a line."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for layer in row["layers"]:
        values = ", ".join(f"{name}={value!r}" for name, value in layer["config"].items())
        groups.setdefault((f"`{layer['variant']}`", values or "-"), []).append(layer)
    lines = [
        [", ".join(str(layer["layer"]) for layer in layers), *key, f"{sum(x['added_parameters'] for x in layers):,}"]
        for key, layers in groups.items()
    ]
    return _table(["layers", "variant", "hyper-parameters", "added parameters"], lines)


def _papers(names: list[str]) -> str:
    known = available_variants()
    papers = [f"`{name}`: {known[name].paper}" for name in names if name in known]
    return f"\n\nPaper: {'; '.join(papers)}." if papers else ""


def _loading(results: dict[str, Any], repo_id: str | None) -> str:
    auto_class = TASKS[results["task"]][1]
    code = [
        "import hf_efficient_attn  # registers the converted architectures",
        f"from transformers import {auto_class}",
        f'model = {auto_class}.from_pretrained("{repo_id or "user/name"}")',
    ]
    refusal = (
        "Without the first line Transformers refuses the checkpoint. A class given by name in place of the Auto class would "
        "load a dense model."
    )
    return "\n".join(["```python", *code, "```", "", refusal])


def _comparisons(results: dict[str, Any], row: dict[str, Any]) -> list[dict[str, Any]]:
    """The row itself, then dense attention and the controls that stand beside it."""
    others = [other for other in results["rows"] if other["kind"] in ("dense", "control")]
    return [row, *(other for other in others if other.get("control_of") in (None, row["label"]))]


def _quality(results: dict[str, Any], row: dict[str, Any]) -> str:
    metrics = list(row["before"] or _after(row))
    header = ["", *(f"{metric.replace('_', ' ')} {when}" for metric in metrics for when in ("before", "after"))]
    lines = []
    for other in _comparisons(results, row):
        if other["status"] == "ok" and other["before"] is None and other["after"] is None:
            continue  # measured for its cost only
        values = [(figures or {}).get(metric) for metric in metrics for figures in (other["before"], _after(other))]
        name = f"**{other['label']}**" if other is row else other["label"]
        failed = "" if other["status"] == "ok" else f" ({other['status']})"
        lines.append([name + failed, *map(_number, values)])
    recovered = row["after"] is None and row.get("recovered")
    training = "attention transfer, without fine-tuning," if recovered else "fine-tuning"
    text = (
        f"Before and after {training} on `{results['dataset']['name']}`, same seed, steps and data for every row. "
        "Zero attention replaces what attention puts out by zeros: what the model can do without any."
    )
    return f"{text}\n\n{_table(header, lines)}"


def _after(row: dict[str, Any]) -> dict[str, float] | None:
    """What was measured after all training that the row had."""
    return row["after"] or row.get("recovered")


def _cost(results: dict[str, Any], row: dict[str, Any]) -> str:
    header = ["", "training step, peak MiB", "training step, s", "inference, peak MiB", "inference, s", "tokens/s"]
    measured = [other for other in _comparisons(results, row) if other.get("cost")]
    if row not in measured:
        return "Not measured in this run."
    decodes = any(other["cost"]["cache_bytes_per_sequence"] is not None for other in measured)
    lines = []
    for other in measured:
        train, inference = other["cost"]["train_step"] or {}, other["cost"]["inference"]
        cells = [
            _mib(train.get("peak_bytes")),
            _number(train.get("seconds")),
            _mib(inference["peak_bytes"]),
            _number(inference["seconds"]),
            _number(inference["tokens_per_second"]),
        ]
        cache = [_mib(other["cost"]["cache_bytes_per_sequence"])] if decodes else []
        lines.append([f"**{other['label']}**" if other is row else other["label"], *cells, *cache])
    cost = row["cost"]
    precision = "" if results["precision"] == "no" else f", {results['precision']}"
    text = f"Measured on {results['device']}{precision}, {cost['batch_size']} x {cost['length']:,} tokens."
    return f"{text}\n\n{_table(header + ['decoder cache, MiB per sequence'] * decodes, lines)}"


def _provenance(results: dict[str, Any], row: dict[str, Any]) -> str:
    recipe = results["recipe"]
    versions = ", ".join(f"{package} {version}" for package, version in results["versions"].items() if version)
    steps = (
        f"{recipe['steps']:,} steps of {recipe['examples_per_step']} examples" if recipe["steps"] else "No fine-tuning"
    )
    facts = [f"{steps}, seed {results['seed']}."]
    if recipe["warm_start_steps"]:
        facts.append(
            f"The dense model had {recipe['warm_start_steps']:,} steps before its attention was replaced; 'before' is "
            "measured there."
        )
    if tokens := (row.get("recovery") or {}).get("tokens"):
        when, part = ("these steps", ", which is part of 'after'") if recipe["steps"] else ("'after'", "")
        facts.append(
            f"Between 'before' and {when} the variant's own parameters learned their layers' dense attention on "
            f"{tokens:,} tokens{part}."
        )
    if recipe["steps"] and (rank := recipe.get("lora_rank")):
        facts.append(
            f"The steps train adapters of rank {rank} and what the variant adds; all other weights stand still."
        )
    facts.append(f"Versions: {versions}.")
    if results.get("git_revision"):
        facts.append(f"Revision of `hf_efficient_attn`: `{results['git_revision']}`.")
    return f"```bash\n{results['command']}\n```\n\n" + " ".join(facts)


def _caveats(results: dict[str, Any], row: dict[str, Any], names: list[str]) -> str:
    dataset = results["dataset"]
    items = [
        f"One run with one seed; the figures hold for `{dataset['name']}`"
        + (f" ({dataset['eval_examples']:,} evaluation examples)" if dataset.get("eval_examples") else "")
        + f" at {row['read_tokens'] or results['max_length']:,} tokens, and differences of a few examples are noise.",
        "Memory and time depend on the device, the batch and the length; on short texts dense attention can be "
        "both faster and better.",
        f"The checkpoint needs `hf_efficient_attn` with the {'variants' if len(names) > 1 else 'variant'} "
        f"{', '.join(f'`{name}`' for name in names)}.",
        "The limits and biases of the base model are those of this one.",
    ]
    return "\n".join(f"- {item}" for item in items)


def _table(header: list[str], lines: Iterable[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _number(value: float | None) -> str:
    """Four significant figures, thousands with commas; a dash where there is none."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _mib(size: int | None) -> str:
    return _number(None if size is None else size / MIB)


def main(
    results: Annotated[Path, typer.Argument(help="results.json of examples/finetune.py", exists=True, dir_okay=False)],
    label: Annotated[str, typer.Argument(help="the row to publish")],
    output: Annotated[Path, typer.Option("--output", "-o", help="where the card goes, such as model_cards/name.md")],
    repo_id: Annotated[str | None, typer.Option(help="the repository that the checkpoint is pushed to")] = None,
) -> None:
    """Write the model card of one row of a results.json."""
    try:
        card = model_card(json.loads(results.read_text(encoding="utf-8")), label, repo_id)
    except ValueError as error:  # a JSONDecodeError is one as well
        raise typer.BadParameter(f"{results}: {error}") from error
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(card, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
