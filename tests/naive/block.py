"""The oracle of `block`."""

from __future__ import annotations

from .base import oracle, pattern


@oracle
def naive_block(query, key, value, *, config, scaling, causal, module=None):
    """t sees its own block of `block_size`, and the sinks in a decoder; global tokens in an encoder."""
    b, everyone = config.block_size, {"num_sinks": config.num_sinks, "global_tokens": config.global_tokens}
    return pattern(query, key, value, lambda t, j: t // b == j // b, scaling=scaling, causal=causal, **everyone)
