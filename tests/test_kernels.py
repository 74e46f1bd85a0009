"""The compiled kernels compute what PyTorch's operators compute, and their absence changes nothing but speed."""

from __future__ import annotations

import pytest
import torch
from contract import decode

from hf_efficient_attn import (
    BigBirdConfig,
    HedgehogConfig,
    HostShape,
    LinformerConfig,
    LshConfig,
    PerformerConfig,
    SlidingWindowConfig,
    TopkBlocksConfig,
    kernels,
    measuring,
)
from hf_efficient_attn.ops import tiles
from hf_efficient_attn.ops.tiles import best_blocks
from hf_efficient_attn.registry import available_variants, build, get_config_class

needs_compiler = pytest.mark.skipif(kernels.load("chosen_blocks") is None, reason="no C compiler here")


def results(causal: bool, padded: bool, config, dim=32, scale=1.0, dtype=torch.float32) -> list[torch.Tensor]:
    """Output and gradients of a layer of grouped queries."""
    module = build(config, HostShape(6, 2, dim, 6 * dim, causal))
    g = torch.Generator().manual_seed(0)
    shapes = [(3, heads, 333, dim) for heads in (6, 2, 2)]
    query, key, value = (torch.randn(s, generator=g).mul_(scale).to(dtype).requires_grad_() for s in shapes)
    padding = torch.arange(333) >= torch.tensor([0, 40, 200])[:, None] if padded else None
    output = module(query, key, value, padding=padding, scaling=dim**-0.5, causal=causal)
    output.mul(torch.randn(output.shape, generator=g)).sum().backward()
    return [output.detach(), query.grad, key.grad, value.grad]


@needs_compiler
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("dim", "size"), [(64, 64), (16, 16), (80, 32), (32, 48)])
def test_chosen_blocks_equal_batched_products(monkeypatch, calls, causal, padded, dim, size) -> None:
    config = TopkBlocksConfig(block_size=size, top_k=4)
    ours = results(causal, padded, config, dim)
    assert {"sort_pairs", "blocks_forward", "blocks_backward", "choose_blocks"} <= set(calls)
    monkeypatch.setenv("HF_EFFICIENT_ATTN_KERNELS", "0")
    calls.clear()
    for got, want in zip(ours, results(causal, padded, config, dim), strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
        assert want.abs().max() > 0.1
    assert not calls


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "config", [TopkBlocksConfig(block_size=16, top_k=4, query_block=8), BigBirdConfig(block_size=16)]
)
def test_what_is_exported_equals_batched_products(monkeypatch, calls, causal, padded, config) -> None:
    """Copies of each query's blocks, all at once and some at a time."""
    with kernels.off():
        want = results(causal, padded, config)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    for most in (tiles.COPIED, 2**17):
        monkeypatch.setattr(tiles, "COPIED", most)
        for ours, theirs in zip(results(causal, padded, config), want, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
            assert theirs.abs().max() > 0.1
    assert not calls


@needs_compiler
@pytest.mark.parametrize("causal", [False, True])
def test_large_logits_do_not_overflow(causal) -> None:
    """Logits of hundreds: as near to double precision as PyTorch's operators are."""
    config = TopkBlocksConfig(block_size=64, top_k=4)
    ours, exact = (results(causal, False, config, 64, 12.0, dtype) for dtype in (torch.float32, torch.float64))
    with kernels.off():
        theirs = results(causal, False, config, 64, 12.0)
    for got, other, want in zip(ours, theirs, exact, strict=True):
        assert (got - want).abs().max() <= 2 * (other - want).abs().max() < 1e-3 * want.abs().max()


@needs_compiler
@pytest.mark.parametrize("config", [TopkBlocksConfig(block_size=16, top_k=4), BigBirdConfig(block_size=16)])
@pytest.mark.parametrize("splits", [(333,), (40, 293), (100, 1, 232)])
def test_later_calls_of_many_tokens(calls, config, splits) -> None:
    """Rows of a batch that stand at different positions, in blocks that earlier calls began."""
    module = build(config, HostShape(6, 2, 32, 192, True))
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(3, heads, 333, 32, generator=g) for heads in (6, 2, 2)]
    padding = torch.arange(333) >= torch.tensor([0, 21, 90])[:, None]
    with torch.no_grad():
        with kernels.off():
            want = module(*inputs, padding=padding, scaling=0.2, causal=True)
        assert not calls
        got = decode(module, inputs, splits, padding, scaling=0.2)
    assert calls.count("blocks_forward") == 6 * len([n for n in splits if n > 16])  # three rows, two key/value heads
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("picks", [1, 3, 40])
@pytest.mark.parametrize("length", [5, 150])
def test_blocks_are_chosen_by_score(monkeypatch, causal, length, picks) -> None:
    """By sorting all scores; every other score is that of another block, too, and of these the lower number wins."""
    g = torch.Generator().manual_seed(0)
    features, summaries = (torch.randn(2, heads, n, 32, generator=g) for heads, n in ((4, length), (2, 90)))
    summaries[:, :, 1::2] = summaries[:, :, 0::2]
    own, blocks = torch.randint(0, 90, (2, length), generator=g), torch.tensor([90, 70])
    scores = torch.einsum("bhlf,bhcf->bhlc", features, summaries.repeat_interleave(2, 1)).double()
    scores[..., 0] = float("inf")
    index = torch.arange(90)
    end = own[:, None, :, None] if causal else blocks[:, None, None, None]
    closed = (index >= end) | (index == own[:, None, :, None])
    scores.masked_fill_(closed, float("-inf"))
    order = torch.argsort(scores, dim=-1, descending=True, stable=True)[..., :picks]
    there = scores.gather(-1, order) > float("-inf")
    for off in (False, True):
        if off:
            monkeypatch.setenv("HF_EFFICIENT_ATTN_KERNELS", "0")
        got = best_blocks(features, summaries, own, None if causal else blocks, picks)
        assert (got[there] == order[there]).float().mean() > 0.999  # two scores may round to another order
        refused = torch.where(got < 90, pad_closed(closed).gather(-1, got), True)
        assert refused[~there].all()
        assert not refused[there].any()


