"""The main job on a tiny model: examples/finetune.py from the command line's arguments to its report."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from examples import export_onnx, finetune, passkey, report, session  # noqa: E402
from examples.controls import remove_attention  # noqa: E402
from examples.data import Schedule, load_texts, tokenize  # noqa: E402
from examples.embedded import language_documents, source_documents  # noqa: E402
from examples.metrics import classification_scores, likelihood_scores  # noqa: E402
from examples.models import add_lora, fit_positions, load_tokenizer, make_base, merged, position_limit  # noqa: E402
from examples.objective import Objective  # noqa: E402
from examples.options import parse  # noqa: E402
from examples.rates import layerwise  # noqa: E402
from examples.recover import learning_layers  # noqa: E402
from examples.training import Recipe  # noqa: E402
from examples.variants import read_runs, with_controls  # noqa: E402
from hf_efficient_attn import patch_model, unpatch_model  # noqa: E402
from hf_efficient_attn.hosts import is_linear_map  # noqa: E402
from hf_efficient_attn.registry import get_config_class  # noqa: E402

ANIMALS = ("cat", "dog", "fish", "bird")


def sentences(count: int, seed: int) -> list[tuple[str, str]]:
    """(text, class): which animal is named most often."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        words = [ANIMALS[i] for i in torch.randint(4, (21,), generator=generator)]
        winner = max(ANIMALS, key=lambda animal: (words.count(animal), animal))
        rows.append((" ".join(["the", *words]), winner))
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Tiny models with their tokenizers, and data in every format."""
    root = tmp_path_factory.mktemp("tiny")
    texts = [text for text, _ in sentences(50, 0)]
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=special))
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    size = len(wrapped)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    bert = BertForMaskedLM(BertConfig(vocab_size=size, max_position_embeddings=64, pad_token_id=0, **shape))
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=size, n_positions=64, n_embd=16, n_layer=2, n_head=2))
    for name, model in (("bert", bert), ("gpt2", gpt2)):
        model.save_pretrained(root / name)
        wrapped.save_pretrained(root / name)
    data = root / "data"
    data.mkdir()
    for split, count, seed in (("train", 40, 1), ("test", 16, 2)):
        rows = [{"text": text, "label": label} for text, label in sentences(count, seed)]
        (data / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def arguments(folder: Path, output: Path, *more: str, model: str = "bert", task: str = "classification") -> list[str]:
    common = {
        "--model": folder / model,
        "--task": task,
        "--dataset": folder / "data",
        "--max-length": 24,
        "--max-steps": 4,
        "--batch-size": 4,
        "--output-dir": output,
    }
    flags = [str(part) for pair in common.items() for part in pair]
    return [*flags, "--cpu", "--quiet", *more]


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps one state for a process; every test begins its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def rows_of(results: dict) -> dict[str, dict]:
    return report.by_label(results)


# ------------------------------------------------------------------------------------------------------- the whole job


@pytest.fixture(scope="module")
def job(folder, tmp_path_factory) -> tuple[dict, Path]:
    """One whole run with dense, two variants, a hybrid's control and zero attention."""
    output = tmp_path_factory.mktemp("job") / "out"
    variants = folder / "variants.yaml"
    mixture = {"0": "block", "1": {"variant": "sliding_window", "window": 4}}
    variants.write_text(yaml.safe_dump({"mixture": mixture, "short": {"variant": "dense", "read_tokens": 8}}))
    results = finetune.main(
        arguments(folder, output, "--no-cost", "--variants", "flash", str(variants), "--save-models")
    )
    return results, output


def test_every_run_is_a_row_measured_before_and_after(job):
    results, output = job
    assert results == json.loads((output / "results.json").read_text())
    rows = rows_of(results)
    assert list(rows) == ["dense", "flash", "mixture", "short", "zero attention"]
    for row in rows.values():
        assert (row["status"], row["error"], row["cost"]) == ("ok", None, None)
        assert row["before"].keys() == row["after"].keys() == {"accuracy", "macro_f1", "matthews", "loss"}
        assert row["training"]["steps"] == len(row["training"]["losses"]) == 4
    assert [layer["variant"] for layer in rows["mixture"]["layers"]] == ["block", "sliding_window"]
    assert rows["mixture"]["layers"][1]["config"]["window"] == 4
    assert rows["short"]["training"]["tokens"] == 4 * 4 * 8


def test_runs_share_weights_seed_data_and_order(job):
    rows = rows_of(job[0])
    exact, dense, zero = rows["flash"], rows["dense"], rows["zero attention"]
    assert exact["before"]["loss"] == pytest.approx(dense["before"]["loss"], abs=1e-6)
    assert exact["training"]["losses"] == pytest.approx(
        dense["training"]["losses"], rel=0.2
    )  # dropout in the kernels differs
    assert zero["before"]["loss"] != pytest.approx(dense["before"]["loss"], abs=1e-6)
    assert zero["training"]["tokens"] == dense["training"]["tokens"]


def test_results_say_how_they_were_made(job, folder):
    results, _ = job
    assert results["schema"] == "hf_efficient_attn/finetune/1"
    assert results["command"].startswith("python examples/finetune.py --model ")
    assert results["versions"]["torch"] == torch.__version__
    assert results["seed"] == 0 and results["model"]["type"] == "bert"
    assert results["dataset"] | {"train_examples": 40, "eval_examples": 16, "split": "test"} == results["dataset"]
    assert results["recipe"]["examples_per_step"] == 4


def test_saved_models_are_the_fine_tuned_ones(job):
    import hf_efficient_attn

    model = AutoModelForSequenceClassification.from_pretrained(job[1] / "mixture" / "model")
    assert [layer.variant for layer in hf_efficient_attn.describe(model)] == ["block", "sliding_window"]
    assert not (job[1] / "zero_attention" / "model").exists()
    assert not (job[1] / "base").exists()


def test_another_run_is_not_overwritten(job, folder):
    before = (job[1] / "results.json").read_bytes()
    variants = ["--variants", "flash", str(folder / "variants.yaml")]
    with pytest.raises(
        ValueError, match="not empty: choose another --output-dir, or continue the run in it with --resume"
    ):
        finetune.main(arguments(folder, job[1], "--no-cost"))
    with pytest.raises(ValueError, match=r"had other arguments: .*learning_rate was 0.0001, is 0.5"):
        finetune.main(
            arguments(folder, job[1], "--no-cost", *variants, "--save-models", "--learning-rate", "0.5", "--resume")
        )
    assert (job[1] / "results.json").read_bytes() == before


def test_variants_can_be_added_to_a_run(folder, tmp_path):
    job, more = tmp_path / "out", ["--no-cost", "--controls", "zero", "--max-steps", "1"]
    first = finetune.main(arguments(folder, job, *more, "--variants", "flash"))
    both = finetune.main(arguments(folder, job, *more, "--variants", "block", "flash", "--resume"))
    assert [row["label"] for row in both["rows"]] == ["dense", "block", "flash", "zero attention"]
    assert [row for row in both["rows"] if row["label"] != "block"] == first["rows"]
    with pytest.raises(ValueError, match="had other arguments: variants was"):  # one left out
        finetune.main(arguments(folder, job, *more, "--variants", "block", "--resume"))


def test_variants_are_added_to_a_run_with_costs_and_keep_their_meaning(folder, tmp_path):
    job, file = tmp_path / "out", tmp_path / "v.yaml"
    more = ["--controls", "none", "--max-steps", "1", "--cost-repeats", "1", "--variants", str(file)]
    file.write_text(yaml.safe_dump({"mix": "block"}))
    first = finetune.main(arguments(folder, job, *more))
    both = finetune.main(arguments(folder, job, *more, "flash", "--resume"))
    assert [row["label"] for row in both["rows"]] == ["dense", "dense (eager)", "mix", "flash"]
    assert both["rows"][:3] == first["rows"] and both["rows"][3]["cost"]
    file.write_text(yaml.safe_dump({"mix": "linear"}))
    with pytest.raises(ValueError, match="had other arguments: runs was"):
        finetune.main(arguments(folder, job, *more, "flash", "--resume"))


def test_a_run_can_read_fewer_texts_at_a_time(folder, tmp_path):
    """The same steps from the same examples with less memory; the run after it reads all of them again."""
    file = tmp_path / "v.yaml"
    runs = {"few": {"variant": "dense", "micro_batch": 2}, "whole": {"variant": "dense"}}
    file.write_text(yaml.safe_dump(runs))
    more = ["--dropout", "0", "--controls", "none", "--cost-repeats", "1", "--cost-length", "64"]
    given = arguments(folder, tmp_path / "out", *more, "--variants", str(file), task="causal-lm", model="gpt2")
    rows = rows_of(finetune.main(given))
    dense, few, whole = (rows[label] for label in ("dense", "few", "whole"))
    assert whole["after"] == dense["after"] and whole["training"]["losses"] == dense["training"]["losses"]
    assert few["micro_batch"] == 2 and few["training"]["tokens"] == whole["training"]["tokens"] == 4 * 4 * 24
    assert few["training"]["losses"] == pytest.approx(whole["training"]["losses"], rel=1e-4)
    assert few["after"]["loss"] == pytest.approx(whole["after"]["loss"], rel=1e-4) != few["before"]["loss"]
    assert few["cost"]["batch_size"] == whole["cost"]["batch_size"] == 4
    assert few["cost"]["train_step"]["flops"] == whole["cost"]["train_step"]["flops"]
    for part in ("train_step", "inference"):
        assert few["cost"][part]["working_bytes"] < 0.75 * whole["cost"][part]["working_bytes"]
    file.write_text(yaml.safe_dump({"few": {"variant": "block", "micro_batch": 3}}))
    with pytest.raises(ValueError, match="micro_batch = 3 does not divide the 4 texts of a step"):
        finetune.main(arguments(folder, tmp_path / "other", "--variants", str(file)))
    assert not (tmp_path / "other").exists()


