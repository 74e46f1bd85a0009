"""
Exact softmax attention with memory linear in N: PyTorch's fused kernels where they apply, query chunks elsewhere.

Used by `flash`, by `dense_below` in every variant, and by single decoding steps over stored keys.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

CHUNK = 256  # queries whose mask exists at one time


def exact_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    lengths: int | Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    causal: bool,
    offset: int | Tensor = 0,
) -> Tensor:
    """
    softmax(scaling q k^T) v over compacted rows.

    query (B, H, N, D); key, value (B, G, S, D), G divides H. `lengths`: keys in use per row (int, (B,) or None = S).
    Causal: query i stands at position offset + i (int or (B,)) and sees keys 0..offset + i. Without `offset`, padding
    behind the real tokens needs no mask in a causal call.
    """
    n, s = query.shape[2], key.shape[2]
    if isinstance(lengths, int):
        if lengths < s:
            key, value, s = key[:, :, :lengths], value[:, :, :lengths], lengths
        lengths = None
    if causal:
        if isinstance(offset, int) and offset == 0:
            return sdpa(query, key[:, :, :n], value[:, :, :n], causal=True, scaling=scaling, dropout=dropout)
        if isinstance(offset, int) and n == 1 and offset + 1 >= s and lengths is None:
            return sdpa(query, key, value, causal=False, scaling=scaling, dropout=dropout)
    elif lengths is None:
        return sdpa(query, key, value, causal=False, scaling=scaling, dropout=dropout)
    slots = torch.arange(s, device=query.device)
    used = None if lengths is None else slots < lengths[:, None]
    if not causal:
        return sdpa(query, key, value, mask=used[:, None, None], scaling=scaling, dropout=dropout)
    start = offset[:, None] if isinstance(offset, Tensor) else torch.full((1, 1), offset, device=query.device)

    def visible(begin: int, end: int) -> Tensor:
        position = start + torch.arange(begin, end, device=query.device)
        mask = slots <= position[:, :, None]
        return (mask if used is None else mask & used[:, None])[:, None]

    return masked_attention(query, key, value, visible, scaling=scaling, dropout=dropout)


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Callable[[int, int], Tensor],
    *,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """
    Attention under any mask, `CHUNK` queries at a time: `visible(begin, end)` is bool (B or 1, H or 1, end - begin, S),
    True = attend. A query that sees nothing gets zeros.
    """
    parts = []
    for begin in range(0, query.shape[2], CHUNK):
        end = min(begin + CHUNK, query.shape[2])
        mask = visible(begin, end)
        parts.append(sdpa(query[:, :, begin:end], key, value, mask=mask, scaling=scaling, dropout=dropout))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def sdpa(query, key, value, *, scaling, dropout=0.0, causal=False, mask=None) -> Tensor:
    """PyTorch's scaled_dot_product_attention for grouped queries; a query that a mask leaves nothing gets zeros."""
    grouped = query.shape[1] != key.shape[1]
    if grouped and not _native_groups(query, mask):
        groups = query.shape[1] // key.shape[1]
        key, value = (x[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in (key, value))
        grouped = False
    output = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scaling, enable_gqa=grouped
    )
    if mask is not None:
        output = output.masked_fill(~mask.any(-1, keepdim=True), 0)
    return output


def _native_groups(query: Tensor, mask: Tensor | None) -> bool:
    """Whether the fused kernel of this device takes fewer key heads than query heads."""
    return query.device.type == "cpu" or (query.device.type == "cuda" and mask is None)
