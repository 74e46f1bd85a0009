"""The attention function of patched models and the masks it is given: honoured, or refused in a sentence."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)
from zoo import ZOO

from hf_efficient_attn import patch_model
from hf_efficient_attn.dispatch import efficient_attention_forward
from hf_efficient_attn.masking import AttentionMask, efficient_attention_mask, key_padding

WINDOW = {"window": 4, "num_sinks": 2}


def decoder(name: str = "llama", variant: str = "sliding_window", **options) -> PreTrainedModel:
    return patch_model(ZOO[name].build(), variant, **{**(WINDOW if variant == "sliding_window" else {}), **options})


def ids(length: int = 13) -> Tensor:
    return ZOO["llama"].inputs(length=length)["input_ids"]


def apart(x: Tensor, y: Tensor) -> float:
    return (x - y).abs().max().item()


# Masks of a call


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_padding_mask_of_any_type(name: str, dtype: torch.dtype):
    model, inputs = decoder(name), ZOO[name].inputs(length=13, pad="left" if name == "llama" else "right")
    mask = inputs.pop("attention_mask")
    real = mask.bool()
    expected = model(**inputs, attention_mask=mask).logits[real]
    assert torch.equal(model(**inputs, attention_mask=mask.to(dtype)).logits[real], expected)
    assert apart(model(**inputs).logits[real], expected) > 1e-3


@torch.no_grad()
def test_a_mask_of_ones_is_no_mask():
    model, tokens = decoder(), ids()
    assert apart(model(tokens, attention_mask=torch.ones_like(tokens)).logits, model(tokens).logits) == 0


@torch.no_grad()
def test_a_row_of_padding_alone_is_finite_and_touches_no_other():
    model, tokens = decoder(), ids()
    mask = torch.ones_like(tokens)
    mask[1] = 0
    logits = model(tokens, attention_mask=mask).logits
    assert logits.isfinite().all()
    assert apart(logits[0], model(tokens).logits[0]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_hole_in_the_mask_is_as_if_the_token_were_not_there(name: str):
    model, tokens = decoder(name), ids()
    mask = torch.ones_like(tokens)
    mask[:, [3, 7]] = 0
    keep = mask[0].bool()
    position = torch.arange(13)[None]
    holes = model(tokens, attention_mask=mask, position_ids=position).logits[:, keep]
    options = {"position_ids": position[:, keep], "attention_mask": mask[:, keep]}
    assert apart(holes, model(tokens[:, keep], **options).logits) < 1e-4
    assert apart(holes, model(tokens, position_ids=position).logits[:, keep]) > 1e-3


@pytest.mark.parametrize("name", ["llama", "mistral", "bert"])
def test_a_mask_longer_than_the_text_raises(name: str):
    model = decoder(name)
    options = {} if name == "bert" else {"use_cache": False}
    with pytest.raises(ValueError, match="mask covers 20 tokens, the layer has 13"):
        model(ids(), attention_mask=torch.ones(2, 20), **options)


@pytest.mark.parametrize("shape", [(2, 1, 13, 13), (2, 13, 13)])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_mask_that_is_no_padding_raises(name: str, shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"4-D mask|\(batch, tokens\)"):
        decoder(name)(ids(), attention_mask=torch.ones(shape, dtype=torch.bool))


@torch.no_grad()
def test_a_4d_mask_that_is_a_padding_is_one():
    model, inputs = decoder("bert"), ZOO["bert"].inputs(length=13, pad="right")
    mask, tokens = inputs["attention_mask"].bool(), inputs["input_ids"]
    expected = model(tokens, attention_mask=mask).logits[mask]
    four = mask[:, None, None]
    assert apart(model(tokens, attention_mask=four).logits[mask], expected) == 0
    added = torch.zeros(four.shape).masked_fill(~four, torch.finfo(torch.float32).min)
    assert apart(model(tokens, attention_mask=added).logits[mask], expected) == 0
    with pytest.raises(ValueError, match="4-D mask"):
        model(tokens, attention_mask=added + 0.5)  # a bias, not a padding


def test_key_padding():
    keep = torch.tensor([[True, False]])
    assert torch.equal(key_padding(keep[:, None, None]), keep)
    assert key_padding(keep[:, None, None].expand(1, 1, 2, 2)) is None
    assert key_padding(keep) is None
    assert key_padding(torch.tensor([[[[0.0, -1.0]]]])) is None


# What the mask factory asks for


def mask_of(function, length: int = 8, **options) -> AttentionMask:
    sizes = {"batch_size": 2, "q_length": length, "kv_length": length, "attention_mask": None, "dtype": torch.float32}
    return efficient_attention_mask(mask_function=function, **{**sizes, **options})


def test_directions_are_read_off_the_mask_function():
    assert mask_of(causal_mask_function).causal is True
    assert mask_of(bidirectional_mask_function).causal is False


@pytest.mark.parametrize(
    ("function", "causal", "reach"),
    [
        (sliding_window_causal_mask_function, True, 8),
        (sliding_window_bidirectional_mask_function, False, 7),
        (lambda size: chunked_causal_mask_function(size, torch.zeros(2, dtype=torch.long)), True, 8),
    ],
)
def test_a_window_is_fine_as_long_as_it_hides_nothing(function, causal: bool, reach: int):
    wide, narrow = (mask_of(function(size), local_size=size) for size in (reach, reach - 1))
    assert (wide.causal, wide.custom) == (causal, None)
    assert "window of" in narrow.custom
    dense = wide.dense("sdpa", torch.device("cpu"))
    everything = torch.ones(8, 8, dtype=torch.bool)
    assert dense is None or torch.equal(dense[0, 0], everything.tril() if causal else everything)
    assert narrow.dense("sdpa", torch.device("cpu"))[0, 0].sum() < (36 if causal else 64)


def test_a_mask_function_of_the_models_own_is_refused():
    assert mask_of(lambda batch, head, query, key: key <= query).custom is not None


def test_a_mask_made_for_one_query_serves_all():
    """Some encoders ask for a mask of one row, to be broadcast over the queries."""
    layer = decoder("bert", "flash").bert.encoder.layer[0].attention.self
    keep = torch.arange(5) < torch.tensor([[5], [3]])
    heads = torch.randn(2, 4, 5, 8)
    one, all_ = (mask_of(bidirectional_mask_function, q_length=n, kv_length=5, attention_mask=keep) for n in (1, 5))
    output = efficient_attention_forward(layer, heads, heads, heads, one)[0]
    assert torch.equal(output, efficient_attention_forward(layer, heads, heads, heads, all_)[0])
    assert apart(output[1, :3], efficient_attention_forward(layer, heads, heads, heads, None)[0][1, :3]) > 1e-3


def test_a_mask_made_already_stays():
    mask = mask_of(causal_mask_function)
    assert mask_of(causal_mask_function, attention_mask=mask) is mask
    assert (mask.ndim, tuple(mask.shape)) == (4, (2, 1, 8, 8))


@pytest.mark.parametrize(
    "use", [lambda m: torch.ones(8, 8) + m, lambda m: torch.where(m, 1, 0), lambda m: m[:, :, -1:]]
)
def test_code_that_computes_with_the_mask_gets_a_sentence(use):
    with pytest.raises(ValueError, match="cannot be patched"):
        use(mask_of(causal_mask_function))
    with pytest.raises(AttributeError, match=r"asked for \.dtype"):
        _ = mask_of(causal_mask_function).dtype


def test_tokens_that_see_each_other_inside_a_window_raise():
    """Images in a text: a window whose blocks also look ahead is not a plain window."""
    from transformers.masking_utils import create_sliding_window_causal_mask

    config = ZOO["mistral"].config()
    config._attn_implementation = "efficient_attention"
    options = {
        "config": config,
        "inputs_embeds": torch.zeros(1, 8, 32),
        "attention_mask": None,
        "past_key_values": None,
    }
    assert create_sliding_window_causal_mask(**options).custom is None
    blocks = torch.tensor([[-1, 0, 0, 0, -1, -1, -1, -1]])
    assert create_sliding_window_causal_mask(**options, block_sequence_ids=blocks).custom is not None


# What reaches the attention function


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"position_bias": torch.zeros(1)}, "position bias"),
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.zeros(4)}, "sink logits"),
        ({"indices": torch.zeros(1)}, "chooses the tokens"),
        ({"is_causal": False}, "built for a causal layer, called as bidirectional"),
        ({"output_attentions": True}, "forms no attention matrix"),
    ],
)
def test_arguments_that_change_the_result_raise(options: dict, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        decoder()(ids(), **options)


def test_an_architectures_own_window_raises_only_where_it_hides_tokens():
    model = decoder("mistral")
    assert model(ids(64)).logits.isfinite().all()
    with pytest.raises(ValueError, match="window of 64"):
        model(ids(65))


def heads(length: int = 5, count: int = 4, size: int = 8) -> Tensor:
    return torch.zeros(2, count, length, size)


@pytest.mark.parametrize(
    ("query", "key", "sentence"),
    [
        (heads(count=2), heads(), "heads, head size"),
        (heads(size=4), heads(size=4), "heads, head size"),
        (heads(), heads(length=7), "5 queries meet 7 keys"),
    ],
)
def test_heads_that_do_not_fit_raise(query: Tensor, key: Tensor, sentence: str):
    layer = decoder("bert").bert.encoder.layer[0].attention.self
    with pytest.raises(ValueError, match=sentence):
        efficient_attention_forward(layer, query, key, key, None)
    assert efficient_attention_forward(layer, heads(), heads(), heads(), None)[0].shape == (2, 5, 4, 8)


def test_the_name_alone_patches_nothing_in_silence():
    model = ZOO["llama"].build()
    model.set_attn_implementation("efficient_attention")
    with pytest.raises(RuntimeError, match="belongs to no patched model"):
        model(ids())


def test_a_dense_layer_without_all_of_its_keys_raises():
    module = SimpleNamespace(_dense_implementation="sdpa", is_causal=True)
    with pytest.raises(RuntimeError, match="3 keys where its mask covers 8"):
        efficient_attention_forward(module, heads(3), heads(3), heads(3), mask_of(causal_mask_function))


def test_self_attention_called_with_another_sequence_raises():
    layer = decoder("bart").model.decoder.layers[0].self_attn
    with pytest.raises(ValueError, match="key_value_states"):
        layer(torch.zeros(2, 5, 32), key_value_states=torch.zeros(2, 5, 32))


# Compiling, training, precision, threads


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "modernbert", "llama", "mistral"])
def test_compiles_to_one_graph(name: str):
    torch.compiler.reset()
    model, inputs = decoder(name, "flash"), ZOO[name].inputs(length=13, pad="right")
    options = {} if ZOO[name].kind == "encoder" else {"use_cache": False}
    real = inputs["attention_mask"].bool()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert apart(compiled(**inputs, **options).logits[real], model(**inputs, **options).logits[real]) < 1e-5


def gradients(cache: DynamicCache | None, use_cache: bool) -> Tensor:
    model = decoder().train()
    model(ids(), labels=ids(), past_key_values=cache, use_cache=use_cache).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("given", [True, False])
def test_training_with_a_cache_is_training_without(given: bool):
    expected = gradients(None, False)
    assert expected.abs().max() > 1e-3
    assert apart(gradients(DynamicCache() if given else None, True), expected) < 1e-6


def test_gradients_through_a_cached_call_are_those_of_dense_attention():
    found = []
    for model in (ZOO["llama"].build(), decoder(variant="flash")):
        cache = DynamicCache()
        model(ids()[:, :8], past_key_values=cache)
        model(ids()[:, 8:], past_key_values=cache).logits.pow(2).mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert found[0].abs().max() > 1e-3
    assert apart(*found) < 1e-4 * found[0].abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision(dtype: torch.dtype):
    expected = decoder()(ids()).logits
    logits = decoder().to(dtype)(ids()).logits
    assert logits.dtype == dtype
    assert apart(logits.float(), expected) < 0.05 * expected.abs().max()


def test_inference_mode_leaves_nothing_behind():
    model = decoder()
    with torch.inference_mode():
        expected = model(ids()).logits.clone()
    logits = model(ids(), labels=ids())
    logits.loss.backward()
    assert apart(logits.logits.detach(), expected) == 0


def test_threads_share_a_patched_model():
    model = decoder()
    inputs = [ZOO["llama"].inputs(length=13, pad="left", seed=seed) for seed in range(3)]
    alone = [model.generate(**each, max_new_tokens=8, do_sample=False) for each in inputs]
    together: dict[int, Tensor] = {}

    def work(index: int) -> None:
        together[index] = model.generate(**inputs[index], max_new_tokens=8, do_sample=False)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(together[index], alone[index]) for index in range(3))
    assert not torch.equal(alone[0], alone[1])


def test_prompt_tuning_works_and_prefix_tuning_raises():
    from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    assert get_peft_model(decoder(), PromptTuningConfig(**options))(ids()).logits.shape == (2, 17, 100)
    with pytest.raises(ValueError, match="holds 4 tokens in a DynamicLayer"):
        get_peft_model(decoder(), PrefixTuningConfig(**options))(ids())