def test_costs_are_of_as_many_texts_or_refused(folder, tmp_path):
    file = tmp_path / "v.yaml"
    file.write_text(yaml.safe_dump({"few": {"variant": "block", "micro_batch": 4}}))
    given = arguments(folder, tmp_path / "out", "--variants", str(file), "--batch-size", "8", "--max-steps", "0")
    with pytest.raises(ValueError, match="micro_batch = 4 does not divide the 6 texts that costs are measured on"):
        finetune.main([*given, "--cost-batch-size", "6"])
    assert not (tmp_path / "out").exists()
    finetune.main([*given, "--cost-batch-size", "6", "--no-cost"])


def test_a_run_of_before_micro_batches_can_be_continued(folder, tmp_path):
    job, more = tmp_path / "out", ["--no-cost", "--controls", "none", "--max-steps", "1"]
    first = finetune.main(arguments(folder, job, *more, "--variants", "flash"))
    saved = json.loads((job / "arguments.json").read_text())
    for run in saved["runs"]:
        del run["micro_batch"]
    (job / "arguments.json").write_text(json.dumps(saved))
    both = finetune.main(arguments(folder, job, *more, "--variants", "flash", "block", "--resume"))
    assert both["rows"][:2] == first["rows"]


def test_gradients_that_are_not_clipped_train_as_those_below_the_limit(folder, tmp_path):
    losses = []
    for norm in ("0", "1e30"):
        more = ["--no-cost", "--controls", "none", "--max-grad-norm", norm]
        losses.append(finetune.main(arguments(folder, tmp_path / norm, *more))["rows"][0]["training"]["losses"])
    assert losses[0] == losses[1] and losses[0][-1] != losses[0][0]


def test_models_that_were_not_kept_cannot_be_pushed(job, folder, tmp_path):
    output, more = tmp_path / "out", ["--no-cost", "--controls", "none", "--max-steps", "1", "--variants", "flash"]
    finetune.main(arguments(folder, output, *more))
    before = (output / "results.json").read_bytes()
    with pytest.raises(ValueError, match="holds no models of flash, which ran without --save-models; leave out"):
        finetune.main(arguments(folder, output, *more, "block", "--resume", "--push-to-hub", "me/x"))
    assert (output / "results.json").read_bytes() == before and not (output / "base").exists()
    session.check_models(job[1])  # a run whose models were kept
    session.check_models(tmp_path / "new")


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_schedules(schedule):
    recipe = Recipe(11, 1, 1, 2.0, 0.0, 0.1, 1.0, 0, 0, schedule)
    rates = [recipe.rate(step) for step in range(11)]
    assert rates[:2] == pytest.approx([2.0, 2.0]) and rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[6] == pytest.approx({"linear": 1.0, "cosine": 1.0, "constant": 2.0}[schedule])
    quarter = {"linear": 0.6, "cosine": 2 * math.sin(math.pi / 2 * 0.3) ** 2, "constant": 2.0}[schedule]
    assert rates[8] == pytest.approx(quarter)


def test_arguments_that_an_older_run_does_not_know_have_their_defaults(job):
    written = json.loads((job[1] / "arguments.json").read_text())
    older = job[1].parent / "older"
    older.mkdir()
    (older / "arguments.json").write_text(json.dumps({k: v for k, v in written.items() if k != "layer_decay"}))
    session.check_folder(older, written, resume=True)
    with pytest.raises(ValueError, match=r"layer_decay was 1.0, is 0.5"):
        session.check_folder(older, {**written, "layer_decay": 0.5}, resume=True)


def test_fields_that_an_older_run_does_not_know_have_their_defaults(job):
    """Of variants' configs, one of all layers and one of some."""
    written = json.loads((job[1] / "arguments.json").read_text())
    block, window = (get_config_class(name)().to_dict() for name in ("block", "sliding_window"))
    runs = [
        {**written["runs"][0], "label": "a", "kind": "variant", "patch": {"config": block, "layers": None}},
        {**written["runs"][0], "label": "b", "kind": "variant", "patch": {"mapping": {"0": window, "1": block}}},
    ]
    written["runs"] = runs
    older = job[1].parent / "older_fields"
    older.mkdir()
    fewer = json.loads(json.dumps(written))
    del fewer["runs"][0]["patch"]["config"]["num_sinks"], fewer["runs"][1]["patch"]["mapping"]["0"]["global_tokens"]
    (older / "arguments.json").write_text(json.dumps(fewer))
    session.check_folder(older, written, resume=True)
    runs[0]["patch"]["config"]["num_sinks"] += 1
    with pytest.raises(ValueError, match="other arguments: runs was"):
        session.check_folder(older, written, resume=True)


def test_a_run_is_not_continued_on_other_texts(folder, tmp_path):
    """The same file with a line more, or with another class; a run that did not note its texts is continued."""
    file, job = tmp_path / "data.jsonl", tmp_path / "out"
    given = arguments(folder, job, "--no-cost", "--controls", "none", "--max-steps", "0", "--dataset", str(file))

    def write(rows: list[tuple[str, str]]) -> None:
        file.write_text("\n".join(json.dumps({"text": text, "label": label}) for text, label in rows))

    rows = sentences(20, 1)
    write(rows)
    first = finetune.main(given)
    relabelled = [(text, ANIMALS[ANIMALS.index(label) - 1]) for text, label in rows]
    for other in (sentences(21, 1), relabelled):
        write(other)
        with pytest.raises(ValueError, match=f"--resume: {file} no longer holds the texts that the run in {job} began"):
            finetune.main([*given, "--variants", "flash", "--resume"])
    saved = json.loads((job / "arguments.json").read_text())
    (job / "arguments.json").write_text(json.dumps({k: v for k, v in saved.items() if k != session.TEXTS}))
    finetune.main([*given, "--resume"])  # as an older one
    write(rows)
    with pytest.raises(ValueError, match="no longer holds the texts"):  # which it notes from then on
        finetune.main([*given, "--resume"])
    assert json.loads((job / "results.json").read_text())["rows"] == first["rows"]


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_lower_layers_learn_more_slowly(folder, name):
    kind = {"bert": AutoModelForMaskedLM, "gpt2": AutoModelForCausalLM}[name]
    model = kind.from_pretrained(folder / name)
    names = {id(p): n for n, p in model.named_parameters()}
    groups = [({names[id(p)] for p in group["params"]}, group["scale"]) for group in layerwise(model, 0.5)]
    assert sorted(n for group, _ in groups for n in group) == sorted(names.values())
    scales = {n: scale for group, scale in groups for n in group}
    layers = {n: int(n.split("layer." if name == "bert" else "h.")[1][0]) for n in scales if re.search(r"\.\d\.", n)}
    assert set(layers.values()) == {0, 1} and {scales[n] for n, layer in layers.items() if layer == 1} == {0.5}
    assert {scales[n] for n, layer in layers.items() if layer == 0} == {0.25}
    below = {n for n in scales if "embeddings" in n or "wte" in n or "wpe" in n}
    assert below and {scales[n] for n in below} == {0.125}
    assert {scale for n, scale in scales.items() if n not in layers and n not in below} == {1.0}
    assert [group["scale"] for group in layerwise(model, 1.0)] == [1.0]
    objective = Objective(model, "causal-lm", layer_decay=0.5)
    assert [g["scale"] for g in objective.parameter_groups()] == [scale for _, scale in groups]


def test_the_rate_of_a_group_is_scaled(folder, tmp_path, monkeypatch):
    """With a decay so steep that only the head learns, all else stays."""
    steep = ["--no-cost", "--variants", "flash", "--controls", "none", "--layer-decay", "1e-12", "--save-models"]
    finetune.main(arguments(folder, tmp_path / "out", *steep, "--weight-decay", "0"))
    learned = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "dense" / "model").state_dict()
    base = AutoModelForMaskedLM.from_pretrained(folder / "bert").state_dict()
    shared = [n for n in learned if n in base]
    assert len(shared) > 20 and all((learned[n] - base[n]).abs().max() < 1e-9 for n in shared)


