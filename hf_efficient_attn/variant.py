"""
What a variant is: `EfficientAttention`, the module that replaces softmax attention inside one patched layer, or
`EfficientFeedForward`, which replaces the layer's feed-forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .auxiliary import AuxiliaryLearner
from .caching import AttentionState, Count, TokenStore, column
from .config import EfficientAttentionConfig, VariantConfig
from .ops.exact import exact_attention
from .ops.precision import of_one_dtype
from .ops.rows import Rows, Texts


@dataclass(frozen=True)
class HostShape:
    """
    The attention layer that a variant serves. Heads: `num_heads` for queries, `num_kv_heads` for keys and values.

    `layer` counts the model's attention layers from 0 and `patched_index` the patched ones. `causal` is the host's
    direction. `max_positions` is the length the model can read, or None where nothing limits it.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    causal: bool
    layer: int = 0
    num_layers: int = 1
    patched_index: int = 0
    max_positions: int | None = None

    @property
    def group_size(self) -> int:
        """Query heads per key/value head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True)
class FeedForwardShape:
    """
    The feed-forward that a variant serves: linear maps from `hidden_size` to `inner_size` (or a multiple, where several are
    fused) and one back, named by their paths in `maps`, the way back last. `layer` and `num_layers` count attention layers.
    `normed`: between the maps stands a norm over the inner features.
    """

    hidden_size: int
    inner_size: int
    maps: tuple[str, ...]
    layer: int = 0
    num_layers: int = 1
    patched_index: int = 0
    normed: bool = False


class EfficientLayer(AuxiliaryLearner):
    """What all variants have in common; `kind` says what of a layer they replace, "attention" or "feed-forward"."""

    kind: ClassVar[str]
    config_class: ClassVar[type[VariantConfig]]
    linear_cost: ClassVar[bool] = True  # FLOPs grow as N; False where they grow as N^2 over a constant
    constant_state: ClassVar[bool] = False  # the decoder state stays the same size however long generation runs

    def __init__(self, config: VariantConfig, host: Any) -> None:
        super().__init__()
        self.config = config
        self.host = host
        self.check_host(config, host)

    @classmethod
    def check_host(cls, config: VariantConfig, host: Any) -> None:
        """Raises ValueError where this config cannot serve this layer; runs before a model is changed."""

    @classmethod
    def resolve(cls, config: VariantConfig, host: Any) -> VariantConfig:
        """The config with what it leaves to the model filled in (such as a length of None); this one is saved."""
        return config

    @classmethod
    def tie_parameters(cls, modules: list[EfficientLayer]) -> None:
        """
        Shares parameters between the layers that one entry of a patch gave this variant; called after they are built. Every
        layer holds what it shares as a parameter of its own; saving writes it once, and loading ties it again.
        """


class EfficientFeedForward(EfficientLayer):
    """
    Base of what replaces a feed-forward. Its linear maps stay where they are, and each asks `project` for its output; what
    the model computes between them (activation, gating, dropout) stays the model's own.
    """

    kind = "feed-forward"
    constant_state = True  # a feed-forward keeps none

    def __init__(self, config: VariantConfig, host: FeedForwardShape) -> None:
        super().__init__(config, host)
        self.tokens: tuple[int, int, Tensor | Texts | None] | None = None

    def take_over(self, maps: Mapping[str, nn.Module]) -> None:
        """Called once, with the pretrained linear maps by their paths, before they are changed."""

    def note_tokens(self, batch: int, length: int, real: Tensor | Texts | None) -> None:
        """
        In training the layer's attention, which runs first, tells the size of the batch and its real tokens, (B, N) bool or
        None where all are, or the texts that its rows hold.
        """
        self.tokens = batch, length, real

    def project(self, path: str, pretrained: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """What the linear map `path` of the feed-forward gives for x (..., features), in place of pretrained(x)."""
        raise NotImplementedError(f"{type(self).__name__} must define project().")


class EfficientAttention(EfficientLayer):
    """
    Base of every attention variant. A subclass sets `config_class`, is decorated with `registry.register_variant` and writes
    `attend`; compaction of padded rows, `dense_below`, keys that outnumber queries and the bookkeeping of the decoder
    state are done here, once.

    Shapes: B batch, H query heads, G key/value heads (G divides H), N tokens of this call, D head size.
    """

    kind = "attention"
    config_class: ClassVar[type[EfficientAttentionConfig]]
    needs_hidden: ClassVar[bool] = False

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        lengths: Tensor | None,
        scaling: float,
        dropout: float,
        causal: bool,
        state: AttentionState | None,
        hidden: Tensor | None,
    ) -> Tensor:
        """
        The variant's arithmetic on compacted rows.

        query (B, H, N, D); key, value (B, G, N, D): row b's real tokens at 0..lengths[b]-1, zeros behind them;
        `lengths` (B,) is None where all N are real. In a decoder `state` (or None) holds what earlier calls left:
        token j of this call stands at position state.count + j (`state.count` is an int or (B,)). `attend` updates
        `state.entries` and never writes into a stored tensor; `state.count` is advanced by the caller.
        hidden (B, N, E) is the host's input where `needs_hidden`. Returns (B, H, N, D); what stands at padded
        queries must be finite and is discarded.
        """
        raise NotImplementedError(f"{type(self).__name__} must define attend().")

    def step_of(self, name: str, parameter: Tensor) -> float | None:
        """
        What a step of attention transfer is relative to, for a parameter of the variant's own; None: to its size, as in
        `recovery.Transfer.groups`.
        """
        return None

    def make_state(self) -> AttentionState:
        """An empty decoder state; a cache layer of Transformers."""
        return AttentionState()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        padding: Tensor | Rows | Texts | None = None,
        scaling: float,
        dropout: float = 0.0,
        causal: bool,
        state: AttentionState | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """
        query (B, H, N, D), key and value (B, G, M, D) -> (B, H, N, D), zeros at padded queries.

        `padding`: (B, M) bool, True = keep, or None; or the `Texts` that the rows hold. `scaling` multiplies the logits,
        `dropout` is a probability.
        M > N (keys without queries, only where there is no `state`): the queries are the last N tokens.
        With a `state`, query, key and value are the call's new tokens and `padding` is theirs.

        Raises:
            ValueError: shapes or a direction that this module cannot serve.
        """
        query, key, value = of_one_dtype(query, key, value)
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))  # as kernels read
        if query.shape[2] == 0 or (len(query) == 0 and state is None):
            return query
        n, m = query.shape[2], key.shape[2]
        if value.shape != key.shape or query.shape[-1] != key.shape[-1]:
            raise ValueError(
                f"{self.config.name}: query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} "
                "must share the head size, and key and value their shape."
            )
        if m < n or (m > n and state is not None):
            raise ValueError(
                f"{self.config.name}: {n} queries for {m} keys; self-attention needs as many keys, or more."
            )
        if isinstance(padding, Texts) and (state is not None or m > n):
            raise ValueError(
                f"{self.config.name}: rows that hold several texts (packed sequences) are read in one call, without a cache."
            )
        if causal is not self.host.causal:
            given, built = ("causal", "bidirectional") if causal else ("bidirectional", "causal")
            raise ValueError(f"{self.config.name}: built for a {built} layer, called as {given}.")
        if m > n:
            query = torch.cat([query.new_zeros(*query.shape[:2], m - n, query.shape[3]), query], 2)
            if hidden is not None:
                hidden = torch.cat([hidden.new_zeros(hidden.shape[0], m - n, hidden.shape[2]), hidden], 1)
        rows = Rows.of(padding) if isinstance(padding, Tensor) else padding
        if state is not None:
            if state.pending is not None:
                self._read_pending(state, scaling)
            call = {"query": query, "key": key, "value": value}
            if rows is not None:
                call["real"] = rows.real
            if hidden is not None:
                call["hidden"] = hidden
            state.begin(call)
        run = self._exported if torch.compiler.is_exporting() else self._on_rows
        output = run(query, key, value, rows, scaling, dropout, causal, state, hidden)
        self.after_backward(query, output)
        return output[:, :, m - n :] if m > n else output

    def _on_rows(self, query, key, value, rows, scaling, dropout, causal, state, hidden) -> Tensor:
        options = {"scaling": scaling, "dropout": dropout, "causal": causal, "state": state}

        def attend(query, key, value, hidden, lengths) -> Tensor:
            return self.attend_from_below(query, key, value, lengths=lengths, hidden=hidden, **options)

        if rows is None:
            output = attend(query, key, value, hidden, None)
        elif isinstance(rows, Texts):
            with self.in_parts(attend, query.shape[0] * query.shape[2]) as attend_part:
                output = rows.over(attend_part, query, key, value, hidden)
        else:
            output = rows.over(attend, query, key, value, hidden)
        if state is not None:
            state.commit(None if rows is None else rows.real, query.shape[0], query.shape[2])
        return output

    def _exported(self, *args) -> Tensor:
        """As `_on_rows`, while `torch.export` looks on."""
        from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode  # takes a while to load

        try:
            return self._on_rows(*args)
        except GuardOnDataDependentSymNode as error:
            raise ValueError(
                f"{self.config.name}: what is computed here depends on the numbers that are read, which torch.export cannot "
                "write down. Take a variant of a fixed pattern, such as sliding_window, block, linformer or hedgehog."
            ) from error

    def _read_pending(self, state: AttentionState, scaling: float) -> None:
        call, state.pending = state.pending, None
        rows = Rows.of(call.get("real"))
        self._on_rows(call["query"], call["key"], call["value"], rows, scaling, 0.0, True, state, call.get("hidden"))

    def attend_from_below(self, query, key, value, *, causal, **rest) -> Tensor:
        """As `attend`, with what lies below `dense_below` attended exactly."""
        if self.config.dense_below == 0:
            return self.attend(query, key, value, causal=causal, **rest)
        below = self._decoder_dense_below if causal else self._encoder_dense_below
        return below(query, key, value, causal=causal, **rest)

    def _encoder_dense_below(self, query, key, value, *, lengths, hidden, state, **shared) -> Tensor:
        """Rows of fewer than `dense_below` real tokens attend exactly."""
        limit = self.config.dense_below
        if query.shape[2] < limit:
            return exact_attention(query, key, value, lengths=lengths, **shared)
        short = None if lengths is None else (lengths < limit).nonzero()[:, 0]
        if short is None or len(short) == 0:
            return self.attend(query, key, value, lengths=lengths, hidden=hidden, state=state, **shared)
        rest = (lengths >= limit).nonzero()[:, 0]
        output = torch.zeros_like(query)
        n = limit - 1
        dense = exact_attention(
            query[short, :, :n], key[short, :, :n], value[short, :, :n], lengths=lengths[short], **shared
        )
        output = output.index_put((short,), torch.nn.functional.pad(dense, (0, 0, 0, query.shape[2] - n)))
        if len(rest):
            taken = None if hidden is None else hidden[rest]
            far = self.attend(
                query[rest], key[rest], value[rest], lengths=lengths[rest], hidden=taken, state=state, **shared
            )
            output = output.index_put((rest,), far.to(output.dtype))
        return output

    def _decoder_dense_below(self, query, key, value, *, lengths, hidden, state, **shared) -> Tensor:
        """Queries at positions below `dense_below` attend exactly to everything before them."""
        limit, n = self.config.dense_below, query.shape[2]
        output = None
        if state is not None or n > limit:
            output = self.attend(query, key, value, lengths=lengths, hidden=hidden, state=state, **shared)
        if state is None:
            head = slice(0, min(n, limit))
            dense = exact_attention(query[:, :, head], key[:, :, head], value[:, :, head], lengths=None, **shared)
            return dense if output is None else torch.cat([dense, output[:, :, limit:]], 2)
        if isinstance(state.count, int) and state.count >= limit:
            return output
        store = state.store("dense_below", TokenStore)
        buffer = store.extend(key, value, lengths)
        store.keep_until(limit)
        offset = state.count
        dense = exact_attention(
            query, buffer.key[:, :, :limit], buffer.value[:, :, :limit],
            lengths=_at_most(buffer.length, limit), offset=offset, **shared,
        )  # fmt: skip
        position = column(offset) + torch.arange(n, device=query.device)
        below = (position < limit).expand(query.shape[0], n)[:, None, :, None]
        return torch.where(below, dense, output)


def _at_most(length: Count, limit: int) -> Count:
    return min(length, limit) if isinstance(length, int) else length.clamp_max(limit)
