"""Text from patched decoders: with a cache as without, in batches, beams, turns, and with an assistant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from zoo import PAD, ZOO

from hf_efficient_attn import patch_model, patched
from hf_efficient_attn.caching import AttentionState
from hf_efficient_attn.registry import get_config_class

DECODERS = ("gpt2", "opt", "gpt_neox", "llama", "mistral", "qwen3", "gemma2_nocap", "phi3")
VARIANTS = {
    "flash": {},
    "block": {"block_size": 6, "num_sinks": 2},
    "sliding_window": {"window": 4, "num_sinks": 2},
    "transformer_xl": {"segment_size": 5, "memory_size": 4, "num_sinks": 1},
    "topk_blocks": {"block_size": 4, "top_k": 2},
    "linformer": {"rank": 8, "max_length": 32, "segment_size": 4, "exact_segments": 0, "num_sinks": 1},
}
SPARSE = ("sliding_window", {"window": 4, "num_sinks": 2})
GREEDY = {"do_sample": False, "max_new_tokens": 10, "min_new_tokens": 10}


def patched_decoder(name: str, variant: str = SPARSE[0], **hyper: Any) -> PreTrainedModel:
    return patch_model(ZOO[name].build(), variant, **(hyper or VARIANTS[variant]))


def generated(model: PreTrainedModel, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """The new tokens alone."""
    length = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    return model.generate(**inputs, **{**GREEDY, **options})[:, length:]


def row(inputs: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """One text of a left-padded batch, without its padding."""
    keep = inputs["attention_mask"][index].bool()
    return {name: x[index : index + 1, keep] for name, x in inputs.items()}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_greedy_with_the_cache_equals_without(name: str, variant: str):
    model, inputs = patched_decoder(name, variant), ZOO[name].inputs(length=13, pad="left")
    with_cache = generated(model, inputs)
    assert torch.equal(with_cache, generated(model, inputs, use_cache=False))
    assert with_cache.shape == (2, 10)
    if variant != "flash":
        assert not torch.equal(with_cache, generated(ZOO[name].build(), inputs))


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_generates_with_the_cache_as_without(name: str):
    model, inputs = patched_decoder(name), ZOO[name].inputs(length=13, pad="left")
    assert torch.equal(generated(model, inputs), generated(model, inputs, use_cache=False))


@pytest.mark.parametrize("variant", VARIANTS)
def test_padded_batch_equals_each_text_alone(variant: str):
    model, inputs = patched_decoder("llama", variant), ZOO["llama"].inputs(batch=4, length=13, pad="left")
    together = generated(model, inputs)
    for index in range(4):
        assert torch.equal(together[index : index + 1], generated(model, row(inputs, index))), index
    assert len({tuple(text.tolist()) for text in together}) == 4


@pytest.mark.parametrize("variant", VARIANTS)
def test_beams(variant: str):
    model, inputs = patched_decoder("llama", variant), ZOO["llama"].inputs(length=13, pad="left")
    options = {"num_beams": 3, "num_return_sequences": 2}
    beams = generated(model, inputs, **options)
    assert torch.equal(beams, generated(model, inputs, **options, use_cache=False))
    assert beams.shape[0] == 4
    assert not torch.equal(beams[::2], generated(model, inputs))


def test_sampling_with_a_seed():
    model, inputs = patched_decoder("llama"), ZOO["llama"].inputs(length=13, pad="left")
    texts = []
    for seed, use_cache in ((0, True), (0, False), (1, True)):
        torch.manual_seed(seed)
        texts.append(generated(model, inputs, do_sample=True, num_return_sequences=2, use_cache=use_cache))
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("assistant", ["dense", "patched"])
def test_assisted_decoding_equals_greedy(variant: str, assistant: str, deprecations: Any):
    """The assistant's guesses are read in one forward, and the wrong ones are taken back."""
    model, inputs = patched_decoder("llama", variant), ZOO["llama"].inputs(batch=1, length=13)
    helper = ZOO["llama"].build(seed=0 if assistant == "dense" else 1)
    if assistant == "patched":
        patch_model(helper, "sliding_window", window=3)
    alone = generated(model, inputs)
    assert torch.equal(generated(model, inputs, assistant_model=helper), alone)
    deprecations.messages.clear()  # how Transformers calls the assistant


