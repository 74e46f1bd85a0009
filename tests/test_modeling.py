"""Saving a patched model and loading it through the Auto classes: bit-equal, or a clear error."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertTokenizer,
    EncoderDecoderModel,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.bert.modeling_bert import BertModel, BertSelfAttention
from zoo import END, TASKS, USUAL_TASK, ZOO, Tiny

import hf_efficient_attn as hea
from hf_efficient_attn import HostShape, modeling, patch_model, unpatch_model
from hf_efficient_attn.modeling import efficient_config_class
from hf_efficient_attn.registry import build, get_config_class
from hf_efficient_attn.swapping import parse_layers

HEADS = {
    "bert": (
        "base", "masked-lm", "causal-lm", "sequence-classification", "token-classification", "question-answering",
        "multiple-choice",
    ),
    "roberta": (
        "base", "masked-lm", "causal-lm", "sequence-classification", "token-classification", "question-answering",
        "multiple-choice",
    ),
    "distilbert": (
        "base", "masked-lm", "sequence-classification", "token-classification", "question-answering", "multiple-choice",
    ),
    "gpt2": ("base", "causal-lm", "sequence-classification", "token-classification", "question-answering"),
    "llama": ("base", "causal-lm", "sequence-classification", "token-classification", "question-answering"),
    "bart": ("base", "masked-lm", "causal-lm", "seq2seq-lm", "sequence-classification", "question-answering"),
    "vit": ("base", "image-classification"),
}  # fmt: skip
CASES = [(name, task) for name, tasks in HEADS.items() for task in tasks]


def fitting_inputs(tiny: Tiny, task: str, **options: Any) -> dict[str, Tensor]:
    """Inputs that the head accepts: two choices, one end token per text, an encoder alone or a decoder alone."""
    inputs = tiny.inputs(**options)
    if task == "multiple-choice":
        return {name: x[:, None].repeat(1, 2, 1) for name, x in inputs.items()}
    if tiny.kind == "encoder-decoder" and task == "causal-lm":
        return {name: x for name, x in inputs.items() if not name.startswith("decoder_")}
    if tiny.kind == "encoder-decoder" and task == "sequence-classification":
        inputs["input_ids"][:, 3] = END
    return inputs


@torch.no_grad()
def output(model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
    return model.eval()(**inputs)[0]


def saved(tmp_path: Path, name: str = "bert", variant: Any = "linformer", **hyper: Any) -> tuple[Path, Tensor]:
    """A patched model on disk and what it gave for `ZOO[name].inputs()`."""
    model = patch_model(ZOO[name].build(), variant, **hyper)
    model.save_pretrained(tmp_path)
    return tmp_path, output(model, ZOO[name].inputs())


def edit_config(directory: Path, change: Any) -> None:
    path = directory / "config.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_weights(directory: Path, change: Any) -> None:
    path = directory / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize(("name", "task"), CASES)
def test_every_head_reloads_bit_equal(name: str, task: str, tmp_path: Path):
    tiny = ZOO[name]
    inputs = fitting_inputs(tiny, task)
    model = tiny.build_for(task)
    dense = output(model, inputs)
    model = patch_model(model, "sliding_window", window=2)
    expected = output(model, inputs)
    assert not torch.equal(dense, expected)
    model.save_pretrained(tmp_path)
    auto = getattr(transformers, TASKS[task])
    reloaded = auto.from_pretrained(tmp_path)
    assert type(reloaded) is type(model)
    assert isinstance(reloaded, type(tiny.build_for(task)))
    assert torch.equal(output(reloaded, inputs), expected)
    assert hea.describe(reloaded) == hea.describe(model)
    unpatch_model(reloaded)
    assert torch.equal(output(reloaded, inputs), dense)


def test_the_heads_tried_are_those_that_transformers_has():
    for name, tasks in HEADS.items():
        possible = set()
        for task in TASKS:
            try:
                ZOO[name].build_for(task)
            except ValueError:
                continue
            possible.add(task)
        assert possible == set(tasks), name


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "bart", "vit"])
def test_new_parameters_reload_bit_equal(name: str, tmp_path: Path):
    tiny, inputs = ZOO[name], ZOO[name].inputs()
    model = patch_model(tiny.build(), "linformer", rank=8, max_length=32, segment_size=4)
    torch.manual_seed(5)
    added = {n: p for n, p in model.named_parameters() if ".efficient_attn." in n}
    assert added
    with torch.no_grad():
        untrained = output(model, inputs)
        for parameter in added.values():
            parameter += torch.randn_like(parameter)
    expected = output(model, inputs)
    assert not torch.equal(untrained, expected)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = [key for key in file.keys() if ".efficient_attn." in key]  # noqa: SIM118
    assert len(stored) == len(added)
    reloaded = getattr(transformers, TASKS[USUAL_TASK[tiny.kind]]).from_pretrained(tmp_path)
    assert torch.equal(output(reloaded, inputs), expected)
    state = reloaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


LAYERWISE = hea.LinformerConfig(sharing="layerwise", segment_size=4)
HALF = {"variant": "combined", "parts": [["block", 1], [LAYERWISE.to_dict(), 1]]}


@pytest.mark.parametrize("variant", [LAYERWISE, HALF], ids=["linformer", "combined"])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "bart"])
def test_a_matrix_that_layers_share_is_saved_once_and_tied_again(name: str, variant: Any, tmp_path: Path):
    tiny, inputs = ZOO[name], ZOO[name].inputs()
    model = patch_model(tiny.build(), variant)

    def own(model: torch.nn.Module) -> dict[str, Tensor]:
        return {n: p for n, p in model.named_parameters(remove_duplicate=False) if n.endswith(".proj_k")}

    with torch.no_grad():
        for parameter in set(own(model).values()):
            parameter += torch.randn_like(parameter)
    expected = output(model, inputs)
    names = [n for n, _ in model.named_parameters() if n.endswith(".proj_k")]
    assert len(names) == (2 if name == "bart" else 1) < len(own(model))
    assert sum(row.added_parameters for row in hea.describe(model)) == sum(
        p.numel() for n, p in model.named_parameters() if ".efficient_attn." in n
    )
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert [key for key in weights if key.endswith(".proj_k")] == sorted(names)
    reloaded = getattr(transformers, TASKS[USUAL_TASK[tiny.kind]]).from_pretrained(tmp_path)
    fresh = patch_model(tiny.build(seed=1), variant)
    once = {k: x for k, x in model.state_dict().items() if not k.endswith(".proj_k") or k in names}
    fresh.load_state_dict(once)
    for twin in (reloaded, fresh, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.float()):
        assert torch.equal(output(twin, inputs), expected)
        assert len(set(own(twin).values())) == len(names)
    fresh.load_state_dict(once, assign=True)
    assert torch.equal(output(fresh, inputs), expected)
    fresh.tie_weights()
    assert len(set(own(fresh).values())) == len(names)
    unpatch_model(fresh)
    assert not [key for key in fresh.all_tied_weights_keys if "efficient" in key]


def test_mixture_over_layers_and_dense_layers_between(tmp_path: Path):
    tiny, inputs = ZOO["modernbert"], ZOO["modernbert"].inputs()
    model = patch_model(tiny.build(), {"0": hea.SlidingWindowConfig(window=2), (2, 3): "linformer"})
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert [row.variant for row in hea.describe(reloaded)] == ["sliding_window", None, "linformer", "linformer"]
    assert reloaded.config.efficient_attention.keys() == {"0", "2-3"}
    assert torch.equal(output(reloaded, inputs), output(model, inputs))
    other = patch_model(tiny.build(), {"1": hea.SlidingWindowConfig(window=2), (2, 3): "linformer"})
    assert not torch.equal(output(other, inputs), output(model, inputs))


def test_base_saved_head_added_and_head_saved_base_loaded(tmp_path: Path):
    tiny, inputs = ZOO["bert"], ZOO["bert"].inputs()
    masked = patch_model(tiny.build(), "linformer")
    hidden = output(masked.bert, inputs)
    masked.save_pretrained(tmp_path / "masked")
    base = AutoModel.from_pretrained(tmp_path / "masked", add_pooling_layer=False)
    assert torch.equal(output(base, inputs), hidden)
    base.save_pretrained(tmp_path / "base")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "base")
    assert torch.equal(output(again.bert, inputs), hidden)


def test_saved_in_shards(tmp_path: Path):
    model = patch_model(ZOO["bert"].build(), "linformer")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert any(".efficient_attn." in key for key in index["weight_map"])
    inputs = ZOO["bert"].inputs()
    assert torch.equal(output(AutoModelForMaskedLM.from_pretrained(tmp_path), inputs), output(model, inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", hea.available_variants())
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_loaded_in_half_precision(name: str, variant: str, dtype: torch.dtype, tmp_path: Path):
    tiny, inputs = ZOO[name], ZOO[name].inputs()
    model = patch_model(tiny.build(), get_config_class(variant).tiny(tiny.kind == "decoder"))
    model.save_pretrained(tmp_path)
    half = getattr(transformers, TASKS[USUAL_TASK[tiny.kind]]).from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in half.parameters()} == {dtype}
    assert torch.get_default_dtype() == torch.float32
    exact = output(model, inputs)
    cast = output(model.to(dtype), inputs)
    assert torch.equal(output(half, inputs), cast)
    assert not torch.equal(cast.float(), exact)


def test_draws_are_those_of_a_seed_whatever_the_default_dtype():
    """While a model is built in half precision, new tensors are of that."""
    for variant in ("performer", "rfa", "lsh", "clustered", "routing", "long_short", "perceiver", "mixture_of_heads"):
        config, host = get_config_class(variant).tiny(True), HostShape(4, 2, 16, 64, True, layer=3)
        expected = build(config, host).bfloat16().state_dict()
        torch.set_default_dtype(torch.bfloat16)
        try:
            drawn = build(config, host).state_dict()
        finally:
            torch.set_default_dtype(torch.float32)
        assert all(torch.equal(x, expected[key]) and x.dtype == torch.bfloat16 for key, x in drawn.items()), variant
        other = build(config, replace(host, layer=4)).bfloat16().state_dict()
        assert not all(torch.equal(x, expected[key]) for key, x in other.items()), variant


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attn_implementation_given_at_loading_does_not_undo_the_patch(implementation: str, tmp_path: Path):
    directory, expected = saved(tmp_path, layers=[1])
    reloaded = AutoModelForMaskedLM.from_pretrained(directory, attn_implementation=implementation)
    result = output(reloaded, ZOO["bert"].inputs())
    dense = output(ZOO["bert"].build(), ZOO["bert"].inputs())
    assert (dense - expected).abs().max() > 1e-2
    assert (result - expected).abs().max() < 1e-4
    unpatch_model(reloaded)
    assert reloaded.config._attn_implementation == implementation


def test_without_the_library_transformers_does_not_know_the_type(tmp_path: Path):
    saved(tmp_path)
    code = (
        "import sys, transformers\n{}\n"
        "print(type(transformers.AutoModelForMaskedLM.from_pretrained(sys.argv[1])).__name__)"
    )
    with_library, without = (
        subprocess.run(
            [sys.executable, "-c", code.format(line), str(tmp_path)],
            capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1],
        )
        for line in ("import hf_efficient_attn", "")
    )  # fmt: skip
    assert "EfficientBertForMaskedLM" in with_library.stdout, with_library.stderr
    assert without.returncode != 0
    assert "model type `efficient_bert`" in without.stderr
    assert "does not recognize this architecture" in without.stderr


def test_names_of_the_saved_form(tmp_path: Path):
    directory, _ = saved(tmp_path, rank=5)
    data = json.loads((directory / "config.json").read_text())
    assert data["model_type"] == "efficient_bert"
    assert data["architectures"] == ["EfficientBertForMaskedLM"]
    assert data["efficient_attention"]["0-1"]["variant"] == "linformer"
    assert data["efficient_attention"]["0-1"]["rank"] == 5
    config = AutoConfig.from_pretrained(directory)
    assert type(config).__name__ == "EfficientBertConfig"
    assert isinstance(config, transformers.BertConfig)
    assert config.efficient_attention == data["efficient_attention"]
    again = type(config).from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()


def test_model_built_from_the_config_is_patched(tmp_path: Path):
    directory, _ = saved(tmp_path)
    model = AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(directory))
    assert [row.variant for row in hea.describe(model)] == ["linformer"] * 2
    assert output(model, ZOO["bert"].inputs()).isfinite().all()


def test_model_built_from_the_config_of_a_patched_one():
    inputs = ZOO["bert"].inputs(pad="right")
    model = patch_model(ZOO["bert"].build(), "sliding_window", window=2, layers=[1])
    for twin in (AutoModelForMaskedLM.from_config(model.config), type(model)(model.config)):
        twin.load_state_dict(model.state_dict())
        assert twin.config is not model.config
        assert hea.describe(twin) == hea.describe(model)
        assert torch.equal(output(twin, inputs), output(model, inputs))
        unpatch_model(twin)
        assert twin.config._attn_implementation == "sdpa"


def test_a_twin_that_asks_for_another_attention_leaves_the_model_as_it_is():
    model, inputs = patch_model(ZOO["bert"].build(), "sliding_window", window=2), ZOO["bert"].inputs()
    expected = output(model, inputs)
    twin = AutoModelForMaskedLM.from_config(model.config, attn_implementation="eager", dtype=torch.float64)
    assert (twin.dtype, model.config.dtype) == (torch.float64, None)
    assert torch.equal(output(model, inputs), expected)
    unpatch_model(twin)
    assert twin.config._attn_implementation == "eager"


def test_saved_patched_unpatched_and_patched_differently(tmp_path: Path):
    """One model object saved in three states; each directory loads as what it was at that time."""
    tiny, inputs = ZOO["bert"], ZOO["bert"].inputs()
    model = tiny.build()
    dense = output(model, inputs)
    for variant in ("linformer", None, "block"):
        if variant is not None:
            patch_model(model, variant, **({"block_size": 3} if variant == "block" else {}))
        model.save_pretrained(tmp_path / str(variant))
        if variant is not None:
            unpatch_model(model)
    for variant in ("linformer", None, "block"):
        loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / str(variant))
        assert {row.variant for row in hea.describe(loaded)} == {variant}
        assert torch.equal(output(loaded, inputs), dense) is (variant is None)
    assert json.loads((tmp_path / "None" / "config.json").read_text())["model_type"] == "bert"


# Damaged and foreign checkpoints


def test_unknown_hyper_parameter_in_the_config_raises(tmp_path: Path):
    directory, _ = saved(tmp_path)
    edit_config(directory, lambda data: data["efficient_attention"]["0-1"].update(ranks=3))
    with pytest.raises(ValueError, match=r"no hyper-parameter 'ranks'.*'rank'"):
        AutoModelForMaskedLM.from_pretrained(directory)


def test_unknown_variant_in_the_config_raises(tmp_path: Path):
    directory, _ = saved(tmp_path)
    edit_config(directory, lambda data: data["efficient_attention"]["0-1"].update(variant="linformers"))
    with pytest.raises(ValueError, match=r"unknown variant 'linformers'. Did you mean 'linformer'"):
        AutoModelForMaskedLM.from_pretrained(directory)


@pytest.mark.parametrize("value", [None, {}, [], "linformer"])
def test_config_without_the_mapping_raises(value: Any, tmp_path: Path):
    directory, _ = saved(tmp_path)
    edit_config(directory, lambda data: data.update(efficient_attention=value))
    with pytest.raises(Exception, match="efficient_attention"):
        AutoModelForMaskedLM.from_pretrained(directory)
    edit_config(directory, lambda data: data.pop("efficient_attention"))
    with pytest.raises(ValueError, match="efficient_attention must map layers to variants, got None"):
        AutoModelForMaskedLM.from_pretrained(directory)


def test_missing_weight_raises(tmp_path: Path):
    directory, _ = saved(tmp_path)

    def drop(weights: dict[str, Tensor]) -> None:
        del weights[next(key for key in weights if ".efficient_attn." in key)]

    edit_weights(directory, drop)
    with pytest.raises(ValueError, match=r"missing keys: .*efficient_attn"):
        AutoModelForMaskedLM.from_pretrained(directory)


def test_weights_of_the_dense_model_under_a_patched_config_raise(tmp_path: Path):
    directory, _ = saved(tmp_path)

    def drop(weights: dict[str, Tensor]) -> None:
        for key in [key for key in weights if ".efficient_attn." in key]:
            del weights[key]

    edit_weights(directory, drop)
    with pytest.raises(ValueError, match=r"missing keys: .*efficient_attn"):
        AutoModelForMaskedLM.from_pretrained(directory)


COMPOSED = ["linformer", "performer", "rfa", "moe"]  # with parameters, buffers, both, and in the feed-forward


def composite(variant: str, **hyper: Any) -> EncoderDecoderModel:
    decoder = patch_model(ZOO["gpt2"].build(add_cross_attention=True), variant, **hyper)
    return EncoderDecoderModel(encoder=BertModel(ZOO["bert"].config()), decoder=decoder).eval()


@pytest.mark.parametrize("variant", COMPOSED)
def test_missing_weight_of_a_part_raises(variant: str, tmp_path: Path):
    """The class of the whole is one of Transformers, which would leave the weight as its memory happens to be."""
    inputs = {name: ZOO["bert"].inputs()["input_ids"] for name in ("input_ids", "decoder_input_ids")}
    model = composite(variant)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(EncoderDecoderModel.from_pretrained(tmp_path), inputs), output(model, inputs))

    for key in [key for key in load_file(tmp_path / "model.safetensors") if ".efficient_attn." in key]:
        model.save_pretrained(tmp_path)
        edit_weights(tmp_path, lambda weights, key=key: weights.pop(key))
        with pytest.raises(ValueError, match=rf"missing keys: {key.removeprefix('decoder.')}\."):
            EncoderDecoderModel.from_pretrained(tmp_path)


def test_missing_weight_that_layers_of_a_part_share_raises(tmp_path: Path):
    model = composite("linformer", sharing="layerwise")
    model.save_pretrained(tmp_path)
    assert len([key for key in load_file(tmp_path / "model.safetensors") if key.endswith("proj_k")]) == 1
    loaded = EncoderDecoderModel.from_pretrained(tmp_path).decoder.transformer.h
    assert loaded[0].attn.efficient_attn.proj_k is loaded[1].attn.efficient_attn.proj_k
    edit_weights(tmp_path, lambda weights: weights.pop("decoder.transformer.h.0.attn.efficient_attn.proj_k"))
    with pytest.raises(ValueError, match=r"missing keys: transformer.h.0.attn.efficient_attn.proj_k"):
        EncoderDecoderModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("variant", COMPOSED)
def test_variants_that_are_built_have_their_first_values(variant: str):
    """Transformers may ask for them later than it builds a model, as it does for DeepSpeed."""
    config = composite(variant).config
    with no_init_weights():
        model = EncoderDecoderModel(config=config)
    before = {n: x.clone() for n, x in model.state_dict().items() if ".efficient_attn." in n}
    model.initialize_weights()
    after = {n: x for n, x in model.state_dict().items() if n in before}
    assert before
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)  # experts copy maps that have none yet


def test_weights_of_other_hyper_parameters_raise(tmp_path: Path):
    directory, _ = saved(tmp_path)

    def widen(weights: dict[str, Tensor]) -> None:
        key = next(key for key in weights if ".efficient_attn." in key)
        weights[key] = torch.cat([weights[key], weights[key]])

    edit_weights(directory, widen)
    with pytest.raises((ValueError, RuntimeError), match=r"efficient_attn|size mismatch|mismatched"):
        AutoModelForMaskedLM.from_pretrained(directory)


def test_weights_of_a_layer_that_is_not_patched_raise(tmp_path: Path):
    directory, _ = saved(tmp_path)

    def shrink(data: dict[str, Any]) -> None:
        data["efficient_attention"] = {"0": data["efficient_attention"]["0-1"]}

    edit_config(directory, shrink)
    with pytest.raises(ValueError, match=r"unexpected keys: .*efficient_attn"):
        AutoModelForMaskedLM.from_pretrained(directory)


def test_damaged_file_raises(tmp_path: Path):
    directory, _ = saved(tmp_path)
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(Exception, match=r"(?i)safetensor|header|incomplete|metadata"):
        AutoModelForMaskedLM.from_pretrained(directory)


def test_layers_that_the_config_lacks_raise(tmp_path: Path):
    directory, _ = saved(tmp_path)

    def shift(data: dict[str, Any]) -> None:
        data["efficient_attention"] = {"1-2": data["efficient_attention"]["0-1"]}

    edit_config(directory, shift)
    with pytest.raises(ValueError, match="layer 2 does not exist"):
        AutoModelForMaskedLM.from_pretrained(directory)


def test_layers_taken_out_after_the_patch(tmp_path: Path):
    model = ZOO["llama"].build(num_hidden_layers=3)
    patch_model(model, "sliding_window", window=2, layers="0-1")
    model.model.layers, model.config.num_hidden_layers = model.model.layers[1:], 2
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = number
    with pytest.raises(
        ValueError, match=r"has 2 layers, of which \[0\] are patched, but .*names 0-1: layers were taken out"
    ):
        model.save_pretrained(tmp_path)
    model.config.efficient_attention = {"0": model.config.efficient_attention["0-1"]}
    model.save_pretrained(tmp_path)
    inputs = ZOO["llama"].inputs()
    assert torch.equal(output(AutoModelForCausalLM.from_pretrained(tmp_path), inputs), output(model, inputs))


@pytest.mark.parametrize(
    ("layers", "why"),
    [("0-1", r"BartForCausalLM has other .* .layer 0 is model.decoder"), ("2-3", "layer 2 does not exist")],
)
def test_a_class_that_numbers_its_layers_otherwise_raises(layers: str, why: str, tmp_path: Path):
    """BART's decoder alone: its first layers are not those of the encoder that was patched."""
    patch_model(ZOO["bart"].build(), "sliding_window", window=2, layers=layers).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=why):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert [row.layer for row in hea.describe(loaded) if row.variant] == parse_layers(layers, 4)


