"""
Local attention in tiles: blocks of queries, each with the window of keys around it, in one softmax with a few tokens that
everyone sees: `block`, `sliding_window`, `transformer_xl` and the exact part of other variants.

A pattern (`Segments`, `Band`) says which past keys a decoder's token t sees exactly; sinks, the first positions of the
sequence, join them once they lie outside that range. All tiles have the same mask, since rows are padded behind their real
tokens, and overlapping windows are views, so that the fused kernel reads keys where they lie.

Letters: B batch, H query heads, G key/value heads, N tokens of this call, S slots of the buffer (what a decoder's state
holds, then the new tokens), D head size, b block size, P = B x blocks, w window, d dilation.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..caching import AttentionState, Count, FirstTokens, RecentTokens, take
from .exact import exact_attention, masked_attention, sdpa
from .joint import Part, joint_attention
from .ranges import QUERIES, Tile, has_kernel, range_decoder, range_encoder

TILE = 32, 128  # queries per tile of a band, fewest and most: fewer read less in vain, more make better use of a kernel
FEW = 16  # queries whose mask all layers of a model share


@dataclass(frozen=True)
class Blocks:
    """`count` blocks of `size` queries (B, H, count size, E); the first one begins at slot `start` of the keys."""

    batch: int
    start: int
    count: int
    size: int

    @staticmethod
    def cover(batch: int, start: int, end: int, size: int) -> list[Blocks]:
        """Slots start..end-1: whole blocks, and a last one of the rest."""
        count, rest = divmod(end - start, size)
        whole = [Blocks(batch, start, count, size)] if count else []
        return whole + ([Blocks(batch, end - rest, 1, rest)] if rest else [])

    def arrange(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """(B, H, count b, E) -> (P, H, b, E)."""
        return x.unflatten(2, (self.count, self.size)).transpose(1, 2).flatten(0, 1)

    def collect(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """(P, H, b, E) -> (B, H, count b, 1, E)."""
        return x.unflatten(0, (self.batch, self.count)).transpose(1, 2).flatten(2, 3).unsqueeze(3)

    def windows(self, x: Tensor, back: int, ahead: int) -> Tensor:
        """(B, G, S, D) -> (P, G, back + b + ahead, D): each block's slots with those before and after it."""
        if back == ahead == 0:
            return self.arrange(x[:, :, self.start : self.start + self.count * self.size])
        x = x[:, :, self.start - back : self.start + self.count * self.size + ahead]
        return x.unfold(2, back + self.size + ahead, self.size).permute(0, 2, 1, 4, 3).flatten(0, 1)

    def add_windows(self, total: Tensor, x: Tensor, back: int) -> None:
        """Transpose of `windows`: adds x (P, G, L, D) to total (B, G, S, D) in place."""
        x = x.unflatten(0, (self.batch, self.count)).permute(0, 2, 1, 4, 3)
        step = self.size if self.count > 1 else x.shape[4]  # windows overlap beyond it
        for offset in range(0, x.shape[4], step):
            piece = x[..., offset : offset + step]
            begin, width = self.start - back + offset, piece.shape[4]
            end = begin + (self.count - 1) * self.size + width
            total[:, :, begin:end].unfold(2, width, self.size).add_(piece)

    def part(self, key: Tensor, value: Tensor, skip: int = 0, back: int = 0, ahead: int = 0, **options) -> Part:
        """These queries, of which slot `skip` is the first of the call, on their windows of key and value."""
        begin = self.start - skip
        return Part(
            key, value, self.arrange, self.collect,
            gather=lambda x: self.windows(x, back, ahead),
            scatter=lambda total, x: self.add_windows(total, x, back),
            span=(begin, begin + self.count * self.size),
            **options,
        )  # fmt: skip


