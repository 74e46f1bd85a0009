"""Ranges of near keys and a far list, by the compiled kernel: what PyTorch's operators compute in the same decoder."""

from __future__ import annotations

import pytest
import torch
from contract import decode

from hf_efficient_attn import (
    BlockConfig,
    ClusterFormerConfig,
    CompressiveConfig,
    HostShape,
    LinformerConfig,
    SinkhornConfig,
    SlidingWindowConfig,
    StridedConfig,
    TransformerXLConfig,
    kernels,
)
from hf_efficient_attn.ops.ranges import Tile, range_attention
from hf_efficient_attn.registry import build

pytestmark = pytest.mark.skipif(kernels.load("ranges") is None, reason="no C compiler here")

SIZES = {"rank": 64, "max_length": 256}
LAYERS = [  # head size, length, config
    (64, 333, {"segment_size": 64, "num_sinks": 4}),
    (16, 200, {"segment_size": 20, "num_sinks": 45, "exact_segments": 0}),
    (80, 259, {"segment_size": 60, "num_sinks": 0, "exact_segments": 2}),
    (32, 130, {"segment_size": 16, "num_sinks": 3, "sharing": "none"}),
    (64, 333, SlidingWindowConfig(window=70, num_sinks=4)),
    (16, 200, SlidingWindowConfig(window=20, num_sinks=45)),
    (80, 259, SlidingWindowConfig(window=1, num_sinks=1)),
    (32, 130, SlidingWindowConfig(window=129, num_sinks=0)),
    (64, 333, BlockConfig(block_size=70, num_sinks=4)),
    (16, 259, TransformerXLConfig(segment_size=20, memory_size=50, num_sinks=30)),
    (64, 333, CompressiveConfig(segment_size=16, memory_size=32, compressed_size=11, compression_rate=4, num_sinks=5)),
    (64, 333, StridedConfig(stride=7, local_size=30, num_sinks=10)),
    (16, 200, StridedConfig(stride=64, local_size=64)),
    (80, 259, StridedConfig(stride=2, local_size=0, num_sinks=45)),
    (32, 130, StridedConfig(stride=300, local_size=2, num_sinks=0)),
    (32, 130, StridedConfig(stride=1, local_size=20)),
    (64, 333, SinkhornConfig(block_size=30, temperature=0.2)),
    (16, 200, SinkhornConfig(block_size=20, num_sinks=0, temperature=0.1)),
    (32, 130, SinkhornConfig(block_size=23, num_sinks=23, temperature=0.1)),
]


ENCODERS = [
    (64, 333, SlidingWindowConfig(window=70)),
    (16, 200, SlidingWindowConfig(window=20, global_tokens=45)),
    (80, 259, SlidingWindowConfig(window=1, global_tokens=1)),
    (32, 130, SlidingWindowConfig(window=128, global_tokens=70)),
    (32, 300, SlidingWindowConfig(window=64, global_tokens=3)),
    (32, 130, ClusterFormerConfig(num_clusters=3, window=20)),
    (16, 259, TransformerXLConfig(segment_size=20, memory_size=50)),
    (64, 333, TransformerXLConfig(segment_size=100, memory_size=30)),
    (64, 333, TransformerXLConfig(segment_size=20, memory_size=30, global_tokens=71)),
    (64, 333, StridedConfig(stride=7, local_size=30)),
    (16, 200, StridedConfig(stride=64, local_size=64)),
    (80, 259, StridedConfig(stride=2, local_size=0)),
    (32, 130, StridedConfig(stride=300, local_size=1)),
    (64, 333, SinkhornConfig(block_size=30, temperature=0.2)),
    (16, 200, SinkhornConfig(block_size=20, temperature=0.1)),
    (32, 130, SinkhornConfig(block_size=23, temperature=0.1)),
    (16, 259, BlockConfig(block_size=50, global_tokens=1)),
    (64, 333, CompressiveConfig(segment_size=16, memory_size=32, compressed_size=11, compression_rate=4)),
    (16, 200, CompressiveConfig(segment_size=30, memory_size=0, compressed_size=70, compression_rate=3)),
    (32, 130, CompressiveConfig(segment_size=20, memory_size=50, compressed_size=9, compression_rate=2)),
    (16, 200, CompressiveConfig(segment_size=6, memory_size=9, compression_rate=3, compression="max", global_tokens=5)),
]


def layer(dim: int, config, causal: bool = True):
    if isinstance(config, dict):
        config = LinformerConfig(**SIZES, **config)
    module = build(config, HostShape(6, 2, dim, 6 * dim, causal))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return module


