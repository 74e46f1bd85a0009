"""Lines of chosen queries by the kernel: as near to double precision as PyTorch's operators are."""

from __future__ import annotations

import pytest
import torch
from contract import decode, run

from hf_efficient_attn import HostShape, MixtureOfHeadsConfig, kernels
from hf_efficient_attn.registry import build

pytestmark = pytest.mark.skipif(kernels.load("ranges") is None, reason="no C compiler here")

HEADS = 6


def layer(causal: bool, kv_heads: int, dim: int, dtype=torch.float32):
    return build(MixtureOfHeadsConfig(), HostShape(HEADS, kv_heads, dim, HEADS * dim, causal)).to(dtype)


def inputs(length: int, kv_heads: int, dim: int, dtype=torch.float32):
    """Heads lie side by side in memory; the last is the layer's input, by which heads are chosen."""
    g = torch.Generator().manual_seed(0)
    args = [torch.randn(3, length, heads, dim, generator=g).transpose(1, 2) for heads in (HEADS, kv_heads, kv_heads)]
    args.append(torch.randn(3, length, HEADS * dim, generator=g).bfloat16())  # alike in every precision
    return [x.to(dtype).requires_grad_() for x in args]


def results(causal, length, kv_heads, dim, dtype=torch.float32):
    """Output and gradients, of a batch with padding."""
    module, args = layer(causal, kv_heads, dim, dtype), inputs(length, kv_heads, dim, dtype)
    padding = torch.arange(length) >= torch.tensor([0, length // 3, length - 1])[:, None]
    output = run(module, *args, padding=padding)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return [output.detach(), *torch.autograd.grad((output * weight).sum(), [*args, *module.parameters()])]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("kv_heads", "dim"), [(6, 16), (2, 64), (1, 80)])
@pytest.mark.parametrize("length", [2, 65, 333])
def test_the_kernel_is_exact_attention_of_the_chosen(calls, length, kv_heads, dim, causal) -> None:
    ours = results(causal, length, kv_heads, dim)
    assert set(calls) == {"ranges_forward", "ranges_backward"}
    calls.clear()
    with kernels.off():
        theirs, exact = (results(causal, length, kv_heads, dim, x) for x in (torch.float32, torch.float64))
    assert not calls
    for got, other, want in zip(ours, theirs, exact, strict=True):
        assert (got - want).abs().max() <= 3 * (other - want).abs().max() + 2e-6 * want.abs().max() + 1e-7
    left_out = (exact[0][0] == 0).all(-1)
    assert left_out.any() and torch.equal(left_out, (ours[0][0] == 0).all(-1))


@pytest.mark.parametrize("causal", [True, False])
def test_half_precision(calls, causal) -> None:
    ours = results(causal, 300, 2, 32, torch.bfloat16)
    assert set(calls) == {"ranges_forward", "ranges_backward"}
    with kernels.off():
        theirs = results(causal, 300, 2, 32, torch.bfloat16)
    for got, want in zip(ours, theirs, strict=True):
        assert got.dtype == want.dtype
        assert (got - want).abs().max() <= 2e-2 * want.abs().max()


@pytest.mark.parametrize("splits", [(333,), (70, 263), (1, 64, 200, 68)])
@torch.no_grad()
def test_calls_of_any_length(calls, splits) -> None:
    """Rows that stand at different positions, and single tokens, which PyTorch's operators serve."""
    module, args = layer(True, 2, 32), inputs(333, 2, 32)
    padding = torch.arange(333) >= torch.tensor([0, 40, 100])[:, None]
    with kernels.off():
        want = run(module, *args, padding=padding)
    got = decode(module, args, splits, padding)
    assert calls
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