def test_nothing_to_resume(folder, tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        finetune.main(arguments(folder, tmp_path / "absent", "--resume"))


@pytest.mark.parametrize(("model", "task"), [("bert", "classification"), ("gpt2", "causal-lm"), ("bert", "masked-lm")])
def test_a_resumed_run_equals_an_uninterrupted_one(folder, tmp_path, monkeypatch, model, task):
    from safetensors.torch import load_file

    more = [
        "--no-cost",
        "--controls",
        "none",
        "--save-models",
        "--checkpoint-every",
        "2",
        "--gradient-accumulation",
        "2",
    ]
    more += ["--variants", "linear", "--warm-start-steps", "1"]

    def run(output: str, *extra: str) -> dict:
        return finetune.main(arguments(folder, tmp_path / output, *more, *extra, model=model, task=task))

    whole = run("whole")
    rate, calls = Recipe.rate, []

    def interrupted(recipe: Recipe, step: int) -> float:
        calls.append(step)
        if step == 3 and calls.count(0) == 6:  # warm start, dense and variant, of two micro-batches each
            raise KeyboardInterrupt
        return rate(recipe, step)

    monkeypatch.setattr(Recipe, "rate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("parts")
    monkeypatch.setattr(Recipe, "rate", rate)
    assert (tmp_path / "parts" / "linear" / "checkpoint").is_dir()
    assert len(json.loads((tmp_path / "parts" / "results.json").read_text())["rows"]) == 1
    resumed = run("parts", "--resume")
    for one, other in zip(whole["rows"], resumed["rows"], strict=True):
        for row in (one, other):
            assert row["status"] == "ok"
            row["training"].pop("seconds")
        assert one == other
    weights = [load_file(tmp_path / name / "linear" / "model" / "model.safetensors") for name in ("whole", "parts")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not (tmp_path / "parts" / "linear" / "checkpoint").exists()


def test_a_warm_start_that_ended_before_its_weights_were_in_place_is_made_again(folder, tmp_path, monkeypatch):
    more = ["--no-cost", "--controls", "none", "--warm-start-steps", "3", "--learning-rate", "0.01", "--max-steps", "0"]
    whole = finetune.main(arguments(folder, tmp_path / "whole", *more))
    rename = Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        if (path / "warm_start.json").exists():
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finetune.main(arguments(folder, tmp_path / "parts", *more))
    monkeypatch.setattr(Path, "rename", rename)
    resumed = finetune.main(arguments(folder, tmp_path / "parts", *more, "--resume"))
    assert resumed["rows"] == whole["rows"]


@pytest.mark.parametrize("damage", ["foreign", "corrupt", "weights"])
def test_a_bad_checkpoint_is_a_row_that_says_so(folder, tmp_path, monkeypatch, damage):
    more = ["--no-cost", "--controls", "none", "--checkpoint-every", "1"]
    rate = Recipe.rate

    def interrupted(recipe: Recipe, step: int) -> float:
        if step == 2:
            raise KeyboardInterrupt
        return rate(recipe, step)

    monkeypatch.setattr(Recipe, "rate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finetune.main(arguments(folder, tmp_path / "out", *more))
    monkeypatch.setattr(Recipe, "rate", rate)
    checkpoint = tmp_path / "out" / "dense" / "checkpoint"
    state = json.loads((checkpoint / "progress.json").read_text())
    if damage == "foreign":
        (checkpoint / "progress.json").write_text(json.dumps(state | {"fingerprint": {"seed": 9}}))
    elif damage == "corrupt":
        (checkpoint / "progress.json").write_text("{")
    else:
        (checkpoint / "pytorch_model.bin").write_bytes(b"nothing")
    results = finetune.main(arguments(folder, tmp_path / "out", *more, "--resume"))
    (row,) = results["rows"]
    words = {"foreign": "belongs to another run", "corrupt": "is no checkpoint", "weights": "is damaged"}
    assert row["status"] == "failed" and words[damage] in row["error"]


def test_runs_that_fail_or_diverge_are_rows_and_stop_nothing(folder, tmp_path):
    variants = folder / "bad.yaml"
    variants.write_text(yaml.safe_dump({"no such layer": {"variant": "block", "layers": [7]}, "fine": "block"}))
    output = tmp_path / "out"
    results = finetune.main(
        arguments(
            folder,
            output,
            "--no-cost",
            "--variants",
            str(variants),
            "--learning-rate",
            "1e30",
            "--max-grad-norm",
            "1e30",
            "--checkpoint-every",
            "1",
        )
    )
    rows = rows_of(results)
    assert rows["no such layer"]["status"] == "failed" and "7" in rows["no such layer"]["error"]
    assert rows["fine"]["status"] == "diverged" and "at step" in rows["fine"]["error"]
    kept = Path(rows["fine"]["error"].split("its last checkpoint is ")[1])
    assert all(x.isfinite().all() for x in torch.load(next(kept.glob("*model.bin")), weights_only=True).values())
    assert rows["fine"]["before"] and rows["fine"]["after"] is None
    text = (output / "report.md").read_text()
    assert "fine (diverged)" in text and "- no such layer failed: " in text


@pytest.mark.parametrize(("model", "task"), [("bert", "masked-lm"), ("gpt2", "causal-lm"), ("gpt2", "classification")])
def test_tasks_with_lora_checkpointing_and_bf16(folder, tmp_path, model, task):
    targets = {"bert": ["query", "value"], "gpt2": ["c_attn"]}[model]
    results = finetune.main(
        arguments(
            folder,
            tmp_path / "out",
            *(
                "--no-cost",
                "--variants",
                "block",
                "--save-models",
                "--mixed-precision",
                "bf16",
                "--gradient-checkpointing",
            ),
            *("--lora-rank", "2", "--lora-targets", *targets, "--max-eval-samples", "4", "--max-train-samples", "6"),
            model=model,
            task=task,
        )
    )
    rows = rows_of(results)
    for row in rows.values():
        assert row["status"] == "ok", row["error"]
        assert 0 < row["parameters_trained"] < results["model"]["parameters"] / 2
    assert results["dataset"]["eval_examples"] == 4 and results["dataset"]["train_examples"] == 6
    if task != "classification":
        row = rows["dense"]["before"]
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]), rel=1e-4)
        assert ("bits_per_byte" in row) == (task == "causal-lm")
    saved = (tmp_path / "out" / "block" / "model" / "config.json").read_text()
    assert "efficient_" in saved


@pytest.mark.parametrize(
    ("model", "variant"),
    [("bert", "linformer"), ("gpt2", "moe"), ("bert", {"0-": ["hedgehog", {"variant": "moe", "num_experts": 2}]})],
)
def test_all_linear_is_what_peft_means_and_leaves_the_variant_whole(folder, model, variant):
    """Adapters on all of the model's maps but its head; what the variant added trains as it is, with no adapter on it."""
    name, task = str(folder / model), "classification" if model == "bert" else "causal-lm"
    base = make_base(name, task, load_tokenizer(name), labels=[*"abcd"], max_length=24, extend=False, seed=0)
    before = set(base.state_dict())
    patch_model(base, variant)
    added = [n for n, _ in base.named_parameters() if n not in before]
    tuned = add_lora(base, task, 2, ["all-linear"], added)
    adapted = {
        n.partition(".lora_A")[0].removeprefix("base_model.model.")
        for n, _ in tuned.named_parameters()
        if "lora_A" in n
    }
    plain = make_base(name, task, load_tokenizer(name), labels=[*"abcd"], max_length=24, extend=False, seed=0)
    maps = {n for n, x in plain.named_modules() if is_linear_map(type(x)) and n not in ("classifier", "lm_head")}
    served = {
        n
        for n in maps
        if variant != "linformer" and re.search(r"intermediate.dense|\d.output.dense|c_fc|mlp.c_proj", n)
    }
    assert adapted == maps - served and (served or variant == "linformer")
    trained = {n.removeprefix("base_model.model.") for n, p in tuned.named_parameters() if p.requires_grad}
    assert added and set(added) <= trained
    ids = torch.randint(5, 9, (2, 24), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1]) if task == "classification" else ids
    tuned.train()(input_ids=ids, labels=labels).loss.backward()
    saved = merged(tuned)
    assert not any("lora" in n for n in saved.state_dict()) and set(added) <= set(saved.state_dict())


@pytest.mark.slow
def test_a_launch_with_two_processes_and_costs(folder, tmp_path):
    output = tmp_path / "out"
    launch = [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--standalone",
    ]  # as accelerate launch does on a GPU machine
    command = [sys.executable, *launch, str(ROOT / "examples" / "finetune.py")]
    command += arguments(
        folder,
        output,
        "--variants",
        "block",
        "--trackers",
        "tensorboard",
        "--cost-repeats",
        "1",
        model="gpt2",
        task="causal-lm",
    )
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((output / "results.json").read_text())
    rows = rows_of(results)
    assert list(rows) == ["dense", "dense (eager)", "block", "zero attention"]
    assert results["recipe"]["examples_per_step"] == 8 and "2 processes" in results["device"]
    for label, row in rows.items():
        assert row["status"] == "ok" and row["cost_error"] is None, row
        assert row["cost"]["length"] == 24 and row["cost"]["cache_bytes_per_sequence"] > 0
        assert (row["after"] is None) == (label == "dense (eager)")
    dense, zero = (rows[label]["cost"]["train_step"] for label in ("dense", "zero attention"))
    assert dense["flops"] > zero["flops"] and dense["working_bytes"] > zero["working_bytes"]
    assert (output / "pareto.png").stat().st_size > 10_000
    assert "What attention itself costs" in (output / "report.md").read_text()
    assert list(output.rglob("events.out.tfevents*"))


