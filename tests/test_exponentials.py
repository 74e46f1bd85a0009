"""Exponential features by the compiled kernel: as near to double precision as PyTorch's operators are."""

from __future__ import annotations

import pytest
import torch
from contract import decode, run
from torch import Tensor

from hf_efficient_attn import HostShape, PerformerConfig, kernels
from hf_efficient_attn.registry import build

pytestmark = pytest.mark.skipif(kernels.load("exponentials") is None, reason="no C compiler here")

HEADS, DIM, SCALING = 4, 32, 0.2


def layer(kv_heads: int, dtype=torch.float32):
    return build(PerformerConfig(num_features=48), HostShape(HEADS, kv_heads, DIM, HEADS * DIM, True)).to(dtype)


def inputs(length: int, kv_heads: int, growth: float = 1.0, dtype=torch.float32, shared: float = 0.0) -> list[Tensor]:
    """
    Heads lie side by side in memory. The first keys are `growth` times as long as the last, and weigh so much less. Queries and
    keys have `shared` in common.
    """
    g = torch.Generator().manual_seed(0)
    args = [torch.randn(3, length, heads, DIM, generator=g).transpose(1, 2) for heads in (HEADS, kv_heads, kv_heads)]
    args[1] = args[1] * torch.linspace(growth, 1, length)[:, None]
    args[:2] = (x + shared for x in args[:2])
    return [x.to(dtype).requires_grad_() for x in args]


def results(length: int, kv_heads: int, growth: float = 1.0, dtype=torch.float32, shared: float = 0.0) -> list[Tensor]:
    """Output and gradients, of a batch with padding."""
    module, args = layer(kv_heads, dtype), inputs(length, kv_heads, growth, dtype, shared)
    padding = torch.arange(length) >= torch.tensor([0, length // 3, length - 1])[:, None]
    output = module(*args, padding=padding, scaling=SCALING, causal=True)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return [output.detach(), *torch.autograd.grad((output * weight).sum(), args)]


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("length", [2, 33, 64, 257, 600])
def test_the_kernel_is_the_scan(calls, length, kv_heads) -> None:
    ours = results(length, kv_heads)
    assert set(calls) == {"exponentials_forward", "exponentials_backward"}
    calls.clear()
    with kernels.off():
        theirs, exact = results(length, kv_heads), results(length, kv_heads, dtype=torch.float64)
    assert not calls
    for got, other, want in zip(ours, theirs, exact, strict=True):
        assert (got - want).abs().max() <= 3 * (other - want).abs().max() + 1e-6 < 1e-3 * want.abs().max()


@pytest.mark.parametrize("growth", [3.0, 12.0])
def test_references_rise_and_pieces_are_halved(calls, growth) -> None:
    """Keys whose features grow, in one piece by more than a factor of exp(50), where growth is large."""
    length, inside = 300, slice(64, 128)
    w = layer(2).features
    key = inputs(length, 2, growth)[1].detach()
    raw = torch.einsum("gmd,bgnd->bgnm", w * SCALING**0.5, key) - SCALING / 2 * key.square().sum(-1, keepdim=True)
    highest = raw.cummax(2).values
    rises = (highest[:, :, inside] - highest[:, :, inside.start, None]).max()
    assert rises > 50 if growth > 10 else 0 < rises < 50
    ours, exact = results(length, 2, growth), results(length, 2, growth, torch.float64)
    assert set(calls) == {"exponentials_forward", "exponentials_backward"}
    with kernels.off():
        theirs = results(length, 2, growth)
    for got, other, want in zip(ours, theirs, exact, strict=True):
        assert torch.isfinite(got).all()
        assert (got - want).abs().max() <= 10 * (other - want).abs().max() + 1e-6 < 1e-2 * want.abs().max()


def test_both_passes_round_alike(calls) -> None:
    """Where logarithms are of hundreds, and a query's gradient is the small difference of large sums."""
    ours = results(150, 2, shared=-30.0)
    assert set(calls) == {"exponentials_forward", "exponentials_backward"}
    with kernels.off():
        theirs, exact = (results(150, 2, dtype=dtype, shared=-30.0) for dtype in (torch.float32, torch.float64))
    for got, other, want in zip(ours, theirs, exact, strict=True):
        assert (got - want).abs().max() <= 5 * (other - want).abs().max()


@pytest.mark.parametrize("splits", [(333,), (70, 263), (1, 64, 200, 68)])
@torch.no_grad()
def test_calls_of_any_length(calls, splits) -> None:
    """Rows that stand at different positions, and single tokens, which PyTorch's operators serve."""
    module, args = layer(2), inputs(333, 2, 3.0)
    padding = torch.arange(333) >= torch.tensor([0, 40, 100])[:, None]
    with kernels.off():
        want = run(module, *args, padding=padding)
    got = decode(module, args, splits, padding)
    assert calls.count("exponentials_forward") == 6 * len([n for n in splits if n > 1])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_what_one_leaves_serves_the_other(calls, monkeypatch) -> None:
    """The kernel, PyTorch's operators and the kernel again."""
    module, args = layer(2), inputs(333, 2, 3.0)
    padding = torch.arange(333) >= torch.tensor([0, 40, 100])[:, None]
    with kernels.off():
        want = run(module, *args, padding=padding)

    def switch(state, end: int) -> None:
        monkeypatch.setenv("HF_EFFICIENT_ATTN_KERNELS", "0" if end == 100 else "1")

    got = decode(module, args, (100, 133, 100), padding, after=switch)
    assert calls.count("exponentials_forward") == 12
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_what_needs_a_gradient_through_the_state_is_left_to_the_scan(calls) -> None:
    module, args = layer(2), inputs(40, 2)
    state = module.make_state()
    for begin in (0, 20):
        part = [x[:, :, begin : begin + 20] for x in args]
        state.update(*part[1:])
        output = module(*part, state=state, scaling=SCALING, causal=True)
    (grad,) = torch.autograd.grad(output.sum(), args[2])
    assert grad[:, :, :20].abs().max() > 0.1
