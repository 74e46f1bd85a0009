"""Training and inference tools of Transformers on patched models: Trainer, checkpointing, precision, pipelines."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_modeling import output
from torch import Tensor, nn
from transformers import BertTokenizer, Trainer, TrainingArguments, pipeline
from zoo import TASKS, USUAL_TASK, ZOO

import hf_efficient_attn as hea
from hf_efficient_attn import patch_model

WORDS = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(95))]
VARIANTS = {
    "flash": {},
    "sliding_window": {"window": 2},
    "transformer_xl": {"segment_size": 5, "memory_size": 4},
    "topk_blocks": {"block_size": 4, "top_k": 2},
    "linformer": {"rank": 8, "max_length": 32, "segment_size": 4},
}


LINFORMER = hea.get_config_class("linformer")(**VARIANTS["linformer"])


def arguments(directory: Path, **options: Any) -> TrainingArguments:
    options = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, **options}
    return TrainingArguments(
        str(directory), use_cpu=True, report_to=[], disable_tqdm=True, lr_scheduler_type="constant", **options
    )


def examples(name: str, count: int = 8) -> list[dict[str, Tensor]]:
    inputs = ZOO[name].inputs(batch=count, length=20, pad="right")
    labels = (inputs["input_ids"][:, 0] > 50).long()
    return [{**{key: x[i] for key, x in inputs.items()}, "labels": labels[i]} for i in range(count)]


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "llama"])
def test_trainer(name: str, tmp_path: Path):
    tiny, data = ZOO[name], examples(name)
    model = patch_model(tiny.build_for("sequence-classification"), {0: "sliding_window", 1: LINFORMER})
    start = {key: value.clone() for key, value in model.state_dict().items()}
    trainer = Trainer(model, arguments(tmp_path), train_dataset=data, eval_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    added = [key for key in start if ".efficient_attn." in key]
    assert added
    assert all(not torch.equal(model.state_dict()[key], start[key]) for key in added)
    evaluated = trainer.evaluate()["eval_loss"]
    predictions = trainer.predict(data).predictions
    trainer.save_model(tmp_path / "saved")
    reloaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    again = Trainer(reloaded, arguments(tmp_path), eval_dataset=data)
    assert again.evaluate()["eval_loss"] == evaluated
    assert (again.predict(data).predictions == predictions).all()
    assert [row.variant for row in hea.describe(reloaded)] == ["sliding_window", "linformer"]


def test_trainer_resumes_from_a_checkpoint(tmp_path: Path):
    data = examples("bert")

    def trainer(directory: Path) -> Trainer:
        torch.manual_seed(0)
        model = patch_model(ZOO["bert"].build_for("sequence-classification"), "linformer")
        return Trainer(model, arguments(directory, save_steps=3, max_steps=6), train_dataset=data)

    whole = trainer(tmp_path / "whole")
    whole.train()
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    weights = whole.model.state_dict()
    for key, value in resumed.model.state_dict().items():
        assert torch.allclose(value, weights[key], atol=1e-6), key


def gradients(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    result = model.train()(**inputs).logits
    result.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_gradient_checkpointing(name: str, variant: str, use_reentrant: bool):
    tiny = ZOO[name]
    inputs = tiny.inputs(pad="right") | ({"use_cache": False} if tiny.kind == "decoder" else {})
    model = patch_model(tiny.build(), variant, **VARIANTS[variant])
    plain = gradients(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    calls = []
    for module in model.modules():
        if hasattr(module, "efficient_attn"):
            module.register_forward_pre_hook(lambda *_: calls.append(1))
    checkpointed = gradients(model, inputs)
    assert len(calls) == 4, "each of two layers runs again in the backward pass"
    assert checkpointed.keys() == plain.keys()
    for key, value in plain.items():
        assert torch.allclose(checkpointed[key], value, rtol=1e-4, atol=1e-6), key


@pytest.mark.parametrize("name", ["gpt2", "llama", "bart"])
def test_gradient_checkpointing_while_a_cache_is_asked_for(name: str):
    """Transformers drops the cache then; a state read twice would count its tokens twice."""
    inputs = ZOO[name].inputs() | {"use_cache": True}
    model = patch_model(ZOO[name].build(), "sliding_window", window=2)
    plain = gradients(model, inputs)
    model.gradient_checkpointing_enable()
    checkpointed = gradients(model, inputs)
    assert all(torch.allclose(checkpointed[key], value, rtol=1e-4, atol=1e-6) for key, value in plain.items())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit", "bart"])
def test_lower_precision(name: str, variant: str):
    tiny, inputs = ZOO[name], ZOO[name].inputs()
    model = patch_model(tiny.build(), variant, **VARIANTS[variant])
    full = output(model, inputs)
    size = full.abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = output(model, inputs)
        model.train()(**inputs)[0].float().square().mean().backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() for n, p in model.named_parameters() if ".efficient_attn." in n
    )
    typical = (mixed.float() - full).abs().mean() / full.abs().mean()
    assert 0 < typical < 0.2
    half = model.to(torch.bfloat16)
    inputs = {k: x.to(torch.bfloat16) if torch.is_tensor(x) and x.is_floating_point() else x for k, x in inputs.items()}
    result = output(half, inputs)
    assert result.dtype == torch.bfloat16
    assert (result.float() - full).abs().mean() / full.abs().mean() < 0.2
    assert size > 0


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generation_in_bfloat16_and_under_autocast(name: str):
    inputs = ZOO[name].inputs(length=13, pad="left")
    model = patch_model(ZOO[name].build(), "sliding_window", window=3).to(torch.bfloat16)
    assert model.generate(**inputs, max_new_tokens=5, do_sample=False).shape == (2, 18)
    model.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.generate(**inputs, max_new_tokens=5, do_sample=False).shape == (2, 18)


@pytest.mark.parametrize(
    ("task", "name", "text"),
    [
        ("text-classification", "bert", "w5 w6 w7"),
        ("fill-mask", "bert", "w5 [MASK] w7"),
        ("token-classification", "bert", "w5 w6 w7"),
        ("feature-extraction", "bert", "w5 w6 w7"),
        ("text-generation", "gpt2", "w5 w6 w7 w11 w13 w17 w19 w23 w29"),
        ("text-generation", "llama", "w5 w6 w7"),
    ],
)
def test_pipeline(task: str, name: str, text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """A pipeline built from the saved directory runs patched, and nobody logs that the model is not supported."""
    head = {"text-classification": "sequence-classification", "feature-extraction": "base"}.get(task, task)
    head = head if head in TASKS else USUAL_TASK[ZOO[name].kind]
    model, dense = (ZOO[name].build_for(head, pad_token_id=1) for _ in range(2))
    if task == "text-generation":  # as arguments of the call, Transformers 5.17 warns of its own way to hand them on
        for one in (model, dense):
            one.generation_config.update(max_new_tokens=12, do_sample=False)
    patch_model(model, "sliding_window", window=1)
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        from_directory = pipeline(task, model=str(tmp_path), device="cpu")
        result = from_directory([text, text + " w9 w8"], batch_size=2)
        beside = pipeline(task, model=model, tokenizer=tokenizer, device="cpu")([text, text + " w9 w8"])
    finally:
        logger.removeHandler(caplog.handler)
    assert type(from_directory.model).__name__.startswith("Efficient")
    assert len(result) == len(beside) == 2
    assert not [
        r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR or "not supported" in r.getMessage()
    ]
    dense = pipeline(task, model=dense, tokenizer=tokenizer, device="cpu")
    assert dense([text, text + " w9 w8"]) != beside
