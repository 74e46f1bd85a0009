"""A patched layer learns its dense attention while the dense output flows on; the teacher is the model itself."""

from __future__ import annotations

import pytest
import torch
from transformers import AlbertConfig, AlbertForMaskedLM
from zoo import ZOO

from hf_efficient_attn import patch_model, unpatch_model
from hf_efficient_attn.recovery import (
    attention_errors,
    attention_transfer,
    dense_attention,
    distillation_losses,
    patched_layers,
)


def build(name: str = "llama", variant: str = "linformer", **hyper):
    tiny = ZOO[name]
    model = tiny.build()
    if variant == "linformer":
        hyper = {"rank": 4, "max_length": 64, "segment_size": 4, "num_sinks": 1} | hyper
    patch_model(model, variant, **hyper)
    return model, tiny


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_inside_the_model_is_dense(name: str, side: str) -> None:
    model, tiny = build(name)
    inputs = tiny.inputs(3, 24, side)
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        patched = model(**inputs, use_cache=False).logits
        with dense_attention(model):
            inside = model(**inputs, use_cache=False).logits
        with attention_transfer(model):
            beside = model(**inputs, use_cache=False).logits
        again = model(**inputs, use_cache=False).logits
        dense = unpatch_model(model)(**inputs, use_cache=False).logits
    torch.testing.assert_close(inside[mask], dense[mask], atol=1e-5, rtol=0)
    torch.testing.assert_close(beside[mask], dense[mask], atol=1e-5, rtol=0)
    assert torch.equal(again, patched)
    assert (patched - dense)[mask].abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_layers_learn_their_dense_attention(name: str) -> None:
    model, tiny = build(name)
    batches = [tiny.inputs(4, 40, "right")]
    frozen = {n: p.clone() for n, p in model.named_parameters() if ".efficient_attn." not in n}
    before = attention_errors(model, batches)
    assert [row.variant for row in before] == ["linformer"] * tiny.n_layers
    with attention_transfer(model) as transfer:
        assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in transfer.parameters}
        optimizer = torch.optim.AdamW(transfer.groups(lr=0.1), weight_decay=0.0)
        for _ in range(40):
            model(**batches[0])
            transfer.loss().backward()
            optimizer.step()
            optimizer.zero_grad()
    after = attention_errors(model, batches)
    for old, new in zip(before, after, strict=True):
        assert new.error < 0.9 * old.error, f"layer {old.layer}: {old.error:.3g} -> {new.error:.3g}"
    for n, p in model.named_parameters():
        assert p.requires_grad
        if n in frozen:
            assert torch.equal(p, frozen[n])


def test_rates_follow_the_size_of_a_parameter_and_layers_can_be_put_back() -> None:
    model, _ = build()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    with attention_transfer(model) as transfer:
        groups = transfer.groups(lr=0.5)
        assert [group["params"] for group in groups] == [[p] for p in transfer.parameters]
        for group in groups:
            entries = group["params"][0].detach()
            used = entries[entries != 0]
            size = used.square().mean().sqrt().item() if len(used) else 1.0
            if entries.ndim == 3:  # a projection's step is relative to its mean entry
                size = entries.mean().item()
            assert group["lr"] == pytest.approx(0.5 * size)
        assert len({group["lr"] for group in groups}) > 1  # biases of slots are zeros, projections are not
        for parameter in transfer.parameters:
            parameter.data += 1
    with pytest.raises(ValueError, match="layer 2 does not exist"):
        transfer.undo([2])
    moved = {n: p.detach().clone() for n, p in model.named_parameters()}
    transfer.undo("0", keep=0.25)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), start[n] + (moved[n] - start[n]) * (0.25 if ".0." in n else 1))
    transfer.undo("1")
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
    assert changed and changed == {n for n in start if ".efficient_attn." in n and ".0." in n}


def test_an_infinite_threshold_stays_where_it_is() -> None:
    model, _ = build(variant="mixture_of_depths", capacity=1.0)
    with attention_transfer(model) as transfer:
        for parameter in transfer.parameters:
            parameter.data += 1
        transfer.undo("0-1", keep=0.5)
    state = {n: x for n, x in model.state_dict().items() if ".efficient_attn." in n}
    assert {x.item() for n, x in state.items() if "threshold" in n} == {float("-inf")}
    assert all(not x.isnan().any() for x in state.values())


def test_what_layers_share_goes_back_once() -> None:
    model, _ = build("bert", sharing="layerwise")
    with attention_transfer(model) as transfer:
        (shared,) = transfer.parameters
        start = shared.detach().clone()
        shared.data += 1
        transfer.undo("0-1", keep=0.5)
    torch.testing.assert_close(shared.detach(), start + 0.5)


def test_the_rate_of_an_identity_is_that_of_its_diagonal() -> None:
    model, _ = build(variant="hedgehog")
    with attention_transfer(model) as transfer:
        rates = {tuple(group["params"][0].shape): group["lr"] for group in transfer.groups(lr=0.5)}
    assert {len(shape): rate for shape, rate in rates.items()} == {3: 0.5, 1: 1.0}  # maps; gates begin at 2


