"""`mixture_of_heads`: what is skipped costs nothing, the router is trained by both of its losses, choices are balanced."""

from __future__ import annotations

import pytest
import torch
from zoo import ZOO

from hf_efficient_attn import HostShape, describe, patch_model
from hf_efficient_attn.auxiliary import auxiliary_loss
from hf_efficient_attn.measuring import count_flops
from hf_efficient_attn.ops.router import balance_loss, best
from hf_efficient_attn.registry import build, get_config_class, get_info


def layer(causal=False, heads=8, **options):
    host = HostShape(heads, heads, 8, 32, causal)
    info = get_info("mixture_of_heads")
    config = info.module_class.resolve(info.config_class(**options), host)
    return build(config, host)


def inputs(length, heads=8, batch=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, heads, length, 8, generator=generator) for _ in range(3)], torch.randn(
        batch, length, 32, generator=generator
    )


@pytest.mark.parametrize("causal", [False, True])
def test_cost_follows_the_heads_that_run(causal) -> None:
    qkv, hidden = inputs(512)
    flops = {}
    for heads_run in (2, 4, 8):
        module = layer(causal, top_k=heads_run - 1, num_shared_heads=1)
        flops[heads_run] = count_flops(lambda m=module: m(*qkv, scaling=0.3, causal=causal, hidden=hidden))
    assert flops[4] < 0.6 * flops[8]
    assert flops[2] < 0.35 * flops[8]


@pytest.mark.parametrize("causal", [False, True])
def test_a_token_runs_its_number_of_heads(causal) -> None:
    module = layer(causal, top_k=2, num_shared_heads=1)
    qkv, hidden = inputs(40)
    ran = module(*qkv, scaling=0.3, causal=causal, hidden=hidden).abs().sum(-1) > 0
    assert (ran.sum(1) == 3).all()
    assert ran[:, 0].all()
    assert 0 < ran[:, 1].float().mean() < 1, "all tokens chose alike"


def test_defaults_follow_the_layer() -> None:
    model = ZOO["llama"].build()
    patch_model(model, "mixture_of_heads")
    settings = describe(model)[0].hyper_parameters
    assert (settings["top_k"], settings["num_shared_heads"]) == (1, 1)
    assert get_config_class("mixture_of_heads")().top_k is None
    with pytest.raises(ValueError, match="leaves none of the layer's 4 heads"):
        patch_model(ZOO["llama"].build(), "mixture_of_heads", num_shared_heads=4)


def test_a_gate_is_one_and_has_the_gradient_of_its_probability() -> None:
    module = layer(top_k=1, num_shared_heads=0)
    qkv, hidden = inputs(5)
    output = module(*qkv, scaling=0.3, causal=False, hidden=hidden)
    probability = module.router(hidden).softmax(-1)
    head = best(probability, 1)
    chosen = torch.gather(probability, -1, head)[..., 0]
    value = torch.gather(output, 1, head.transpose(1, 2)[..., None].expand(-1, -1, -1, 8))[:, 0].detach()
    (want,) = torch.autograd.grad((chosen[..., None] * value).sum(), module.router.weight)
    (got,) = torch.autograd.grad(output.sum(), module.router.weight)
    assert want.abs().max() > 0
    torch.testing.assert_close(got, want)


def test_balance_loss() -> None:
    even = torch.full((1, 4, 4), 0.25)
    each = torch.eye(4, dtype=torch.bool)[None]
    torch.testing.assert_close(balance_loss(even, each, None), torch.tensor(1.0))
    crowded = torch.tensor([0.7, 0.1, 0.1, 0.1]).expand(1, 4, 4)
    first = torch.tensor([True, False, False, False]).expand(1, 4, 4)
    torch.testing.assert_close(balance_loss(crowded, first, None), torch.tensor(4 * 0.7))
    half = torch.cat([each[:, :2], first[:, :2]], 1)
    real = torch.tensor([[True, True, False, False]])
    torch.testing.assert_close(balance_loss(even, half, real), balance_loss(even[:, :2], half[:, :2], None))
    assert float(balance_loss(even, each, torch.zeros(1, 4, dtype=torch.bool))) == 0


def test_training_balances_the_heads() -> None:
    """The loss falls towards 1 and the rarest head is chosen more often."""
    module = layer(top_k=1, num_shared_heads=0, balance=1.0)
    qkv, hidden = inputs(64)
    hidden = hidden + 2
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)

    def shares():
        return torch.bincount(best(module.router(hidden), 1).flatten(), minlength=8) / hidden[..., 0].numel()

    before = shares()
    for _ in range(100):
        module.train()(*qkv, scaling=0.3, causal=False, hidden=hidden)
        loss = auxiliary_loss(module)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert before.max() > 0.4
    assert shares().max() < 0.25


def test_the_loss_joins_the_model_s_and_reaches_every_router() -> None:
    model, text = ZOO["bert"].build(), ZOO["bert"].inputs(2, 12, "right")
    plain = ZOO["bert"].build()
    patch_model(plain, "mixture_of_heads", balance=0.0)
    patch_model(model, "mixture_of_heads", balance=0.5)
    losses = [m.train()(**text, labels=text["input_ids"]).loss for m in (plain, model)]
    assert 0.9 < float(losses[1] - losses[0]) < 2.5, "two layers, half of about 1 each"
    losses[1].backward()
    routers = [p for name, p in model.named_parameters() if "router" in name]
    assert len(routers) == 2
    assert all(p.grad.abs().max() > 0 for p in routers)
