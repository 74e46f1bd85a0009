"""
A decoder's attention by features that are not logarithmic, by a compiled kernel (kernels/features.c): what `chunked_scan`
computes of them, a span of tokens at a time. Features exist for one span and are made again in the backward pass; sums are kept
once a span: memory linear in N.

Letters: B batch, H query heads, G key/value heads, N tokens, T tokens of a span, D head size, m features.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import kernels
from .features import Features, References, by_span, cuts, feature_maps, finite, halves, rescale
from .precision import first_order, without_autocast

SPAN = 256  # tokens
MOST_FEATURES = 512


def has_kernel(query: Tensor, features: Features) -> bool:
    """Whether `FeatureScan` can be called; a single query is not worth a call for every head."""
    plain = not features.logarithmic and features.floor is not None and features.size <= MOST_FEATURES
    return plain and query.shape[2] > 1 and kernels.serving("features", query) is not None


class FeatureScan(torch.autograd.Function):
    """As `chunked_scan._Causal`. Weights of tokens are factors of their features: exp(log_q) of queries, exp(log_k) of keys."""

    @staticmethod
    @without_autocast
    def forward(ctx, features, lengths, query, key, value, total, top, log_q, log_k, *params):
        map_q, map_k = feature_maps(features, query, key, params, torch.float32)
        output, normaliser = query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)
        total, references = total.clone(memory_format=torch.contiguous_format), References(top)
        pending, places, states = cuts(query.shape[2], SPAN)[::-1], [], []
        while pending:
            place, marks, weights = pending.pop(), None, (None, None)
            if log_k is not None:
                marks = references.follow(log_k[:, :, place, None], place.stop - place.start)
                if marks is None:
                    pending += halves(place)
                    continue
                total, weights = _followed(total, marks), _weights(log_q, log_k, place, marks)
            if place.start % SPAN == 0 and any(ctx.needs_input_grad):
                states.append(total.clone())
            maps = map_q(place)[0], map_k(place, lengths)[0]
            given = *(_rows(*pair) for pair in zip(maps, weights, strict=True)), value[:, :, place]
            results = output[:, :, place], normaliser[:, :, place]
            _run("features_forward", given, features.floor, (total,), (), results)
            places.append((place, marks))
        settled = None
        if log_k is not None:
            settled = references.settled().to(total.dtype)
            total = total * settled
        ctx.features, ctx.places = features, [place for place, _ in places]
        kept = query, key, value, output, normaliser, lengths, log_q, log_k, settled
        ctx.save_for_backward(*kept, *params, *states, *(marks for _, marks in places))
        ctx.mark_non_differentiable(references.top)
        ctx.set_materialize_grads(False)
        return output, total, references.top

    @staticmethod
    @first_order
    @without_autocast
    def backward(ctx, grad, later, _):
        query, key, value, output, normaliser, lengths, log_q, log_k, settled, *rest = ctx.saved_tensors
        features, count = ctx.features, len(ctx.features.params)
        params, states, marks = rest[:count], rest[count : -len(ctx.places)], rest[-len(ctx.places) :]
        spans = by_span(list(zip(ctx.places, marks, strict=True)), SPAN)
        map_q, map_k = feature_maps(features, query, key, params, torch.float32, ctx.needs_input_grad[9:])
        of_value = value.new_empty(value.shape)
        of_log_q, of_log_k = None, None if log_k is None else torch.empty_like(log_k)
        grad = torch.zeros_like(output) if grad is None else grad
        later = torch.zeros_like(states[0]) if later is None else later.clone(memory_format=torch.contiguous_format)
        later = later if settled is None else later * settled

        def made(place: slice, marks: Tensor | None):
            """Maps of a piece's queries and keys, weights and features, (B, H or G, m, T)."""
            maps = map_q(place), map_k(place, lengths)
            weights = (None, None) if log_k is None else _weights(log_q, log_k, place, marks)
            return maps, weights, [_rows(raw, weight) for (raw, _), weight in zip(maps, weights, strict=True)]

        for span, total in zip(spans[::-1], states[::-1], strict=True):
            befores = [total.clone()]
            for (place, marks), (_, following) in pairwise(span):  # where weights rise fast
                total = befores[-1] + made(place, marks)[2][1] @ pad(value[:, :, place].float(), (0, 1), value=1.0)
                befores.append(_followed(total, following))
            for (place, marks), total in zip(span[::-1], befores[::-1], strict=True):
                maps, weights, phi = made(place, marks)
                of_phi, saved = (
                    [x.new_empty(x.shape) for x in phi],
                    [x[:, :, place] for x in (output, normaliser, grad)],
                )
                sums, results = (total, later), (*of_phi, of_value[:, :, place])
                _run("features_backward", (*phi, value[:, :, place]), features.floor, sums, saved, results)
                if log_k is not None:
                    of_log_k[:, :, place] = (of_phi[1] * phi[1]).sum(2)
                    of_phi = [_times(*pair) for pair in zip(of_phi, weights, strict=True)]
                for (_, pull), slope in zip(maps, of_phi, strict=True):
                    pull(slope.mT)
                later = _followed(later, marks)
        if log_q is not None:  # what a query reads cancels but where the floor is its divisor
            kept = (grad.to(log_q.dtype) * output).sum(3).masked_fill(normaliser.abs() > features.floor, 0)
            of_log_q = kept.unflatten(1, (key.shape[1], -1)).sum(2)
        return None, None, map_q.of_x, map_k.of_x, of_value, later, None, of_log_q, of_log_k, *map_q.of_params


