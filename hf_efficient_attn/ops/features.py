"""
Feature maps of attention in linear time, over pieces of a text: what `chunked_scan` and `feature_scan` are given.

Letters: B batch, H query heads, G key/value heads, N tokens, T tokens of a piece, D head size, m features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

NEVER = float("-inf")
LOG_2 = math.log(2)  # references are multiples of it: numbers relative to another one have the same digits
REACH = 50.0  # most that a logarithm may rise in a piece: exp(1.5 REACH), the largest number met, fits float32


@dataclass(frozen=True)
class Features:
    """
    query: (x (B, H, T, D), *params) -> (B, H, T, m). key: (x (B, G, T, D), *params) -> (B, G, T, m). Both give a tensor
    of their own, which is overwritten where they are logarithmic. A decoder is fastest where token follows token in
    memory: where maps give the transpose of a contiguous (B, H, m, T). size: m.
    params: tensors that the maps use and that may need gradients.
    tokens: None, or numbers of each token (B or 1, 1, N, E), whose piece (B or 1, 1, T, E) the maps get after x.
    logarithmic: the maps give log phi; what is the same for all features of a query cancels and may be left out.
    floor: the smallest normaliser, of either sign; below it the query and its keys have nothing in common and the output
        fades to 0.
        None: a decoder is to give the sums that it read, as they are.
    pulls: (x, [tokens,] slope, *params) -> the gradient of x from that of what the map gave, for query and key, where no
    parameter needs any. None leaves it to autograd, whose calls for each chunk take time.
    """

    query: Callable[..., Tensor]
    key: Callable[..., Tensor]
    size: int
    params: tuple[Tensor, ...] = ()
    logarithmic: bool = False
    floor: float | None = 1e-30
    pulls: tuple[Callable[..., Tensor], Callable[..., Tensor]] | None = None
    tokens: Tensor | None = None


def project(x: Tensor, w: Tensor) -> Tensor:
    """x (B, H, T, D), w (B or 1, G, m, D), each group's own -> w x (B, H, T, m); it stands in rows where G = H."""
    tokens, x = x.shape[2], x.unflatten(1, (w.shape[1], -1)).flatten(2, 3)
    return (w @ x.mT).mT.unflatten(2, (-1, tokens)).flatten(1, 2)


def positive(x: Tensor) -> Tensor:
    """elu(x) + 1, exp(x) below 0 and x + 1 above, in digits of its own where it is small."""
    return x.clamp_max(0).exp() + x.relu()


class _Map:
    """
    One feature map over pieces of its input. In a backward pass `of_params` has a tensor for each parameter that needs
    its gradient; what the pieces give is pulled back to the gradients `of_x` and `of_params`.
    """

    def __init__(self, function, pull, x, features: Features, params, accurate, of_params=None) -> None:
        self.function, self.explicit, self.x, self.params = function, pull, x, params
        self.tokens, self.logarithmic, self.accurate = features.tokens, features.logarithmic, accurate
        self.of_params = of_params
        if of_params is not None:
            self.of_x = torch.empty_like(x)
            pairs = zip(params, of_params, strict=True)
            self.params = [p.detach().requires_grad_(total is not None) for p, total in pairs]
        self.tracked = of_params is not None and pull is None

    def __call__(self, place: slice, lengths: Tensor | None = None) -> tuple[Tensor, Callable[[Tensor], None]]:
        """What the map gives for these tokens, padding weighing nothing, and what takes the gradient of that."""
        with nullcontext() if torch.is_grad_enabled() == self.tracked else torch.set_grad_enabled(self.tracked):
            x = self.x[:, :, place].detach().requires_grad_(self.tracked)
            accurate = x.to(self.accurate)
            tokens = () if self.tokens is None else (self.tokens[:, :, place],)
            given = self.function(accurate, *tokens, *self.params)
        hidden = None if lengths is None else padded(lengths, place)

        def pull(slope: Tensor) -> None:
            if hidden is not None:
                slope = slope.masked_fill(hidden, 0)
            if self.explicit is not None:
                self.of_x[:, :, place] = self.explicit(accurate, *tokens, slope, *self.params)
                return
            wanted = [x, *(p for p in self.params if p.requires_grad)]
            self.of_x[:, :, place], *found = torch.autograd.grad(given, wanted, slope, allow_unused=True)
            for total, part in zip((t for t in self.of_params if t is not None), found, strict=True):
                if part is not None:
                    total += part

        raw = given.detach()
        return raw if hidden is None else raw.masked_fill(hidden, NEVER if self.logarithmic else 0.0), pull


