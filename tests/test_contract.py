"""Every registered attention variant on every architecture of the zoo; both are found, none is named here."""

from __future__ import annotations

import tempfile

import pytest
import torch
import transformers
from zoo import TASKS, USUAL_TASK, ZOO, Tiny

from hf_efficient_attn import available_variants, describe, patch_model, unpatch_model
from hf_efficient_attn.hosts import find_hosts

VARIANTS = list(available_variants("attention"))
SERVED = {name: tiny for name, tiny in ZOO.items() if tiny.refused is None}
TEXT = [name for name, tiny in SERVED.items() if tiny.kind != "vision"]
DECODERS = [name for name, tiny in SERVED.items() if tiny.kind == "decoder"]

each_variant = pytest.mark.parametrize("variant", VARIANTS)


def tiny_mapping(model, variant: str) -> dict:
    """The variant's tiny config for every layer, by the layer's direction."""
    config_class = available_variants()[variant].config_class
    return {host.shape.layer: config_class.tiny(host.shape.causal) for host in find_hosts(model)}


def patched_tiny(tiny: Tiny, variant: str, **overrides):
    model = tiny.build(**overrides)
    patch_model(model, tiny_mapping(model, variant))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # new parameters off their start, so that all of them matter
        for name, parameter in model.named_parameters():
            if ".efficient_attn." in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def logits(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits if "pixel_values" not in inputs else model(**inputs).logits


def output_mask(tiny: Tiny, inputs) -> torch.Tensor:
    return inputs["decoder_attention_mask" if tiny.kind == "encoder-decoder" else "attention_mask"].bool()


@each_variant
@pytest.mark.parametrize("arch", SERVED)
def test_patched_differs_and_unpatched_is_bit_exact(arch: str, variant: str) -> None:
    tiny = SERVED[arch]
    model, inputs = tiny.build(), tiny.inputs(2, 40)
    keys, dense = list(model.state_dict()), logits(model, inputs)
    patch_model(model, tiny_mapping(model, variant))
    assert [row.variant for row in describe(model)] == [variant] * tiny.n_layers
    changed = (logits(model, inputs) - dense).abs().max().item()
    if variant == "flash":
        assert changed < 1e-4
    else:
        assert changed > 1e-4, "the layers stayed dense"
    unpatch_model(model)
    assert torch.equal(logits(model, inputs), dense)
    assert list(model.state_dict()) == keys


@each_variant
@pytest.mark.parametrize("arch", TEXT)
def test_padding(arch: str, variant: str) -> None:
    tiny = SERVED[arch]
    model = patched_tiny(tiny, variant)
    for side in ("left", "right"):
        inputs = tiny.inputs(3, 21, side)
        if side == "left" and tiny.kind == "encoder":
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
            if arch == "roberta":
                inputs["position_ids"] += 2
            if arch == "distilbert":
                continue  # takes no position_ids
        if tiny.kind == "decoder":
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
        together, mask = logits(model, inputs), output_mask(tiny, inputs)
        for row in range(3):
            alone = {}
            for name, x in inputs.items():
                keep = inputs["decoder_attention_mask" if name.startswith("decoder_") else "attention_mask"][row].bool()
                alone[name] = x[row : row + 1, keep]
            if tiny.kind == "encoder-decoder":  # learned positions count padding in these models
                for name in [n for n in alone if n.startswith("decoder_")]:
                    alone[name] = inputs[name][row : row + 1]
                if side == "left":
                    continue
            torch.testing.assert_close(
                together[row][mask[row]], logits(model, alone)[0][-mask[row].sum() :] if tiny.kind != "encoder-decoder"
                else logits(model, alone)[0][mask[row]], atol=2e-4, rtol=0,
            )  # fmt: skip
        if tiny.kind != "encoder-decoder":
            ids = inputs["input_ids"].clone()
            ids[0, 3] = ids[0, 3] % 50 + 40
            assert (logits(model, {**inputs, "input_ids": ids}) - together)[0].abs().max() > 1e-4


@each_variant
@pytest.mark.parametrize("arch", DECODERS)
def test_causality(arch: str, variant: str) -> None:
    tiny = SERVED[arch]
    model, inputs = patched_tiny(tiny, variant), tiny.inputs(2, 33)
    before = logits(model, inputs)
    for token in (9, 31):
        ids = inputs["input_ids"].clone()
        ids[:, token] = (ids[:, token] + 1) % 90 + 4
        after = logits(model, {**inputs, "input_ids": ids})
        assert (after - before)[:, :token].abs().max() < 1e-5
        assert (after - before)[:, token:].abs().max() > 1e-3


def check_generation(model, inputs, tokens: int) -> None:
    """From the cache as by full forwards: so many tokens, and about half as many by beams."""
    options = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "output_logits": True}
    options["return_dict_in_generate"] = True
    cached = model.generate(**inputs, **options)
    full = model.generate(**inputs, **options, use_cache=False)
    assert torch.equal(cached.sequences, full.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(full.logits), atol=2e-4, rtol=0)
    beams = {"num_beams": 3, "max_new_tokens": tokens // 2 + 1, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(**inputs, **beams), model.generate(**inputs, **beams, use_cache=False))


@each_variant
@pytest.mark.parametrize("arch", DECODERS)
def test_generation_from_the_cache_equals_full_forwards(arch: str, variant: str) -> None:
    tiny = SERVED[arch]
    model, inputs = patched_tiny(tiny, variant), tiny.inputs(3, 14, "left")
    check_generation(model, inputs, 10)


@each_variant
@pytest.mark.parametrize("arch", SERVED)
def test_save_and_load_is_bit_exact(arch: str, variant: str) -> None:
    tiny = SERVED[arch]
    model, inputs = patched_tiny(tiny, variant), tiny.inputs(2, 40)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = getattr(transformers, TASKS[USUAL_TASK[tiny.kind]]).from_pretrained(folder)
    assert type(loaded) is type(model)
    assert type(loaded).__name__.startswith("Efficient")
    assert loaded.config.model_type == "efficient_" + tiny.model_type
    assert describe(loaded) == describe(model)
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


@each_variant
@pytest.mark.parametrize("arch", SERVED)
def test_training_reaches_every_parameter_with_and_without_checkpointing(arch: str, variant: str) -> None:
    tiny = SERVED[arch]
    model, inputs = patched_tiny(tiny, variant).train(), tiny.inputs(2, 40)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            if not model.supports_gradient_checkpointing:
                break
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        extra = {} if "pixel_values" in inputs else {"use_cache": False}
        model(**inputs, **extra).logits.square().mean().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    new = [name for name, _ in model.named_parameters() if ".efficient_attn." in name]
    for name in new:
        assert gradients[0][name].abs().max() > 0, f"{name} does not learn"
    assert any(g.abs().max() > 0 for g in gradients[0].values())
    for name, gradient in gradients[-1].items():
        torch.testing.assert_close(gradient, gradients[0][name], atol=1e-6, rtol=1e-4)


@each_variant
@pytest.mark.parametrize("arch", SERVED)
def test_half_precision(arch: str, variant: str) -> None:
    tiny = SERVED[arch]
    model, inputs = patched_tiny(tiny, variant), tiny.inputs(2, 40)
    exact = logits(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = logits(model, inputs).float()
    assert torch.isfinite(mixed).all()
    assert torch.nn.functional.cosine_similarity(mixed.flatten(), exact.flatten(), 0) > 0.97
    halves = {k: v.to(torch.bfloat16) if k == "pixel_values" else v for k, v in inputs.items()}
    half = logits(model.to(torch.bfloat16), halves).float()
    assert torch.nn.functional.cosine_similarity(half.flatten(), exact.flatten(), 0) > 0.97


@each_variant
def test_a_subset_of_layers(variant: str) -> None:
    model = ZOO["llama"].build()
    inputs = ZOO["llama"].inputs(2, 40)
    dense = logits(model, inputs)
    patch_model(model, available_variants()[variant].config_class.tiny(True), layers=[1])
    assert [row.variant for row in describe(model)] == [None, variant]
    one = logits(model, inputs)
    cached = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    full = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None, use_cache=False)
    assert torch.equal(cached, full)
    unpatch_model(model)
    patch_model(model, available_variants()[variant].config_class.tiny(True))
    if variant != "flash":
        assert (one - dense).abs().max() > 1e-4
        assert (one - logits(model, inputs)).abs().max() > 1e-4


@each_variant
@pytest.mark.parametrize("arch", [name for name, tiny in ZOO.items() if tiny.refused])
def test_refused_architectures_raise_and_stay_as_they_were(arch: str, variant: str) -> None:
    model = ZOO[arch].build()
    inputs = ZOO[arch].inputs(2, 12)
    dense = logits(model, inputs)
    with pytest.raises(ValueError, match="no variant can honour that"):
        patch_model(model, variant)
    assert torch.equal(logits(model, inputs), dense)


@pytest.mark.slow
@each_variant
@pytest.mark.parametrize("arch", ["bert", "llama"])
def test_compiled_equals_eager(arch: str, variant: str) -> None:
    tiny = ZOO[arch]
    model = patched_tiny(tiny, variant)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    for pad in ("none", "left"):
        inputs = tiny.inputs(2, 40, pad)
        keep = output_mask(tiny, inputs)[..., None]
        torch.testing.assert_close(logits(compiled, inputs) * keep, logits(model, inputs) * keep, atol=1e-4, rtol=0)
