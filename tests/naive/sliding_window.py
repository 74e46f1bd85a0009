"""The oracle of `sliding_window`."""

from __future__ import annotations

import torch

from .base import oracle, pattern


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
            return abs(t - j) % d == 0 and abs(t - j) // d <= (w - 1 if causal else w)

        one = (query[h : h + 1], key[g : g + 1], value[g : g + 1])
        everyone = {"num_sinks": config.num_sinks, "global_tokens": config.global_tokens}
        heads.append(pattern(*one, sees, scaling=scaling, causal=causal, **everyone))
    return torch.cat(heads)