def feature_maps(features: Features, query, key, params, accurate: torch.dtype, wanted=None) -> tuple[_Map, _Map]:
    """The query map and the key map; they share `of_params`."""
    of_params = None
    if wanted is not None:
        of_params = [torch.zeros_like(p) if want else None for p, want in zip(params, wanted, strict=True)]
    pull_q, pull_k = features.pulls or (None, None)
    rest = features, params, accurate, of_params
    return _Map(features.query, pull_q, query, *rest), _Map(features.key, pull_k, key, *rest)


class References:
    """
    What a decoder's sums are relative to, since logarithms of weights may rise without end. `top`: their running maximum, to
    which the sums that it begins with are relative.
    """

    def __init__(self, top: Tensor) -> None:
        self.top = self.latest = top

    def follow(self, logs: Tensor, size: int) -> Tensor | None:
        """
        For keys of these logarithms (B, G, K T, X) what the sums before them are relative to and what they are to be in each
        chunk of T = `size`, (B, G, K + 1, X), -inf where there was no key. None where logarithms rise by more than `REACH` in
        some chunk and T can be halved.
        """
        chunks = logs.unflatten(2, (-1, size))
        tops = torch.cat([self.top[:, :, None], chunks.amax(3)], 2).cummax(2).values
        low, high = torch.maximum(tops[:, :, :-1], chunks[:, :, :, 0]), tops[:, :, 1:]
        if size > 1 and rise(low, high) > REACH:
            return None
        marks = torch.cat([self.latest[:, :, None], ((low + high) / (2 * LOG_2)).round() * LOG_2], 2)
        self.top, self.latest = tops[:, :, -1], marks[:, :, -1]
        return marks

    def settled(self) -> Tensor:
        """Times this (B, G, X, 1), the sums are relative to the running maximum."""
        return torch.exp(self.latest - finite(self.top))[..., None]


def rise(low: Tensor, high: Tensor) -> float:
    """The largest over all features; none where there is no key yet."""
    return float((high - low).masked_fill(high == NEVER, 0.0).max())


def rescale(total: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """Sums relative to `old` made relative to `new`."""
    return total * torch.exp(old - new)[..., None].to(total.dtype)


def finite(top: Tensor) -> Tensor:
    """A running maximum, 0 where there was no key."""
    return top.masked_fill(top == NEVER, 0)


def cuts(length: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, length)) for i in range(0, length, size)]


def by_span(places: list[tuple[slice, int]], span: int) -> list[list[tuple[slice, int]]]:
    """The pieces, in order, of each `span` tokens."""
    spans = []
    for place, index in places:
        if place.start % span == 0:
            spans.append([])
        spans[-1].append((place, index))
    return spans


def padded(lengths: Tensor, place: slice) -> Tensor:
    """(B, 1, T, 1) bool, True = padding; lengths (B,) or, as a mask, (B, N)."""
    if lengths.dtype is torch.bool:
        return ~lengths[:, None, place, None]
    return (torch.arange(place.start, place.stop, device=lengths.device) >= lengths[:, None])[:, None, :, None]


def halves(place: slice, unit: int = 1) -> list[slice]:
    """The later half and the earlier one, of whole units where there are several."""
    length = place.stop - place.start
    middle = place.start + (length // unit // 2 * unit if length > unit else length // 2)
    return [slice(middle, place.stop), slice(place.start, middle)]
