"""The zoo is what it says it is: every model builds, runs, attends far from uniformly, and ignores padding."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import PreTrainedModel
from zoo import PAD, TASKS, VOCABULARY, ZOO

TEXTS = [name for name, tiny in ZOO.items() if tiny.kind != "vision"]


def embedded(model, inputs, seed):
    """The inputs with embeddings instead of ids, random wherever the attention mask is 0."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, value in inputs.items():
        if name.endswith("input_ids"):
            embeddings = model.get_input_embeddings()(value)
            keep = inputs[name.replace("input_ids", "attention_mask")].bool()[..., None]
            noise = torch.randn(embeddings.shape, generator=generator)
            out[name.replace("input_ids", "inputs_embeds")] = embeddings.where(keep, noise)
        else:
            out[name] = value
    return out


@pytest.mark.parametrize("name", ZOO)
def test_builds_and_runs(name):
    tiny = ZOO[name]
    model = tiny.build()
    assert not model.training
    assert model.dtype == torch.float32
    assert sum(p.numel() for p in model.parameters()) < 200_000
    assert not [m for m in model.modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]
    eager = tiny.model_type in ("gemma2", "gpt_oss")  # newer Transformers runs softcap and sink logits eagerly
    assert model.config._attn_implementation in (("eager", "sdpa") if eager else ("sdpa",))
    logits = model(**tiny.inputs(batch=2, length=9)).logits
    assert torch.isfinite(logits).all()
    assert logits.shape == ((2, 2) if tiny.kind == "vision" else (2, 9, VOCABULARY))


@pytest.mark.parametrize("name", ZOO)
def test_the_seed_decides_the_weights_and_overrides_reach_the_config(name):
    tiny = ZOO[name]
    one, same, other = (tiny.build(seed=s).state_dict() for s in (0, 0, 1))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)
    assert tiny.build(num_hidden_layers=3).config.num_hidden_layers == 3


@pytest.mark.parametrize("name", ZOO)
def test_n_layers_counts_self_attention(name):
    """One call of a dispatching module without states of another sequence is one self-attention layer."""
    tiny = ZOO[name]
    model = tiny.build()
    calls = []

    def hook(module, args, kwargs):
        if kwargs.get("key_value_states") is None:
            calls.append(module)

    for module in model.modules():
        if not isinstance(module, PreTrainedModel) and hasattr(module, "is_causal") and hasattr(module, "config"):
            module.register_forward_pre_hook(hook, with_kwargs=True)
    model(**tiny.inputs())
    assert len(calls) == len(set(calls)) == tiny.n_layers


@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("name", TEXTS)
def test_padding_is_ignored_and_only_thanks_to_the_mask(name, pad):
    tiny = ZOO[name]
    model = tiny.build()
    inputs = tiny.inputs(batch=3, length=12, pad=pad)
    keep = inputs.get("decoder_attention_mask", inputs["attention_mask"]).bool()
    assert keep.all(1).tolist() == [True, False, False]
    assert (inputs["input_ids"][~inputs["attention_mask"].bool()] == PAD).all()
    with torch.no_grad():
        one, other = (model(**embedded(model, inputs, seed)).logits[keep] for seed in (1, 2))
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
        unmasked = []
        for seed in (1, 2):
            blind = embedded(model, inputs, seed)
            for key in blind:
                if key.endswith("attention_mask"):
                    blind[key] = torch.ones_like(blind[key])
            unmasked.append(model(**blind).logits[keep])
    seen = (unmasked[0] - unmasked[1]).abs().max()
    if pad == "left" or tiny.kind != "decoder":  # a causal model never sees what is to its right
        assert seen > 1e-2
    else:
        assert seen < 1e-5


@pytest.mark.parametrize("name", ZOO)
def test_attention_is_far_from_uniform(name):
    """Otherwise a variant that averaged all values would pass for attention."""
    tiny = ZOO[name]
    model = tiny.build(attn_implementation="eager")
    with torch.no_grad():
        out = model(**tiny.inputs(length=16), output_attentions=True)
    for weights in out.decoder_attentions if tiny.kind == "encoder-decoder" else out.attentions:
        assert weights[:, :, -1].amax(-1).mean() > 1.5 / 16


@pytest.mark.parametrize("name", TEXTS)
def test_learned_positions_bound_the_length(name):
    tiny = ZOO[name]
    model = tiny.build()
    with torch.no_grad():
        assert torch.isfinite(model(**tiny.inputs(batch=1, length=512)).logits).all()
        if tiny.learned_positions:
            with pytest.raises((IndexError, RuntimeError, ValueError)):
                model(**tiny.inputs(batch=1, length=520))
        else:
            assert torch.isfinite(model(**tiny.inputs(batch=1, length=520)).logits).all()


@pytest.mark.parametrize("task", TASKS)
def test_heads_build(task):
    name = {"image-classification": "vit", "seq2seq-lm": "bart", "causal-lm": "llama"}.get(task, "bert")
    tiny = ZOO[name]
    model = tiny.build_for(task)
    inputs = tiny.inputs(length=8)
    if task == "multiple-choice":
        inputs = {key: value[:, None].repeat(1, 3, 1) for key, value in inputs.items()}
    out = model(**inputs)
    assert torch.isfinite(out[0]).all()


@pytest.mark.parametrize("name", [name for name, tiny in ZOO.items() if tiny.kind == "decoder"])
def test_decoders_generate(name):
    tiny = ZOO[name]
    out = tiny.build().generate(
        **tiny.inputs(length=6, pad="left"), max_new_tokens=4, min_new_tokens=4, do_sample=False
    )
    assert out.shape == (2, 10)


def test_inputs_refuse_what_they_cannot_do():
    with pytest.raises(ValueError, match="'left' or 'right'"):
        ZOO["bert"].inputs(pad="middle")
    with pytest.raises(ValueError, match="images"):
        ZOO["vit"].inputs(pad="left")


def test_a_deprecation_logged_by_transformers_is_an_error(deprecations):
    logging.getLogger("transformers.models.bert").warning("`old` is Deprecated, use `new`.")
    logging.getLogger("transformers.models.bert").warning("nothing of the kind")
    logging.getLogger("elsewhere").warning("deprecated too, but not Transformers' word")
    with pytest.raises(AssertionError, match=r"transformers\.models\.bert: `old` is Deprecated"):
        deprecations.check()
    deprecations.check()  # said once
