"""
Queries that each choose their own key blocks, as one part of a joint softmax.

For the chosen pairs (i, J) of query i and key block J, with r_i the log-sum-exp of the parts read before,
    w_ij = exp(scaling q_i k_j - r_i),    output_i <- (output_i + sum_J w_iJ v_J) / (1 + sum_J sum_j w_ij),    j in J.
Copying every query's blocks side by side would cost N x blocks x block_size x D. Turned around (Lu 2025, MoBA,
arXiv:2502.13189), the pairs are sorted by block, and the queries that chose a block are multiplied with it at once: a
query is copied once per pair and a key block once, some megabytes at a time. Cost: pairs x block_size x D.
On a CPU in float32 a kernel does it (kernels/chosen_blocks.c), elsewhere batched products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from .joint import HUGE

SLOTS = {"cpu": 3072, "cuda": 2**18}  # queries copied at one time
SAFE = 1e25  # a sum of weights up to here overflows nothing; beyond, r_i is raised to the largest logit


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
    @torch.compiler.disable
    def of(key: Tensor, value: Tensor, block_size: int, chosen: Tensor, valid: Tensor, used: Tensor | None = None):
        """chosen: (B, H, N, C) int64, blocks of the query's row, each once; valid: alike, bool, which of them count."""
        batch, groups, size = key.shape[:3]
        count, heads, device = size // block_size, chosen.shape[1], key.device
        owner = torch.arange(batch * groups, device=device).repeat_interleave(heads // groups).view(batch, heads, 1, 1)
        block = torch.where(valid, chosen + count * owner, batch * groups * count).flatten()
        queries = torch.argsort(block.to(torch.int32), stable=True).div_(chosen.shape[3], rounding_mode="floor")
        counts = torch.bincount(block, minlength=batch * groups * count + 1)[:-1]
        return ChosenBlocks(key, value, block_size, queries, counts, chosen.shape[:3].numel(), used)

    @cached_property
    def tiles(self) -> list[tuple[Tensor, Tensor]]:
        """
        The pairs as queries (n, T) int64 and blocks (n,) int64: all queries of a line read one block. `rows` stands in a
        slot that no query fills.
        """
        device, block_size = self.key.device, self.block_size
        # Lines of at most `most` queries, the longest first, so that those of one tile are about as long.
        most = SLOTS.get(device.type, SLOTS["cuda"])
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
        kernel = self._kernel(queries, dropout)
        if kernel is not None:
            given = [queries, keys, values, grads], [total.contiguous(), delta], [dq, dk, dv]
            self._run(kernel.chosen_blocks_backward, *given, scaling)
        delta, reference, space = _extended(-delta, 0.0), _extended(-total, -HUGE), _Space(queries)
        for c, (rows, blocks) in enumerate(self.tiles if kernel is None else ()):
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
        kernel = self._kernel(queries, dropout)
        if kernel is not None:
            given = [queries, keys, values], [reference.contiguous()], [joined, sums]
            self._run(kernel.chosen_blocks_forward, *given, scaling)
            return joined, sums, kept
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

    def _kernel(self, queries: Tensor, dropout: float) -> Any:
        """The compiled kernels, where they can do this, or None."""
        sizes = (queries.shape[1], self.block_size)
        fits = all(size % 16 == 0 and size <= 256 for size in sizes)
        if dropout or not fits or queries.dtype is not torch.float32 or queries.device.type != "cpu":
            return None
        return kernels.load("chosen_blocks")

    def _run(self, function: Any, tables: list[Tensor], per_query: list[Tensor], results: list[Tensor], scaling: float):
        """One job for each row's key/value head, whose queries and blocks no other reads."""
        batch, groups, size = self.key.shape[:3]
        block = torch.arange(len(self.counts))
        start = torch.cat([block[:1], self.counts.cumsum(0)])
        used = None if self.used is None else self.used[:, None].expand(-1, groups, -1).contiguous()
        tables, lines = [x.contiguous() for x in tables], size // self.block_size

        def job(i: int) -> None:
            kernels.call(
                function, *tables, self.queries, start, block, i * lines, (i + 1) * lines, self.block_size,
                tables[0].shape[1], float(scaling), *per_query, used, *results,
            )  # fmt: skip

        kernels.in_parallel(job, range(batch * groups))

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