@dataclass(frozen=True)
class Segments:
    """Token t of segment s = t // block sees its segment up to itself and [s block - memory, s block)."""

    block: int
    memory: int = 0
    dilation = 1
    slides = False

    @property
    def tile(self) -> int:
        """Queries per tile; tiles begin at multiples of `step`."""
        return self.block

    @property
    def step(self) -> int:
        return self.block

    @property
    def back(self) -> int:
        """Keys before its own that a tile reads."""
        return self.memory

    @property
    def causal(self) -> bool:
        """Whether a query of a tile sees all of the window up to itself, which is its tile alone."""
        return self.memory == 0

    @property
    def before(self) -> int:
        """The first slot, a multiple of `step`, with as many slots before it as a tile reads."""
        return -(-self.memory // self.block) * self.block

    @property
    def full(self) -> int:
        """Slots from 0 that see every slot before them."""
        return (self.memory // self.block + 1) * self.block

    @property
    def stored(self) -> int:
        """Most tokens that a later call can need."""
        return self.before + self.block

    def needed_from(self, count: Count) -> Count:
        """The oldest position that later tokens need when `count` have come, a multiple of `step`."""
        return count // self.block * self.block - self.before

    def begin_of(self, t: Count) -> Count:
        """The first position of t's exact part; below 0 where that is all of the past."""
        return t // self.block * self.block - self.memory

    def until(self, t: int) -> int:
        """The first position after t whose exact part begins elsewhere."""
        return (t // self.block + 1) * self.block

    def near(self, t: Tensor, j: Tensor) -> Tensor:
        """Whether j, which is not after t, belongs to t's exact part."""
        return j >= self.begin_of(t)

    def far_from(self, positions: int) -> int:
        """The first t whose exact part has none of positions 0..positions-1, nor has any later one."""
        return -(-(positions + self.memory) // self.block) * self.block

    def visible(self, t: Tensor, j: Tensor) -> Tensor:
        """What query t of a tile sees of its window; both are counted from the tile's first query."""
        return j <= t


@dataclass(frozen=True)
class Horizon(Segments):
    """
    Token t sees itself and what is before it, back to the start of the segment that holds token t - window + 1. `memory` is
    what the first token of a segment sees before that.
    """

    window: int = 1

    @staticmethod
    def of(block: int, window: int) -> Horizon:
        return Horizon(block, -(-(window - 1) // block) * block, window)

    @property
    def full(self) -> int:
        return self.block + self.window - 1

    def begin_of(self, t: Count) -> Count:
        return (t - self.window + 1) // self.block * self.block

    def until(self, t: int) -> int:
        return self.begin_of(t) + self.block + self.window - 1

    def end_of(self, t: Count) -> Count:
        """One past what t sees in an encoder: to the end of the segment that holds token t + window - 1."""
        return ((t + self.window - 1) // self.block + 1) * self.block

    def far_from(self, positions: int) -> int:
        return -(-positions // self.block) * self.block + self.window - 1

    def visible(self, t: Tensor, j: Tensor) -> Tensor:
        return (j <= t) & (j >= self.begin_of(t))


@dataclass(frozen=True)
class Band:
    """Token t sees t, t - dilation, ..., t - (window - 1) dilation. Tiles are of residue classes where dilation > 1."""

    window: int
    dilation: int = 1
    causal = False
    slides = True

    @property
    def tile(self) -> int:
        return min(max(self.window, TILE[0]), TILE[1])

    @property
    def step(self) -> int:
        return self.dilation

    @property
    def back(self) -> int:
        return self.window - 1

    @property
    def before(self) -> int:
        return (self.window - 1) * self.dilation

    @property
    def full(self) -> int:
        return self.window

    @property
    def stored(self) -> int:
        return (self.window - 1) * self.dilation

    def needed_from(self, count: Count) -> Count:
        return count - self.stored

    def begin_of(self, t: Count) -> Count:
        return t - self.window + 1

    def until(self, t: int) -> int:
        return t + QUERIES

    def near(self, t: Tensor, j: Tensor) -> Tensor:
        return (t - j < self.window * self.dilation) & ((t - j) % self.dilation == 0)

    def far_from(self, positions: int) -> int:
        return self.window * self.dilation + positions - 1

    def visible(self, t: Tensor, j: Tensor) -> Tensor:
        return (j <= t) & (t - j < self.window)


@dataclass(frozen=True)
class Shared:
    """
    Keys that every query sees besides its exact part: the first `count` of key, value (B, G, S, D).

    visible(begin, end) is bool (B or 1, 1, end - begin, count): what these queries see. Queries before `start` see none
    of the keys, and those from `free` on see all.
    """

    key: Tensor
    value: Tensor
    count: int
    visible: Callable[[int, int], Tensor]
    start: int
    free: int

    def parts(self, n: int) -> list[Part]:
        """For queries 0..n-1: those that see some of the keys, and those that see all."""
        free = min(max(self.free, self.start), n)

        def mask(i: int, j: int) -> Tensor:
            return self.visible(self.start + i, self.start + j)

        spans = [((self.start, free), mask), ((free, n), None)]
        return [
            Part(self.key, self.value, gather=self._first, scatter=self._add_first, mask=mask, span=span)
            for span, mask in spans
            if span[0] < span[1] and self.count
        ]

    def _first(self, x: Tensor) -> Tensor:
        return x[:, :, : self.count]

    def _add_first(self, total: Tensor, x: Tensor) -> None:
        total[:, :, : self.count] += x


@dataclass(frozen=True)
class Context:
    """
    What a decoder call's queries can see. key, value (B, G, S, D): slot i holds position first + i, from slot `new` on
    the call's own tokens; sink_key, sink_value (B, G, n, D): positions 0..n-1. whole: none of the call's tokens is padding.

    Rows that have come unequally far either end in the same slot (`ends`; where `first` is below 0, slots stand for nothing) or
    are `framed`.
    """

    key: Tensor
    value: Tensor
    first: Count
    new: Count
    sink_key: Tensor
    sink_value: Tensor
    state: AttentionState | None = None
    whole: bool = True

    @property
    def ends(self) -> bool:
        return isinstance(self.new, int) and not isinstance(self.first, int)

    def framed(self, pattern: Segments | Band) -> Context:
        """Unequal rows such that each begins with the oldest key that `pattern` needs, at a multiple of its `step`."""
        if isinstance(self.first, int):
            return self
        position = self.first + self.new
        first = pattern.needed_from(position).clamp_min(0)
        slots = torch.arange(self.key.shape[2], device=self.key.device)
        source = (slots + (first - self.first)[:, None]).clamp_max(len(slots) - 1)
        key, value = take(self.key, source), take(self.value, source)
        return replace(self, key=key, value=value, first=first, new=position - first)

    def once(self, what: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """make(), for all layers whose contexts are alike (`AttentionState.once`)."""
        if self.state is None:
            return make()
        sizes = self.key.shape[2], self.sink_key.shape[2], isinstance(self.first, int), isinstance(self.new, int)
        return self.state.once((what, sizes), make)

    def map(self, function: Callable[[Tensor], Tensor]) -> Context:
        """Another view of all keys and values."""
        names = ("key", "value", "sink_key", "sink_value")
        return replace(self, **{name: function(getattr(self, name)) for name in names})


def remember(
    state: AttentionState | None,
    key: Tensor,
    value: Tensor,
    pattern: Segments | Band,
    *,
    num_sinks: int,
    lengths: Tensor | None,
    detach: bool = False,
) -> Context:
    """
    Puts a call's tokens behind what the state holds, and leaves in the state what later calls can need: at most
    `pattern.stored` tokens and the sinks. `detach` stops gradients between calls.
    """
    if state is None:
        return Context(key, value, 0, 0, key[:, :, :num_sinks], value[:, :, :num_sinks])
    recent = state.store("recent", lambda: RecentTokens(pattern.stored))
    sinks = state.store("sinks", lambda: FirstTokens(num_sinks))
    buffer = recent.extend(key, value, lengths)
    recent.keep_from(pattern.needed_from(recent.count))
    sinks.extend(key, value, lengths)
    first = sinks.entries["key"], sinks.entries["value"]
    context = Context(buffer.key, buffer.value, buffer.first, buffer.new, *first, state, lengths is None)
    if lengths is not None or key.shape[2] > pattern.stored:
        context = context.framed(pattern)
    if detach and torch.is_grad_enabled():
        recent.map_tensors(Tensor.detach)
        sinks.map_tensors(Tensor.detach)
    return context


def local_decoder(
    query: Tensor,
    context: Context,
    pattern: Segments | Band,
    *,
    scaling: float,
    dropout: float = 0.0,
    far: Callable[[Count], Part | list[Part]] | None = None,
) -> Tensor:
    """
    Softmax over what `pattern` shows of the past and the sinks, for the context's new tokens: (B, H, N, D) -> the same.

    far(position) is a part, or several, that join them, for queries at positions position + 0, 1, ..., of which their `span`
    may leave out the first; not where dilation > 1. No query sees any of it whose exact part begins at 0.
    """
    n, new, slots = query.shape[2], context.new, context.key.shape[2]
    options = {"scaling": scaling, "dropout": dropout, "far": far}
    wide = n == 1 or context.key.shape[2] > pattern.full  # else the fused causal kernel is as good
    if wide and far is None and pattern.dilation == 1 and in_ranges(query, context, pattern, dropout):
        return range_decoder(query, context, pattern, scaling=scaling)
    if reads_directly(n, context, pattern):
        return _direct(query, context, pattern, **options)
    if isinstance(new, int):
        skip = new // pattern.step * pattern.step if new >= pattern.before else 0
        query = pad(query, (0, 0, new - skip, 0)) if new > skip else query
        output = _by_residues(query, context, pattern, skip, **options)
        return output[:, :, new - skip :]
    query = take(query, (torch.arange(slots, device=query.device) - new[:, None]).clamp(0, n - 1))
    output = _by_residues(query, context, pattern, 0, **options)
    return take(output, (torch.arange(n, device=query.device) + new[:, None]).clamp_max(slots - 1))


def reads_directly(n: int, context: Context, pattern: Segments | Band) -> bool:
    """
    Whether `local_decoder` reads n queries under one mask, wherever they stand. Otherwise they are cut into tiles, and
    what it asks of `far` is for queries from a multiple of `pattern.step` on to the end of the context.
    """
    return context.ends or (n <= pattern.stored and not (isinstance(context.new, int) and context.new == 0))


def in_ranges(query: Tensor, context: Context, pattern: Segments | Band, dropout: float) -> bool:
    """Whether `range_decoder` serves a call: one query, or so many at the same positions in all rows that a kernel pays."""
    n, agree = query.shape[2], isinstance(context.first, int) and isinstance(context.new, int)
    if n == 1 or not agree:
        return n == 1 and (agree or context.whole) and not dropout
    return not reads_directly(n, context, pattern) and has_kernel(query, dropout)


def _direct(query: Tensor, context: Context, pattern, far, **options) -> Tensor:
    """Few queries: sinks and buffer side by side under one mask."""
    device = query.device
    first = torch.as_tensor(context.first, device=device).reshape(-1, 1, 1)
    start = first + torch.as_tensor(context.new, device=device).reshape(-1, 1, 1)
    held = first + torch.arange(context.key.shape[2], device=device)
    sinks = torch.arange(context.sink_key.shape[2], device=device)

    def mask(begin: int, end: int) -> Tensor:
        t = start + torch.arange(begin, end, device=device)[:, None]
        exact = (held >= 0) & (held <= t) & pattern.near(t, held)
        return torch.cat([(sinks <= t) & ~pattern.near(t, sinks), exact], 2)[:, None]

    def visible(begin: int, end: int) -> Tensor:
        if query.shape[2] > FEW:
            return mask(begin, end)
        return context.once((pattern, begin, end), lambda: mask(begin, end))

    key = torch.cat([context.sink_key, context.key], 2)
    value = torch.cat([context.sink_value, context.value], 2)
    if far is None:
        return masked_attention(query, key, value, visible, **options)
    return joint_attention(
        query, [Part(key, value, mask=visible), *_parts(far(context.first + context.new))], **options
    )


def _parts(far: Part | list[Part]) -> list[Part]:
    return far if isinstance(far, list) else [far]


def _by_residues(query: Tensor, context: Context, pattern, skip: int, far, **options) -> Tensor:
    """Queries at slots skip.. of the context; a dilated band becomes a plain one by residue classes of the slots."""
    d = pattern.dilation
    if d == 1:
        return _by_tiles(query, context, pattern, skip, _sinks(context, pattern, skip), far, **options)
    rows = replace(context, key=residues(context.key, d), value=residues(context.value, d))
    output = _by_tiles(
        residues(query, d), rows, Band(pattern.window), skip // d, _sinks(context, pattern, skip), None, **options
    )
    return from_residues(output, d, query.shape[2])


def residues(x: Tensor, d: int) -> Tensor:
    """(B, H, S, E) -> (B d, H, ceil(S / d), E): slot u d + r of row b becomes slot u of row b d + r."""
    x = pad(x, (0, 0, 0, -x.shape[2] % d)) if x.shape[2] % d else x
    return x.unflatten(2, (-1, d)).permute(0, 3, 1, 2, 4).flatten(0, 1)


def from_residues(x: Tensor, d: int, slots: int) -> Tensor:
    """Inverse of `residues` for so many slots."""
    return x.unflatten(0, (-1, d)).permute(0, 2, 3, 1, 4).flatten(2, 3)[:, :, :slots]


def _sinks(context: Context, pattern, skip: int) -> Shared:
    """The sinks, for queries at slots skip.. of the context; where d > 1 for the rows that `residues` makes of them."""
    d, count, device = pattern.dilation, context.sink_key.shape[2], context.key.device
    sinks = torch.arange(count, device=device)
    first = torch.as_tensor(context.first, device=device).reshape(-1, 1, 1)
    if d > 1:
        first = first.expand(context.key.shape[0], 1, 1)

    def visible(begin: int, end: int) -> Tensor:
        slots = skip + torch.arange(begin * d, end * d, device=device).view(-1, d).T  # (d, T)
        t = (first + slots).flatten(0, 1)[:, :, None]
        return ((sinks <= t) & ~pattern.near(t, sinks))[:, None]

    key, value = (x.repeat_interleave(d, 0) if d > 1 else x for x in (context.sink_key, context.sink_value))
    if not isinstance(context.first, int):
        return Shared(key, value, count, visible, 0, context.key.shape[2])
    if context.first == 0 and d == 1:
        key, value = context.key, context.value  # the same tokens, whose gradients then need no sum of their own
    start = 0 if d > 1 else max(pattern.far_from(1) - context.first - skip, 0)
    return Shared(key, value, count, visible, start, max(-((context.first + skip - pattern.far_from(count)) // d), 0))


def _by_tiles(query: Tensor, context: Context, pattern, skip: int, sinks: Shared, far, **options) -> Tensor:
    """The undilated pattern, for queries at slots skip.. of the context."""
    key, value, batch, slots = context.key, context.value, *context.key.shape[0::2]
    extra = sinks.parts(slots - skip)
    if slots <= pattern.full and isinstance(context.first, int) and context.first == 0:
        far = None
    if skip == 0 and slots <= pattern.full and not extra and far is None:
        return exact_attention(query, key, value, lengths=None, causal=True, **options)
    begin = max(min(pattern.before, slots), skip)
    early = [Blocks(batch, 0, 1, begin).part(key, value, causal=True)] if begin > skip else []
    late = []
    for blocks in Blocks.cover(batch, begin, slots, pattern.tile):
        how = {"causal": True} if pattern.causal else {"mask": _Window(pattern, key.device)}
        late.append(blocks.part(key, value, skip, pattern.back, **how))
    if far is not None and begin < slots:
        for part in _parts(far(context.first + begin)):
            extra.append(replace(part, span=(begin - skip + part.span[0], None)))
    return joint_attention(query, [*late, *early, *extra], **options)


@dataclass(frozen=True)
class _Window:
    """What some queries of each tile see of its window, up to the last key they see."""

    pattern: Segments | Band
    device: torch.device

    def __call__(self, begin: int, end: int) -> Tensor:
        t, j = (torch.arange(x, end, device=self.device) for x in (begin, -self.pattern.back))
        return self.pattern.visible(t[:, None], j)[None, None]


def segment_encoder(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Segments,
    *,
    global_tokens: int = 0,
    lengths: Tensor | None,
    far: Part | None = None,
    **options,
) -> Tensor:
    """
    Token t of segment s sees its whole segment, the memory before it and the first `global_tokens` tokens, each once; those
    see all tokens. `lengths` (B,) or None as everywhere. `far` is a part that joins them, for queries behind the first
    segment. query (B, H, N, D), key and value (B, G, N, D) -> (B, H, N, D).
    """
    (batch, n), b, everyone = key.shape[0::2], pattern.block, global_tokens
    if n <= max(b, everyone):
        return exact_attention(query, key, value, lengths=lengths, causal=False, **options)
    if (pattern.memory or everyone) and far is None and has_kernel(query, options["dropout"]):
        tiles = segment_tiles(n, pattern, everyone)
        return range_encoder(query, key, value, tiles, lead=everyone, lengths=lengths, scaling=options["scaling"])
    parts = []
    early = range(0, min(pattern.before, n), b)  # segments with less before them than the memory
    for blocks in [
        *(Blocks(batch, begin, 1, min(b, n - begin)) for begin in early),
        *Blocks.cover(batch, min(pattern.before, n), n, b),
    ]:
        back = min(pattern.memory, blocks.start)
        used = _used(key, lengths, blocks, back, 0)
        parts.append(blocks.part(key, value, back=back, mask=used))
    if far is not None:
        parts.append(far)
    if everyone:
        first, j = pattern.far_from(1), torch.arange(everyone, device=key.device)

        def outside(begin: int, end: int) -> Tensor:
            return ~pattern.near(torch.arange(begin, end, device=key.device)[:, None], j)[None, None]

        parts += Shared(key, value, everyone, outside, first, pattern.far_from(everyone)).parts(n)
    if pattern.memory or everyone or far is not None:
        output = joint_attention(query, parts, **options)
        return _with_globals(output, query, key, value, everyone, lengths, **options)
    outputs = []
    for part in parts:
        tiles = part.arrange(query[:, :, slice(*part.span)]), part.gather(key), part.gather(value)
        outputs.append(part.collect(sdpa(*tiles, mask=part.mask, **options))[..., 0, :])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)


def segment_tiles(
    n: int, pattern: Segments, everyone: int, seen: Callable[[int], tuple[int, int]] = lambda exact: (0, 0)
) -> list[Tile]:
    """
    What `segment_encoder`'s n queries see, of which the first `everyone` < n are global. seen(exact): begin and end of the
    slots, as for `range_decoder`.
    """
    tiles = [Tile(0, everyone, 0, n, n, 0, 0, 0)] if everyone else []
    for low in range(everyone // pattern.block * pattern.block, n, pattern.block):
        exact, high = max(low - pattern.memory, 0), min(low + pattern.block, n)
        slots = (everyone + slot for slot in seen(exact))
        tiles.append(Tile(max(low, everyone), high, exact, high, n, min(exact, everyone), *slots))
    return tiles


def _used(key: Tensor, lengths: Tensor | None, blocks: Blocks, back: int, ahead: int) -> Tensor | None:
    """(P, 1, 1, L) bool, which slots of each block's window hold a real token, or None where all do."""
    if lengths is None:
        return None
    used = torch.arange(key.shape[2], device=key.device) < lengths[:, None]
    return blocks.windows(used[:, None, :, None], back, ahead)[:, :, None, :, 0]


@torch.compiler.disable
def horizon_encoder(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Horizon,
    *,
    lengths: Tensor | None,
    far: Part,
    **options,
) -> Tensor:
    """
    Token t sees begin_of(t)..end_of(t)-1 and `far`, a part that joins them, for more tokens than a window has. query
    (B, H, N, D), key and value (B, G, N, D) -> (B, H, N, D).
    """
    batch, n, b, reach = *key.shape[0::2], pattern.block, pattern.memory
    tile, first = max(TILE[1] // b, 1) * b, min(reach, n)
    inner = max(n - reach - first, 0) // tile * tile
    zones = [
        (Blocks(batch, 0, 1, first), 0, min(reach, n - first)),
        (Blocks(batch, first, inner // tile, tile), reach, reach),
        (Blocks(batch, first + inner, 1, n - first - inner), first, 0),
    ]
    parts = []
    for blocks, back, ahead in zones:
        if blocks.count * blocks.size:
            mask = _Around(pattern, back, ahead, blocks, _used(key, lengths, blocks, back, ahead), key.device)
            mask = mask(0, blocks.size) if blocks.count > 1 else mask
            parts.append(blocks.part(key, value, back=back, ahead=ahead, mask=mask))
    return joint_attention(query, [*parts, far], **options)


@dataclass(frozen=True)
class _Around:
    """The mask of a horizon on both sides, for some queries of each block, which begins with a segment."""

    pattern: Horizon
    back: int
    ahead: int
    blocks: Blocks
    used: Tensor | None
    device: torch.device

    def __call__(self, begin: int, end: int) -> Tensor:
        t = torch.arange(begin, end, device=self.device)[:, None]
        j = torch.arange(-self.back, self.blocks.size + self.ahead, device=self.device)
        seen = ((j >= self.pattern.begin_of(t)) & (j < self.pattern.end_of(t)))[None, None]
        return seen if self.used is None else seen & self.used


def band_encoder(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int,
    dilation: int = 1,
    global_tokens: int = 0,
    lengths: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """
    Token t sees t, t +- d, ..., t +- w d and the first `global_tokens` tokens, each once; those see all tokens.
    query (B, H, N, D), key and value (B, G, N, D) -> (B, H, N, D).
    """
    n, d, everyone = query.shape[2], dilation, min(global_tokens, query.shape[2])
    options = {"scaling": scaling, "dropout": dropout}
    if everyone == n or (d == 1 and n <= window + 1):
        return exact_attention(query, key, value, lengths=lengths, causal=False, **options)
    if d == 1 and has_kernel(query, dropout):
        tiles = [Tile(0, everyone, 0, n, n, 0, everyone)] if everyone else []
        tiles += band_ranges(range(everyone, n), window, window, everyone, n)
        return range_encoder(query, key, value, tiles, lead=everyone, lengths=lengths, scaling=scaling)
    shared = _globals(key, value, window, d, everyone, lengths)
    if d == 1:
        output = _band_tiles(query, key, value, window, lengths, shared, **options)
    else:
        ends = None
        if lengths is not None or n % d:
            ends = torch.full((query.shape[0],), n, device=query.device) if lengths is None else lengths
            ends = ((ends[:, None] + (d - 1 - torch.arange(d, device=query.device))) // d).flatten()
        rows = [residues(x, d) for x in (query, key, value)]
        output = from_residues(_band_tiles(*rows, window, ends, shared, **options), d, n)
    return _with_globals(output, query, key, value, everyone, lengths, **options)


def _with_globals(
    output: Tensor, query: Tensor, key: Tensor, value: Tensor, everyone: int, lengths, **options
) -> Tensor:
    """The output, in which the first `everyone` queries attend to all tokens."""
    if not everyone:
        return output
    first = exact_attention(query[:, :, :everyone], key, value, lengths=lengths, causal=False, **options)
    return torch.cat([first, output[:, :, everyone:]], 2)


def band_ranges(queries: range, back: int, ahead: int, everyone: int, size: int, *, offset: int = 0) -> list[Tile]:
    """
    Of `size` keys query i, at position offset + i, sees those from `back` before it to `ahead` after it; and as far keys, or as
    near ones without regard to the window, the first `everyone`, but none more than `ahead` after it.
    """
    tiles = []
    for low in range(queries.start, queries.stop, QUERIES):
        high, floor = min(low + QUERIES, queries.stop), offset + low - back
        begin, far, kept = (floor, everyone, 0) if floor >= everyone else (0, 0, everyone)
        end, diagonal = min(offset + high + ahead, size), offset + low + ahead
        tiles.append(Tile(low, high, begin, end, diagonal, far, everyone, floor=floor, kept=kept))
    return tiles


@torch.compiler.disable
def _band_tiles(query, key, value, window: int, lengths: Tensor | None, shared: Shared, **options) -> Tensor:
    """Undilated: the first w queries, tiles with w keys on both sides, and the last queries."""
    batch, n = key.shape[0::2]
    tile, first = min(max(window, TILE[0]), TILE[1]), min(window, n)
    inner = max(n - window - first, 0) // tile * tile
    zones = [
        (Blocks(batch, 0, 1, first), 0, min(window, n - first)),
        (Blocks(batch, first, inner // tile, tile), window, window),
        (Blocks(batch, first + inner, 1, n - first - inner), window, 0),
    ]
    parts = []
    for blocks, back, ahead in zones:
        if blocks.count * blocks.size:
            mask = _Near(window, back, ahead, blocks, _used(key, lengths, blocks, back, ahead), key.device)
            mask = mask(0, blocks.size) if blocks.count > 1 else mask
            parts.append(blocks.part(key, value, back=back, ahead=ahead, mask=mask))
    return joint_attention(query, [*parts, *shared.parts(n)], **options)


@dataclass(frozen=True)
class _Near:
    """The mask of a band on both sides, for some queries of each block."""

    window: int
    back: int
    ahead: int
    blocks: Blocks
    used: Tensor | None
    device: torch.device

    def __call__(self, begin: int, end: int) -> Tensor:
        t = torch.arange(begin, end, device=self.device)[:, None]
        j = torch.arange(-self.back, self.blocks.size + self.ahead, device=self.device)
        near = ((t - j).abs() <= self.window)[None, None]
        return near if self.used is None else near & self.used


def _globals(key: Tensor, value: Tensor, window: int, d: int, count: int, lengths: Tensor | None) -> Shared:
    """The first `count` tokens for all queries; where d > 1 for the rows that `residues` makes of them."""
    device = key.device
    ends = torch.full((1,), key.shape[2], device=device) if lengths is None else lengths
    ends = ends.reshape(-1, 1, 1).expand(key.shape[0] if d > 1 else -1, d, 1).flatten(0, 1)[:, :, None]
    j = torch.arange(count, device=device)

    def visible(begin: int, end: int) -> Tensor:
        t = torch.arange(begin * d, end * d, device=device).view(-1, d).T  # (d, T)
        apart = (t[:, :, None] - j).abs()
        seen = (apart > window * d) | (apart % d != 0)
        return (seen.repeat(len(ends) // d, 1, 1) & (j < ends))[:, None]

    if d > 1:
        key, value = (x[:, :, :count].repeat_interleave(d, 0) for x in (key, value))
    return Shared(key, value, count, visible, 0, -(-(window * d + count) // d))
