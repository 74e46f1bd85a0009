"""
A decoder's attention by features that are not logarithmic, by a compiled kernel (kernels/features.c): what `chunked_scan`
computes of them, a span of tokens at a time. Features exist for one span and are made again in the backward pass; sums are kept
once a span: memory linear in N.

Letters: B batch, H query heads, G key/value heads, N tokens, T tokens of a span, D head size, m features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import kernels
from .features import Features, cuts, feature_maps
from .precision import first_order, without_autocast

SPAN = 256  # tokens
MOST_FEATURES = 512


def has_kernel(query: Tensor, features: Features) -> bool:
    """Whether `feature_scan` can be called; a single query is not worth a call for every head."""
    plain = not features.logarithmic and features.floor is not None and features.size <= MOST_FEATURES
    return plain and query.shape[2] > 1 and kernels.serving("features", query) is not None


def feature_scan(
    query: Tensor, key: Tensor, value: Tensor, features: Features, *, lengths: Tensor | None, before: Tensor
) -> tuple[Tensor, Tensor]:
    """
    query (B, H, N, D), key and value (B, G, N, D) -> (B, H, N, D), and the sums (B, G, m, D + 1) after the last real token,
    from those `before`. lengths: (B,) real tokens per row, the others behind them, or None. Gradients reach all tensors and
    `features.params`.
    """
    return _FeatureScan.apply(features, lengths, query, key, value, before, *features.params)


class _FeatureScan(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, features, lengths, query, key, value, total, *params):
        map_q, map_k = feature_maps(features, query, key, params, torch.float32)
        output, normaliser = query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)
        total, states = total.clone(memory_format=torch.contiguous_format), []
        for place in cuts(query.shape[2], SPAN):
            if any(ctx.needs_input_grad):
                states.append(total.clone())
            given = _rows(map_q(place)[0]), _rows(map_k(place, lengths)[0]), value[:, :, place]
            results = output[:, :, place], normaliser[:, :, place]
            _run("features_forward", given, features.floor, (total,), (), results)
        ctx.features = features
        ctx.save_for_backward(query, key, value, output, normaliser, lengths, *params, *states)
        ctx.set_materialize_grads(False)
        return output, total

    @staticmethod
    @first_order
    @without_autocast
    def backward(ctx, grad, later):
        features, (query, key, value, output, normaliser, lengths, *rest) = ctx.features, ctx.saved_tensors
        params, states = rest[: len(features.params)], rest[len(features.params) :]
        map_q, map_k = feature_maps(features, query, key, params, torch.float32, ctx.needs_input_grad[6:])
        of_value = value.new_empty(value.shape)
        grad = torch.zeros_like(output) if grad is None else grad
        later = torch.zeros_like(states[0]) if later is None else later.clone(memory_format=torch.contiguous_format)
        for place, total in zip(cuts(query.shape[2], SPAN)[::-1], states[::-1], strict=True):
            (raw_q, pull_q), (raw_k, pull_k) = map_q(place), map_k(place, lengths)
            of_q, of_k = (x.new_empty(x.mT.shape) for x in (raw_q, raw_k))
            given, sums = (_rows(raw_q), _rows(raw_k), value[:, :, place]), (total.clone(), later)
            saved = [x[:, :, place] for x in (output, normaliser, grad)]
            _run("features_backward", given, features.floor, sums, saved, (of_q, of_k, of_value[:, :, place]))
            pull_q(of_q.mT)
            pull_k(of_k.mT)
        return None, None, map_q.of_x, map_k.of_x, of_value, later, *map_q.of_params


def _rows(phi: Tensor) -> Tensor:
    """(B, H, T, m) -> (B, H, m, T), token beside token."""
    return phi.mT.contiguous()


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
