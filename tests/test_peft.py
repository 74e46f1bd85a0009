"""LoRA by PEFT: on a patched model, and a patch on a model that PEFT has wrapped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from test_modeling import output
from torch import nn
from zoo import TASKS, USUAL_TASK, ZOO

import hf_efficient_attn as hea
from hf_efficient_attn import patch_model, unpatch_model

TARGETS = {
    "bert": ["query", "key", "value"],
    "gpt2": ["c_attn"],
    "llama": ["q_proj", "k_proj", "v_proj"],
    "bart": ["q_proj", "k_proj", "v_proj"],
}


def train(model: nn.Module, inputs: dict[str, Any], steps: int = 3) -> list[float]:
    """A few steps on one batch; returns the losses."""
    labels = inputs.get("decoder_input_ids", inputs["input_ids"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("name", TARGETS)
def test_train_save_reload_merge(name: str, explicit: bool, tmp_path: Path):
    tiny, inputs = ZOO[name], ZOO[name].inputs(pad="right")
    base = patch_model(tiny.build(), "sliding_window", window=2)
    base.save_pretrained(tmp_path / "base")
    before = output(base, inputs)
    frozen = {key: value.clone() for key, value in base.state_dict().items()}
    # without target modules PEFT looks them up by model type
    model = get_peft_model(base, LoraConfig(r=4, target_modules=TARGETS[name] if explicit else None))
    targets = {n.rsplit(".", 2)[0] for n, _ in model.named_parameters() if "lora_A" in n}
    assert targets
    losses = train(model, inputs)
    assert losses[-1] < losses[0]
    tuned = output(model, inputs)
    assert not torch.equal(tuned, before)
    for key, value in frozen.items():
        inside = model.base_model.model.state_dict()
        assert torch.equal(inside[key if key in inside else wrapped_key(key)], value), key

    model.save_pretrained(tmp_path / "adapter")
    auto = getattr(transformers, TASKS[USUAL_TASK[tiny.kind]])
    again = PeftModel.from_pretrained(auto.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(output(again, inputs), tuned)

    merged = model.merge_and_unload()
    assert type(merged).__name__.startswith("Efficient")
    assert (output(merged, inputs) - tuned).abs().max() < 1e-4
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(output(auto.from_pretrained(tmp_path / "merged"), inputs), output(merged, inputs))
    assert {row.variant for row in hea.describe(merged)} == {"sliding_window"}


def wrapped_key(key: str) -> str:
    """PEFT moves the weight of a layer that it adapts one level down."""
    owner, leaf = key.rsplit(".", 1)
    return f"{owner}.base_layer.{leaf}"


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_default_targets_are_those_of_the_dense_type(name: str):
    dense = get_peft_model(ZOO[name].build(), LoraConfig(r=4))
    patched = get_peft_model(patch_model(ZOO[name].build(), "block"), LoraConfig(r=4))
    adapted = [n for n, _ in dense.named_parameters() if "lora" in n]
    assert adapted
    assert adapted == [n for n, _ in patched.named_parameters() if "lora" in n]


def test_a_peft_that_does_not_import_is_passed_over(tmp_path: Path):
    """One that is too old for the installed Transformers, in a process that never asks for it."""
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "__init__.py").write_text("from transformers import HybridCacheOfTransformers4")
    code = (
        "from transformers import BertConfig, BertModel; from hf_efficient_attn import patch_model; "
        "print(type(patch_model(BertModel(BertConfig(hidden_size=32, num_attention_heads=2)), 'block')).__name__)"
    )
    found = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": found}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "EfficientBertModel", done.stderr[-2000:]


def test_new_parameters_beside_lora(tmp_path: Path):
    """`modules_to_save` names the variant's child: its parameters are trained and saved with the adapter."""
    tiny, inputs = ZOO["llama"], ZOO["llama"].inputs()
    base = patch_model(tiny.build(), "linformer", rank=8, max_length=32, segment_size=4)
    base.save_pretrained(tmp_path / "base")
    rows = hea.describe(base)
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["efficient_attn"])
    model = get_peft_model(base, config)
    assert hea.describe(model) == rows  # a copy that is trained counts once
    trained = [n for n, p in model.named_parameters() if p.requires_grad and ".efficient_attn." in n]
    assert trained
    before = {n: p.detach().clone() for n, p in model.named_parameters() if n in trained}
    train(model, inputs)
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in trained)
    model.save_pretrained(tmp_path / "adapter")
    fresh = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert torch.equal(output(again, inputs), output(model, inputs))
    merged = model.merge_and_unload()
    assert (output(merged, inputs) - output(again, inputs)).abs().max() < 1e-4
    merged.save_pretrained(tmp_path / "merged")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(output(loaded, inputs), output(merged, inputs))


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])  # gpt2 ties its embeddings as well
def test_a_matrix_that_layers_share_beside_lora(name: str, tmp_path: Path):
    """PEFT trains a copy of each layer's variant; what was trained is what is merged, saved and loaded."""
    tiny, inputs = ZOO[name], ZOO[name].inputs()
    auto = getattr(transformers, TASKS[USUAL_TASK[tiny.kind]])
    patch_model(tiny.build(), "linformer", sharing="layerwise", segment_size=4).save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, target_modules=TARGETS[name][:1], modules_to_save=["efficient_attn"])
    model = get_peft_model(auto.from_pretrained(tmp_path / "base"), config)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad and "proj_k" in n}
    assert len(before) == 2
    train(model, inputs)
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    tuned = output(model, inputs)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(auto.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(output(again, inputs), tuned)
    again.base_model.model.tie_weights()
    assert torch.equal(output(again, inputs), tuned)
    merged = model.merge_and_unload()
    merged.tie_weights()  # as resizing the vocabulary does
    result = output(merged, inputs)
    assert (result - tuned).abs().max() < 1e-4
    merged.save_pretrained(tmp_path / "merged")
    loaded = auto.from_pretrained(tmp_path / "merged")
    assert torch.equal(output(loaded, inputs), result)
    loaded.tie_weights()
    assert torch.equal(output(loaded, inputs), result)


@pytest.mark.parametrize("name", TARGETS)
def test_wrapped_model_is_patched_and_trained(name: str, tmp_path: Path):
    tiny, inputs = ZOO[name], ZOO[name].inputs(pad="right")
    model = get_peft_model(tiny.build(), LoraConfig(r=4, target_modules=TARGETS[name]))
    dense = output(model, inputs)
    assert patch_model(model, "sliding_window", window=2) is model
    assert not torch.equal(output(model, inputs), dense)
    assert model.config is model.base_model.model.config
    losses = train(model, inputs)
    assert losses[-1] < losses[0]
    tuned = output(model, inputs)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(patch_model(tiny.build(), "sliding_window", window=2), tmp_path)
    assert torch.equal(output(again, inputs), tuned)
    unpatch_model(model)
    assert type(model.base_model.model) is type(tiny.build())
    assert not torch.equal(output(model, inputs), tuned)


def test_generation_with_an_adapter():
    inputs = ZOO["llama"].inputs(length=13, pad="left")
    model = get_peft_model(
        patch_model(ZOO["llama"].build(), "sliding_window", window=3), LoraConfig(task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.normal_()
    options = {"do_sample": False, "max_new_tokens": 8}
    text = model.generate(**inputs, **options)
    assert torch.equal(text, model.generate(**inputs, **options, use_cache=False))
    with model.disable_adapter():
        assert not torch.equal(text, model.generate(**inputs, **options))
