"""
The mask that patched models hand from layer to layer: `padding` for variants, a lazy 4-D mask for layers that stay dense.

Convention everywhere: True = keep.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import masking_utils
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_overlay,
    packed_sequence_mask_function,
    prepare_padding_mask,
    sliding_window_bidirectional_overlay,
    sliding_window_overlay,
)

from .ops.rows import Rows, Texts

if TYPE_CHECKING:
    from .caching import AttentionState

# Transformers builds its mask functions as closures; one of the same code is one of the same kind.
_INTERSECTION = and_masks().__code__
_WINDOW = sliding_window_overlay(1).__code__
_BIDIRECTIONAL_WINDOW = sliding_window_bidirectional_overlay(1).__code__
_CHUNK = chunked_overlay(1, torch.zeros(1)).__code__
_PACKED = packed_sequence_mask_function(torch.zeros(1, 1)).__code__
_REMAPPED = None  # positions counted from where a text begins; Transformers 5.17 counts them from the row's begin
if hasattr(masking_utils, "remap_positions_for_packed_sequence"):
    _REMAPPED = masking_utils.remap_positions_for_packed_sequence(causal_mask_function, torch.zeros(1, 1)).__code__

OWN = "a mask function of the model's own"
FOREIGN_USE = (
    "code of this model computes with its attention mask, beside Transformers' attention function, so its layers cannot be "
    "patched: no variant, and no layer that is left dense, would get the mask it needs"
)
HIDES = (
    "this architecture's own sliding window of {} would hide some of the tokens (set it to None in the config to do "
    "without it)"
)


class AttentionMask:
    """
    What Transformers' mask factory makes for a patched model, in place of a (B, 1, N, M) tensor.

    padding: (B, M) bool over cached and new tokens, or None where none is padded. length: M, the tokens it speaks of.
    texts: those that the rows hold, where they are several. index: under torch.compile, (B, N) which text of its row a token
    belongs to, and (B or 1, N - 1) whether it sees the next one. causal: the direction the factory was asked for. custom: why
    no variant can honour this mask, or None.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._arguments = arguments
        self._made: dict[tuple, Any] = {}  # shared by all layers of a device
        self._shared: dict[torch.device, dict] = {}
        self.texts: Texts | None = None
        self.index: tuple[Tensor, Tensor] | None = None
        self._contradicts: bool | None = None
        self._agrees: bool | None = None
        self.query_length = int(arguments["q_length"])
        self.length = int(arguments["kv_offset"]) + int(arguments["kv_length"])
        self.causal, self.custom = self._read(arguments["mask_function"])
        self.padding = None
        given = arguments.get("attention_mask")
        if given is not None:
            if given.ndim != 2:
                raise ValueError(
                    f"attention_mask has the shape {tuple(given.shape)}; a patched model takes (batch, tokens), True = keep."
                )
            kv_offset, kv_length = int(arguments["kv_offset"]), int(arguments["kv_length"])
            padding = prepare_padding_mask(given, kv_length, kv_offset)
            self.padding = padding[:, kv_offset : kv_offset + kv_length].bool()

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the 4-D mask that this object stands for."""
        arguments = self._arguments
        return int(arguments["batch_size"]), 1, self.query_length, int(arguments["kv_length"])

    ndim = 4

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{FOREIGN_USE} (it asked for .{name})" if name[:1] != "_" else name)

    def __getitem__(self, index: Any) -> Any:
        raise ValueError(f"{FOREIGN_USE} (it took a part of it)")

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise ValueError(f"{FOREIGN_USE} (it called {getattr(function, '__name__', function)})")

    def _read(self, function: Callable) -> tuple[bool | None, str | None]:
        """
        (causal, custom) of a mask function. It is an intersection of parts, each of which must be known; a window or a
        chunk that belongs to the architecture must be wide enough to hide nothing. Sets `texts`.
        """
        if torch.compiler.is_compiling():
            return self._read_compiled(function)
        causal, reach = True, None
        for part in _parts(function):
            kind, values = getattr(part, "__code__", None), inspect.getclosurevars(part).nonlocals
            if part is bidirectional_mask_function:
                causal = False
            elif kind is _WINDOW:
                reach = values["sliding_window"]
            elif kind is _BIDIRECTIONAL_WINDOW:
                reach = values["sliding_window"] + 1
            elif kind is _CHUNK:
                if self.length > values["chunk_size"]:
                    return causal, HIDES.format(values["chunk_size"])
            elif kind is _PACKED:
                self.texts = Texts.of(values["packed_sequence_mask"])
            elif part is not causal_mask_function:
                return None, OWN
        longest = self.length if self.texts is None else self.texts.longest
        return causal, None if reach is None or longest <= reach else HIDES.format(reach)

    def _read_compiled(self, function: Callable) -> tuple[bool | None, str | None]:
        """
        As `_read` where closures cannot be looked into. Without a mask and a cache Transformers takes texts apart, also where
        there is one alone: sets `index`, by asking which tokens see the one before.
        """
        arguments, reach = self._arguments, self._arguments.get("local_size")
        if function is causal_mask_function or function is bidirectional_mask_function:
            return function is causal_mask_function, None
        whole = arguments.get("attention_mask") is None and self.query_length == self.length
        both_ways = "allow_is_bidirectional_skip" in arguments
        blocks = not whole and not both_ways and not arguments.get("allow_is_causal_skip", True)  # that see each other
        if arguments.get("use_vmap") or not (whole or reach) or blocks:
            return None, OWN
        if reach is not None and self.length > reach + both_ways:
            return None, HIDES.format(reach + both_ways)
        if whole and torch.compiler._is_exporting_flag:  # is_exporting() of PyTorch 2.11 is True in any compiled graph
            return None, "texts of one row could not be told apart in torch.export (give an attention_mask, of ones)"
        if whole:
            token = torch.arange(self.length, device=arguments.get("device"))
            row = torch.arange(int(arguments["batch_size"]), device=token.device)[:, None]
            before, after = (token - 1).clamp_min(0), (token + 1).clamp_max(self.length - 1)
            ends = ~function(row, 0, token, before).expand(len(row), self.length)
            self.index = ends.cumsum(1), function(row, 0, token[:-1], after[:-1])
        return None, None

    def rows(self, tokens: int, device: torch.device) -> Rows | Texts | None:
        """The texts, or the real ones among a call's own tokens, the last columns."""

        def make() -> Rows | Texts | None:
            return self.texts or (None if self.padding is None else Rows.of(self.padding[:, -tokens:]))

        return self._once("rows", tokens, device, make)

    def _once(self, kind: str, key: Any, device: torch.device, make: Callable[[], Any]) -> Any:
        """What `make` gives, on the device of the layer that asks: models may be spread over several."""
        if (kind, key) not in self._made:
            self._made[kind, key] = make()
        made = self._made[kind, key]
        if made is None:
            return None
        if (kind, key, device) not in self._made:
            self._made[kind, key, device] = made.to(device)
        return self._made[kind, key, device]

    def shared(self, device: torch.device) -> dict:
        """What decoder states make once for all layers of a device (`AttentionState.once`)."""
        return self._shared.setdefault(device, {})

    def agrees(self, cumulative: Tensor) -> bool:
        """Whether cu_seq_lens cut the rows into the same `texts`; asked once."""
        if self._agrees is None:
            both = self.texts, texts_of(cumulative, self.shape[0], self.length)
            ours, theirs = ([(places.tolist(), used.tolist()) for places, used, _ in texts.groups] for texts in both)
            self._agrees = ours == theirs
        return self._agrees

    def contradicts(self, state: AttentionState) -> bool:
        """
        Whether other tokens are hidden among those in the cache than were when a layer's state read them. All layers read
        the same, so that it is asked once. A draft model's state, which records, gets masks that are a token short.
        """
        if self._contradicts is None:
            self._contradicts = False
            if self.padding is not None and not torch.compiler.is_compiling():
                earlier = self.padding[:, : state.seen - self.query_length]
                real = state.real
                read = torch.ones_like(earlier[:, : state.count]) if real is None else real
                known = min(earlier.shape[1], read.shape[1])
                self._contradicts = not torch.equal(earlier[:, :known], read[:, :known].to(earlier.device))
        return self._contradicts

    def dense(self, implementation: str, device: torch.device) -> Tensor | None:
        """The mask that Transformers' attention function `implementation` expects; None where it has no kind of its own."""
        make = ALL_MASK_ATTENTION_FUNCTIONS.get(implementation)
        return None if make is None else self._once("dense", implementation, device, lambda: make(**self._arguments))


