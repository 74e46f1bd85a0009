"""
One softmax over the union of several key sets, each read by its own fused kernel: the joint softmax.

For disjoint key sets P_1..P_n of a query,  lse_i = logsumexp(scaling q k^T + bias_i over P_i),  lse = logsumexp_i lse_i,
    output = sum_i exp(lse_i - lse) * attention_i.
The backward pass of a part needs only the *joint* output and lse (p = exp(s - lse), ds = p (dp - rowsum(dout * out))), so
nothing of a part's forward is kept (Dao 2022, FlashAttention, section 3.1, used there for tiles and here for key sets).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .precision import first_order, without_autocast

CHUNK = 256  # queries whose mask exists at one time, where a part's mask is a function
AREA = 2**20  # weights of one head that exist at one time, where no fused kernel applies
WEIGHTS = 2**24  # weights of all heads that exist at one time, there, but for those of one group of queries
HUGE = 1e30  # stands for the lse of a query that sees nothing: exp(s - HUGE) = 0


def whole(x: Tensor, fill: float) -> Tensor:
    """`arrange` of a part that takes the queries as they are."""
    return x


def whole_back(x: Tensor, fill: float) -> Tensor:
    """`collect` of a part that takes the queries as they are."""
    return x.unsqueeze(3)


@dataclass(frozen=True)
class Part:
    """
    One key set. key, value: (P, G, L, D), gathered for P groups of queries (P = batch, blocks, tiles, ...): before the
    call, or by gather(x): (B, G, S, D) -> (P, G, L, D), best a view. scatter(sum, x) is its transpose, which adds
    (P, G, L, D) to (B, G, S, D) in place. Tensors that parts share are stored, and their gradients summed, once.

    span: the queries that take part, begin and end (None = N) among the N; arrange and collect know of these alone.

    arrange(x, fill): (B, H, N, E) -> (P, H', T, E) brings queries (and per-query values) to their group; slots that no
        query fills get `fill`. It must be linear in x: reshape, gather, flip.
    collect(x, fill): (P, H', T, E) -> (B, H, N, C, E) is the way back: C results per query, `fill` where there is none.
    causal: query slot t sees key slots 0..t. mask: bool (P or 1, H' or 1, T, L), True = attend, or a function
        (begin, end) -> the mask of these query slots, possibly over a prefix of the keys alone (then not `causal`).
    bias: (H,) added to the part's logits per head (only where arrange leaves the heads in place).
    """

    key: Tensor
    value: Tensor
    arrange: Callable[[Tensor, float], Tensor] = whole
    collect: Callable[[Tensor, float], Tensor] = whole_back
    causal: bool = False
    mask: Tensor | Callable[[int, int], Tensor] | None = None
    bias: Tensor | None = None
    gather: Callable[[Tensor], Tensor] | None = None
    scatter: Callable[[Tensor, Tensor], None] | None = None
    span: tuple[int, int | None] = (0, None)

    @staticmethod
    def of_slots(key: Tensor, value: Tensor, first: int, last: int, span: tuple[int, int], mask=None) -> Part:
        """The keys first..last-1, read where they lie by the queries `span`."""

        def add(total: Tensor, x: Tensor) -> None:
            total[:, :, first:last] += x

        return Part(key, value, gather=lambda x: x[:, :, first:last], scatter=add, mask=mask, span=span)

    def accumulate(self, output, total, query, key, value, bias, scaling, dropout):
        """
        Joins this part to what earlier parts gave its span: output (B, H, N, D) and total (B, H, N), their lse, both
        float32 or better and free to be overwritten, or None where there is nothing yet. Returns both, and what
        `differentiate` will ask for.
        """
        accurate = torch.promote_types(query.dtype, torch.float32)
        key, value = self._gathered(key, value)
        out, lse, kept = _forward(self.arrange(query, 0.0), key, value, self, scaling, dropout)
        if bias is not None:
            lse = lse + bias.detach()[:, None]
        outs = self.collect(out, 0.0).to(accurate)
        lses = self.collect(lse[..., None], float("-inf"))[..., 0].to(accurate)
        saved = (kept, None if bias is None else (outs[..., 0, :], lses[..., 0]))
        if output is None and bias is None and lses.shape[-1] == 1:
            return outs[..., 0, :], lses[..., 0], saved
        if output is None:
            output, total = torch.zeros_like(outs[..., 0, :]), torch.full_like(lses[..., 0], float("-inf"))
        for c in range(lses.shape[-1]):
            joined = log_add(total, lses[..., c])
            safe = joined.masked_fill(joined == float("-inf"), 0.0)
            output.mul_(torch.exp(total - safe)[..., None])
            output.addcmul_(outs[..., c, :], torch.exp(lses[..., c] - safe)[..., None])
            total = joined
        return output, total, saved

    def differentiate(self, grad, output, total, query, key, value, bias, scaling, dropout, saved):
        """
        The gradients of query, the gathered key and value, and bias, from the joint output and its total lse; of all
        that is per query the part's span.
        """
        kept, own = saved
        lse = self.arrange(total[..., None], HUGE)[..., 0]
        if bias is not None:
            lse = lse - bias[:, None]
        key, value = self._gathered(key, value)
        dq, dk, dv = _backward(
            self.arrange(grad, 0.0), self.arrange(query, 0.0), key, value, self.arrange(output, 0.0), lse, self,
            scaling, dropout, kept,
        )  # fmt: skip
        back = self.collect(dq, 0.0)
        dbias = None
        if bias is not None:
            weight = torch.exp(own[1] - total)
            dbias = (weight * ((own[0] - output) * grad).sum(-1)).sum((0, 2)).to(bias.dtype)
        return back[..., 0, :] if back.shape[3] == 1 else back.sum(3), dk, dv, dbias

    def _gathered(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return (key, value) if self.gather is None else (self.gather(key), self.gather(value))


@torch.compiler.disable
def joint_attention(query: Tensor, parts: list[Part], *, scaling: float, dropout: float = 0.0) -> Tensor:
    """
    query (B, H, N, D) -> (B, H, N, D), one softmax over all parts; zeros for a query that sees no key.

    The key sets of a query must be disjoint. Half precision is accumulated over parts in float32.
    """
    return joint_attention_and_lse(query, parts, scaling=scaling, dropout=dropout)[0]


@torch.compiler.disable
def joint_attention_and_lse(
    query: Tensor, parts: list[Part], *, scaling: float, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """As `joint_attention`, and the log-sum-exp (B, H, N) of each query's logits, -inf where it sees no key."""
    tensors, slots, index = [], {}, []
    for part in parts:
        for x in (part.key, part.value, part.bias):
            if id(x) not in slots:
                slots[id(x)] = len(tensors)
                tensors.append(x if x is None or x is part.bias else x.to(query.dtype))
            index.append(slots[id(x)])
    placed = list(zip(parts, index[0::3], index[1::3], index[2::3], strict=True))
    return _Joint.apply(query, scaling, dropout, placed, *tensors)


class _Joint(torch.autograd.Function):
    """`parts`: each part with the places of its key, value and bias in `tensors`."""

    @staticmethod
    @without_autocast
    def forward(ctx, query, scaling, dropout, parts, *tensors):
        n, done, kept = query.shape[2], [], []
        output = total = None
        for part, *places in parts:
            begin, end = part.span[0], n if part.span[1] is None else part.span[1]
            fresh = all(end <= first or last <= begin for first, last in done)
            done.append((begin, end))
            earlier = (None, None) if fresh else (output[:, :, begin:end], total[:, :, begin:end])
            out, lse, saved = part.accumulate(
                *earlier, query[:, :, begin:end], *(tensors[i] for i in places), scaling, dropout
            )
            kept.append(saved)
            if end - begin == n:
                output, total = out, lse
                continue
            if output is None:
                output, total = out.new_zeros(query.shape), lse.new_full(query.shape[:3], float("-inf"))
            total[:, :, begin:end] = lse
            if out is not earlier[0]:
                output[:, :, begin:end] = out
        output = output.to(query.dtype)
        ctx.save_for_backward(query, output, total, *tensors)
        ctx.parts, ctx.scaling, ctx.dropout, ctx.kept = parts, scaling, dropout, kept
        ctx.set_materialize_grads(False)
        return output, total

    @staticmethod
    @first_order
    @without_autocast
    def backward(ctx, grad, of_lse):
        query, output, total, *tensors = ctx.saved_tensors
        dtypes, n = [x if x is None else x.dtype for x in (query, *tensors)], query.shape[2]
        grad = torch.zeros_like(output) if grad is None else grad.contiguous()
        if of_lse is not None:
            query, grad, output, *tensors = (
                x if x is None else x.to(total.dtype) for x in (query, grad, output, *tensors)
            )
            grad, output = _with_gradient_of_lse(grad, output, of_lse)
        total = total.masked_fill(total == float("-inf"), HUGE)
        grad_query, grads = None, [None] * len(tensors)
        for (part, *places), saved in zip(ctx.parts, ctx.kept, strict=True):
            begin, end = part.span[0], n if part.span[1] is None else part.span[1]
            per_query = (x[:, :, begin:end] for x in (grad, output, total, query))
            dq, *others = part.differentiate(*per_query, *(tensors[i] for i in places), ctx.scaling, ctx.dropout, saved)
            if grad_query is None and end - begin == n:
                grad_query = dq.to(total.dtype)
            else:
                grad_query = torch.zeros_like(query, dtype=total.dtype) if grad_query is None else grad_query
                grad_query[:, :, begin:end] += dq
            for place, given, into in zip(places, others, (part.scatter, part.scatter, None), strict=True):
                if given is None:
                    continue
                if into is not None:
                    if grads[place] is None:
                        grads[place] = torch.zeros_like(tensors[place], dtype=total.dtype)
                    into(grads[place], given)
                elif grads[place] is None:
                    grads[place] = given
                else:
                    grads[place] = grads[place] + given
        grads = [g if g is None else g.to(dtype) for g, dtype in zip([grad_query, *grads], dtypes, strict=True)]
        return grads[0], None, None, None, *grads[1:]


def log_add(a: Tensor, b: Tensor) -> Tensor:
    """log(exp(a) + exp(b)), which ONNX would compute as it is written and overflow."""
    if not torch.compiler.is_exporting():
        return torch.logaddexp(a, b)
    high = torch.maximum(a, b)
    return torch.where(high == float("-inf"), high, high + torch.log1p(torch.exp(torch.minimum(a, b) - high)))


def _with_gradient_of_lse(grad: Tensor, output: Tensor, of_lse: Tensor) -> tuple[Tensor, Tensor]:
    """
    ds = p (dp - rowsum(dout * out) + dlse): parts learn of dlse by a stand-in for the output, with rowsum(dout * out) - dlse
    in place of rowsum(dout * out), which is all they ask it for. It differs where dout is largest.
    """
    place = grad.abs().argmax(-1, keepdim=True)
    largest, least = grad.gather(-1, place), torch.finfo(grad.dtype).tiny ** 0.5
    largest = torch.where(largest.abs() < least, least, largest)  # of no weight in dv
    changed = output.gather(-1, place) - of_lse[..., None] / largest
    return grad.scatter(-1, place, largest), output.scatter(-1, place, changed)


def _slices(part: Part, length: int, size: int, fused: bool):
    """(query slice, its mask or None, whether causal) for all queries; a mask may cover a prefix of the keys."""
    mask, causal = part.mask, part.causal
    if not callable(mask) and (fused or length <= CHUNK or length * size <= AREA):
        yield slice(0, length), mask, causal
        return
    for begin in range(0, length, CHUNK):
        end = min(begin + CHUNK, length)
        if callable(mask):
            yield slice(begin, end), mask(begin, end), False
            continue
        piece = mask if mask is None or mask.shape[2] == 1 else mask[:, :, begin:end]
        if causal:
            keys, queries = (torch.arange(*x, device=part.key.device) for x in ((min(end, size),), (begin, end)))
            past = keys <= queries[:, None]
            piece = past[None, None] if piece is None else piece[..., : len(keys)] & past
        yield slice(begin, end), piece, False


def _fused(query: Tensor, dropout: float) -> bool:
    return query.device.type == "cpu" and dropout == 0.0 and not torch.compiler.is_exporting()


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """
    0 where `mask`, else -inf: 1 - 1 / mask, in place, which is several times faster than a fill. Contiguous: a
    mask whose last axis is not the innermost would be spread out to queries x keys by the kernel.
    """
    if mask is None:
        return None
    return mask.to(dtype, memory_format=torch.contiguous_format).reciprocal_().neg_().add_(1)


def _forward(query, key, value, part, scaling, dropout):
    """-> attention (P, H, T, D), its lse (P, H, T), and the dropout masks that the backward pass needs."""
    outs, lses, kept = [], [], []
    fused = _fused(query, dropout)
    for piece, mask, causal in _slices(part, query.shape[2], key.shape[2], fused):
        q, k, v = query[:, :, piece], key, value
        if mask is not None and mask.shape[-1] < key.shape[2]:
            k, v = key[:, :, : mask.shape[-1]], value[:, :, : mask.shape[-1]]
        if k.shape[2] == 0 or q.numel() == 0:
            out, lse, keep = torch.zeros_like(q), q.new_full(q.shape[:3], float("-inf")), None
        elif fused:
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, causal, attn_mask=_additive(mask, q.dtype), scale=scaling
            )
            keep = None
        else:
            found = [_math_forward(*x, causal, scaling, dropout) for x in _groups(q, k, v, mask)]
            *found, keep = zip(*found, strict=True)
            out, lse = (torch.cat(x) for x in found)
        if mask is not None and mask.shape[-1]:
            lse = lse.masked_fill(mask.to(torch.uint8).amax(-1) == 0, float("-inf"))  # `any` is ten times slower
        outs.append(out)
        lses.append(lse)
        kept.append(keep)
    return (outs[0], lses[0], kept) if len(outs) == 1 else (torch.cat(outs, 2), torch.cat(lses, 2), kept)


def _backward(grad, query, key, value, output, lse, part, scaling, dropout, kept):
    dqs, dk, dv = [], None, None
    fused = _fused(query, dropout)
    pieces = _slices(part, query.shape[2], key.shape[2], fused)
    for (piece, mask, causal), keep in zip(pieces, kept, strict=True):
        q, k, v = query[:, :, piece], key, value
        if mask is not None and mask.shape[-1] < key.shape[2]:
            k, v = key[:, :, : mask.shape[-1]], value[:, :, : mask.shape[-1]]
        g, o, stat = grad[:, :, piece], output[:, :, piece], lse[:, :, piece]
        if k.shape[2] == 0 or q.numel() == 0:
            dqs.append(torch.zeros_like(q))
            continue
        if fused:
            stat = stat.to(torch.promote_types(q.dtype, torch.float32)).transpose(1, 2).contiguous().transpose(1, 2)
            dq, dk1, dv1 = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                g, q, k, v, o, stat, 0.0, causal, attn_mask=_additive(mask, q.dtype), scale=scaling
            )
        else:
            groups = zip(_groups(q, k, v, mask, g, o, stat), keep, strict=True)
            found = [_math_backward(*x, causal, scaling, kept, dropout) for x, kept in groups]
            dq, dk1, dv1 = (torch.cat(x) for x in zip(*found, strict=True))
        dqs.append(dq)
        if dk is None and k is key:
            dk, dv = dk1, dv1
        else:
            if dk is None:
                dk, dv = torch.zeros_like(key), torch.zeros_like(value)
            dk[:, :, : k.shape[2]] += dk1
            dv[:, :, : k.shape[2]] += dv1
    if dk is None:
        dk, dv = torch.zeros_like(key), torch.zeros_like(value)
    return dqs[0] if len(dqs) == 1 else torch.cat(dqs, 2), dk, dv


def _groups(query: Tensor, key: Tensor, *others: Tensor | None) -> Iterator[tuple[Tensor | None, ...]]:
    """Of tensors of P groups of queries, or of one that is the same for all, some groups at a time."""
    size = max(1, WEIGHTS // (query.shape[1:3].numel() * key.shape[2]))
    for begin in range(0, len(query), size):
        given = query, key, *others
        yield tuple(x if x is None or len(x) < len(query) else x[begin : begin + size] for x in given)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(P, H, T, E) -> (P, G, H/G * T, E): the query heads of a key head side by side."""
    return x.reshape(x.shape[0], groups, -1, x.shape[3])


def _products(query: Tensor, key: Tensor) -> Tensor:
    """
    (P, H, T, L), float32 or better: what all keys have in common makes products large, and rounded to half precision they would
    lose what tells keys apart, or overflow.
    """
    accurate = torch.promote_types(query.dtype, torch.float32)
    products = _grouped(query.to(accurate), key.shape[1]) @ key.to(accurate).transpose(2, 3)
    return products.view(*query.shape[:3], key.shape[2])


def _logits(query, key, mask, causal, scaling):
    scores = _products(query, key).mul_(scaling)
    if causal:
        t, s = scores.shape[2:]
        hidden = torch.ones(t, s, dtype=torch.bool, device=query.device).triu_(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores if mask is None else scores.masked_fill(~mask, float("-inf"))


def _math_forward(query, key, value, mask, causal, scaling, dropout):
    scores = _logits(query, key, mask, causal, scaling)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), HUGE)[..., None])
    keep = None
    if dropout:
        keep = torch.rand_like(weights) >= dropout
        weights = weights * keep / (1 - dropout)
    out = _grouped(weights.to(value.dtype), key.shape[1]) @ value
    return out.view(query.shape), lse, keep


def _math_backward(query, key, value, mask, grad, output, lse, causal, scaling, keep, dropout):
    g = key.shape[1]
    accurate = torch.promote_types(query.dtype, torch.float32)
    weights = torch.exp(_logits(query, key, mask, causal, scaling) - lse.to(accurate)[..., None])
    dropped = weights if keep is None else weights * keep / (1 - dropout)
    dv = _grouped(dropped.to(grad.dtype), g).transpose(2, 3) @ _grouped(grad, g)
    dweights = _products(grad, value)
    if keep is not None:
        dweights = dweights * keep / (1 - dropout)
    delta = (grad.to(accurate) * output.to(accurate)).sum(-1, keepdim=True)
    dscores = (_grouped(weights * (dweights - delta), g) * scaling).to(query.dtype)
    dq = (dscores @ key).view(query.shape)
    return dq, dscores.transpose(2, 3) @ _grouped(query, g), dv
