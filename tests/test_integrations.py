"""Accelerate's hooks and device maps, sentence_transformers, and data parallelism around patched models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from accelerate import Accelerator, cpu_offload, dispatch_model, init_empty_weights, load_checkpoint_and_dispatch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from sentence_transformers import SentenceTransformer
from test_modeling import output
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import BertTokenizer
from zoo import TASKS, USUAL_TASK, ZOO

import hf_efficient_attn as hea
from hf_efficient_attn import patch_model, unpatch_model

WORDS = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(95))]
SPARSE = {"window": 2}


class Counting(ModelHook):
    """Counts the calls of the module that it is on."""

    def __init__(self) -> None:
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


def hook_attention(model: torch.nn.Module) -> list[Counting]:
    """Accelerate puts a `forward` on the instance of every hooked module."""
    hooks = []
    for row in hea.describe(model):
        hooks.append(Counting())
        add_hook_to_module(model.get_submodule(row.name), hooks[-1])
    return hooks


@pytest.mark.parametrize("hooked", ["before", "after"])
@pytest.mark.parametrize("name", ["bert", "llama", "bart"])
def test_hooks_of_accelerate(name: str, hooked: str):
    inputs = ZOO[name].inputs(pad="right")
    plain = ZOO[name].build()
    dense = output(plain, inputs)
    expected = output(patch_model(plain, "sliding_window", **SPARSE), inputs)
    model = ZOO[name].build()
    if hooked == "before":
        hooks = hook_attention(model)
        patch_model(model, "sliding_window", **SPARSE)
    else:
        patch_model(model, "sliding_window", **SPARSE)
        hooks = hook_attention(model)
    assert torch.equal(output(model, inputs), expected)
    assert [hook.calls for hook in hooks] == [1] * len(hooks)
    unpatch_model(model)
    assert torch.equal(output(model, inputs), dense)
    assert [hook.calls for hook in hooks] == [2] * len(hooks)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(output(model, inputs), dense)


@pytest.mark.parametrize("order", ["hook, patch, unhook", "patch, hook, unhook", "hook, patch, unpatch, unhook"])
def test_hooks_taken_off(order: str):
    inputs = ZOO["llama"].inputs()
    model = ZOO["llama"].build()
    dense = output(model, inputs)
    expected = output(patch_model(ZOO["llama"].build(), "sliding_window", **SPARSE), inputs)
    for step in order.split(", "):
        if step == "hook":
            hook_attention(model)
        elif step == "unhook":
            remove_hook_from_module(model, recurse=True)
        elif step == "patch":
            patch_model(model, "sliding_window", **SPARSE)
        else:
            unpatch_model(model)
    assert torch.equal(output(model, inputs), dense if "unpatch" in order else expected)
    if "unpatch" not in order:
        assert torch.equal(output(unpatch_model(model), inputs), dense)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_device_map(name: str, tmp_path: Path):
    tiny, inputs = ZOO[name], ZOO[name].inputs()
    model = patch_model(tiny.build(), "linformer", rank=4)
    expected = output(model, inputs)
    model.save_pretrained(tmp_path)
    auto = getattr(transformers, TASKS[USUAL_TASK[tiny.kind]])
    for device_map in ("cpu", {"": "cpu"}, "auto"):
        loaded = auto.from_pretrained(tmp_path, device_map=device_map)
        assert torch.equal(output(loaded, inputs), expected)
        assert {row.variant for row in hea.describe(loaded)} == {"linformer"}


def test_dispatched_with_several_entries():
    inputs = ZOO["llama"].inputs()
    expected = output(patch_model(ZOO["llama"].build(), "sliding_window", **SPARSE), inputs)
    parts = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
    for patch_first in (True, False):
        model = ZOO["llama"].build()
        if patch_first:
            patch_model(model, "sliding_window", **SPARSE)
        model = dispatch_model(model, dict.fromkeys(parts, "cpu"), force_hooks=True)
        assert any("_old_forward" in vars(module) for module in model.modules())
        if not patch_first:
            patch_model(model, "sliding_window", **SPARSE)
        assert torch.equal(output(model, inputs), expected)


def test_offloaded_weights_are_refused_and_offloading_afterwards_works():
    inputs = ZOO["llama"].inputs()
    model = patch_model(ZOO["llama"].build(), "linformer", rank=4)
    expected = output(model, inputs)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert any(p.device.type == "meta" for p in model.parameters())
    assert torch.equal(output(model, inputs), expected)
    offloaded = ZOO["llama"].build()
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"attention layer 0 .*offloaded"):
        patch_model(offloaded, "linformer", rank=4)
    assert output(offloaded, inputs).isfinite().all()


LAYERS = {"bert": ["bert.encoder.layer.0", "bert.encoder.layer.1"], "gpt2": ["transformer.h.0", "transformer.h.1"]}
REST = {
    "bert": ["bert.embeddings", "cls"],
    "gpt2": ["transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head"],
}


def own(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {n: p for n, p in model.named_parameters(remove_duplicate=False) if n.endswith(".proj_k")}


def shared_matrix(name: str) -> torch.nn.Module:
    """A patched model whose two layers share a matrix that is no longer what it began as."""
    model = patch_model(ZOO[name].build(), "linformer", sharing="layerwise", segment_size=4)
    with torch.no_grad():
        (matrix,) = set(own(model).values())
        matrix += 0.1 * torch.randn_like(matrix)
    return model


@pytest.mark.parametrize("name", list(LAYERS))
def test_offloading_of_a_matrix_that_layers_share(name: str, tmp_path: Path):
    inputs, model = ZOO[name].inputs(), shared_matrix(name)
    expected = output(model, inputs)
    model.save_pretrained(tmp_path)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in own(model).values())
    assert torch.equal(output(model, inputs), expected)
    remove_hook_from_module(model, recurse=True)
    model.tie_weights()
    assert len(set(own(model).values())) == 1
    assert torch.equal(output(model, inputs), expected)
    auto = getattr(transformers, TASKS[USUAL_TASK[ZOO[name].kind]])
    cpu = dict.fromkeys([*LAYERS[name], *REST[name]], "cpu")
    options = {"offload_folder": tmp_path / "offload"}
    loaded = auto.from_pretrained(tmp_path, device_map=cpu | dict.fromkeys(LAYERS[name], "disk"), **options)
    assert all(p.is_meta for p in own(loaded).values())
    assert torch.equal(output(loaded, inputs), expected)
    for apart in LAYERS[name]:  # Accelerate, as of tied embeddings
        with pytest.raises((ValueError, KeyError), match="proj_k"):
            output(auto.from_pretrained(tmp_path, device_map=cpu | {apart: "disk"}, **options), inputs)


def test_weights_loaded_into_an_empty_model_whose_layers_share_a_matrix(tmp_path: Path):
    inputs, model = ZOO["bert"].inputs(), shared_matrix("bert")
    model.save_pretrained(tmp_path)
    with init_empty_weights():
        twin = transformers.AutoModelForMaskedLM.from_config(model.config)
    twin.tie_weights()
    twin = load_checkpoint_and_dispatch(twin, tmp_path, device_map={"": "cpu"})
    assert len(set(own(twin).values())) == 1
    assert torch.equal(output(twin, inputs), output(model, inputs))


@pytest.fixture
def process_group():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_fully_sharded_layers_that_share_a_matrix():
    """PyTorch's FSDP keeps what its layers share where one group holds them, and no group is a single one of them."""
    inputs, model = ZOO["bert"].inputs(), shared_matrix("bert")
    expected = output(model, inputs)
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(list(model.bert.encoder.layer), mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.tie_weights()
    (matrix,) = set(own(model).values())
    assert torch.equal(output(model, inputs), expected)
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert matrix.grad.full_tensor().abs().max() > 0


def test_prepared_by_an_accelerator():
    inputs = ZOO["bert"].inputs()
    accelerator = Accelerator(cpu=True)
    model = patch_model(ZOO["bert"].build(), "linformer", rank=4, max_length=32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    before = output(model, inputs)
    loss = model.train()(**inputs, labels=inputs["input_ids"]).loss
    accelerator.backward(loss)
    optimizer.step()
    assert not torch.equal(output(model, inputs), before)
    inner = accelerator.unwrap_model(model)
    assert {row.variant for row in hea.describe(inner)} == {"linformer"}


# sentence_transformers


@pytest.fixture
def sentences(tmp_path: Path) -> SentenceTransformer:
    """A tiny sentence encoder, made of parts on disk."""
    from sentence_transformers.models import Pooling, Transformer

    ZOO["bert"].build_for("base").save_pretrained(tmp_path / "bert")
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(tmp_path / "bert")
    part = Transformer(str(tmp_path / "bert"))
    return SentenceTransformer(modules=[part, Pooling(32)], device="cpu")


TEXTS = ["w1 w2 w3 w4 w5 w6 w7", "w9 w8", "w20 w30 w40 w50"]


def test_sentence_transformer_patched_inside(sentences: SentenceTransformer, tmp_path: Path):
    dense = sentences.encode(TEXTS, convert_to_tensor=True)
    patch_model(sentences[0].auto_model, "sliding_window", window=1)
    patched = sentences.encode(TEXTS, convert_to_tensor=True)
    assert (patched - dense).abs().max() > 1e-2
    alone = torch.cat([sentences.encode([text], convert_to_tensor=True) for text in TEXTS])
    assert (alone - patched).abs().max() < 1e-4
    sentences.save(str(tmp_path / "saved"))
    loaded = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert {row.variant for row in hea.describe(loaded[0].auto_model)} == {"sliding_window"}
    assert torch.equal(loaded.encode(TEXTS, convert_to_tensor=True), patched)
    unpatch_model(sentences[0].auto_model)
    assert torch.equal(sentences.encode(TEXTS, convert_to_tensor=True), dense)


def test_sentence_transformer_patched_as_a_whole(sentences: SentenceTransformer):
    dense = sentences.encode(TEXTS, convert_to_tensor=True)
    assert patch_model(sentences, "sliding_window", window=1) is sentences
    assert (sentences.encode(TEXTS, convert_to_tensor=True) - dense).abs().max() > 1e-2
    unpatch_model(sentences)
    assert torch.equal(sentences.encode(TEXTS, convert_to_tensor=True), dense)


def test_sentence_transformer_trains(sentences: SentenceTransformer):
    patch_model(sentences, "linformer", rank=4, max_length=64)
    features = sentences.tokenize(TEXTS) if not hasattr(sentences, "preprocess") else sentences.preprocess(TEXTS)
    sentences.train()(features)["sentence_embedding"].square().mean().backward()
    added = {n: p for n, p in sentences.named_parameters() if ".efficient_attn." in n}
    assert added
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in added.values())


def test_a_gate_is_brought_in_from_where_it_is_offloaded():
    model = patch_model(ZOO["llama"].build(), "rfa", num_features=8, gate=True)
    inputs = ZOO["llama"].inputs()
    expected = output(model, inputs)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(output(model, inputs), expected)


def test_a_wrapper_that_shares_out_parameters_is_refused():
    class DistributedDataParallel(torch.nn.Module):  # a process group is more than its name asks for
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module = module

    model = ZOO["llama"].build()
    with pytest.raises(ValueError, match="distributed already"):
        patch_model(DistributedDataParallel(model), "linformer")
    assert not [key for key in model.state_dict() if "efficient" in key]
    patch_model(model, "linformer")
    with pytest.raises(ValueError, match="before it is wrapped"):
        unpatch_model(DistributedDataParallel(model))
