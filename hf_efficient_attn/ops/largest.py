"""
Which keys have the largest products with a query.

Letters: B batch, H query heads, G key/value heads, R queries, S keys, D head size, K = `picks`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import kernels
from .grain import at_once
from .tiles import largest_places

SCORES = 2**18  # products that exist at one time on a CPU
ROWS = 48  # queries whose products the kernel holds at one time


@torch.no_grad()
def largest_products(query: Tensor, key: Tensor, ends: Tensor, picks: int) -> Tensor:
    """
    query (B, H, R, D), key (B, G, S, D) -> (B, H, R, K) int64, ascending: of the first `ends` keys, int64 (B or 1, R), the
    `picks` with the largest products with a query, of equal ones the lower; 0 at the end where there are fewer.
    """
    (batch, heads, rows, _), (groups, size) = query.shape, key.shape[1:3]
    ends = ends.clamp_max(size).expand(batch, -1)
    if picks == 0:
        return ends.new_zeros(batch, heads, rows, 0)
    if size > 0 and (library := kernels.serving("largest", query)) is not None:
        return _by_kernel(library, query, key, ends, picks)
    grouped, chosen = query.unflatten(1, (groups, -1)), ends.new_zeros(batch, heads, rows, picks)
    key, slot, most = key.to(query.dtype), torch.arange(size, device=key.device), min(picks, size)
    step = max(1, at_once(SCORES, query.device) // max(1, batch * heads * size))
    for begin in range(0, rows, step):
        part = slice(begin, begin + step)
        scores = grouped[:, :, :, part].flatten(2, 3) @ key.mT
        scores = scores.view(batch, heads, -1, size).to(torch.float32)
        hidden = (slot >= ends[:, part, None])[:, None]
        places = largest_places(scores.masked_fill_(hidden, float("-inf")), most)
        places = torch.where(places < ends[:, None, part, None], places, size).sort(-1).values
        chosen[:, :, part, :most] = places.masked_fill_(places == size, 0)
    return chosen


def _by_kernel(library, query: Tensor, key: Tensor, ends: Tensor, picks: int) -> Tensor:
    (batch, heads, rows, dim), groups = query.shape, key.shape[1]
    chosen, ends = torch.empty(batch, heads, rows, picks, dtype=torch.int64), ends.contiguous()
    room = -(-key.shape[2] // kernels.LANES) * kernels.LANES

    def job(b: int, h: int) -> None:
        given = (x.float().contiguous() for x in (query[b, h], key[b, h * groups // heads]))
        scores = torch.empty(min(rows, ROWS), room)
        kernels.call(library.largest_products, *given, ends[b], rows, dim, picks, room, scores, chosen[b, h])

    kernels.for_each_head(job, batch, heads)
    return chosen