def test_a_class_that_reads_a_part_of_the_config_raises():
    config = efficient_config_class(transformers.Llama4Config)(efficient_attention={"0": {"variant": "block"}})
    with pytest.raises(ValueError, match=r"Llama4ForCausalLM has other .* .it reads a part of Llama4Config"):
        AutoModelForCausalLM.from_config(config)


class HomeMadeBert(BertModel):
    """A class outside Transformers."""


def test_model_of_a_class_outside_transformers_runs_but_is_not_saved(tmp_path: Path):
    model = patch_model(HomeMadeBert(ZOO["bert"].config()).eval(), "sliding_window", window=2)
    inputs = ZOO["bert"].inputs()
    expected = output(model, inputs)
    with pytest.raises(ValueError, match="HomeMadeBert is not a class of Transformers"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    assert torch.equal(output(copy.deepcopy(model), inputs), expected)
    assert torch.equal(output(pickle.loads(pickle.dumps(model)), inputs), expected)
    unpatch_model(model)
    assert type(model) is HomeMadeBert
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "bert"


class HomeMadeClassifier(PreTrainedModel):
    """A class around one of Transformers, whose `__init__` leaves out `post_init`."""

    config_class = BertConfig

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config)

    def forward(self, **inputs: Any) -> Any:
        return self.bert(**inputs)


