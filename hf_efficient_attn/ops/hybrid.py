"""
A window read exactly, joined with the sums of a feature map over what lies outside (Zhang et al. 2025, LoLCATs,
arXiv:2410.10254): with logits a_ij of the near keys j, c_i their largest, and a gate s in (0, 1) per head,

    out_i = (s sum_j exp(a_ij - c_i) v_j + numerator_i) / (s sum_j exp(a_ij - c_i) + normaliser_i).

Numerator and normaliser of the far keys come from `chunked_scan.read_past`. Other than in a softmax, c does not cancel:
it has a gradient. Queries are taken some tiles at a time, forward and again backward, so that memory is linear in N.

Letters: B batch, H query heads, G key/value heads, N queries, D head size, C tiles, T queries of a tile, P = B C G, R = H / G.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..caching import Count
from .grain import at_once
from .local import Blocks
from .precision import first_order, without_autocast

TILE = 32, 128  # queries per tile, fewest and most: fewer read less in vain, more make better use of a product
FLOOR = 1e-30  # smallest normaliser, for a query that sees nothing


@dataclass(frozen=True)
class Window:
    """
    Query i stands at position first + back + i and sees slots i..i + back + ahead of the keys, of which slot s holds
    position first + s; those at positions 0..end-1 exist. `sinks` further keys hold positions 0..sinks-1 and are seen
    where they lie before the window. first, end: int or (B,).
    """

    back: int
    ahead: int
    first: Count
    end: Count
    sinks: int = 0

    def mask(self, begin: int, size: int, count: int, device: torch.device) -> Tensor | None:
        """
        (B or 1, count, 1, size, sinks + size + back + ahead) bool: what the queries of `count` tiles of `size` see, the first
        of which is query `begin`; None where all is seen.
        """
        if size == count == 1 and isinstance(self.first, int) and isinstance(self.end, int):
            first = self.first + begin
            if first >= self.sinks and first + self.back + self.ahead < self.end:
                return None
        first, end = (torch.as_tensor(x, device=device).reshape(-1, 1, 1, 1) for x in (self.first, self.end))
        tiles = begin + size * torch.arange(count, device=device)[:, None, None]
        i, j = (torch.arange(n, device=device) for n in (size, size + self.back + self.ahead))
        position, offset = first + tiles + j, j - i[:, None]
        window = (offset >= 0) & (offset <= self.back + self.ahead) & (position >= 0) & (position < end)
        sinks = torch.arange(self.sinks, device=device) < first + tiles + i[:, None]
        batch = max(len(window), len(sinks))
        return torch.cat([x.expand(batch, -1, -1, -1) for x in (sinks, window)], 3)[:, :, None]


def window_and_sums(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Window,
    gate: Tensor,
    far: Tensor,
    *,
    sinks: tuple[Tensor, Tensor],
    scaling: float,
) -> Tensor:
    """
    query (B, H, N, D), key and value (B, G, back + N + ahead, D) -> (B, H, N, D).

    gate: (H,). far: (B, H, N, D + 1), numerator and normaliser in float32 or better. sinks: key and value of the first
    `window.sinks` positions, (B, G, sinks, D).
    """
    tile = min(max(window.back + window.ahead + 1, TILE[0]), TILE[1], query.shape[2])
    rest = -query.shape[2] % tile
    if rest:
        query, key, value, far = (pad(x, (0, 0, 0, rest)) for x in (query, key, value, far))
    output = _Hybrid.apply(window, tile, scaling, query, key, value, *sinks, gate.to(far.dtype), far)
    return output[:, :, : output.shape[2] - rest] if rest else output


class _Hybrid(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, window, tile, scaling, query, key, value, sink_key, sink_value, gate, far):
        output, normaliser = torch.empty_like(query), far.new_empty(far.shape[:3])
        for blocks in _blocks(window, tile, query):
            near = _Tiles.of(window, blocks, scaling, far.dtype, query, key, value, sink_key, sink_value)
            read = near.by_token(torch.bmm(near.weights, near.value), far.shape[1])
            read = torch.addcmul(far[:, :, near.queries], read, gate[:, None, None])
            torch.clamp_min(read[..., -1], FLOOR, out=normaliser[:, :, near.queries])
            output[:, :, near.queries] = read[..., :-1].div_(normaliser[:, :, near.queries, None])
        ctx.options = window, tile, scaling
        ctx.save_for_backward(query, key, value, sink_key, sink_value, gate, output, normaliser)
        return output

    @staticmethod
    @first_order
    @without_autocast
    def backward(ctx, grad):
        window, tile, scaling = ctx.options
        query, key, value, sink_key, sink_value, gate, output, normaliser = ctx.saved_tensors
        inputs, dtype = (query, key, value, sink_key, sink_value), gate.dtype
        of_query, of_far = torch.empty_like(query), gate.new_empty(*query.shape[:3], query.shape[3] + 1)
        of_key, of_value, of_sink_key, of_sink_value = (torch.zeros_like(x, dtype=dtype) for x in inputs[1:])
        of_gate, sinks, groups = torch.zeros_like(gate), window.sinks, key.shape[1]
        for blocks in _blocks(window, tile, query):
            near = _Tiles.of(window, blocks, scaling, dtype, *inputs)
            queries = near.queries
            slope = of_far[:, :, queries]
            of_numerator = torch.div(grad[:, :, queries], normaliser[:, :, queries, None], out=slope[..., :-1])
            slope[..., -1] = (of_numerator * output[:, :, queries]).sum(-1).neg_()
            slope[..., -1].masked_fill_(normaliser[:, :, queries] <= FLOOR, 0)
            given = _by_group(blocks.arrange(slope), groups)
            gates = _by_group(gate[:, None, None].expand(blocks.batch * blocks.count, -1, tile, 1), groups)
            of_logits = torch.bmm(given, near.value.mT).mul_(near.weights)
            of_weights = of_logits.sum(-1, keepdim=True)
            of_gate += near.by_token(of_weights, len(gate)).sum((0, 2, 3))
            gated, of_logits, of_weights = given * gates, of_logits.mul_(gates), of_weights.mul_(gates)
            of_logits.scatter_add_(-1, near.weights.argmax(-1, keepdim=True), -of_weights)  # c, subtracted everywhere
            of_query[:, :, queries] = near.by_token(torch.bmm(of_logits, near.key), len(gate)).mul_(scaling)
            dk, dv = torch.bmm(of_logits.mT, near.query), torch.bmm(near.weights.mT, gated)[..., :-1]
            for x, of_window, of_sinks in ((dk, of_key, of_sink_key), (dv, of_value, of_sink_value)):
                x = x.unflatten(0, (-1, groups))
                of_sinks += x[:, :, :sinks].unflatten(0, (-1, blocks.count)).sum(1)
                blocks.add_windows(of_window, x[:, :, sinks:], window.back)
        grads = of_query, of_key, of_value, of_sink_key, of_sink_value
        return None, None, None, *(g.to(x.dtype) for g, x in zip(grads, inputs, strict=True)), of_gate, of_far


def _blocks(window: Window, tile: int, query: Tensor) -> Iterator[Blocks]:
    """All tiles of the queries, some at a time; they begin at slots of the keys."""
    batch, heads, n = query.shape[:3]
    weights = batch * heads * tile * (window.sinks + window.back + tile + window.ahead)
    most = max(1, at_once(weights, query.device) // weights)
    for begin in range(0, n // tile, most):
        yield Blocks(batch, window.back + begin * tile, min(most, n // tile - begin), tile)


@dataclass(frozen=True)
class _Tiles:
    """
    query (P, R T, D) times `scaling`; key (P, L, D), sinks first; value (P, L, D + 1), ones behind; weights (P, R T, L).
    """

    blocks: Blocks
    queries: slice
    query: Tensor
    key: Tensor
    value: Tensor
    weights: Tensor

    @staticmethod
    def of(window, blocks: Blocks, scaling, dtype, query, key, value, sink_key, sink_value) -> _Tiles:
        begin, groups = blocks.start - window.back, key.shape[1]
        queries = slice(begin, begin + blocks.count * blocks.size)

        def with_sinks(sinks: Tensor, x: Tensor) -> Tensor:
            sinks = sinks.repeat_interleave(blocks.count, 0)
            return torch.cat([sinks, blocks.windows(x, window.back, window.ahead)], 2).to(dtype).flatten(0, 1)

        key, value = with_sinks(sink_key, key), with_sinks(sink_value, value)
        query = _by_group(blocks.arrange(query[:, :, queries]).to(dtype) * scaling, groups)
        weights = torch.bmm(query, key.mT)
        mask = window.mask(begin, blocks.size, blocks.count, key.device)
        if mask is not None:
            shape = blocks.batch, blocks.count, -1, blocks.size, key.shape[1]
            weights.view(shape).masked_fill_(~mask, float("-inf"))
        largest = weights.amax(-1, keepdim=True)
        weights.sub_(largest.masked_fill_(largest == float("-inf"), 0)).exp_()
        return _Tiles(blocks, queries, query, key, pad(value, (0, 1), value=1.0), weights)

    def by_token(self, x: Tensor, heads: int) -> Tensor:
        """(P, R T, E) -> (B, H, C T, E)."""
        return self.blocks.collect(x.reshape(-1, heads, self.blocks.size, x.shape[2])).squeeze(3)


def _by_group(x: Tensor, groups: int) -> Tensor:
    """(B C, H, T, E) -> (P, R T, E)."""
    return x.unflatten(1, (groups, -1)).flatten(2, 3).flatten(0, 1)
