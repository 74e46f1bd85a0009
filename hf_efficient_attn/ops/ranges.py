"""
Softmax attention in which each tile of queries reads a range of near keys, up to its own positions, and the ends of a far
list, whose logits may have a bias:

    out_i = sum_j exp(scaling q_i k_j + b_j - r_i) v_j,    r_i the log-sum-exp of the logits of query i.

On a CPU and without dropout a kernel does it in one pass, in float32 (kernels/ranges.c); it is an alternative to
`joint_attention`, which can do all this and more.

Letters: B batch, H query heads, G key/value heads, N queries, S near keys, F far keys, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import kernels
from ..caching import Count, column
from .exact import sdpa
from .precision import first_order, without_autocast

if TYPE_CHECKING:
    from .local import Band, Context, Segments

QUERIES = 64  # of a tile, at most


class Tile(NamedTuple):
    """
    Queries first..last-1. Query first + t sees the near keys begin..min(diagonal + t, end - 1), but of those from `kept` on
    only the ones from floor + t on, and the far keys 0..far-1 and after..until-1; at least one in all.
    """

    first: int
    last: int
    begin: int
    end: int
    diagonal: int
    far: int
    after: int
    until: int = 2**40
    floor: int = -(2**40)
    kept: int = 0

    def part(self, first: int) -> Tile:
        """Of these queries the `QUERIES` from `first` on."""
        later, last = first - self.first, min(first + QUERIES, self.last)
        return self._replace(first=first, last=last, diagonal=self.diagonal + later, floor=self.floor + later)


def has_kernel(query: Tensor, dropout: float) -> bool:
    """Whether `range_attention` can be called for these queries."""
    return dropout == 0 and kernels.serving("ranges", query) is not None


@torch.compiler.disable
def range_attention(
    query: Tensor,
    near: tuple[Tensor, Tensor],
    far: tuple[Tensor, Tensor],
    bias: Tensor,
    tiles: list[Tile],
    *,
    lead: int = 0,
    lengths: Tensor | None = None,
    scaling: float,
) -> Tensor:
    """
    query (B, H, N, D) -> (B, H, N, D). near: key and value (B, G, S, D), of which row b has the first lengths[b]; far: key
    and value (B, G, F, D), or without a `lead` (B, H, F, D). The first `lead` near keys stand before the far ones as if they
    were of them; bias broadcasts to (B, H, lead + F), and is -inf where no query sees the key. The tiles cover each query
    once. A query that sees nothing gets zeros.
    """
    bias = bias.expand(*query.shape[:2], -1)
    limits = [near[0].shape[2]] * len(query) if lengths is None else lengths.tolist()
    plan = _Plan(kernels.load("ranges"), pieces(tiles), limits, lead, scaling)
    return _Ranges.apply(plan, query, *near, *far, bias)


def range_decoder(
    query: Tensor,
    context: Context,
    pattern: Segments | Band,
    slots: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    seen: Callable[[Count], tuple[Count, Count]] = lambda exact: (0, 0),
    *,
    scaling: float,
) -> Tensor:
    """
    As `local_decoder` where `local.in_ranges`, with slots of what lies before the exact part as its far part: keys and values
    (B, G or H, S, D), bias None or (B or 1, H, S), -inf where a slot stands for nothing. seen(exact): begin and end of the
    slots that a query sees whose exact part begins at position `exact`, an int or (B, 1). Equal `seen` of several layers are
    taken to say the same.
    """
    if query.shape[2] == 1:
        return _one_token(query, context, pattern, slots, bias, seen, scaling)
    near, sinks = (context.key, context.value), context.sink_key.shape[2]
    if slots is None:
        slots = tuple(x[:, :, :0] for x in near)
    if bias is None:
        bias = query.new_zeros(1, query.shape[1], slots[0].shape[2])
    first, tiles = context.first, []
    begin, end = first + context.new, first + context.new + query.shape[2]
    low = begin
    while low < end:
        high, start = min(pattern.until(low), end), pattern.begin_of(low)
        exact = max(start, 0)
        far = [min(exact, sinks), *(sinks + slot for slot in seen(exact))]
        tile = Tile(low - begin, high - begin, exact - first, high - first, low - first, *far)
        if pattern.slides:
            tile = tile._replace(floor=start - first, kept=sinks - first)
        tiles.append(tile)
        low = high
    lead, share = sinks, slots[0].shape[1] // context.key.shape[1]
    if first or share > 1:  # the sinks are not keys of the context any more, or not of as many heads as the slots
        held = (x.repeat_interleave(share, 1) if share > 1 else x for x in (context.sink_key, context.sink_value))
        slots, lead = tuple(torch.cat(pair, 2) for pair in zip(held, slots, strict=True)), 0
    return range_attention(query, near, slots, pad(bias, (sinks, 0)), tiles, lead=lead, scaling=scaling)


def _one_token(query: Tensor, context: Context, pattern, slots, bias, seen, scaling: float) -> Tensor:
    """All that a single query sees, side by side: no kernel's call for each head, and no mask where rows agree."""
    position, sinks, mask, begun = context.first + context.new, context.sink_key.shape[2], None, 0
    if isinstance(position, int):
        start = max(pattern.begin_of(position), 0)
        begun, sinks, (begin, end) = start - context.first, min(start, sinks), seen(start)
    else:
        begin, end = 0, 0 if slots is None else slots[0].shape[2]
        mask = context.once((pattern, end, seen, query.dtype), lambda: _of_rows(query, context, pattern, end, seen))
    share, sides = 1 if slots is None else slots[0].shape[1] // context.key.shape[1], []
    for i, (near, first) in enumerate(((context.key, context.sink_key), (context.value, context.sink_value))):
        parts = [first[:, :, :sinks], near[:, :, begun:]]
        if share > 1:
            parts = [x.repeat_interleave(share, 1) for x in parts]
        if end > begin:
            parts.insert(1, slots[i][:, :, begin:end])
        sides.append(torch.cat(parts, 2))
    if bias is not None and end > begin:
        own = bias[:, :, None, begin:end].to(query.dtype)
        own = pad(own, (sinks, sides[0].shape[2] - sinks - own.shape[3]))
        mask = own if mask is None else own + mask
    return sdpa(query, *sides, scaling=scaling, mask=mask)