@pytest.mark.slow
def test_two_processes_read_what_one_does_and_agree_on_a_folder(folder, tmp_path):
    """Texts of many lengths, which are padded otherwise; processes that begin in different seconds."""
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "test"):
        rows = [{"text": " ".join(ANIMALS[:2] * (1 + 5 * i % 11)), "label": "ab"[i % 2]} for i in range(16)]
        (data / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    skewed = tmp_path / "skewed.py"
    skewed.write_text(
        f"import os, sys, time\nsys.path.insert(0, {str(ROOT)!r})\nfrom examples import finetune\n"
        "time.sleep(1.1 * int(os.environ['RANK']))\nfinetune.main()\n"
    )
    flags = arguments(folder, tmp_path / "one", "--no-cost", "--controls", "none", "--dataset", str(data))
    one = finetune.main([*flags, "--max-steps", "2", "--batch-size", "8", "--dropout", "0"])
    place = flags.index("--output-dir")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(skewed)]
    command += [*flags[:place], *flags[place + 2 :], "--max-steps", "2", "--dropout", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "runs").rglob("results.json")
    for row, other in zip(one["rows"], json.loads(file.read_text())["rows"], strict=True):
        assert other["status"] == "ok", other["error"]
        assert row["training"]["tokens"] == other["training"]["tokens"]
        assert row["training"]["losses"] == pytest.approx(other["training"]["losses"], abs=1e-5)
    read = tokenize(
        load_texts(str(data), "classification").train, [0] * 16, AutoTokenizer.from_pretrained(folder / "bert"), 24
    )
    assert one["rows"][0]["training"]["tokens"] == read.tokens  # each text once


def test_the_dense_limit_trains_like_dense_over_two_lengths(folder, tmp_path):
    """Zero steps: only measured, and perplexity is the dense model's wherever the window covers the text."""
    variants = folder / "limits.yaml"
    limits = {
        "wide": {"variant": "sliding_window", "window": 24},
        "narrow": {"variant": "sliding_window", "window": 2, "num_sinks": 0},
    }
    variants.write_text(yaml.safe_dump(limits))
    more = ["--no-cost", "--controls", "none", "--variants", str(variants), "--max-steps", "0"]
    rows = rows_of(finetune.main(arguments(folder, tmp_path / "out", *more, model="gpt2", task="causal-lm")))
    dense = rows["dense"]["before"]["perplexity"]
    assert rows["wide"]["before"]["perplexity"] == pytest.approx(dense, rel=1e-5)
    assert rows["narrow"]["before"]["perplexity"] != pytest.approx(dense, rel=1e-5)
    assert all(row["after"] is None and row["training"] is None for row in rows.values())


@pytest.fixture(scope="module")
def peaked(folder, tmp_path_factory) -> Path:
    """The models with larger weights, so that attention is not flat, on the same data."""
    root = tmp_path_factory.mktemp("peaked")
    (root / "data").symlink_to(folder / "data")
    for name, kind in (("bert", AutoModelForMaskedLM), ("gpt2", AutoModelForCausalLM)):
        model = kind.from_pretrained(folder / name)
        for parameter in model.parameters():
            parameter.data *= 10 if parameter.ndim == 2 else 1
        model.save_pretrained(root / name)
        AutoTokenizer.from_pretrained(folder / name).save_pretrained(root / name)
    return root


@pytest.mark.parametrize(("model", "task"), [("gpt2", "causal-lm"), ("bert", "classification"), ("bert", "masked-lm")])
def test_recovery_brings_attention_nearer_to_dense(peaked, tmp_path, model, task):
    variants = peaked / "recover.yaml"
    small = {
        "variant": "linformer",
        "rank": 4,
        "max_length": 24,
        "segment_size": 4,
        "num_sinks": 1,
        "exact_segments": 0,
    }
    variants.write_text(yaml.safe_dump({"learns": small, "cannot": {"variant": "block", "block_size": 4}}))
    more = ["--no-cost", "--variants", str(variants), "--max-steps", "2", "--warm-start-steps", "2"]
    more += ["--recover", str(30 * 4 * 24), "--recover-learning-rate", "0.1", "--distill", "0.5"]
    rows = rows_of(finetune.main(arguments(peaked, tmp_path / "out", *more, model=model, task=task)))
    learns, cannot = rows["learns"]["recovery"], rows["cannot"]["recovery"]
    assert learns["steps"] == 30 and learns["losses"][-1] < 0.9 * learns["losses"][0]
    assert [error["variant"] for error in learns["errors"]] == ["linformer"] * 2 and learns["undone"] == []
    assert all(b["error"] < 0.9 * a["error"] for a, b in zip(learns["errors_before"], learns["errors"], strict=True))
    assert rows["learns"]["recovered"]["loss"] != rows["learns"]["before"]["loss"]
    assert cannot["tokens"] == 0 and "no parameters to train" in cannot["note"]
    assert rows["cannot"]["recovered"] == rows["cannot"]["before"]
    assert all(row["status"] == "ok" and row["after"] for row in rows.values()), [row["error"] for row in rows.values()]
    assert rows["dense"]["recovery"] is None
    written = (tmp_path / "out" / "report.md").read_text()
    assert "## Attention transfer" in written and "no parameters to train" in written
    assert not list((tmp_path / "out").rglob("recovered-*.pt"))


def test_two_processes_recover_as_one_does(peaked, tmp_path):
    """The transfer's losses and errors are those of one process with batches twice as large."""
    variants = peaked / "two.yaml"
    small = {"variant": "linformer", "rank": 4, "max_length": 24, "segment_size": 4, "num_sinks": 1}
    variants.write_text(yaml.safe_dump({"learns": small}))
    more = ["--controls", "none", "--no-cost", "--variants", str(variants), "--max-steps", "2", "--cpu"]
    more += ["--recover", str(6 * 8 * 24), "--recover-blocks", "1", "--distill", "0.5", "--gradient-checkpointing"]
    launch = [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--standalone",
        str(ROOT / "examples" / "finetune.py"),
    ]
    asked = arguments(peaked, tmp_path / "two", *more, "--batch-size", "4", model="gpt2", task="causal-lm")
    done = subprocess.run(
        [sys.executable, *launch, *asked], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    asked = arguments(peaked, tmp_path / "one", *more, "--batch-size", "8", model="gpt2", task="causal-lm")
    one = finetune.main(asked)
    for ours, theirs in zip(rows_of(two).values(), rows_of(one).values(), strict=True):
        assert ours["status"] == "ok", ours["error"]
        assert ours["after"]["loss"] == pytest.approx(theirs["after"]["loss"], rel=1e-3)
    ours, theirs = (rows_of(results)["learns"]["recovery"] for results in (two, one))
    assert ours["steps"] == theirs["steps"] == 12 and ours["tokens"] == theirs["tokens"]
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=0.05)  # a relative error of each half, or of the whole
    assert all(b["error"] < a["error"] for a, b in zip(ours["errors_before"], ours["errors"], strict=True))


def test_a_transfer_without_fine_tuning_leaves_a_model(peaked, tmp_path):
    """The one that `recovered` was measured on; and it can be pushed."""
    variants, out = peaked / "kept.yaml", tmp_path / "out"
    small = {
        "variant": "linformer",
        "rank": 4,
        "max_length": 24,
        "segment_size": 4,
        "num_sinks": 1,
        "exact_segments": 0,
    }
    variants.write_text(yaml.safe_dump({"learns": small}))
    more = ["--no-cost", "--controls", "zero", "--variants", str(variants), "--max-steps", "0", "--save-models"]
    more += ["--recover", str(30 * 4 * 24), "--recover-learning-rate", "0.1"]
    results = finetune.main(arguments(peaked, out, *more, model="gpt2", task="causal-lm"))
    row = rows_of(results)["learns"]
    assert row["status"] == "ok" and row["after"] is None and row["recovery"]["undone"] == []
    losses = {}
    for label in ("learns", "dense"):
        model = AutoModelForCausalLM.from_pretrained(out / label / "model").eval()
        data = load_texts(str(peaked / "data"), "causal-lm")
        rows = tokenize(data.test, None, AutoTokenizer.from_pretrained(out / label / "model"), 24).rows
        with torch.no_grad():
            ids = torch.tensor([row["input_ids"] for row in rows])
            losses[label] = float(model(ids, labels=ids).loss)
    assert losses["learns"] == pytest.approx(row["recovered"]["loss"], rel=1e-6)
    assert row["before"]["loss"] != pytest.approx(row["recovered"]["loss"], rel=1e-5)
    assert losses["dense"] == pytest.approx(rows_of(results)["dense"]["before"]["loss"], rel=1e-6)
    assert not (out / "zero_attention").exists()
    assert [row["label"] for row in session.rows_to_push(results["rows"])] == ["learns"]


def test_layers_learn_block_by_block(peaked, tmp_path):
    variants = peaked / "blocks.yaml"
    small = {
        "variant": "linformer",
        "rank": 4,
        "max_length": 24,
        "segment_size": 4,
        "num_sinks": 1,
        "exact_segments": 0,
    }
    variants.write_text(yaml.safe_dump({"learns": small}))
    more = ["--no-cost", "--controls", "none", "--variants", str(variants), "--max-steps", "0"]
    more += ["--recover", str(20 * 4 * 24), "--recover-learning-rate", "0.1", "--recover-blocks", "1"]
    rows = rows_of(finetune.main(arguments(peaked, tmp_path / "out", *more, model="gpt2", task="causal-lm")))
    found = rows["learns"]["recovery"]
    assert found["steps"] == len(found["losses"]) == 40 and found["tokens"] == 40 * 4 * 24
    for before, after in zip(found["errors_before"], found["errors"], strict=True):
        assert before["layer"] == after["layer"] and after["error"] < before["error"]
    assert found["losses"][19] < found["losses"][0] and found["losses"][39] < found["losses"][20]


