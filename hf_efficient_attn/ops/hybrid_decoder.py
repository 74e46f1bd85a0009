"""
A decoder's window read exactly, joined with learned softmax features of what lies before it, by a compiled kernel
(kernels/hybrid.c): what `chunked_scan.read_past` and `hybrid.window_and_sums` compute of these features, in one pass, with
features and logits made where they are needed. Sums are kept once for `SPAN` tokens, and made again in between in the backward
pass: memory linear in N.

Letters: B batch, H query heads, G key/value heads, N queries, S slots of the context, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..caching import AttentionState, Count
from .chunked_scan import Sums
from .local import Context
from .precision import first_order, without_autocast

SPAN = 256  # tokens, as in the kernel


def has_kernel(query: Tensor, state: AttentionState | None) -> bool:
    """
    Whether `hybrid_decoder` can be called. Sums that go from call to call get no gradient from it, and a single query is not
    worth a call for every head.
    """
    alone = state is None or not torch.is_grad_enabled()
    return alone and query.shape[2] > 1 and kernels.serving("hybrid", query) is not None


@torch.compiler.disable
def hybrid_decoder(
    query: Tensor,
    context: Context,
    window: int,
    maps: tuple[Tensor, Tensor],
    gate: Tensor,
    *,
    lengths: Tensor | None,
    before: Sums | None,
    scaling: float,
) -> tuple[Tensor, Sums]:
    """
    query (B, H, N, D) -> (B, H, N, D), zeros at padding, and the sums of features after the last real token.

    A query reads the `window` last keys up to its own exactly, and the context's sinks; maps: W of queries (H, D, D) and of
    keys (G, D, D), with sqrt(scaling) in them; gate: (H,). lengths: (B,) real tokens per row, the others behind them, or
    None. Gradients reach query, the context's tensors, maps and gate.
    """
    real = [query.shape[2]] * len(query) if lengths is None else lengths.tolist()
    places = zip(*(_by_row(x, len(query)) for x in (context.new, context.first + context.new)), strict=True)
    sizes = window, context.sink_key.shape[2], float(scaling)
    plan = _Plan(kernels.load("hybrid"), real, list(places), sizes, before)
    near = context.key, context.value, context.sink_key, context.sink_value
    output, total, normaliser = _HybridDecoder.apply(
        plan, query, *near, *(x.float().contiguous() for x in (*maps, gate))
    )
    return output, Sums(torch.cat([total, normaliser[..., None]], -1), torch.zeros_like(normaliser))


@dataclass(frozen=True)
class _Plan:
    library: Any
    real: list[int]  # queries of each row
    places: list[tuple[int, int]]  # of each row's first query: slot and position
    sizes: tuple[int, int, float]  # the window, the number of sinks, the scaling
    before: Sums | None

    def run(
        self, function: Any, given: Sequence[Tensor], sums: Sequence[Tensor | None], saved: Sequence[Tensor], results
    ) -> None:
        """The kernel for each key/value head of each row, with sums (B, G, ...), what was `saved` and the `results`."""
        *tensors, query_map, key_map, gate = given
        (batch, heads, n, dim), groups = tensors[0].shape, tensors[1].shape[1]

        def job(b: int, g: int) -> None:
            query, key, value, sink_key, sink_value, *more = (
                kernels.readable(kernels.heads_of(x, b, g, groups)) for x in (*tensors, *saved)
            )
            near = key, key.stride(1), value, value.stride(1), sink_key.contiguous(), sink_value.contiguous()
            maps = (kernels.heads_of(x[None], 0, g, groups) for x in (query_map, key_map, gate))
            sizes = heads // groups, n, self.real[b], dim, *self.places[b], *self.sizes
            own = (None if x is None else x[b, g] for x in sums)
            more = (*more, *more[-1].stride()[:2]) if more else ()
            with kernels.writable(*(kernels.heads_of(x, b, g, groups) for x in results)) as found:
                kernels.call(
                    function, query, query.stride(0), query.stride(1), *near, *maps, *sizes, *own, *more, *found
                )

        kernels.for_each_head(job, batch, groups)


class _HybridDecoder(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, plan, *given):
        query, groups, wide = given[0], given[1].shape[1], {"dtype": torch.float32}
        batch, heads, n, dim = query.shape
        if plan.before is None:
            total, z = (query.new_zeros(batch, groups, 2 * dim, *x, **wide) for x in ((dim,), ()))
        else:
            total, z = plan.before.total[..., :-1].contiguous(), plan.before.total[..., -1].contiguous()
        output, normaliser = query.new_empty(query.shape), query.new_ones(batch, heads, n, **wide)
        kept = None
        if any(ctx.needs_input_grad):
            kept = query.new_empty(batch, groups, -(-n // SPAN), 2 * dim * (dim + 1), **wide)
        plan.run(plan.library.hybrid_forward, given, (total, z, kept), (), (output, normaliser))
        ctx.plan = plan
        if kept is not None:
            ctx.save_for_backward(*given, kept, output, normaliser)
        ctx.mark_non_differentiable(total, z)
        ctx.set_materialize_grads(False)
        return output, total, z

    @staticmethod
    @first_order
    @without_autocast
    def backward(ctx, grad, *_):
        *given, kept, output, normaliser = ctx.saved_tensors
        query, *near, query_map, key_map, gate = given
        batch = len(query)
        maps = (x.new_zeros(batch, *x.shape) for x in (query_map, key_map, gate))
        found = [query.new_empty(query.shape), *(x.new_zeros(x.shape) for x in near), *maps]
        ctx.plan.run(ctx.plan.library.hybrid_backward, given, (kept,), (output, normaliser, grad), found)
        return None, *found[:5], *(x.sum(0) for x in found[5:])


def _by_row(count: Count, rows: int) -> list[int]:
    return [count] * rows if isinstance(count, int) else count.tolist()
