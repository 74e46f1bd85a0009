"""`torch.compile` of a patched model gives what the model gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_modeling import output
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
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
    """Deep enough that a graph that holds the states' counts would not compile."""
    model = patch_model(ZOO["llama"].build(num_hidden_layers=12), "sliding_window", window=3)
    inputs = ZOO["llama"].inputs(length=109, pad="left")
    options = {"do_sample": False, "max_new_tokens": 6}
    plain = model.generate(**inputs, **options)
    model.forward = torch.compile(model.forward)
    assert torch.equal(model.generate(**inputs, **options), plain)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])
def test_texts_without_a_mask(name: str):
    """Transformers cannot say then whether positions start again: one text, several in a row, and blocks that look ahead."""
    model, inputs = patch_model(ZOO[name].build(), "sliding_window", window=3), ZOO[name].inputs(length=13)
    compiled = torch.compile(model, backend="eager")
    given = {"input_ids": inputs["input_ids"], "use_cache": False}
    plain = output(model, given)
    assert (output(compiled, given) - plain).abs().max() < 1e-5
    given["position_ids"] = torch.cat([torch.arange(6), torch.arange(7)])[None]
    packed = output(model, given)
    assert (output(compiled, given) - packed).abs().max() < 1e-5
    assert (packed - plain).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "llama", "opt"])
def test_lengths_that_a_later_call_brings(name: str):
    model, inputs = patch_model(ZOO[name].build(), "sliding_window", window=3), ZOO[name].inputs(1, 12)
    compiled = torch.compile(model, backend="eager")
    given = {"input_ids": inputs["input_ids"]} | ({"use_cache": False} if ZOO[name].kind == "decoder" else {})
    plain = output(compiled, given)
    for ends in ([0, 5, 12], [0, 3, 12], [0, 3, 7, 12]):
        packed = output(model, given | {"cu_seq_lens_q": torch.tensor(ends)})
        assert (output(compiled, given | {"cu_seq_lens_q": torch.tensor(ends)}) - packed).abs().max() < 1e-5
        assert (packed - plain).abs().max() > 1e-2


def test_images_in_a_text_without_a_mask():
    config = ZOO["llama"].config()
    config._attn_implementation = "efficient_attention"
    blocks = torch.tensor([[-1, 0, 0, 0, -1, -1, -1, -1]])

    @torch.compile(backend="eager")
    def ahead(x):
        options = {"config": config, "inputs_embeds": x, "attention_mask": None, "past_key_values": None}
        return create_causal_mask(**options, block_sequence_ids=blocks).index[1]

    assert ahead(torch.zeros(1, 8, 32)).tolist() == [[False, True, True, False, False, False, False]]


@pytest.mark.parametrize("blocks", [False, True])
def test_images_in_a_text_inside_a_window(blocks: bool):
    config = ZOO["mistral"].config()
    config._attn_implementation = "efficient_attention"
    more = {"block_sequence_ids": torch.tensor([[-1, 0, 0, 0, -1, -1, -1, -1]])} if blocks else {}
    reasons = []

    def read(x):
        options = {"config": config, "inputs_embeds": x, "attention_mask": torch.ones(1, 8), "past_key_values": None}
        reasons.append(create_sliding_window_causal_mask(**options, **more).custom)
        return x + 1

    torch.compile(read, backend="eager")(torch.zeros(1, 8, 32))
    assert [reason is not None for reason in reasons] == [blocks]


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