@pytest.mark.parametrize("variant", VARIANTS)
def test_prompt_lookup_equals_greedy(variant: str):
    model = patched_decoder("llama", variant)
    ids = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(generated(model, inputs, prompt_lookup_num_tokens=3), generated(model, inputs))


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_a_cache_that_comes_back_from_assisted_decoding_records_no_more(name: str, deprecations: Any):
    """Else every later call would keep the state before it."""
    model, inputs = patched_decoder(name), ZOO[name].inputs(batch=1, length=13)
    both = model.config.is_encoder_decoder
    cache = EncoderDecoderCache(own := DynamicCache(), DynamicCache()) if both else (own := DynamicCache())
    text = model.generate(**inputs, **GREEDY, assistant_model=ZOO[name].build(), past_key_values=cache)
    deprecations.messages.clear()  # how Transformers calls the assistant
    read, last = {"input_ids": inputs["input_ids"]}, text[:, -1:]
    with torch.no_grad():
        for _ in range(5):
            model(**(read | {"decoder_input_ids": last} if both else {"input_ids": last}), past_key_values=cache)
    states = [layer for layer in own.layers if isinstance(layer, AttentionState)]
    assert states and not any(layer.record_past or layer.records for layer in states)


def test_dense_model_with_a_patched_assistant(deprecations: Any):
    model, inputs = ZOO["llama"].build(), ZOO["llama"].inputs(batch=1, length=13)
    assert torch.equal(generated(model, inputs, assistant_model=patched_decoder("llama")), generated(model, inputs))
    deprecations.messages.clear()  # how Transformers calls the assistant


@pytest.mark.parametrize("with_config", [True, False])
def test_cache_of_the_user(with_config: bool):
    model, inputs = patched_decoder("llama"), ZOO["llama"].inputs(batch=2, length=13)
    cache = DynamicCache(config=model.config) if with_config else DynamicCache()
    assert torch.equal(generated(model, inputs, past_key_values=cache), generated(model, inputs))
    assert cache.get_seq_length() == 13 + 9
    assert [type(layer).__name__ for layer in cache.layers] == ["AttentionState"] * 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_several_turns_with_one_cache(variant: str):
    """Each turn reads what is new; the text is that of reading the whole conversation from the start."""
    model = patched_decoder("llama", variant)
    cache, text = DynamicCache(), ZOO["llama"].inputs(batch=1, length=9)["input_ids"]
    for turn in range(3):
        whole = generated(model, {"input_ids": text, "attention_mask": torch.ones_like(text)}, use_cache=False)
        mask = torch.ones_like(text)
        text = model.generate(input_ids=text, attention_mask=mask, past_key_values=cache, **GREEDY)
        assert torch.equal(text[:, -10:], whole), turn
        text = torch.cat([text, ZOO["llama"].inputs(batch=1, length=5, seed=turn + 1)["input_ids"]], 1)


@torch.no_grad()
def test_one_long_prompt_read_in_pieces():
    model, inputs = patched_decoder("llama"), ZOO["llama"].inputs(batch=1, length=40)
    ids = inputs["input_ids"]
    whole = model(ids).logits
    cache, pieces = DynamicCache(), []
    for begin, end in ((0, 17), (17, 18), (18, 33), (33, 40)):
        pieces.append(model(ids[:, begin:end], past_key_values=cache).logits)
    assert (torch.cat(pieces, 1) - whole).abs().max() < 1e-4


def test_prefill_in_chunks():
    model, inputs = patched_decoder("llama"), ZOO["llama"].inputs(batch=1, length=40)
    assert torch.equal(generated(model, inputs, prefill_chunk_size=16), generated(model, inputs))


@torch.no_grad()
def test_state_of_constant_size():
    model, inputs = patched_decoder("llama"), ZOO["llama"].inputs(batch=1, length=200)
    sizes = []
    for length in (50, 100, 200):
        cache = DynamicCache()
        model(inputs["input_ids"][:, :length], past_key_values=cache)
        model(inputs["input_ids"][:, :1], past_key_values=cache)
        sizes.append(sum(layer.nbytes for layer in cache.layers))
    assert sizes[0] == sizes[1] == sizes[2] > 0


