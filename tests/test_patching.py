"""Patching and its undoing: what cannot work raises before anything is changed, and a patch comes off without a trace."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import (
    AttentionInterface,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    DynamicCache,
    EncoderDecoderModel,
    PreTrainedConfig,
    PreTrainedModel,
    StaticCache,
)
from zoo import ZOO

import hf_efficient_attn as hea
from hf_efficient_attn import available_variants, describe, patch_model, patched, unpatch_model
from hf_efficient_attn.registry import get_info
from hf_efficient_attn.swapping import is_patched

DECODERS = ("gpt2", "gpt_neox", "llama", "mistral", "qwen3", "gemma2_nocap", "phi3")


@torch.no_grad()
def output(model: nn.Module, inputs: dict[str, Any], **options: Any) -> Tensor:
    return model(**inputs, **options)[0]


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that a patch changes."""
    found = [
        module.config for module in model.modules() if isinstance(getattr(module, "config", None), PreTrainedConfig)
    ]
    configs = {id(config): config for config in found}
    return {
        "class": type(model),
        "config classes": [type(config) for config in configs.values()],
        "configs": [config.to_dict() for config in configs.values()],
        "implementations": [config._attn_implementation for config in configs.values()],
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "parameters": [(name, id(p)) for name, p in model.named_parameters()],
        "state": [(name, x.dtype, x.shape) for name, x in model.state_dict().items()],
        "hooks": [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()],
        "training": [module.training for module in model.modules()],
    }


def refuses(model: nn.Module, match: str, *args: Any, **kwargs: Any) -> None:
    """patch_model raises with this sentence and leaves no trace on the model."""
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        patch_model(model, *args, **kwargs)
    assert snapshot(model) == before


# What cannot be patched


@pytest.mark.parametrize("function", [lambda x: patch_model(x, "block"), unpatch_model, describe])
def test_what_is_no_model(function):
    with pytest.raises(
        ValueError, match=r"a Transformers model is needed, not 'bert-base-uncased' \(str\): load it first"
    ):
        function("bert-base-uncased")


def test_kinds_of_variants():
    assert {*available_variants("attention"), *available_variants("feed-forward")} == set(available_variants())
    with pytest.raises(ValueError, match="kind 'attn': choose 'attention' or 'feed-forward'"):
        available_variants("attn")


def test_a_variant_registered_with_the_config_of_another():
    """Whose name it would take, so that the other would be built as this one."""

    class Mine(get_info("block").module_class):
        pass

    register = hea.register_variant("mine", family="fixed patterns", summary="a toy", paper="none")
    with pytest.raises(
        ValueError, match=r"'mine': BlockConfig is the config of 'block'; give Mine a `config_class` of"
    ):
        register(Mine)
    assert "mine" not in available_variants()
    assert hea.BlockConfig.name == "block"


def test_unknown_variant_names_the_nearest():
    model = ZOO["bert"].build()
    refuses(
        model, r"unknown variant 'sliding_windows'\. Did you mean 'sliding_window'.*Available: flash", "sliding_windows"
    )
    refuses(model, r"unknown variant 'zzz'\. Available", "zzz")
    refuses(model, "unknown variant", {"variant": "blok"})
    refuses(model, "unknown variant", {0: "block", 1: "blok"})
    refuses(model, "unknown variant 'Longformer'. Did you mean 'sliding_window'", "Longformer")
    refuses(model, "unknown variant 'set-transformer'. Did you mean 'perceiver'", "set-transformer")
    refuses(model, "layers that are not named stay dense", {0: "block", 1: "dense"})
    patch_model(model, "sliding_window")


@pytest.mark.parametrize(
    ("hyper", "match"),
    [
        ({"windw": 3}, r"no hyper-parameter 'windw'\. Did you mean 'window'"),
        ({"window": 0}, r"window = 0: must be at least 1"),
        ({"window": -4}, r"window = -4"),
        ({"window": 2.5}, r"window = 2\.5"),
        ({"window": "8"}, r"window = '8'"),
        ({"window": None}, r"window = None"),
        ({"window": True}, r"window = True"),
        ({"dense_below": -1}, r"dense_below = -1"),
        ({"dilation": [1, 2, 3]}, r"dilation = \[1, 2, 3\].* 4 key/value heads"),
        ({"dilation": []}, r"dilation = \[\]"),
    ],
)
def test_wrong_hyper_parameter(hyper: dict[str, Any], match: str):
    refuses(ZOO["bert"].build(), match, "sliding_window", **hyper)


