"""What is peculiar to `adaptive`: gates that learn, a temperature that falls, and layers that keep only what was chosen."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from zoo import ZOO

from hf_efficient_attn import AdaptiveConfig, HostShape, describe, patch_model, unpatch_model
from hf_efficient_attn.registry import build, get_config_class
from hf_efficient_attn.variants.adaptive import harden

HOST = HostShape(4, 2, 8, 32, True)
THREE = ("sliding_window", "topk_blocks", "performer")  # the last has random features for each key/value head


def tiny(causal: bool = True, **options) -> AdaptiveConfig:
    return AdaptiveConfig(candidates=[get_config_class(name).tiny(causal) for name in THREE], **options)


def module(**options) -> torch.nn.Module:
    return build(tiny(**options), HOST)


def inputs(length: int = 29) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, heads, length, 8, generator=generator) for heads in (4, 2, 2)]


def attend(layer, tensors=None) -> torch.Tensor:
    return layer(*(tensors or inputs()), scaling=0.4, causal=True)


def patched(arch: str = "llama", gates: bool = True):
    model = ZOO[arch].build()
    patch_model(model, tiny(ZOO[arch].kind == "decoder"))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if gates and name.endswith(".gate"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def layers(model) -> list[torch.nn.Module]:
    return [m for m in model.modules() if type(m).__name__ == "AdaptiveAttention"]


def test_a_gate_finds_the_candidate_that_gives_the_target() -> None:
    layer = module(anneal_steps=30).train()
    wanted = build(replace(tiny(), choices=[1, 0]), HOST)  # two heads of the same layer want different candidates
    optimizer = torch.optim.Adam([layer.gate], lr=0.1)
    losses = []
    for _ in range(40):
        tensors = [x.requires_grad_() for x in inputs()]
        loss = (attend(layer, tensors) - attend(wanted).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]
    layer.harden()
    assert layer.config.choices == [1, 0]
    torch.testing.assert_close(attend(layer), attend(wanted))


def test_temperature_falls_in_training_alone_and_is_saved() -> None:
    layer = module(temperature=2.0, final_temperature=0.5, anneal_steps=4)
    assert layer.temperature.item() == 2.0
    attend(layer.eval(), [x.requires_grad_() for x in inputs()]).sum().backward()
    with torch.no_grad():
        attend(layer.train())
    assert layer.temperature.item() == 2.0
    seen = []
    for _ in range(6):
        attend(layer.train(), [x.requires_grad_() for x in inputs()]).sum().backward()
        seen.append(layer.temperature.item())
    assert seen == pytest.approx([2 * 0.25 ** (i / 4) for i in (1, 2, 3, 4, 4, 4)])
    again = module(temperature=2.0, final_temperature=0.5, anneal_steps=4)
    assert again.temperature.item() == 2.0
    again.load_state_dict(layer.state_dict())
    assert again.temperature.item() == 0.5
    assert layer.to(torch.bfloat16).steps.item() == 6


def test_checkpointing_counts_a_step_once_and_changes_no_gradient() -> None:
    ids, gradients = ZOO["llama"].inputs(2, 20), []
    for checkpointing in (False, True):
        model = patched().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        steps = []
        for _ in range(2):  # the second at a lower temperature
            model.zero_grad()
            model(**ids, labels=ids["input_ids"], use_cache=False).loss.backward()
            gradients.append([layer.gate.grad.clone() for layer in layers(model)])
            steps.append([layer.steps.item() for layer in layers(model)])
        assert steps == [[step] * len(layers(model)) for step in (1, 2)]
    plain, checkpointed = gradients[:2], gradients[2:]
    torch.testing.assert_close(checkpointed, plain)
    assert (plain[1][0] - plain[0][0]).abs().max() > 1e-4 * plain[0][0].abs().max(), "the temperature does not matter"


def test_hardened_layer_is_the_soft_one_with_certain_gates() -> None:
    layer = module().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
        layer.gate.copy_(torch.tensor([[0.0, 0.0, 200.0], [200.0, 0.0, 0.0]]))
    soft, size = attend(layer), len(layer.state_dict())
    features = layer.parts["2"].features.clone()
    layer.harden()
    torch.testing.assert_close(attend(layer), soft)
    assert sorted(layer.parts) == ["0", "2"]
    assert torch.equal(layer.parts["2"].features, features[:1])  # its own head's
    assert len(layer.state_dict()) < size
    assert not torch.equal(build(tiny(), HOST)(*inputs(), scaling=0.4, causal=True), soft)
    with pytest.raises(ValueError, match="hardened already"):
        layer.harden()


def test_of_equal_gates_the_first_is_chosen() -> None:
    layer = module()
    layer.harden()
    assert layer.config.choices == [0, 0]
    assert list(layer.parts) == ["0"]


@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_hardened_model_saves_and_loads_bit_exactly(arch: str, tmp_path) -> None:
    model, ids = patched(arch), ZOO[arch].inputs(2, 40)
    auto = transformers.AutoModelForCausalLM if arch == "llama" else transformers.AutoModelForMaskedLM
    soft = model(**ids).logits
    wanted = [layer.gate.argmax(1).tolist() for layer in layers(model)]
    assert len({tuple(choice) for choice in wanted}) > 1, "all layers chose alike: one entry would do"
    assert harden(model) is model
    hard = model(**ids).logits
    assert not torch.equal(hard, soft)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["efficient_attention"]
    assert [saved[str(i)]["choices"] for i in range(len(wanted))] == wanted
    loaded = auto.from_pretrained(tmp_path)
    assert torch.equal(loaded(**ids).logits, hard)
    assert describe(loaded) == describe(model)
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert not any(name.endswith((".gate", ".steps")) for name in loaded.state_dict())
    for layer, choice in zip(layers(loaded), wanted, strict=True):
        assert sorted(layer.parts) == sorted({str(c) for c in choice})
    with pytest.raises(ValueError, match="nothing to harden"):
        harden(loaded)


def test_soft_model_saves_where_its_training_stands(tmp_path) -> None:
    model, ids = patched().train(), ZOO["llama"].inputs(2, 20)
    for _ in range(3):
        model(**ids, labels=ids["input_ids"], use_cache=False).loss.backward()
    model.eval().save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [layer.steps.item() for layer in layers(loaded)] == [3] * len(layers(model))
    assert torch.equal(loaded(**ids).logits, model(**ids).logits)


def test_hardened_model_generates_and_can_be_unpatched() -> None:
    ids = ZOO["llama"].inputs(3, 14, "left")
    dense = ZOO["llama"].build()(**ids).logits
    model = harden(patched())
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(**ids, **options), model.generate(**ids, **options, use_cache=False))
    assert not torch.equal(model(**ids).logits, dense)
    assert torch.equal(unpatch_model(model)(**ids).logits, dense)


def test_other_layers_keep_their_entries() -> None:
    model = ZOO["llama"].build()
    patch_model(model, {"0": "block", "1": tiny()})
    harden(model)
    assert model.config.efficient_attention["0"]["variant"] == "block"
    assert model.config.efficient_attention["1"]["choices"] == [0] * layers(model)[0].host.num_kv_heads


def test_what_cannot_be_hardened_is_refused_before_anything_changes() -> None:
    model = ZOO["llama"].build()
    with pytest.raises(ValueError, match="nothing to harden"):
        harden(model)
    patch_model(model, get_config_class("combined")(parts=[[tiny(), 1], ["block", 1]]))
    with pytest.raises(ValueError, match="part of another variant"):
        harden(model)
    assert all(not layer.config.choices for layer in layers(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": []}, "at least one variant"),
        ({"candidates": ["moe"]}, "is no candidate"),
        ({"candidates": ["adaptive"]}, "other than 'adaptive'"),
        ({"candidates": ["slidng_window"]}, "sliding_window"),
        ({"temperature": 0.1, "final_temperature": 0.2}, "the temperature falls"),
        ({"choices": [0, 2]}, "there are 2 candidates"),
    ],
)
def test_bad_configs_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptiveConfig(**options)
    assert AdaptiveConfig(choices=[0, 1]).choices == [0, 1]


def test_candidates_must_serve_one_head_alone() -> None:
    dilated = get_config_class("sliding_window")(dilation=[1, 3])
    with pytest.raises(ValueError, match="2 numbers"):
        build(AdaptiveConfig(candidates=[dilated, "block"]), HOST)
    with pytest.raises(ValueError, match="choices = "):
        build(AdaptiveConfig(choices=[0, 1, 1]), HOST)
    assert build(AdaptiveConfig(choices=[0, 1]), HOST).groups() == {0: [0], 1: [1]}


def test_copies_of_a_layer_are_refused_before_any_is_hardened():
    """Of two, as PEFT keeps beside each other, a config could name but one."""
    model = patch_model(ZOO["llama"].build(), "adaptive")
    mapping = copy.deepcopy(model.config.efficient_attention)
    lora = LoraConfig(target_modules=["q_proj"], modules_to_save=["efficient_attn"])
    adapted = get_peft_model(model, lora)
    with pytest.raises(ValueError, match=r"layer 0 is there twice.*merge_and_unload"):
        harden(adapted)
    assert model.config.efficient_attention == mapping
    merged = harden(adapted.merge_and_unload())
    assert all(row.hyper_parameters["choices"] for row in describe(merged))