def efficient_attention_mask(*, mask_function: Callable = causal_mask_function, **arguments: Any) -> AttentionMask:
    """
    The function registered with Transformers' `AttentionMaskInterface`; its arguments are those of `sdpa_mask`. A mask that
    an outer model made already stays as it is.
    """
    if isinstance(arguments.get("attention_mask"), AttentionMask):
        return arguments["attention_mask"]
    return AttentionMask({"mask_function": mask_function, "kv_offset": 0, "q_offset": 0, **arguments})


def key_padding(mask: Tensor) -> Tensor | None:
    """
    (B, M) bool, True = keep, of a 4-D mask (B, 1, 1, M) that hides the same keys from all queries, as older encoders make
    it; None where the mask says more than that. A float mask is 0 where a key is seen and hugely negative elsewhere.
    """
    if mask.ndim != 4 or mask.shape[1:3] != (1, 1):
        return None
    row = mask[:, 0, 0]
    if row.dtype == torch.bool:
        return row
    keep = row == 0
    return keep if row.is_floating_point() and bool((keep | (row <= -1e4)).all()) else None


def texts_of(cumulative: Tensor, batch: int, tokens: int) -> Texts:
    """
    The texts of a batch whose rows, one after the other, hold them: (T + 1,) integers, 0 and where each text ends.

    Raises:
        ValueError: the texts are not in order, do not end where the rows do, or run from one row into the next.
    """
    ends, total = cumulative.tolist(), batch * tokens
    if ends != sorted(ends) or ends[:1] != [0] or ends[-1:] != [total] or not {*range(0, total, tokens)} <= {*ends}:
        raise ValueError(
            f"cu_seq_lens {ends} do not cut {batch} x {tokens} tokens into texts; give 0 and where each ends, among them "
            f"the end of each row, up to {total}."
        )
    lengths = torch.diff(cumulative)
    index = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    return Texts.of(index.view(batch, tokens))


def real_tokens(mask: AttentionMask | Tensor | None, tokens: int, device: torch.device) -> Tensor | None:
    """
    (B, tokens) bool of a call's own tokens, True = keep, or None where all are real. Of a mask that was given ready-made,
    tokens that no query sees are padding.
    """
    if isinstance(mask, AttentionMask):
        rows = mask.rows(tokens, device)
        return None if rows is None else rows.real
    if mask is None:
        return None
    seen = mask if mask.dtype == torch.bool else mask > -1e4 if mask.is_floating_point() else mask != 0
    return (seen if seen.ndim == 2 else seen.flatten(1, -2).any(1))[:, -tokens:]


def _parts(function: Callable) -> list[Callable]:
    """The mask functions that `function` is the intersection of; itself where it is none."""
    kind = getattr(function, "__code__", None)
    if kind is not _INTERSECTION and (kind is None or kind is not _REMAPPED):
        return [function]
    inner = inspect.getclosurevars(function).nonlocals
    return [part for f in inner.get("mask_functions") or [inner["mask_function"]] for part in _parts(f)]
