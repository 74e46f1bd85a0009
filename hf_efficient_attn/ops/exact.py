"""
Exact softmax attention with memory linear in N: PyTorch's fused kernels where they apply, query chunks elsewhere.

Used by `flash`, by `dense_below` in every variant, and by calls of few tokens over stored keys.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

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
    fixed = isinstance(offset, int)
    shared = {"scaling": scaling, "dropout": dropout}
    if causal and fixed and offset == 0:
        key, value, s, lengths = key[:, :, :n], value[:, :, :n], min(s, n), None
    sees_all = lengths is None and (not causal or (fixed and offset + 1 >= s))
    if _has_fused_kernel(query, dropout):
        if sees_all:
            return sdpa(query, key, value, **shared)
        if causal and fixed and offset == 0:
            return sdpa(query, key, value, causal=True, **shared)
        if not causal:
            used = torch.arange(s, device=query.device) < lengths[:, None]
            return sdpa(query, key, value, mask=used[:, None, None], **shared)
    start = torch.as_tensor(offset, device=query.device).reshape(-1, 1)

    def visible(begin: int, end: int) -> Tensor | None:
        if sees_all:
            return None
        slots = torch.arange(min(s, offset + end) if causal and fixed else s, device=query.device)
        used = None if lengths is None else slots < lengths[:, None, None]
        if not causal:
            return used[:, None]
        past = slots <= (start + torch.arange(begin, end, device=query.device))[:, :, None]
        return (past if used is None else past & used)[:, None]

    return masked_attention(query, key, value, visible, **shared)


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Callable[[int, int], Tensor | None],
    *,
    scaling: float,
    dropout: float = 0.0,
    at_once: int | None = None,
) -> Tensor:
    """
    Attention under any mask, `at_once` (else CHUNK) queries at a time: `visible(begin, end)` is bool (B or 1, H or 1,
    end - begin or 1, S' <= S), True = attend, over the first S' keys, or None where all are seen. A query that sees none
    gets zeros.

    In training a chunk is computed again in the backward pass (with the same dropout), so that no more than one chunk's
    mask exists at any time.
    """

    def chunk(part: Tensor, key: Tensor, value: Tensor, begin: int) -> Tensor:
        mask = visible(begin, begin + part.shape[2])
        if mask is not None and mask.shape[-1] < key.shape[2]:
            key, value = key[:, :, : mask.shape[-1]], value[:, :, : mask.shape[-1]]
        return sdpa(part, key, value, mask=mask, scaling=scaling, dropout=dropout)

    at_once = at_once or CHUNK
    if query.shape[2] <= at_once:
        return chunk(query, key, value, 0)
    again = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    outputs = []
    for begin in range(0, query.shape[2], at_once):
        inputs = (query[:, :, begin : begin + at_once], key, value, begin)
        if again:
            outputs.append(checkpoint(chunk, *inputs, use_reentrant=False, preserve_rng_state=dropout > 0))
        else:
            outputs.append(chunk(*inputs))
    return torch.cat(outputs, 2)


def sdpa(query, key, value, *, scaling, dropout=0.0, causal=False, mask=None) -> Tensor:
    """
    PyTorch's scaled_dot_product_attention for grouped queries. mask: bool, True = attend, where a query that is left nothing
    gets zeros; or added to the logits.
    """
    grouped = query.shape[1] != key.shape[1]
    if grouped and not _native_groups(query, mask):
        groups = query.shape[1] // key.shape[1]
        key, value = (x[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in (key, value))
        grouped = False
    output = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scaling, enable_gqa=grouped
    )
    if mask is not None and mask.dtype == torch.bool:
        output = output.masked_fill(~mask.any(-1, keepdim=True), 0)
    return output


def _has_fused_kernel(query: Tensor, dropout: float) -> bool:
    """Whether PyTorch attends without forming N x S weights: with dropout only CUDA's kernels do."""
    return dropout == 0 or query.device.type == "cuda"


def _native_groups(query: Tensor, mask: Tensor | None) -> bool:
    """Whether the fused kernel of this device takes fewer key heads than query heads."""
    return query.device.type == "cpu" or (query.device.type == "cuda" and mask is None)
