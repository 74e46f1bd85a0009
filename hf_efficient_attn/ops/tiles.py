"""
Softmax attention in which queries read the key block they stand in and blocks of their own choice.

With pairs (i, J) of query i and a chosen block J, and r_i the log-sum-exp of what is read before, the own block,
    w_ij = exp(scaling q_i k_j - r_i),    output_i <- (output_i + sum_J w_iJ v_J) / (1 + sum_J sum_j w_ij),    j in J.
Copying every query's blocks side by side would cost N x blocks x block_size x D. Turned around (Lu 2025, MoBA,
arXiv:2502.13189), the pairs are sorted by block, and the queries that chose a block are multiplied with it at once: a
query is copied once per pair and a key block once, some megabytes at a time. Cost: pairs x block_size x D.
On a CPU a kernel does it, in float32 (kernels/chosen_blocks.c), elsewhere batched products, as a part of a joint softmax.

Letters: B batch, H query heads, G key/value heads, L slots of queries, M of keys, both whole blocks, D head size, C
chosen blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import kernels
from ..caching import Count, column
from .exact import sdpa
from .grain import at_once, has_price
from .joint import HUGE, joint_attention
from .local import Blocks
from .precision import first_order, without_autocast
from .rows import shift

SCORES = 2**16  # scores that exist at one time on a CPU
FEW = 8  # queries that are not worth a call for each head
COPIED = 2**24  # numbers of keys that are copied at one time where all shapes are fixed
SLOTS = 3072  # queries copied at one time on a CPU
SAFE = 1e25  # a sum of weights up to here overflows nothing; beyond, r_i is raised to the largest logit


@torch.compiler.disable
def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_size: int,
    chosen: Tensor,
    valid: Tensor,
    own: Count,
    *,
    causal: bool,
    used: Tensor | None,
    scaling: float,
    dropout: float,
) -> Tensor:
    """
    query (B, H, L, D), key and value (B, G, M, D) -> (B, H, L, D). Slot i of the queries stands in block own + i //
    block_size, which it reads up to itself where `causal`. own: an int or (B,).

    chosen: (B, H or G, L / w, C) int64, what w successive queries read besides, each block once and not their own; valid:
    alike, bool, which of them count. used: (B, M) bool, which keys exist, or None where all do.
    """
    if torch.compiler.is_exporting():
        options = {"causal": causal, "used": used, "scaling": scaling, "dropout": dropout}
        return _side_by_side(query, key, value, block_size, chosen, valid, own, **options)
    if _fits(query, block_size, dropout):
        owns = own.tolist() if isinstance(own, Tensor) else [own] * len(query)
        plan = _Plan(kernels.load("chosen_blocks"), block_size, owns, causal, used, float(scaling))
        return _Blocks.apply(plan, query, key, value, chosen, valid)
    own_key, own_value = (shift(x, -own * block_size, query.shape[2]) for x in (key, value))
    count, mask = query.shape[2] // block_size, None
    if used is not None:
        there = shift(used[:, None, :, None].to(query.dtype), -own * block_size, query.shape[2])
        mask = there.bool().reshape(-1, 1, 1, block_size)
    parts = [Blocks(len(query), 0, count, block_size).part(own_key, own_value, causal=causal, mask=mask)]
    if chosen.shape[3]:
        parts.append(ChosenBlocks.of(key, value, block_size, chosen, valid, query.shape, used))
    return joint_attention(query, parts, scaling=scaling, dropout=dropout)


def _side_by_side(query, key, value, size: int, chosen, valid, own: Count, *, causal, used, scaling, dropout) -> Tensor:
    """As `block_attention`, in shapes that depend on no number: each query's blocks are copied, `COPIED` numbers at a time."""
    (batch, heads, length, dim), (groups, keys) = query.shape, key.shape[1:3]
    lines, device = chosen.shape[2], query.device
    slot = torch.arange(length, device=device).view(lines, -1)
    chosen, valid = (x.repeat_interleave(heads // x.shape[1], 1) for x in (chosen, valid))
    own = (column(own) + slot[None, :, 0] // size)[:, None, :, None].expand(*valid.shape[:3], 1)
    row, group = torch.arange(batch, device=device), torch.arange(heads, device=device) // (heads // groups)
    blocks = torch.cat([own, torch.where(valid, chosen, 0)], 3)
    seen = torch.cat([torch.ones_like(own, dtype=torch.bool), valid], 3)[..., None].expand(*blocks.shape, size)
    if used is not None:
        seen = seen & used.reshape(-1, size)[blocks + keys // size * row.view(-1, 1, 1, 1)]
    blocks = blocks + keys // size * (row[:, None] * groups + group)[..., None, None]
    tables, query = [x.reshape(-1, size * dim) for x in (key, value)], query.unflatten(2, (lines, -1))
    step = max(1, COPIED // (batch * heads * blocks.shape[3] * size * dim))

    def attend(part: Tensor, blocks: Tensor, seen: Tensor, slot: Tensor) -> Tensor:
        seen = seen[:, :, :, None]
        if causal:
            past = torch.arange(size, device=device) <= slot[..., None] % size
            rest = seen[..., 1:, :].expand(-1, -1, -1, past.shape[3], -1, -1)
            seen = torch.cat([seen[..., :1, :] & past[..., None, :], rest], 4)
        copies = (x[blocks.flatten()].view(batch, heads * part.shape[2], -1, dim) for x in tables)
        mask = seen.flatten(4).flatten(1, 2)
        return sdpa(part.flatten(1, 2), *copies, mask=mask, scaling=scaling, dropout=dropout).view(part.shape)

    pieces = (x.split(step, 2) for x in (query, blocks, seen, slot[None, None]))
    return torch.cat([attend(*piece) for piece in zip(*pieces, strict=True)], 2).flatten(2, 3)


def _fits(query: Tensor, block_size: int, dropout: float) -> bool:
    """Whether the kernel can do this."""
    whole = block_size % kernels.LANES == 0 and block_size <= kernels.WIDEST
    return whole and not dropout and kernels.serving("chosen_blocks", query) is not None


@dataclass(frozen=True)
class _Plan:
    library: Any
    block_size: int
    own: list[int]
    causal: bool
    used: Tensor | None
    scaling: float

    def sort(self, query: Tensor, key: Tensor, chosen: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """The pairs of each row's key/value head by block: queries (B, G, pairs) int32, begins (B, G, blocks + 1) int64."""
        (batch, groups), heads = key.shape[:2], query.shape[1]
        count, width = key.shape[2] // self.block_size, query.shape[2] // chosen.shape[2]
        chosen, valid = chosen.contiguous(), valid.contiguous()
        share = heads // chosen.shape[1]
        most = heads // groups * chosen.shape[2] * chosen.shape[3] * width
        rows = torch.empty(batch, groups, most, dtype=torch.int32)
        start = torch.empty(batch, groups, count + 1, dtype=torch.int64)

        def job(b: int, g: int) -> None:
            own = (x[b, g * chosen.shape[1] // groups :] for x in (chosen, valid))
            sizes = heads // groups, share, chosen.shape[2], chosen.shape[3], width, count
            kernels.call(self.library.sort_pairs, *own, *sizes, rows[b, g], start[b, g])

        kernels.for_each_head(job, batch, groups)
        return rows, start

    def run(
        self,
        function: Any,
        given: Sequence[Tensor],
        pairs: Sequence[Tensor],
        saved: Sequence[Tensor],
        results: Sequence[Tensor],
    ) -> None:
        """The kernel for each key/value head of each row, with what was `saved` and with the `results`, (B, H or G, ...)."""
        (batch, heads, length, dim), (groups, keys) = given[0].shape, given[1].shape[1:3]

        def job(b: int, g: int) -> None:
            own = [kernels.heads_of(x, b, g, groups).float().contiguous() for x in (*given, *saved)]
            sizes = keys // self.block_size, self.own[b], length, heads // groups, self.block_size, dim
            used = None if self.used is None else self.used[b]
            own, more = own[: len(given)], own[len(given) :]
            with kernels.writable(*(kernels.heads_of(x, b, g, groups) for x in results)) as found:
                rest = *(x[b, g] for x in pairs), *sizes, self.scaling, int(self.causal), used
                kernels.call(function, *own, *rest, *more, *found)

        kernels.for_each_head(job, batch, groups)


class _Blocks(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, plan, query, key, value, chosen, valid):
        pairs = plan.sort(query, key, chosen, valid)
        output, (total, sums) = query.new_empty(query.shape), query.new_empty(2, *query.shape[:3], dtype=torch.float32)
        plan.run(plan.library.blocks_forward, (query, key, value), pairs, (), (output, total, sums))
        ctx.plan = plan
        ctx.save_for_backward(query, key, value, *pairs, output, total)
        return output

    @staticmethod
    @first_order
    @without_autocast
    def backward(ctx, grad):
        *given, rows, start, output, total = ctx.saved_tensors
        found = [x.new_empty(x.shape) for x in given]
        saved, results = (output, total, grad), (torch.empty_like(total), *found)
        ctx.plan.run(ctx.plan.library.blocks_backward, given, (rows, start), saved, results)
        return None, *found, None, None


@torch.compiler.disable
@torch.no_grad()
def best_blocks(features: Tensor, summaries: Tensor, own: Tensor, blocks: Tensor | None, picks: int) -> Tensor:
    """
    (B, H, L, picks) int64: for each query the blocks with the largest features . summary, of equal ones the lower; block 0
    always, its own never; `count` or a block that is not open to it where there are no more.

    features (B, H, L, F), summaries (B, G, count, F), float32; own (B or 1, L), the block that a query stands in. blocks: (B
    or 1,), how many are open to queries, or None where those before a query's own are.
    """
    (batch, heads, length, width), (groups, count) = features.shape, summaries.shape[1:3]
    few = length <= FEW and blocks is None
    library = kernels.load("few" if few else "chosen_blocks") if features.device.type == "cpu" else None
    served = library is not None and width % kernels.LANES == 0
    if served and few and picks:
        chosen = torch.empty(batch, heads, length, picks, dtype=torch.int64)
        summaries = kernels.readable(summaries)
        given = features.contiguous(), summaries, *summaries.stride()[:3], own.expand(batch, -1).contiguous()
        sizes = batch * heads, heads, groups, length, count, width, picks
        kernels.call(library.few_choose, *given, *sizes, count, chosen)
        return chosen
    if served and not few and width <= 512 and 0 < picks <= 64:
        features, summaries, own = features.contiguous(), summaries.contiguous(), own.expand(batch, -1).contiguous()
        lasts = [-1] * batch if blocks is None else (blocks.expand(batch) - 1).tolist()
        chosen = torch.empty(batch, heads, length, picks, dtype=torch.int64)

        def job(b: int, h: int) -> None:
            given = features[b, h], summaries[b, h * groups // heads], length, count, width, picks
            kernels.call(library.choose_blocks, *given, own[b], lasts[b], chosen[b, h])

        kernels.for_each_head(job, batch, heads)
        return chosen
    features, chosen = features.unflatten(1, (groups, -1)), []
    own = own[:, None, :, None]
    last = own - 1 if blocks is None else (blocks - 1).view(-1, 1, 1, 1)
    chunk = max(1, at_once(SCORES, features.device) // max(1, batch * heads * count))
    for begin in range(0, length, chunk):
        piece = slice(begin, begin + chunk)
        fixed = blocks is not None or has_price(features.device)
        reach = count if fixed else min(int(own[:, :, piece].max()), count)
        with torch.autocast(features.device.type, enabled=False):
            scores = features[:, :, :, piece].flatten(2, 3) @ summaries[:, :, :reach].transpose(2, 3)
        scores = scores.unflatten(2, (heads // groups, -1)).flatten(1, 2)
        scores[..., :1] = float("inf")
        index = torch.arange(reach, device=features.device)
        closed = (index > last[:, :, piece if blocks is None else slice(None)]) | (index == own[:, :, piece])
        best = largest_places(scores.masked_fill_(closed, float("-inf")), min(picks, reach))
        chosen.append(pad(best, (0, picks - best.shape[3]), value=count))
    return torch.cat(chosen, 2)


def largest_places(scores: Tensor, picks: int) -> Tensor:
    """(..., M) float32, overwritten -> (..., picks) int64, the largest scores; of equal ones the lower index."""
    if torch.compiler.is_exporting():  # ONNX takes the lower index by itself, and has no view of numbers as bits
        return scores.topk(picks, -1).indices
    bits = scores.add_(0.0).view(torch.int32)  # + 0.0: one zero only
    ordered = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits).to(torch.int64)
    index = torch.arange(scores.shape[-1], device=scores.device)
    return (ordered << 32).sub_(index).topk(picks, -1).indices


@dataclass(frozen=True)
class ChosenBlocks:
    """
    key, value: (B, G, M, D), M = blocks x block_size. `used` (B, M) bool: which keys exist, or None where all do.

    Pairs are sorted by block: `queries` (pairs,) int64 lists their queries, numbered (b H + h) N + i, of which the first
    counts[0] read block 0, the next counts[1] block 1, and so on; `counts` is (B G blocks,), a block's number
    (b G + g) blocks + J. `rows` = B H N.
    A part for `joint_attention`; every query with a choice must see a key in an earlier part.
    """

    key: Tensor
    value: Tensor
    block_size: int
    queries: Tensor
    counts: Tensor
    rows: int
    used: Tensor | None = None
    bias: None = None
    scatter: None = None
    span: tuple[int, None] = (0, None)

    @staticmethod
    def of(key, value, block_size: int, chosen: Tensor, valid: Tensor, shape: torch.Size, used: Tensor | None = None):
        """The part of queries of this shape; `chosen`, `valid` and `used` as for `block_attention`."""
        batch, groups, size = key.shape[:3]
        count, heads, device = size // block_size, shape[1], key.device
        chosen, valid = (x.repeat_interleave(heads // x.shape[1], 1) for x in (chosen, valid))
        owner = torch.arange(batch * groups, device=device).repeat_interleave(heads // groups).view(batch, heads, 1, 1)
        block = torch.where(valid, chosen + count * owner, batch * groups * count).flatten()
        queries = torch.argsort(block.to(torch.int32), stable=True).div_(chosen.shape[3], rounding_mode="floor")
        width = shape[2] // chosen.shape[2]
        queries = (queries[:, None] * width + torch.arange(width, device=device)).flatten()
        counts = torch.bincount(block, minlength=batch * groups * count + 1)[:-1] * width
        return ChosenBlocks(key, value, block_size, queries, counts, shape[:3].numel(), used)

    @cached_property
    def tiles(self) -> list[tuple[Tensor, Tensor]]:
        """
        The pairs as queries (n, T) int64 and blocks (n,) int64: all queries of a line read one block. `rows` stands in a
        slot that no query fills.
        """
        device, block_size, dim = self.key.device, self.block_size, self.key.shape[3]
        # Lines of at most `most` queries, the longest first, so that those of one tile are about as long.
        most = at_once(SLOTS * dim, device) // dim
        lines = (self.counts + most - 1) // most
        blocks = torch.repeat_interleave(torch.arange(len(lines), device=device), lines)
        done = (torch.arange(len(blocks), device=device) - (lines.cumsum(0) - lines)[blocks]) * most
        length, order = torch.sort((self.counts[blocks] - done).clamp_max(most), descending=True)
        start, blocks = ((self.counts.cumsum(0) - self.counts)[blocks] + done)[order], blocks[order]
        tiles, lengths, begin = [], length.tolist(), 0
        while begin < len(lengths):
            piece = slice(begin, begin + max(1, most // max(lengths[begin], block_size)))
            slot = torch.arange(lengths[begin], device=device)
            rows = self.queries[(start[piece, None] + slot).clamp_max(len(self.queries) - 1)]
            tiles.append((rows.masked_fill_(slot >= length[piece, None], self.rows), blocks[piece]))
            begin = piece.stop
        return tiles

    def accumulate(self, output, total, query, key, value, bias, scaling, dropout):
        """As `Part.accumulate`."""
        tables = [x.to(total.dtype).reshape(-1, x.shape[3]) for x in (query, key, value)]
        joined, sums, kept = self._weigh(*tables, output, total, scaling, dropout)
        before = 1.0
        if not bool(sums.max() < SAFE):
            reference = total + self._highest(*tables[:2], total, scaling).clamp_min(0).view_as(total)
            before, total = torch.exp(total - reference).nan_to_num(1.0), reference
            joined, sums, kept = self._weigh(*tables, output * before[..., None], total, scaling, dropout)
        sums = sums.view_as(total).add_(before)
        return joined.div_(sums[..., None]), total + sums.log(), kept

    def differentiate(self, grad, output, total, query, key, value, bias, scaling, dropout, kept):
        """As `Part.differentiate`."""
        tables = [x.to(total.dtype).reshape(-1, x.shape[3]) for x in (query, key, value, grad)]
        queries, keys, values, grads = tables
        dq, dk, dv = torch.zeros_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        delta = (grads.view_as(output) * output.to(total.dtype)).sum(-1)
        delta, reference, space = _extended(-delta, 0.0), _extended(-total, -HUGE), _Space(queries)
        for c, (rows, blocks) in enumerate(self.tiles):
            q, rows_read, k = self._copy(space, rows, blocks, queries, keys)
            g = _rows(grads, rows_read, space("g", *q.shape))
            v = _rows(values.view(-1, *k.shape[1:]), blocks, space("v", *k.shape))
            weights = self._logits(space, q, k, _added(reference, rows), blocks, scaling).exp_()
            dropped = weights
            if dropout:
                dropped = weights * kept[c] / (1 - dropout)
                dweights = torch.bmm(g, v.transpose(1, 2), out=space("dweights", *weights.shape))
                dweights.mul_(kept[c]).div_(1 - dropout).add_(_added(delta, rows))
            else:
                out = space("dweights", *weights.shape)
                dweights = torch.baddbmm(_added(delta, rows), g, v.transpose(1, 2), out=out)
            _add(dv, blocks, torch.bmm(dropped.transpose(1, 2), g, out=space("dblock", *k.shape)))
            dlogits = dweights.mul_(weights)
            _add(dk, blocks, torch.bmm(dlogits.transpose(1, 2), q, out=space("dblock", *k.shape)))
            _add(dq, rows_read, torch.bmm(dlogits, k, out=space("out", *q.shape)).flatten(0, 1))
        dq, dk, dv = dq.mul_(scaling).view_as(query), dk.mul_(scaling).view_as(key), dv.view_as(value)
        return dq, dk.to(key.dtype), dv.to(value.dtype), None

    def _weigh(self, queries, keys, values, output, reference, scaling, dropout):
        """output (B, H, N, D) and the weighted values, the sums of weights (rows,), and the dropout masks."""
        joined, sums, kept = output.clone(memory_format=torch.contiguous_format), queries.new_zeros(len(queries)), []
        reference, space = _extended(-reference, -HUGE), _Space(queries)
        for rows, blocks in self.tiles:
            q, rows_read, k = self._copy(space, rows, blocks, queries, keys)
            v = _rows(values.view(-1, *k.shape[1:]), blocks, space("v", *k.shape))
            weights = self._logits(space, q, k, _added(reference, rows), blocks, scaling).exp_()
            sums.index_add_(0, rows_read, weights.sum(-1).flatten())
            if dropout:
                kept.append(torch.rand_like(weights) >= dropout)
                weights.mul_(kept[-1]).div_(1 - dropout)
            weighted = torch.bmm(weights, v, out=space("out", *q.shape))
            _add(joined, rows_read, weighted.flatten(0, 1))
        return joined, sums, kept

    def _highest(self, queries, keys, reference, scaling) -> Tensor:
        """(rows,): the largest logit of each query less its reference, -inf where it chose nothing."""
        highest = queries.new_full((len(queries),), float("-inf"))
        reference, space = _extended(-reference, -HUGE), _Space(queries)
        for rows, blocks in self.tiles:
            q, rows_read, k = self._copy(space, rows, blocks, queries, keys)
            logits = self._logits(space, q, k, _added(reference, rows), blocks, scaling)
            highest.scatter_reduce_(0, rows_read, logits.amax(-1).flatten(), "amax")
        return highest

    def _copy(self, space, rows, blocks, queries, keys):
        """The tile's queries (n, T, D), the rows they were read from (n T,), the tile's keys (n, block_size, D)."""
        rows_read = rows.flatten().clamp_max(len(queries) - 1)
        q = _rows(queries, rows_read, space("q", *rows.shape, queries.shape[1]))
        keys = keys.view(-1, self.block_size, keys.shape[1])
        return q, rows_read, _rows(keys, blocks, space("k", len(blocks), *keys.shape[1:]))

    def _logits(self, space, q, k, added, blocks, scaling) -> Tensor:
        """(n, T, block_size): scaling q k + added (n, T, 1); about -HUGE at keys that do not exist and in unfilled slots."""
        if self.used is not None:
            absent = ~self.used.view(self.used.shape[0], 1, -1, self.block_size)
            absent = absent.expand(-1, self.key.shape[1], -1, -1).flatten(0, 2)[blocks]
            added = added.masked_fill(absent[:, None], -HUGE)
        return torch.baddbmm(added, q, k.transpose(1, 2), alpha=scaling, out=space("weights", *q.shape[:2], k.shape[1]))


class _Space:
    """Tensors of a tile's size that the next tile uses again: memory given back would be paged in anew."""

    def __init__(self, like: Tensor) -> None:
        self.like, self.held = like, {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        size = math.prod(shape)
        if name not in self.held or self.held[name].numel() < size:
            self.held[name] = self.like.new_empty(size)
        return self.held[name][:size].view(shape)


def _rows(table: Tensor, index: Tensor, out: Tensor) -> Tensor:
    torch.index_select(table, 0, index, out=out.view(len(index), *table.shape[1:]))
    return out


def _add(table: Tensor, index: Tensor, x: Tensor) -> None:
    """Adds x (n, ...) to the entries `index` of table, seen as (entries, ...)."""
    table.view(-1, *x.shape[1:]).index_add_(0, index, x)


def _extended(x: Tensor, last: float) -> Tensor:
    """(B, H, N) -> (B H N + 1,)."""
    return torch.cat([x.flatten(), x.new_full((1,), last)])


def _added(table: Tensor, rows: Tensor) -> Tensor:
    """The entries of (B H N + 1,) at rows (n, T) -> (n, T, 1)."""
    return table.index_select(0, rows.flatten()).view(*rows.shape, 1)
