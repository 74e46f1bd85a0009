"""
The slow, obvious formula of every variant: the oracle that the library's own code is tested against.

Each `naive_<name>` takes one row without padding and forms N x M weights or loops; speed and memory do not count, only
that the code reads like the definition. All are differentiable by autograd (selections are constants) and as exact as
the dtype.

Letters: H query heads, G key/value heads (query head h reads key/value head h // (H / G)), N queries, M >= N keys, D
head size, m features. query (H, N, D); key and value (G, M, D); output (H, N, D). Query i stands at position
t = M - N + i, so that with M > N the queries are the last ones, as in decoding. In a decoder (causal=True) position t
sees j <= t only.

What holds for all: sinks are the first `num_sinks` real positions, which every query at or after them sees, in
decoders; encoders ignore `num_sinks`, decoders ignore `global_tokens`. A variant `combined` of others takes the
registry name of a part from `part.name` and its module from `module.parts[i]`. The formula of a variant that reads the
layer's input takes it as `hidden` (N, E).

A new variant needs one file beside this one, with one function decorated with `oracle`; importing `naive` finds it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

ORACLES: dict[str, Callable[..., Tensor]] = {}


def oracle(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Enters `naive_<name>` under <name>."""
    ORACLES[function.__name__.removeprefix("naive_")] = function
    return function


def naive_attention(
    variant_name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding: Tensor | None = None,
    *,
    config: Any,
    scaling: float,
    causal: bool,
    module: Any = None,
    hidden: Tensor | None = None,
) -> Tensor:
    """
    A batch: takes the padding out of each row, computes the row, and puts it back with zeros at padded queries.

    query (B, H, N, D), key and value (B, G, M, D), padding (B, M) with True = keep, or None; the queries belong to the
    last N columns. Honours `config.dense_below`. hidden (B, N, E), or None: what a formula reads besides, of the queries.
    """
    batch, _, length, _ = query.shape
    if padding is None:
        padding = torch.ones(batch, key.shape[2], dtype=torch.bool, device=key.device)
    rows = []
    for b in range(batch):
        real = padding[b].nonzero()[:, 0]
        real_queries = padding[b, -length:].nonzero()[:, 0]
        row = torch.zeros_like(query[b])
        if len(real_queries):
            part = naive_row(
                variant_name,
                query[b][:, real_queries],
                key[b][:, real],
                value[b][:, real],
                config=config,
                scaling=scaling,
                causal=causal,
                module=module,
                hidden=None if hidden is None else hidden[b][real_queries],
            )
            row = row.index_copy(1, real_queries, part)
        rows.append(row)
    return torch.stack(rows)


def naive_row(
    variant_name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    config: Any,
    scaling: float,
    causal: bool,
    module: Any = None,
    hidden: Tensor | None = None,
) -> Tensor:
    """One row without padding, with `dense_below`: short encoder rows and early decoder positions attend exactly."""
    N, M = query.shape[1], key.shape[1]
    dense = ORACLES["flash"](query, key, value, config=config, scaling=scaling, causal=causal)
    if not causal and config.dense_below > M:
        return dense
    given = {"module": module} if hidden is None else {"module": module, "hidden": hidden}
    out = ORACLES[variant_name](query, key, value, config=config, scaling=scaling, causal=causal, **given)
    if not causal:
        return out
    early = torch.arange(M - N, M, device=query.device) < config.dense_below
    return torch.where(early[None, :, None], dense, out)


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scaling: float) -> Tensor:
    """softmax(scaling q k + log visible) v, with visible (N, M) or (H, N, M) bool."""
    key, value = per_query_head(query, key), per_query_head(query, value)
    logits = scaling * query @ key.transpose(1, 2)
    return logits.masked_fill(~visible, -math.inf).softmax(-1) @ value


def per_query_head(query: Tensor, shared: Tensor) -> Tensor:
    """(G, ...) -> (H, ...): every query head's copy of what its group shares."""
    return shared.repeat_interleave(query.shape[0] // shared.shape[0], dim=0)


def pattern(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sees: Callable[[int, int], bool],
    *,
    scaling: float,
    causal: bool,
    num_sinks: int = 0,
    global_tokens: int = 0,
) -> Tensor:
    """
    Softmax attention of position t over the j with sees(t, j); in a decoder over j <= t, sinks included; in an encoder the
    first `global_tokens` positions see all and are seen by all.
    """
    N, M = query.shape[1], key.shape[1]
    visible = [
        [
            j <= t and (sees(t, j) or j < num_sinks) if causal else sees(t, j) or min(t, j) < global_tokens
            for j in range(M)
        ]
        for t in range(M - N, M)
    ]
    return softmax_attention(query, key, value, torch.tensor(visible, device=query.device), scaling)


def lower(weights: Tensor, causal: bool, nothing: float) -> Tensor:
    """The weights (H, N, M) with `nothing` after each query's own position, in a decoder."""
    N, M = weights.shape[1:]
    future = torch.arange(M, device=weights.device) > torch.arange(M - N, M, device=weights.device)[:, None]
    return weights.masked_fill(future, nothing) if causal else weights


def as_config(name: str, **fields: Any) -> SimpleNamespace:
    """A config for the oracles alone: the fields given, `dense_below` = 0 unless given, and the registry name."""
    return SimpleNamespace(**{"name": name, "dense_below": 0, **fields})
