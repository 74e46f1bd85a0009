"""Longer positions: short inputs read as before, longer ones work, and the limits are raised everywhere and saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from test_modeling import output
from transformers import AutoConfig, AutoTokenizer, BertTokenizer, PreTrainedModel
from zoo import TASKS, USUAL_TASK, ZOO, Tiny

import hf_efficient_attn as hea
from hf_efficient_attn import extend_positions, patch_model, unpatch_model
from hf_efficient_attn.hosts import position_tables

LEARNED = [name for name, tiny in ZOO.items() if tiny.learned_positions]
OFFSETS = {"bert": 0, "roberta": 2, "distilbert": 0, "electra": 0, "gpt2": 0, "opt": 2, "bart": 2}
OLD, LONG = 40, 100


def build(tiny: Tiny) -> PreTrainedModel:
    """Reads 40 tokens, whatever the architecture counts in its config."""
    return tiny.build(max_position_embeddings=OLD + (2 if tiny.name == "roberta" else 0))


def auto(tiny: Tiny) -> type:
    return getattr(transformers, TASKS[USUAL_TASK[tiny.kind]])


def test_offsets_are_those_of_the_architectures():
    assert set(OFFSETS) == set(LEARNED)
    for name, offset in OFFSETS.items():
        tables = position_tables(build(ZOO[name]))
        assert {table.offset for table in tables} == {offset}, name
        assert len(tables) == (2 if name == "bart" else 1)


@pytest.mark.parametrize("name", LEARNED)
def test_short_input_is_read_as_before_and_long_input_at_all(name: str):
    tiny = ZOO[name]
    model = build(tiny)
    short, long = tiny.inputs(length=OLD), tiny.inputs(length=LONG)
    dense = output(model, short)
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        output(model, long)
    assert extend_positions(model, LONG) is model
    assert torch.equal(output(model, short), dense)
    assert output(model, long).isfinite().all()
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        output(model, tiny.inputs(length=LONG + 1))


@pytest.mark.parametrize("name", LEARNED)
def test_rows_are_repeated_behind_the_offset(name: str):
    model = build(ZOO[name])
    before = [table.module.weight.clone() for table in position_tables(model)]
    extend_positions(model, LONG)
    for old, table in zip(before, position_tables(model), strict=True):
        new, offset = table.module.weight, OFFSETS[name]
        assert new.shape == (LONG + offset, 32)
        assert new.requires_grad
        assert torch.equal(new[: OLD + offset], old)
        assert torch.equal(new[offset + OLD : offset + 2 * OLD], old[offset:])
        assert torch.equal(new[offset + 2 * OLD :], old[offset : offset + LONG - 2 * OLD])
        assert not torch.equal(new[offset], new[offset + 1])


@pytest.mark.parametrize("patch", [False, True])
@pytest.mark.parametrize("name", LEARNED)
def test_saved_and_reloaded(name: str, patch: bool, tmp_path: Path):
    tiny = ZOO[name]
    model = build(tiny)
    if patch:
        patch_model(model, "sliding_window", window=3)
    extend_positions(model, LONG)
    long = tiny.inputs(length=LONG, pad="left" if tiny.kind == "decoder" else "right")
    expected = output(model, long)
    model.save_pretrained(tmp_path)
    reloaded = auto(tiny).from_pretrained(tmp_path)
    assert torch.equal(output(reloaded, long), expected)
    assert reloaded.config.max_position_embeddings == LONG + (2 if name == "roberta" else 0)
    assert AutoConfig.from_pretrained(tmp_path).max_position_embeddings == reloaded.config.max_position_embeddings
    assert {row.variant for row in hea.describe(reloaded)} == {"sliding_window" if patch else None}
    with pytest.raises(ValueError, match=f"reads {LONG} tokens already"):
        extend_positions(reloaded, LONG)


@pytest.mark.parametrize("name", LEARNED)
def test_before_or_after_the_patch_is_the_same(name: str):
    tiny = ZOO[name]
    long = tiny.inputs(length=LONG)
    first = patch_model(extend_positions(build(tiny), LONG), "sliding_window", window=3)
    second = extend_positions(patch_model(build(tiny), "sliding_window", window=3), LONG)
    assert torch.equal(output(first, long), output(second, long))
    unpatch_model(first)
    unpatch_model(second)
    assert torch.equal(output(first, long), output(second, long))
    assert first.config.to_dict() == second.config.to_dict()


def test_state_that_depends_on_the_length_is_built_for_the_new_one():
    """A variant that is sized by the positions the model can read sees the raised limit."""
    model = extend_positions(build(ZOO["bert"]), LONG)
    patch_model(model, "linformer", rank=16)
    assert output(model, ZOO["bert"].inputs(length=LONG)).isfinite().all()
    host = model.bert.encoder.layer[0].attention.self.efficient_attn.host
    assert host.max_positions == LONG


def test_generation_beyond_the_old_limit():
    model = extend_positions(build(ZOO["gpt2"]), LONG)
    prompt = ZOO["gpt2"].inputs(batch=1, length=OLD - 5)
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    cached = model.generate(**prompt, **options)
    assert torch.equal(cached, model.generate(**prompt, **options, use_cache=False))
    assert cached.shape[1] == OLD + 15


def test_gradients_reach_the_new_rows():
    model = extend_positions(build(ZOO["bert"]), LONG)
    model(**ZOO["bert"].inputs(length=LONG)).logits.square().mean().backward()
    gradient = model.bert.embeddings.position_embeddings.weight.grad
    assert (gradient.abs().sum(1) > 0).all()


def test_limit_of_the_tokenizer(tmp_path: Path):
    model = build(ZOO["bert"])
    tokenizer = BertTokenizer(
        vocab={word: i for i, word in enumerate(["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", "a"])}
    )
    tokenizer.model_max_length = OLD
    text = " ".join("a" * 300)
    assert len(tokenizer(text, truncation=True)["input_ids"]) == OLD
    extend_positions(model, LONG, tokenizer)
    assert len(tokenizer(text, truncation=True)["input_ids"]) == LONG
    patch_model(model, "block").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == LONG


def test_rotary_models_are_told_about_rope_parameters():
    for name in ("llama", "gpt_neox", "modernbert"):
        with pytest.raises(
            ValueError, match=r"no learned positions; it rotates queries and keys: set `rope_parameters`"
        ):
            extend_positions(ZOO[name].build(), 4096)


def test_models_without_a_table_are_refused():
    with pytest.raises(ValueError, match="its positions have no table to extend"):
        extend_positions(ZOO["t5"].build(), 4096)


@pytest.mark.parametrize("max_length", [OLD, 3, 0, -5, 1000.0, "1000", True, None])
def test_length_that_is_no_extension(max_length: object):
    model = build(ZOO["bert"])
    before = {name: x.shape for name, x in model.state_dict().items()}
    words = f"BertForMaskedLM reads {OLD} tokens already; give more" if type(max_length) is int else "give an integer"
    with pytest.raises(ValueError, match=f"max_length = {max_length!r}: {words}"):
        extend_positions(model, max_length)
    assert {name: x.shape for name, x in model.state_dict().items()} == before
    assert model.config.max_position_embeddings == OLD


def test_longer_tables_and_those_of_no_token_stay():
    """A decoder that reads more already, places on a page, and an encoder of pictures."""
    sizes = {"vocab_size": 50, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "attention_window": [4]}
    led = transformers.LEDModel(
        transformers.LEDConfig(**sizes, max_encoder_position_embeddings=64, max_decoder_position_embeddings=16)
    )
    extend_positions(led, 32)
    assert [table.module.num_embeddings for table in position_tables(led)] == [64, 32]
    assert (led.config.max_encoder_position_embeddings, led.config.max_decoder_position_embeddings) == (64, 32)

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    page = transformers.LayoutLMModel(
        transformers.LayoutLMConfig(vocab_size=50, max_position_embeddings=16, max_2d_position_embeddings=64, **small)
    )
    extend_positions(page, 32)
    assert page.embeddings.x_position_embeddings.num_embeddings == 64
    assert page.embeddings.position_embeddings.num_embeddings == page.config.max_position_embeddings == 32

    clip = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={"vocab_size": 50, "max_position_embeddings": 16, **small},
            vision_config={"image_size": 8, "patch_size": 4, **small},
        )
    )
    extend_positions(clip, 32)
    text = {"input_ids": torch.randint(3, 40, (1, 30)), "pixel_values": torch.randn(1, 3, 8, 8)}
    assert torch.isfinite(clip(**text).logits_per_image).all()


def test_what_cannot_be_extended_says_so():
    sinusoids = transformers.MarianMTModel(
        transformers.MarianConfig(
            vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1, max_position_embeddings=16, pad_token_id=0,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match="no table to extend"):
        extend_positions(sinusoids, 32)
    masks = transformers.GPTNeoForCausalLM(
        transformers.GPTNeoConfig(
            vocab_size=50, hidden_size=16, num_layers=1, num_heads=2, attention_types=[[["global"], 1]],
            max_position_embeddings=16, intermediate_size=16,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match="keeps a mask of 16 x 16"):
        extend_positions(masks, 32)
    assert masks.transformer.wpe.num_embeddings == masks.config.max_position_embeddings == 16
