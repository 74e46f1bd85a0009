"""
`infini`: attention inside the own segment of b tokens, mixed with what the query reads from an associative memory A, z of the
segments before it; phi(x) = elu(x) + 1, g = sigmoid(`gate`) per query head:

    out_t = (1 - g) local_t + g phi(q_t) A / (phi(q_t) z),        local_t alone while the memory is empty.

A segment adds phi(k_j) to z and phi(k_j) u_j^T to A, with u_j = v_j (rule "plain") or what the memory did not know before the
segment, u_j = v_j - phi(k_j) A / (phi(k_j) z) (rule "delta").

Paper: Munkhdalai et al. 2024, Infini-attention, arXiv:2404.07143. Cost N (b + D). Encoder (the paper has none): the memory of
all other segments, from sums over those before and those after; rule "plain" only. Decoder: the current segment, the sinks and
the memory, (D, D) and D per key/value head: constant however long the sequence. Dense limit: b >= N.
Parameters: `gate`, one per query head, -4 at the start (g = 0.018): nearly the window alone.

From the paper: the memory is position-free there and receives rotated keys here, as the host hands them over. The local part
also sees the first tokens, which stay in the memory: `num_sinks` in a decoder, `global_tokens` in an encoder, where these
attend to all tokens exactly and read no memory; without them it is the plain form. Attention dropout acts on the local part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..caching import AttentionState, column
from ..config import EfficientAttentionConfig, option
from ..ops.local import Context, Segments, local_decoder, remember, segment_encoder
from ..ops.memory import FLOOR, features, mixed, written
from ..ops.rows import shift
from ..registry import register_variant
from ..variant import EfficientAttention, HostShape
from .block import BlockConfig


@dataclass(kw_only=True)
class InfiniConfig(EfficientAttentionConfig):
    segment_size: int = option(256, "tokens per segment", minimum=1)
    rule: str = option("plain", "what a segment writes into the memory", choices=("plain", "delta"))
    num_sinks: int = option(4, "first tokens that every later one sees, in decoders", minimum=0)
    global_tokens: int = option(0, "first tokens that see all and that all see, in encoders", minimum=0)

    @classmethod
    def tiny(cls, causal: bool) -> InfiniConfig:
        return cls(segment_size=5, num_sinks=2)

    @classmethod
    def variations(cls, causal: bool) -> list[InfiniConfig]:
        if causal:
            return [cls(segment_size=4, num_sinks=0), *(cls(segment_size=b, rule="delta") for b in (6, 1))]
        return [cls(segment_size=4), cls(segment_size=4, global_tokens=2), cls(segment_size=3, global_tokens=7)]

    @classmethod
    def dense_limit(cls, length: int, causal: bool) -> InfiniConfig:
        return cls(segment_size=max(length, 1))

    def window_only(self, causal: bool) -> BlockConfig:
        return BlockConfig(
            block_size=self.segment_size,
            num_sinks=self.num_sinks,
            global_tokens=self.global_tokens,
            dense_below=self.dense_below,
        )


@register_variant(
    "infini",
    family="recurrence",
    summary="own segment, mixed by a gate with an associative memory of the others",
    paper="Munkhdalai 2024, arXiv:2404.07143",
)
class InfiniAttention(EfficientAttention):
    """A memory is (..., D, D + 1): A and, as the last column, z. L segments."""

    config_class = InfiniConfig
    constant_state = True

    def __init__(self, config: InfiniConfig, host: HostShape) -> None:
        super().__init__(config, host)
        self.gate = nn.Parameter(torch.full((host.num_heads,), -4.0))

    @classmethod
    def check_host(cls, config: InfiniConfig, host: HostShape) -> None:
        if config.rule == "delta" and not host.causal:
            raise ValueError(
                "infini: rule = 'delta' writes segments in order, which an encoder's memory of all other segments does not "
                "have. Choose rule = 'plain' for encoders."
            )

    def attend(self, query, key, value, *, lengths, scaling, dropout, causal, state, hidden) -> Tensor:
        config, options = self.config, {"scaling": scaling, "dropout": dropout}
        pattern, everyone = Segments(config.segment_size), config.global_tokens
        if not causal:
            local = segment_encoder(query, key, value, pattern, global_tokens=everyone, lengths=lengths, **options)
            output = self._around(query, key, value, local, lengths)
            return torch.cat([local[:, :, :everyone], output[:, :, everyone:]], 2) if everyone else output
        count = 0 if state is None else state.count
        context = remember(state, key, value, pattern, num_sinks=config.num_sinks, lengths=lengths)
        local = local_decoder(query, context, pattern, **options)
        return self._before(query, context, local, lengths, count, state)

    def _around(self, query: Tensor, key: Tensor, value: Tensor, local: Tensor, lengths: Tensor | None) -> Tensor:
        """An encoder's output, from its local part: every segment reads the memory of all others."""
        b, n = self.config.segment_size, query.shape[2]
        if n <= b:
            return local
        added = written(key, value, b, lengths)
        before = pad(added.cumsum(2), (0, 0, 0, 0, 1, -1))
        after = pad(added.flip(2).cumsum(2), (0, 0, 0, 0, 1, -1)).flip(2)
        there = torch.ones(1, 1, dtype=torch.bool, device=query.device) if lengths is None else lengths[:, None] > b
        return mixed(local, query, before + after, self.gate, there.expand(-1, n), b)

    def _before(
        self,
        query: Tensor,
        context: Context,
        local: Tensor,
        lengths: Tensor | None,
        count: int | Tensor,
        state: AttentionState | None,
    ) -> Tensor:
        """A decoder's output, from its local part: every segment reads the memory of those before it."""
        b, n, new = self.config.segment_size, query.shape[2], count % self.config.segment_size
        stored = None if state is None else state.entries.get("memory")
        end = n + (new if isinstance(new, int) else state.once(("furthest", b), lambda: int(new.max())))
        complete, begun = end // b, -(-end // b)  # segments, from that of the first new token on
        if stored is None and complete == 0:
            return local
        with torch.autocast(query.device.type, enabled=False):
            if stored is None:
                d = query.shape[3]
                accurate = torch.promote_types(query.dtype, torch.float32)
                stored = query.new_zeros(*context.key.shape[:2], d, d + 1, dtype=accurate)
            if complete and context.ends:
                context = context.framed(Segments(b))
            key, value = (x[:, :, : complete * b] for x in (context.key, context.value))
            memories = self._write(stored, key, value, complete)
            if state is not None and complete:
                done = (new + (n if lengths is None else lengths)) // b
                if isinstance(done, int):
                    state.entries["memory"] = memories[:, :, done]
                else:
                    state.entries["memory"] = memories[torch.arange(len(done), device=done.device), :, done]
        if begun > 1:  # from the begin of the first new token's segment on
            query, local = (shift(x, new, end) for x in (query, local))
        position = column(count - (new if begun > 1 else 0)) + torch.arange(query.shape[2], device=query.device)
        there = (position >= b).view(-1, query.shape[2])
        output = mixed(local, query, memories[:, :, :begun], self.gate, there, b)
        return shift(output, -new, n) if begun > 1 else output

    def _write(self, stored: Tensor, key: Tensor, value: Tensor, segments: int) -> Tensor:
        """stored (B, G, D, D + 1), key and value (B, G, L b, D) of L segments -> the memory before each and after all."""
        if segments == 0:
            return stored[:, :, None]
        if self.config.rule == "plain":
            return torch.cat([stored[:, :, None], written(key, value, self.config.segment_size)], 2).cumsum(2)
        memories = [stored]
        for own, values in zip(key.chunk(segments, 2), value.to(stored.dtype).chunk(segments, 2), strict=True):
            phi, memory = features(own), memories[-1]
            known = phi @ memory[..., :-1] / (phi @ memory[..., -1:]).clamp_min(FLOOR)  # 0 of an empty memory
            memories.append(memory + torch.cat([phi.mT @ (values - known), phi.sum(-2)[..., None]], -1))
        return torch.stack(memories, 2)
