"""
A decoder's attention by exponential features of linear maps, phi(q) = exp(W q) and phi(k) = exp(W k - half |k|^2), by a
compiled kernel (kernels/exponentials.c): what `chunked_scan.linear_attention` computes of these features, in one pass, with
features made where they are needed. Sums are kept once for `SPAN` tokens, and made again in between in the backward pass:
memory linear in N.

Letters: B batch, H query heads, G key/value heads, N tokens, D head size, m features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..caching import AttentionState
from .chunked_scan import Sums
from .features import NEVER
from .precision import first_order, without_autocast

SPAN = 256  # tokens, as in the kernel
MOST_FEATURES = 512


def has_kernel(query: Tensor, maps: Tensor, state: AttentionState | None) -> bool:
    """
    Whether `exponential_attention` can be called. Sums that go from call to call get no gradient from it, and a single query is
    not worth a call for every head.
    """
    alone = state is None or not torch.is_grad_enabled()
    fits = query.shape[2] > 1 and maps.shape[1] <= MOST_FEATURES
    return alone and fits and kernels.serving("exponentials", query) is not None


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

    def run(
        self, function: Any, given: Sequence[Tensor], sums: Sequence[Tensor | None], saved: Sequence[Tensor], results
    ) -> None:
        """The kernel for each key/value head of each row, with sums (B, G, ...), what was `saved` and the `results`."""
        (batch, heads, n, dim), groups, m = given[0].shape, given[1].shape[1], self.maps.shape[1]

        def job(b: int, g: int) -> None:
            query, key, value, *more = (kernels.readable(kernels.heads_of(x, b, g, groups)) for x in (*given, *saved))
            strides = query.stride(0), query.stride(1), key, key.stride(1), value, value.stride(1)
            sizes = self.maps[g], heads // groups, n, self.real[b], m, dim, self.half
            own = (None if x is None else x[b, g] for x in sums)
            more = (*more, *more[-1].stride()[:2]) if more else ()
            with kernels.writable(*(kernels.heads_of(x, b, g, groups) for x in results)) as found:
                kernels.call(function, query, *strides, *sizes, *own, *more, *found)

        kernels.for_each_head(job, batch, groups)


class _Exponentials(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, plan, query, key, value):
        (batch, heads, n, dim), (groups, m), wide = query.shape, plan.maps.shape[:2], {"dtype": torch.float32}
        if plan.before is None:
            total, z = query.new_zeros(batch, groups, m, dim, **wide), query.new_zeros(batch, groups, m, **wide)
            top = torch.full_like(z, NEVER)
        else:
            given = plan.before.total
            total, z, top = given[..., :-1].contiguous(), given[..., -1].contiguous(), plan.before.top.clone()
        reference = top.masked_fill(top == NEVER, 0)
        output, normaliser = query.new_empty(query.shape), query.new_ones(batch, heads, n, **wide)
        kept = None
        if any(ctx.needs_input_grad):
            kept = query.new_empty(batch, groups, -(-n // SPAN), m * (dim + 3), **wide)
        sums, results = (total, z, reference, top, kept), (output, normaliser)
        plan.run(plan.library.exponentials_forward, (query, key, value), sums, (), results)
        ctx.plan = plan
        if kept is not None:
            ctx.save_for_backward(query, key, value, kept, output, normaliser)
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
        *given, kept, output, normaliser = ctx.saved_tensors
        found = [x.new_empty(x.shape) for x in given]
        saved = output, normaliser, torch.zeros_like(output) if grad is None else grad
        ctx.plan.run(ctx.plan.library.exponentials_backward, given, (kept,), saved, found)
        return None, *found