@pytest.mark.parametrize(
    ("layers", "match"),
    [
        ([2], "layer 2 does not exist: the model has attention layers 0 to 1"),
        ([-1], "layer -1 does not exist"),
        (7, "layer 7 does not exist"),
        ("1-2", "layer 2 does not exist"),
        ("2-", r"layers = '2-'|layer 2 does not exist"),
        ("1-0", "the range '1-0' is empty"),
        ("one", "layers = 'one': write ranges such as"),
        ("0;1", "write ranges such as"),
        ("", "write ranges such as"),
        ("0-1-2", "write ranges such as"),
        ([], "name each layer once, and at least one"),
        ([0, 0], "name each layer once"),
        ("0,0-1", "name each layer once"),
        ([0.0], "layer 0.0 does not exist"),
        ([True], "layer True does not exist"),
        (["0"], "layer '0' does not exist"),
        (1.5, "layer 1.5 does not exist"),
    ],
)
def test_wrong_layers(layers: Any, match: str):
    refuses(ZOO["bert"].build(), match, "block", layers=layers)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, [0, 1, 2, 3]), (2, [2]), ([3, 0], [0, 3]), ((1,), [1]), (range(1, 3), [1, 2]), ("1-2", [1, 2]), ("2-", [2, 3]),
        ("0,2-3", [0, 2, 3]), (" 0 , 1 - 2 ", [0, 1, 2]), ("3", [3]), (np.arange(2), [0, 1]), (torch.tensor([3]), [3]),
    ],
)  # fmt: skip
def test_layers(layers: Any, expected: list[int]):
    model = patch_model(ZOO["modernbert"].build(), "block", layers=layers)
    assert [row.layer for row in hea.describe(model) if row.variant == "block"] == expected


def test_wrong_mapping():
    model = ZOO["bert"].build()
    refuses(model, "layer 1 is given two variants", {"0-1": "block", 1: "flash"})
    refuses(model, "no layer was named", {})
    refuses(model, "leave out `layers` and keywords", {0: "block"}, layers=[1])
    refuses(model, "leave out `layers` and keywords", {0: "block"}, block_size=4)
    refuses(model, "hyper-parameters .'block_size'. beside a ready BlockConfig", hea.BlockConfig(), block_size=4)
    refuses(model, "given by name, config or dict, not by int", 3)
    refuses(model, "given by name, config or dict, not by NoneType", {0: None})


def bloom() -> PreTrainedModel:
    return transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=100, hidden_size=32, n_layer=2, n_head=4)
    ).eval()


def deberta() -> PreTrainedModel:
    config = transformers.DebertaV2Config(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32
    )
    return transformers.DebertaV2Model(config).eval()


@pytest.mark.parametrize("build", [bloom, deberta])
def test_attention_that_is_not_dispatched(build: Callable[[], PreTrainedModel]):
    refuses(build(), "no self-attention that Transformers dispatches", "block")


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("t5", "relative position bias"),
        ("gpt_oss", "sink logits"),
        ("gemma2", r"caps its logits \(attn_logit_softcapping\)"),
    ],
)
def test_terms_of_the_softmax_that_no_variant_has(name: str, match: str):
    refuses(ZOO[name].build(), match, "block")


def test_not_a_model_of_transformers():
    refuses(
        nn.Linear(3, 3), "must be, or contain exactly one, Transformers PreTrainedModel; it contains: none", "block"
    )
    two = nn.ModuleDict({"a": ZOO["bert"].build(), "b": ZOO["gpt2"].build()})
    refuses(two, "it contains: a, b", "block")


def test_patched_already_and_not_patched():
    model = ZOO["bert"].build()
    with pytest.raises(ValueError, match="BertForMaskedLM is not patched"):
        unpatch_model(model)
    patch_model(model, "block", layers=[0])
    refuses(model, r"patched already; call unpatch_model\(model\) first", "block", layers=[1])
    assert [row.variant for row in hea.describe(model)] == ["block", None]