LAYERWISE = {"variant": "linformer", "rank": 4, "max_length": 24, "sharing": "layerwise"}


@pytest.mark.parametrize(
    ("variants", "layers"),
    [
        ({"0-": {**LAYERWISE, "sharing": "headwise"}}, [[0], [1]]),
        ({"0-": LAYERWISE}, [[0, 1]]),
        ({"0-": {"variant": "combined", "parts": [[LAYERWISE, 1], [{"variant": "block"}, 1]]}}, [[0, 1]]),
        ({"0": LAYERWISE, "1": "block"}, [[0]]),
        ({"0": "block", "1": "hedgehog"}, [[1]]),
        ({"0-": "block"}, []),
        ({"0-": "moe"}, []),
        ({"0-": "moe", "0": "hedgehog"}, [[0]]),
    ],
)
def test_layers_that_read_what_another_owns_learn_with_it(folder, variants, layers):
    model = AutoModelForMaskedLM.from_pretrained(folder / "bert")
    assert learning_layers(patch_model(model, variants)) == layers


@pytest.mark.parametrize("blocks", ["0", "1"])
def test_a_matrix_of_all_layers_learns_from_all(peaked, tmp_path, monkeypatch, blocks):
    variants, asked = peaked / "shared.yaml", []
    variants.write_text(yaml.safe_dump({"shared": LAYERWISE}))
    original = finetune.attention_transfer

    def transfer(model, block):
        asked.append(block)
        return original(model, block)

    monkeypatch.setattr(finetune, "attention_transfer", transfer)
    more = ["--no-cost", "--controls", "none", "--variants", str(variants), "--max-steps", "0"]
    more += ["--recover", str(30 * 4 * 24), "--recover-learning-rate", "0.1", "--recover-blocks", blocks]
    row = rows_of(finetune.main(arguments(peaked, tmp_path / "out", *more, task="masked-lm")))["shared"]
    assert asked == [[0, 1]] and row["status"] == "ok", row["error"]
    found = row["recovery"]
    before, after = (sum(error["error"] for error in found[name]) for name in ("errors_before", "errors"))
    assert found["steps"] == 30 and after < 0.9 * before and found["undone"] == []


def test_layers_of_one_matrix_go_back_together(peaked, tmp_path):
    variants = peaked / "torn.yaml"
    variants.write_text(yaml.safe_dump({"torn": LAYERWISE}))
    more = ["--no-cost", "--controls", "none", "--variants", str(variants), "--max-steps", "0"]
    more += ["--recover", str(2 * 4 * 24), "--recover-learning-rate", "100"]
    found = rows_of(finetune.main(arguments(peaked, tmp_path / "out", *more, task="masked-lm")))["torn"]["recovery"]
    assert found["undone"] == [0, 1] and found["errors"] == found["errors_before"]


def test_a_model_whose_attention_is_not_patched_has_nothing_to_recover(folder, tmp_path):
    more = ["--no-cost", "--controls", "none", "--variants", "moe", "--recover", "100", "--distill", "0.5"]
    row = rows_of(finetune.main(arguments(folder, tmp_path / "out", *more)))["moe"]
    assert row["status"] == "ok", row["error"]
    assert row["recovery"]["tokens"] == 0 and "no parameters to train" in row["recovery"]["note"]
    assert row["recovered"] == row["before"] and row["after"]


@pytest.mark.parametrize("stops", ["transfer_block", "fit_for_training"])
def test_a_continued_recovery_has_what_no_gradient_moves(folder, tmp_path, monkeypatch, stops):
    """The thresholds of mixture_of_depths, stopped before the second layer learns or after both have."""
    from safetensors.torch import load_file

    variants = tmp_path / "v.yaml"
    variants.write_text(yaml.safe_dump({"router": {"variant": "mixture_of_depths", "capacity": 0.5, "decay": 0.5}}))
    more = ["--no-cost", "--controls", "none", "--variants", str(variants), "--save-models"]
    more += ["--recover", str(10 * 4 * 24), "--recover-blocks", "1"]

    def run(output: str, *extra: str) -> dict:
        return finetune.main(arguments(folder, tmp_path / output, *more, *extra, model="gpt2", task="causal-lm"))

    whole = run("whole")
    assert rows_of(whole)["router"]["recovery"]["undone"] == []
    calls, original = [], getattr(finetune, stops)

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:  # the second layer's; dense's and the variant's
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(finetune, stops, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("parts")
    monkeypatch.setattr(finetune, stops, original)
    resumed = run("parts", "--resume")
    for one, other in zip(whole["rows"], resumed["rows"], strict=True):
        for row in (one, other):
            assert row["status"] == "ok", row["error"]
            row["training"].pop("seconds")
            (row["recovery"] or {}).pop("seconds", None)
        assert one == other
    weights = [load_file(tmp_path / name / "router" / "model" / "model.safetensors") for name in ("whole", "parts")]
    assert sum("threshold" in name for name in weights[0]) == 2
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("more", [(), ("--lora-rank", "2", "--lora-targets", "c_attn")])
def test_a_run_goes_on_from_a_checkpoint_made_after_its_recovery(folder, tmp_path, monkeypatch, more):
    more = ["--no-cost", "--controls", "none", "--variants", "linformer", "--checkpoint-every", "2", *more]
    more += ["--recover", str(10 * 4 * 24), "--recover-blocks", "1"]

    def run(output: str, *extra: str) -> dict:
        return finetune.main(arguments(folder, tmp_path / output, *more, *extra, model="gpt2", task="causal-lm"))

    whole = run("whole")
    rate, calls = Recipe.rate, []

    def interrupted(recipe: Recipe, step: int) -> float:
        calls.append(recipe.steps)
        if step == 3 and calls.count(4) == 8:  # the variant's last step of fine-tuning
            raise KeyboardInterrupt
        return rate(recipe, step)

    monkeypatch.setattr(Recipe, "rate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("parts")
    monkeypatch.setattr(Recipe, "rate", rate)
    resumed = run("parts", "--resume")
    for one, other in zip(whole["rows"], resumed["rows"], strict=True):
        assert other["status"] == "ok", other["error"]
        assert one["training"]["losses"] == other["training"]["losses"] and one["after"] == other["after"]


@pytest.mark.parametrize("rate", ["2", "4", "100"])
def test_a_layer_that_got_worse_goes_back(peaked, tmp_path, rate):
    """Some of its way, where that is better than where it began."""
    variants = peaked / "worse.yaml"
    small = {"variant": "linformer", "rank": 4, "max_length": 24, "segment_size": 4, "num_sinks": 1}
    variants.write_text(yaml.safe_dump({"torn": small}))
    more = ["--no-cost", "--controls", "none", "--variants", str(variants), "--max-steps", "0"]
    more += ["--recover", str(2 * 4 * 24), "--recover-learning-rate", rate]
    rows = rows_of(finetune.main(arguments(peaked, tmp_path / "out", *more, model="gpt2", task="causal-lm")))
    found = rows["torn"]["recovery"]
    if rate == "100":
        assert found["undone"] == [0, 1] and found["errors"] == found["errors_before"] and found["shortened"] == []
        assert rows["torn"]["recovered"] == rows["torn"]["before"]
    else:
        assert found["undone"] == [] and found["shortened"] == [0, 1]
        for before, after in zip(found["errors_before"], found["errors"], strict=True):
            assert after["error"] < 0.85 * before["error"]


def test_the_teacher_of_a_classifier_has_the_head_that_is_trained(folder):
    """Under adapters peft keeps the first one beside it, of which nobody has ever asked anything."""
    name = str(folder / "bert")
    base = make_base(
        name, "classification", load_tokenizer(name), labels=[*"abcd"], max_length=24, extend=False, seed=0, dropout=0.0
    )
    model = add_lora(patch_model(base, "flash"), "classification", 2, ["query"], [])
    for part, parameter in model.named_parameters():
        if part.endswith("classifier.modules_to_save.default.bias"):
            parameter.data = torch.tensor([5.0, 0.0, 0.0, 0.0])
    ids = torch.randint(5, 9, (3, 24), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 2])}
    losses = [float(Objective(model, "classification", distill=w).train()(batch)["loss"]) for w in (0.0, 1.0)]
    assert losses[0] > 1.0 and abs(losses[1] - losses[0]) < 1e-5  # an exact variant, adapters as they begin