def test_padding_is_not_learned_from() -> None:
    model, tiny = build()
    inputs = tiny.inputs(3, 24, "left")
    with attention_transfer(model) as transfer:
        model(**inputs, use_cache=False)
        loss = transfer.loss()
    alone = []
    for row in range(3):
        keep = inputs["attention_mask"][row].bool()
        with attention_transfer(model) as transfer:
            model(input_ids=inputs["input_ids"][row : row + 1, keep], use_cache=False)
            alone.append([(w.distance, w.square) for w in transfer._watches])
    joined = [sum(row[layer][0] for row in alone) / sum(row[layer][1] for row in alone) for layer in range(2)]
    torch.testing.assert_close(loss, torch.stack(joined).mean(), atol=1e-5, rtol=1e-4)


def test_some_layers_at_a_time() -> None:
    model, tiny = build()
    with attention_transfer(model, layers=[1]) as transfer:
        model(**tiny.inputs(2, 24), use_cache=False)
        assert [row.layer for row in transfer.errors()] == [1]
        transfer.loss().backward()
    grads = [any(p.grad is not None for p in v.parameters()) for _, _, v in patched_layers(model)]
    assert grads == [False, True]


def test_nothing_to_train_and_nothing_patched() -> None:
    model, tiny = build(variant="block", block_size=4)
    with attention_transfer(model) as transfer:
        assert transfer.parameters == []
        with pytest.raises(RuntimeError, match="call the model first"):
            transfer.loss()
        with pytest.raises(ValueError, match="leave out use_cache"):
            model(**tiny.inputs(2, 24), use_cache=True)
    with pytest.raises(ValueError, match="no batch"):
        attention_errors(model, [])
    assert attention_errors(model, [tiny.inputs(2, 24)])[0].error > 0.01
    with pytest.raises(ValueError, match="is patched"):
        patched_layers(unpatch_model(model))
    patch_model(model, "flash")
    assert max(row.error for row in attention_errors(model, [tiny.inputs(2, 24, "left")])) < 1e-9


def test_distillation_is_kl_and_reaches_the_student_only() -> None:
    g = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(8, 30)
    own, other = torch.randn(2, 11, 8, generator=g)
    own.requires_grad_(True)
    got = distillation_losses(own, other, head, temperature=2.0, chunk_size=4)
    p, q = (head(other) / 2).softmax(-1), (head(own) / 2).softmax(-1)
    torch.testing.assert_close(got, 4 * (p * (p / q).log()).sum(-1))
    got.sum().backward()
    assert own.grad.abs().max() > 0
    torch.testing.assert_close(distillation_losses(other, other, head), torch.zeros(11), atol=1e-6, rtol=0)


def test_layers_that_share_a_module_count_all() -> None:
    """ALBERT calls one layer four times; the error is that of all its calls, whatever was run before."""
    tiny = ZOO["bert"]
    sizes = {"vocab_size": 100, "embedding_size": 32, "hidden_size": 32, "intermediate_size": 64}
    torch.manual_seed(0)
    model = AlbertForMaskedLM(AlbertConfig(num_hidden_layers=4, num_attention_heads=4, initializer_range=0.2, **sizes))
    patch_model(model.eval(), "linformer", rank=4, max_length=24)
    seen = []

    def watch(module, args, output) -> None:
        exact = torch.nn.functional.scaled_dot_product_attention(*args)
        seen.append(((output - exact).square().sum(), exact.square().sum()))

    ((_, _, variant),) = patched_layers(model)
    variant.register_forward_hook(watch)  # before the transfer's
    with attention_transfer(model) as transfer:
        for _ in range(2):
            model(input_ids=tiny.inputs(2, 24)["input_ids"])
        transfer.loss().backward()
        errors = [row.error for row in transfer.errors()]
    assert len(seen) == 8
    distance, square = (sum(x[i] for x in seen[4:]) for i in (0, 1))
    assert errors == [pytest.approx(float(distance / square), rel=1e-4)]


def test_a_text_of_which_no_summary_is_made_teaches_nothing() -> None:
    model, tiny = build(variant="linformer", segment_size=64, rank=8, max_length=64)
    with attention_transfer(model) as transfer:
        model(**tiny.inputs(2, 24), use_cache=False)
        transfer.loss().backward()
        assert all(p.grad is not None and not p.grad.any() for p in transfer.parameters)
        with torch.no_grad():
            model(**tiny.inputs(2, 24), use_cache=False)
        with pytest.raises(RuntimeError, match="called without gradients"):
            transfer.loss()


def test_experts_beside_dense_attention_have_a_teacher() -> None:
    model, tiny = build(variant="moe", num_experts=2)
    inputs = tiny.inputs(2, 24)
    with torch.no_grad(), dense_attention(model):
        logits = model(**inputs).logits
    assert torch.equal(logits, model(**inputs).logits)
    with pytest.raises(ValueError, match="no attention layer"):
        attention_errors(model, [inputs])


def test_each_module_keeps_its_mode() -> None:
    model, tiny = build()
    model.train()
    frozen = patched_layers(model)[0][2].eval()
    attention_errors(model, [tiny.inputs(2, 24)])
    assert [module for module in model.modules() if not module.training] == list(frozen.modules())
