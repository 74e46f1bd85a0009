"""The oracle of `long_short`."""

from __future__ import annotations

import torch

from .base import oracle
from .summaries import with_summaries


@oracle
def naive_long_short(query, key, value, *, config, scaling, causal, module):
    """
    Segments of b = `segment_size` positions. t sees exactly the segments from the one that holds t - `window` + 1 on: in a
    decoder up to t, and the first `num_sinks` positions; in an encoder to the end of the one that holds t + `window` - 1.
    Every segment wholly outside gives r slots, without the sinks: weights a = softmax over its tokens of k W, W =
    `module.proj[g]` of shape (D, r), and k~ = sum a k, v~ = sum a v.

    `dual_norm`: keys and values that are seen exactly pass a layer norm with weight `module.near_norm[0]` and bias
    `module.near_norm[1]`, slots one with `module.far_norm`; both are (2, 2, G, D), the second axis being keys and values.
    """
    b, w, M = config.segment_size, config.window, key.shape[1]

    def norm(x, parameters, which, g):
        if not config.dual_norm:
            return x
        return torch.nn.functional.layer_norm(x, x.shape[-1:], *parameters[:, which, g].to(x.dtype))

    def slots_of(g, first, tokens):
        if not len(tokens):
            return []
        weights = (key[g, tokens] @ module.proj[g].to(key.dtype)).softmax(0).T
        read = [weights @ x[g, tokens] for x in (key, value)]
        return list(zip(*(norm(x, getattr(module, "far_norm", None), i, g) for i, x in enumerate(read)), strict=True))

    near = [
        torch.stack([norm(x[g], getattr(module, "near_norm", None), i, g) for g in range(len(x))])
        for i, x in enumerate((key, value))
    ]
    if causal:
        options = {"config": config, "scaling": scaling, "module": module}
        return with_summaries(query, *near, slots_of, begin_of=lambda t: (t - w + 1) // b * b, **options)
    heads, share, N = [], query.shape[0] // key.shape[0], query.shape[1]
    for h in range(query.shape[0]):
        g, rows = h // share, []
        for i in range(N):
            t = M - N + i
            begin, end = max((t - w + 1) // b * b, 0), min(((t + w - 1) // b + 1) * b, M)
            far = [slots_of(g, n, list(range(n, min(n + b, M)))) for n in range(0, M, b) if n < begin or n >= end]
            keys = torch.stack([*near[0][g, begin:end], *(k for slots in far for k, _ in slots)])
            values = torch.stack([*near[1][g, begin:end], *(v for slots in far for _, v in slots)])
            rows.append((scaling * keys @ query[h, i]).softmax(0) @ values)
        heads.append(torch.stack(rows))
    return torch.stack(heads)