def test_distillation_pulls_the_loss_towards_the_dense_model(folder, tmp_path):
    """On the same batch: the objective's loss is the task's plus the divergence, which is zero for an exact variant."""
    model = GPT2LMHeadModel.from_pretrained(folder / "gpt2", attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
    batch = {"input_ids": torch.randint(5, 9, (3, 24)), "n_bytes": torch.tensor([90, 90, 90])}
    losses = {}
    for variant, hyper in (("flash", {}), ("block", {"block_size": 4, "num_sinks": 0})):
        patch_model(model, variant, **hyper)
        for weight in (0.0, 2.0):
            losses[variant, weight] = float(Objective(model.eval(), "causal-lm", distill=weight).train()(batch)["loss"])
        model.eval()
        losses[variant, "eval"] = float(Objective(model, "causal-lm", distill=2.0).eval()(batch)["loss"])
        unpatch_model(model)
    assert losses["flash", 2.0] == pytest.approx(losses["flash", 0.0], abs=1e-5)
    assert losses["block", 2.0] > losses["block", 0.0] + 1e-6
    assert losses["block", "eval"] == pytest.approx(losses["block", 0.0], abs=1e-5)


# ------------------------------------------------------------------------------------------------------------ its parts


def test_quantised_weights_under_adapters(folder, tmp_path, monkeypatch):
    """In 8 bits: on a CPU bitsandbytes packs 4 for reading alone once they were read."""
    pytest.importorskip("bitsandbytes")
    from examples import cost

    seen, fit = [], finetune.fit_for_training
    monkeypatch.setattr(finetune, "fit_for_training", lambda *args: seen.append(args[1]) or fit(*args))
    given = (
        "--variants",
        "hedgehog",
        "--recover",
        "192",
        "--lora-rank",
        "2",
        "--lora-targets",
        "c_attn",
        "--bits",
        "8",
    )
    given += ("--no-cost", "--save-models")
    rows = rows_of(finetune.main(arguments(folder, tmp_path / "out", *given, model="gpt2", task="causal-lm")))
    assert all("Linear8bitLt" in {type(x).__name__ for x in model.modules()} for model in seen)
    assert [row["status"] for row in rows.values()] == ["ok"] * len(rows)
    assert rows["hedgehog"]["recovery"]["tokens"] > 0
    assert rows["hedgehog"]["after"]["loss"] < rows["hedgehog"]["before"]["loss"]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "hedgehog" / "model")
    assert saved.config.efficient_attention and saved.config.quantization_config
    measured = cost.measure(cost_job(folder, lora_rank=2, lora_targets=["c_attn"], bits=8))
    assert measured["train_step"]["peak_bytes"] > 0
    with pytest.raises(SystemExit):
        finetune.main(arguments(folder, tmp_path / "other", "--bits", "8"))


def cost_job(folder: Path, **changes) -> dict:
    job = {"base": str(folder / "gpt2"), "task": "causal-lm", "patch": None, "attention": "sdpa", "batch_size": 2}
    job |= {"accumulation": 1, "length": 96, "mixed_precision": "no", "gradient_checkpointing": False, "lora_rank": 0}
    return (
        job | {"lora_targets": None, "bits": None, "chunk_size": 16, "repeats": 1, "seed": 0, "device": "cpu"} | changes
    )


def test_measuring_process_measures_and_reports_failure(folder):
    from examples.cost import CostFailed, measure_in_own_process

    job = cost_job(folder)
    cost = measure_in_own_process(job)
    assert (cost["batch_size"], cost["length"]) == (2, 96)  # beyond the 64 positions, which are extended
    assert cost["cache_bytes_per_sequence"] == 2 * 2 * 96 * 16 * 4
    assert cost["train_step"]["peak_bytes"] > cost["inference"]["peak_bytes"]
    assert cost["process_peak_bytes"] > 50 * 2**20
    with pytest.raises(CostFailed, match="absent"):
        measure_in_own_process(job | {"base": "/absent"})


def test_zero_attention_leaves_nothing_of_other_tokens():
    model = BertForMaskedLM(
        BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    ).eval()
    ids = torch.arange(10)[None]
    changed = ids.clone()
    changed[0, 0] = 15
    with torch.no_grad():
        assert not torch.equal(model(ids).logits[0, 1:], model(changed).logits[0, 1:])
        remove_attention(model)
        assert torch.equal(model(ids).logits[0, 1:], model(changed).logits[0, 1:])
    model.train()(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "query" in name or "value" in name)


