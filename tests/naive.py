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
registry name of a part from `part.name` and its module from `module.parts[i]`.

A new variant needs one function here, decorated with `oracle`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

ORACLES: dict[str, Callable[..., Tensor]] = {}
RELU_FLOOR = 1e-6  # smallest normaliser of the relu form of `performer`, whose features can all be zero


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
) -> Tensor:
    """
    A batch: takes the padding out of each row, computes the row, and puts it back with zeros at padded queries.

    query (B, H, N, D), key and value (B, G, M, D), padding (B, M) with True = keep, or None; the queries belong to the
    last N columns. Honours `config.dense_below`.
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
) -> Tensor:
    """One row without padding, with `dense_below`: short encoder rows and early decoder positions attend exactly."""
    N, M = query.shape[1], key.shape[1]
    dense = naive_flash(query, key, value, config=config, scaling=scaling, causal=causal)
    if not causal and config.dense_below > M:
        return dense
    out = ORACLES[variant_name](query, key, value, config=config, scaling=scaling, causal=causal, module=module)
    if not causal:
        return out
    early = torch.arange(M - N, M, device=query.device) < config.dense_below
    return torch.where(early[None, :, None], dense, out)


# --------------------------------------------------------------------------------------------- softmax by a mask


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
) -> Tensor:
    """Softmax attention of position t over the j with sees(t, j); in a decoder over j <= t, sinks included."""
    N, M = query.shape[1], key.shape[1]
    visible = [
        [j <= t and (sees(t, j) or j < num_sinks) if causal else sees(t, j) for j in range(M)] for t in range(M - N, M)
    ]
    return softmax_attention(query, key, value, torch.tensor(visible, device=query.device), scaling)


@oracle
def naive_flash(query, key, value, *, config, scaling, causal, module=None):
    """Ordinary softmax attention."""
    return pattern(query, key, value, lambda t, j: True, scaling=scaling, causal=causal)


@oracle
def naive_block(query, key, value, *, config, scaling, causal, module=None):
    """t sees its own block of `block_size`, and the sinks in a decoder."""
    b = config.block_size
    return pattern(
        query, key, value, lambda t, j: t // b == j // b, scaling=scaling, causal=causal, num_sinks=config.num_sinks
    )


@oracle
def naive_strided(query, key, value, *, config, scaling, causal, module=None):
    """
    t sees every j with (t - j) mod `stride` = 0, and its neighbours: decoder, itself and `local_size` - 1 before it;
    encoder, `local_size` on each side besides itself (which the stride sees in any case). The sinks in a decoder.
    """

    def sees(t, j):
        near = t - j < config.local_size if causal else abs(t - j) <= config.local_size
        return near or (t - j) % config.stride == 0

    return pattern(query, key, value, sees, scaling=scaling, causal=causal, num_sinks=config.num_sinks)


@oracle
def naive_sliding_window(query, key, value, *, config, scaling, causal, module=None):
    """
    Dilation d of the head, window w. Decoder: t sees t, t - d, ..., t - (w - 1) d and the sinks. Encoder: t sees
    t, t +- d, ..., t +- w d; the first `global_tokens` positions see all and are seen by all (with the ordinary
    projections).

    `dilation` is one number or a list with one number per key/value head, whose query heads share it.
    """
    H, G = query.shape[0], key.shape[0]
    w = config.window
    heads = []
    for h in range(H):
        d = config.dilation[h // (H // G)] if isinstance(config.dilation, (list, tuple)) else config.dilation
        g = h // (H // G)

        def sees(t, j, d=d):
            near = abs(t - j) % d == 0 and abs(t - j) // d <= (w - 1 if causal else w)
            return near or (not causal and min(t, j) < config.global_tokens)

        one = (query[h : h + 1], key[g : g + 1], value[g : g + 1])
        heads.append(pattern(*one, sees, scaling=scaling, causal=causal, num_sinks=config.num_sinks))
    return torch.cat(heads)


@oracle
def naive_transformer_xl(query, key, value, *, config, scaling, causal, module=None):
    """
    t of segment s sees its segment (up to itself in a decoder) and the `memory_size` positions before the segment's
    start, in both directions of reading: an encoder has no memory of what follows the segment. The sinks in a decoder.
    """
    size = config.segment_size

    def sees(t, j):
        start = t // size * size
        return start - config.memory_size <= j < start + size

    return pattern(query, key, value, sees, scaling=scaling, causal=causal, num_sinks=config.num_sinks)


@oracle
def naive_combined(query, key, value, *, config, scaling, causal, module=None):
    """
    Part p of `parts` computes its own run of key/value groups, in order, with all their query heads.

    Shares are relative weights: with c_p the sum of the first p shares over the sum of all, part p owns the groups from
    floor(c_p G + 1/2) to floor(c_(p+1) G + 1/2). A part left without a group is an error. A list of dilations in a part
    counts that part's own key/value heads; `dense_below` of a part holds for its heads.
    """
    H, G = query.shape[0], key.shape[0]
    total = sum(share for _, share in config.parts)
    heads, taken, cumulated = [], 0, 0.0
    for index, (part, share) in enumerate(config.parts):
        cumulated += share
        end = math.floor(G * cumulated / total + 0.5)
        if end == taken:
            raise ValueError(f"part {index} ({part.name}) has no key/value group out of {G}")
        h = slice(taken * (H // G), end * (H // G))
        one = (query[h], key[taken:end], value[taken:end])
        inner = None if module is None else module.parts[index]
        heads.append(naive_row(part.name, *one, config=part, scaling=scaling, causal=causal, module=inner))
        taken = end
    return torch.cat(heads)


# ------------------------------------------------------------------------------------------------- chosen blocks


@oracle
def naive_topk_blocks(query, key, value, *, config, scaling, causal, module=None):
    """
    A query sees its chosen blocks of `block_size` keys: its own block, block 0, and those with the best scores until
    there are `top_k` in all; with `top_k` = 1 its own block alone. Where own block and block 0 are one, it counts once.

    Score of a block: summary "mean" q . mean(k); "minmax" sum_d max(q_d min(k)_d, q_d max(k)_d), the bound of
    all q . k. Candidates are the complete blocks before the query's own (decoder) or all blocks of the row (encoder),
    whose last one is summarised over the tokens it has. `share_group`: the query heads of a key/value head choose
    together, by the sum of their scores. `query_block` > 1, encoder only, must divide `block_size`: so many successive
    queries choose together by the sum of their scores, over the queries that exist. Of equal scores the lower block
    wins. `scaling` > 0 has no say in it. Decoders have no sinks besides block 0, and ignore `query_block`.
    """
    H, N, _ = query.shape
    G, M, _ = key.shape
    size, width = config.block_size, 1 if causal else max(1, config.query_block)
    if size % width:
        raise ValueError(f"query_block {width} does not divide block_size {size}")
    scores = []  # of (H, N) per block
    for b in range(math.ceil(M / size)):
        block = per_query_head(query, key[:, b * size : (b + 1) * size].detach())  # (H, tokens, D)
        q = query.detach()
        if config.summary == "mean":
            scores.append((q * block.mean(1, keepdim=True)).sum(-1))
        else:
            scores.append(torch.maximum(q * block.amin(1, keepdim=True), q * block.amax(1, keepdim=True)).sum(-1))
    scores = torch.stack(scores, -1)  # (H, N, blocks)

    visible = torch.zeros(H, N, M, dtype=torch.bool, device=query.device)
    for h in range(H):
        g = h // (H // G)
        voters = range(g * (H // G), (g + 1) * (H // G)) if config.share_group else [h]
        for i in range(N):
            t = M - N + i
            together = [n for n in range(N) if (M - N + n) // width == t // width]
            score = sum(scores[v, n] for v in voters for n in together).tolist()
            own = t // size
            chosen = {own} if config.top_k == 1 else {own, 0}
            candidates = [b for b in range(own if causal else len(score)) if b not in chosen]
            candidates.sort(key=lambda b: (-score[b], b))
            chosen |= set(candidates[: config.top_k - len(chosen)])
            visible[h, i] = torch.tensor([j // size in chosen and (j <= t or not causal) for j in range(M)])
    return softmax_attention(query, key, value, visible, scaling)


# --------------------------------------------------------------------------------------------------- projections


@oracle
def naive_linformer(query, key, value, *, config, scaling, causal, module):
    """
    Slot r of a stretch of keys: sum_c E'[r, c] k_c and sum_c F'[r, c] v_c, softmax attention over slots.

    E = `module.proj_k`, F = `module.proj_v`, of shape (G or 1, rank, columns). E' is E over the columns c that hold a
    real token, each row times (sum |E| over all its columns) / (sum |E| over those); F' alike with F's own sums. A slot
    is masked where E has no weight on a real column.

    Encoder: columns are positions 0..`max_length` - 1, and the query sees slots only; longer rows raise ValueError.

    Decoder: with t in segment s of `segment_size`, the exact part is [(s - exact_segments) segment_size, t] and the
    first `num_sinks` positions up to t. Every segment before the exact part gives its slots; columns are positions
    inside the segment; sinks are taken out of the segments' summaries as if they were not real. Exact tokens and slots
    share one softmax; slots of query head h have `module.slot_bias[h]` added to their logits. Any length: `max_length`
    bounds nothing here.
    """
    H, N, _ = query.shape
    G, M, _ = key.shape
    if not causal and config.max_length < M:
        raise ValueError(f"{M} tokens, but max_length is {config.max_length}")
    heads = []
    for h in range(H):
        g = h // (H // G)
        E, F = (p[g if p.shape[0] > 1 else 0].to(key.dtype) for p in (module.proj_k, module.proj_v))
        k, v, rows = key[g], value[g], []
        for i in range(N):
            if not causal:
                exact, slots = [], [_slots(E, F, k, v, range(M), first=0)]
            else:
                t, size = M - N + i, config.segment_size
                begin = max(0, (t // size - config.exact_segments) * size)
                exact = [j for j in range(t + 1) if j >= begin or j < config.num_sinks]
                slots = [
                    _slots(E, F, k, v, [j for j in range(first, first + size) if j >= config.num_sinks], first)
                    for first in range(0, begin, size)
                ]
            bias = module.slot_bias[h].to(key.dtype) if causal else 0.0
            logits = [scaling * k[exact] @ query[h, i]] + [scaling * a @ query[h, i] + bias for a, _ in slots]
            values = [v[exact]] + [c for _, c in slots]
            rows.append(torch.cat(logits).softmax(0) @ torch.cat(values))
        heads.append(torch.stack(rows))
    return torch.stack(heads)


def _slots(E: Tensor, F: Tensor, k: Tensor, v: Tensor, real, first: int) -> tuple[Tensor, Tensor]:
    """The unmasked slots (r', D) of keys and of values from the tokens `real`, column 0 being position `first`."""
    tokens = torch.tensor(list(real), dtype=torch.long, device=k.device)
    out = []
    for weight, x in ((E, k), (F, v)):
        part = weight[:, tokens - first]
        mass = part.abs().sum(1, keepdim=True)
        scale = weight.abs().sum(1, keepdim=True) / torch.where(mass > 0, mass, torch.ones_like(mass))
        out.append((scale * part) @ x[tokens])
    alive = E[:, tokens - first].abs().sum(1) > 0
    return out[0][alive], out[1][alive]


# ------------------------------------------------------------------------------------------------------- kernels


@oracle
def naive_linear(query, key, value, *, config, scaling, causal, module=None):
    """Weights phi(q) . phi(k) over their sum, phi(x) = elu(x) + 1; `scaling` is not used."""
    phi_q, phi_k = (torch.nn.functional.elu(x) + 1 for x in (query, per_query_head(query, key)))
    weights = _lower(phi_q @ phi_k.transpose(1, 2), causal, 0.0)
    return weights / weights.sum(-1, keepdim=True) @ per_query_head(query, value)


@oracle
def naive_performer(query, key, value, *, config, scaling, causal, module):
    """
    Weights phi(q) . phi(k) over their sum, with the random directions w = `module.features` (G, m, D), norms applied.

    "softmax": phi(x) = exp(w . x - |x|^2 / 2) with x = sqrt(scaling) q or k, computed here as a log-sum-exp over
    features, so that nothing overflows and no epsilon is needed. "relu": phi(x) = relu(w . x) / sqrt(m), without
    `scaling` (it would cancel) and without epsilon; the normaliser is at least 1e-6, so that a query without any
    feature in common with its keys gets zero.
    """
    w = per_query_head(query, module.features.to(query.dtype))
    key, value = per_query_head(query, key), per_query_head(query, value)
    if config.kernel == "softmax":
        log_q, log_k = (
            math.sqrt(scaling) * x @ w.transpose(1, 2) - scaling * x.square().sum(-1, keepdim=True) / 2
            for x in (query, key)
        )
        log_weights = (log_q[:, :, None] + log_k[:, None]).logsumexp(-1)  # (H, N, M)
        return _lower(log_weights, causal, -math.inf).softmax(-1) @ value
    phi_q, phi_k = ((x @ w.transpose(1, 2)).relu() / math.sqrt(w.shape[1]) for x in (query, key))
    weights = _lower(phi_q @ phi_k.transpose(1, 2), causal, 0.0)
    return weights @ value / weights.sum(-1, keepdim=True).clamp(min=RELU_FLOOR)


def _lower(weights: Tensor, causal: bool, nothing: float) -> Tensor:
    """The weights (H, N, M) with `nothing` after each query's own position, in a decoder."""
    N, M = weights.shape[1:]
    future = torch.arange(M, device=weights.device) > torch.arange(M - N, M, device=weights.device)[:, None]
    return weights.masked_fill(future, nothing) if causal else weights


def as_config(name: str, **fields: Any) -> SimpleNamespace:
    """A config for the oracles alone: the fields given, `dense_below` = 0 unless given, and the registry name."""
    return SimpleNamespace(**{"name": name, "dense_below": 0, **fields})