def inputs(dim: int, length: int, scale: float = 1.0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    draw = [torch.randn(3, length, heads, dim, generator=g).mul_(scale) for heads in (6, 2, 2)]
    return [x.transpose(1, 2).requires_grad_() for x in draw]


def results(
    dim: int, length: int, fields: dict, padded: bool, scale=1.0, dtype=torch.float32, causal=True
) -> list[torch.Tensor]:
    """Output and all gradients of a layer of grouped queries, whose heads are side by side in memory."""
    module = layer(dim, fields, causal).to(dtype)
    args = [x.detach().to(dtype).requires_grad_() for x in inputs(dim, length, scale)]
    padding = torch.arange(length) >= torch.tensor([0, 40, length - 1])[:, None] if padded else None
    output = module(*args, padding=padding, scaling=dim**-0.5, causal=causal)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    return [output.detach(), *torch.autograd.grad((output * weight).sum(), [*args, *module.parameters()])]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("dim", "length", "fields", "causal"), [(*x, True) for x in LAYERS] + [(*x, False) for x in ENCODERS]
)
def test_the_kernel_is_the_joint_softmax(calls, dim, length, fields, causal, padded) -> None:
    ours = results(dim, length, fields, padded, causal=causal)
    assert set(calls) == {"ranges_forward", "ranges_backward"}
    calls.clear()
    with kernels.off():
        theirs = results(dim, length, fields, padded, causal=causal)
    assert not calls
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, atol=5e-5, rtol=1e-4)
        assert want.abs().max() > 0.1


def test_large_logits_do_not_overflow() -> None:
    """Logits of some hundreds: as near to double precision as PyTorch's operators are."""
    dim, length, fields = LAYERS[0]
    ours, exact = (results(dim, length, fields, False, 12.0, dtype) for dtype in (torch.float32, torch.float64))
    with kernels.off():
        theirs = results(dim, length, fields, False, 12.0)
    for got, other, want in zip(ours, theirs, exact, strict=True):
        assert (got - want).abs().max() <= 2 * (other - want).abs().max() < 1e-3 * want.abs().max()


@pytest.mark.parametrize("number", [0, 4, 5, 10])
@pytest.mark.parametrize("splits", [(333,), (70, 263), (200, 1, 132), (128, 205)])
def test_a_later_call_of_many_tokens(calls, splits, number) -> None:
    (dim, _, fields), length = LAYERS[number], 333
    module, args = layer(dim, fields), inputs(dim, length)
    with torch.no_grad():
        with kernels.off():
            full = module(*args, scaling=dim**-0.5, causal=True)
        parts = decode(module, args, splits, scaling=dim**-0.5)
    assert calls.count("ranges_forward") >= 18 * len([n for n in splits if n > 128])  # one for each row and query head
    torch.testing.assert_close(parts, full, atol=1e-5, rtol=1e-4)


def test_tiles_see_what_they_say() -> None:
    """
    By hand: near keys 3 to 6, up to the query's own, and the first two of a far list, one of them hidden; and key 0 and the
    last two near keys up to the query's own.
    """
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 1, n, 16, generator=g) for n in (3, 9, 9))
    far = [torch.randn(1, 1, 4, 16, generator=g) for _ in range(2)]
    bias = torch.tensor([[[0.5, float("-inf"), 9.0, 9.0]]])
    got = range_attention(query, (key, value), far, bias, [Tile(0, 3, 3, 7, 4, 2, 4)], scaling=0.3)
    windowed = range_attention(
        query, (key, value), far, bias, [Tile(0, 3, 0, 9, 4, 2, 4, floor=3, kept=1)], scaling=0.3
    )
    for i in range(3):
        near = slice(3, 5 + i)
        logits = torch.cat([0.3 * key[0, 0, near] @ query[0, 0, i], 0.3 * far[0][0, 0, :1] @ query[0, 0, i] + 0.5])
        want = logits.softmax(0) @ torch.cat([value[0, 0, near], far[1][0, 0, :1]])
        torch.testing.assert_close(got[0, 0, i], want, atol=1e-6, rtol=1e-5)
        seen = [0, *range(3 + i, 5 + i)]
        logits = torch.cat([0.3 * key[0, 0, seen] @ query[0, 0, i], 0.3 * far[0][0, 0, :1] @ query[0, 0, i] + 0.5])
        want = logits.softmax(0) @ torch.cat([value[0, 0, seen], far[1][0, 0, :1]])
        torch.testing.assert_close(windowed[0, 0, i], want, atol=1e-6, rtol=1e-5)
