"""A window joined with learned features by the compiled kernel: as near to double precision as PyTorch's operators are."""

from __future__ import annotations

import pytest
import torch
from contract import decode, run
from torch import Tensor

from hf_efficient_attn import HedgehogConfig, HostShape, kernels
from hf_efficient_attn.registry import build

pytestmark = pytest.mark.skipif(kernels.load("hybrid") is None, reason="no C compiler here")

HEADS, SCALING = 4, 0.2


def layer(kv_heads: int, window: int, dim: int = 32, dtype=torch.float32, causal: bool = True):
    """Maps and gates are not what they begin as."""
    module = build(HedgehogConfig(window=window, num_sinks=3), HostShape(HEADS, kv_heads, dim, HEADS * dim, causal))
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=g), alpha=0.3)
    return module.to(dtype)


def inputs(length: int, kv_heads: int, dim: int = 32, scale: float = 1.0, dtype=torch.float32) -> list[Tensor]:
    """Heads lie side by side in memory."""
    g = torch.Generator().manual_seed(0)
    args = [torch.randn(3, length, heads, dim, generator=g).transpose(1, 2) for heads in (HEADS, kv_heads, kv_heads)]
    return [x.mul(scale).to(dtype).requires_grad_() for x in args]


def results(causal, length: int, kv_heads: int, window: int, dim=32, scale=1.0, padded=True, dtype=torch.float32):
    """Output and gradients, of a batch with or without padding, those of parameters included."""
    module, args = layer(kv_heads, window, dim, dtype, causal), inputs(length, kv_heads, dim, scale, dtype)
    padding = torch.arange(length) >= torch.tensor([0, length // 3, length - 1])[:, None]
    output = module(*args, padding=padding if padded else None, scaling=SCALING, causal=causal)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    wanted = [*args, *module.parameters()]
    grads = torch.autograd.grad((output * weight).sum(), wanted, allow_unused=True)
    return [output.detach(), *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, wanted, strict=True))]


def assert_as_exact(calls: list[str], *shape) -> None:
    ours = results(*shape)
    assert set(calls) == {"hybrid_forward", "hybrid_backward"}
    calls.clear()
    with kernels.off():
        theirs, exact = results(*shape), results(*shape, dtype=torch.float64)
    assert not calls
    for got, other, want in zip(ours, theirs, exact, strict=True):
        bound = 3 * (other - want).abs().max() + 2e-6 * want.abs().max() + 1e-6
        assert (got - want).abs().max() <= bound
        assert bound < 1e-3 * want.abs().max() or want.abs().max() < 1e-12  # the gate's, where nothing is far


@pytest.mark.parametrize(("kv_heads", "dim", "window"), [(4, 16, 1), (2, 64, 20), (1, 80, 64), (2, 16, 300)])
@pytest.mark.parametrize("length", [2, 65, 333])
@pytest.mark.parametrize("causal", [True, False])
def test_the_kernel_is_the_scan_and_the_window(calls, causal, length, window, kv_heads, dim) -> None:
    assert_as_exact(calls, causal, length, kv_heads, window, dim)


@pytest.mark.parametrize("causal", [True, False])
def test_heads_side_by_side_in_memory(calls, causal) -> None:
    """Without padding nobody has copied them."""
    assert_as_exact(calls, causal, 130, 2, 20, 32, 1.0, False)


@pytest.mark.parametrize("causal", [True, False])
def test_large_logits_do_not_overflow(calls, causal) -> None:
    assert_as_exact(calls, causal, 200, 2, 20, 64, 12.0)


@pytest.mark.parametrize("splits", [(333,), (70, 263), (1, 64, 200, 68)])
@torch.no_grad()
def test_calls_of_any_length(calls, splits) -> None:
    """Rows that stand at different positions, and single tokens, which PyTorch's operators serve."""
    module, args = layer(2, 40), inputs(333, 2)
    padding = torch.arange(333) >= torch.tensor([0, 40, 100])[:, None]
    with kernels.off():
        want = run(module, *args, padding=padding)
    got = decode(module, args, splits, padding)
    assert calls.count("hybrid_forward") == 6 * len([n for n in splits if n > 1])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_what_one_leaves_serves_the_other(calls, monkeypatch) -> None:
    """The kernel, PyTorch's operators and the kernel again."""
    module, args = layer(2, 40), inputs(333, 2)
    padding = torch.arange(333) >= torch.tensor([0, 40, 100])[:, None]
    with kernels.off():
        want = run(module, *args, padding=padding)

    def switch(state, end: int) -> None:
        monkeypatch.setenv("HF_EFFICIENT_ATTN_KERNELS", "0" if end == 100 else "1")

    got = decode(module, args, (100, 133, 100), padding, after=switch)
    assert calls.count("hybrid_forward") == 12
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_what_needs_a_gradient_through_the_state_is_left_to_the_scan(calls) -> None:
    module, args = layer(2, 8), inputs(40, 2)
    state = module.make_state()
    for begin in (0, 20):
        part = [x[:, :, begin : begin + 20] for x in args]
        state.update(*part[1:])
        output = module(*part, state=state, scaling=SCALING, causal=True)
    (grad,) = torch.autograd.grad(output.sum(), args[2])
    assert not calls
    assert grad[:, :, :10].abs().max() > 1e-3
