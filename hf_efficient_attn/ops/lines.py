"""
Exact attention of lines of queries, each of one head, which stand at positions of their own: what was not chosen is in no line
and costs nothing. On a CPU and without dropout by the kernel of ranges (kernels/ranges.c).

Letters: B batch, H query heads, G key/value heads, S keys, L queries of all lines, D head size.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import kernels
from .exact import exact_attention, masked_attention
from .joint import CHUNK, Part, joint_attention
from .precision import first_order, without_autocast
from .ranges import QUERIES, Tile, has_kernel


@torch.compiler.disable
def line_attention(
    queries: Tensor,
    key: Tensor,
    value: Tensor,
    counts: list[int],
    at: Tensor | None,
    ends: list[int],
    *,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """
    queries (L, D) -> (L, D): B H lines one behind the other, of counts[b H + h] queries each; key, value (B, G, S, D), of which
    row b has the first ends[b]. at: (L,), the slot of the key that a query is the last to see, ascending in a line; None: all.
    """
    if max(counts) > 1 and has_kernel(queries, dropout):  # single queries are not worth a call each
        plan = _Plan(kernels.load("ranges"), counts, [0, *accumulate(counts)], at, ends, scaling)
        return _Lines.apply(plan, queries, key, value)
    share, outputs = len(counts) // (key.shape[0] * key.shape[1]), []
    heads = [x.flatten(0, 1).unbind(0) for x in (key, value)]
    places, edges = [None] * len(counts), [None] * len(counts)
    if at is not None:
        places, edges = at.split(counts), _edges(at, counts)
    for line, (q, place) in enumerate(zip(queries.split(counts), places, strict=True)):
        if len(q):
            end = ends[line * len(ends) // len(counts)]
            given = q[None, None], *(x[line // share][None, None, :end] for x in heads)
            outputs.append(_one_line(*given, place, edges[line], scaling, dropout))
    return torch.cat(outputs, 2)[0, 0]


def _edges(at: Tensor, counts: list[int]) -> list[list[int]]:
    """Of each line the positions of the first and the last query of every chunk; read from the device once for all lines."""
    ends = list(accumulate(counts))
    sides = [
        [place for i in range(end - count, end, CHUNK) for place in (i, min(i + CHUNK, end) - 1)]
        for count, end in zip(counts, ends, strict=True)
    ]
    found = iter(at[[place for line in sides for place in line]].tolist())
    return [[next(found) for _ in line] for line in sides]


class _Plan(NamedTuple):
    library: Any
    counts: list[int]
    begins: list[int]
    at: Tensor | None
    ends: list[int]
    scaling: float

    def run(self, function: Any, queries: tuple, results: tuple, near: tuple, sums: tuple) -> None:
        """The kernel for every line, those of a key/value head in turn: tensors of queries, keys and values, what it writes."""
        batch, groups = near[0].shape[:2]
        share = len(self.counts) // (batch * groups)

        def group(b: int, g: int) -> None:
            key, value = (kernels.readable(x[b, g]) for x in near)
            with kernels.writable(*(x[b, g] for x in sums)) as found:
                for line in range((b * groups + g) * share, (b * groups + g + 1) * share):
                    here = slice(self.begins[line], self.begins[line + 1])
                    with kernels.writable(*(x[here] for x in results)) as own:
                        self._line(
                            function, b, here, [kernels.readable(x[here]) for x in queries], (key, value), own, found
                        )

        kernels.for_each_head(group, batch, groups)

    def _line(self, function, b: int, here: slice, given: list, near: tuple, own: list, found: list) -> None:
        query, *saved = given
        tiles, at, none = self._tiles(b, here), None if self.at is None else self.at[here], (None, None, None)
        placed = query, query.stride(0), near[0], near[0].stride(0), near[1], near[1].stride(0), *none, 0
        saved = (*saved, saved[-1].stride(0)) if saved else ()
        unused = none if saved else ()
        sizes = self.ends[b], tiles, len(tiles), at, query.shape[1], self.scaling
        kernels.call(function, *placed, *sizes, *saved, *own, *found, *unused)

    def _tiles(self, b: int, here: slice) -> Tensor:
        tiles, size = [], here.stop - here.start
        for first in range(0, size, QUERIES):
            last = min(first + QUERIES, size)
            end = self.ends[b] if self.at is None else int(self.at[here.start + last - 1]) + 1
            tiles.append(Tile(first, last, 0, end, self.ends[b], 0, 0))
        return torch.tensor(tiles, dtype=torch.int64).view(-1, len(Tile._fields))


class _Lines(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, plan, queries, key, value):
        output, total = queries.new_empty(queries.shape), queries.new_empty(len(queries), dtype=torch.float32)
        plan.run(plan.library.ranges_forward, (queries,), (output, total), (key, value), ())
        ctx.plan = plan
        ctx.save_for_backward(queries, key, value, output, total)
        return output

    @staticmethod
    @first_order
    @without_autocast
    def backward(ctx, grad):
        queries, key, value, output, total = ctx.saved_tensors
        of_query, *sums = queries.new_empty(queries.shape), *(x.new_zeros(x.shape) for x in (key, value))
        ctx.plan.run(
            ctx.plan.library.ranges_backward, (queries, output, total, grad), (of_query,), (key, value), tuple(sums)
        )
        return None, of_query, *sums


def _one_line(query: Tensor, key: Tensor, value: Tensor, at, edges, scaling: float, dropout: float) -> Tensor:
    """
    query (1, 1, T, D) at the ascending positions `at` (T,), of which `edges` are those of chunks, or seeing all where both are
    None; key, value (1, 1, S, D) -> (1, 1, T, D).
    """
    if at is None:
        return exact_attention(query, key, value, lengths=None, scaling=scaling, dropout=dropout, causal=False)
    chunks = [(begin, min(begin + CHUNK, query.shape[2])) for begin in range(0, query.shape[2], CHUNK)]
    if edges[-1] - edges[0] + 1 == query.shape[2]:  # nothing was left out between
        return exact_attention(
            query, key, value, lengths=edges[-1] + 1, scaling=scaling, dropout=dropout, causal=True, offset=edges[0]
        )
    slots = torch.arange(key.shape[2], device=key.device)
    if dropout:

        def visible(begin: int, end: int) -> Tensor:
            return (slots <= at[begin:end, None])[None, None]

        return masked_attention(query, key, value, visible, scaling=scaling, dropout=dropout)
    parts = []
    for (begin, end), first, last in zip(chunks, edges[0::2], edges[1::2], strict=True):
        parts.append(Part.of_slots(key, value, 0, first + 1, (begin, end)))  # seen by all of the chunk
        if last > first:
            seen = slots[first + 1 : last + 1] <= at[begin:end, None]
            parts.append(Part.of_slots(key, value, first + 1, last + 1, (begin, end), seen[None, None]))
    return joint_attention(query, parts, scaling=scaling)