def test_forward_of_its_own_on_a_layer():
    model = ZOO["bert"].build()
    attention = model.bert.encoder.layer[1].attention.self
    attention.forward = functools.partial(attention.forward)
    refuses(model, "forward of its own set on the instance", "block")


# Calls that a patched model refuses


def test_mask_of_four_dimensions():
    for name in ("bert", "llama"):
        model, inputs = ZOO[name].build(), ZOO[name].inputs()
        inputs["attention_mask"] = torch.ones(2, 1, 20, 20, dtype=torch.bool).tril()
        output(model, inputs)
        patch_model(model, "flash")
        with pytest.raises(ValueError, match=r"variant 'flash' in layer 0: a 4-D mask \(2, 1, 20, 20\)"):
            output(model, inputs)


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "llama", "bart", "vit"])
def test_attention_maps(name: str):
    inputs = ZOO[name].inputs()
    model = ZOO[name].build(attn_implementation="eager")
    assert model(**inputs, output_attentions=True).get("attentions", True)
    patch_model(model, "flash")
    with pytest.raises(ValueError, match="output_attentions=True"):
        model(**inputs, output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions"):
        model.config.output_attentions = True
    if hasattr(model, "base_model") and model.base_model is not model:
        with pytest.raises(ValueError, match="output_attentions=True"):
            model.base_model(**inputs, output_attentions=True)
    model(**inputs)
    unpatch_model(model)
    model.config.output_attentions = True
    patch_model(model, "flash")
    with pytest.raises(ValueError, match="output_attentions=True"):
        model(**inputs)


def test_positions_that_start_again_where_the_architecture_packs_nothing():
    """OPT reads `position_ids` as positions only, patched or not."""
    inputs = ZOO["opt"].inputs(batch=1, length=12)
    del inputs["attention_mask"]
    model = ZOO["opt"].build()
    plain = output(model, inputs, use_cache=False)
    inputs["position_ids"] = torch.cat([torch.arange(7), torch.arange(5)])[None]
    dense = output(model, inputs, use_cache=False)
    assert (dense - plain).abs().max() > 1e-2
    patch_model(model, "flash")
    assert (output(model, inputs, use_cache=False) - dense).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["mistral", "gemma2_nocap", "modernbert"])
def test_window_of_the_architecture(name: str):
    """Text within the window is served; longer text raises; the layers without a window can be patched."""
    tiny = ZOO[name]
    model = tiny.build()
    short, long = tiny.inputs(length=60), tiny.inputs(length=140)
    dense, dense_long = output(model, short), output(model, long)
    patch_model(model, "flash")
    assert (output(model, short) - dense).abs().max() < 1e-4
    with pytest.raises(ValueError, match="own sliding window of"):
        output(model, long)
    unpatch_model(model)
    types = getattr(model.config, "layer_types", None) or ["sliding_attention"] * 2
    full = [i for i, kind in enumerate(types) if kind == "full_attention"]
    if full:
        patch_model(model, "flash", layers=full)
        assert (output(model, long) - dense_long).abs().max() < 1e-4


def test_window_of_the_architecture_in_generation():
    model = patch_model(ZOO["mistral"].build(), "flash")
    prompt = ZOO["mistral"].inputs(batch=1, length=60)
    model.generate(**prompt, max_new_tokens=4, do_sample=False)
    with pytest.raises(ValueError, match="own sliding window of 64"):
        model.generate(**prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False)


def test_attention_implementation_changed_after_the_patch():
    model, inputs = patch_model(ZOO["llama"].build(), "sliding_window", window=2), ZOO["llama"].inputs()
    expected = output(model, inputs)
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match=r"layer 0 is patched, but .* was set to 'sdpa'.*unpatch_model"):
        output(model, inputs)
    model.set_attn_implementation("efficient_attention")
    assert torch.equal(output(model, inputs), expected)


def test_attention_implementation_of_the_library_without_a_patch():
    model = ZOO["llama"].build(attn_implementation="efficient_attention")
    with pytest.raises(RuntimeError, match=r"belongs to no patched model. Use patch_model"):
        output(model, ZOO["llama"].inputs())