def pad_closed(closed: torch.Tensor) -> torch.Tensor:
    """One more block, which stands for none."""
    return torch.cat([closed, torch.ones_like(closed[..., :1])], -1).expand(-1, 4, -1, -1)


@needs_compiler
def test_flops_of_kernels_are_counted(monkeypatch) -> None:
    config = TopkBlocksConfig(block_size=64, top_k=4)

    def flops() -> int:
        return measuring.count_flops(lambda: results(True, False, config, 64))

    with_kernels = flops()
    monkeypatch.setenv("HF_EFFICIENT_ATTN_KERNELS", "0")
    assert with_kernels == flops() > 1e8
    assert kernels.load("chosen_blocks") is None


def test_without_a_compiler_there_is_no_kernel(monkeypatch) -> None:
    monkeypatch.setattr(kernels.shutil, "which", lambda name: None)
    kernels._compiled.cache_clear()
    assert kernels.load("chosen_blocks") is None
    kernels._compiled.cache_clear()


SMALL = [info.config_class.tiny(True) for info in available_variants("attention").values()]
BLOCKS = [
    TopkBlocksConfig(block_size=16, top_k=4),
    BigBirdConfig(block_size=16),
]  # of whole vectors, as kernels want them


@pytest.mark.parametrize("config", [*SMALL, *BLOCKS], ids=lambda config: config.name)
def test_queries_and_values_in_different_precisions(config) -> None:
    """Under autocast rotary positions leave queries and keys in float32 and values, and slots of them, in bfloat16."""
    module = build(config, HostShape(4, 2, 16, 64, True))
    g = torch.Generator().manual_seed(0)
    shapes = [(2, heads, 100, 16) for heads in (4, 2, 2)]
    given = [torch.randn(shape, generator=g).bfloat16().float().requires_grad_() for shape in shapes]
    options = {"scaling": 0.25, "causal": True}
    if module.needs_hidden:
        options["hidden"] = torch.randn(2, 100, 64, generator=g)

    def run(dtype: torch.dtype, autocast: bool) -> list[torch.Tensor]:
        query, key, value = given
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = module(query, key, value.to(dtype), **options)
        return [output.float(), *torch.autograd.grad(output.float().square().mean(), given)]

    for got, want in zip(run(torch.bfloat16, True), run(torch.float32, False), strict=True):
        assert torch.nn.functional.cosine_similarity(got.flatten(), want.flatten(), 0) > 0.97
        assert want.abs().max() > 0


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("config", "name", "causal"),
    [
        (SlidingWindowConfig(window=20), "ranges", True),
        (SlidingWindowConfig(window=20), "ranges", False),
        (LinformerConfig(rank=32, max_length=128, segment_size=16), "ranges", True),
        (TopkBlocksConfig(block_size=16, top_k=4), "blocks", True),
        (PerformerConfig(num_features=32), "exponentials", True),
        (HedgehogConfig(window=20), "hybrid", True),
        (HedgehogConfig(window=20), "hybrid", False),
        (LshConfig(num_buckets=1, window=32), "intervals", True),
        (LshConfig(num_buckets=1, window=32), "intervals", False),
    ],
)
def test_half_precision_is_widened(calls, config, name, causal, dtype) -> None:
    """Forward and backward by the kernel, no further from double precision than PyTorch's operators in half precision."""
    module = build(config, HostShape(6, 2, 32, 192, causal))
    g = torch.Generator().manual_seed(0)
    given = [torch.randn(2, heads, 100, 32, generator=g).to(dtype) for heads in (6, 2, 2)]

    def results(dtype: torch.dtype) -> list[torch.Tensor]:
        own = [x.to(dtype).requires_grad_() for x in given]
        output = module.to(dtype)(*own, scaling=0.2, causal=causal)
        grads = torch.autograd.grad(output.double().square().mean(), own)
        assert {x.dtype for x in (output, *grads)} == {dtype}
        return [x.detach().double() for x in (output, *grads)]

    ours = results(dtype)
    assert {f"{name}_forward", f"{name}_backward"} <= set(calls)
    with kernels.off():
        theirs, exact = results(dtype), results(torch.float64)
    for got, other, want in zip(ours, theirs, exact, strict=True):
        assert (got - want).norm() <= 1.1 * (other - want).norm()
        assert (got - want).norm() < 0.01 * want.norm()


