"""
A window read exactly, joined with learned softmax features of what lies outside, by a compiled kernel (kernels/hybrid.c): what
`chunked_scan.read_past` and `hybrid.window_and_sums` compute of these features, with features and logits made where they are
needed, in one pass through a decoder's tokens and one each way through an encoder's. Sums are kept once for `SPAN` tokens, and
made again in between in the backward pass: memory linear in N.

Letters: B batch, H query heads, G key/value heads, R = H / G, N queries, S slots of the context, D head size.
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
    Whether `hybrid_decoder` and `hybrid_encoder` can be called. Sums that go from call to call get no gradient from them, and a
    single query is not worth a call for every head.
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
    places = zip(*(_by_row(x, len(query)) for x in (context.new, context.first + context.new)), strict=True)
    sizes = window, 0, context.sink_key.shape[2], float(scaling)
    near = context.key, context.value, context.sink_key, context.sink_value
    plan = _Plan(kernels.load("hybrid"), _real(query, lengths), list(places), sizes, before)
    output, total, normaliser = _Hybrid.apply(plan, query, *near, *(x.float().contiguous() for x in (*maps, gate)))
    return output, Sums(torch.cat([total, normaliser[..., None]], -1), torch.zeros_like(normaliser))


@torch.compiler.disable
def hybrid_encoder(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    maps: tuple[Tensor, Tensor],
    gate: Tensor,
    *,
    lengths: Tensor | None,
    scaling: float,
) -> Tensor:
    """As `hybrid_decoder`, for key and value (B, G, N, D): a query reads its own key and `window` on either side exactly."""
    places, sizes = [(0, 0)] * len(query), (window + 1, window, 0, float(scaling))
    near = key, value, key[:, :, :0], value[:, :, :0]
    plan = _Plan(kernels.load("hybrid"), _real(query, lengths), places, sizes, None)
    return _Hybrid.apply(plan, query, *near, *(x.float().contiguous() for x in (*maps, gate)))[0]


@dataclass(frozen=True)
class _Plan:
    library: Any
    real: list[int]  # queries of each row
    places: list[tuple[int, int]]  # of each row's first query: slot and position
    sizes: tuple[int, int, int, float]  # keys read exactly up to a query's own, and after it; sinks; the scaling
    before: Sums | None

    @property
    def both(self) -> bool:
        """Whether there is something to read behind the windows as well."""
        return self.sizes[1] > 0

    def head(self, given: Sequence[Tensor], b: int, g: int) -> _Head:
        """Key/value head g of row b, as kernels read it."""
        *tensors, query_map, key_map, gate = given
        groups = tensors[1].shape[1]
        query, key, value, *sinks = (kernels.readable(kernels.heads_of(x, b, g, groups)) for x in tensors)
        maps = [kernels.heads_of(x[None], 0, g, groups) for x in (query_map, key_map, gate)]
        sinks = [x.contiguous() for x in sinks]
        return _Head(query, key, value, sinks, maps, self.real[b], self.places[b], self.sizes)


@dataclass(frozen=True)
class _Head:
    """query (R, N, D); key, value (1, S, D); sinks, maps and gate, which is None where far keys alone are read."""

    query: Tensor
    key: Tensor
    value: Tensor
    sinks: list[Tensor]
    maps: list[Tensor | None]
    real: int
    place: tuple[int, int]
    sizes: tuple[int, int, int, float]

    @property
    def arguments(self) -> tuple:
        """Those that the kernel's functions begin with."""
        near = self.key, self.key.stride(1), self.value, self.value.stride(1), *self.sinks
        sizes = *self.query.shape[:2], self.real, self.query.shape[2], *self.place, *self.sizes
        return self.query, *self.query.stride()[:2], *near, *self.maps, *sizes

    def backwards(self) -> _Head:
        """The real tokens from the last to the first, to read what lies before windows that way."""
        tensors = (self.turn(x) for x in (self.query, self.key, self.value))
        return _Head(*tensors, self.sinks, [*self.maps[:2], None], self.real, (0, 0), self.sizes)

    def turn(self, x: Tensor) -> Tensor:
        """(X, N, ...) -> (X, real, ...)"""
        return x[:, : self.real].flip(1)


class _Hybrid(torch.autograd.Function):
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
        kept = None  # of the pass, and of the one that goes backwards
        if any(ctx.needs_input_grad):
            kept = query.new_empty(batch, groups, 1 + plan.both, -(-n // SPAN), 2 * dim * (dim + 1), **wide)

        def job(b: int, g: int) -> None:
            head, behind = plan.head(given, b, g), (None, None)
            sums = [None, None] if kept is None else kept[b, g]
            if plan.both:
                other = head.backwards()
                own = torch.zeros_like(total[b, g]), torch.zeros_like(z[b, g])
                found = [other.query.new_empty(other.query.shape[:ndim]) for ndim in (3, 2)]
                function = plan.library.hybrid_forward
                kernels.call(function, *other.arguments, *own, sums[1], None, None, *found)
                behind = [x.new_empty(len(x), n, *x.shape[2:]) for x in found]
                for x, y in zip(behind, found, strict=True):
                    x[:, : head.real] = other.turn(y)
            with kernels.writable(*(kernels.heads_of(x, b, g, groups) for x in (output, normaliser))) as found:
                own = total[b, g], z[b, g], sums[0]
                kernels.call(plan.library.hybrid_forward, *head.arguments, *own, *behind, *found)

        kernels.for_each_head(job, batch, groups)
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
        plan, (batch, groups) = ctx.plan, kept.shape[:2]
        grad = torch.zeros_like(output) if grad is None else grad
        maps = (x.new_zeros(batch, *x.shape) for x in (query_map, key_map, gate))
        results = [query.new_empty(query.shape), *(x.new_zeros(x.shape) for x in near), *maps]

        def job(b: int, g: int) -> None:
            head, function = plan.head(given, b, g), plan.library.hybrid_backward
            saved = [kernels.readable(kernels.heads_of(x, b, g, groups)) for x in (output, normaliser, grad)]
            with kernels.writable(*(kernels.heads_of(x, b, g, groups) for x in results)) as found:
                kernels.call(function, *head.arguments, kept[b, g, 0], *saved, *saved[2].stride()[:2], *found)
                if plan.both:
                    other, saved = head.backwards(), [head.turn(x) for x in saved]
                    rows = [x.new_zeros(x.shape) for x in (other.query, other.key, other.value)]
                    own = *saved, *saved[2].stride()[:2], *rows, None, None, *found[5:7], None
                    kernels.call(function, *other.arguments, kept[b, g, 1], *own)
                    for x, y in zip(found, rows, strict=False):
                        x[:, : head.real] += other.turn(y)

        kernels.for_each_head(job, batch, groups)
        return None, *results[:5], *(x.sum(0) for x in results[5:])


def _real(query: Tensor, lengths: Tensor | None) -> list[int]:
    return [query.shape[2]] * len(query) if lengths is None else lengths.tolist()


def _by_row(count: Count, rows: int) -> list[int]:
    return [count] * rows if isinstance(count, int) else count.tolist()