def test_model_of_a_class_that_does_not_finish_its_init():
    model = HomeMadeClassifier(ZOO["bert"].config()).eval()
    inputs = ZOO["bert"].inputs()
    dense, attributes = output(model, inputs), sorted(vars(model))
    patch_model(model, "linformer", sharing="layerwise", rank=4)
    assert not torch.equal(output(model, inputs), dense)
    unpatch_model(model)
    assert torch.equal(output(model, inputs), dense)
    assert sorted(vars(model)) == attributes


def test_model_of_a_class_from_a_notebook(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """Transformers, which cannot read the source of such a class, sets no attention implementation for it."""
    monkeypatch.setattr(HomeMadeClassifier, "__module__", "notebook")
    monkeypatch.setattr(HomeMadeClassifier, "_can_set_attn_implementation_cached_value", None, raising=False)
    model = HomeMadeClassifier(ZOO["bert"].config()).eval()
    inputs = ZOO["bert"].inputs()
    dense = output(model, inputs)
    patch_model(model, "sliding_window", window=2)
    assert not torch.equal(output(model, inputs), dense)
    assert not caplog.records
    unpatch_model(model)
    assert torch.equal(output(model, inputs), dense)


def test_tokenizer_saved_beside_the_model_loads(tmp_path: Path):
    model = patch_model(ZOO["bert"].build(), "linformer")
    words = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(95))]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is type(tokenizer)
    assert loaded("w7 w8 w50")["input_ids"] == tokenizer("w7 w8 w50")["input_ids"]


