"""
A decoder's attention by exponential features of linear maps, phi(q) = exp(W q) and phi(k) = exp(W k - half |k|^2), by a
compiled kernel (kernels/exponentials.c): what `chunked_scan.linear_attention` computes of these features, in one pass, with
features made where they are needed. Sums are kept once for `SPAN` tokens, and made again in between in the backward pass:
memory linear in N.

Letters: B batch, H query heads, G key/value heads, N tokens, D head size, m features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..caching import AttentionState
from .chunked_scan import NEVER, Sums
from .precision import first_order, without_autocast

SPAN = 256  # tokens, as in the kernel
MOST_FEATURES = 512


def has_kernel(query: Tensor, maps: Tensor, state: AttentionState | None) -> bool:
    """Whether `exponential_attention` can be called; sums that go from call to call get no gradient from it."""
    alone = state is None or not torch.is_grad_enabled()
    return alone and maps.shape[1] <= MOST_FEATURES and kernels.serving("exponentials", query) is not None


@torch.compiler.disable
def exponential_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    maps: Tensor,
    half: float,
    *,
    lengths: Tensor | None,
    before: Sums | None = None,
) -> tuple[Tensor, Sums]:
    """
    query (B, H, N, D), key and value (B, G, N, D), maps W (G, m, D) -> (B, H, N, D), zeros at padding, and the sums after the
    last real token. lengths: (B,) real tokens per row, the others behind them, or None. Gradients reach query, key and value.
    """
    real = [query.shape[2]] * len(query) if lengths is None else lengths.tolist()
    plan = _Plan(kernels.load("exponentials"), maps.float().contiguous(), float(half), real, before)
    output, total, normaliser, top = _Exponentials.apply(plan, query, key, value)
    return output, Sums(torch.cat([total, normaliser[..., None]], -1), top)


@dataclass(frozen=True)
class _Plan:
    library: Any
    maps: Tensor
    half: float
    real: list[int]
    before: Sums | None

    def run(self, job: Callable[[int, int, slice], None], batch: int, groups: int, heads: int) -> None:
        """job(b, g, its query heads) for each key/value head of each row."""
        share = heads // groups
        kernels.for_each_head(lambda b, g: job(b, g, slice(g * share, (g + 1) * share)), batch, groups)


class _Exponentials(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, plan, *tensors):
        query, key, value = map(kernels.readable, tensors)
        (batch, heads, n, dim), (groups, m) = query.shape, plan.maps.shape[:2]
        if plan.before is None:
            total, z = query.new_zeros(batch, groups, m, dim), query.new_zeros(batch, groups, m)
            top = torch.full_like(z, NEVER)
        else:
            given = plan.before.total
            total, z, top = given[..., :-1].contiguous(), given[..., -1].contiguous(), plan.before.top.clone()
        reference = top.masked_fill(top == NEVER, 0)
        output, normaliser = query.new_empty(query.shape), query.new_ones(batch, heads, n)
        kept = None
        if any(ctx.needs_input_grad):
            kept = query.new_empty(batch, groups, -(-n // SPAN), m * (dim + 3))

        def job(b: int, g: int, own: slice) -> None:
            given = query[b, own], query.stride(1), query.stride(2), key[b, g], key.stride(2), value[b, g]
            sizes = value.stride(2), plan.maps[g], heads // groups, n, plan.real[b], m, dim, plan.half
            sums = total[b, g], z[b, g], reference[b, g], top[b, g], None if kept is None else kept[b, g]
            kernels.call(plan.library.exponentials_forward, *given, *sizes, *sums, output[b, own], normaliser[b, own])

        plan.run(job, batch, groups, heads)
        output, ctx.plan = output.to(tensors[0].dtype), plan
        if kept is not None:
            ctx.save_for_backward(*tensors, kept, output, normaliser)
        scale = torch.exp(reference - top.masked_fill(top == NEVER, 0))  # relative to the running maximum, as they came
        total.mul_(scale[..., None])
        z.mul_(scale)
        ctx.mark_non_differentiable(total, z, top)
        ctx.set_materialize_grads(False)
        return output, total, z, top

    @staticmethod
    @first_order
    @without_autocast
    def backward(ctx, grad, *_):
        *tensors, kept, output, normaliser = ctx.saved_tensors
        query, key, value, output, grad = map(kernels.readable, (*tensors, output, grad))
        (batch, heads, n, dim), groups, plan = query.shape, key.shape[1], ctx.plan
        of_query, of_key, of_value = (x.new_empty(x.shape) for x in (query, key, value))

        def job(b: int, g: int, own: slice) -> None:
            given = query[b, own], query.stride(1), query.stride(2), key[b, g], key.stride(2), value[b, g]
            sizes = value.stride(2), plan.maps[g], heads // groups, n, plan.real[b], plan.maps.shape[1], dim, plan.half
            saved = kept[b, g], output[b, own], normaliser[b, own], grad[b, own], grad.stride(1), grad.stride(2)
            results = of_query[b, own], of_key[b, g], of_value[b, g]
            kernels.call(plan.library.exponentials_backward, *given, *sizes, *saved, *results)

        plan.run(job, batch, groups, heads)
        found = of_query, of_key, of_value
        return None, *(x.to(like.dtype) for x, like in zip(found, tensors, strict=True))
