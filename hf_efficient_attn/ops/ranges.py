"""
Softmax attention in which each tile of queries reads a range of near keys, up to its own positions, and the first keys of
a far list, whose logits may have a bias:

    out_i = sum_j exp(scaling q_i k_j + b_j - r_i) v_j,    r_i the log-sum-exp of the logits of query i.

On a CPU, in float32 and without dropout, a kernel does it in one pass (kernels/ranges.c); it is an alternative to
`joint_attention`, which can do all this and more.

Letters: B batch, H query heads, G key/value heads, N queries, S near keys, F far keys, D head size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import kernels
from .precision import without_autocast

QUERIES = 64  # of a tile, at most
LANES = 16


class Tile(NamedTuple):
    """
    Queries first..last-1. Query first + t sees the near keys begin..min(diagonal + t, end - 1) and the far keys 0..far-1,
    at least one in all.
    """

    first: int
    last: int
    begin: int
    end: int
    far: int
    diagonal: int


def has_kernel(query: Tensor, dropout: float) -> bool:
    """Whether `range_attention` can be called for these queries."""
    fits = query.shape[-1] % LANES == 0 and query.shape[-1] <= 256 and query.numel() > 0
    plain = query.device.type == "cpu" and query.dtype is torch.float32 and dropout == 0
    return fits and plain and kernels.load("ranges") is not None


@torch.compiler.disable
def range_attention(
    query: Tensor,
    near: tuple[Tensor, Tensor],
    far: tuple[Tensor, Tensor],
    bias: Tensor,
    tiles: list[Tile],
    *,
    lead: int = 0,
    scaling: float,
) -> Tensor:
    """
    query (B, H, N, D) -> (B, H, N, D). near: key and value (B, G, S, D); far: key and value (B, G, F, D). The first `lead`
    near keys stand before the far ones as if they were of them; bias broadcasts to (B, H, lead + F), and is -inf where no
    query sees the key. The tiles cover each query once.
    """
    bias = bias.to(query.dtype).expand(*query.shape[:2], -1)
    return _Ranges.apply(kernels.load("ranges"), scaling, lead, torch.tensor(tiles), query, *near, *far, bias)


class _Ranges(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, library, scaling, lead, tiles, query, key, value, far_key, far_value, bias):
        query, key, value = _rows(query), _rows(key), _rows(value)
        far = [torch.cat([x[:, :, :lead], y], 2) for x, y in ((key, far_key), (value, far_value))]
        given = query, key, value, *far, bias.contiguous()
        output, total = query.new_empty(query.shape), query.new_empty(query.shape[:3])

        def job(b: int, g: int, h: int) -> None:
            kernels.call(
                library.ranges_forward, *_arguments(b, g, h, given), tiles, len(tiles), query.shape[3], scaling,
                output[b, h], total[b, h],
            )  # fmt: skip

        _for_each_head(job, query, key)
        ctx.library, ctx.scaling, ctx.lead = library, scaling, lead
        ctx.save_for_backward(*given, tiles, output, total)
        return output

    @staticmethod
    @without_autocast
    def backward(ctx, grad):
        *given, tiles, output, total = ctx.saved_tensors
        query, key, lead = given[0], given[1], ctx.lead
        grad, of_query = _rows(grad), query.new_empty(query.shape)
        sums = [x.new_zeros(x.shape) for x in given[1:5]]
        of_bias = query.new_zeros(*given[5].shape, LANES)

        def job(b: int, g: int, h: int) -> None:
            kernels.call(
                ctx.library.ranges_backward, *_arguments(b, g, h, given), tiles, len(tiles), query.shape[3], ctx.scaling,
                output[b, h], total[b, h], grad[b, h], grad.stride(2), of_query[b, h], *(x[b, g] for x in sums),
                of_bias[b, h],
            )  # fmt: skip

        _for_each_head(job, query, key)
        for near, far in zip(sums[:2], sums[2:], strict=True):
            near[:, :, :lead] += far[:, :, :lead]
        return None, None, None, None, of_query, *sums[:2], *(x[:, :, lead:] for x in sums[2:]), of_bias.sum(-1)


def _rows(x: Tensor) -> Tensor:
    """x with its last axis contiguous."""
    return x if x.stride(3) == 1 else x.contiguous()


def _arguments(b: int, g: int, h: int, given: tuple[Tensor, ...]) -> tuple:
    query, key, value, far_key, far_value, bias = given
    near = query[b, h], query.stride(2), key[b, g], key.stride(2), value[b, g], value.stride(2)
    return *near, far_key[b, g], far_value[b, g], bias[b, h]


def _for_each_head(job, query: Tensor, key: Tensor) -> None:
    """job(row, key/value head, query head) for all; the query heads of one key/value head, which add up, in turn."""
    batch, groups = key.shape[:2]
    share = query.shape[1] // groups

    def group(i: int) -> None:
        b, g = divmod(i, groups)
        for h in range(g * share, (g + 1) * share):
            job(b, g, h)

    kernels.in_parallel(group, range(batch * groups))
