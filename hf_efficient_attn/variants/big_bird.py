"""
`big_bird`: tokens are cut into blocks of b, and a token of block i attends to the tokens (in a decoder up to itself) of
    its window: blocks i - w + 1 .. i, in an encoder .. i + w - 1, with w = `num_window_blocks`,
    the global blocks, the first `num_global_blocks`; in an encoder their own tokens attend to all,
    random blocks: slot s < `num_random_blocks` takes number hash(seed, layer, g, i, s) % a of the a blocks that are neither
        global nor in the window, in a decoder before i, for key/value head g; a block taken twice counts once.

Paper: Zaheer et al. 2020, Big Bird, arXiv:2007.14062. w counts the blocks on one side, the own the first of them: 2 is the
paper's window of three blocks. Cost N b (window + global + random blocks). In a decoder the choice depends on the position
alone; in an encoder a depends on the row's length.
Decoder: all keys and values, O(N), since any block may be drawn later; a step reads the chosen blocks. Dense limit: w at least
the number of blocks. No parameters: the patched model starts with its own weights.

From the paper: the decoder form is ours, where the first global block does what sinks do elsewhere; the last block is not
global; query heads that share a key/value head share its random blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..caching import Count, TokenStore, column
from ..config import EfficientAttentionConfig, option
from ..ops.exact import exact_attention
from ..ops.few import attend_blocks
from ..ops.rows import shift
from ..ops.tiles import block_attention
from ..registry import register_variant
from ..variant import EfficientAttention

STEP = 16  # new tokens up to which each query's keys are copied side by side
MASK = 2**32 - 1


@dataclass(kw_only=True)
class BigBirdConfig(EfficientAttentionConfig):
    block_size: int = option(64, "tokens per block", minimum=1)
    num_window_blocks: int = option(2, "blocks on one side that a token sees, its own the first of them", minimum=1)
    num_global_blocks: int = option(2, "first blocks, which all see and which see all in encoders", minimum=0)
    num_random_blocks: int = option(3, "further blocks, drawn for each block and key/value head", minimum=0)
    seed: int = option(0, "of the random blocks", minimum=0, maximum=2**31 - 1)

    @classmethod
    def tiny(cls, causal: bool) -> BigBirdConfig:
        return cls(block_size=3, num_global_blocks=1, num_random_blocks=2)

    @classmethod
    def variations(cls, causal: bool) -> list[BigBirdConfig]:
        return [
            cls(block_size=2, num_window_blocks=1, num_global_blocks=2, num_random_blocks=4, seed=3),
            cls(block_size=4, num_window_blocks=3, num_global_blocks=0, num_random_blocks=1),
            cls(block_size=3, num_window_blocks=1, num_global_blocks=0, num_random_blocks=0),
            cls(block_size=1, num_window_blocks=4, num_global_blocks=3, num_random_blocks=2),
        ]

    @classmethod
    def dense_limit(cls, length: int, causal: bool) -> BigBirdConfig:
        return cls(block_size=4, num_window_blocks=max(-(-length // 4), 1))

    def window_only(self, causal: bool) -> BigBirdConfig:
        """The window and the global blocks, which hold the sinks."""
        return replace(self, num_random_blocks=0)


@register_variant(
    "big_bird",
    family="fixed patterns",
    summary="near blocks, the first blocks and random blocks",
    paper="Zaheer 2020, arXiv:2007.14062",
)
class BigBirdAttention(EfficientAttention):
    """L blocks of queries, C blocks that each of them reads besides its own."""

    config_class = BigBirdConfig

    def attend(self, query, key, value, *, lengths, scaling, dropout, causal, state, hidden) -> Tensor:
        config, options = self.config, {"scaling": scaling, "dropout": dropout}
        size, n = config.block_size, query.shape[2]
        everyone = min(config.num_global_blocks * size, n)
        length = n if lengths is None else lengths
        if causal:
            offset = 0
            if state is not None:
                offset = state.count
                buffer = state.store("tokens", TokenStore).extend(key, value, lengths)
                key, value = buffer.key, buffer.value
                if n <= STEP:
                    return self._step(query, key, value, offset, **options)
            return self._by_blocks(query, key, value, offset, length, True, **options)
        outputs = []
        if everyone:
            first = query[:, :, :everyone]
            outputs.append(exact_attention(first, key, value, lengths=lengths, causal=False, **options))
        if everyone < n:
            rest = query[:, :, everyone:]
            outputs.append(self._by_blocks(rest, key, value, everyone, length - everyone, False, **options))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)

    def _by_blocks(self, query, key, value, offset: Count, length: Count, causal: bool, **options) -> Tensor:
        """
        query (B, H, N, D) at positions `offset` on, of which each row has `length`, an int or (B,) and at most 0 where it has
        none; key, value (B, G, M, D) from position 0 on.
        """
        size, (batch, _, n, _) = self.config.block_size, query.shape
        # Queries move to slots of their own: slot 0 is the first of the block that the first query stands in.
        skip = offset % size
        count = -(-(n + (skip if isinstance(skip, int) else size - 1)) // size)
        framed = shift(query, skip, count * size)
        key, value = (shift(x, 0, -(-x.shape[2] // size) * size) for x in (key, value))
        own, end, used = (offset - skip) // size, column(offset + length), None
        if not causal and not (isinstance(end, int) and end == key.shape[2]):
            used = (torch.arange(key.shape[2], device=key.device) < end).expand(batch, -1)
        blocks = column(own) + torch.arange(count, device=query.device)
        chosen, valid = self._choose(blocks.view(-1, count), -(-end // size), causal)
        chosen, valid = (x.expand(batch, -1, -1, -1) for x in (chosen, valid))
        output = block_attention(framed, key, value, size, chosen, valid, own, causal=causal, used=used, **options)
        return shift(output, -skip, n)

    def _choose(self, own: Tensor, blocks: Count, causal: bool) -> tuple[Tensor, Tensor]:
        """
        own: (R, L), the blocks that queries stand in, R = B or 1; blocks: an int or (R, 1), how many have keys.
        -> (R, G, L, C) int64 and bool: the blocks that they read besides their own, and which of these count.
        """
        config, device = self.config, own.device
        w, everyone = config.num_window_blocks, config.num_global_blocks
        own = own[:, None, :, None]
        blocks = blocks[:, None, :, None] if isinstance(blocks, Tensor) else blocks
        steps = torch.arange(1, w, device=device)
        near = own + (-steps if causal else torch.cat([-steps, steps]))
        first = torch.arange(everyone, device=device).expand(*own.shape[:3], -1)
        before = (own - w + 1 - everyone).clamp_min(0)
        allowed = before if causal else before + (blocks - own - w).clamp_min(0)
        heads, slots = (torch.arange(x, device=device) for x in (self.host.num_kv_heads, config.num_random_blocks))
        number = _hash(config.seed, self.host.layer, heads[:, None, None], own, slots) % allowed.clamp_min(1)
        drawn = everyone + number
        drawn = torch.where(number < before, drawn, drawn - everyone - before + own + w)
        again = ((drawn[..., None] == drawn[..., None, :]) & (slots < slots[:, None])).any(-1)
        live = own < blocks
        shape = (*torch.broadcast_shapes(drawn.shape[:3], live.shape[:3]), -1)
        chosen = [(near, (near >= everyone) & (near < blocks)), (first, first < own), (drawn, (allowed > 0) & ~again)]
        chosen, valid = (torch.cat([x.expand(shape) for x in xs], 3) for xs in zip(*chosen, strict=True))
        return chosen, valid & live

    def _step(self, query, key, value, offset: Count, **options) -> Tensor:
        """A few new tokens of a decoder."""
        size, n = self.config.block_size, query.shape[2]
        position = (column(offset) + torch.arange(n, device=query.device)).view(-1, n)
        own = position // size
        return attend_blocks(query, key, value, size, *self._choose(own, own + 1, True), position, **options)


def _hash(*numbers: int | Tensor) -> Tensor:
    """Broadcasts non-negative numbers below 2^31 to int64 numbers below 2^32, the same on every device."""
    x = 0
    for number in numbers:
        x = (x + number + 0x9E3779B9) & MASK
        for _ in range(2):
            x = ((x ^ (x >> 16)) * 0x45D9F3B) & MASK
        x = x ^ (x >> 16)
    return x
