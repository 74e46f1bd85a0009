"""The oracle of `strided`."""

from __future__ import annotations

from .base import oracle, pattern


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