def test_cache_of_another_kind():
    model, inputs = ZOO["llama"].build(), ZOO["llama"].inputs(batch=1, length=8)
    filled = DynamicCache(config=model.config)
    output(model, inputs, past_key_values=filled)
    static = StaticCache(config=model.config, max_cache_len=32)
    patch_model(model, "flash")
    for cache, held in ((filled, "8 tokens in a DynamicLayer"), (static, "0 tokens in a StaticLayer")):
        with pytest.raises(
            ValueError, match=f"keeps a decoder state of its own, but layer 0 of this cache holds {held}"
        ):
            output(model, inputs, past_key_values=cache)
    output(model, inputs, past_key_values=DynamicCache(config=model.config))
    output(model, inputs, past_key_values=DynamicCache())


def test_cache_of_another_variant():
    inputs = ZOO["llama"].inputs(batch=1, length=8)
    window = patch_model(ZOO["llama"].build(), "sliding_window", window=3)
    block = patch_model(ZOO["llama"].build(), "block", block_size=4)
    cache = DynamicCache()
    output(window, inputs, past_key_values=cache)
    with pytest.raises(ValueError, match=r"layer 0 of this cache was filled by .*sliding_window"):
        output(block, inputs, past_key_values=cache)
    output(window, inputs | {"attention_mask": torch.ones(1, 16)}, past_key_values=cache)


def test_cache_of_a_patched_model_given_to_a_dense_one():
    """A state hands back the new keys alone, so dense attention would forget the past in silence."""
    token = {"input_ids": torch.tensor([[7]])}
    model, cache = ZOO["llama"].build(), DynamicCache()
    with patched(model, "flash", layers=[1]):
        output(model, ZOO["llama"].inputs(batch=1, length=8), past_key_values=cache)
        output(model, token, past_key_values=cache)
    with pytest.raises(ValueError, match=r"decoder state of a patched layer.*'flash'.*Start with a new cache"):
        output(model, token, past_key_values=cache)
    output(model, token, past_key_values=DynamicCache())


def test_generate_with_another_kind_of_cache():
    model = patch_model(ZOO["llama"].build(), "flash")
    inputs = ZOO["llama"].inputs(batch=1, length=8)
    with pytest.raises(ValueError, match="layer 0 of this cache holds 0 tokens in a StaticLayer"):
        model.generate(**inputs, max_new_tokens=3, cache_implementation="static")
    assert model.generate(**inputs, max_new_tokens=3).shape[1] > 8


# Taking it off again


@pytest.mark.parametrize("name", [name for name, tiny in ZOO.items() if tiny.refused is None])
def test_unpatched_is_as_before(name: str):
    tiny, inputs = ZOO[name], ZOO[name].inputs()
    model = tiny.build()
    before, dense = snapshot(model), output(model, inputs)
    patch_model(model, "sliding_window", window=2)
    changed = output(model, inputs)
    assert not torch.equal(changed, dense)
    assert snapshot(model) != before
    unpatch_model(model)
    assert snapshot(model) == before
    assert torch.equal(output(model, inputs), dense)
    patch_model(model, "sliding_window", window=2)
    assert torch.equal(output(model, inputs), changed)


def test_context():
    model, inputs = ZOO["bert"].build(), ZOO["bert"].inputs()
    before, dense = snapshot(model), output(model, inputs)
    with patched(model, "sliding_window", window=2, layers="1-") as same:
        assert same is model
        assert [row.variant for row in hea.describe(model)] == [None, "sliding_window"]
        assert not torch.equal(output(model, inputs), dense)
    assert snapshot(model) == before

    def fail() -> None:
        with patched(model, "block", block_size=2):
            assert not torch.equal(output(model, inputs), dense)
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail()
    assert snapshot(model) == before
    with pytest.raises(ValueError, match="unknown variant"):
        patched(model, "blok").__enter__()
    assert snapshot(model) == before
    assert torch.equal(output(model, inputs), dense)


def test_layers_that_stay_dense_are_exact():
    """Patching no more than layer 1 with an exact variant changes nothing but rounding, also in a padded batch."""
    for name in ("bert", "gpt2", "llama", "mistral", "bart"):
        tiny = ZOO[name]
        inputs = tiny.inputs(pad="left" if tiny.kind == "decoder" else "right")
        model = tiny.build()
        real = inputs["decoder_attention_mask" if name == "bart" else "attention_mask"].bool()
        dense = output(model, inputs)[real]
        patch_model(model, "flash", layers=[1])
        assert (output(model, inputs)[real] - dense).abs().max() < 1e-4, name