def _of_rows(query: Tensor, context: Context, pattern, size: int, seen) -> Tensor:
    """
    (B, 1, 1, L), 0 where the query of a row sees a key, else -inf, of sinks, slots and the context's keys side by side; the
    query's own is one of these.
    """
    held, *slots = (
        torch.arange(x, device=query.device) for x in (context.key.shape[2], context.sink_key.shape[2], size)
    )
    position, held = column(context.first + context.new), column(context.first) + held
    start = pattern.begin_of(position).clamp_min(0)
    near = held >= start
    if not context.ends:
        near &= held <= position
    visible = [slots[0] < start, near]
    if size:
        begin, end = seen(start)
        visible.insert(1, (slots[1] >= begin) & (slots[1] < end))
    visible = torch.cat(visible, 1)[:, None, None]
    return torch.zeros_like(visible, dtype=query.dtype).masked_fill_(~visible, float("-inf"))


def range_encoder(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tiles: list[Tile],
    slots: tuple[Tensor, Tensor] | None = None,
    *,
    lead: int = 0,
    lengths: Tensor | None,
    scaling: float,
) -> Tensor:
    """
    As `range_attention` with all tokens of a text as near keys, (B, G, N, D), and its first `lead`, then the slots (B, G, S,
    D) as far ones.
    """
    slots = slots or (key[:, :, :0], value[:, :, :0])
    bias = query.new_zeros(1, query.shape[1], lead + slots[0].shape[2])
    return range_attention(query, (key, value), slots, bias, tiles, lead=lead, lengths=lengths, scaling=scaling)


def pieces(tiles: list[Tile]) -> Tensor:
    """(pieces, 10) int64: the tiles as the kernel takes them."""
    return torch.tensor([tile.part(first) for tile in tiles for first in range(tile.first, tile.last, QUERIES)])


class _Plan(NamedTuple):
    library: Any
    tiles: Tensor
    limits: list[int]
    lead: int
    scaling: float

    def read(self, query, key, value, far_key, far_value, bias) -> tuple[Tensor, ...]:
        """What `run` is given."""
        far = far_key, far_value
        if self.lead:
            far = (torch.cat([x[:, :, : self.lead], y], 2) for x, y in zip((key, value), far, strict=True))
        return query, key, value, *(x.contiguous() for x in far), bias.float().contiguous()

    def run(self, function: Any, given: Sequence[Tensor], saved: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """
        The kernel for every query head of every row; those of one key/value head, whose gradients add up, in turn. `saved`, of
        which the last goes with its stride, and `results` are what it is given besides, all (B, heads of some kind, ...).
        """
        groups, share = given[1].shape[1], given[0].shape[1] // given[1].shape[1]

        def group(b: int, g: int) -> None:
            parts = [kernels.readable(kernels.heads_of(x, b, g, groups)) for x in (*given, *saved)]
            with kernels.writable(*(kernels.heads_of(x, b, g, groups) for x in results)) as found:
                for h in range(share):
                    query, key, value, far_key, far_value, bias, *more = (x[h * len(x) // share] for x in parts)
                    near = query, query.stride(0), key, key.stride(0), value, value.stride(0)
                    rest = self.limits[b], self.tiles, len(self.tiles), None, query.shape[1], self.scaling
                    more = (*more, more[-1].stride(0)) if more else ()
                    own = (x[h * len(x) // share] for x in found)
                    kernels.call(function, *near, far_key, far_value, bias, len(bias), *rest, *more, *own)

        kernels.for_each_head(group, len(given[0]), groups)


class _Ranges(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, plan, *tensors):
        query = tensors[0]
        output, total = query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)
        plan.run(plan.library.ranges_forward, plan.read(*tensors), (), (output, total))
        ctx.plan = plan
        ctx.save_for_backward(*tensors, output, total)
        return output

    @staticmethod
    @first_order
    @without_autocast
    def backward(ctx, grad):
        *tensors, output, total = ctx.saved_tensors
        plan, given = ctx.plan, ctx.plan.read(*tensors)
        of_query, *sums = given[0].new_empty(given[0].shape), *(x.new_zeros(x.shape) for x in given[1:5])
        of_bias = given[5].new_zeros(*given[5].shape, kernels.LANES)
        plan.run(plan.library.ranges_backward, given, (output, total, grad), (of_query, *sums, of_bias))
        near, far = sums[:2], sums[2:]
        if plan.lead:
            for x, y in zip(near, far, strict=True):
                x[:, :, : plan.lead] += y[:, :, : plan.lead]
        found = of_query, *near, *(y[:, :, plan.lead :] for y in far), of_bias.sum(-1)
        return None, *(x.to(like.dtype) for x, like in zip(found, tensors, strict=True))
