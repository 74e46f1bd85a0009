"""Given features by the compiled kernel: as near to double precision as PyTorch's operators are."""

from __future__ import annotations

import pytest
import torch
from contract import decode, run
from torch import Tensor

from hf_efficient_attn import (
    CosformerConfig,
    HedgehogConfig,
    HostShape,
    LinearConfig,
    PerformerConfig,
    RfaConfig,
    kernels,
)
from hf_efficient_attn.registry import build

pytestmark = pytest.mark.skipif(kernels.load("features") is None, reason="no C compiler here")

HEADS = 4
CONFIGS = [
    LinearConfig(),
    CosformerConfig(max_length=700),
    RfaConfig(num_features=38),
    RfaConfig(num_features=38, gate=True),
    HedgehogConfig(window=0),
    PerformerConfig(kernel="relu", num_features=48),
]


def gated(config) -> bool:
    return getattr(config, "gate", False)


by_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda x: f"{x.name}{'-gate' * gated(x)}")


def layer(config, kv_heads: int, dim: int, dtype=torch.float32):
    """A gate lets most of the past fade in ten tokens."""
    module = build(config, HostShape(HEADS, kv_heads, dim, HEADS * dim, True))
    if module.needs_hidden:
        g = torch.Generator().manual_seed(2)
        with torch.no_grad():
            module.gate.bias.fill_(1)
            module.gate.weight.copy_(torch.randn(module.gate.weight.shape, generator=g) * 0.1)
    return module.to(dtype)


def inputs(length: int, kv_heads: int, dim: int, dtype=torch.float32) -> list[Tensor]:
    """Heads lie side by side in memory; the last is the layer's input."""
    g = torch.Generator().manual_seed(0)
    args = [torch.randn(3, length, heads, dim, generator=g).transpose(1, 2) for heads in (HEADS, kv_heads, kv_heads)]
    args.append(torch.randn(3, length, HEADS * dim, generator=g))
    return [x.to(dtype).requires_grad_() for x in args]