def test_dense_checkpoints_load_as_before(tmp_path: Path):
    for name in ("bert", "llama", "bart"):
        tiny, inputs = ZOO[name], ZOO[name].inputs()
        model = tiny.build()
        patched_beside = patch_model(tiny.build(), "sliding_window", window=2)
        model.save_pretrained(tmp_path / name)
        loaded = getattr(transformers, TASKS[USUAL_TASK[tiny.kind]]).from_pretrained(tmp_path / name)
        assert type(loaded) is type(model)
        assert type(loaded.config) is type(model.config)
        assert torch.equal(output(loaded, inputs), output(model, inputs))
        assert not torch.equal(output(loaded, inputs), output(patched_beside, inputs))
        assert loaded.config._attn_implementation == model.config._attn_implementation


# Copies


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "bart", "vit"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(name: str, how: str, tmp_path: Path):
    inputs = ZOO[name].inputs()
    model = patch_model(ZOO[name].build(), "linformer")
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, tmp_path / "model.pt")
        twin = torch.load(tmp_path / "model.pt", weights_only=False)
    expected = output(model, inputs)
    assert type(twin) is type(model)
    assert type(twin.config) is type(model.config)
    assert torch.equal(output(twin, inputs), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(output(model, inputs), expected)
    unpatch_model(twin)
    assert {row.variant for row in hea.describe(model)} == {"linformer"}


def test_pickled_into_another_process(tmp_path: Path):
    """Spawned workers get a model by pickle; nothing but what the pickle names is imported there."""
    inputs = ZOO["llama"].inputs()
    model = patch_model(ZOO["llama"].build(), "linformer")
    (tmp_path / "in.pkl").write_bytes(pickle.dumps((model, inputs)))
    code = (
        "import pickle, sys, torch\n"
        "model, inputs = pickle.load(open(sys.argv[1], 'rb'))\n"
        "torch.set_num_threads(int(sys.argv[3]))\n"
        "torch.save((type(model).__name__, model(**inputs)[0].detach()), sys.argv[2])"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "in.pkl"), str(tmp_path / "out.pt"), str(torch.get_num_threads())],
        check=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    name, result = torch.load(tmp_path / "out.pt")
    assert name == "EfficientLlamaForCausalLM"
    assert torch.equal(result, output(model, inputs))


