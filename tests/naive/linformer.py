"""The oracle of `linformer`."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import oracle


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
