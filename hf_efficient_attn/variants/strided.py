"""
`strided`: i attends to every j with (i - j) mod `stride` = 0, and to its neighbours,
    decoder: i, i - 1, ..., i - local_size + 1, and the first `num_sinks` tokens, all at or before i,
    encoder: `local_size` tokens on each side;
a key of two of these sets counts once, and all keys of a query share one softmax.

Child 2019, Sparse Transformer (arXiv:1904.10509), with the union of its two patterns inside each head; the sinks are ours.
Cost N^2 / stride + N local_size. Computed by residue classes: the positions of one class modulo the stride attend to each
other by ordinary (causal) attention, and the neighbours of other classes join block by block.
Decoder state: O(N), all keys and values, of which a step reads N / stride + local_size. Dense limit: stride 1.
No parameters: the patched model starts with its own weights. Encoders ignore `num_sinks`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..caching import Count, TokenStore, column
from ..config import EfficientAttentionConfig, option
from ..ops.few import attend_slots
from ..ops.joined_ranges import Reading, joined_ranges
from ..ops.joint import Part, joint_attention
from ..ops.local import Blocks, band_ranges, from_residues, residues
from ..ops.ranges import QUERIES, Tile, has_kernel
from ..ops.rows import shift
from ..registry import get_config_class, register_variant
from ..variant import EfficientAttention

STEP = 16  # new tokens up to which each query reads its keys by itself
BLOCK = 64  # smallest block in which neighbours are computed


@dataclass(kw_only=True)
class StridedConfig(EfficientAttentionConfig):
    """Hyper-parameters of `strided`."""

    stride: int = option(64, "distance of the keys that a query sees far away", minimum=1)
    local_size: int = option(
        64, "neighbours: in a decoder the token and local_size - 1 before, else per side", minimum=0
    )
    num_sinks: int = option(4, "first tokens that every later one sees, in decoders", minimum=0)

    @classmethod
    def tiny(cls, causal: bool) -> StridedConfig:
        return cls(stride=7, local_size=3, num_sinks=2)

    @classmethod
    def variations(cls, causal: bool) -> list[StridedConfig]:
        return [cls(stride=5, local_size=7, num_sinks=0), cls(stride=3, local_size=1), cls(stride=16, local_size=2)]

    @classmethod
    def dense_limit(cls, length: int, causal: bool) -> StridedConfig:
        return cls(stride=1)

    def window_only(self, causal: bool) -> EfficientAttentionConfig | None:
        """The neighbours and the sinks."""
        if self.local_size == 0:
            return None
        return get_config_class("sliding_window")(
            window=self.local_size, num_sinks=self.num_sinks, dense_below=self.dense_below
        )


@register_variant(
    "strided",
    family="fixed patterns",
    summary="every stride-th token and the neighbours",
    paper="Child 2019, arXiv:1904.10509",
    also=("sparse_transformer",),
)
class StridedAttention(EfficientAttention):
    """
    `strided`. The queries of a call stand in a frame of L slots that begins at a multiple of the stride, either where the
    sequence begins or so early that all their neighbours are in it.
    """

    config_class = StridedConfig
    linear_cost = False

    def attend(self, query, key, value, *, lengths, scaling, dropout, causal, state, hidden=None) -> Tensor:
        stride, n = self.config.stride, query.shape[2]
        offset = 0
        if state is not None:
            offset = state.count
            buffer = state.store("tokens", TokenStore).extend(key, value, lengths)
            key, value = buffer.key, buffer.value
            if n <= STEP:
                return self._step(query, key, value, offset, scaling, dropout)
        if isinstance(offset, int) and has_kernel(query, dropout):
            ends = [key.shape[2]] * len(query) if causal or lengths is None else lengths.tolist()
            readings = {end: self._readings(offset, n, end) for end in set(ends)}
            return joined_ranges(query, key, value, [readings[end] for end in ends], scaling=scaling)
        start = _floor(offset - self._reach, stride)
        skip = offset - start
        span = n + (skip if isinstance(skip, int) else self._reach + stride - 1)
        if isinstance(start, int) and start == 0:
            stride = min(stride, span)  # a class of one token needs no slots for more
        size = -(-span // stride) * stride
        framed, near_key, near_value = shift(query, skip, size), shift(key, -start, size), shift(value, -start, size)
        used = None
        if not causal and (lengths is not None or n < size or size % self._block(size)):
            ends = torch.full((1,), n, device=key.device) if lengths is None else lengths
            used = (torch.arange(size, device=key.device) < ends[:, None]).expand(key.shape[0], -1)[:, None, :, None]
        parts = [_classes(near_key, near_value, stride, causal, used), *self._neighbours(near_key, near_value, used)]
        if isinstance(start, Tensor) or start > 0:
            parts.append(_past(key, value, stride, start, size))
        if causal and self.config.num_sinks:
            parts.append(self._sinks(key, value, start, size))
        return shift(joint_attention(framed, parts, scaling=scaling, dropout=dropout), -skip, n)

    @property
    def _reach(self) -> int:
        """Distance of the farthest neighbour."""
        return max(self.config.local_size - 1, 0) if self.host.causal else self.config.local_size

    def _block(self, size: int) -> int:
        """Slots of a block in which neighbours are computed."""
        return min(max(self._reach, BLOCK), size)

    def _readings(self, offset: int, n: int, size: int) -> list[Reading]:
        """
        What n queries from position `offset` on read of `size` keys: neighbours and sinks where they stand, and by classes the
        keys that are neither, which are `apart` places away or more.
        """
        stride, reach, causal = self.config.stride, self._reach, self.host.causal
        sinks = min(self.config.num_sinks, size) if causal else 0
        near = band_ranges(range(n), reach, 0 if causal else reach, sinks, size, offset=offset)
        before, after, apart, query, key = [], [], reach // stride + 1, 0, 0
        for r in range(min(stride, offset + n)):  # `query` and `key` are the places where the class begins
            begin, end = -(-(offset - r) // stride), -(-(offset + n - r) // stride)
            first, last = -(-max(sinks - r, 0) // stride), -(-max(size - r, 0) // stride)
            for low in range(begin, end, QUERIES):
                high, place = min(low + QUERIES, end), query + low - begin
                tile = Tile(place, place + high - low, key + first, key + last, key + low - apart, 0, 0)
                if high - apart > first:
                    before.append(tile._replace(end=key + min(high - apart, last)))
                if not causal and low + apart < last:
                    floor = key + low + apart
                    after.append(tile._replace(begin=floor, diagonal=key + last, floor=floor))
            query, key = query + end - begin, key + last
        orders = (((torch.arange(m) + o) % stride).argsort(stable=True) for m, o in ((n, offset), (size, 0)))
        return [Reading(None, None, [near], sinks), Reading(*orders, [before, after])]

    def _neighbours(self, key: Tensor, value: Tensor, used: Tensor | None) -> list[Part]:
        """Neighbours of other classes, key block by key block; `used` (B, 1, L, 1) bool or None, which keys exist."""
        size, stride, reach, causal = key.shape[2], self.config.stride, self._reach, self.host.causal
        block = self._block(size)
        slots, parts = torch.arange(block, device=key.device), []
        for away in (0, -1) if causal else (0, -1, 1):
            possible = range(1 - block - away * block, block - away * block)
            some = any(abs(d) <= reach and d % stride and (d > 0 or not causal) for d in possible)
            if size > abs(away) * block and some:
                apart = slots[:, None] - (slots + away * block)
                visible = (apart.abs() <= reach) & (apart % stride != 0) & (apart > 0 if causal else True)
                parts.append(_block_apart(key, value, block, away, visible, used))
        return parts

    def _sinks(self, key: Tensor, value: Tensor, start: Count, size: int) -> Part:
        """The first tokens, for queries to which they are no neighbours and of another class."""
        sinks = torch.arange(min(self.config.num_sinks, key.shape[2]), device=key.device)
        position = (column(start) + torch.arange(size, device=key.device)).view(-1, 1, size, 1)
        seen = self._sees_sink(position - sinks)
        return Part(key[:, :, : len(sinks)], value[:, :, : len(sinks)], mask=seen)

    def _sees_sink(self, apart: Tensor) -> Tensor:
        return (apart > self._reach) & (apart % self.config.stride != 0)

    def _step(self, query, key, value, offset, scaling, dropout) -> Tensor:
        """A few new tokens."""
        stride, device = self.config.stride, query.device
        position = (column(offset) + torch.arange(query.shape[2], device=device)).view(-1, 1, query.shape[2], 1)
        near = torch.arange(1, self._reach + 1, device=device)
        far = torch.arange(0, key.shape[2], stride, device=device)
        slots = position - torch.cat([far, near[near % stride != 0]])
        sinks = torch.arange(self.config.num_sinks, device=device).expand(*slots.shape[:3], -1)
        seen = torch.cat([slots >= 0, self._sees_sink(position - sinks)], -1)
        slots = torch.cat([slots, sinks], -1)
        return attend_slots(query, key, value, slots, seen, scaling=scaling, dropout=dropout)


def _classes(key: Tensor, value: Tensor, stride: int, causal: bool, used: Tensor | None) -> Part:
    """Frame slots of one class modulo the stride see each other."""
    mask = None if used is None else residues(used, stride).transpose(2, 3)
    return _by_class(key, value, stride, key.shape[2], causal=causal, mask=mask)


def _past(key: Tensor, value: Tensor, stride: int, start: Count, size: int) -> Part:
    """Frame slots see the keys of their class before the frame, which begins at `start`."""
    mask = None
    if isinstance(start, int):
        key, value = key[:, :, :start], value[:, :, :start]
    else:
        slots = torch.arange(-(-key.shape[2] // stride), device=key.device)
        mask = (slots < (start // stride)[:, None]).repeat_interleave(stride, 0)[:, None, None]
    return _by_class(key, value, stride, size, mask=mask)


def _by_class(key: Tensor, value: Tensor, stride: int, size: int, **options) -> Part:
    """Each of `size` frame slots sees keys of its class."""

    def arrange(x: Tensor, fill: float) -> Tensor:
        return residues(x, stride)

    def collect(x: Tensor, fill: float) -> Tensor:
        return from_residues(x, stride, size).unsqueeze(3)

    return Part(arrange(key, 0.0), arrange(value, 0.0), arrange, collect, **options)


def _block_apart(key: Tensor, value: Tensor, block: int, away: int, visible: Tensor, used: Tensor | None) -> Part:
    """Queries see the key block `away` blocks further, as `visible` (block, block) says; L need not be a multiple."""
    size = key.shape[2]
    before, after = max(-away, 0) * block, max(away, 0) * block  # queries that have no such block
    blocks = Blocks(key.shape[0], 0, -(-size // block) - abs(away), block)
    short = (blocks.count + abs(away)) * block - size

    def arrange(x: Tensor, fill: float) -> Tensor:
        return blocks.arrange(_cut(x, before, after, fill))

    def collect(x: Tensor, fill: float) -> Tensor:
        return pad(blocks.collect(x), (0, 0, 0, 0, before, after), value=fill)[:, :, :size]

    def keys(x: Tensor) -> Tensor:
        return blocks.arrange(_cut(x, after, before, 0))

    def _cut(x: Tensor, head: int, tail: int, fill: float) -> Tensor:
        end = size + short - tail
        return pad(x[:, :, head:end], (0, 0, 0, max(end - size, 0)), value=fill) if end > size else x[:, :, head:end]

    mask = visible[None, None]
    if used is not None:
        mask = mask & keys(used).transpose(2, 3)
    return Part(keys(key), keys(value), arrange, collect, mask=mask)


def _floor(count: Count, unit: int) -> Count:
    count = max(count, 0) if isinstance(count, int) else count.clamp_min(0)
    return count // unit * unit
