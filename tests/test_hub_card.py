"""The model card: it holds every figure of the row and its controls, the Hub reads its metadata, refusals say why."""

from __future__ import annotations

import ast
import copy
import json
import re
from dataclasses import asdict

import pytest
import typer
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from examples.finetune import empty_row
from examples.variants import RunSpec
from hf_efficient_attn.hub import main, model_card
from hf_efficient_attn.measuring import ModelCost, StepCost


def cost(megabytes: int, seconds: float, cache: int | None = None) -> dict:
    def step(factor):
        size = factor * megabytes * 2**20
        return StepCost(size, size // 4, size - size // 4, factor * seconds, 512 / seconds, 10**9)

    return asdict(ModelCost(4, 512, step(3), step(1), cache))


def row(label: str, kind: str, before: float | None, after: float | None, **more) -> dict:
    quality = {
        when: None if value is None else {"accuracy": value, "macro_f1": value - 0.01}
        for when, value in (("before", before), ("after", after))
    }
    filled = empty_row(RunSpec(label, kind)) | quality
    assert more.keys() <= filled.keys()
    return filled | more


def layer(index: int, variant: str, added: int = 0, **config) -> dict:
    return {"layer": index, "variant": variant, "config": config, "added_parameters": added}


def example_results() -> dict:
    window = [layer(i, "sliding_window", window=256, sinks=4) for i in range(6)]
    mixture = [*window[:2], *(layer(i, "linformer", 32768, rank=64) for i in range(2, 5))]
    return {
        "command": "python examples/finetune.py --model minilm --variants dense sliding_window mixture",
        "git_revision": "0123abc",
        "versions": {"torch": "2.13.0", "transformers": "5.23.0", "hf_efficient_attn": None},
        "seed": 7,
        "precision": "bf16",
        "recipe": {"steps": 60, "examples_per_step": 16, "warm_start_steps": 1500},
        "device": "cpu, 2 threads",
        "model": {"name": "minilm", "base_model": "sentence-transformers/all-MiniLM-L6-v2"},
        "task": "classification",
        "dataset": {"name": "stdlib-packages", "split": "test", "eval_examples": 1234},
        "max_length": 512,
        "metric": "accuracy",
        "rows": [
            row("dense", "dense", 0.1511, 0.8122, cost=cost(400, 2.0)),
            row("dense (eager)", "dense", None, None, cost=cost(900, 4.0)),
            row("zero attention", "control", 0.1433, 0.4044),
            row("mixture: window alone", "control", 0.1555, 0.6066, control_of="mixture"),
            row("sliding_window", "variant", 0.1577, 0.8088, layers=window, cost=cost(210, 1.25)),
            row("mixture", "variant", 0.1699, 0.7911, layers=mixture, cost=cost(190, 1.125)),
            row("broken", "variant", 0.16, None, layers=window, status="diverged", error="the loss became NaN"),
        ],
    }


@pytest.fixture
def results() -> dict:
    return example_results()


def test_metadata_is_what_the_hub_reads(results):
    data = ModelCard(model_card(results, "mixture")).data
    assert data.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-classification"
    assert data.tags == ["efficient-attention", "sliding_window", "linformer"]
    assert data.metrics == ["accuracy", "macro_f1"]
    found = {result.metric_type: (result.metric_value, result.dataset_name) for result in data.eval_results}
    assert found == {"accuracy": (0.7911, "stdlib-packages"), "macro_f1": (pytest.approx(0.7811), "stdlib-packages")}


def test_quality_stands_beside_dense_and_the_rows_own_controls(results):
    card = model_card(results, "mixture")
    assert "| **mixture** | 0.1699 | 0.7911 | 0.1599 | 0.7811 |" in card
    assert "| dense | 0.1511 | 0.8122 | 0.1411 | 0.8022 |" in card
    assert "| zero attention | 0.1433 | 0.4044 |" in card
    assert "| mixture: window alone | 0.1555 | 0.6066 |" in card
    assert "0.1577" not in card
    assert "(eager) | -" not in card
    other = model_card(results, "sliding_window")
    assert "0.1577 | 0.8088" in other
    assert "mixture" not in other.split("## How it was made")[0]


def test_layers_hyper_parameters_cost_and_provenance(results):
    card = model_card(results, "mixture")
    assert "| 0, 1 | `sliding_window` | window=256, sinks=4 | 0 |" in card
    assert "| 2, 3, 4 | `linformer` | rank=64 | 98,304 |" in card
    assert "| **mixture** | 570 | 3.375 | 190 | 1.125 | 455.1 |" in card
    assert "| dense | 1,200 | 6 | 400 | 2 | 256 |" in card
    assert "decoder cache" not in card
    assert "| dense (eager) | 2,700 | 12 | 900 | 4 | 128 |" in card
    assert "None" not in card
    for fact in (
        results["command"],
        "0123abc",
        "seed 7",
        "60 steps of 16",
        "1,500 steps",
        "bf16",
        "torch 2.13.0",
        "1,234 evaluation examples",
        "2 threads",
    ):
        assert fact in card


def test_transfer_and_adapters_are_told(results):
    mixture = next(each for each in results["rows"] if each["label"] == "mixture")
    plain = model_card(results, "mixture")
    assert "dense attention on" not in plain and "adapters" not in plain
    mixture["recovery"] = {"tokens": 61440}
    results["recipe"]["lora_rank"] = 8
    card = model_card(results, "mixture")
    assert "dense attention on 61,440 tokens, which is part of 'after'" in card and "adapters of rank 8" in card
    mixture["recovery"] = {"tokens": 0, "note": "this variant has no parameters to train"}
    assert "which is part of 'after'" not in model_card(results, "mixture")


def test_decoder_cache_is_a_column_where_the_model_decodes(results):
    for each in results["rows"]:
        each["cost"] = each["cost"] and each["cost"] | {"cache_bytes_per_sequence": 3 * 2**19}
    assert "| **mixture** | 570 | 3.375 | 190 | 1.125 | 455.1 | 1.5 |" in model_card(results, "mixture")


@pytest.mark.parametrize(
    ("task", "auto_class"),
    [
        ("classification", "AutoModelForSequenceClassification"),
        ("masked-lm", "AutoModelForMaskedLM"),
        ("causal-lm", "AutoModelForCausalLM"),
    ],
)
def test_loading_code_is_three_lines_of_python(results, task, auto_class):
    import transformers

    results["task"] = task
    code = re.search(r"```python\n(.*?)```", model_card(results, "mixture", "me/tiny"), re.DOTALL)[1]
    assert len(ast.parse(code).body) == 3
    assert hasattr(transformers, auto_class)
    assert f'{auto_class}.from_pretrained("me/tiny")' in code


def test_a_row_that_was_not_fine_tuned_reports_what_it_has(results):
    for each in results["rows"]:
        each["after"] = None
    card = model_card(results, "mixture")
    assert "0.1699 | - |" in card
    assert ModelCard(card).data.eval_results[0].metric_value == 0.1699


def test_a_row_of_a_transfer_alone_reports_what_it_came_to(results):
    for each in results["rows"]:
        each["after"] = None
    mixture = next(each for each in results["rows"] if each["label"] == "mixture")
    mixture |= {"recovery": {"tokens": 61440}, "recovered": {"accuracy": 0.7333, "macro_f1": 0.7222}}
    results["recipe"]["steps"] = 0
    card = model_card(results, "mixture")
    assert "| **mixture** | 0.1699 | 0.7333 | 0.1599 | 0.7222 |" in card
    assert ModelCard(card).data.eval_results[0].metric_value == 0.7333
    assert "Before and after attention transfer, without fine-tuning" in card and "after fine-tuning" not in card
    assert "own parameters learned their layers' dense attention on 61,440 tokens" in card
    assert "No fine-tuning, seed 7" in card and "these steps" not in card


def test_what_cannot_be_published_says_why(results):
    with pytest.raises(
        ValueError, match=r"no row is labelled 'linformre'; the labels are: 'dense', 'dense .eager.', 'zero"
    ):
        model_card(results, "linformre")
    with pytest.raises(ValueError, match=r"'zero attention' is a control row .* choose a variant: 'sliding_w"):
        model_card(results, "zero attention")
    with pytest.raises(ValueError, match=r"status 'diverged' .the loss became NaN."):
        model_card(results, "broken")
    del results["rows"]
    with pytest.raises(ValueError, match=r"these results have no 'rows'; .* results.json"):
        model_card(results, "mixture")


def test_results_are_left_as_they_were(results):
    before = copy.deepcopy(results)
    model_card(results, "mixture")
    assert results == before


def test_the_command_writes_the_card(results, tmp_path):
    app = typer.Typer()
    app.command()(main)
    source, card = tmp_path / "results.json", tmp_path / "model_cards" / "mixture.md"
    source.write_text(json.dumps(results))
    done = CliRunner().invoke(app, [str(source), "mixture", "-o", str(card), "--repo-id", "me/tiny"])
    assert done.exit_code == 0, done.output
    assert card.read_text() == model_card(results, "mixture", "me/tiny")

    refused = CliRunner().invoke(app, [str(source), "absent", "-o", str(tmp_path / "absent.md")])
    assert refused.exit_code != 0
    assert "mixture" in refused.output
    assert not (tmp_path / "absent.md").exists()
