"""
`sinkhorn`: blocks of b tokens; block i attends to itself and to a partner, the mixture of other blocks that a learned sorting
of blocks brings beside it, in one softmax:

    partner_i[t] = sum_j S_ij block_j[t]  (keys and values),   S = Sinkhorn(scaling / temperature x_i . W c_j),

with x_i pooled from queries, c_j the mean key of block j, W (D, D) learned per key/value head. Sinkhorn normalises log S over
rows and over columns, `iterations` times, and over rows at last.

Paper: Tay et al. 2020, Sparse Sinkhorn Attention, arXiv:2002.11296. Cost 2 N b for attention and N^2 / b for scores and
mixtures; scores are made in chunks and never stored. Dense limit: one block covers.

Encoder: x_i is the mean query of block i, of its group's query heads; partners are the blocks j != i. Decoder: x_i is block
i's first query, partners are the complete blocks j < i, and the column sum that divides (i, j) runs over the rows up to i,
a cumulative log-sum-exp: what comes later moves nothing. Block 0 has no partner. A row's last block may be shorter; where it
has no token t it leaves the mixture, and the other weights are renormalised. Decoder state: keys and values, O(N), the mean
key of every complete block, one column log-sum-exp per block and iteration, and the partner of the current block.

W starts as the identity, so that the untrained mixture prefers blocks whose mean key fits the block's queries.

From the paper: its sorting network maps a block to one weight per block by a matrix of fixed width, which fixes the length;
the bilinear form takes any. A block is never its own partner, so no key counts twice. The Gumbel noise of training is left
out. Sinks are ours (Xiao et al. 2023, arXiv:2309.17453), `num_sinks=0` is the plain form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from ..caching import AttentionState, Count, TokenStore, column, take
from ..config import EfficientAttentionConfig, option
from ..ops.exact import exact_attention
from ..ops.grain import at_once
from ..ops.joint import Part, joint_attention
from ..ops.local import Blocks, Segments, in_ranges, local_decoder, remember
from ..ops.precision import first_order, without_autocast
from ..ops.ranges import Tile, has_kernel, range_attention, range_decoder
from ..ops.rows import shift
from ..registry import get_config_class, register_variant
from ..variant import EfficientAttention, HostShape

SCORES = 2**16  # scores of block pairs that exist at one time on a CPU
NEVER = -1e30  # log weight of what is no partner; finite, so that differences of it are


@dataclass(kw_only=True)
class SinkhornConfig(EfficientAttentionConfig):
    """Hyper-parameters of `sinkhorn`."""

    block_size: int = option(256, "tokens per block", minimum=1)
    iterations: int = option(8, "normalisations over rows and columns, before the last one over rows", minimum=0)
    temperature: float = option(
        0.75, "divides the scores of block pairs; lower is closer to a permutation", minimum=1e-3
    )
    num_sinks: int = option(4, "first tokens that every later one sees, in decoders", minimum=0)

    def validate(self) -> None:
        if self.num_sinks > self.block_size:
            raise ValueError(
                f"SinkhornConfig.num_sinks = {self.num_sinks} must be at most block_size = {self.block_size}: sinks are the "
                "first tokens of the first block."
            )

    @classmethod
    def tiny(cls, causal: bool) -> SinkhornConfig:
        return cls(block_size=4, iterations=3, num_sinks=2)

    @classmethod
    def variations(cls, causal: bool) -> list[SinkhornConfig]:
        return [cls(block_size=4, num_sinks=0), cls(block_size=3, iterations=0, temperature=0.2, num_sinks=3)]

    @classmethod
    def dense_limit(cls, length: int, causal: bool) -> SinkhornConfig:
        return cls(block_size=max(length, 1))

    def window_only(self, causal: bool) -> EfficientAttentionConfig:
        """The own block and the sinks."""
        return get_config_class("block")(
            block_size=self.block_size, num_sinks=self.num_sinks, dense_below=self.dense_below
        )


@register_variant(
    "sinkhorn",
    family="learnable patterns",
    summary="own block, and a mixture of other blocks that a learned sorting puts beside it",
    paper="Tay 2020, arXiv:2002.11296",
)
class SinkhornAttention(EfficientAttention):
    """`sinkhorn`. b block size, n blocks; block pairs are (row i, column j). `pair` (G, D, D) holds W."""

    config_class = SinkhornConfig
    linear_cost = False

    def __init__(self, config: SinkhornConfig, host: HostShape) -> None:
        super().__init__(config, host)
        self.pair = nn.Parameter(torch.eye(host.head_dim).repeat(host.num_kv_heads, 1, 1))

    def attend(self, query, key, value, *, lengths, scaling, dropout, causal, state, hidden=None) -> Tensor:
        options = {"scaling": scaling, "dropout": dropout}
        if causal:
            return self._decoder(query, key, value, lengths, state, **options)
        return self._encoder(query, key, value, lengths, **options)

    def _encoder(self, query, key, value, lengths, **options) -> Tensor:
        b, (batch, _, n, _) = self.config.block_size, query.shape
        if n <= b:
            return exact_attention(query, key, value, lengths=lengths, causal=False, **options)
        partner_key, partner_value, exists = self._sort(query, key, value, lengths, options["scaling"])
        if has_kernel(query, options["dropout"]):
            bias = query.new_zeros(1, 1, partner_key.shape[2] * b)
            if exists is not None:
                bias = query.new_zeros(exists.shape).masked_fill(~exists, float("-inf")).flatten(1)[:, None]
            tiles = [Tile(i, min(i + b, n), i, min(i + b, n), n, 0, i, i + b) for i in range(0, n, b)]
            slots = partner_key.flatten(2, 3), partner_value.flatten(2, 3)
            return range_attention(query, (key, value), slots, bias, tiles, lengths=lengths, scaling=options["scaling"])
        parts = [_on_partners(partner_key, partner_value, n, b, mask=exists)]
        for blocks in Blocks.cover(batch, 0, n, b):
            used = None
            if lengths is not None:
                used = torch.arange(n, device=key.device) < lengths[:, None]
                used = blocks.windows(used[:, None, :, None], 0, 0).mT
            parts.append(blocks.part(key, value, mask=used))
        return joint_attention(query, parts, **options)

    @torch.compiler.disable
    def _sort(self, query, key, value, lengths, scaling) -> tuple[Tensor, Tensor, Tensor | None]:
        """Partners' keys and values (B, G, n, b, D), and which of their slots exist, (B or 1, n, b) bool or None = all."""
        b, length, device = self.config.block_size, query.shape[2], key.device
        n, whole = -(-length // b), lengths is None and length % b == 0
        query, key, value = (pad(x, (0, 0, 0, n * b - length)) if n * b > length else x for x in (query, key, value))
        length = torch.full((1,), length, device=device) if lengths is None else lengths
        count = ((length + b - 1) // b)[:, None, None]
        ends = length[:, None, None] - (count - 1) * b  # tokens of the row's last block
        index, slot = torch.arange(n, device=device), torch.arange(b, device=device)
        last = index == count - 1

        def partners(rows: Tensor) -> Tensor:
            """(B or 1, 1, C, n): which blocks are partners of these; j is one of i where i is one of j."""
            rows = rows[:, None]
            return ((rows != index) & (rows < count) & (index < count))[:, None]

        def log_sum(x: Tensor, rows: Tensor, y: Tensor, minus: Tensor) -> Tensor:
            """log sum_j exp(x_i . y_j - minus_j) over partners."""
            return (x @ y.mT - minus[:, :, None]).masked_fill(~partners(rows), NEVER).logsumexp(-1)

        def mix(x: Tensor, rows: Tensor, y: Tensor, minus: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
            there = partners(rows)
            logits = (x @ y.mT - minus[:, :, None]).masked_fill(~there, NEVER)
            mixed = [_Partners.apply(logits.softmax(-1) * there, tokens, b, 0) for tokens in (key, value)]
            if whole:
                return mixed
            full = there & ~last[:, None]
            weights = logits.masked_fill(~full, NEVER).softmax(-1) * full
            others, ended = (_Partners.apply(weights, tokens, b, 0) for tokens in (key, value)), slot < ends
            return [torch.where(ended[:, None, :, :, None], *pair) for pair in zip(mixed, others, strict=True)]

        with torch.autocast(device.type, enabled=False):
            accurate = torch.promote_types(key.dtype, torch.float32)
            size = (length[:, None] - index * b).clamp(1, b)[:, None, :, None]
            x, c = (t.unflatten(2, (n, b)).sum(3, dtype=accurate) / size for t in (query, key))
            x = self._rows(x, scaling)
            v = torch.zeros_like(c[..., 0])
            for _ in range(self.config.iterations):  # log S = x c - u - v, of which u and v alone are kept
                u = _in_chunks(log_sum, x, c, v)
                v = _in_chunks(log_sum, c, x, u)
            partner_key, partner_value = _in_chunks(mix, x, c, v, key, value)
        if lengths is None and n > 2:
            return partner_key, partner_value, None
        rows = index[:, None]
        of_two = (count == 2) & ((rows == 1) | ((rows == 0) & (slot < ends)))  # the partner is the one other block
        return partner_key, partner_value, ((count > 2) & (rows < count)) | of_two

    def _rows(self, pooled: Tensor, scaling: float) -> Tensor:
        """(B, H, n, D), a query for each block -> (B, G, n, D), whose product with a mean key is the pair's score."""
        pair = self.pair.to(pooled.dtype) * (scaling / self.config.temperature)
        return pooled.unflatten(1, (len(pair), -1)).mean(2) @ pair

    def _decoder(self, query, key, value, lengths, state, **options) -> Tensor:
        b, n, device = self.config.block_size, query.shape[2], key.device
        start, *partners = self._partners(query, key, value, lengths, state, options["scaling"])
        index = _by_row(start, device) + torch.arange(partners[0].shape[2], device=device)
        done = 0 if state is None else state.count // b  # the block that the first query stands in
        context = remember(state, key, value, Segments(b), num_sinks=0, lengths=lengths)

        slots = partners[0].shape[3]
        if in_ranges(query, context, Segments(b), options["dropout"]):
            flat = tuple(x.flatten(2, 3) for x in partners)

            def seen(exact: Count) -> tuple[Count, Count]:
                block = exact // b
                partner = block - column(start)
                if isinstance(partner, Tensor):  # block 0 has none
                    return partner * slots, (partner + (block > 0)) * slots
                return (partner * slots, (partner + 1) * slots) if partner >= 0 else (0, 0)

            return range_decoder(query, context, Segments(b), flat, None, seen, scaling=options["scaling"])

        def far(position: Count) -> Part:
            if n > b:  # the first query is the first of block `done`
                if isinstance(done, int):
                    return _on_partners(*partners, context.key.shape[2], b, first=start - done)
                return _on_partners(
                    *partners, context.key.shape[2], b, mask=(index > 0)[..., None].expand(-1, -1, slots)
                )

            def own(begin: int, end: int) -> Tensor:
                block = (_by_row(position, device) + torch.arange(begin, end, device=device)) // b
                same = (block[:, :, None] == index[:, None]) & (block > 0)[:, :, None]
                return same.repeat_interleave(slots, -1)[:, None]

            return Part(*(x.flatten(2, 3) for x in partners), mask=own)

        return local_decoder(query, context, Segments(b), far=far, **options)

    @torch.compiler.disable
    def _partners(self, query, key, value, lengths, state, scaling) -> tuple[Count, Tensor, Tensor]:
        """
        A block, and keys and values (B, G, n, b + sinks, D) of the partners of that block and those that follow, as far as
        this call's queries stand in them, the sinks behind each. Leaves in the state what later calls need.

        Where all rows have come equally far, block 0 is left out, which has no partner; else it has zeros.
        """
        b, device, (batch, _, length, _) = self.config.block_size, key.device, query.shape
        count = 0 if state is None else state.count
        ended = count + (length if lengths is None else lengths)
        begun = first = -(-count // b)  # the first block that begins in this call and has a partner
        if isinstance(count, int):
            first = max(begun, 1)
        rows, most = _with_most(-(-ended // b) - first)
        if state is not None:
            buffer = state.store("tokens", TokenStore).extend(key, value, lengths)
            key, value = buffer.key, buffer.value
        with torch.autocast(device.type, enabled=False):
            c = self._mean_keys(key, state, count // b, ended // b - count // b)
            sums = None if state is None else state.entries.get("column_sums")
            if sums is None:
                sums = c.new_empty(*c.shape[:2], self.config.iterations, 0)
            sums = pad(sums, (0, c.shape[2] - sums.shape[3]), value=NEVER)
            number = _by_row(first, device)
            starts = (number + torch.arange(max(most, 0), device=device)) * b - _by_row(count, device)
            x = take(query, starts.clamp_max(length - 1).expand(batch, -1)).to(c.dtype)
            x = self._rows(x, scaling)
            *partners, sums = self._sort_past(x, c, number, _by_row(rows, device), sums, key, value)
        if state is None:
            return first, *partners
        start = first
        held = state.entries.get("partner_key"), state.entries.get("partner_value")
        if not isinstance(count, int):
            start, held = (
                count // b,
                [
                    x.new_zeros(*x.shape[:2], 1, *x.shape[3:]) if h is None else h
                    for h, x in zip(held, partners, strict=True)
                ],
            )
            partners = [_behind(old, new, count % b > 0) for old, new in zip(held, partners, strict=True)]
        elif begun > 1 and count % b:
            start, partners = begun - 1, [torch.cat(pair, 2) for pair in zip(held, partners, strict=True)]
        state.entries["column_sums"] = sums
        if partners[0].shape[2]:
            key, value = (_block(x, (ended - 1) // b - start) for x in partners)
            state.entries.update(partner_key=key, partner_value=value)
        return start, *partners

    def _sort_past(self, x, c, first, rows, sums, key, value) -> tuple[Tensor, Tensor, Tensor]:
        """
        Keys and values (B, G, n, b + sinks, D) of n blocks that begin one after another, and the column sums after them.

        x (B, G, n, D), of which `rows` (B or 1, 1) exist, belongs to block first + 0, 1, ... (B or 1, 1). c (B, G, m, D): mean
        keys of complete blocks. sums (B, G, iterations, m): the log sum of every column after each row step. key, value
        (B, G, S, D): all tokens.
        """
        n, device, sizes = x.shape[2], c.device, (self.config.block_size, self.config.num_sinks)
        index, number, pieces = torch.arange(c.shape[2], device=device), torch.arange(n, device=device), []
        if not len(index) or not n:
            empty = key.new_zeros(*key.shape[:2], n, sum(sizes), key.shape[3])
            return empty, empty, sums

        def mix(x: Tensor, number: Tensor, sums: Tensor, c: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
            there = ((index < (first + number)[..., None]) & (number < rows)[..., None])[:, None]
            log_s, after = (x @ c.mT).masked_fill(~there, NEVER), []
            for step in range(sums.shape[2]):
                log_s = (log_s - log_s.logsumexp(-1, keepdim=True)).masked_fill(~there, NEVER)
                running = torch.cat([sums[:, :, step, None], log_s], 2).logcumsumexp(2)
                after.append(running[:, :, -1])
                log_s = (log_s - running[:, :, 1:]).masked_fill(~there, NEVER)
            weights = log_s.softmax(-1) * there
            partners = [_Partners.apply(weights, tokens, *sizes) for tokens in (key, value)]
            return [*partners, torch.stack(after, 2) if after else sums]

        for piece in _chunks(x, len(index)):
            *partners, sums = _again(mix, n, x[:, :, piece], number[piece], sums, c, key, value)
            pieces.append(partners)
        key, value = (torch.cat(parts, 2) for parts in zip(*pieces, strict=True))
        return key, value, sums

    def _mean_keys(self, key: Tensor, state: AttentionState | None, done: Count, complete: Count) -> Tensor:
        """
        (B, G, n, D), at least float32, for all complete blocks; `complete` more than the `done` ones of earlier calls.
        key (B, G, S, D): the whole row.
        """
        b, most = self.config.block_size, _with_most(complete)[1]
        new = shift(key, -done * b, most * b).unflatten(2, (most, b))
        new = new.sum(3, dtype=torch.promote_types(key.dtype, torch.float32)) / b
        if state is None:
            return new
        store = state.store("mean_keys", TokenStore)
        store.extend(new, new[..., :0], None if isinstance(complete, int) else complete)
        store.keep_until(_with_most(done + complete)[1])
        return store.entries["key"]


class _Partners(torch.autograd.Function):
    """
    weights (B, G, C, n), tokens (B, G, S, D) -> (B, G, C, b + sinks, D): mixtures of the first n blocks of b tokens, each with
    the first `sinks` tokens behind it. The gradient of `tokens` is written once, where slices would write one each.
    """

    @staticmethod
    @without_autocast
    def forward(ctx, weights, tokens, b, sinks):
        blocks = _Partners.blocks(tokens, weights.shape[3], b).to(weights.dtype)
        partners = (weights @ blocks).to(tokens.dtype).unflatten(3, (b, -1))  # rounded weights would not sum to 1
        if sinks:
            first = tokens[:, :, None, :sinks].expand(-1, -1, weights.shape[2], -1, -1)
            partners = torch.cat([partners, first], 3)
        ctx.save_for_backward(weights, tokens)
        ctx.b = b
        return partners

    @staticmethod
    @first_order
    @without_autocast
    def backward(ctx, grad):
        weights, tokens = ctx.saved_tensors
        n, b = weights.shape[3], ctx.b
        of_mixtures, of_sinks = grad[..., :b, :].flatten(3).to(weights.dtype), grad[..., b:, :].sum(2)
        of_weights = of_mixtures @ _Partners.blocks(tokens, n, b).mT.to(weights.dtype)
        of_tokens = (weights.mT @ of_mixtures).to(tokens.dtype).view(*tokens.shape[:2], n * b, -1)
        if n * b < tokens.shape[2]:
            of_tokens = pad(of_tokens, (0, 0, 0, tokens.shape[2] - n * b))
        of_tokens[:, :, : of_sinks.shape[2]] += of_sinks
        return of_weights, of_tokens, None, None

    @staticmethod
    def blocks(tokens: Tensor, n: int, b: int) -> Tensor:
        """(B, G, n, b D)."""
        return tokens[:, :, : n * b].unflatten(2, (n, b)).flatten(3)


def _by_row(count: Count, device: torch.device) -> Tensor:
    """(B or 1, 1)."""
    return torch.as_tensor(count, device=device).view(-1, 1)


def _chunks(x: Tensor, columns: int) -> list[slice]:
    """Slices of the rows (B, G, n, D) that have about `SCORES` scores."""
    size = max(1, at_once(SCORES, x.device) // (x.shape[0] * x.shape[1] * columns))
    return [slice(begin, min(begin + size, x.shape[2])) for begin in range(0, x.shape[2], size)]


def _again(function: Callable, rows: int, x: Tensor, *args):
    """function(x, ...), which a backward pass computes again if x is not all `rows` rows, so that no scores are kept."""
    if x.shape[2] == rows or not torch.is_grad_enabled():
        return function(x, *args)
    return checkpoint(function, x, *args, use_reentrant=False, preserve_rng_state=False)


def _in_chunks(function: Callable, x: Tensor, c: Tensor, *args):
    """function(some rows of x, their numbers, c, ...) for all rows; it returns (B, G, rows, ...) or several of these."""
    index, n = torch.arange(x.shape[2], device=x.device), x.shape[2]
    pieces = [_again(function, n, x[:, :, piece], index[piece], c, *args) for piece in _chunks(x, c.shape[2])]
    if isinstance(pieces[0], Tensor):
        return torch.cat(pieces, 2)
    return [torch.cat(parts, 2) for parts in zip(*pieces, strict=True)]


def _on_partners(key, value, length: int, b: int, first: int = 0, mask: Tensor | None = None) -> Part:
    """
    key, value (B, G, n, slots, D): what n blocks of b queries see, the first of which has number `first` among the blocks
    that `length` queries fill. mask: (B or 1, n, slots) bool, which slots exist, or None = all.
    """
    batch, _, n, slots, _ = key.shape
    missing = (first + n) * b - length  # queries of the last block; fewer than none where rows end earlier than others

    def arrange(x: Tensor, fill: float) -> Tensor:
        x = pad(x, (0, 0, 0, missing), value=fill) if missing else x
        return x.unflatten(2, (n, b)).transpose(1, 2).flatten(0, 1)

    def collect(x: Tensor, fill: float) -> Tensor:
        x = x.unflatten(0, (batch, n)).transpose(1, 2).flatten(2, 3)
        return (pad(x, (0, 0, 0, -missing), value=fill) if missing else x).unsqueeze(3)

    if mask is not None:
        mask = mask.expand(batch, -1, -1).reshape(-1, 1, 1, slots)
    key, value = (x.transpose(1, 2).flatten(0, 1) for x in (key, value))
    return Part(key, value, arrange, collect, mask=mask, span=(first * b, None))


def _with_most(count: Count) -> tuple[Count, int]:
    """A count, and the largest over rows."""
    return (count, count) if isinstance(count, int) else (count, int(count.max()))


def _behind(old: Tensor, new: Tensor, begun: Tensor) -> Tensor:
    """`old` (B, G, 1, b, D), then `new` (B, G, n, b, D), in rows where something was `begun` (B,); elsewhere `new` alone."""
    if not new.shape[2]:
        return old
    new = shift(new.flatten(3), begun.long(), new.shape[2] + 1).unflatten(3, new.shape[3:])
    return torch.cat([torch.where(begun.view(-1, 1, 1, 1, 1), old, new[:, :, :1]), new[:, :, 1:]], 2)


def _block(x: Tensor, number: Count) -> Tensor:
    """(B, G, n, b, D) -> (B, G, 1, b, D): each row's block `number` (int or (B,))."""
    if isinstance(number, int):
        return x[:, :, number, None]
    return take(x.flatten(3), number.clamp_min(0)[:, None]).unflatten(3, x.shape[3:])