def test_chunked_loss_equals_the_models_own_and_holds_less():
    from hf_efficient_attn.losses import causal_lm_losses, chunked_cross_entropy, has_plain_head
    from hf_efficient_attn.measuring import peak_memory

    config = GPT2Config(
        vocab_size=5000, n_positions=64, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    model = GPT2LMHeadModel(config)
    ids = torch.randint(5000, (2, 64))
    assert has_plain_head(model, ids)

    def chunked() -> torch.Tensor:
        losses, predicted = causal_lm_losses(model, ids, chunk_size=7)
        return losses.sum() / predicted.sum()

    def whole() -> torch.Tensor:
        return model(ids, labels=ids).loss

    gradients = []
    for loss in (chunked, whole):
        model.zero_grad()
        loss().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert chunked().item() == pytest.approx(whole().item(), rel=1e-5)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    logits = 2 * 63 * 5000 * 4
    model.zero_grad()
    assert peak_memory(lambda: whole().backward()) > 2 * logits
    model.zero_grad()
    assert peak_memory(lambda: chunked().backward()) < logits

    padded = torch.ones_like(ids)
    padded[0, :10] = 0
    _, predicted = causal_lm_losses(model, ids, padded)
    assert predicted.sum() == 63 + 53
    with pytest.raises(ValueError, match="at least 1 position"):
        chunked_cross_entropy(torch.zeros(2, 3), torch.nn.Identity(), torch.zeros(2, dtype=torch.long), 0)
    with pytest.raises(ValueError, match="flatten the batch"):
        chunked_cross_entropy(torch.zeros(2, 3, 4), torch.nn.Identity(), torch.zeros(2, 3, dtype=torch.long))


def test_a_head_that_does_not_learn_is_applied_once():
    """Losses and gradients of hidden states are those of a head that learns, whatever each loss is weighed by."""
    from hf_efficient_attn.losses import IGNORED, chunked_cross_entropy
    from hf_efficient_attn.recovery import distillation_losses

    head = torch.nn.Linear(16, 50, bias=False)
    labels = torch.randint(50, (20,))
    labels[3] = IGNORED
    teacher, weights = torch.randn(20, 16), torch.rand(20)
    calls: list[int] = []
    head.register_forward_hook(lambda *_: calls.append(1))
    for losses, of_teacher in ((chunked_cross_entropy, 0), (distillation_losses, 3)):
        found = []
        for learns in (True, False):
            head.requires_grad_(learns)
            hidden = torch.randn(20, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
            given = (hidden, head, labels) if losses is chunked_cross_entropy else (hidden, teacher, head)
            calls.clear()
            values = losses(*given, chunk_size=7)
            (values * weights).sum().backward()
            found.append((values.detach(), hidden.grad))
            assert len(calls) == (6 + 2 * of_teacher if learns else 3 + of_teacher)
        torch.testing.assert_close(*found)
        assert not found[0][1][4].equal(torch.zeros(16))


def test_a_model_that_caps_its_logits_is_not_chunked():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    from hf_efficient_attn.losses import has_plain_head

    config = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    ids = torch.arange(20)[None]
    for cap, plain in ((0.01, False), (None, True)):
        model = Gemma2ForCausalLM(
            Gemma2Config(**config, num_key_value_heads=1, head_dim=8, final_logit_softcapping=cap)
        )
        assert has_plain_head(model, ids) is plain


def test_metrics_are_what_they_are_called():
    found = classification_scores([0, 1, 1, 2], [0, 1, 2, 2])
    assert found["accuracy"] == 0.75
    assert found["macro_f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert found["matthews"] == pytest.approx((3 * 4 - 5) / math.sqrt((16 - 6) * (16 - 6)))
    likelihood = likelihood_scores([math.log(8), math.log(2)], [1, 1], [4, 4])
    assert likelihood == {"perplexity": pytest.approx(4), "bits_per_byte": pytest.approx(0.5)}
    assert likelihood_scores([1e6], [1], None) == {"perplexity": math.inf}


def test_schedule_is_a_function_of_the_seed_and_masks_evenly(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "bert")
    examples = tokenize([text for text, _ in sentences(30, 3)], None, tokenizer, 20)
    assert all(len(row["input_ids"]) == 20 for row in examples.rows)
    one, same, other = (Schedule(examples, 70, seed, tokenizer, masked=True) for seed in (0, 0, 1))
    assert [one[i] for i in range(70)] == [same[i] for i in range(70)]
    assert one.order != other.order
    n = len(examples.rows)
    assert sorted(one.order[:n]) == list(range(n)) and one.order[:n] != one.order[n : 2 * n]
    for position in range(70):
        row, original = one[position], examples.rows[one.order[position]]["input_ids"]
        chosen = [i for i, label in enumerate(row["labels"]) if label != -100]
        assert len(chosen) == 3 and all(row["labels"][i] == original[i] for i in chosen)
        assert all(row["input_ids"][i] == original[i] for i in range(20) if i not in chosen)


def test_embedded_text_is_there_and_splits_do_not_share_documents():
    documents = language_documents()
    assert sum(map(len, documents["train"])) > 500_000 and sum(map(len, documents["test"])) > 50_000
    assert not set(documents["train"]) & set(documents["test"])
    rows = source_documents()
    for split, least in (("train", 150), ("test", 50)):
        assert len(rows[split]) >= least
        assert {row["label"] for row in rows[split]} == set(range(6))
        assert not any("asyncio" in row["text"] or "\nimport " in row["text"] for row in rows[split])
    assert not {row["text"] for row in rows["train"]} & {row["text"] for row in rows["test"]}


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl", "parquet", "txt"])
def test_local_files_of_every_kind(tmp_path, kind):
    import pandas

    rows = [{"text": text, "label": label} for text, label in sentences(20, 0)]
    frame = pandas.DataFrame(rows)
    file = tmp_path / f"data.{kind}"
    writers = {
        "csv": lambda: frame.to_csv(file, index=False),
        "json": lambda: frame.to_json(file, orient="records"),
        "jsonl": lambda: frame.to_json(file, orient="records", lines=True),
        "parquet": lambda: frame.to_parquet(file),
        "txt": lambda: file.write_text("\n\n".join(frame["text"])),
    }
    writers[kind]()
    task = "causal-lm" if kind == "txt" else "classification"
    texts = load_texts(str(file), task)
    assert (len(texts.train), len(texts.test)) == ((1, 1) if kind == "txt" else (18, 2))
    if kind != "txt":
        assert texts.labels == sorted(set(frame["label"][frame["text"].isin(texts.train)]))


def test_gzipped_text_in_a_folder(tmp_path):
    import gzip

    for split in ("train", "validation"):
        with gzip.open(tmp_path / f"{split}.txt.gz", "wt") as file:
            file.write(f"the text\nof {split}")
    texts = load_texts(str(tmp_path), "causal-lm")
    assert (texts.train, texts.test, texts.split) == (["the text\nof train"], ["the text\nof validation"], "validation")


@pytest.mark.parametrize(
    ("rows", "options", "sentence"),
    [
        ([{"body": "a", "label": 1}], {}, "no column 'text'; it has body, label. Choose one with --text-column"),
        ([{"text": "a", "class": 1}], {}, "no column 'label'; it has text, class. Choose one with --label-column"),
        ([{"text": "a", "label": 0}, {"text": "  ", "label": 1}] * 9, {}, "rows have no text, the first is row"),
        ([{"text": "a", "label": 0}, {"text": "b", "label": None}] * 9, {}, "rows have no class in 'label'"),
        (
            [{"text": "a", "label": [0, 2]}] * 9,
            {},
            r"in 'label' \(row 0 has \[0, 2\]\); classes are integers or strings, one",
        ),
        ([{"text": "a", "label": {"x": 1}}] * 9, {}, r"row 0 has \{'x': 1\}\); classes are integers or strings, one"),
        ([{"text": "a", "label": 0.5}] * 9, {}, r"row 0 has 0.5\); classes are integers or strings, one"),
        ([{"text": "a", "label": 0}] * 9, {}, "holds one class only"),
        ([{"text": "a", "label": 0}], {}, "is one document; classification needs more"),
        ([{"text": "a", "label": 0}] * 9, {"train_split": "tain"}, "has no split 'tain'; it has train"),
        ([{"text": "a", "label": 0}] * 9, {"eval_split": "dev"}, "has no split 'dev'; it has train"),
    ],
)
def test_unusable_data_says_what_is_wrong(tmp_path, rows, options, sentence):
    file = tmp_path / "data.json"
    file.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=sentence):
        load_texts(str(file), "classification", **options)


def test_data_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_texts(str(tmp_path / "absent.csv"), "causal-lm")
    with pytest.raises(FileNotFoundError, match="no file that ends in csv"):
        load_texts(str(tmp_path), "causal-lm")
    (tmp_path / "notes.docx").write_text("x")
    with pytest.raises(ValueError, match="cannot read this kind of file"):
        load_texts(str(tmp_path / "notes.docx"), "causal-lm")
    with pytest.raises(FileNotFoundError, match="no local file or folder, and could not be loaded"):
        load_texts("nobody/nothing", "causal-lm")
    (tmp_path / "broken.parquet").write_text("x")
    with pytest.raises(ValueError, match=r"cannot read .*broken.parquet as parquet"):
        load_texts(str(tmp_path / "broken.parquet"), "causal-lm")


def test_text_shorter_than_a_block(folder):
    from transformers import AutoTokenizer

    with pytest.raises(ValueError, match="shorter than the 64 asked for"):
        tokenize(["the cat"], None, AutoTokenizer.from_pretrained(folder / "bert"), 64)
    for special, length, least in (({}, 2, 3), ({"cls_token": None}, 1, 2)):
        tokenizer = AutoTokenizer.from_pretrained(folder / "bert", **special)
        with pytest.raises(ValueError, match=f"max-length {length} leaves no token to predict; give {least} or more"):
            tokenize(["the cat"] * 9, None, tokenizer, length)
        assert tokenize(["the cat"] * 9, None, tokenizer, least).rows


def test_dropout_is_of_activations_everywhere_and_of_no_layer(tmp_path):
    shape = {
        "hidden_size": 16,
        "ffn_dim": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 16,
    }
    OPTForCausalLM(OPTConfig(vocab_size=20, max_position_embeddings=32, **shape)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"attention_dropout": 0}))
    given = {"labels": None, "max_length": 32, "extend": False, "seed": 0, "dropout": 0.3}
    config = make_base(str(tmp_path), "causal-lm", None, **given).config
    assert (config.dropout, config.attention_dropout, config.layerdrop) == (0.3, 0.3, 0.0)


def test_length_beyond_the_positions_names_the_way_out(folder, tmp_path):
    with pytest.raises(ValueError, match=r"beyond the 64 positions .*--extend-positions .*extend_positions"):
        finetune.main([*arguments(folder, tmp_path / "out"), "--max-length", "100"])
    with pytest.raises(ValueError, match="beyond the 64 positions"):
        finetune.main([*arguments(folder, tmp_path / "out"), "--warm-start-steps", "1", "--warm-start-length", "100"])
    assert not (tmp_path / "out").exists()
    model = BertForMaskedLM.from_pretrained(folder / "bert")
    fit_positions(model, 100, extend=True)
    assert position_limit(model) == 100
    fit_positions(model, 80, extend=False)
    assert position_limit(model) == 100


def test_variants_from_names_and_files(tmp_path, monkeypatch):
    from hf_efficient_attn import get_config_class

    window = get_config_class("sliding_window")(window=4)
    monkeypatch.setattr(get_config_class("block"), "window_only", lambda config, causal: window if causal else None)
    file = tmp_path / "v.yaml"
    file.write_text(yaml.safe_dump({"half": {"0": "block", "1": "flash"}, "plain": "flash"}))
    asked = read_runs(["dense", "block", str(file)])
    runs = with_controls(asked, "all", causal=True)
    labels = ["dense", "block", "block: window only", "half", "half: window only", "plain", "zero attention"]
    assert [run.label for run in runs] == labels
    assert [run.kind for run in runs] == ["dense", "variant", "control", "variant", "control", "variant", "control"]
    assert runs[2].patch["config"] == window.to_dict() and runs[2].control_of == "block"
    assert runs[4].patch["mapping"]["0"] == window.to_dict() and runs[4].patch["mapping"]["1"]["variant"] == "flash"
    assert with_controls(asked, "none", causal=True) == asked
    for which, causal in (("zero", True), ("all", False)):  # the encoder's has no window
        assert with_controls(asked, which, causal) == [*asked, runs[-1]]
    assert json.loads(json.dumps(runs[3].patch)) == runs[3].patch


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"a": {"variant": "blok"}}, "unknown variant 'blok'.*'block'"),
        ({"a": {"variant": "block", "block_sise": 2}}, "run 'a': .*block_sise.*block_size"),
        ({"a": {"variant": "block", "block_size": 0}}, "run 'a': .*at least 1"),
        ({"a": {"variant": "dense", "window": 2}}, "dense takes no other option"),
        ({"a": {"variant": "block", "read_tokens": "x"}}, "must be a positive number of tokens"),
        ({"a": {"variant": "dense", "micro_batch": 0}}, "must be a positive number of texts"),
        ({"a": 3}, "expected a variant's name or a mapping"),
        ([1], "expected a mapping from labels"),
        ({"dense": "block"}, "two runs are labelled 'dense'"),
        ({"dense (eager)": "block"}, r"two runs are labelled 'dense \(eager\)'"),
        ({"base": "block"}, "run 'base': the output folder needs this name itself; choose another label"),
        ({"base.new": "block"}, "run 'base.new': the output folder needs"),
        ({"warm start": "block"}, "run 'warm start': the output folder needs"),
        ({"..": "block"}, r"run '\.\.': the output folder needs"),
    ],
)
def test_unusable_variants_say_what_is_wrong(tmp_path, content, sentence):
    file = tmp_path / "v.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=sentence):
        read_runs([str(file)])


