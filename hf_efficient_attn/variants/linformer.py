"""
`linformer`: keys and values are projected along the sequence to r slots, k~ = E k and v~ = F v, and every query attends to
the slots: softmax(scaling q k~^T) v~.

Paper: Wang et al. 2020, Linformer, arXiv:2006.04768. Encoder: E and F have shape (`rank`, `max_length`); a column is a
position. A row with n < max_length tokens uses the first n columns, each row of E times (sum |E| over all columns) /
(sum |E| over those n), and a slot without a real column is masked; F likewise. Cost N r. Longer input raises.

Decoder (the paper has none): each complete segment of `segment_size` tokens is projected to
r' = max(1, round(rank segment_size / max_length)) slots by E and F of shape (r', segment_size), the same for all segments;
`ops.summaries` joins them with the exact part, the query's own segment, `exact_segments` before it and `num_sinks` first
tokens. `max_length` sets the ratio of tokens to slots only; any length can be read. Cost N^2 r' / segment_size. State: the
exact part and all slots, O(N r' / segment_size).

Dense limit: encoder rank = max_length = N, decoder segment_size >= N.
Parameters: `proj_k` (E) and `proj_v` (F), of one matrix, or with sharing="none" one per key/value head; in a decoder
`slot_bias`, one per query head, zero at the start. `sharing` (section 4 of the paper): "none"; "headwise", the heads of a
layer share E and F; "key-value", also E = F; "layerwise", one matrix for all layers that were patched together, tied as
embeddings are: PEFT's `modules_to_save` trains a copy of each layer's, device maps keep the layers together, and PyTorch's FSDP
needs them in one group, `fully_shard([*layers])`. They start as means over stretches of tokens, near-equal where rank does not
divide max_length. In models that rotate keys a mean over a long stretch blurs their high frequencies: prefer a high rank there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..config import EfficientAttentionConfig, option
from ..ops.exact import sdpa
from ..ops.summaries import summary_decoder
from ..registry import register_variant
from ..variant import EfficientAttention, HostShape
from .transformer_xl import TransformerXLConfig

UNBOUNDED = 4096  # tokens, where the model sets no limit


@dataclass(kw_only=True)
class LinformerConfig(EfficientAttentionConfig):
    rank: int = option(
        256, "slots that max_length tokens are projected to, at most max_length where that is None", minimum=1
    )
    max_length: int | None = option(
        None,
        "most tokens of an encoder; with rank, the tokens per slot of a decoder; None: the positions that the model has "
        f"learned, or {UNBOUNDED}",
        minimum=1,
    )
    sharing: str = option(
        "headwise", "what shares a projection", choices=("none", "headwise", "key-value", "layerwise")
    )
    segment_size: int = option(256, "tokens of a segment, in decoders", minimum=1)
    exact_segments: int = option(1, "segments before its own that a decoder's token sees exactly", minimum=0)
    num_sinks: int = option(4, "first tokens that every later one sees exactly, in decoders", minimum=0)

    def validate(self) -> None:
        if self.max_length is not None and self.rank > self.max_length:
            raise ValueError(
                f"LinformerConfig.rank = {self.rank} is more than max_length = {self.max_length}: a projection to more "
                "slots than tokens saves nothing. Lower rank, or raise max_length."
            )

    @property
    def segment_rank(self) -> int:
        """Slots per segment, in decoders."""
        return max(1, round(self.rank * self.segment_size / (self.max_length or UNBOUNDED)))

    @classmethod
    def tiny(cls, causal: bool) -> LinformerConfig:
        return cls(rank=8, max_length=48, segment_size=8, num_sinks=3)

    @classmethod
    def variations(cls, causal: bool) -> list[LinformerConfig]:
        sizes = {"rank": 7, "max_length": 34, "segment_size": 5}
        shared = [cls(sharing=sharing, **sizes) for sharing in ("none", "key-value", "layerwise")]
        return [*shared, cls(exact_segments=0, num_sinks=0, **sizes), cls(exact_segments=2, **sizes)]

    @classmethod
    def dense_limit(cls, length: int, causal: bool) -> LinformerConfig:
        if causal:
            return cls(segment_size=max(length, 1))
        return cls(rank=length, max_length=length)

    def window_only(self, causal: bool) -> TransformerXLConfig | None:
        """A decoder's exact part, and nothing else; an encoder's linformer has none."""
        if not causal:
            return None
        memory = self.exact_segments * self.segment_size
        return TransformerXLConfig(
            segment_size=self.segment_size,
            memory_size=memory,
            num_sinks=self.num_sinks,
            dense_below=self.dense_below,
        )


@register_variant(
    "linformer",
    family="low rank",
    summary="keys and values projected along the sequence; in a decoder per segment, beside an exact window",
    paper="Wang 2020, arXiv:2006.04768",
)
class LinformerAttention(EfficientAttention):
    config_class = LinformerConfig
    linear_cost = False  # in a decoder

    def __init__(self, config: LinformerConfig, host: HostShape) -> None:
        super().__init__(config, host)
        rank, columns = config.rank, config.max_length
        if host.causal:
            rank, columns = config.segment_rank, config.segment_size
        matrices = host.num_kv_heads if config.sharing == "none" else 1
        self.proj_k = nn.Parameter(_stretch_means(rank, columns).repeat(matrices, 1, 1))
        if config.sharing in ("none", "headwise"):
            self.proj_v = nn.Parameter(self.proj_k.detach().clone())
        if host.causal:
            self.slots = rank
            self.slot_bias = nn.Parameter(torch.zeros(host.num_heads))

    def step_of(self, name: str, parameter: Tensor) -> float | None:
        """
        Of a projection, whose rows begin as means: the mean entry. Keys and values have much in common, so that what all
        entries of a row gain adds up, most of all where they were zero.
        """
        return parameter.abs().mean().item() if name.startswith("proj") else None

    @classmethod
    def resolve(cls, config: LinformerConfig, host: HostShape) -> LinformerConfig:
        if config.max_length is not None:
            return config
        length = host.max_positions or UNBOUNDED
        return replace(config, max_length=length, rank=min(config.rank, length))

    @classmethod
    def check_host(cls, config: LinformerConfig, host: HostShape) -> None:
        if not host.causal and host.max_positions is not None and config.max_length > host.max_positions:
            raise ValueError(
                f"LinformerConfig.max_length = {config.max_length}, but the model has learned {host.max_positions} positions. "
                f"Call extend_positions(model, {config.max_length}) first, or lower max_length."
            )

    @classmethod
    def tie_parameters(cls, modules: list[LinformerAttention]) -> None:
        """sharing="layerwise": later layers take the matrix of the first one of the same direction."""
        first: dict[bool, LinformerAttention] = {}
        for module in modules:
            owner = first.setdefault(module.host.causal, module)
            if module.config.sharing == "layerwise":
                module._parameters["proj_k"] = owner.proj_k  # Accelerate's init_empty_weights would register another

    def __getattr__(self, name: str):
        """`proj_v`, where E = F, is no parameter of its own."""
        if name == "proj_v" and self.config.sharing in ("key-value", "layerwise"):
            return self.proj_k
        return super().__getattr__(name)

    def attend(self, query, key, value, *, lengths, scaling, dropout, causal, state, hidden) -> Tensor:
        config = self.config
        if causal:
            return summary_decoder(
                query, key, value, self, segment_size=config.segment_size, exact_segments=config.exact_segments,
                num_sinks=config.num_sinks, bias=self.slot_bias, lengths=lengths, state=state, scaling=scaling,
                dropout=dropout,
            )  # fmt: skip
        n = key.shape[2]
        if n > config.max_length:
            raise ValueError(
                f"linformer: {n} tokens, but its projection has max_length = {config.max_length} columns. "
                "Truncate the input, or patch with a larger max_length."
            )
        real = exists = None
        if n < config.max_length or lengths is not None:
            real = torch.arange(n, device=key.device) < (n if lengths is None else lengths[:, None])
            real = real.view(-1, 1, n)
            exists = self.exists(real)
            exists |= ~exists.any(3, keepdim=True)  # a row without tokens: its output is discarded, but must be finite
            exists = exists.expand(-1, key.shape[1], -1, -1).repeat_interleave(self.host.group_size, 1)
        slots = [self._project(m, x[:, :, None], real)[:, :, 0] for m, x in ((self.proj_k, key), (self.proj_v, value))]
        return sdpa(query, *slots, mask=exists, scaling=scaling, dropout=dropout)

    def summarise(self, key: Tensor, value: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        if real is not None:
            hidden = ~real[:, None, :, :, None]
            key, value = key.masked_fill(hidden, 0), value.masked_fill(hidden, 0)
        return self._project(self.proj_k, key, real), self._project(self.proj_v, value, real)

    def exists(self, real: Tensor) -> Tensor:
        return _mass(self.proj_k.detach().abs(), real) > 0

    def _project(self, matrix: Tensor, x: Tensor, real: Tensor | None) -> Tensor:
        """
        matrix (G or 1, r, c), its first columns over tokens x (B, G, n, c', D) -> (B, G, n, r, D). Where real (B or 1, n,
        c') is given, x is zero where it is False, and slots are scaled to the whole weight of their row.
        """
        accurate = torch.promote_types(x.dtype, torch.float32)  # rounded weights would scale what tokens share
        matrix = matrix.to(x.device, accurate)
        with torch.autocast(x.device.type, enabled=False):
            if len(matrix) == 1:
                slots = torch.einsum("rc,bgncd->bgnrd", matrix[0, :, : x.shape[3]], x.to(accurate))
            else:
                slots = torch.einsum("grc,bgncd->bgnrd", matrix[:, :, : x.shape[3]], x.to(accurate))
            if real is not None:
                weight = matrix.abs()
                mass = _mass(weight, real)
                slots = slots * (weight.sum(2)[:, None] / mass.masked_fill(mass == 0, 1))[..., None]
        return slots.to(x.dtype)


def _mass(weight: Tensor, real: Tensor) -> Tensor:
    """weight (G or 1, r, c), real (B or 1, n, c') -> (B or 1, G or 1, n, r): the weight on real columns."""
    weight = weight[:, :, : real.shape[2]].to(real.device)
    return torch.einsum("grc,bnc->bgnr", weight, real.to(weight.dtype))


def _stretch_means(rank: int, columns: int) -> Tensor:
    """(rank, columns): row i is the mean over its near-equal stretch of columns; the identity where rank = columns."""
    row = torch.arange(columns) * rank // columns
    matrix = (row == torch.arange(rank)[:, None]).to(torch.get_default_dtype())
    return matrix / matrix.sum(1, keepdim=True)
