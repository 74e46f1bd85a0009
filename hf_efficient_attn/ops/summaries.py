"""
Summaries in a decoder. Tokens are cut into segments of b. The exact part of token t of segment s = t // b is
[(s - e) b, t], e = `exact_segments`, and the first `num_sinks` tokens; every segment before (s - e) b enters as r slots,
keys and values made from its tokens without the sinks. One softmax joins exact tokens and slots:

    out_t = sum_j exp(scaling q_t . k_j) v_j + sum_c exp(scaling q_t . k~_c + bias) v~_c, over the sum of the weights,

with a learned bias per head that starts at 0. Cost N (e + 1) b + N^2 r / (2 b). The state holds the exact part, trimmed at
segment boundaries, and the slots of all complete segments: O((e + 1) b + N r / b). Slots are read in query chunks.

Shared by variants that differ only in how a segment becomes slots: a `Summary`.

Letters: B batch, H query heads, G key/value heads, N tokens of this call, D head size, b segment size, r slots of a
segment, n segments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..caching import AttentionState, Count, RecentTokens, TokenStore, column, take
from ..config import EfficientAttentionConfig, option
from .joint import Part
from .local import Context, Horizon, Segments, in_ranges, local_decoder, remember
from .ranges import range_decoder


@dataclass(kw_only=True)
class SummaryConfig(EfficientAttentionConfig):
    """Base of the configs of variants that are summary decoders."""

    segment_size: int = option(256, "tokens of a segment, in decoders", minimum=1)
    exact_segments: int = option(1, "segments before its own that a decoder's token sees exactly", minimum=0)
    num_sinks: int = option(4, "first tokens that every later one sees exactly, in decoders", minimum=0)

    def segments(self) -> dict[str, int]:
        """What `summary_decoder` is to be told."""
        return {name: getattr(self, name) for name in ("segment_size", "exact_segments", "num_sinks")}

    def exact_part(self) -> dict[str, Any]:
        """The exact part alone, as options of `transformer_xl`."""
        memory = self.exact_segments * self.segment_size
        own = {name: getattr(self, name) for name in ("segment_size", "num_sinks", "dense_below")}
        return {"memory_size": memory, **own}


class Summary(Protocol):
    """How a segment becomes slots. `real` says which of its tokens count, True = keep; None = all do."""

    slots: int

    def summarise(self, key: Tensor, value: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """key, value (B, G, n, b, D), real (B or 1, n, b) -> keys and values of the slots, (B, G, n, r, D), finite."""

    def exists(self, real: Tensor) -> Tensor:
        """real (B or 1, n, b) -> bool (B or 1, G or 1, n, r), which slots have anything to stand for."""


@dataclass(frozen=True)
class SoftmaxPool:
    """
    r weighted means of a segment's tokens, a = softmax(weight k^T) over them: k~ = a k, v~ = a v. weight (G, r, D).
    """

    weight: Tensor

    @property
    def slots(self) -> int:
        return self.weight.shape[1]

    def summarise(self, key: Tensor, value: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        with torch.autocast(key.device.type, enabled=False):  # weights that do not sum to 1 would scale what keys share
            accurate = torch.promote_types(key.dtype, torch.float32)
            wide = key.to(accurate)
            logits = self.weight[:, None].to(accurate) @ wide.mT
            if real is not None:
                logits = logits.masked_fill(~real[:, None, :, None], torch.finfo(accurate).min)
            weights = logits.softmax(-1)
            return (weights @ wide).to(key.dtype), (weights @ value.to(accurate)).to(value.dtype)

    def exists(self, real: Tensor) -> Tensor:
        return real.any(2)[:, None, :, None].expand(-1, -1, -1, self.slots)


@dataclass(frozen=True)
class SlotsBefore:
    """Begin and end of the slots of complete segments before an exact part, `slots` of each."""

    segment_size: int
    slots: int

    def __call__(self, exact: Count) -> tuple[int, Count]:
        return 0, exact // self.segment_size * self.slots


class SlotStore(TokenStore):
    """The slots of all complete segments, in order; `crop` counts tokens."""

    def __init__(self, segment_size: int, slots: int) -> None:
        super().__init__()
        self.segment_size, self.slots = segment_size, slots

    def crop_to(self, count: Count) -> None:
        super().crop_to(count // self.segment_size * self.slots)


class RecentSlots(RecentTokens):
    """The newest slots of complete segments; `crop` counts tokens."""

    def __init__(self, segment_size: int, slots: int, most: int) -> None:
        super().__init__(most)
        self.segment_size, self.slots = segment_size, slots

    def crop_to(self, count: Count) -> None:
        super().crop_to(count // self.segment_size * self.slots)


def summary_decoder(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    summary: Summary,
    *,
    segment_size: int,
    exact_segments: int = 0,
    window: int | None = None,
    num_sinks: int,
    bias: Tensor,
    lengths: Tensor | None,
    state: AttentionState | None,
    scaling: float,
    dropout: float = 0.0,
    exact: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """
    query (B, H, N, D), key and value (B, G, N, D), compacted, `lengths` (B,) or None -> (B, H, N, D).

    bias: (H,), added to the logits of slots. state: what earlier calls left, or None; this call is added to it.
    window: the exact part begins with the segment that holds token t - window + 1, instead of `exact_segments` before t's.
    exact: what keys and values become where they are read exactly.
    """
    pattern = Segments(segment_size, exact_segments * segment_size)
    if window is not None:
        pattern = Horizon.of(segment_size, window)
    context = remember(state, key, value, pattern, num_sinks=num_sinks, lengths=lengths)
    slots = remember_slots(
        state, context, summary, key.shape[2], segment_size=segment_size, num_sinks=num_sinks, lengths=lengths
    )
    if exact is not None:
        key, value = exact(context.key, context.value)
        sink_key, sink_value = exact(context.sink_key, context.sink_value)
        context = replace(context, key=key, value=value, sink_key=sink_key, sink_value=sink_value)
    far = None
    if slots is not None:
        slots = slots[:2]
        visible = _Visible(summary, pattern, num_sinks, query.shape[1], slots[0].shape[2], key.device)
        if in_ranges(query, context, pattern, dropout):
            added = bias[:, None].expand(1, -1, visible.size)
            if visible.exists is not None:
                added = added.masked_fill(~visible.exists[:, :, 0], float("-inf"))
            seen = SlotsBefore(segment_size, summary.slots)
            return range_decoder(query, context, pattern, slots, added, seen, scaling=scaling)

        def far(position: Count) -> Part:
            return Part(*slots, mask=lambda begin, end: visible(position, begin, end), bias=bias)

    return local_decoder(query, context, pattern, scaling=scaling, dropout=dropout, far=far)


def remember_slots(
    state: AttentionState | None,
    context: Context,
    summary: Summary,
    n: int,
    *,
    segment_size: int,
    num_sinks: int,
    lengths: Tensor | None,
    recent: int | None = None,
) -> tuple[Tensor, Tensor, Count] | None:
    """
    Puts the slots of the segments that a call of n tokens completes behind what the state holds under "slots", and gives
    the keys and values (B, G, S, D) of all, and which slot of the sequence the first of them is; None without any.
    recent: how many of the newest later calls can need, or None where they need all. `context` is what `remember` gave for the
    same call, back to the begin of the segment that the call begins in.
    """
    count, b = 0 if state is None else state.count, segment_size
    begun, ended = count // b, (count + (n if lengths is None else lengths)) // b
    slots, most = None, most_ended(state, b, n, lengths)
    if most:
        slots = _summarise(context, summary, begun, most, b, num_sinks)
    if state is None:
        return None if slots is None else (*slots, 0)
    if recent is None:
        store = state.store("slots", lambda: SlotStore(b, summary.slots))
    else:
        store = state.store("slots", lambda: RecentSlots(b, summary.slots, recent))
    if slots is not None:
        buffer = store.extend(*slots, None if isinstance(ended, int) else (ended - begun) * summary.slots)
        return buffer.key, buffer.value, buffer.first
    key, value = store.entries["key"], store.entries["value"]
    return None if key is None else (key, value, 0 if recent is None else store.first)


def most_ended(state: AttentionState | None, b: int, n: int, lengths: Tensor | None) -> int:
    """As many segments of b tokens as any row completes in a call of n tokens, of which `lengths` (B,) are real, or more."""
    count = 0 if state is None else state.count
    if isinstance(count, int):
        return (count % b + n) // b
    return state.once(("ended", b), lambda: int(((count % b + (n if lengths is None else lengths)) // b).max()))


def _summarise(context: Context, summary: Summary, begun: Count, n: int, b: int, num_sinks: int) -> list[Tensor]:
    """Keys and values (B, G, n r, D) of the slots of n segments, the first of which is `begun`."""
    positions = column(begun) * b + torch.arange(n * b, device=context.key.device)
    key, value = (segments_of(x, context.first, begun, n, b) for x in (context.key, context.value))
    masked = n if num_sinks else 0
    if isinstance(begun, int):
        masked = min(max(-(-num_sinks // b) - begun, 0), n)  # segments that hold sinks
    real = (positions >= num_sinks).reshape(-1, n, b)
    if masked in (0, n):
        parts = [summary.summarise(key, value, real if masked else None)]
    else:
        sizes = [masked, n - masked]
        parts = zip(key.split(sizes, 2), value.split(sizes, 2), (real[:, :masked], None), strict=True)
        parts = [summary.summarise(*part) for part in parts]
    return [torch.cat(x, 2).flatten(2, 3) for x in zip(*parts, strict=True)]


def segments_of(x: Tensor, first: Count, begun: Count, n: int, b: int) -> Tensor:
    """x (B, G, S, D), whose slot 0 is position `first` -> (B, G, n, b, D), the n segments from `begun` on."""
    if isinstance(begun, int) and isinstance(first, int):
        start = begun * b - first
        if x.shape[2] > n * b:
            x = x.split([start, n * b, x.shape[2] - start - n * b], 2)[1]
    else:
        source = column(begun) * b + torch.arange(n * b, device=x.device) - column(first)
        x = take(x, source.clamp_max(x.shape[2] - 1))
    return x.unflatten(2, (n, b))


class _Visible:
    """Which slots queries see: those of segments before their exact part, unless a slot stands for nothing."""

    def __init__(self, summary: Summary, pattern: Segments, num_sinks: int, heads: int, size: int, device):
        self.pattern, self.slots, self.size = pattern, summary.slots, size
        self.index, b = torch.arange(size, device=device), pattern.block
        self.exists = None
        if num_sinks:  # only a segment that holds sinks can lack a slot
            segments = -(-num_sinks // b)
            real = torch.arange(segments * b, device=device).view(1, segments, b) >= num_sinks
            exists = summary.exists(real).flatten(2, 3)[:, :, :size]
            if exists.shape[1] > 1:
                exists = exists.repeat_interleave(heads // exists.shape[1], 1)
            self.exists = pad(exists, (0, size - exists.shape[2]), value=True)[:, :, None]

    def __call__(self, position: Count, begin: int, end: int) -> Tensor:
        """(B or 1, H or 1, end - begin, slots), for queries at position + begin.. ; a prefix where rows agree."""
        t = column(position) + torch.arange(begin, end, device=self.index.device)
        seen = self.pattern.begin_of(t).clamp_min(0) // self.pattern.block * self.slots
        size = self.size
        if isinstance(position, int):
            size = min(max(self.pattern.begin_of(position + end - 1), 0) // self.pattern.block * self.slots, size)
        mask = (self.index[:size] < seen[..., None])[..., None, :, :]
        mask = mask if mask.ndim == 4 else mask[None]
        return mask if self.exists is None else mask & self.exists[..., :size]