def test_mixture_of_dense_and_patched_layers():
    inputs = ZOO["llama"].inputs(batch=3, length=13, pad="left")
    for layers in ([0], [1]):
        model = patch_model(ZOO["llama"].build(), *SPARSE[:1], layers=layers, **SPARSE[1])
        together = generated(model, inputs)
        assert torch.equal(together, generated(model, inputs, use_cache=False))
        assert torch.equal(
            generated(model, inputs, num_beams=3), generated(model, inputs, num_beams=3, use_cache=False)
        )
        assert torch.equal(together[1:2], generated(model, row(inputs, 1)))
        alone = row(inputs, 0)
        helped = generated(model, alone, assistant_model=ZOO["llama"].build())
        assert torch.equal(helped, generated(model, alone))


@pytest.mark.parametrize("variant", VARIANTS)
def test_encoder_decoder(variant: str):
    tiny = ZOO["bart"]
    inputs = {k: v for k, v in tiny.inputs(length=13, pad="right").items() if not k.startswith("decoder_")}
    model = patch_model(tiny.build(), variant, **VARIANTS[variant])
    greedy = generated(model, inputs)
    assert torch.equal(greedy, generated(model, inputs, use_cache=False))
    beams = generated(model, inputs, num_beams=3)
    assert torch.equal(beams, generated(model, inputs, num_beams=3, use_cache=False))
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    assert torch.equal(generated(model, inputs, past_key_values=cache), greedy)
    assert {type(layer).__name__ for layer in cache.self_attention_cache.layers} == {"AttentionState"}
    assert {type(layer).__name__ for layer in cache.cross_attention_cache.layers} == {"DynamicLayer"}


def test_dense_again_after_generation():
    model, inputs = ZOO["llama"].build(), ZOO["llama"].inputs(length=13, pad="left")
    dense = generated(model, inputs)
    with patched(model, SPARSE[0], **SPARSE[1]):
        assert not torch.equal(generated(model, inputs), dense)
    assert torch.equal(generated(model, inputs), dense)


def test_scores_and_hidden_states_are_returned():
    model, inputs = patched_decoder("llama"), ZOO["llama"].inputs(length=13)
    result = model.generate(
        **inputs, **GREEDY, return_dict_in_generate=True, output_scores=True, output_hidden_states=True
    )
    assert torch.equal(torch.stack(result.scores, 1).argmax(-1), result.sequences[:, 13:])
    assert result.hidden_states[0][1].shape == (2, 13, 32)
    with pytest.raises(ValueError, match="output_attentions"):
        model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_attentions=True)


def test_padding_tokens_of_finished_texts_do_not_matter():
    """A text that has ended is filled up while the others go on."""
    model, inputs = patched_decoder("llama"), ZOO["llama"].inputs(batch=4, length=13, pad="left")
    endless = generated(model, inputs)
    end = int(endless[1, 3])
    stopped = generated(model, inputs, eos_token_id=end, min_new_tokens=0)
    for index in range(4):
        text = endless[index].tolist()
        length = text.index(end) + 1 if end in text else 10
        expected = text[:length] + [PAD] * (stopped.shape[1] - length)
        assert stopped[index].tolist() == expected[: stopped.shape[1]]


@torch.no_grad()
def test_tokens_to_take_back_counted_by_a_tensor():
    """Assisted decoding of Transformers 5.17 counts them so."""
    model, ids = patched_decoder("llama"), ZOO["llama"].inputs(batch=1, length=20)["input_ids"]
    logits = []
    for remove in (-3, torch.tensor(-3)):
        cache = DynamicCache(config=model.config)
        model(ids[:, :8], past_key_values=cache)
        cache.activate_past_recording()
        model(ids[:, 8:14], past_key_values=cache)
        cache.crop(remove)
        assert type(cache.get_seq_length()) is int
        logits.append(model(ids[:, 11:], past_key_values=cache).logits)
    assert torch.equal(*logits)
    assert (logits[0] - model(ids).logits[:, 11:]).abs().max() < 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_draft_by_the_first_layers(variant: str, deprecations: Any):
    """A model drafts for itself by its first layer, with a cache of one layer."""
    model, inputs = patched_decoder("llama", variant), row(ZOO["llama"].inputs(length=13), 0)
    assert torch.equal(generated(model, inputs, assistant_early_exit=1), generated(model, inputs))
    deprecations.messages.clear()  # how Transformers calls the assistant