def _followed(total: Tensor, marks: Tensor | None) -> Tensor:
    """Sums before a piece relative to its reference, or gradients the other way; marks: as from `References.follow`."""
    return total if marks is None else rescale(total, marks[:, :, 0], finite(marks[:, :, 1]))


def _weights(log_q: Tensor, log_k: Tensor, place: slice, marks: Tensor) -> tuple[Tensor, Tensor]:
    """(B, G, 1, T) both, from logarithms (B, G, N), relative to the piece's reference."""
    reference = finite(marks[:, :, 1])
    return tuple((x[:, :, place] + r).exp()[:, :, None].float() for x, r in ((log_q, reference), (log_k, -reference)))


def _times(x: Tensor, weight: Tensor) -> Tensor:
    """(B, H, m, T) times weights (B, G, 1, T)."""
    return (x.unflatten(1, (weight.shape[1], -1)) * weight[:, :, None]).flatten(1, 2)


def _rows(phi: Tensor, weight: Tensor | None) -> Tensor:
    """(B, H, T, m) -> (B, H, m, T), token beside token, times weights (B, G, 1, T)."""
    return phi.mT.contiguous() if weight is None else _times(phi.mT, weight).contiguous()


def _run(
    name: str, given: Sequence[Tensor], floor: float, sums: Sequence[Tensor], saved: Sequence[Tensor], results
) -> None:
    """
    The kernel for each key/value head of each row: features of queries and keys and values are `given`, output, normaliser and
    the output's gradient `saved`. Sums and `results` are written.
    """
    function = getattr(kernels.load("features"), name)
    (batch, heads, m, n), groups, dim = given[0].shape, given[1].shape[1], given[2].shape[3]

    def job(b: int, g: int) -> None:
        phi_q, phi_k, value, *more = (kernels.readable(kernels.heads_of(x, b, g, groups)) for x in (*given, *saved))
        tensors = phi_q, phi_q.stride(0), phi_q.stride(1), phi_k, phi_k.stride(1), value, value.stride(1)
        own = (kernels.heads_of(x, b, g, groups) for x in sums)
        with kernels.writable(*(kernels.heads_of(x, b, g, groups) for x in results)) as found:
            output, normaliser, *rest = *more, *found
            placed = output, output.stride(0), normaliser, normaliser.stride(0)
            if more:
                grad, *rest = rest
                placed = *placed, grad, grad.stride(0), grad.stride(1)
            kernels.call(function, *tensors, heads // groups, n, m, dim, float(floor), *own, *placed, *rest)

    kernels.for_each_head(job, batch, groups)
