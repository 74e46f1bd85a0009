"""
Softmax attention in which each query reads an interval of the keys in one or several orders, each key once: the kernel of
`sorted_band` (kernels/intervals.c), for a CPU and without dropout, in float32. Queries and keys stay where they are.

Letters: B batch, H query heads, G key/value heads, N queries, S keys, D head size; an order of E entries of each of U heads,
G or H.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import kernels
from .precision import first_order, without_autocast


def has_kernel(query: Tensor, dropout: float) -> bool:
    """Whether `sorted_intervals` can be called for these queries."""
    return dropout == 0 and kernels.serving("intervals", query) is not None


@torch.compiler.disable
def sorted_intervals(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    orders: list[tuple[Tensor, Tensor, Tensor]],
    own: Tensor | None,
    apart: Tensor | None,
    lead: Tensor | None,
    *,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """
    query (B, H, N, D), key and value (B, G, S, D) -> (B, H, N, D), and the log-sum-exp (B, H, N) of each query's logits, of
    float32; zeros and -inf for a query that reads nothing. orders: of each the keys (B, U, E) and of the queries (B, H, N) the
    first rank that they read, and one past the last; own, apart and lead as for `interval_attention_and_lse`.
    """
    orders = [[x.to(torch.int32).contiguous() for x in one] for one in orders]
    lead = lead if lead is None else lead[:, None].expand(query.shape[:3])
    beside = [x if x is None else x.to(torch.int32).contiguous() for x in (own, apart, lead)]
    plan = _Plan(kernels.load("intervals"), orders, beside, float(scaling))
    return _Intervals.apply(plan, query, key, value)


class _Plan(NamedTuple):
    library: Any
    orders: list[list[Tensor]]
    beside: list[Tensor | None]
    scaling: float

    def run(self, function: Any, given: list[Tensor], saved: list[Tensor | None], results: list[Tensor]) -> None:
        """
        The kernel for the heads of each order of every row, those of one key/value head in turn, with what was `saved` and
        with the `results`, (B, heads of some kind, ...).
        """
        (batch, heads, length, dim), (groups, size) = given[0].shape, given[1].shape[1:3]
        entries = [order.shape[2] for order, _, _ in self.orders]
        units = max(order.shape[1] for order, _, _ in self.orders)
        begins, share, rows = torch.tensor([0, *entries]).cumsum(0), units // groups, heads // units * length
        aparts = 0 if self.beside[1] is None else self.beside[1].shape[3]

        def group(b: int, g: int) -> None:
            tensors = [None if x is None else kernels.heads_of(x, b, g, groups) for x in (*given, *saved)]
            tensors = [None if x is None else x.float().contiguous() for x in tensors]
            work = torch.empty(2 * rows + max(entries) + 2 + len(entries) * size, dtype=torch.int32)
            with kernels.writable(*(kernels.heads_of(x, b, g, groups) for x in results)) as found:
                for u in range(share):
                    unit = g * share + u
                    order = torch.cat([x[b, unit * x.shape[1] // units] for x, _, _ in self.orders])
                    low, high = (
                        torch.cat([kernels.heads_of(one[i], b, unit, units).flatten() for one in self.orders])
                        for i in (1, 2)
                    )
                    single, apart, lead = (
                        None if x is None else kernels.heads_of(x, b, unit, units) for x in self.beside
                    )
                    own, more = ([None if x is None else x[u * len(x) // share] for x in y] for y in (tensors, found))
                    reads = order, begins, len(entries), low, high, single, apart, aparts, lead
                    kernels.call(function, *own[:3], *reads, rows, size, dim, self.scaling, work, *own[3:], *more)

        kernels.for_each_head(group, batch, groups)


class _Intervals(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, plan, query, key, value):
        output, total = query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)
        plan.run(plan.library.intervals_forward, [query, key, value], [], [output, total])
        ctx.plan = plan
        ctx.save_for_backward(query, key, value, output, total)
        ctx.set_materialize_grads(False)
        return output, total

    @staticmethod
    @first_order
    @without_autocast
    def backward(ctx, grad, grad_of_total):
        *given, output, total = ctx.saved_tensors
        if grad is None:
            grad = torch.zeros_like(output)
        found = [x.new_zeros(x.shape) for x in given]
        ctx.plan.run(ctx.plan.library.intervals_backward, given, [output, total, grad, grad_of_total], found)
        return None, *found
