"""The compiled kernels compute what PyTorch's operators compute, and their absence changes nothing but speed."""

from __future__ import annotations

import pytest
import torch

from hf_efficient_attn import HostShape, TopkBlocksConfig, kernels, measuring
from hf_efficient_attn.registry import build
from hf_efficient_attn.variants.topk_blocks import _best

needs_compiler = pytest.mark.skipif(kernels.load("chosen_blocks") is None, reason="no C compiler here")


def results(causal: bool, padded: bool, dim: int, size: int, scale: float = 1.0) -> list[torch.Tensor]:
    """Output and gradients of a layer of grouped queries."""
    config = TopkBlocksConfig(block_size=size, top_k=4)
    module = build(config, HostShape(6, 2, dim, 6 * dim, causal))
    g = torch.Generator().manual_seed(0)
    shapes = [(3, heads, 333, dim) for heads in (6, 2, 2)]
    query, key, value = (torch.randn(s, generator=g).mul_(scale).requires_grad_() for s in shapes)
    padding = torch.arange(333) >= torch.tensor([0, 40, 200])[:, None] if padded else None
    output = module(query, key, value, padding=padding, scaling=dim**-0.5, causal=causal)
    output.mul(torch.randn(output.shape, generator=g)).sum().backward()
    return [output.detach(), query.grad, key.grad, value.grad]


@needs_compiler
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("dim", "size"), [(64, 64), (16, 16), (80, 32), (32, 48)])
def test_chosen_blocks_equal_batched_products(monkeypatch, causal, padded, dim, size) -> None:
    calls = []
    run = kernels.call
    monkeypatch.setattr(
        kernels, "call", lambda function, *args: calls.append(function.__name__) or run(function, *args)
    )
    ours = results(causal, padded, dim, size)
    assert {"chosen_blocks_forward", "chosen_blocks_backward", "largest"} <= set(calls)
    monkeypatch.setenv("HF_EFFICIENT_ATTN_KERNELS", "0")
    calls.clear()
    for got, want in zip(ours, results(causal, padded, dim, size), strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
        assert want.abs().max() > 0.1
    assert not calls


@needs_compiler
def test_large_logits_do_not_overflow(monkeypatch) -> None:
    ours = results(True, False, 64, 64, scale=12.0)
    monkeypatch.setenv("HF_EFFICIENT_ATTN_KERNELS", "0")
    for got, want in zip(ours, results(True, False, 64, 64, scale=12.0), strict=True):
        assert torch.isfinite(got).all()
        torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)


def test_of_equal_scores_the_lower_index(monkeypatch) -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0], [0.0, -0.0, 0.0, -1.0, 0.0], [float("-inf"), 5.0, 5.0, 5.0, 1.0]])
    wanted = [{1, 2}, {0, 1}, {1, 2}]
    for off in (False, True):
        if off:
            monkeypatch.setenv("HF_EFFICIENT_ATTN_KERNELS", "0")
        assert [set(row.tolist()) for row in _best(scores.clone(), 2)] == wanted
        assert [set(row.tolist()) for row in _best(scores.clone(), 5)] == [set(range(5))] * 3


@needs_compiler
def test_flops_of_kernels_are_counted(monkeypatch) -> None:
    def flops() -> int:
        return measuring.count_flops(lambda: results(True, False, 64, 64))

    with_kernels = flops()
    monkeypatch.setenv("HF_EFFICIENT_ATTN_KERNELS", "0")
    assert with_kernels == flops() > 1e8
    assert kernels.load("chosen_blocks") is None


def test_without_a_compiler_there_is_no_kernel(monkeypatch) -> None:
    monkeypatch.setattr(kernels.shutil, "which", lambda name: None)
    kernels._compiled.cache_clear()
    assert kernels.load("chosen_blocks") is None
    kernels._compiled.cache_clear()