def test_classes_are_complete_when_a_second_thread_asks_for_them(monkeypatch: pytest.MonkeyPatch):
    begun, register = threading.Event(), modeling._register_models

    def slowly(*args: Any) -> None:
        begun.set()
        time.sleep(0.3)
        register(*args)

    monkeypatch.setattr(modeling, "_register_models", slowly)
    first = threading.Thread(target=lambda: CONFIG_MAPPING["efficient_xglm"])
    first.start()
    assert begun.wait(60)
    config = CONFIG_MAPPING["efficient_xglm"]
    assert config in AutoModelForCausalLM._model_mapping
    assert efficient_config_class(transformers.XGLMConfig) is config
    first.join()


def test_hosts_stay_instances_of_their_own_class():
    model = patch_model(ZOO["bert"].build(), "linformer")
    attention = model.bert.encoder.layer[0].attention.self
    assert isinstance(attention, BertSelfAttention)
    assert type(attention).__name__ == "EfficientBertSelfAttention"
    assert "EfficientBertSelfAttention" in repr(model)


def test_classes_can_be_imported_by_name(tmp_path: Path):
    from hf_efficient_attn import modeling

    assert modeling.EfficientLlamaForCausalLM.dense_class is transformers.LlamaForCausalLM
    directory, expected = saved(tmp_path, "llama")
    direct = modeling.EfficientLlamaForCausalLM.from_pretrained(directory)
    assert torch.equal(output(direct, ZOO["llama"].inputs()), expected)
    assert isinstance(direct, type(AutoModelForCausalLM.from_pretrained(directory)))
    with pytest.raises(AttributeError, match="EfficientLamaForCausalLM"):
        _ = modeling.EfficientLamaForCausalLM


