"""Models whose linear maps are quantised (bitsandbytes): patched, trained beside adapters, saved, loaded, and given back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from test_modeling import output
from zoo import TASKS, USUAL_TASK, ZOO

from hf_efficient_attn import available_variants, patch_model, select_variants, unpatch_model
from hf_efficient_attn.registry import get_config_class

pytest.importorskip("bitsandbytes")


def load(name: str, path: Path, bits: int | None = None, **options: Any) -> Any:
    """The checkpoint as it is, or quantised."""
    quantiser = transformers.BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    options |= {} if bits is None else {"quantization_config": quantiser}
    task = TASKS[USUAL_TASK[ZOO[name].kind]]
    return getattr(transformers, task).from_pretrained(path, device_map={"": "cpu"}, **options).eval()


def tiny(name: str, variant: str) -> Any:
    return get_config_class(variant).tiny(ZOO[name].kind == "decoder")


def dense(name: str, tmp_path: Path) -> Path:
    """Of widths that four bits can pack."""
    sizes = {"head_dim": 16} if name == "llama" else {}
    ZOO[name].build(hidden_size=64, intermediate_size=128, **sizes).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def own(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {key: p for key, p in model.named_parameters() if ".efficient_attn." in key and p.is_floating_point()}


@pytest.mark.parametrize("variant", available_variants())
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_patched_trained_and_given_back(name: str, variant: str, tmp_path: Path):
    """Llama's layers have no bias, so that not one of their parameters is a float."""
    model = load(name, dense(name, tmp_path), 8, dtype=torch.bfloat16)
    inputs = ZOO[name].inputs(pad="right")
    before = output(model, inputs)
    patch_model(model, tiny(name, variant))
    assert {p.dtype for p in own(model).values()} <= {torch.bfloat16}
    after = output(model, inputs)
    moved = (after - before).norm() / before.norm()
    assert moved < 0.05 if variant == "moe" else moved > 1e-6  # experts begin alike, but round other tokens together
    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in own(model).values() if p.requires_grad)
    unpatch_model(model)
    assert torch.equal(output(model, inputs), before)


@pytest.mark.parametrize(("name", "bits"), [("bert", 8), ("gpt2", 8), ("llama", 8), ("llama", 4)], ids=lambda x: str(x))
@pytest.mark.parametrize("variant", ["linformer", "rfa", "performer", "moe"])
def test_saved_and_loaded(name: str, bits: int, variant: str, tmp_path: Path):
    """Of parameters, linear maps, buffers, and in the feed-forward, whose maps a quantiser exchanges."""
    path, inputs = dense(name, tmp_path), ZOO[name].inputs()
    model = patch_model(load(name, path), tiny(name, variant))
    with torch.no_grad():
        for parameter in own(model).values():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "patched")
    quantised = load(name, tmp_path / "patched", bits)
    quantised.save_pretrained(tmp_path / "quantised")
    found = output(quantised, inputs)
    again = load(name, tmp_path / "quantised")
    assert type(again) is type(quantised)
    assert torch.equal(output(again, inputs), found)
    if variant == "moe":  # its experts are quantised as well
        exact, plain = output(model, inputs), output(load(name, path, bits), inputs)
        assert (found - exact).norm() < (0.7 if bits == 8 else 0.9) * (found - plain).norm()
        assert len(quantised.config.efficient_attention) == 1
        unpatch_model(quantised)
        assert torch.equal(output(quantised, inputs), plain)
        return
    patched = patch_model(load(name, path, bits), tiny(name, variant))
    untrained = output(patched, inputs)
    for key, parameter in own(patched).items():
        parameter.data.copy_(own(model)[key])
    assert torch.equal(output(patched, inputs), found)
    assert torch.equal(untrained, found) == (variant == "performer")  # has no parameters


def test_adapters_and_new_parameters_learn_together(tmp_path: Path):
    model, inputs = load("llama", dense("llama", tmp_path), 4), ZOO["llama"].inputs()
    patch_model(model, tiny("llama", "hedgehog"))
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["efficient_attn"])
    model = get_peft_model(model, lora).train()
    learning = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert {"lora" in key or "efficient_attn" in key for key in learning} == {True}
    optimizer = torch.optim.AdamW(learning.values(), lr=0.02)
    losses = []
    for _ in range(12):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        assert all(p.grad is not None for p in learning.values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_a_patched_part_of_a_model_that_is_loaded_quantised(tmp_path: Path):
    bert, gpt2 = transformers.BertModel(ZOO["bert"].config()), ZOO["gpt2"].build(add_cross_attention=True)
    with torch.no_grad():
        patch_model(gpt2, "moe", num_experts=2)
        for parameter in own(gpt2).values():
            parameter.mul_(-1.5)
    model = transformers.EncoderDecoderModel(encoder=bert, decoder=gpt2).eval()
    model.save_pretrained(tmp_path)
    quantiser = transformers.BitsAndBytesConfig(load_in_8bit=True)
    loaded = transformers.EncoderDecoderModel.from_pretrained(tmp_path, quantization_config=quantiser).eval()
    ids = ZOO["bert"].inputs()["input_ids"]
    given = {"input_ids": ids, "decoder_input_ids": ids}
    with torch.no_grad():
        exact, found = model(**given).logits, loaded(**given).logits
        plain = unpatch_model(model.decoder) and model(**given).logits
    assert (found - exact).norm() < 0.6 * (found - plain).norm()


def test_variants_are_selected_for_a_quantised_model(tmp_path: Path):
    """Of eight bits: on a CPU bitsandbytes has no gradients through four."""
    model = load("llama", dense("llama", tmp_path), 8, dtype=torch.float32)
    found = select_variants(
        model,
        [{"input_ids": ZOO["llama"].inputs(length=24)["input_ids"]}],
        candidates=["linformer"],
        budget={"max_loss": 100.0, "cost": "state"},
    )
    assert {score.layer for score in found.scores} == {0, 1}