def test_two_models_of_which_one_is_patched():
    inputs = ZOO["llama"].inputs()
    teacher, student = ZOO["llama"].build(), ZOO["llama"].build()
    dense = output(teacher, inputs)
    patch_model(student, "sliding_window", window=2)
    assert torch.equal(output(teacher, inputs), dense)
    assert not torch.equal(output(student, inputs), dense)
    assert type(teacher).__name__ == "LlamaForCausalLM"
    assert teacher.config._attn_implementation == "sdpa"
    assert {row.variant for row in hea.describe(teacher)} == {None}


def test_two_models_that_share_a_config():
    """Transformers keeps the config that a model is built from, so two models can hold one object."""
    config = ZOO["bert"].config()
    teacher, student = (transformers.BertModel(config).eval() for _ in range(2))
    inputs = ZOO["bert"].inputs()
    dense = output(teacher, inputs)
    patch_model(student, "sliding_window", window=2)
    assert torch.equal(output(teacher, inputs), dense)
    assert type(teacher.config).__name__ == "BertConfig"
    unpatch_model(student)
    assert torch.equal(output(teacher, inputs), dense)


def test_a_config_that_changes_after_the_patch():
    config, dilation = hea.SlidingWindowConfig(window=4), [1, 2]
    model = patch_model(ZOO["llama"].build(), {0: config, 1: {"variant": "sliding_window", "dilation": dilation}})
    config.window, dilation[1] = 2, 3
    assert [row.hyper_parameters["window"] for row in describe(model)] == [4, 256]
    assert describe(model)[1].hyper_parameters["dilation"] == [1, 2]
    config.window = 0
    refuses(ZOO["llama"].build(), "SlidingWindowConfig.window = 0: must be at least 1", config)


def test_eager_stays_eager_beside_a_patched_layer():
    inputs = ZOO["bert"].inputs(pad="right")
    model = ZOO["bert"].build(attn_implementation="eager")
    dense = output(model, inputs)
    patch_model(model, "flash", layers=[0])
    real = inputs["attention_mask"].bool()
    assert (output(model, inputs)[real] - dense[real]).abs().max() < 1e-4
    unpatch_model(model)
    assert model.config._attn_implementation == "eager"
    assert torch.equal(output(model, inputs), dense)


def test_training_mode_and_dtype_follow_the_host():
    model = ZOO["bert"].build().to(torch.bfloat16).train()
    patch_model(model, "linformer")
    added = [p for n, p in model.named_parameters() if ".efficient_attn." in n]
    assert added
    assert {p.dtype for p in added} == {torch.bfloat16}
    assert all(module.training for module in model.modules())


# Cross-attention, wrappers, description


def test_cross_attention_stays():
    model = ZOO["bart"].build()
    patch_model(model, "sliding_window", window=2)
    decoder = model.model.decoder.layers
    assert all(type(layer.encoder_attn).__name__ == "BartAttention" for layer in decoder)
    assert all(type(layer.self_attn).__name__ == "EfficientBartAttention" for layer in decoder)
    assert all(type(layer.self_attn).__name__ == "EfficientBartAttention" for layer in model.model.encoder.layers)
    causal = [layer.self_attn.efficient_attn.host.causal for layer in (*model.model.encoder.layers, *decoder)]
    assert causal == [False, False, True, True]


def test_decoder_bert_with_cross_attention():
    """A BERT decoder reads an encoder through `crossattention`, which stays dense."""
    config = ZOO["bert"].config(is_decoder=True, add_cross_attention=True)
    model = transformers.BertLMHeadModel(config).eval()
    inputs = ZOO["bert"].inputs() | {"encoder_hidden_states": torch.randn(2, 9, 32), "use_cache": False}
    dense = output(model, inputs)
    patch_model(model, "flash")
    layers = model.bert.encoder.layer
    assert [type(layer.crossattention.self).__name__ for layer in layers] == ["BertCrossAttention"] * 2
    assert [row.name for row in hea.describe(model)] == [f"bert.encoder.layer.{i}.attention.self" for i in range(2)]
    assert (output(model, inputs) - dense).abs().max() < 1e-4
    unpatch_model(model)
    patch_model(model, "sliding_window", window=2)
    assert (output(model, inputs) - dense).abs().max() > 1e-2