def test_a_mask_that_hides_what_the_cache_has_read_raises():
    """Attention cannot forget these tokens, and dense attention would."""
    model, inputs = patched_decoder("llama"), ZOO["llama"].inputs(length=20)
    ids, mask = inputs["input_ids"], torch.ones_like(inputs["input_ids"])

    def second(first_mask: Tensor, mask: Tensor) -> Tensor:
        cache = DynamicCache()
        model(ids[:, :12], attention_mask=first_mask[:, :12], past_key_values=cache)
        position = torch.arange(12, 20)[None]
        return model(ids[:, 12:], attention_mask=mask, past_key_values=cache, position_ids=position).logits

    hidden = mask.clone()
    hidden[0, 3:7] = 0
    assert torch.isfinite(second(mask, mask)).all()
    assert torch.isfinite(second(hidden, hidden)).all()
    for before, now in ((mask, hidden), (hidden, hidden.flip(1))):
        with pytest.raises(ValueError, match="hides other tokens of the cache"):
            second(before, now)


@torch.no_grad()
def test_a_cache_of_a_call_that_failed_is_refused():
    """Layers before the failing one hold its tokens, those behind do not: going on would shift positions without a word."""
    model, tokens = (
        patch_model(ZOO["llama"].build(), "sliding_window", window=4),
        ZOO["llama"].inputs(length=9)["input_ids"],
    )
    cache = DynamicCache()
    model(tokens[:, :5], past_key_values=cache)
    variant = model.model.layers[1].self_attn.efficient_attn
    attend, variant.attend = variant.attend, lambda *args, **kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        model(tokens[:, 5:], past_key_values=cache)
    variant.attend = attend
    with pytest.raises(ValueError, match="a call failed in layer 1 of this cache"):
        model(tokens[:, 5:], past_key_values=cache)
    cache.reset()
    again = model(tokens, past_key_values=cache).logits
    assert torch.equal(again, model(tokens, use_cache=False).logits)


def test_continuous_batching_is_refused_at_once():
    model = patched_decoder("llama")
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is patched, and continuous batching .* in pages"):
        model.generate_batch([[5, 6, 7]], max_new_tokens=2)
    assert generated(model, ZOO["llama"].inputs()).shape == (2, 10)


@pytest.mark.parametrize("layers", ["2-3", "0-3"])
def test_a_further_decoder_in_the_model_takes_no_place_in_the_cache(layers: str):
    """As that of the codes of sound in CSM, whose layers are counted from 0 again."""
    model, inputs = ZOO["llama"].build(), ZOO["llama"].inputs(length=13, pad="left")
    model.depth_decoder = ZOO["gpt2"].build()
    patch_model(model, {"2-3": "block", **({} if layers == "2-3" else {"0-1": "flash"})})
    assert torch.equal(generated(model, inputs), generated(ZOO["llama"].build(), inputs))


@torch.no_grad()
@pytest.mark.parametrize(
    "variant", ["block", "sliding_window", "infini", "hedgehog", "compressive", "linformer", "sinkhorn"]
)
def test_unequal_rows_token_by_token(variant: str):
    """Layers share what they make for rows that have come unequally far; rows complete segments at different tokens."""
    model = patch_model(ZOO["llama"].build(), get_config_class(variant).tiny(True))
    inputs = ZOO["llama"].inputs(batch=3, length=45, pad="left")
    ids, mask, cache = inputs["input_ids"], inputs["attention_mask"], DynamicCache()
    whole, pieces, begin = model(ids, attention_mask=mask, use_cache=False).logits, [], 0
    for end in (24, *range(25, 37), 39, 40, 45):
        read = model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache)
        pieces.append(read.logits)
        begin = end
    real = mask.bool()
    assert not real[:, :24].all()
    assert (torch.cat(pieces, 1) - whole)[real].abs().max() < 1e-4
