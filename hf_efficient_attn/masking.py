"""
The mask that patched models hand from layer to layer: `padding` for variants, a lazy 4-D mask for layers that stay dense.

Convention everywhere: True = keep.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
)

from .ops.rows import Rows


class AttentionMask:
    """
    What Transformers' mask factory makes for a patched model, in place of a (B, 1, N, M) tensor.

    padding: (B, M) bool over cached and new tokens, or None where none is padded. causal: the direction the factory was
    asked for, or None where it does not say. window: the length of a sliding window that belongs to the architecture.
    custom: why no variant can honour this mask, or None.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._arguments = arguments
        self._dense: dict[str, Tensor | None] = {}
        self._rows: Rows | None = None
        self._rows_made = False
        function = arguments["mask_function"]
        self.query_length = int(arguments["q_length"])
        self.window = arguments.get("local_size")
        self.causal = {causal_mask_function: True, bidirectional_mask_function: False}.get(function)
        self.custom = None
        if self.causal is None and (self.window is None or arguments.get("use_vmap") or _is_packed(function, arguments)):
            self.custom = "packed sequences (position_ids that start again) or a mask function of the model's own"
        self.padding = None
        if arguments.get("attention_mask") is not None:
            kv_offset, kv_length = int(arguments["kv_offset"]), int(arguments["kv_length"])
            padding = prepare_padding_mask(arguments["attention_mask"], kv_length, kv_offset)
            self.padding = padding[:, kv_offset : kv_offset + kv_length].bool()

    def rows(self) -> Rows | None:
        """The real tokens among the call's own (the last N columns); made once and shared by all layers."""
        if not self._rows_made:
            self._rows = None if self.padding is None else Rows.of(self.padding[:, -self.query_length :])
            self._rows_made = True
        return self._rows

    def dense(self, implementation: str) -> Tensor | None:
        """The mask that the attention function `implementation` of Transformers expects."""
        if implementation not in self._dense:
            self._dense[implementation] = ALL_MASK_ATTENTION_FUNCTIONS[implementation](**self._arguments)
        return self._dense[implementation]


def efficient_attention_mask(*, mask_function: Callable = causal_mask_function, **arguments: Any) -> AttentionMask:
    """The function registered with Transformers' `AttentionMaskInterface`; its arguments are those of `sdpa_mask`."""
    return AttentionMask({"mask_function": mask_function, "kv_offset": 0, "q_offset": 0, **arguments})


def _is_packed(function: Callable, arguments: dict[str, Any]) -> bool:
    """Whether a window's mask function hides a token's predecessor, as it does where a packed text begins."""
    n, offset = int(arguments["q_length"]), arguments.get("q_offset", 0)
    if n < 2 or torch.compiler.is_compiling():
        return False
    batch = torch.arange(int(arguments["batch_size"]), device=arguments.get("device", "cpu"))[:, None]
    query = offset + torch.arange(1, n, device=batch.device)[None]
    seen = function(batch, torch.zeros_like(batch), query, query - 1)
    return not bool(torch.as_tensor(seen).all())
