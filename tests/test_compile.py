"""`torch.compile` of a patched model gives what the model gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_modeling import output
from zoo import ZOO

from hf_efficient_attn import patch_model, unpatch_model

VARIANTS = {
    "flash": {},
    "sliding_window": {"window": 3},
    "topk_blocks": {"block_size": 4, "top_k": 2},
    "linformer": {"rank": 8, "max_length": 32, "segment_size": 4},
}
pytestmark = pytest.mark.slow  # compiling takes some ten seconds per model


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_model(name: str, backend: str):
    tiny = ZOO[name]
    options: dict[str, Any] = {"use_cache": False} if tiny.kind == "decoder" else {}
    model = patch_model(tiny.build(), "sliding_window", window=3)
    compiled = torch.compile(model, backend=backend)
    for pad in ("none", "right", "left"):
        inputs = tiny.inputs(pad=pad) | options
        real = inputs["attention_mask"].bool()
        assert (output(compiled, inputs)[real] - output(model, inputs)[real]).abs().max() < 1e-4, pad
    dense = tiny.build()
    assert (output(dense, inputs)[real] - output(model, inputs)[real]).abs().max() > 1e-2


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_training_step(name: str, variant: str):
    tiny = ZOO[name]
    inputs = tiny.inputs(pad="right") | ({"use_cache": False} if tiny.kind == "decoder" else {})
    model = patch_model(tiny.build(), variant, **VARIANTS[variant])
    found = []
    for run in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        loss = run(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        found.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (loss, plain), (compiled_loss, compiled) = found
    assert (loss - compiled_loss).abs() < 1e-4
    assert plain.keys() == compiled.keys()
    for key, value in plain.items():
        assert torch.allclose(compiled[key], value, rtol=1e-3, atol=1e-5), key


def test_generation_of_a_compiled_model():
    model, inputs = (
        patch_model(ZOO["llama"].build(), "sliding_window", window=3),
        ZOO["llama"].inputs(length=13, pad="left"),
    )
    options = {"do_sample": False, "max_new_tokens": 6}
    plain = model.generate(**inputs, **options)
    model.forward = torch.compile(model.forward, backend="aot_eager", dynamic=True)
    assert torch.equal(model.generate(**inputs, **options), plain)


def test_compiled_before_and_unpatched_after():
    tiny, inputs = ZOO["bert"], ZOO["bert"].inputs()
    model = tiny.build()
    dense = output(model, inputs)
    compiled = torch.compile(model, backend="aot_eager")
    assert (output(compiled, inputs) - dense).abs().max() < 1e-4
    patch_model(model, "sliding_window", window=3)
    changed = output(compiled, inputs)
    assert (changed - output(model, inputs)).abs().max() < 1e-4
    assert (changed - dense).abs().max() > 1e-2
    unpatch_model(model)
    assert (output(compiled, inputs) - dense).abs().max() < 1e-4
