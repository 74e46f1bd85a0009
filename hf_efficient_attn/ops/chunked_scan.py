"""
Attention by feature maps in linear time: with phi(q_t), phi(k_j) of m features,

    out_t = sum_j phi(q_t) . phi(k_j) v_j / sum_j phi(q_t) . phi(k_j),        j <= t in a decoder, all j in an encoder,

from sums S = sum_j [v_j, 1] phi(k_j)^T of shape (D + 1, m) (Katharopoulos et al. 2020, arXiv:2006.16236). A decoder's
tokens are cut into chunks: weights inside a chunk are formed, what lies before it is read from S, which costs about
2 m D + CHUNK m multiplications per token and head. Features exist for one span of tokens at a time and are made again
in the backward pass; only the inputs, the output and a decoder's S at the start of each span are kept: memory linear
in N.

Exponential features (`Features.logarithmic`) are given by their logarithms l and never overflow. A reference r per
feature divides out: phi(k) = exp(l(k) - r), phi(q) = softmax(l(q) + r) over features, and S is stored relative to the
running maximum of l(k). In a span r lies midway between the maximum up to its first key and up to its last, and a span
over which the maximum rises by more than `REACH` is cut in two. So each query meets, in the feature that matters most
to it, a key whose weight is not lost in rounding, and its normaliser is never 0.

Letters: B batch, H query heads, G key/value heads (G divides H), N tokens, D head size, m features, T tokens of a span,
cut into L chunks of C.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..caching import AttentionState
from .precision import without_autocast

SPAN = 256  # tokens whose features exist at one time
CHUNK = 64  # tokens of a decoder that read one another directly
REACH = 50.0  # most that a logarithm may rise in a span: exp(1.5 REACH), the largest number met, fits float32
NEVER = float("-inf")


@dataclass(frozen=True)
class Features:
    """
    query: (x (B, H, T, D), *params) -> (B, H, T, m). key: (x (B, G, T, D), *params) -> (B, G, T, m). size: m.
    params: tensors that the maps use and that may need gradients.
    logarithmic: the maps give log phi; what is the same for all features of a query cancels and may be left out.
    floor: the smallest normaliser; below it the query and its keys have nothing in common and the output fades to 0.
    """

    query: Callable[..., Tensor]
    key: Callable[..., Tensor]
    size: int
    params: tuple[Tensor, ...] = ()
    logarithmic: bool = False
    floor: float = 1e-30


@dataclass(frozen=True)
class Sums:
    """
    What a decoder remembers. total: (B, G, D + 1, m). top: (B, G, m), the largest log phi(k) of each feature, to which
    `total` is relative; -inf before the first key, 0 where features are not logarithmic.
    """

    total: Tensor
    top: Tensor


def attend_linearly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    features: Features,
    *,
    causal: bool,
    lengths: Tensor | None,
    state: AttentionState | None,
) -> Tensor:
    """`linear_attention` for a variant whose decoder state is the sums alone."""
    stored = {} if state is None else state.entries
    before = Sums(stored["total"], stored["top"]) if "total" in stored else None
    output, after = linear_attention(query, key, value, features, causal=causal, lengths=lengths, before=before)
    stored.update(total=after.total, top=after.top)
    return output


@torch.compiler.disable
def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    features: Features,
    *,
    causal: bool,
    lengths: Tensor | None = None,
    before: Sums | None = None,
) -> tuple[Tensor, Sums]:
    """
    query (B, H, N, D), key and value (B, G, N, D) -> (B, H, N, D), and the sums after the last real token.

    lengths: (B,) real tokens per row, the others behind them, or None. before: the sums that earlier calls of a decoder
    left. Half precision is computed in float32. Gradients reach query, key, value, `features.params` and, in a decoder,
    `before.total`.
    """
    if before is None:
        accurate = torch.promote_types(query.dtype, torch.float32)
        top = query.new_full((*key.shape[:2], features.size), NEVER if features.logarithmic else 0.0, dtype=accurate)
        before = Sums(top.new_zeros(*top.shape[:2], value.shape[3] + 1, features.size), top)
    function = _Causal if causal else _Bidirectional
    output, total, top = function.apply(
        features, lengths, query, key, value, before.total, before.top, *features.params
    )
    return output, Sums(total, top)


class _Causal(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, features, lengths, query, key, value, total, top, *params):
        maps = _maps(features, query, key, params, top.dtype)
        output, normaliser = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=top.dtype)
        pending, spans, states = _spans(query.shape[2])[::-1], [], []
        while pending:
            place = pending.pop()
            span = _Span.of(features, *maps, value, lengths, place, top)
            if span is None:
                pending += _halves(place)
                continue
            spans.append(place)
            states += [total, top]
            before, total = span.before(total)
            read = torch.bmm(span.weights(), span.value).baddbmm_(span.phi_q, before.mT)
            _divide(span.by_token(read), features.floor, output[:, :, place], normaliser[:, :, place])
            total, top = _rescale(total, span.leave), span.top
        ctx.features, ctx.spans = features, spans
        ctx.save_for_backward(query, key, value, output, normaliser, lengths, *params, *states)
        ctx.mark_non_differentiable(top)
        ctx.set_materialize_grads(False)
        return output, total, top

    @staticmethod
    @without_autocast
    def backward(ctx, grad, grad_total, _):
        features, (query, key, value, output, normaliser, lengths, *rest) = ctx.features, ctx.saved_tensors
        params, states = rest[: len(features.params)], rest[len(features.params) :]
        map_q, map_k = _maps(features, query, key, params, normaliser.dtype, ctx.needs_input_grad[7:])
        grad_value, d = torch.empty_like(value), value.shape[3]
        grad = torch.zeros_like(output) if grad is None else grad
        grad_total = torch.zeros_like(states[0]) if grad_total is None else grad_total
        for place, total, top in zip(ctx.spans[::-1], states[-2::-2], states[::-2], strict=True):
            span = _Span.of(features, map_q, map_k, value, lengths, place, top)
            slope = span.by_chunk(_of_quotient(grad, output, normaliser, features.floor, place))
            after, grad_total = span.after(slope, grad_total)
            of_value = torch.bmm(span.weights().mT, slope[..., :d]).baddbmm_(span.phi_k, after[:, :d].mT)
            grad_value[:, :, place] = span.by_token(of_value)
            weights = span.lower(torch.bmm(slope, span.value.mT))
            of_q = torch.bmm(weights, span.phi_k).baddbmm_(slope, span.before(total)[0])
            of_k = torch.bmm(weights.mT, span.phi_q).baddbmm_(span.value, after)
            map_q.pull(place, span.by_token(of_q), span.by_token(span.phi_q))
            map_k.pull(place, span.by_token(of_k), span.by_token(span.phi_k), lengths)
        return None, None, map_q.of_x, map_k.of_x, grad_value, grad_total, None, *map_q.of_params


class _Bidirectional(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, features, lengths, query, key, value, total, top, *params):
        map_q, map_k = _maps(features, query, key, params, top.dtype)
        spans, groups = _spans(query.shape[2]), key.shape[1]
        for place in spans:
            raw, reference = map_k(place, lengths), None
            if features.logarithmic:
                higher = torch.maximum(top, raw.amax(2))
                reference = _finite(higher)
                total, top = _rescale(total, torch.exp(top - reference)), higher
            total = total + _with_one(value, place, top.dtype).mT @ _exp_key(raw, reference)
        reference = _finite(top) if features.logarithmic else None
        output, normaliser = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=top.dtype)
        for place in spans:
            read = _group(_exp_query(map_q(place), reference, groups), groups) @ total.mT
            _divide(_ungroup(read, query.shape[1]), features.floor, output[:, :, place], normaliser[:, :, place])
        ctx.features = features
        ctx.save_for_backward(query, key, value, output, normaliser, lengths, total, reference, *params)
        ctx.mark_non_differentiable(total, top)
        return output, total, top

    @staticmethod
    @without_autocast
    def backward(ctx, grad, _, __):
        features = ctx.features
        query, key, value, output, normaliser, lengths, total, reference, *params = ctx.saved_tensors
        map_q, map_k = _maps(features, query, key, params, total.dtype, ctx.needs_input_grad[7:])
        spans, groups = _spans(query.shape[2]), key.shape[1]
        grad_value, grad_total = torch.empty_like(value), torch.zeros_like(total)
        for place in spans:
            phi = _exp_query(map_q(place), reference, groups)
            slope = _group(_of_quotient(grad, output, normaliser, features.floor, place), groups)
            grad_total += slope.mT @ _group(phi, groups)
            map_q.pull(place, _ungroup(slope @ total, query.shape[1]), phi)
        for place in spans:
            phi = _exp_key(map_k(place, lengths), reference)
            grad_value[:, :, place] = phi @ grad_total[:, :, :-1].mT
            map_k.pull(place, _with_one(value, place, total.dtype) @ grad_total, phi, lengths)
        return None, None, map_q.of_x, map_k.of_x, grad_value, None, None, *map_q.of_params


@dataclass(frozen=True)
class _Span:
    """
    The features of a span of a decoder's tokens by chunks, P = B G L: phi_q (P, H / G C, m), phi_k (P, C, m), value
    (P, C, D + 1) with ones behind. top: the running maximum after it. enter, leave: the factors (B, G, m) that take
    sums from the maximum before the span to its reference, and from there to `top`; None without logarithms.
    """

    batch: int
    groups: int
    chunk: int
    phi_q: Tensor
    phi_k: Tensor
    value: Tensor
    top: Tensor
    enter: Tensor | None
    leave: Tensor | None

    @staticmethod
    def of(features: Features, map_q: _Map, map_k: _Map, value, lengths, place: slice, top: Tensor) -> _Span | None:
        """None where the running maximum rises too much over the span."""
        reference = enter = leave = None
        raw, length = map_k(place, lengths), place.stop - place.start
        if features.logarithmic:
            low, high = torch.maximum(top, raw[:, :, 0]), torch.maximum(top, raw.amax(2))
            if length > 1 and bool(((high - low) > REACH).any()):
                return None
            reference = _finite((low + high) / 2)
            enter, leave = torch.exp(top - reference), torch.exp(reference - _finite(high))
            top = high
        batch, groups, chunk = *value.shape[:2], CHUNK if length % CHUNK == 0 else length
        phi_q = _exp_query(map_q(place), reference, groups)
        three = phi_q, _exp_key(raw, reference), _with_one(value, place, top.dtype)
        return _Span(batch, groups, chunk, *(_by_chunk(x, groups, chunk) for x in three), top, enter, leave)

    def by_chunk(self, x: Tensor) -> Tensor:
        """(B, H, T, E) -> (P, H / G C, E)."""
        return _by_chunk(x, self.groups, self.chunk)

    def by_token(self, x: Tensor) -> Tensor:
        """Inverse of `by_chunk`."""
        x = x.unflatten(1, (-1, self.chunk)).unflatten(0, (self.batch, self.groups, -1))
        return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def weights(self) -> Tensor:
        """Inside chunks: (P, H / G C, C)."""
        return self.lower(torch.bmm(self.phi_q, self.phi_k.mT))

    def lower(self, weights: Tensor) -> Tensor:
        """Zeroed in place where the key comes after the query."""
        past = torch.ones(self.chunk, self.chunk, dtype=weights.dtype, device=weights.device).tril_()
        weights.unflatten(1, (-1, self.chunk)).mul_(past)
        return weights

    def before(self, total: Tensor) -> tuple[Tensor, Tensor]:
        """The sums (P, D + 1, m) before each chunk and (B, G, D + 1, m) after all, from those before the span."""
        added = torch.bmm(self.value.mT, self.phi_k)
        return self._running(added, _rescale(total, self.enter), 1)

    def after(self, slope: Tensor, grad_total: Tensor) -> tuple[Tensor, Tensor]:
        """What later queries ask of each chunk's sums, and what those of this span and later ones ask before it."""
        added = torch.bmm(slope.mT, self.phi_q)
        after, grad_total = self._running(added, _rescale(grad_total, self.leave), -1)
        return after, _rescale(grad_total, self.enter)

    def _running(self, added: Tensor, start: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Sums of what comes before each chunk in this direction, and of all."""
        added = added.unflatten(0, (self.batch, self.groups, -1))
        sums, chunks = torch.empty_like(added), range(added.shape[2])[::step]
        sums[:, :, chunks[0]] = start
        for one, following in itertools.pairwise(chunks):
            torch.add(sums[:, :, one], added[:, :, one], out=sums[:, :, following])
        return sums.flatten(0, 2), sums[:, :, chunks[-1]] + added[:, :, chunks[-1]]


class _Map:
    """
    One feature map over the spans of its input. In a backward pass `wanted` says which parameters need gradients; what
    a span gave is then pulled back to the gradients `of_x` and `of_params`.
    """

    def __init__(self, function, x, params, accurate, logarithmic, of_params=None) -> None:
        self.function, self.x, self.params, self.accurate, self.logarithmic = function, x, params, accurate, logarithmic
        self.backward, self.of_params = of_params is not None, of_params
        if self.backward:
            self.of_x = torch.empty_like(x)
            pairs = zip(params, of_params, strict=True)
            self.params = [p.detach().requires_grad_(total is not None) for p, total in pairs]

    def __call__(self, place: slice, lengths: Tensor | None = None) -> Tensor:
        """What the map gives for these tokens; padding weighs nothing."""
        with torch.set_grad_enabled(self.backward):
            self.leaf = self.x[:, :, place].detach().requires_grad_(self.backward)
            self.given = self.function(self.leaf.to(self.accurate), *self.params)
        raw = self.given.detach()
        return raw if lengths is None else raw.masked_fill(_padded(lengths, place), NEVER if self.logarithmic else 0.0)

    def pull(self, place: slice, slope: Tensor, phi: Tensor, lengths: Tensor | None = None) -> None:
        """slope: the gradient of phi, the features of the tokens at `place`, for which the map was called last."""
        if self.logarithmic:
            slope = slope * phi
        if lengths is not None:
            slope = slope.masked_fill(_padded(lengths, place), 0)
        wanted = [self.leaf, *(p for p in self.params if p.requires_grad)]
        self.of_x[:, :, place], *found = torch.autograd.grad(self.given, wanted, slope, allow_unused=True)
        for total, part in zip((t for t in self.of_params if t is not None), found, strict=True):
            if part is not None:
                total += part


def _maps(features: Features, query, key, params, accurate: torch.dtype, wanted=None) -> tuple[_Map, _Map]:
    """The query map and the key map; they share `of_params`."""
    of_params = None
    if wanted is not None:
        of_params = [torch.zeros_like(p) if want else None for p, want in zip(params, wanted, strict=True)]
    rest = params, accurate, features.logarithmic, of_params
    return _Map(features.query, query, *rest), _Map(features.key, key, *rest)


def _spans(length: int) -> list[slice]:
    """Cuts of a sequence, each of whole chunks or shorter than one."""
    whole = length // CHUNK * CHUNK
    cuts = [slice(i, min(i + SPAN, whole)) for i in range(0, whole, SPAN)]
    return cuts if whole == length else [*cuts, slice(whole, length)]


def _halves(place: slice) -> list[slice]:
    """The later half and the earlier one."""
    unit = CHUNK if place.stop - place.start > CHUNK else 1
    middle = place.start + max((place.stop - place.start) // (2 * unit), 1) * unit
    return [slice(middle, place.stop), slice(place.start, middle)]


def _rescale(total: Tensor, factor: Tensor | None) -> Tensor:
    return total if factor is None else total * factor[:, :, None]


def _finite(top: Tensor) -> Tensor:
    """A running maximum, 0 where there was no key."""
    return top.masked_fill(top == NEVER, 0)


def _padded(lengths: Tensor, place: slice) -> Tensor:
    """(B, 1, T, 1) bool, True = padding."""
    return (torch.arange(place.start, place.stop, device=lengths.device) >= lengths[:, None])[:, None, :, None]


def _with_one(value: Tensor, place: slice, accurate: torch.dtype) -> Tensor:
    """(B, G, T, D) -> (B, G, T, D + 1): the last column sums up the weights."""
    return pad(value[:, :, place].to(accurate), (0, 1), value=1.0)


def _exp_key(raw: Tensor, reference: Tensor | None) -> Tensor:
    return raw if reference is None else (raw - reference[:, :, None]).exp_()


def _exp_query(raw: Tensor, reference: Tensor | None, groups: int) -> Tensor:
    """Divided by their sum, which cancels."""
    if reference is None:
        return raw
    return (raw.unflatten(1, (groups, -1)) + reference[:, :, None, None]).softmax(-1).flatten(1, 2)


def _by_chunk(x: Tensor, groups: int, chunk: int) -> Tensor:
    return x.unflatten(2, (-1, chunk)).unflatten(1, (groups, -1)).transpose(2, 3).flatten(3, 4).flatten(0, 2)


def _group(x: Tensor, groups: int) -> Tensor:
    """(B, H, T, E) -> (B, G, H / G T, E)."""
    return x.unflatten(1, (groups, -1)).flatten(2, 3)


def _ungroup(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(2, (heads // x.shape[1], -1)).flatten(1, 2)


def _divide(read: Tensor, floor: float, output: Tensor, normaliser: Tensor) -> None:
    """Writes numerator / normaliser; read (B, H, T, D + 1)."""
    normaliser.copy_(read[..., -1].clamp_min(floor))
    output.copy_(read[..., :-1] / normaliser[..., None])


def _of_quotient(grad: Tensor, output: Tensor, normaliser: Tensor, floor: float, place: slice) -> Tensor:
    """Gradient (B, H, T, D + 1) of numerator and normaliser from that of their quotient."""
    normaliser = normaliser[:, :, place, None]
    grad = grad[:, :, place].to(normaliser.dtype) / normaliser
    of_normaliser = (grad * output[:, :, place]).sum(-1, keepdim=True).neg_()
    return torch.cat([grad, of_normaliser.masked_fill_(normaliser <= floor, 0)], 3)