def test_options_presets_and_their_refusals(tmp_path, capsys):
    assert parse(["--preset", "demo"]).model == "minilm"
    assert parse(["--preset", "demo", "--model", "other"]).model == "other"
    assert len(read_runs(parse(["--preset", "demo"]).variants)) >= 6  # dense and five
    file = tmp_path / "p.yaml"
    file.write_text("modell: x")
    refusals = {
        ("--preset", str(file)): "cannot use ['modell']",
        ("--preset", "absent"): "presets are authors, demo",
        ("--resume",): "--resume needs the --output-dir",
        ("--batch-size", "0"): "--batch-size 0: at least 1",
        ("--max-steps", "-1"): "--max-steps -1: at least 0",
        ("--cost-length", "0"): "--cost-length 0: at least 1",
        ("--learning-rate", "0"): "must be above 0",
        ("--max-grad-norm", "-1"): "--max-grad-norm -1.0: at least 0",
        ("--max-grad-norm", "nan"): "--max-grad-norm nan: at least 0",
        ("--weight-decay", "-0.1"): "--weight-decay -0.1: at least 0",
        ("--lora-rank", "2", "--lora-targets", "all-linear", "query"): "--lora-targets all-linear stands alone",
    }
    for given, sentence in refusals.items():
        with pytest.raises(SystemExit):
            parse(list(given))
        assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("schedule: cosin", "argument --schedule: invalid choice: 'cosin' (choose from"),
        ("task: classifcation", "argument --task: invalid choice: 'classifcation'"),
        ("controls: windows", "argument --controls: invalid choice: 'windows'"),
        ("controls: false", "controls: expected text or a number, got False"),
        ("mixed_precision: yes", "mixed_precision: expected text or a number, got True"),
        ("max_length: long", "argument --max-length: invalid int value: 'long'"),
        ("max_steps: 1.5", "argument --max-steps: invalid int value: '1.5'"),
        ("model: [a, b]", "model: expected text or a number, got ['a', 'b']"),
        ("gradient_checkpointing: sometimes", "gradient_checkpointing: expected true or false, got 'sometimes'"),
        ("variants: 3", "variants: expected names, files, or a mapping from labels to variants, got [3]"),
        ("lora_targets: [{a: b}]", "lora_targets: expected text or a number, got [{'a': 'b'}]"),
        ("max_grad_norm: -1", "--max-grad-norm -1.0: at least 0"),
        ("a: [", "not YAML"),
        ("preset: demo", "cannot use ['preset']"),
    ],
)
def test_a_preset_is_checked_as_the_command_line_is(tmp_path, capsys, content, sentence):
    file = tmp_path / "p.yaml"
    file.write_text(content)
    with pytest.raises(SystemExit):
        parse(["--preset", str(file)])
    assert sentence in capsys.readouterr().err


def test_a_preset_is_read_as_the_command_line_is(tmp_path):
    file = tmp_path / "p.yaml"
    file.write_text(
        "{variants: block, mixed_precision: no, learning_rate: 1e-3, max_length: '64', dataset_config: 2020, "
        "lora_targets: query, trackers: tensorboard, cpu: true, quiet: false, task: null}"
    )
    args, plain = parse(["--preset", str(file), "--max-length", "32"]), parse([])
    assert (args.variants, args.mixed_precision, args.learning_rate, args.max_length) == (["block"], "no", 1e-3, 32)
    assert (args.dataset_config, args.lora_targets, args.trackers) == ("2020", ["query"], ["tensorboard"])
    assert (args.cpu, args.quiet, args.task, args.schedule) == (True, False, plain.task, plain.schedule)
    assert [run.label for run in read_runs(args.variants)] == ["dense", "block"]


def test_report_compares_with_dense():
    def row(label: str, kind: str, accuracy: float | None, seconds: float, status: str = "ok") -> dict:
        step = {
            "peak_bytes": seconds * 2**20,
            "working_bytes": 1,
            "seconds": seconds,
            "tokens_per_second": 1,
            "flops": 1,
        }
        return {
            **{"label": label, "kind": kind, "status": status, "error": None if status == "ok" else "at step 3"},
            **{
                "before": {"accuracy": 0.2},
                "after": None if accuracy is None else {"accuracy": accuracy},
                "cost_error": None,
            },
            "cost": {"train_step": step, "inference": step, "cache_bytes_per_sequence": None},
        }

    results = {
        **{"model": {"name": "m"}, "task": "classification", "max_length": 8, "metric": "accuracy"},
        "rows": [
            row("dense", "dense", 0.9, 4.0),
            row("half", "variant", 0.8, 2.0),
            row("worse", "variant", None, 8.0, "diverged"),
            row("zero attention", "control", 0.5, 1.0),
        ],
    }
    rows = rows_of(results)
    assert report.quality_lost(results, rows["half"]) == pytest.approx(10)
    assert report.saved(results, rows["half"], "train_step", "seconds") == pytest.approx(50)
    assert report.saved(results, rows["worse"], "train_step", "peak_bytes") == pytest.approx(-100)
    assert report.attention_share(results, rows["dense"], "train_step", "seconds") == pytest.approx(75)
    assert report.attention_share(results, rows["half"], "train_step", "seconds") == pytest.approx(50)
    body = {line[0]: line for line in report.lines(results)}
    assert body["half"][1:6] == ["0.2", "0.8", "+10.0", "2", "+50.0"]
    assert body["worse (diverged)"][2] == "-"
    results["metric"] = "perplexity"
    for each, value in zip(results["rows"], (10.0, 11.0, math.inf, 20.0), strict=True):
        each["after"] = {"perplexity": value}
    assert report.quality_lost(results, rows["half"]) == pytest.approx(10)
    assert report.quality_lost(results, rows["worse"]) == math.inf


@pytest.mark.slow
def test_push_to_hub_sends_model_tokenizer_card_and_results(folder, tmp_path):
    from hub_server import HubServer

    with HubServer() as hub:
        command = [sys.executable, str(ROOT / "examples" / "finetune.py")]
        command += arguments(folder, tmp_path / "out", "--no-cost", "--variants", "block", "--push-to-hub", "me/tiny")
        done = subprocess.run(command, capture_output=True, text=True, env=hub.environment(tmp_path / "home"))
        assert done.returncode == 0, done.stderr[-3000:]
        files = hub.files("me/tiny")
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "results.json"} <= files.keys()
    assert b"efficient_bert" in files["config.json"].content
    assert b"me/tiny" in files["README.md"].content and b"block" in files["README.md"].content


def test_pretraining_from_nothing_learns_and_is_reused(tmp_path, monkeypatch):
    from examples import pretrain

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    short = [
        "--steps",
        "30",
        "--batch-size",
        "2",
        "--length",
        "64",
        "--layers",
        "1",
        "--width",
        "64",
        "--vocabulary",
        "300",
        "--eval-blocks",
        "4",
    ]
    main = pretrain.main
    scores = []
    monkeypatch.setattr(pretrain, "main", lambda args: scores.append(main([*args, *short])))
    folder = pretrain.cached_model()
    assert scores[0]["after"] < scores[0]["before"] / 2
    assert pretrain.cached_model() == folder and len(scores) == 1
    assert GPT2LMHeadModel.from_pretrained(folder).config.n_positions == 64
    with pytest.raises(SystemExit):
        main(["--output-dir", str(folder)])


def test_labels_in_brackets_are_shown(job, capsys):
    results = json.loads(json.dumps(job[0]))
    results["rows"][1]["label"] = "w [half]"
    report.print_table(results)
    assert "w [half]" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["model", "output_dir"])
def test_what_cannot_be_opened_ends_with_a_sentence(folder, tmp_path, wrong):
    file = tmp_path / "file"
    file.write_text("")
    flags = arguments(folder, file if wrong == "output_dir" else tmp_path / "out")
    flags += ["--model", "no/such"] if wrong == "model" else []
    command = [sys.executable, str(ROOT / "examples" / "finetune.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 1
    assert "finetune.py: " in done.stderr and "Traceback" not in done.stderr


def test_the_command_line_ends_with_a_sentence(folder, tmp_path):
    command = [
        sys.executable,
        str(ROOT / "examples" / "finetune.py"),
        *arguments(folder, tmp_path / "out", "--variants", "blok"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "finetune.py: run 'blok': unknown variant 'blok'. Did you mean 'block'" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_tells_defaults_and_the_whole_docstring(capsys) -> None:
    with pytest.raises(SystemExit):
        passkey.main(["--help"])
    told = capsys.readouterr().out
    assert passkey.__doc__.strip() in told
    assert "prompts of each length (default: 10)" in told and "(default: None)" not in told


@pytest.mark.parametrize("wrong", [math.nan, 0.01])
def test_an_export_that_gives_other_embeddings_is_no_measurement(wrong: float, monkeypatch, tmp_path: Path) -> None:
    model = BertForMaskedLM(
        BertConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    ).bert.eval()
    text = torch.arange(1, 5)[None], torch.ones(1, 4, dtype=torch.long)
    right = export_onnx.Embedder(model)(*text).detach().numpy()
    given = SimpleNamespace(threads=1, repeats=1)

    def measure(apart: float) -> dict:
        session = SimpleNamespace(run=lambda names, inputs: [right + apart])
        monkeypatch.setattr(export_onnx, "open_session", lambda file, threads: session)
        return export_onnx.measure(model, None, [text], tmp_path / "dense.onnx", given)

    monkeypatch.setattr(torch.onnx, "export", lambda model, text, file, **options: file.write_bytes(b"0"))
    monkeypatch.setattr(export_onnx, "bytes_of_a_run", lambda file, given, threads: 1)
    assert measure(0.0)["apart"] < 1e-4
    with pytest.raises(ValueError, match="another embedding than PyTorch"):
        measure(wrong)
