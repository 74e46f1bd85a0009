"""
Local attention in blocks: a token's own block and the keys just before (and, in an encoder, after) it, in one softmax
with a few tokens that everyone sees. Shared by `block`, `sliding_window` and `transformer_xl`.

A pattern (`Segments`, `Band`) says which past keys a decoder's token t sees exactly; sinks, the first positions of the
sequence, join them once they lie outside that range. Whole blocks go through fused kernels: causal inside the own
block, full on memory, and the older half of a band, where key slot j > query slot t of the block before, by the causal
kernel again after both are flipped. Rows padded behind their real tokens need no mask in a decoder.

Letters: B batch, H query heads, G key/value heads, N tokens of this call, S slots of the buffer (what a decoder's state
holds, then the new tokens), D head size, b block size, P = B x blocks, w window, d dilation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..caching import AttentionState, Count, TokenStore, take
from .exact import exact_attention, masked_attention, sdpa
from .joint import Part, joint_attention


@dataclass(frozen=True)
class Blocks:
    """`count` blocks of `size` queries (B, H, count size, E); the first one begins at slot `start` of the keys."""

    batch: int
    start: int
    count: int
    size: int

    @staticmethod
    def cover(x: Tensor, start: int, size: int) -> Blocks:
        """The blocks that hold the slots start.. of x (B, H, S, D)."""
        return Blocks(x.shape[0], start, -(-(x.shape[2] - start) // size), size)

    def fill(self, x: Tensor, begin: int) -> Tensor:
        """x, whose first slot is `begin`, with zeros behind it up to the end of the last block."""
        short = self.start + self.count * self.size - begin - x.shape[2]
        return pad(x, (0, 0, 0, short)) if short > 0 else x

    def split(self, x: Tensor, shift: int = 0) -> Tensor:
        """Keys (B, G, S, D) -> (P, G, b, D), for each block the one that begins `shift` slots further."""
        begin = self.start + shift
        return self.arrange(x[:, :, begin : begin + self.count * self.size])

    def arrange(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """(B, H, count b, E) -> (P, H, b, E)."""
        return x.unflatten(2, (self.count, self.size)).transpose(1, 2).flatten(0, 1)

    def collect(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """(P, H, b, E) -> (B, H, count b, 1, E)."""
        return x.unflatten(0, (self.batch, self.count)).transpose(1, 2).flatten(2, 3).unsqueeze(3)

    def before(self, x: Tensor, tokens: int) -> Tensor:
        """Keys (B, G, S, D) -> (P, G, tokens, D), the slots just before each block."""
        whole, rest = divmod(tokens, self.size)
        parts = [self.split(x, -shift * self.size) for shift in range(whole, 0, -1)]
        if rest:
            parts.insert(0, self.split(x, -(whole + 1) * self.size)[:, :, -rest:])
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


@dataclass(frozen=True)
class Segments:
    """Token t of segment s = t // block sees its segment up to itself and [s block - memory, s block)."""

    block: int
    memory: int = 0
    dilation = 1

    @property
    def before(self) -> int:
        """Slots in whole blocks that hold what a block's first token sees."""
        return -(-self.memory // self.block) * self.block

    @property
    def stored(self) -> int:
        """Most tokens that a later call can need."""
        return self.before + self.block

    def needed_from(self, count: Count) -> Count:
        """The oldest position that later tokens need when `count` have come, at the start of a block."""
        return count // self.block * self.block - self.before

    def near(self, t: Tensor, j: Tensor) -> Tensor:
        """Whether j, which is not after t, belongs to t's exact part."""
        return j >= t // self.block * self.block - self.memory

    def far_from(self, positions: int) -> int:
        """The first t whose exact part has none of positions 0..positions-1, nor has any later one."""
        return -(-(positions + self.memory) // self.block) * self.block

    def past(self, key: Tensor, value: Tensor, blocks: Blocks) -> list[Part]:
        """What queries in `blocks` see of the blocks before."""
        if self.memory == 0:
            return []
        return [Part(*(blocks.before(x, self.memory) for x in (key, value)), blocks.arrange, blocks.collect)]


@dataclass(frozen=True)
class Band:
    """Token t sees t, t - dilation, ..., t - (window - 1) dilation. Its blocks are as long as the window."""

    window: int
    dilation: int = 1

    @property
    def block(self) -> int:
        return self.window

    @property
    def before(self) -> int:
        return self.window * self.dilation

    @property
    def stored(self) -> int:
        return self.window * self.dilation

    def needed_from(self, count: Count) -> Count:
        return count - self.stored

    def near(self, t: Tensor, j: Tensor) -> Tensor:
        return (t - j < self.window * self.dilation) & ((t - j) % self.dilation == 0)

    def far_from(self, positions: int) -> int:
        return self.window * self.dilation + positions - 1

    def past(self, key: Tensor, value: Tensor, blocks: Blocks) -> list[Part]:
        return [] if self.window == 1 else [_older_half(key, value, blocks, 1)]


def _older_half(key: Tensor, value: Tensor, blocks: Blocks, gap: int) -> Part:
    """Of the block before, query slot t sees key slots j >= t + gap: causal once both are flipped."""

    def arrange(x: Tensor, fill: float) -> Tensor:
        return blocks.arrange(x)[:, :, : blocks.size - gap].flip(2)

    def collect(x: Tensor, fill: float) -> Tensor:
        x = x.flip(2)
        return blocks.collect(pad(x, (0, 0, 0, gap), value=fill) if gap else x)

    key, value = (blocks.split(x, -blocks.size)[:, :, gap:].flip(2) for x in (key, value))
    return Part(key, value, arrange, collect, causal=True)


@dataclass(frozen=True)
class Shared:
    """
    A few keys that every query sees besides its exact part: key, value (B, G, n, D).

    visible(begin, end) is bool (B or 1, 1, end - begin, n): what these queries see. Queries before `start` see none of
    the keys, and those from `free` on see all.
    """

    key: Tensor
    value: Tensor
    visible: Callable[[int, int], Tensor]
    start: int
    free: int

    def parts(self, begin: int, end: int) -> list[Part]:
        """For the queries begin..end-1: one part, or none where they see nothing."""
        if end <= self.start or self.key.shape[2] == 0:
            return []
        cut = max(self.start - begin, 0)
        first = begin + cut

        def arrange(x: Tensor, fill: float) -> Tensor:
            return x[:, :, cut:]

        def collect(x: Tensor, fill: float) -> Tensor:
            return (pad(x, (0, 0, cut, 0), value=fill) if cut else x).unsqueeze(3)

        def mask(i: int, j: int) -> Tensor | None:
            return None if first + i >= self.free else self.visible(first + i, first + j)

        return [Part(self.key, self.value, arrange, collect, mask=None if first >= self.free else mask)]


@dataclass(frozen=True)
class Context:
    """
    What a decoder call's queries can see. key, value (B, G, S, D): slot i holds position first + i, from slot `new` on
    the call's own tokens; sink_key, sink_value (B, G, n, D): positions 0..n-1.
    """

    key: Tensor
    value: Tensor
    first: Count
    new: Count
    sink_key: Tensor
    sink_value: Tensor

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
    recent, sinks = state.store("recent", TokenStore), state.store("sinks", TokenStore)
    buffer = recent.extend(key, value, lengths)
    recent.keep_from(pattern.needed_from(recent.count), pattern.stored)
    if sinks.entries["key"] is None or not isinstance(sinks.count, int) or sinks.count < num_sinks:
        some = None if lengths is None else lengths.clamp_max(num_sinks)
        sinks.extend(key[:, :, :num_sinks].clone(), value[:, :, :num_sinks].clone(), some)
        sinks.keep_until(num_sinks)
    context = Context(buffer.key, buffer.value, buffer.first, buffer.new, sinks.entries["key"], sinks.entries["value"])
    if detach:
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
    far: Callable[[Count], Part] | None = None,
) -> Tensor:
    """
    Softmax over what `pattern` shows of the past and the sinks, for the context's new tokens: (B, H, N, D) -> the same.

    far(position) is a part that joins them, for queries at positions position + 0, 1, ...; not where dilation > 1. No
    query sees any of it whose exact part begins at 0.
    """
    n, new, slots = query.shape[2], context.new, context.key.shape[2]
    options = {"scaling": scaling, "dropout": dropout, "far": far}
    if n <= pattern.stored and not (isinstance(new, int) and new == 0):
        return _direct(query, context, pattern, **options)
    if isinstance(new, int):
        unit = pattern.block * pattern.dilation
        skip = new // unit * unit if new >= pattern.before else 0
        query = pad(query, (0, 0, new - skip, 0)) if new > skip else query
        output = _by_residues(query, context, pattern, skip, **options)
        return output[:, :, new - skip :]
    query = take(query, (torch.arange(slots, device=query.device) - new[:, None]).clamp(0, n - 1))
    output = _by_residues(query, context, pattern, 0, **options)
    return take(output, (torch.arange(n, device=query.device) + new[:, None]).clamp_max(slots - 1))


def _direct(query: Tensor, context: Context, pattern, far, **options) -> Tensor:
    """Few queries: sinks and buffer side by side under one mask."""
    device = query.device
    first = torch.as_tensor(context.first, device=device).reshape(-1, 1, 1)
    start = first + torch.as_tensor(context.new, device=device).reshape(-1, 1, 1)
    held = first + torch.arange(context.key.shape[2], device=device)
    sinks = torch.arange(context.sink_key.shape[2], device=device)

    def visible(begin: int, end: int) -> Tensor:
        t = start + torch.arange(begin, end, device=device)[:, None]
        exact = (held <= t) & pattern.near(t, held)
        return torch.cat([(sinks <= t) & ~pattern.near(t, sinks), exact], 2)[:, None]

    key = torch.cat([context.sink_key, context.key], 2)
    value = torch.cat([context.sink_value, context.value], 2)
    if far is None:
        return masked_attention(query, key, value, visible, **options)
    return joint_attention(query, [Part(key, value, mask=visible), far(context.first + context.new)], **options)


def _by_residues(query: Tensor, context: Context, pattern, skip: int, far, **options) -> Tensor:
    """Queries at slots skip.. of the context; a dilated band becomes a plain one by residue classes of the slots."""
    d = pattern.dilation
    if d == 1:
        return _by_blocks(query, context, pattern, skip, _sinks(context, pattern, skip), far, **options)
    rows = replace(context, key=residues(context.key, d), value=residues(context.value, d))
    output = _by_blocks(
        residues(query, d), rows, Band(pattern.window), skip // d, _sinks(context, pattern, skip), None, **options
    )
    return from_residues(output, d, query.shape[2])


def residues(x: Tensor, d: int) -> Tensor:
    """(B, H, S, E) -> (B d, H, ceil(S / d), E): slot u d + r of row b becomes slot u of row b d + r."""
    return pad(x, (0, 0, 0, -x.shape[2] % d)).unflatten(2, (-1, d)).permute(0, 3, 1, 2, 4).flatten(0, 1)


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
        return Shared(key, value, visible, 0, context.key.shape[2])
    start = 0 if d > 1 else max(pattern.far_from(1) - context.first - skip, 0)
    return Shared(key, value, visible, start, max(-((context.first + skip - pattern.far_from(count)) // d), 0))


def _by_blocks(query: Tensor, context: Context, pattern, skip: int, sinks: Shared, far, **options) -> Tensor:
    """The undilated pattern, for queries at slots skip.. of the context."""
    key, value, outputs = context.key, context.value, []
    slots = key.shape[2]
    warm = max(min(pattern.before, slots) - skip, 0)
    if warm:  # these see every slot before them
        early = query[:, :, :warm], key[:, :, :warm], value[:, :, :warm]
        extra = sinks.parts(0, warm)
        if extra:
            outputs.append(joint_attention(early[0], [Part(*early[1:], causal=True), *extra], **options))
        else:
            outputs.append(exact_attention(*early, lengths=None, causal=True, **options))
    begin = skip + warm
    if begin < slots:
        size = pattern.block if pattern.before else min(pattern.block, slots - begin)
        blocks = Blocks.cover(key, begin, size)
        key, value, late = blocks.fill(key, 0), blocks.fill(value, 0), blocks.fill(query[:, :, warm:], begin)
        own = Part(blocks.split(key), blocks.split(value), blocks.arrange, blocks.collect, causal=True)
        parts = [own, *pattern.past(key, value, blocks), *sinks.parts(warm, warm + late.shape[2])]
        if far is not None:
            parts.append(far(context.first + begin))
        outputs.append(joint_attention(late, parts, **options)[:, :, : slots - begin])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)


def segment_encoder(
    query: Tensor, key: Tensor, value: Tensor, pattern: Segments, *, lengths: Tensor | None, **options
) -> Tensor:
    """
    Token t of segment s sees its whole segment and the memory before it; `lengths` (B,) or None as everywhere.
    query (B, H, N, D), key and value (B, G, N, D) -> (B, H, N, D).
    """
    n, b = query.shape[2], pattern.block
    warm = min(pattern.before, n)
    outputs = []
    for begin in range(0, warm, b):  # these see every segment up to their own
        end = min(begin + b, n)
        seen = key[:, :, :end], value[:, :, :end]
        outputs.append(exact_attention(query[:, :, begin:end], *seen, lengths=lengths, causal=False, **options))
    if warm < n:
        blocks = Blocks.cover(key, warm, min(b, n - warm))
        used = _used(key, lengths, blocks)
        query, key, value = blocks.fill(query[:, :, warm:], warm), blocks.fill(key, 0), blocks.fill(value, 0)
        if pattern.memory:
            key, value = (torch.cat([blocks.before(x, pattern.memory), blocks.split(x)], 2) for x in (key, value))
            used = None if used is None else pad(used, (pattern.memory, 0), value=True)
        else:
            key, value = blocks.split(key), blocks.split(value)
        output = sdpa(blocks.arrange(query), key, value, mask=used, **options)
        outputs.append(blocks.collect(output)[:, :, : n - warm, 0])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)


def _used(key: Tensor, lengths: Tensor | None, blocks: Blocks) -> Tensor | None:
    """(P, 1, 1, b) bool, which slots of each block hold a real token, or None where all do."""
    slots = blocks.start + torch.arange(blocks.count * blocks.size, device=key.device)
    if lengths is not None:
        used = slots < lengths[:, None]
    elif len(slots) > key.shape[2] - blocks.start:
        used = (slots < key.shape[2]).expand(key.shape[0], -1)
    else:
        return None
    return blocks.arrange(used[:, None, :, None])[:, :, None, :, 0]


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
    shared = _globals(key, value, window, d, everyone, lengths)
    inner = [residues(x, d) if d > 1 else x for x in (query, key, value)]
    ends = lengths
    if d > 1 and (lengths is not None or n % d):
        ends = torch.full((query.shape[0],), n, device=query.device) if lengths is None else lengths
        ends = ((ends[:, None] + (d - 1 - torch.arange(d, device=query.device))) // d).flatten()
    output = _band_blocks(*inner, min(window, inner[0].shape[2]), ends, shared, **options)
    output = from_residues(output, d, n) if d > 1 else output
    if everyone:
        first = exact_attention(query[:, :, :everyone], key, value, lengths=lengths, causal=False, **options)
        output = torch.cat([first, output[:, :, everyone:]], 2)
    return output


def _band_blocks(query, key, value, window, lengths, shared: Shared, **options) -> Tensor:
    n = query.shape[2]
    blocks = Blocks.cover(key, 0, window)
    used = _used(key, lengths, blocks)
    query, key, value = (blocks.fill(x, 0) for x in (query, key, value))
    parts = [Part(blocks.split(key), blocks.split(value), blocks.arrange, blocks.collect, mask=used)]
    if blocks.count > 1:
        fewer = Blocks(blocks.batch, window, blocks.count - 1, window)
        parts.append(_shifted(_older_half(key, value, fewer, 0), window, 0))
        ahead = None if used is None else used.unflatten(0, (blocks.batch, -1))[:, 1:].flatten(0, 1)
        after = Part(fewer.split(key), fewer.split(value), fewer.arrange, fewer.collect, causal=True, mask=ahead)
        parts.append(_shifted(after, 0, window))
    return joint_attention(query, [*parts, *shared.parts(0, query.shape[2])], **options)[:, :, :n]


def _shifted(part: Part, head: int, tail: int) -> Part:
    """The part for queries without the first `head` and the last `tail`."""

    def arrange(x: Tensor, fill: float) -> Tensor:
        return part.arrange(x[:, :, head : x.shape[2] - tail], fill)

    def collect(x: Tensor, fill: float) -> Tensor:
        return pad(part.collect(x, fill), (0, 0, 0, 0, head, tail), value=fill)

    return replace(part, arrange=arrange, collect=collect)


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

    key, value = (x[:, :, :count].repeat_interleave(d, 0) if d > 1 else x[:, :, :count] for x in (key, value))
    return Shared(key, value, visible, 0, -(-(window * d + count) // d))
