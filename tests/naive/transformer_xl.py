"""The oracle of `transformer_xl`."""

from __future__ import annotations

from .base import oracle, pattern


@oracle
def naive_transformer_xl(query, key, value, *, config, scaling, causal, module=None):
    """
    t of segment s sees its segment (up to itself in a decoder) and the `memory_size` positions before the segment's
    start, in both directions of reading: an encoder has no memory of what follows the segment. The sinks in a
    decoder, global tokens in an encoder.
    """
    size = config.segment_size

    def sees(t, j):
        start = t // size * size
        return start - config.memory_size <= j < start + size

    everyone = {"num_sinks": config.num_sinks, "global_tokens": config.global_tokens}
    return pattern(query, key, value, sees, scaling=scaling, causal=causal, **everyone)
