"""
Positions are counted over real tokens, per row: here rows are compacted to that form and put back.

A batch with a padding mask becomes right-padded, row b's real tokens in order at 0..lengths[b]-1, padded slots zeroed;
`restore` undoes it on the output and gives zeros at the padded queries. Without padding nothing is done.
"""

from __future__ import annotations

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
