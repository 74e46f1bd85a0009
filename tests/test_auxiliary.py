"""Running statistics move after the backward pass that made them, in training only; auxiliary losses join the model's."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from zoo import ZOO

from hf_efficient_attn import (
    EfficientAttention,
    EfficientAttentionConfig,
    patch_model,
    register_variant,
    unpatch_model,
    unregister_variant,
)
from hf_efficient_attn.auxiliary import auxiliary_loss
from hf_efficient_attn.ops.exact import exact_attention


@pytest.fixture
def counting():
    """A variant whose output depends on how many tokens it has learned from, with a loss of its own."""

    @dataclass(kw_only=True)
    class CountingConfig(EfficientAttentionConfig):
        pass

    @register_variant("counting", family="exact", summary="a toy", paper="none")
    class Counting(EfficientAttention):
        config_class = CountingConfig

        def __init__(self, config, host):
            super().__init__(config, host)
            self.register_buffer("seen", torch.zeros(()))
            self.gate = torch.nn.Parameter(torch.ones(()))

        def attend(self, query, key, value, *, lengths, scaling, dropout, causal, state, hidden):
            self.observe(tokens=torch.tensor(float(query.shape[2])) if lengths is None else lengths.sum().float())
            self.add_loss(3 * self.gate)
            output = exact_attention(query, key, value, lengths=lengths, scaling=scaling, causal=causal)
            return output * (1 + self.seen / 100) * self.gate

        def update_statistics(self, tokens):
            self.seen = self.seen + tokens

    yield
    unregister_variant("counting")


def build():
    model = ZOO["llama"].build()
    patch_model(model, "counting")
    return model, [layer.self_attn.efficient_attn for layer in model.model.layers]


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_statistics_move_once_after_backward(counting, reentrant) -> None:
    model, layers = build()
    inputs = ZOO["llama"].inputs(2, 12, "right")
    real = float(inputs["attention_mask"].sum())
    model.train()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    for step in (1, 2):
        loss = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
        assert [float(layer.seen) for layer in layers] == [real * (step - 1)] * 2, "moved before backward"
        loss.backward()
        assert [float(layer.seen) for layer in layers] == [real * step] * 2


def test_recomputation_sees_the_same_statistics(counting) -> None:
    inputs = ZOO["llama"].inputs(2, 12)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model, layers = build()
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for _ in range(2):
            model.zero_grad()
            model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        assert float(layers[0].seen) > 0
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_parts_of_a_combined_layer_learn_too(counting) -> None:
    model, inputs = ZOO["llama"].build(), ZOO["llama"].inputs(2, 12)
    patch_model(model, "combined", parts=["counting", "block"])
    part = model.model.layers[0].self_attn.efficient_attn.parts[0]
    model.train()
    loss = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
    plain = torch.nn.functional.cross_entropy(
        model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten()
    )
    torch.testing.assert_close(loss, plain + 2 * 3)
    loss.backward()
    assert float(part.seen) == 12


def test_nothing_moves_in_eval_or_without_backward(counting) -> None:
    model, layers = build()
    inputs = ZOO["llama"].inputs(2, 12)
    model.eval()
    model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    model.train()
    with torch.no_grad():
        model(**inputs, use_cache=False)
    assert auxiliary_loss(model) is None
    assert [float(layer.seen) for layer in layers] == [0, 0]


def test_the_model_s_loss_includes_the_layers_losses(counting) -> None:
    model, layers = build()
    inputs = ZOO["llama"].inputs(2, 12)
    labels = inputs["input_ids"]
    model.eval()
    plain = model(**inputs, labels=labels, use_cache=False).loss
    assert auxiliary_loss(model) is None
    model.train()
    for options in ({}, {"return_dict": False}):
        with_losses = model(**inputs, labels=labels, use_cache=False, **options)[0]
        torch.testing.assert_close(with_losses, plain + 2 * 3)
    assert auxiliary_loss(model) is None, "given out twice"
    model(**inputs, use_cache=False)
    assert float(auxiliary_loss(model)) == 6
    model.zero_grad()
    model(**inputs, labels=labels, use_cache=False).loss.backward()
    own = layers[0].gate.grad.clone()
    model.zero_grad()
    model.eval()
    for layer in layers:
        layer.seen = torch.zeros(())
    model(**inputs, labels=labels, use_cache=False).loss.backward()
    torch.testing.assert_close(own, layers[0].gate.grad + 3)
    unpatch_model(model.train())
    torch.testing.assert_close(model(**inputs, labels=labels, use_cache=False).loss, plain)


def test_a_model_is_copied_while_a_loss_waits():
    model = patch_model(ZOO["bert"].build(), "moe").train()
    inputs = ZOO["bert"].inputs()
    loss = model(**inputs).logits.sum()
    copied = copy.deepcopy(model)
    assert auxiliary_loss(copied) is None and auxiliary_loss(model) is not None
    loss.backward()


def test_batches_whose_losses_are_added_up_share_the_auxiliary_loss():
    """As a Trainer does that accumulates: it says of how many tokens the sum is a mean."""
    inputs = ZOO["llama"].inputs()
    labels = inputs["input_ids"].masked_fill(torch.arange(20) < 5, -100)
    items, found = 4 * int((labels != -100).sum()), {}
    for balance in (0.0, 1.0):
        model = patch_model(ZOO["llama"].build(), "moe", balance=balance).train()
        losses = [model(**inputs, labels=labels, **more).loss for more in ({}, {"num_items_in_batch": items})]
        found[balance] = torch.stack(losses)
    whole, part = found[1.0] - found[0.0]
    assert whole > 0.5
    assert part.item() == pytest.approx(whole.item() / 4, rel=1e-4)