def test_buffers_that_transformers_makes_anew_while_loading(tmp_path: Path):
    """Falcon-H1's first module fills buffers of others, which Transformers leaves out for what it takes for a user's class."""
    config = transformers.FalconH1Config(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1,
    )  # fmt: skip
    model = patch_model(transformers.FalconH1ForCausalLM(config), "block", block_size=4).eval()
    assert not type(model).is_custom_code()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    buffers = dict(loaded.named_buffers())
    assert all(torch.equal(buffers[name], x) for name, x in model.named_buffers())


def test_one_of_several_classes_for_a_task(tmp_path: Path):
    config = transformers.DeiTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=4
    )
    model = patch_model(transformers.DeiTForImageClassificationWithTeacher(config), "block", block_size=4).eval()
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    pixels = {"pixel_values": torch.randn(1, 3, 16, 16)}
    assert torch.equal(output(loaded, pixels), output(model, pixels))


def test_weights_that_are_made_on_a_cpu_while_a_model_is_loaded(tmp_path: Path):
    config = transformers.DiffLlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=1,
    )  # fmt: skip
    model = patch_model(transformers.DiffLlamaForCausalLM(config), "linformer", rank=8, max_length=32).eval()
    model.save_pretrained(tmp_path)
    inputs = ZOO["llama"].inputs() | {"use_cache": False}
    assert torch.equal(output(AutoModelForCausalLM.from_pretrained(tmp_path), inputs), output(model, inputs))


def test_a_model_that_stands_may_begin_anew():
    """A copy, and a buffer that training made, carry no mark of having values."""
    model = copy.deepcopy(patch_model(ZOO["bert"].build(), {"0": "linformer", "1": "routing"})).half()
    model.apply(model._init_weights)
