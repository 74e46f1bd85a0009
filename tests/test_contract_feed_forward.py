"""Every registered feed-forward variant on every architecture of the zoo that has one; both are found, none is named here."""

from __future__ import annotations

import copy
import pickle
import tempfile

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from test_contract import check_generation, logits, output_mask
from torch import nn
from transformers.pytorch_utils import Conv1D
from zoo import TASKS, USUAL_TASK, ZOO

from hf_efficient_attn import available_variants, describe, patch_model, patched, unpatch_model
from hf_efficient_attn.auxiliary import auxiliary_loss

VARIANTS = list(available_variants("feed-forward"))
SERVED = {name: tiny for name, tiny in ZOO.items() if tiny.feed_forward}
TEXT = [name for name, tiny in SERVED.items() if tiny.kind != "vision"]
DECODERS = [name for name, tiny in SERVED.items() if tiny.kind == "decoder"]
ATTENTION = [name for name, tiny in SERVED.items() if tiny.refused is None]
WINDOW = {"variant": "sliding_window", "window": 5}

each_variant = pytest.mark.parametrize("variant", VARIANTS)


def tiny_config(variant: str):
    return available_variants()[variant].config_class.tiny(True)


def moved(model):
    """The model with all new parameters off their start, so that they matter."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".efficient_attn." in name:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def busy_config(variant: str):
    """The last of its variations: one in which all new parameters serve some token."""
    return available_variants()[variant].config_class.variations(True)[-1]


def patched_tiny(arch: str, variant: str, config=None, *, attention: bool = False):
    model = SERVED[arch].build()
    patch_model(model, config or tiny_config(variant))
    if attention:
        patch_model(model, WINDOW)
    return moved(model)


def target(inputs: dict) -> dict:
    """What a model of the zoo learns here: its own input, or a class of images."""
    if "pixel_values" in inputs:
        return {"labels": torch.zeros(len(inputs["pixel_values"]), dtype=torch.long)}
    return {"labels": inputs.get("decoder_input_ids", inputs["input_ids"])}


@each_variant
@pytest.mark.parametrize("arch", SERVED)
def test_starts_as_the_dense_model_and_unpatches_to_it(arch: str, variant: str) -> None:
    tiny = SERVED[arch]
    model, inputs = tiny.build(), tiny.inputs(2, 40)
    keys, dense, kind = list(model.state_dict()), logits(model, inputs), type(model)
    for config in (tiny_config(variant), *available_variants()[variant].config_class.variations(True)):
        patch_model(model, config)
        served = {row.layer: row.variant for row in describe(model) if row.variant}
        assert served == dict.fromkeys(range(tiny.n_layers), variant)
        assert all(row.added_parameters > 0 for row in describe(model) if row.variant)
        assert set(keys) < set(model.state_dict()), "a pretrained weight has another name"
        torch.testing.assert_close(logits(model, inputs), dense, atol=2e-5, rtol=0)
        moved(model)
        assert (logits(model, inputs) - dense).abs().max() > 1e-3, "the feed-forwards stayed dense"
        unpatch_model(model)
        assert torch.equal(logits(model, inputs), dense)
        assert list(model.state_dict()) == keys
        assert type(model) is kind
        assert not any(type(module).__module__.startswith("hf_efficient_attn") for module in model.modules())


@each_variant
@pytest.mark.parametrize("arch", ATTENTION)
def test_joins_any_attention_variant_in_any_order(arch: str, variant: str) -> None:
    tiny = SERVED[arch]
    inputs, config = tiny.inputs(2, 40), tiny_config(variant)
    dense = logits(tiny.build(), inputs)
    window = logits(patch_model(tiny.build(), WINDOW), inputs)
    assert (window - dense).abs().max() > 1e-3
    orders = [[WINDOW, config], [config, WINDOW], [{None: [WINDOW, config]}], [{"0-": config, None: WINDOW}]]
    for order in orders:
        model = tiny.build()
        for choice in order:
            patch_model(model, choice)
        torch.testing.assert_close(logits(model, inputs), window, atol=2e-5, rtol=0)
        assert {row.variant for row in describe(model)} == {"sliding_window", variant}
        assert len(describe(model)) == 2 * tiny.n_layers
        moved(model)
        assert (logits(model, inputs) - window).abs().max() > 1e-3
        with pytest.raises(ValueError, match="is patched already"):
            patch_model(model, config)
        unpatch_model(model)
        assert torch.equal(logits(model, inputs), dense)


@each_variant
@pytest.mark.parametrize("attention", [False, True], ids=["alone", "with attention"])
@pytest.mark.parametrize("arch", SERVED)
def test_save_and_load_is_bit_exact(arch: str, attention: bool, variant: str) -> None:
    tiny = SERVED[arch]
    if attention and tiny.refused:
        with pytest.raises(ValueError, match="no variant can honour that"):
            patched_tiny(arch, variant, attention=True)
        return
    model, inputs = patched_tiny(arch, variant, attention=attention), tiny.inputs(2, 40)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = getattr(transformers, TASKS[USUAL_TASK[tiny.kind]]).from_pretrained(folder)
    for twin in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model)
        assert describe(twin) == describe(model)
        assert torch.equal(logits(twin, inputs), logits(model, inputs))
    moved(loaded)
    assert not torch.equal(logits(loaded, inputs), logits(model, inputs)), "the twin is not its own"


@each_variant
@pytest.mark.parametrize("arch", TEXT)
def test_padding_does_not_matter(arch: str, variant: str) -> None:
    tiny = SERVED[arch]
    model = patched_tiny(arch, variant)
    inputs = tiny.inputs(3, 21, "right")
    together, mask = logits(model, inputs), output_mask(tiny, inputs)
    for row in range(3):
        alone = {}
        for name, x in inputs.items():
            keep = inputs["decoder_attention_mask" if name.startswith("decoder_") else "attention_mask"][row].bool()
            alone[name] = x[row : row + 1, keep]
        torch.testing.assert_close(together[row][mask[row]], logits(model, alone)[0], atol=2e-4, rtol=0)


@each_variant
@pytest.mark.parametrize("attention", [False, True], ids=["alone", "with attention"])
@pytest.mark.parametrize("arch", DECODERS)
def test_generation_from_the_cache_equals_full_forwards(arch: str, attention: bool, variant: str) -> None:
    tiny = SERVED[arch]
    attention = attention and tiny.refused is None
    model, inputs = patched_tiny(arch, variant, attention=attention), tiny.inputs(3, 14, "left")
    check_generation(model, inputs, 8)


@each_variant
@pytest.mark.parametrize("attention", [False, True], ids=["alone", "with attention"])
@pytest.mark.parametrize("arch", SERVED)
def test_training_reaches_every_parameter_and_checkpointing_changes_nothing(
    arch: str, attention: bool, variant: str, monkeypatch
) -> None:
    tiny = SERVED[arch]
    attention = attention and tiny.refused is None
    model = patched_tiny(arch, variant, busy_config(variant), attention=attention)
    inputs = tiny.inputs(2, 24, "none" if tiny.kind == "vision" else "right")
    extra = {} if "pixel_values" in inputs else {"use_cache": False}
    model.train()
    with monkeypatch.context() as without:
        without.setattr("hf_efficient_attn.modeling.auxiliary_loss", lambda model: None)
        plain = model(**inputs, **target(inputs), **extra).loss.item()
    assert auxiliary_loss(model) > 1e-3
    gradients, losses = [], []
    for checkpointing in (False, True):
        if checkpointing:
            if not model.supports_gradient_checkpointing:
                break
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        loss = model(**inputs, **target(inputs), **extra).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert losses[0] > plain + 1e-3, "the auxiliary loss is missing"
    for name, _ in model.named_parameters():
        if ".efficient_attn." in name:
            assert gradients[0][name].abs().max() > 0, f"{name} does not learn"
    for name, gradient in gradients[-1].items():
        torch.testing.assert_close(gradient, gradients[0][name], atol=1e-6, rtol=1e-4)
    assert losses[-1] == pytest.approx(losses[0], abs=1e-5)


@each_variant
def test_two_forwards_before_one_backward_keep_their_own_padding(variant: str) -> None:
    """As losses over pairs of texts do it, with checkpointing, whose recomputation comes last."""
    tiny, gradients = SERVED["llama"], []
    for checkpointing in (False, True):
        model = patched_tiny("llama", variant).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        first, second = tiny.inputs(2, 12, "right", seed=1), tiny.inputs(3, 17, "right", seed=2)
        loss = sum(model(**text, **target(text), use_cache=False).loss for text in (first, second))
        loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


@each_variant
@pytest.mark.parametrize("arch", TEXT)
def test_padded_tokens_do_not_count_in_the_loss(arch: str, variant: str) -> None:
    tiny = SERVED[arch]
    model = patched_tiny(arch, variant).train()
    inputs, losses = tiny.inputs(2, 12), []
    for extra in (0, 6):
        longer = {}
        for name, x in inputs.items():
            longer[name] = torch.nn.functional.pad(x, (0, extra), value=0 if "mask" in name else 1)
        model(**longer)
        losses.append(auxiliary_loss(model))
    torch.testing.assert_close(losses[1], losses[0], atol=1e-6, rtol=1e-5)
    model(**{name: torch.ones_like(x) if "mask" in name else x for name, x in longer.items()})
    assert (auxiliary_loss(model) - losses[0]).abs() > 1e-5, "padding would not have counted anyway"


@each_variant
@pytest.mark.parametrize("arch", SERVED)
def test_half_precision(arch: str, variant: str) -> None:
    tiny = SERVED[arch]
    model, inputs = patched_tiny(arch, variant), tiny.inputs(2, 40)
    exact = logits(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = logits(model, inputs).float()
    halves = {k: v.to(torch.bfloat16) if k == "pixel_values" else v for k, v in inputs.items()}
    half = logits(model.to(torch.bfloat16), halves).float()
    for got in (mixed, half):
        assert torch.nn.functional.cosine_similarity(got.flatten(), exact.flatten(), 0) > 0.95


@each_variant
def test_a_subset_of_layers(variant: str) -> None:
    model, inputs = SERVED["llama"].build(), SERVED["llama"].inputs(2, 40)
    dense = logits(model, inputs)
    patch_model(model, tiny_config(variant), layers=[1])
    assert [(row.layer, row.variant) for row in describe(model)] == [(0, None), (1, None), (1, variant)]
    assert (logits(moved(model), inputs) - dense).abs().max() > 1e-3
    unpatch_model(model)
    with patched(model, {0: WINDOW, 1: tiny_config(variant)}):
        assert [row.variant for row in describe(model)] == ["sliding_window", None, variant]
    assert torch.equal(logits(model, inputs), dense)


@each_variant
@pytest.mark.parametrize("arch", [name for name in ZOO if name not in SERVED])
def test_models_without_such_a_feed_forward_are_refused(arch: str, variant: str) -> None:
    model, inputs = ZOO[arch].build(), ZOO[arch].inputs(2, 12)
    dense = logits(model, inputs)
    with pytest.raises(ValueError, match="has a feed-forward of linear maps"):
        patch_model(model, variant)
    assert torch.equal(logits(model, inputs), dense)


ATTENTION_MAPS = {"llama": "q_proj", "gpt2": "c_attn", "opt": "q_proj", "bart": "q_proj"}


@each_variant
@pytest.mark.parametrize("arch", ATTENTION_MAPS)
def test_lora(arch: str, variant: str, tmp_path) -> None:
    """Adapters on attention and on all that the variant added, the router trained whole: saved, loaded again, merged."""
    tiny = SERVED[arch]
    base, inputs = patched_tiny(arch, variant, busy_config(variant)), tiny.inputs(2, 12, "right")
    base.save_pretrained(tmp_path / "base")
    before = logits(base, inputs)
    added = [name for name, m in base.named_modules() if ".experts." in name and isinstance(m, (nn.Linear, Conv1D))]
    attending = [name for name, _ in base.named_modules() if name.endswith(ATTENTION_MAPS[arch])]
    config = LoraConfig(r=4, target_modules=[*attending, *added], modules_to_save=["router"], init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(base), config)
    assert (logits(model, inputs) - before).abs().max() > 1e-3
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model.train()(**inputs, **target(inputs)).loss
        loss.backward()
        losses.append(loss.item())
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    tuned = logits(model.eval(), inputs)
    model.save_pretrained(tmp_path / "adapter")
    auto = getattr(transformers, TASKS[USUAL_TASK[tiny.kind]])
    again = PeftModel.from_pretrained(auto.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(again.eval(), inputs), tuned)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, inputs), tuned, atol=1e-3, rtol=0)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(auto.from_pretrained(tmp_path / "merged"), inputs), logits(merged, inputs))


@each_variant
def test_adapters_around_the_pretrained_maps_are_refused(variant: str) -> None:
    base = patched_tiny("llama", variant)
    inputs = SERVED["llama"].inputs(2, 12)
    for target_modules in (["up_proj"], "all-linear"):
        model = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules=target_modules))
        with pytest.raises(ValueError, match="give adapters to the experts"):
            model(**inputs)
    pretrained = [f"model.layers.{i}.mlp.{name}_proj" for i in (0, 1) for name in ("gate", "up", "down")]
    config = LoraConfig(r=4, target_modules="all-linear", exclude_modules=pretrained)
    model = get_peft_model(copy.deepcopy(base), config)
    torch.testing.assert_close(logits(model, inputs), logits(base, inputs))


@pytest.mark.slow
@each_variant
@pytest.mark.parametrize("arch", ["bert", "llama"])
def test_compiled_equals_eager(arch: str, variant: str) -> None:
    tiny = SERVED[arch]
    model, inputs = patched_tiny(arch, variant, attention=True), tiny.inputs(2, 40, "left")
    torch._dynamo.reset()
    compiled, keep = torch.compile(model, backend="aot_eager"), output_mask(tiny, inputs)[..., None]
    torch.testing.assert_close(logits(compiled, inputs) * keep, logits(model, inputs) * keep, atol=1e-4, rtol=0)
