"""`torch.export`, and ONNX, of patched models: what was written down gives what the model gives, also under another mask."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO

from hf_efficient_attn import available_variants, patch_model
from hf_efficient_attn.registry import get_config_class

BY_DATA = {"lsh", "routing", "clustered", "cluster_former"}
BY_DATA |= {"mixture_of_heads", "mixture_of_depths"}
REFUSED = {"bert": BY_DATA, "gpt2": BY_DATA | {"sinkhorn", "performer", "rfa"}}
CASES = [(name, variant) for name in REFUSED for variant in available_variants("attention")]
LENGTH = 150
SHARP = 30.0  # makes logits of hundreds, as trained models have, whose exponentials are no float32
pytestmark = pytest.mark.slow  # some seconds per model


class Reader(nn.Module):
    """A model as it is exported: tokens and a mask in, logits out."""

    def __init__(self, name: str, variant: str | None) -> None:
        super().__init__()
        self.model = ZOO[name].build()
        if variant is not None:
            config = get_config_class(variant).tiny(ZOO[name].kind == "decoder")
            patch_model(self.model, replace(config, max_length=256) if hasattr(config, "max_length") else config)
        self.options = {} if ZOO[name].kind == "encoder" else {"use_cache": False}

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **self.options).logits


def given(pad: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    return tuple(ZOO["bert"].inputs(length=LENGTH, pad=pad, seed=seed).values())


def export(model: Reader) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(model, given("right"), strict=False)


def largest(program: torch.export.ExportedProgram) -> int:
    """Numbers in the largest tensor that the program computes."""
    values = (node.meta.get("val") for node in program.graph.nodes if node.op == "call_function")
    return max(x.numel() for x in values if isinstance(x, Tensor))


@torch.no_grad()
def close(run, model: Reader) -> None:
    for pad, seed in (("right", 0), ("left", 1), ("none", 2)):
        texts = given(pad, seed)
        real = texts[1].bool()
        got, want = torch.as_tensor(run(*texts))[real], model(*texts)[real]
        assert (got - want).abs().max() < 1e-4 * want.abs().max(), pad


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_exported(name: str, variant: str):
    model = Reader(name, variant)
    if variant in REFUSED[name]:
        with pytest.raises(ValueError, match=f"{variant}: what is computed here depends on the numbers"):
            export(model)
        return
    program = export(model)
    close(program.module(), model)
    assert largest(program) < 2 * 4 * LENGTH**2 or variant in ("flash", "funnel")  # of weights for each pair of tokens


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_experts_are_exported(name: str, top_k: int, tmp_path: Path):
    model = Reader(name, None)
    patch_model(model.model, "moe", num_experts=3, top_k=top_k)
    for part, parameter in model.named_parameters():
        if ".experts." in part:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    close(export(model).module(), model)
    if name == "bert":
        close(in_onnx(model, tmp_path), model)


def test_a_text_without_a_mask_is_refused():
    """Its positions might start again, which a graph would not notice."""
    model, tokens = patch_model(ZOO["llama"].build().eval(), "block"), ZOO["llama"].inputs()["input_ids"]
    with torch.no_grad(), pytest.raises(ValueError, match="give an attention_mask"):
        torch.export.export(model, (tokens,), {"use_cache": False}, strict=False)


def test_dense_weights_are_noticed():
    assert largest(export(Reader("bert", None))) >= 2 * LENGTH**2


@pytest.mark.parametrize("variant", sorted({*available_variants("attention")} - REFUSED["bert"]))
def test_onnx(variant: str, tmp_path: Path):
    model = Reader("bert", variant)
    for name, parameter in model.named_parameters():
        if name.endswith("query.weight") and variant != "nystrom":  # whose inverse makes much of rounding there
            parameter.data *= SHARP
    close(in_onnx(model, tmp_path), model)


def in_onnx(model: Reader, folder: Path):
    """What ONNX Runtime makes of the model."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    names, file = ["input_ids", "attention_mask"], folder / "model.onnx"
    with torch.no_grad():
        torch.onnx.export(model, given("right"), file, dynamo=True, input_names=names, verbose=False)
    session = runtime.InferenceSession(file)
    return lambda *texts: session.run(None, {n: x.numpy() for n, x in zip(names, texts, strict=True)})[0]
