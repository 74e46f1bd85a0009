"""
Softmax attention whose queries read ranges of keys in several orders of the same tokens, such as neighbours where they stand
and far keys by residue classes: what the kernel of `ranges` reads in each order, joined by its log-sum-exp. Tokens are
brought into an order head by head, so that no copy of all is made.

Letters: B batch, H query heads, G key/value heads, N queries, S keys, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import kernels
from .precision import first_order, without_autocast
from .ranges import Tile, pieces

NOTHING = 1e30  # the kernel's log-sum-exp of a query that sees no key


class Reading(NamedTuple):
    """
    An order of a row's tokens, and what is read in it. queries (N,), keys (at most S,): int64, the token at each place, or None
    where queries stand as they are given, or keys. tilings: lists of tiles, of which each shows a query at most one tile; the
    first `lead` keys serve them as far ones.
    """

    queries: Tensor | None
    keys: Tensor | None
    tilings: list[list[Tile]]
    lead: int = 0


@torch.compiler.disable
def joined_ranges(
    query: Tensor, key: Tensor, value: Tensor, rows: Sequence[list[Reading]], *, scaling: float
) -> Tensor:
    """
    query (B, H, N, D); key, value (B, G, S, D) -> (B, H, N, D). rows: the readings of each row, to be called where
    `ranges.has_kernel`. A query that sees nothing gets zeros; a key that it reads twice counts twice.
    """
    orders = [[x._replace(tilings=[pieces(tiles) for tiles in x.tilings if tiles]) for x in row] for row in rows]
    plan = _Plan(kernels.load("ranges"), orders, float(scaling))
    return _JoinedRanges.apply(plan, query, key, value)


class _Plan(NamedTuple):
    library: Any
    rows: list[list[Reading]]  # with tilings as the kernel takes them, (tiles, 10) int64 each
    scaling: float

    def run(self, function: Any, order: Reading, tiles: Tensor, query: Tensor, near: list[Tensor], *rest: Any) -> None:
        """For one head: query (N, D), keys and values (S, D), and what the function is given besides."""
        key, value = near
        far = [x[: order.lead].contiguous() for x in near]
        placed = query, query.stride(0), key, key.stride(0), value, value.stride(0), *far, None, order.lead, len(key)
        kernels.call(function, *placed, tiles, len(tiles), None, query.shape[1], self.scaling, *rest)


class _JoinedRanges(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, plan, query, key, value):
        groups, share = key.shape[1], query.shape[1] // key.shape[1]
        output, total = query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)

        def group(b: int, g: int) -> None:
            near, queries = [kernels.readable(x[b, g]) for x in (key, value)], kernels.heads_of(query, b, g, groups)
            with kernels.writable(*(kernels.heads_of(x, b, g, groups) for x in (output, total))) as (outputs, totals):
                outputs.zero_(), totals.fill_(float("-inf"))
                for order in plan.rows[b]:
                    ordered = _arranged(order.keys, *near)
                    for h in range(share):
                        (own,) = _arranged(order.queries, kernels.readable(queries[h]))
                        for tiles in order.tilings:
                            found = own.new_zeros(own.shape), own.new_full(own.shape[:1], NOTHING)
                            plan.run(plan.library.ranges_forward, order, tiles, own, ordered, *found)
                            _join(outputs[h], totals[h], order.queries, *found)
                totals.masked_fill_(totals == float("-inf"), NOTHING)

        kernels.for_each_head(group, len(query), groups)
        ctx.plan = plan
        ctx.save_for_backward(query, key, value, output, total)
        return output

    @staticmethod
    @first_order
    @without_autocast
    def backward(ctx, grad):
        plan, (query, key, value, output, total) = ctx.plan, ctx.saved_tensors
        groups, share = key.shape[1], query.shape[1] // key.shape[1]
        results = query.new_zeros(query.shape), key.new_zeros(key.shape), value.new_zeros(value.shape)

        def group(b: int, g: int) -> None:
            near = [kernels.readable(x[b, g]) for x in (key, value)]
            given = [kernels.heads_of(x, b, g, groups) for x in (query, output, total, grad)]
            with kernels.writable(*(kernels.heads_of(x, b, g, groups) for x in results)) as (of_query, *of_near):
                for order in plan.rows[b]:
                    ordered = _arranged(order.keys, *near)
                    sums = [x.new_zeros(x.shape) for x in ordered]
                    far = [x.new_zeros(order.lead, x.shape[1]) for x in ordered]
                    for h in range(share):
                        own, *saved = _arranged(order.queries, *(kernels.readable(x[h]) for x in given))
                        for tiles in order.tilings:
                            found = own.new_zeros(own.shape)
                            more = *saved, saved[2].stride(0), found, *sums, *far, None
                            plan.run(plan.library.ranges_backward, order, tiles, own, ordered, *more)
                            _add(of_query[h], order.queries, found)
                    for total_of, part, first in zip(of_near, sums, far, strict=True):
                        part[: order.lead] += first
                        _add(total_of[0], order.keys, part)

        kernels.for_each_head(group, len(query), groups)
        return None, *results


def _arranged(places: Tensor | None, *given: Tensor) -> list[Tensor]:
    """Of each tensor the rows `places`, or all as they stand."""
    return [x if places is None else x[places] for x in given]


def _add(total: Tensor, places: Tensor | None, part: Tensor) -> None:
    """total (N, D) += part, of which row i belongs at places[i]."""
    if places is None:
        total += part
    else:
        total.index_add_(0, places, part)


def _join(output: Tensor, total: Tensor, places: Tensor | None, part: Tensor, lse: Tensor) -> None:
    """Joins a part's output (N, D) and log-sum-exp (N,), of which row i belongs at places[i], to what there is."""
    lse.masked_fill_(lse == NOTHING, float("-inf"))
    if places is not None:
        back = torch.empty_like(places)
        back[places] = torch.arange(len(places))
        part, lse = part[back], lse[back]
    joined = torch.logaddexp(total, lse)
    reference = joined.masked_fill(joined == float("-inf"), 0)
    output.mul_(torch.exp(total - reference)[:, None]).addcmul_(part, torch.exp(lse - reference)[:, None])
    total.copy_(joined)
