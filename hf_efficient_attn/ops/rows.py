"""
Positions are counted over real tokens, per row and text: here a batch is brought to that form and put back.

A batch with a padding mask becomes right-padded, row b's real tokens in order at 0..lengths[b]-1, padded slots zeroed;
its output gets zeros at the padded queries. Of rows that hold several texts each text becomes a row. Without either nothing
is done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Rows:
    """
    lengths: (B,) int64, real tokens per row. real: (B, N) bool, True = keep, as given.
    order: (B, N) int64, the source of each compacted slot, or None where the rows are right-padded already.
    """

    lengths: Tensor
    real: Tensor
    order: Tensor | None

    @staticmethod
    def of(padding: Tensor | None) -> Rows | None:
        """`padding`: (B, N) bool, True = keep, or None. None where every token is real."""
        if padding is None:
            return None
        real = padding.bool()
        tracing = torch.compiler.is_compiling()
        if not tracing and bool(real.all()):
            return None
        order = None
        if tracing or bool((real[:, 1:] & ~real[:, :-1]).any()):
            slot = torch.where(real, real.cumsum(1), real.sum(1, keepdim=True) + (~real).cumsum(1)) - 1
            order = torch.zeros_like(slot).scatter(
                1, slot, torch.arange(slot.shape[1], device=slot.device).expand_as(slot)
            )
        return Rows(real.sum(1), real, order)

    def to(self, device: torch.device) -> Rows:
        order = None if self.order is None else self.order.to(device)
        return Rows(self.lengths.to(device), self.real.to(device), order)

    @property
    def valid(self) -> Tensor:
        """(B, N) bool: which compacted slots hold a real token."""
        return torch.arange(self.real.shape[1], device=self.real.device) < self.lengths[:, None]

    def compact(self, x: Tensor) -> Tensor:
        """(B, N, E) or (B, H, N, D) -> the same shape, compacted, zero in the padded slots."""
        per_head = x.ndim == 4
        if self.order is not None:
            index = self.order[:, None, :, None] if per_head else self.order[:, :, None]
            x = torch.gather(x, -2, index.expand(x.shape))
        valid = self.valid
        return x.masked_fill(~(valid[:, None, :, None] if per_head else valid[:, :, None]), 0)

    def restore(self, x: Tensor) -> Tensor:
        """Inverse of `compact` for (B, H, N, D); padded queries become zeros."""
        if self.order is not None:
            slot = (self.real.cumsum(1) - 1).clamp_min(0)
            x = torch.gather(x, 2, slot[:, None, :, None].expand(x.shape))
        return x.masked_fill(~self.real[:, None, :, None], 0)

    def over(self, attend: Callable[..., Tensor], *given: Tensor | None) -> Tensor:
        """attend(*given, lengths) of compacted rows: (B, H, N, D), put back."""
        return self.restore(attend(*(None if x is None else self.compact(x) for x in given), self.lengths))


@dataclass(frozen=True)
class Texts:
    """
    Rows without padding that hold several texts one after the other, of which none sees another (packed sequences).

    groups: texts of like length, right-padded: (T, L) int64, where in the flattened batch their tokens are, (T, L) bool, which
    slots hold one, and (T,) lengths, or None where all are equal. back: (B N,) int64, the slot, of all groups' one after the
    other, that each token of the flattened batch is in. Made once for all layers, which then wait for nothing.
    """

    groups: list[tuple[Tensor, Tensor, Tensor | None]]
    back: Tensor
    real = None  # every token is

    @staticmethod
    def of(index: Tensor) -> Texts:
        """index: (B, N) integers, which text of its row a token belongs to."""
        begins = torch.ones_like(index, dtype=torch.bool)
        begins[:, 1:] = index[:, 1:] != index[:, :-1]
        first = begins.flatten().nonzero()[:, 0]
        lengths = torch.diff(first, append=first.new_tensor([index.numel()]))
        size, groups, slots = torch.log2(lengths).ceil(), [], 0  # as rows they take at most twice the room
        back = first.new_empty(index.numel())
        for some in (size == s for s in size.unique()):
            slot = torch.arange(int(lengths[some].max()), device=index.device)
            places, used = first[some, None] + slot, slot < lengths[some, None]
            back[places[used]] = slots + used.flatten().nonzero()[:, 0]
            slots += used.numel()
            groups.append((places.clamp_max(len(back) - 1), used, None if bool(used.all()) else lengths[some]))
        return Texts(groups, back)

    def to(self, device: torch.device) -> Texts:
        moved = [tuple(x if x is None else x.to(device) for x in group) for group in self.groups]
        return Texts(moved, self.back.to(device))

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return self.groups[-1][0].shape[1]

    def over(self, attend: Callable[..., Tensor], *given: Tensor | None) -> Tensor:
        """
        attend(*given, lengths) of one group of texts after the other, each a row, put back: of given (B, H, N, D) or (B, N, E)
        the first is (B, H, N, D), and so is what is returned.
        """
        found, (batch, _, n, _) = [], given[0].shape
        for places, used, lengths in self.groups:
            rows = [None if x is None else _rows_at(x, places, None if lengths is None else used) for x in given]
            found.append(attend(*rows, lengths).transpose(1, 2).flatten(0, 1))
        return torch.cat(found)[self.back].unflatten(0, (batch, n)).transpose(1, 2)


def _rows_at(x: Tensor, places: Tensor, used: Tensor | None) -> Tensor:
    """x (B, H, N, D) or (B, N, E), places (T, L) -> (T, H, L, D) or (T, L, E), zero where not `used`."""
    flat = x.transpose(1, 2).flatten(0, 1) if x.ndim == 4 else x.flatten(0, 1)
    rows = flat[places]
    if used is not None:
        rows = rows.masked_fill(~used.view(*used.shape, *[1] * (rows.ndim - 2)), 0)
    return rows.transpose(1, 2) if x.ndim == 4 else rows


def shift(x: Tensor, by: int | Tensor, length: int) -> Tensor:
    """(B, H, S, D) -> (B, H, length, D): slot i goes to slot i + by, where `by` is an int or (B,); zeros elsewhere."""
    if isinstance(by, int):
        if by == 0 and length == x.shape[2]:
            return x
        return pad(x, (0, 0, by, length - by - x.shape[2]))
    source = torch.arange(length, device=x.device) - by[:, None]
    there = (source >= 0) & (source < x.shape[2])
    source = source.clamp(0, x.shape[2] - 1)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return torch.gather(x, 2, source).masked_fill(~there[:, None, :, None], 0)