def test_wrapper_is_patched_in_place():
    inner = ZOO["llama"].build()
    wrapper = get_peft_model(inner, LoraConfig(task_type="CAUSAL_LM"))
    assert patch_model(wrapper, "sliding_window", window=2) is wrapper
    assert [row.variant for row in hea.describe(wrapper)] == ["sliding_window"] * 2
    assert type(inner).__name__ == "EfficientLlamaForCausalLM"
    assert unpatch_model(wrapper) is wrapper
    assert type(inner).__name__ == "LlamaForCausalLM"


def test_description():
    model = ZOO["bert"].build()
    assert [(row.layer, row.variant, row.added_parameters) for row in hea.describe(model)] == [
        (0, None, 0),
        (1, None, 0),
    ]
    patch_model(model, {1: hea.get_config_class("linformer")(rank=3)})
    first, second = hea.describe(model)
    assert (first.variant, first.hyper_parameters, first.added_parameters) == (None, {}, 0)
    added = sum(p.numel() for n, p in model.named_parameters() if ".efficient_attn." in n)
    assert second.variant == "linformer"
    assert second.hyper_parameters["rank"] == 3
    assert second.added_parameters == added > 0
    assert second.name == "bert.encoder.layer.1.attention.self"
    table = str(hea.describe(model)).splitlines()
    assert table[0].split() == ["layer", "module", "variant", "added", "hyper-parameters"]
    assert table[1].split() == ["0", "bert.encoder.layer.0.attention.self", "dense", "0"]
    assert "rank=3" in table[2]


def test_importing_and_patching_log_nothing(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        logging.getLogger("transformers").addHandler(caplog.handler)
        try:
            patch_model(ZOO["bert"].build(), "block")
        finally:
            logging.getLogger("transformers").removeHandler(caplog.handler)
    assert not caplog.records


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_part_of_a_model_is_not_patched_alone(name: str):
    """The whole would be saved without its patch, and come back dense."""
    model = ZOO[name].build()
    part, before = model.base_model, type(model.base_model)
    with pytest.raises(ValueError, match=f"is part of a {type(model).__name__}"):
        patch_model(part, "flash")
    assert type(part) is before and not is_patched(model)
    del model
    assert is_patched(patch_model(part, "flash"))


def test_parts_that_were_patched_before_become_dense_with_the_whole():
    part = patch_model(ZOO["bart"].build().model, "flash")
    whole = ZOO["bart"].build()
    whole.model = part
    unpatch_model(whole)
    assert not is_patched(whole) and type(part).__name__ == "BartModel" and type(part.config).__name__ == "BartConfig"
    inputs = ZOO["bart"].inputs(2, 9)
    assert torch.isfinite(whole(**inputs).logits).all()


def test_a_refused_pair_is_as_before():
    """Encoder and decoder with configs of their own, which dispatching does not reach."""
    sizes = {
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "hidden_size": 16,
        "intermediate_size": 16,
        "vocab_size": 50,
    }
    decoder = BertLMHeadModel(BertConfig(**sizes, is_decoder=True, add_cross_attention=True))
    model = EncoderDecoderModel(encoder=BertModel(BertConfig(**sizes)), decoder=decoder).eval()
    ids = torch.randint(1, 50, (1, 7))
    before = model(input_ids=ids, decoder_input_ids=ids).logits
    refuses(model, "keeps its own attention implementation", "flash")
    assert torch.equal(model(input_ids=ids, decoder_input_ids=ids).logits, before)


def test_an_attention_function_of_the_user_beside_a_patched_layer():
    calls = []

    def plain(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        calls.append(attention_mask)
        value, key = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (value, key))
        return sdpa(query, key, value, is_causal=True, scale=scaling).transpose(1, 2), None

    AttentionInterface.register("plain", plain)
    model, inputs = ZOO["llama"].build(), ZOO["llama"].inputs(1, 9)
    model.set_attn_implementation("plain")
    before = model(**inputs).logits
    patch_model(model, "flash", layers=[0])
    torch.testing.assert_close(model(**inputs).logits, before, atol=1e-5, rtol=0)
    assert len(calls) == 3
