"""
Each query attends to its `top_k` best blocks of keys, its own block and block 0 among them, each counted once:

    score(i, J) = q_i . mean(k_J)                                            summary = "mean"
    score(i, J) = sum_d max(q_id min(k_J)_d, q_id max(k_J)_d) >= q_i . k_j   summary = "minmax"
    output_i = softmax attention over the keys of the chosen blocks.

Yuan 2025, Native Sparse Attention (arXiv:2502.11089), its selection branch; Lu 2025, MoBA (arXiv:2502.13189), the mean and
the computation by key block; Tang 2024, Quest (arXiv:2406.10774), the bounds. Scores are float32, of equal ones the lower
block wins, and the choice is a constant of the backward pass (as in MoBA; NSA trains it through another branch).

Cost: N^2 / block_size for scores, linear for attention. Decoder: candidates are the complete blocks before the query's
own, which is read causally; with fewer of them than `top_k` all are read. State: O(N) keys and values and a summary per
complete block; a step reads the summaries and top_k x block_size keys. Encoder: the last block is summarised over the real
tokens it has; `query_block` successive queries can share one choice. `top_k` = 1 reads the own block alone. Dense limit:
top_k >= number of blocks. No new parameters: the patched model starts with its own weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..caching import AttentionState, Buffer, Count, TokenStore, column
from ..config import EfficientAttentionConfig, option
from ..ops.few import attend_blocks
from ..ops.rows import shift
from ..ops.tiles import best_blocks, block_attention
from ..registry import get_config_class, register_variant
from ..variant import EfficientAttention

STEP = 16  # new tokens up to which each query reads its keys by itself


@dataclass(kw_only=True)
class TopkBlocksConfig(EfficientAttentionConfig):
    """Hyper-parameters of `topk_blocks`."""

    block_size: int = option(64, "keys per block", minimum=1)
    top_k: int = option(8, "blocks that a query reads, its own and the first among them", minimum=1)
    summary: str = option("mean", "what a block is scored by", choices=("mean", "minmax"))
    share_group: bool = option(False, "the query heads of a key/value head choose together, by summed scores")
    query_block: int = option(
        0, "encoder: so many successive queries choose together, by summed scores; 0 = each for itself", minimum=0
    )

    def validate(self) -> None:
        if self.query_block and self.block_size % self.query_block:
            raise ValueError(
                f"TopkBlocksConfig.query_block = {self.query_block} must divide block_size = {self.block_size}: "
                "queries that choose together have one own block."
            )

    @classmethod
    def tiny(cls, causal: bool) -> TopkBlocksConfig:
        return cls(block_size=4, top_k=4)

    @classmethod
    def variations(cls, causal: bool) -> list[TopkBlocksConfig]:
        sizes = {"block_size": 4, "top_k": 3}
        choices = [{"summary": "minmax"}, {"share_group": True}, {"top_k": 1}, {"top_k": 2}, {"query_block": 4}]
        return [cls(**sizes | choice) for choice in choices]

    @classmethod
    def dense_limit(cls, length: int, causal: bool) -> TopkBlocksConfig:
        return cls(block_size=4, top_k=-(-length // 4))

    def window_only(self, causal: bool) -> EfficientAttentionConfig:
        """The own block and as many first tokens as block 0 has."""
        return get_config_class("block")(
            block_size=self.block_size, num_sinks=self.block_size, dense_below=self.dense_below
        )


class SummaryStore(TokenStore):
    """Summaries of complete blocks instead of tokens: "key" holds (B, G, blocks, F), "value" nothing."""

    def __init__(self, block_size: int) -> None:
        super().__init__()
        self.block_size = block_size

    def crop_to(self, count: Count) -> None:
        super().crop_to(count // self.block_size)


@register_variant(
    "topk_blocks",
    family="learnable patterns",
    summary="each query attends to the blocks whose summaries fit it best",
    paper="Yuan 2025, arXiv:2502.11089; Lu 2025, arXiv:2502.13189; Tang 2024, arXiv:2406.10774",
    also=("quest", "moba", "nsa"),
)
class TopkBlocksAttention(EfficientAttention):
    """`topk_blocks`. L is N and the slots that complete the first and the last block."""

    config_class = TopkBlocksConfig
    linear_cost = False

    def attend(self, query, key, value, *, lengths, scaling, dropout, causal, state, hidden=None) -> Tensor:
        size, n = self.config.block_size, query.shape[2]
        offset, summaries = 0, None
        if state is not None:
            offset = state.count
            buffer = state.store("tokens", TokenStore).extend(key, value, lengths)
            summaries = self._extend_summaries(state, buffer, n, lengths)
            key, value = buffer.key, buffer.value
            if n <= STEP:
                return self._step(query, key, value, summaries, offset, scaling, dropout)
        # Queries move to slots of their own: slot 0 is the first of the block that the first query stands in.
        skip = offset % size
        span = n + (skip if isinstance(skip, int) else size - 1)
        framed = shift(query, skip, -(-span // size) * size)
        key, value = (shift(x, 0, -(-x.shape[2] // size) * size) for x in (key, value))
        length = torch.full((1,), n, device=key.device) if lengths is None else lengths
        used = None
        if not causal and (lengths is not None or n < key.shape[2]):
            used = (torch.arange(key.shape[2], device=key.device) < length[:, None]).expand(key.shape[0], -1)
        if summaries is None:
            summaries = self._summarise(key, used)
        slots = torch.arange(framed.shape[2], device=query.device)
        live = (slots >= column(skip)) & (slots < column(skip) + length[:, None])
        own = column(offset - skip) // size + slots // size
        chosen, valid = self._choose(framed, summaries, own.expand_as(live), live, -(-length // size), causal)
        options = {"causal": causal, "used": used, "scaling": scaling, "dropout": dropout}
        output = block_attention(framed, key, value, size, chosen, valid, (offset - skip) // size, **options)
        return shift(output, -skip, n)

    def _summarise(self, key: Tensor, used: Tensor | None = None) -> Tensor:
        """(B, G, M, D), `used` (B, M) -> (B, G, M / block_size, F): means (F = D), or maxima and minima (F = 2 D)."""
        size = self.config.block_size
        blocks = key.detach().unflatten(2, (-1, size)).to(torch.float32)
        real = None if used is None else used.view(used.shape[0], 1, -1, size, 1)
        if self.config.summary == "mean":  # unused keys are zero
            return blocks.sum(3) / (size if real is None else real.sum(3).clamp_min(1))
        if real is None:
            return torch.cat([blocks.amax(3), blocks.amin(3)], -1)
        far = torch.finfo(torch.float32).max
        return torch.cat([blocks.masked_fill(~real, -far).amax(3), blocks.masked_fill(~real, far).amin(3)], -1)

    def _features(self, query: Tensor) -> Tensor:
        """(..., D) -> (..., F), such that a score is features . summary."""
        query = query.to(torch.float32)
        return query if self.config.summary == "mean" else torch.cat([query.clamp_min(0), query.clamp_max(0)], -1)

    @torch.compiler.disable
    @torch.no_grad()
    def _choose(self, query, summaries, own, live, blocks, causal) -> tuple[Tensor, Tensor]:
        """
        -> (B, H or G, L / w, C) int64 and bool: the blocks that w successive queries read besides their own, and which of
        these count. G and w > 1 where queries choose together.

        own, live: (B or 1, L), the block a query stands in and whether there is a query. blocks: (B or 1,), how many
        have keys.
        """
        groups, count = summaries.shape[1:3]
        width = 1 if causal else max(1, self.config.query_block)
        own, live = own[:, None, ::width, None], live[:, None, :, None]
        last = own - 1 if causal else (blocks - 1).view(-1, 1, 1, 1)
        features = query if width == 1 else query.unflatten(2, (-1, width))
        features = self._features(features) if width == 1 else self._features(features).sum(3)
        if self.config.share_group:
            features = features.unflatten(1, (groups, -1)).sum(2)
        picks = min(self.config.top_k - 1, count)
        chosen = best_blocks(features, summaries, own[:, 0, :, 0], None if causal else blocks, picks)
        valid = (chosen <= last) & (chosen != own)
        return chosen, valid & live.unflatten(2, (-1, width)).any(3)

    def _extend_summaries(self, state: AttentionState, buffer: Buffer, n: int, lengths: Tensor | None) -> Tensor:
        """Adds the blocks that this call completes; returns the summaries of all complete blocks."""
        size, offset = self.config.block_size, state.count
        store = state.store("summaries", lambda: SummaryStore(size))
        done = offset // size
        ready = (offset + (n if lengths is None else lengths)) // size - done
        if isinstance(ready, int):
            new, ready = buffer.key[:, :, done * size : (done + ready) * size], None
        else:
            new = shift(buffer.key, -done * size, (n + size - 1) // size * size)
        new = self._summarise(new)
        return store.extend(new, new[..., :0], ready).key

    def _step(self, query, key, value, summaries, offset, scaling, dropout) -> Tensor:
        """A few new tokens."""
        size, (batch, _, n, _) = self.config.block_size, query.shape
        position = (column(offset) + torch.arange(n, device=query.device)).expand(batch, n)
        own = position // size
        chosen, valid = self._choose(query, summaries, own, torch.ones_like(own, dtype=torch.bool), None, True)
        return attend_blocks(query, key, value, size, chosen, valid, position, scaling=scaling, dropout=dropout)
