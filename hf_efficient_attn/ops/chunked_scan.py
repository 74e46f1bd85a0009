"""
Attention by feature maps in linear time: with phi(q_t), phi(k_j) of m features,

    out_t = sum_j phi(q_t) . phi(k_j) v_j / sum_j phi(q_t) . phi(k_j),        j <= t in a decoder, all j in an encoder,

from sums S = sum_j phi(k_j) [v_j, 1]^T of shape (m, D + 1) (Katharopoulos et al. 2020, arXiv:2006.16236). A decoder's
tokens are cut into chunks: weights inside a chunk are formed, what lies before it is read from S, which costs about
2 m D + CHUNK m multiplications per token and head. Features exist for one chunk at a time (an encoder: one span) and
are made again in the backward pass; only the inputs, the output and a decoder's S once per span are kept: memory linear
in N.

Exponential features (`Features.logarithmic`) are given by their logarithms l and never overflow. A reference r per
feature divides out: phi(k) = exp(l(k) - r), phi(q) = exp(l(q) + r), the latter over its largest feature. In a decoder r
stays within `REACH` / 2 of the running maximum of l(k): where the maximum leaves it, S is made relative to another r,
and a chunk over which the maximum rises by more than `REACH` is cut in two. So each query meets, in the feature that
matters most to it, a key whose weight is not lost in rounding, and its normaliser is never 0.

Tokens of a decoder may have weights of their own (`Weights`), such as those of a gate that forgets: they are logarithms
too, and the sums are relative to the running maximum of the keys' ones in the same way.

Letters: B batch, H query heads, G key/value heads (G divides H), N tokens, D head size, m features, P = B G, C tokens
of a chunk, R = H / G.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..caching import AttentionState
from .feature_scan import FeatureScan, has_kernel
from .features import NEVER, Features, References, by_span, cuts, feature_maps, finite, halves, padded, rescale
from .grain import at_once, has_price
from .precision import first_order, without_autocast

SPAN = 256  # tokens of an encoder whose features exist at one time, at least; a decoder's S is kept once for so many
CHUNK = 64  # tokens of a decoder that read one another directly; SPAN is a multiple


def sizes(query: Tensor, features: Features) -> tuple[int, int, int]:
    """Tokens of a chunk, of a piece, whose chunks are computed side by side, and of a span, on the queries' device."""
    if not has_price(query.device):
        return CHUNK, CHUNK, SPAN
    features_of_a_span = query.shape[:2].numel() * features.size * SPAN
    span = SPAN * max(1, min(SPAN, at_once(features_of_a_span, query.device) // features_of_a_span))
    return SPAN, span, span


@dataclass(frozen=True)
class Weights:
    """
    A decoder's key j counts exp(key_j) times, and what query t reads is multiplied by exp(query_t): (B, G, N) both, with
    gradients. The latter changes nothing but what `Features.floor` is compared with. Not for logarithmic features. In float64
    where logarithms grow with the text: their differences are what counts.
    """

    query: Tensor
    key: Tensor


@dataclass(frozen=True)
class Sums:
    """
    What a decoder remembers. total: (B, G, m, D + 1). top: (B, G, m), the largest log phi(k) of each feature, to which
    `total` is relative; -inf before the first key, 0 where features are not logarithmic. With `Weights` top is (B, G, 1),
    the largest logarithm of a key's weight.
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
    weights: Weights | None = None,
) -> Tensor:
    """`linear_attention` for a variant whose decoder state is the sums alone."""
    before = stored_sums(state)
    output, after = linear_attention(
        query, key, value, features, causal=causal, lengths=lengths, before=before, weights=weights
    )
    if state is not None:
        state.entries.update(total=after.total, top=after.top)
    return output


def stored_sums(state: AttentionState | None) -> Sums | None:
    """What earlier calls left under "total" and "top", if there were any."""
    entries = {} if state is None else state.entries
    return Sums(entries["total"], entries["top"]) if "total" in entries else None


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
    weights: Weights | None = None,
) -> tuple[Tensor, Sums]:
    """
    query (B, H, N, D), key and value (B, G, N, D) -> (B, H, N, D), and the sums after the last real token.

    lengths: (B,) real tokens per row, the others behind them, or None. before: the sums that earlier calls of a decoder
    left. Half precision is computed in float32. Gradients reach query, key, value, `features.params`, weights and, in a
    decoder, `before.total`.
    """
    accurate = torch.promote_types(query.dtype, torch.float32)
    if before is None:
        top = query.new_zeros(*key.shape[:2], features.size if weights is None else 1, dtype=accurate)
        total = top.new_zeros(*key.shape[:2], features.size, value.shape[3] + 1)
        before = Sums(total, top.fill_(NEVER) if features.logarithmic or weights is not None else top)
    if query.shape[2] == 0:
        return before.total.new_zeros(*query.shape[:3], value.shape[3] + (features.floor is None)), before
    tensors = query, key, value, before.total, before.top
    if causal:
        logs = (None, None) if weights is None else (weights.query, weights.key)
        if weights is not None and lengths is not None:  # at padding, whose logarithms may be anything
            logs = logs[0], logs[1].masked_fill(padded(lengths, slice(0, query.shape[2]))[..., 0], NEVER)
        if query.shape[2] == 1 and not torch.is_grad_enabled():
            return _one_token(features, query, key, value, before, lengths, *logs)
        scan = FeatureScan if has_kernel(query, features) else _Causal
        output, total, top = scan.apply(features, lengths, *tensors, *logs, *features.params)
    else:
        output, total, top = _Bidirectional.apply(features, lengths, *tensors, *features.params)
    return output, Sums(total, top)


def read_past(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    features: Features,
    *,
    real: Tensor | None = None,
    before: Sums | None = None,
) -> tuple[Tensor, Sums]:
    """
    As `linear_attention` of a decoder, but numerator and normaliser are handed out side by side, (B, H, N, D + 1) in
    float32 or better, to be joined with others. For features that are not logarithmic. N may be 0.

    real: (B,) as `lengths`, or (B, N) bool, which keys there are.
    """
    features = replace(features, floor=None)
    return linear_attention(query, key, value, features, causal=True, lengths=real, before=before)


@without_autocast
def _one_token(features: Features, query, key, value, before: Sums, lengths, log_q, log_k) -> tuple[Tensor, Sums]:
    """What `_Causal` gives for a generated token, which needs no chunk and no gradient."""
    (total, top), groups, now = (before.total, before.top), key.shape[1], slice(0, 1)
    tokens = () if features.tokens is None else (features.tokens,)
    phi_q, phi_k = (
        f(x.to(top.dtype), *tokens, *features.params) for f, x in ((features.query, query), (features.key, key))
    )
    if lengths is not None:
        phi_k = phi_k.masked_fill(padded(lengths, now), NEVER if features.logarithmic else 0.0)
    value, reference = _with_one(value, now, top.dtype), None
    if features.logarithmic or log_k is not None:
        higher = torch.maximum(top, phi_k[:, :, 0] if features.logarithmic else log_k)
        reference = finite(higher)
        total, top = rescale(total, top, reference), higher
    if features.logarithmic:
        phi_q, phi_k = _exp_query(phi_q, reference[:, :, None], groups), _exp_key(phi_k, reference[:, :, None])
    elif log_k is not None:
        value.mul_((log_k - reference).exp_()[..., None])
    total = torch.baddbmm(total.flatten(0, 1), phi_k.flatten(0, 1).mT, value.flatten(0, 1)).view_as(total)
    read = _ungroup(_group(phi_q, groups) @ total, query.shape[1])
    if features.floor is None:
        return read, Sums(total, top)
    if log_q is not None:
        read.unflatten(1, (groups, -1)).mul_((log_q + reference).exp_()[:, :, None, :, None])
    output, normaliser = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=total.dtype)
    _divide(read, features.floor, output, normaliser)
    return output, Sums(total, top)


class _Causal(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, features, lengths, query, key, value, total, top, log_q, log_k, *params):
        map_q, map_k = feature_maps(features, query, key, params, top.dtype)
        relative = features.logarithmic or log_k is not None
        output = normaliser = None
        if features.floor is not None:
            output, normaliser = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=top.dtype)
        sums = query.new_empty(*query.shape[:3], value.shape[3] + 1, dtype=top.dtype) if output is None else None
        chunk_size, piece_size, span_size = sizes(query, features)
        pending, places, states, references = (
            _pieces(query.shape[2], chunk_size, piece_size)[::-1],
            [],
            [],
            References(top),
        )
        while pending:
            place, marks = pending.pop(), None
            raw, _ = map_k(place, lengths)
            if relative:
                logs = raw if features.logarithmic else log_k[:, :, place, None]
                marks = references.follow(logs, _chunk_size(place, chunk_size))
                if marks is None:
                    pending += halves(place, chunk_size)
                    continue
            if place.start % span_size == 0:
                states.append(total)
                total = total.clone()
            piece = _Piece.of(map_q(place)[0], raw, value, place, chunk_size, marks, features, log_q, log_k)
            sums_of_chunks = piece.sums(total)
            read = piece.read(sums_of_chunks)
            total = piece.after(sums_of_chunks)
            if output is None:
                sums[:, :, place] = read
            else:
                _divide(read, features.floor, output[:, :, place], normaliser[:, :, place])
            places.append((place, marks))
        settled = None
        if relative:
            settled = references.settled().to(total.dtype)
            total = total * settled
        ctx.features, ctx.places, ctx.sizes = features, [place for place, _ in places], (chunk_size, span_size)
        kept = query, key, value, output, normaliser, lengths, log_q, log_k, settled
        ctx.save_for_backward(*kept, *params, *states, *(marks for _, marks in places))
        ctx.mark_non_differentiable(references.top)
        ctx.set_materialize_grads(False)
        return sums if output is None else output, total, references.top

    @staticmethod
    @first_order
    @without_autocast
    def backward(ctx, grad, grad_total, _):
        query, key, value, output, normaliser, lengths, log_q, log_k, settled, *rest = ctx.saved_tensors
        features, count, (chunk_size, span_size) = ctx.features, len(ctx.features.params), ctx.sizes
        params, states, marks = rest[:count], rest[count : -len(ctx.places)], rest[-len(ctx.places) :]
        spans = by_span(list(zip(ctx.places, marks, strict=True)), span_size)
        map_q, map_k = feature_maps(features, query, key, params, states[0].dtype, ctx.needs_input_grad[9:])
        grad_value = torch.empty_like(value)
        of_log_q, of_log_k = (None if x is None else torch.empty_like(x) for x in (log_q, log_k))
        if grad is None:
            grad = query.new_zeros(*query.shape[:3], value.shape[3] + (output is None))
        if grad_total is None:
            grad_total = torch.zeros_like(states[0])
        elif settled is not None:
            grad_total = grad_total * settled
        for span, total in zip(spans[::-1], states[::-1], strict=True):
            total, later = total.clone(), []
            for place, marks in span:
                (raw_q, pull_q), (raw_k, pull_k) = map_q(place), map_k(place, lengths)
                piece = _Piece.of(raw_q, raw_k, value, place, chunk_size, marks, features, log_q, log_k)
                sums = piece.sums(total)
                slope = grad[:, :, place]
                if output is not None:
                    slope = _of_quotient(grad, output, normaliser, features.floor, place)
                if log_q is not None:
                    read = torch.cat([output[:, :, place], torch.ones_like(output[:, :, place, :1])], 3)
                    of_read = (slope * read).sum(3) * normaliser[:, :, place]
                    of_log_q[:, :, place] = of_read.unflatten(1, (key.shape[1], -1)).sum(2)
                    slope = piece.times(slope)
                slope = piece.by_chunk(slope)
                of_weights = piece.of_weights(slope)
                pull_q(piece.of_query(slope, of_weights, sums))
                total = piece.after(sums)
                later.append((place, piece, slope, of_weights, pull_k))
            for place, piece, slope, of_weights, pull_k in reversed(later):
                grad_total, of_sums = piece.of_sums(slope, grad_total)
                of_value = piece.of_value(slope, of_sums, log_k is not None)
                if log_k is not None:
                    of_log_k[:, :, place] = (of_value * piece.by_head(piece.value)).sum(3)
                    of_value = of_value[..., :-1].mul_(piece.key_weight)
                grad_value[:, :, place] = of_value
                pull_k(piece.of_key(of_weights, of_sums))
        grads = map_q.of_x, map_k.of_x, grad_value, grad_total, None, of_log_q, of_log_k
        return None, None, *grads, *map_q.of_params


def _pieces(length: int, chunk: int, size: int) -> list[slice]:
    """What is not a whole chunk, at the end, is a piece of its own."""
    whole = length // chunk * chunk
    return cuts(whole, size) + [slice(whole, length)] * (whole < length)


def _chunk_size(place: slice, chunk: int) -> int:
    return min(place.stop - place.start, chunk)


@dataclass(frozen=True)
class _Piece:
    """
    K chunks of a decoder's tokens, which read one another within a chunk, and the sums before it. q (Q, m, R C) and
    k (Q, m, C), Q = B G K: features, which stand in rows because that is how matrix products read them fastest.
    value (Q, C, D + 1), ones behind.
    carry (B, G, m or 1, K + 1, K + 1): what is left, before a chunk and after the last one (rows), of the sums before the piece
    and of what each chunk adds (columns), since sums are relative to the reference of the chunk that reads them. None: all.
    """

    q: Tensor
    k: Tensor
    value: Tensor
    carry: Tensor | None
    shape: tuple[int, int, int, int]  # B, G, K, C
    logarithmic: bool
    query_weight: Tensor | None = None  # (B, G, K C, 1), of what is read
    key_weight: Tensor | None = None  # alike, of `value`, where it is included

    @staticmethod
    def of(raw_q, raw_k, value, place: slice, chunk: int, marks, features: Features, log_q, log_k) -> _Piece:
        """marks: as from `References.follow`, or None."""
        batch, groups, length, _ = raw_k.shape
        size = _chunk_size(place, chunk)
        shape, weights = (batch, groups, length // size, size), (None, None)
        reference, carry = (None, None) if marks is None else (finite(marks[:, :, 1:]), _carry(marks).to(raw_k.dtype))
        center = reference if features.logarithmic else None
        q = _rows(_exp_query(raw_q, center, groups), shape)
        k = _rows(_exp_key(raw_k, center), shape)
        value = _with_one(value, place, k.dtype)
        if log_k is not None:
            own = reference.expand(-1, -1, -1, size).flatten(2)
            weights = tuple(
                x.exp()[..., None].to(k.dtype) for x in (log_q[:, :, place] + own, log_k[:, :, place] - own)
            )
            value.mul_(weights[1])
        return _Piece(q, k, _by_chunk(value, shape), carry, shape, features.logarithmic, *weights)

    def times(self, x: Tensor) -> Tensor:
        """Numbers of each query (B, H, K C, E) times its weight."""
        if self.query_weight is None:
            return x
        return (x.unflatten(1, (self.shape[1], -1)) * self.query_weight[:, :, None]).flatten(1, 2)

    def by_chunk(self, x: Tensor) -> Tensor:
        """(B, H, K C, E) -> (Q, R C, E)."""
        return _by_chunk(x, self.shape)

    def by_head(self, x: Tensor) -> Tensor:
        """Inverse of `by_chunk`, and the same for keys: (Q, R C, E) -> (B, H, K C, E)."""
        x = x.view(*self.shape[:3], -1, self.shape[3], x.shape[2])
        return x.transpose(2, 3).flatten(1, 2).flatten(2, 3)

    def sums(self, total: Tensor) -> Tensor:
        """Those before each chunk, and after the last where there are several, (B, G, K + 1 or 1, m, D + 1)."""
        if self.shape[2] == 1:
            return self._faded(total)[:, :, None]
        own = torch.bmm(self.k, self.value).unflatten(0, self.shape[:3])
        sums = torch.cat([total[:, :, None], own], 2)
        return sums.cumsum(2) if self.carry is None else _carried(sums, self.carry)

    def after(self, sums: Tensor) -> Tensor:
        """(B, G, m, D + 1) after the last chunk; a single one is added in place."""
        total = sums[:, :, -1]
        if self.shape[2] > 1:
            return total.clone()  # by itself: it is kept, and the others are not
        total.flatten(0, 1).baddbmm_(self.k, self.value)
        return total

    def of_sums(self, slope: Tensor, grad_total: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the sums before the piece and of what each chunk adds; slope (Q, R C, D + 1) is that of `read`."""
        if self.shape[2] == 1:
            later = grad_total.flatten(0, 1)
            return self._faded(torch.baddbmm(later, self.q, slope).view_as(grad_total)), later
        own = torch.bmm(self.q, slope).unflatten(0, self.shape[:3])
        sums = torch.cat([own, grad_total[:, :, None]], 2)
        sums = sums.flip(2).cumsum(2).flip(2) if self.carry is None else _carried(sums, self.carry.mT)
        return sums[:, :, 0], sums[:, :, 1:].flatten(0, 2)

    def _faded(self, total: Tensor) -> Tensor:
        """Sums before the piece, or their gradient, as they are before its first chunk."""
        return total if self.carry is None else total * self.carry[..., 0, :1]

    def _befores(self, sums: Tensor) -> Tensor:
        return sums[:, :, : self.shape[2]].flatten(0, 2)

    def read(self, sums: Tensor) -> Tensor:
        """(B, H, K C, D + 1)"""
        weights = _past(torch.bmm(self.q.mT, self.k))
        return self.times(self.by_head(torch.bmm(weights, self.value).baddbmm_(self.q.mT, self._befores(sums))))

    def of_weights(self, slope: Tensor) -> Tensor:
        """(Q, R C, C)"""
        return _past(torch.bmm(slope, self.value.mT))

    def of_query(self, slope: Tensor, of_weights: Tensor, sums: Tensor) -> Tensor:
        """(B, H, K C, m)"""
        of_q = torch.bmm(self.k, of_weights.mT).baddbmm_(self._befores(sums), slope.mT)
        return self.by_head((of_q.mul_(self.q) if self.logarithmic else of_q).mT)

    def of_key(self, of_weights: Tensor, of_sums: Tensor) -> Tensor:
        """(B, G, K C, m)"""
        of_k = torch.bmm(self.q, of_weights).baddbmm_(of_sums, self.value.mT)
        return self.by_head((of_k.mul_(self.k) if self.logarithmic else of_k).mT)

    def of_value(self, slope: Tensor, of_sums: Tensor, ones: bool) -> Tensor:
        """(B, G, K C, D), or D + 1 with the column of ones."""
        weights, width = _past(torch.bmm(self.q.mT, self.k)).mT, slope.shape[2] - (not ones)
        of_value = torch.bmm(weights, slope[..., :width])
        return self.by_head(of_value.baddbmm_(self.k.mT, of_sums[..., :width]))


def _by_chunk(x: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """(B, H, K C, E) -> (B G K, R C, E); shape: B, G, K, C."""
    x = x.unflatten(1, (shape[1], -1)).unflatten(3, shape[2:])
    return x.transpose(2, 3).flatten(0, 2).flatten(1, 2)


def _rows(x: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """(B, H, K C, m) -> (B G K, m, R C)."""
    x = x.unflatten(1, (shape[1], -1)).unflatten(3, shape[2:])
    return x.permute(0, 1, 3, 5, 2, 4).flatten(0, 2).flatten(2)


def _carry(marks: Tensor) -> Tensor:
    if marks.shape[2] == 2:  # of a single chunk, `_Piece.sums` needs what is left before it
        return (marks[:, :, :1] - finite(marks[:, :, 1:])).exp().mT[..., None]
    now = finite(torch.cat([marks[:, :, 1:], marks[:, :, -1:]], 2))
    return (marks.mT[..., None, :] - now.mT[..., None]).exp().tril_()


def _carried(sums: Tensor, carry: Tensor) -> Tensor:
    """(B, G, K + 1, m, E), each a sum over all K + 1."""
    shape = sums.shape
    sums = sums.unflatten(3, (carry.shape[2], -1)).transpose(2, 3).flatten(4)
    return (carry @ sums).transpose(2, 3).reshape(shape)


class _Bidirectional(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, features, lengths, query, key, value, total, top, *params):
        map_q, map_k = feature_maps(features, query, key, params, top.dtype)
        spans, groups = cuts(query.shape[2], sizes(query, features)[-1]), key.shape[1]
        for place in spans:
            (raw, _), reference = map_k(place, lengths), None
            if features.logarithmic:
                higher = torch.maximum(top, raw.amax(2))
                reference = finite(higher)[:, :, None]
                total, top = rescale(total, top, reference[:, :, 0]), higher
            total = total + _exp_key(raw, reference).mT @ _with_one(value, place, top.dtype)
        reference = finite(top)[:, :, None] if features.logarithmic else None
        output, normaliser = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=top.dtype)
        for place in spans:
            read = _group(_exp_query(map_q(place)[0], reference, groups), groups) @ total
            _divide(_ungroup(read, query.shape[1]), features.floor, output[:, :, place], normaliser[:, :, place])
        ctx.features = features
        ctx.save_for_backward(query, key, value, output, normaliser, lengths, total, reference, *params)
        ctx.mark_non_differentiable(total, top)
        return output, total, top

    @staticmethod
    @first_order
    @without_autocast
    def backward(ctx, grad, _, __):
        features = ctx.features
        query, key, value, output, normaliser, lengths, total, reference, *params = ctx.saved_tensors
        map_q, map_k = feature_maps(features, query, key, params, total.dtype, ctx.needs_input_grad[7:])
        spans, groups = cuts(query.shape[2], sizes(query, features)[-1]), key.shape[1]
        grad_value, grad_total = torch.empty_like(value), torch.zeros_like(total)
        for place in spans:
            raw, pull = map_q(place)
            phi = _exp_query(raw, reference, groups)
            slope = _group(_of_quotient(grad, output, normaliser, features.floor, place), groups)
            grad_total += _group(phi, groups).mT @ slope
            of_phi = _ungroup((total @ slope.mT).mT, query.shape[1])
            pull(of_phi.mul_(phi) if features.logarithmic else of_phi)
        for place in spans:
            raw, pull = map_k(place, lengths)
            phi = _exp_key(raw, reference)
            grad_value[:, :, place] = phi @ grad_total[..., :-1]
            of_phi = (grad_total @ _with_one(value, place, total.dtype).mT).mT
            pull(of_phi.mul_(phi) if features.logarithmic else of_phi)
        return None, None, map_q.of_x, map_k.of_x, grad_value, None, None, *map_q.of_params


def _with_one(value: Tensor, place: slice, accurate: torch.dtype) -> Tensor:
    """(B, G, T, D) -> (B, G, T, D + 1): the last column sums up the weights."""
    return pad(value[:, :, place].to(accurate), (0, 1), value=1.0)


def _exp_key(raw: Tensor, reference: Tensor | None) -> Tensor:
    """raw (B, G, K C, m), reference (B, G, K, m)."""
    if reference is None:
        return raw
    raw.unflatten(2, (reference.shape[2], -1)).sub_(reference[:, :, :, None])
    return raw.exp_()


def _exp_query(raw: Tensor, reference: Tensor | None, groups: int) -> Tensor:
    """Over the largest feature, which cancels; raw (B, H, K C, m), reference (B, G, K, m)."""
    if reference is None:
        return raw
    raw.unflatten(1, (groups, -1)).unflatten(3, (reference.shape[2], -1)).add_(reference[:, :, None, :, None])
    return raw.sub_(raw.amax(3, keepdim=True)).exp_()


def _past(weights: Tensor) -> Tensor:
    """(P, R C, C), zeroed in place where the key comes after the query."""
    weights.unflatten(1, (-1, weights.shape[2])).tril_()
    return weights


def _group(x: Tensor, groups: int) -> Tensor:
    """(B, H, T, E) -> (B, G, H / G T, E)."""
    return x.unflatten(1, (groups, -1)).flatten(2, 3)


def _ungroup(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(2, (heads // x.shape[1], -1)).flatten(1, 2)


def _divide(read: Tensor, floor: float, output: Tensor, normaliser: Tensor) -> None:
    """Writes numerator / normaliser; read (B, H, T, D + 1)."""
    given = read[..., -1]
    normaliser.copy_(torch.where(given < 0, given.clamp_max(-floor), given.clamp_min(floor)))
    output.copy_(read[..., :-1].div_(normaliser[..., None]))


def _of_quotient(grad: Tensor, output: Tensor, normaliser: Tensor, floor: float, place: slice) -> Tensor:
    """Gradient (B, H, T, D + 1) of numerator and normaliser from that of their quotient."""
    normaliser = normaliser[:, :, place, None]
    slope = normaliser.new_empty(*normaliser.shape[:3], grad.shape[3] + 1)
    of_numerator = torch.div(grad[:, :, place], normaliser, out=slope[..., :-1])
    of_normaliser = (of_numerator * output[:, :, place]).sum(-1, keepdim=True).neg_()
    slope[..., -1:] = of_normaliser.masked_fill_(normaliser.abs() <= floor, 0)
    return slope
