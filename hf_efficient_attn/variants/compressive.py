"""
`compressive`: segments of b tokens with a memory of the m tokens before them, and a compressed memory of what fell out of
that. Every c = `compression_rate` tokens [j c, (j + 1) c) become one slot j. Token t of segment s attends, in one softmax, to
    its own segment, in a decoder up to itself, and [s b - m, s b); in a decoder also to the first `num_sinks` tokens, in
        an encoder to the first `global_tokens`, which attend to all tokens themselves and to no slot,
    the newest `compressed_size` of the slots that lie wholly before s b - m; in a decoder their logits get a bias.

Paper: Rae et al. 2019, Compressive Transformers, arXiv:1911.05507. A slot is the mean of its tokens' keys and values, the
maximum in every coordinate, or a convolution sum_i k_{j c + i} W_i with its own W (c, D, D) per key/value head, for keys and
for values. Cost N (b + m + compressed_size). b and m are multiples of c; an encoder reads its whole own segment and no later
one. Decoder: the current segment, the memory of the next, the slots and the sinks, O(m + compressed_size + b). What is
stored is detached, as in `transformer_xl`.
Dense limit: decoder m >= N, encoder b >= N.
Parameters: in a decoder `slot_bias`, one per query head, zero at the start; with compression="conv" `conv_k` and `conv_v`,
which start as the mean.

From the paper: positions are the host's own, keys and values are compressed instead of hidden states, and the convolution is
trained by the model's loss alone, without the paper's reconstruction loss. Sinks and global tokens are ours; they stay out
of the slots: the mean and the maximum are over a slot's other tokens, a convolution is scaled to their number, and a slot
without any is not seen. In models that rotate keys a mean over many tokens blurs their high frequencies: prefer a low rate
there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..caching import Count, column
from ..config import EfficientAttentionConfig, option
from ..ops.joint import Part
from ..ops.local import (
    Blocks,
    Segments,
    in_ranges,
    local_decoder,
    reads_directly,
    remember,
    segment_encoder,
    segment_tiles,
)
from ..ops.ranges import has_kernel, range_decoder, range_encoder
from ..ops.rows import shift
from ..ops.summaries import remember_slots
from ..registry import register_variant
from ..variant import EfficientAttention, HostShape
from .transformer_xl import TransformerXLConfig


@dataclass(kw_only=True)
class CompressiveConfig(EfficientAttentionConfig):
    segment_size: int = option(256, "tokens per segment, a multiple of compression_rate", minimum=1)
    memory_size: int = option(256, "tokens before a segment that it sees, a multiple of compression_rate", minimum=0)
    compressed_size: int = option(256, "slots before the memory that a segment sees", minimum=1)
    compression_rate: int = option(4, "tokens per slot", minimum=1)
    compression: str = option("mean", "how tokens become a slot", choices=("mean", "max", "conv"))
    num_sinks: int = option(4, "first tokens that every later one sees, in decoders", minimum=0)
    global_tokens: int = option(0, "first tokens that see all and that all see, in encoders", minimum=0)

    def validate(self) -> None:
        for field in ("segment_size", "memory_size"):
            if getattr(self, field) % self.compression_rate:
                raise ValueError(
                    f"CompressiveConfig.{field} = {getattr(self, field)} must be a multiple of compression_rate = "
                    f"{self.compression_rate}, so that no slot lies across a border."
                )

    @classmethod
    def tiny(cls, causal: bool) -> CompressiveConfig:
        return cls(segment_size=4, memory_size=6, compressed_size=3, compression_rate=2, num_sinks=3)

    @classmethod
    def variations(cls, causal: bool) -> list[CompressiveConfig]:
        sizes, kinds = {"segment_size": 6, "memory_size": 3, "compression_rate": 3}, ("mean", "max", "conv")
        return [
            cls(compression="max", compressed_size=1, **sizes),
            cls(compression="conv", compressed_size=3, num_sinks=5, **sizes),
            cls(segment_size=4, memory_size=0, compression_rate=2, compressed_size=20, num_sinks=0),
            cls(segment_size=2, memory_size=4, compression_rate=1, compressed_size=2),
            *([] if causal else [cls(compression=kind, compressed_size=2, global_tokens=5, **sizes) for kind in kinds]),
        ]

    @classmethod
    def dense_limit(cls, length: int, causal: bool) -> CompressiveConfig:
        if causal:
            return cls(segment_size=8, memory_size=-(-length // 4) * 4)
        return cls(segment_size=-(-length // 4) * 4, memory_size=0)

    def window_only(self, causal: bool) -> TransformerXLConfig:
        """Segments and memory without slots."""
        return TransformerXLConfig(
            segment_size=self.segment_size,
            memory_size=self.memory_size,
            num_sinks=self.num_sinks,
            global_tokens=self.global_tokens,
            dense_below=self.dense_below,
        )


@register_variant(
    "compressive",
    family="recurrence",
    summary="own segment, the memory before it, and a compressed memory of what came before that",
    paper="Rae 2019, arXiv:1911.05507",
)
class CompressiveAttention(EfficientAttention):
    config_class = CompressiveConfig
    constant_state = True

    def __init__(self, config: CompressiveConfig, host: HostShape) -> None:
        super().__init__(config, host)
        self.slots = config.segment_size // config.compression_rate  # per segment
        if host.causal:
            self.slot_bias = nn.Parameter(torch.zeros(host.num_heads))
        if config.compression == "conv":
            mean = torch.eye(host.head_dim) / config.compression_rate
            self.conv_k = nn.Parameter(mean.repeat(host.num_kv_heads, config.compression_rate, 1, 1))
            self.conv_v = nn.Parameter(self.conv_k.detach().clone())

    def attend(self, query, key, value, *, lengths, scaling, dropout, causal, state, hidden) -> Tensor:
        config, n, options = self.config, query.shape[2], {"scaling": scaling, "dropout": dropout}
        b, m, c = config.segment_size, config.memory_size, config.compression_rate
        pattern = Segments(b, m)
        if not causal:
            first, far, everyone = (m // b + 1) * b, None, config.global_tokens  # earlier segments see no slot
            if n > max(first, everyone):
                complete = (x[:, :, : n // b * b].unflatten(2, (-1, b)) for x in (key, value))
                real = (torch.arange(n // b * b, device=key.device) >= everyone).view(1, -1, b) if everyone else None
                pair = tuple(x.flatten(2, 3) for x in self.summarise(*complete, real))
                slots = _Slots(config, *pair, 0, everyone // c)
                if has_kernel(query, dropout):
                    tiles = segment_tiles(n, pattern, everyone, slots.seen_before)
                    options = {"lead": everyone, "lengths": lengths, "scaling": scaling}
                    return range_encoder(query, key, value, tiles, pair, **options)
                far = slots.of_segments(first, n - first, None, (first, None))
            options |= {"global_tokens": everyone, "lengths": lengths, "far": far}
            return segment_encoder(query, key, value, pattern, **options)
        count = 0 if state is None else state.count
        sinks = {"num_sinks": config.num_sinks, "lengths": lengths}
        context = remember(state, key, value, pattern, detach=True, **sinks)
        recent = config.compressed_size + m // c
        slots = remember_slots(state, context, self, n, segment_size=b, recent=recent, **sinks)
        if slots is None:
            return local_decoder(query, context, pattern, **options)
        if state is not None:
            store = state.entries["slots"]
            store.keep_from((count + (n if lengths is None else lengths)) // b * self.slots - recent)
            store.map_tensors(Tensor.detach)
        slots = _Slots(config, *slots, config.num_sinks // c)
        if in_ranges(query, context, pattern, dropout):
            bias = self.slot_bias[None, :, None].expand(1, -1, slots.key.shape[2])
            pair = slots.key, slots.value
            return range_decoder(
                query, context, pattern, pair, bias, lambda exact: slots.seen_before(exact), scaling=scaling
            )
        end, direct = context.first + context.key.shape[2], reads_directly(n, context, pattern)

        def far(position: Count) -> Part:
            if direct:
                return slots.of_any(position, self.slot_bias)
            length = end - position
            return slots.of_segments(position, length if isinstance(length, int) else int(length[0]), self.slot_bias)

        return local_decoder(query, context, pattern, far=far, **options)

    def summarise(self, key: Tensor, value: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """key, value (B, G, n, b, D), real (B or 1, n, b) or None -> keys and values of the slots, (B, G, n, b / c, D)."""
        weights = (self.conv_k, self.conv_v) if self.config.compression == "conv" else (None, None)
        return tuple(self._compress(x, real, weight) for x, weight in zip((key, value), weights, strict=True))

    def _compress(self, x: Tensor, real: Tensor | None, weight: Tensor | None) -> Tensor:
        x = x.unflatten(3, (self.slots, -1))  # (B, G, n, r, c, D)
        if real is not None:
            real = real.unflatten(2, (self.slots, -1))[:, None, ..., None]
            x = x.masked_fill(~real, 0)
        if self.config.compression == "max":
            if real is None:
                return x.amax(4)
            return x.masked_fill(~real & real.any(4, keepdim=True), float("-inf")).amax(4)
        number = x.shape[4] if real is None else real.sum(4).clamp_min(1)
        accurate = torch.promote_types(x.dtype, torch.float32)  # rounded weights would scale what tokens share
        if weight is None:
            return (x.sum(4, dtype=accurate) / number).to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            total = torch.einsum("bgnrcd,gcde->bgnre", x.to(accurate), weight.to(accurate))
        return (total * x.shape[4] / number).to(x.dtype)


@dataclass(frozen=True)
class _Slots:
    """
    key, value (B, G, S, D): slot i of row b is slot `first` + i of its sequence, `first` an int or (B,). Slots before
    `begin` stand for nothing.
    """

    config: CompressiveConfig
    key: Tensor
    value: Tensor
    first: Count
    begin: int

    def seen_from(self, position: Count) -> Count:
        """The oldest slot that the segment of `position` sees; it sees `compressed_size`, where there are as many."""
        config = self.config
        start = position // config.segment_size * config.segment_size
        return (start - config.memory_size) // config.compression_rate - config.compressed_size

    def seen_before(self, exact: Count) -> tuple[Count, Count]:
        """Begin and end of what queries see whose exact part begins there, an int where `first` is one, else (B, 1)."""
        end = exact // self.config.compression_rate
        if isinstance(end, Tensor):
            begin, first = (end - self.config.compressed_size).clamp_min(self.begin), column(self.first)
            return begin - first, end - first
        begin = max(end - self.config.compressed_size, self.begin, self.first)
        return begin - self.first, max(end, begin) - self.first

    def of_any(self, position: Count, bias: Tensor) -> Part:
        """All slots under one mask, for queries at position + 0, 1, ..."""
        held = column(self.first) + torch.arange(self.key.shape[2], device=self.key.device)

        def visible(begin: int, end: int) -> Tensor:
            t = column(position) + torch.arange(begin, end, device=held.device)
            oldest, slot = self.seen_from(t)[..., None], held[..., None, :]
            seen = (slot >= oldest.clamp_min(self.begin)) & (slot < oldest + self.config.compressed_size)
            return seen[:, None] if seen.ndim == 3 else seen[None, None]

        return Part(self.key, self.value, mask=visible, bias=bias)

    def of_segments(
        self, position: Count, n: int, bias: Tensor | None, span: tuple[int, int | None] = (0, None)
    ) -> Part:
        """Segment by segment, for the n queries from `position` on, where a segment of every row begins."""
        b, size, batch = self.config.segment_size, self.config.compressed_size, self.key.shape[0]
        step, count = b // self.config.compression_rate, -(-n // b)
        queries = Blocks(batch, 0, count, min(b, n))
        windows = Blocks(batch, size - step, count, step)  # the first begins at slot 0
        oldest, width = self.seen_from(position), (count - 1) * step + size
        key, value = (shift(x, self.first - oldest, width) for x in (self.key, self.value))
        mask = None
        if not isinstance(oldest, int) or oldest < self.begin:
            exists = column(oldest) + torch.arange(width, device=key.device) >= self.begin
            exists = exists.view(-1, 1, width, 1).expand(batch, -1, -1, -1)
            mask = windows.windows(exists, size - step, 0)[:, :, None, :, 0]
        return Part(
            key, value, mask=mask, bias=bias, span=span,
            arrange=lambda x, fill: queries.arrange(pad(x, (0, 0, 0, queries.count * queries.size - n), value=fill)),
            collect=lambda x, fill: queries.collect(x)[:, :, :n],
            gather=lambda x: windows.windows(x, size - step, 0),
            scatter=lambda total, x: windows.add_windows(total, x, size - step),
        )  # fmt: skip