@needs_compiler
def test_a_kernel_refuses_other_precisions() -> None:
    with pytest.raises(TypeError, match="bfloat16; it reads float32"):
        kernels.call(lambda *_: None, torch.ones(2, dtype=torch.bfloat16))
    kernels.call(lambda *_: None, torch.ones(2), torch.ones(2, dtype=torch.int64))


@needs_compiler
@pytest.mark.parametrize(
    "config", [LshConfig(window=8), SlidingWindowConfig(window=20), PerformerConfig(num_features=32)]
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_other_threads_are_in_the_callers_mode(calls, monkeypatch, config, mode) -> None:
    """Inference mode is of a thread; half precision is written back by the jobs."""
    module = build(config, HostShape(6, 2, 32, 192, True)).bfloat16().eval()
    given = [torch.randn(2, heads, 100, 32).bfloat16() for heads in (6, 2, 2)]
    with mode():
        want = module(*given, scaling=0.2, causal=True)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
        calls.clear()
        assert torch.equal(module(*given, scaling=0.2, causal=True), want)
    assert calls


class _Lost(torch.autograd.Function):
    """The identity, which gives no gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize("variant", available_variants("attention"))
def test_a_gradient_that_does_not_arrive_is_none_or_zero(variant):
    config = get_config_class(variant).tiny(True)
    module = build(config, HostShape(2, 2, 16, 32, True)).train()
    args = [torch.randn(1, 2, 40, 16, requires_grad=True) for _ in range(3)]
    extra = {"hidden": torch.randn(1, 40, 32)} if module.needs_hidden else {}
    output = module(*args, scaling=0.25, causal=True, **extra)
    (_Lost.apply(output).sum() + sum(x.sum() for x in args)).backward()
    assert all((x.grad == 1).all() for x in args)
