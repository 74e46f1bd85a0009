"""The oracle of `perceiver`."""

from __future__ import annotations

import torch

from .base import oracle
from .summaries import with_summaries


@oracle
def naive_perceiver(query, key, value, *, config, scaling, causal, module):
    """
    Latent l of key/value head g, `module.latents[g, l]`, reads tokens: a = softmax(scaling l . k), k~ = sum a k,
    v~ = sum a v.

    Encoder: the latents read all tokens, and a query attends to (k~, v~). Decoder: they read each segment, without the
    sinks; a segment of sinks alone gives no slots.
    """

    def slots_of(g, first, tokens):
        if not len(tokens):
            return []
        weights = (scaling * module.latents[g].to(key.dtype) @ key[g, tokens].T).softmax(-1)
        return list(zip(weights @ key[g, tokens], weights @ value[g, tokens], strict=True))

    if causal:
        return with_summaries(query, key, value, slots_of, config=config, scaling=scaling, module=module)
    heads, share = [], query.shape[0] // key.shape[0]
    for h in range(query.shape[0]):
        keys, values = (torch.stack(x) for x in zip(*slots_of(h // share, 0, list(range(key.shape[1]))), strict=True))
        heads.append((scaling * query[h] @ keys.T).softmax(-1) @ values)
    return torch.stack(heads)