def results(
    config, length: int, kv_heads: int, dim: int, dtype=torch.float32, rounding: int | None = None
) -> list[Tensor]:
    """
    Output and gradients, of a batch with padding, that of parameters included. `rounding`: draws what inputs are rounded by
    otherwise, about a unit in float32's last place.
    """
    module, args = layer(config, kv_heads, dim, dtype), inputs(length, kv_heads, dim, dtype)
    if rounding is not None:
        g = torch.Generator().manual_seed(rounding)
        args = [x.detach() * (1 + 2**-23 * torch.randn(x.shape, generator=g, dtype=dtype)) for x in args]
        args = [x.requires_grad_() for x in args]
    padding = torch.arange(length) >= torch.tensor([0, length // 3, length - 1])[:, None]
    output = run(module, *args, padding=padding)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    wanted = [*args[: 4 if module.needs_hidden else 3], *module.parameters()]
    return [output.detach(), *torch.autograd.grad((output * weight).sum(), wanted)]


@by_config
@pytest.mark.parametrize(("kv_heads", "dim"), [(4, 16), (2, 64), (1, 80)])
@pytest.mark.parametrize("length", [2, 65, 257, 600])
def test_the_kernel_is_the_scan(calls, length, kv_heads, dim, config) -> None:
    ours = results(config, length, kv_heads, dim)
    assert set(calls) == {"features_forward", "features_backward"}
    calls.clear()
    with kernels.off():
        exact, theirs = results(config, length, kv_heads, dim, torch.float64), [results(config, length, kv_heads, dim)]
        if gated(config):  # sums cancel so far at some tokens that one error of PyTorch's says little
            theirs += [results(config, length, kv_heads, dim, rounding=seed) for seed in range(3)]
    assert not calls
    for got, want, *others in zip(ours, exact, *theirs, strict=True):
        error = max((other - want).abs().max() for other in others)
        assert (got - want).abs().max() <= 3 * error + 3e-6 * want.abs().max() + 1e-6
        assert error < 1e-3 * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@by_config
def test_half_precision(calls, config, dtype) -> None:
    ours = results(config, 300, 2, 32, dtype)
    assert set(calls) == {"features_forward", "features_backward"}
    with kernels.off():
        theirs = results(config, 300, 2, 32, dtype)
    for got, want in zip(ours, theirs, strict=True):
        assert got.dtype == want.dtype
        assert (got - want).abs().max() <= 2e-2 * want.abs().max()


def test_queries_without_a_key_in_common(calls) -> None:
    """cosformer's: the output fades to 0, and so do gradients."""
    module, (query, key, value, _) = layer(CONFIGS[1], 2, 16), inputs(70, 2, 16)
    with torch.no_grad():
        query[:, :, 66] = -1
    output = module(query, key, value, scaling=0.4, causal=True)
    grads = torch.autograd.grad(output.square().sum(), (query, key, value))
    assert set(calls) == {"features_forward", "features_backward"}
    assert (output[:, :, 66] == 0).all() and (output[:, :, 65] != 0).any()
    assert (grads[0][:, :, 66] == 0).all() and all(torch.isfinite(x).all() for x in grads)


def test_a_divisor_near_zero_of_either_sign(calls) -> None:
    """rfa's features have both signs: with few of them some divisors lie below the floor, on each side."""
    config = RfaConfig(num_features=2)
    ours = results(config, 300, 2, 16)
    assert set(calls) == {"features_forward", "features_backward"}
    with kernels.off():
        theirs, exact = (results(config, 300, 2, 16, x) for x in (torch.float32, torch.float64))
    assert exact[0].abs().max() > 10  # weights of both signs, over a divisor that was kept away from 0
    for got, other, want in zip(ours, theirs, exact, strict=True):
        bound = 10 * (other - want).abs().max() + 1e-5 * want.abs().max()
        assert (got - want).abs().max() <= bound < 1e-2 * want.abs().max()


@pytest.mark.parametrize("splits", [(333,), (70, 263), (1, 64, 200, 68)])
@by_config
@torch.no_grad()
def test_calls_of_any_length(calls, config, splits) -> None:
    """Rows that stand at different positions, and single tokens, which PyTorch's operators serve."""
    module, args = layer(config, 2, 32), inputs(333, 2, 32)
    padding = torch.arange(333) >= torch.tensor([0, 40, 100])[:, None]
    with kernels.off():
        want = run(module, *args, padding=padding)
    got = decode(module, args, splits, padding)
    spans = sum(-(-n // 256) for n in splits if n > 1)
    number = calls.count("features_forward") / 6
    if gated(config) and len(splits) < 3:
        assert number > spans  # halved, where weights rise too far
    else:
        assert number >= spans if gated(config) else number == spans
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@by_config
def test_gradients_go_through_the_state(calls, config) -> None:
    """From call to call, as if it were one."""
    module, args = layer(config, 2, 32), inputs(400, 2, 32)
    whole = run(module, *args)
    weight, outputs, state, begin = torch.randn_like(whole), [], module.make_state(), 0
    for size in (70, 300, 1, 29):
        part = [*(x[:, :, begin : begin + size] for x in args[:3]), args[3][:, begin : begin + size]]
        state.update(*part[1:3])
        outputs.append(run(module, *part, state=state))
        begin += size
    parts = torch.cat(outputs, 2)
    torch.testing.assert_close(parts, whole, atol=1e-4, rtol=1e-4)
    grads = [torch.autograd.grad((x * weight).sum(), args[:3], retain_graph=True) for x in (parts, whole)]
    assert calls.count("features_backward") >= 6 * (1 + 2 + 1) + 6 * 2
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5 * theirs.abs().max().item(), rtol=1e-4)
    apart = torch.autograd.grad((outputs[0] * weight[:, :, :70]).sum(), args[2])[0]
    assert (grads[0][2] - apart)[:, :, :70].abs().max() > 1e-2
