"""`mixture_of_depths`: who goes through, what it costs, and a threshold that follows the quantile of the router's logits."""

from __future__ import annotations

import pytest
import torch
from zoo import ZOO

from hf_efficient_attn import HostShape, patch_model
from hf_efficient_attn.measuring import count_flops
from hf_efficient_attn.registry import build, get_config_class


def layer(causal=False, **options):
    return build(get_config_class("mixture_of_depths")(**options), HostShape(4, 4, 8, 32, causal))


def inputs(length, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    qkv = [torch.randn(batch, 4, length, 8, generator=generator) for _ in range(3)]
    return qkv, torch.randn(batch, length, 32, generator=generator)


def went_through(module, qkv, hidden, **options):
    output = module(*qkv, scaling=0.3, causal=module.host.causal, hidden=hidden, **options)
    return output.abs().amax((1, 3)) > 0


@pytest.mark.parametrize("capacity", [0.1, 0.5, 0.75])
def test_an_encoder_row_sends_its_share_of_real_tokens(capacity) -> None:
    qkv, hidden = inputs(21)
    padding = torch.arange(21) < torch.tensor([[21], [13]])
    through = went_through(layer(capacity=capacity), qkv, hidden, padding=padding)
    wanted = torch.ceil(capacity * torch.tensor([21.0, 13.0]).double()).long()
    assert through.sum(1).tolist() == wanted.tolist()
    assert not through[1, 13:].any()


@pytest.mark.parametrize("causal", [False, True])
def test_skipped_tokens_are_neither_queries_nor_keys(causal) -> None:
    module, (qkv, hidden) = layer(causal), inputs(30)
    through = went_through(module, qkv, hidden)
    assert 0.2 < through.float().mean() < 0.8
    before = module(*qkv, scaling=0.3, causal=causal, hidden=hidden)
    moved = [x + 5 * ~through[:, None, :, None] for x in qkv]
    torch.testing.assert_close(module(*moved, scaling=0.3, causal=causal, hidden=hidden), before)
    moved = [x + 5 * through[:, None, :, None] for x in qkv]
    assert (module(*moved, scaling=0.3, causal=causal, hidden=hidden) - before).abs().max() > 1


@pytest.mark.parametrize("causal", [False, True])
def test_logits_far_below_zero(causal) -> None:
    """Whose probability is 0 in float32: a token that goes through gets what attention gave, and a gradient."""
    module, (qkv, hidden) = layer(causal, capacity=1.0), inputs(30)
    want = module(*qkv, scaling=0.3, causal=causal, hidden=hidden)
    hidden = hidden.mul(300).requires_grad_()
    assert module.router(hidden).min() < -200
    output = module(*qkv, scaling=0.3, causal=causal, hidden=hidden)
    torch.testing.assert_close(output, want)
    grads = torch.autograd.grad(output.sum(), [hidden, *module.parameters()])
    assert all(torch.isfinite(x).all() and x.abs().max() > 0 for x in grads)


@pytest.mark.parametrize("causal", [False, True])
def test_cost_falls_with_the_square_of_the_capacity(causal) -> None:
    qkv, hidden = inputs(512)
    flops = []
    for capacity in (1.0, 0.5):
        module = layer(causal, capacity=capacity)
        flops.append(count_flops(lambda m=module: m(*qkv, scaling=0.3, causal=causal, hidden=hidden)))
    assert flops[1] < 0.35 * flops[0]


@pytest.mark.parametrize("capacity", [0.2, 0.5, 0.8])
def test_the_threshold_follows_the_quantile_in_training_only(capacity) -> None:
    module = layer(True, capacity=capacity, decay=0.9)
    start = module.threshold.clone()
    for step in range(60):
        qkv, hidden = inputs(64, seed=step)
        hidden = 2 * hidden + 0.3  # not what the threshold starts for
        qkv[0].requires_grad_()
        module.train(step >= 5)(*qkv, scaling=0.3, causal=True, hidden=hidden).sum().backward()
        if step < 5:
            assert torch.equal(module.threshold, start)
    qkv, hidden = inputs(2000, seed=99)
    share = (module.router(2 * hidden + 0.3) >= module.threshold).float().mean()
    untrained = (module.router(2 * hidden + 0.3) >= start).float().mean()
    assert abs(share - capacity) < 0.03
    assert capacity == 0.5 or abs(untrained - capacity) > 0.06


def test_padded_tokens_do_not_move_the_threshold() -> None:
    thresholds = []
    for extra in (0, 9):
        module, (qkv, hidden) = layer(True, capacity=0.3).train(), inputs(20)
        qkv = [torch.nn.functional.pad(x, (0, 0, 0, extra)).requires_grad_() for x in qkv]
        hidden = torch.nn.functional.pad(hidden, (0, 0, 0, extra), value=9.0)
        padding = torch.arange(20 + extra).expand(2, -1) < 20
        module(*qkv, scaling=0.3, causal=True, hidden=hidden, padding=padding).sum().backward()
        thresholds.append(module.threshold)
        module(*qkv, scaling=0.3, causal=True, hidden=hidden + 1).sum().backward()
        assert not torch.equal(module.threshold, thresholds[-1])
    torch.testing.assert_close(*thresholds)


def test_capacity_one_is_dense_for_ever_and_zero_is_refused() -> None:
    module = layer(True, capacity=1.0).train()
    qkv, hidden = inputs(20)
    qkv[0].requires_grad_()
    module(*qkv, scaling=0.3, causal=True, hidden=hidden).sum().backward()
    assert module.threshold == -float("inf")
    with pytest.raises(ValueError, match="no token would attend"):
        get_config_class("mixture_of_depths")(capacity=0)


def test_a_model_learns_its_routers_and_keeps_less() -> None:
    tiny = ZOO["llama"]
    model, inputs_ = patch_model(tiny.build(), "mixture_of_depths", capacity=0.5).train(), tiny.inputs(2, 40)
    losses, optimizer = [], torch.optim.Adam(model.parameters(), 3e-3)
    before = [p.clone() for name, p in model.named_parameters() if "router" in name]
    for _ in range(8):
        loss = model(**inputs_, labels=inputs_["input_ids"], use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    after = [p for name, p in model.named_parameters() if "router" in name]
    assert losses[-1] < losses[0]
    assert len(after) == 2
    assert all((a - b).abs().max() > 0 for a, b in zip(after, before, strict=True))
    cache = model.eval()(**inputs_, use_cache=True).cache
    kept = [state.entries["chosen"].entries["key"].shape[2] for state in cache.layers]
    assert all(0 < size < 36 for size in kept), kept


def test_checkpointing_and_a_moving_threshold() -> None:
    """The recomputation sees the threshold that the forward saw, in the second step, too."""
    inputs_, gradients, thresholds = ZOO["llama"].inputs(2, 40), [], []
    for checkpointing in (False, True):
        model = patch_model(ZOO["llama"].build(), "mixture_of_depths", decay=0.2).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        attention = model.model.layers[0].self_attn.efficient_attn
        thresholds.append([attention.threshold])
        for _ in range(2):
            model.zero_grad()
            model(**inputs_, labels=inputs_["input_ids"], use_cache=False).loss.backward()
            thresholds[-1].append(attention.threshold)
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert len(set(map(float, thresholds[0]))) == 3, "the threshold stands still"
    assert thresholds[0] == thresholds[1]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)
