"""hedgehog: where it starts, what its far keys do, and that its map learns to imitate the softmax."""

import pytest
import torch
from contract import decode

from hf_efficient_attn.registry import build
from hf_efficient_attn.variant import HostShape
from hf_efficient_attn.variants.hedgehog import HedgehogConfig


def make(causal, dim=8, **fields):
    torch.manual_seed(0)
    return build(HedgehogConfig(**fields), HostShape(4, 2, dim, 4 * dim, causal)).double()


def inputs(length, dim=8):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, h, length, dim, generator=generator, dtype=torch.float64) for h in (4, 2, 2)]


def run(module, args):
    return module(*args, scaling=0.4, causal=module.host.causal)


def dense(args, causal):
    return torch.nn.functional.scaled_dot_product_attention(*args, is_causal=causal, scale=0.4, enable_gqa=True)


def test_it_starts_at_the_identity_and_without_a_window_has_no_gate():
    module = make(True)
    assert all(torch.equal(x, torch.eye(8).expand_as(x)) for x in (module.query_map, module.key_map))
    assert (module.gate.sigmoid() > 0.85).all()
    assert [name for name, _ in make(True, window=0).named_parameters()] == ["query_map", "key_map"]


@pytest.mark.parametrize("causal", [False, True])
def test_a_longer_window_is_nearer_to_the_softmax(causal):
    args = inputs(40)
    errors = [
        (run(make(causal, window=w, num_sinks=0), args) - dense(args, causal)).square().mean() for w in (0, 8, 32, 40)
    ]
    assert errors[0] > errors[1] > errors[2] > 100 * errors[3]


@pytest.mark.parametrize("causal", [False, True])
def test_a_far_key_is_read_through_the_map_and_a_near_one_is_not(causal):
    module, args = make(causal, window=4, num_sinks=2), inputs(30)
    full = run(module, args)
    with torch.no_grad():
        module.key_map.mul_(2)
    moved = (run(module, args) - full).abs().amax((0, 1, 3))
    nothing_far = 6 if causal else 0  # the window and the sinks are all there is
    assert (moved[:nothing_far] < 1e-12).all() and (moved[nothing_far:] > 1e-6).all()


def test_the_map_learns_to_imitate_the_softmax():
    module, args = make(True, window=0), inputs(48)
    optimizer, target = torch.optim.Adam(module.parameters(), lr=0.05), dense(args, True)
    losses = []
    for _ in range(40):
        loss = (run(module, args) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_a_tile_that_is_cut_short_and_a_window_longer_than_a_tile():
    for window, length in ((40, 150), (3, 70), (200, 333)):
        module, args = make(True, window=window, num_sinks=5), inputs(length)
        full = run(module, args)
        torch.testing.assert_close(decode(module, args, (length - 50, 1, 49)), full, atol=1e-12, rtol=0)
        assert (run(make(True, window=window + 1, num_sinks=5), args) - full).abs().max() > 1e-4


@pytest.mark.parametrize("causal", [False, True])
def test_a_closed_gate_has_a_gradient_of_zero(causal):
    """One that is 0 in float32: what is far alone is read."""
    module = make(causal, window=4).float()
    with torch.no_grad():
        module.gate.fill_(-200.0)
    args = [x.float().requires_grad_() for x in inputs(40)]
    output = run(module, args)
    grads = torch.autograd.grad(output[:, :, 20:].square().sum(), [*args, *module.parameters()])
    assert all(torch.isfinite(x).all() for x in (output, *grads))
    assert dict(zip((n for n, _ in module.named_parameters()), grads[3:], strict=True))["gate"].tolist() == [0.0] * 4
