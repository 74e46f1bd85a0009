"""
The one attention function: patched layers go to their variant, all others to what the model had before.

`NAME` is registered with Transformers once, beside the names that exist; nothing is overwritten.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .caching import AttentionState
from .hosts import cache_argument, hands_on_kwargs, hidden_input
from .masking import AttentionMask, efficient_attention_mask
from .variant import EfficientAttention

NAME = "efficient_attention"
CHILD = "efficient_attn"  # the variant, a child of the patched module
PREVIOUS = "_dense_implementation"  # on every dispatching module of a patched model: what it ran before
CALL = "efficient_attn_call"  # the keyword argument that carries a `Call` through the host's forward


class Call:
    """What a patched layer knows of one forward and the attention function has to know, too."""

    def __init__(self, state: AttentionState | None, hidden: Tensor | None) -> None:
        self.state = state
        self.hidden = hidden
        self.arrived = False


REFUSED_ARGUMENTS = {
    "softcap": "logits are capped (softcap)",
    "s_aux": "the softmax has sink logits (s_aux)",
    "position_bias": "a position bias is added to the logits",
    "cache": "the cache is paged (continuous batching)",
    "cu_seq_lens_q": "sequences are packed (cu_seq_lens)",
    "block_mask": "a block mask is given",
}


def efficient_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: AttentionMask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """
    query (B, H, N, D), key and value (B, G, M, D) -> output (B, N, H, D) and no attention weights, as Transformers calls it.

    Raises:
        ValueError: an argument that changes the result and that no variant honours.
    """
    call = kwargs.pop(CALL, None)
    variant: EfficientAttention | None = getattr(module, CHILD, None)
    if variant is None:
        if is_causal is not None:
            kwargs["is_causal"] = is_causal
        return _dense(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    if call is not None:
        call.arrived = True
    state = None if call is None else call.state
    before = state.seen - query.shape[2] if state is not None else 0
    causal = module.is_causal if is_causal is None else is_causal
    rows = None
    if isinstance(attention_mask, AttentionMask):
        causal = causal if attention_mask.causal is None else attention_mask.causal
        rows = attention_mask.rows()
        if attention_mask.custom is not None:
            raise ValueError(_refuses(variant, attention_mask.custom))
    elif attention_mask is not None:
        raise ValueError(_refuses(variant, f"a {attention_mask.ndim}-D mask {tuple(attention_mask.shape)} is given"))
    for name, reason in REFUSED_ARGUMENTS.items():
        if kwargs.get(name) is not None:
            raise ValueError(_refuses(variant, reason))
    window = kwargs.get("sliding_window")
    if window is not None and before + key.shape[2] > window:
        raise ValueError(
            _refuses(variant, f"this architecture's own sliding window of {window} would hide some of the tokens")
            + " Patch only the layers without a window (`layers=`), or set the window in the model's config to None first."
        )
    output = variant(
        query,
        key,
        value,
        padding=rows,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        dropout=dropout,
        causal=bool(causal),
        state=state,
        hidden=None if call is None or not variant.needs_hidden else call.hidden,
    )
    return output.transpose(1, 2).contiguous(), None


def _refuses(variant: EfficientAttention, reason: str) -> str:
    return f"variant {variant.config.name!r} in layer {variant.host.layer}: {reason}, which it cannot honour."


def _dense(module: nn.Module, query, key, value, attention_mask, **kwargs) -> tuple[Tensor, Tensor | None]:
    """The layer as it was before the patch."""
    implementation = getattr(module, PREVIOUS, None)
    if implementation is None:
        raise RuntimeError(
            f"{type(module).__name__} was called with attention implementation {NAME!r} but belongs to no patched model. "
            "Use patch_model(model, ...) rather than attn_implementation=."
        )
    if isinstance(attention_mask, AttentionMask):
        attention_mask = attention_mask.dense(implementation)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
    return function(module, query, key, value, attention_mask, **kwargs)


class PatchedForward:
    """
    Mixin of every generated `Efficient<Host>` class: brings the layer's decoder state to the attention function and makes
    sure that the call went there.
    """

    dense_class: type

    def forward(self, *args, **kwargs):
        cls = self.dense_class
        if self.config._attn_implementation != NAME:
            raise RuntimeError(
                f"layer {self.efficient_attn.host.layer} is patched, but the model's attention implementation was set to "
                f"{self.config._attn_implementation!r} afterwards, which would run it dense. Call unpatch_model(model) first."
            )
        state = layer_state(self, cache_argument(args, kwargs))
        if not hands_on_kwargs(cls):
            return super().forward(*args, **kwargs)
        call = Call(state, hidden_input(args, kwargs))
        output = super().forward(*args, **{**kwargs, CALL: call})
        if not call.arrived:
            raise RuntimeError(
                f"{cls.__name__} did not call Transformers' attention function, so layer {self.efficient_attn.host.layer} "
                "would have stayed dense. This architecture cannot be patched."
            )
        return output


def layer_state(module: nn.Module, cache: Any) -> AttentionState | None:
    """
    The layer's own state in the user's cache; an empty layer of the cache is replaced by it on first use.

    Raises:
        ValueError: the layer's place in the cache holds something that this layer cannot read.
    """
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if cache is None:
        return None
    index = getattr(module, "layer_idx", None)
    if index is None:
        raise ValueError(f"{type(module).__name__} was given a cache but has no layer_idx to find its place in it.")
    while len(cache.layers) <= index and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index]
    variant = getattr(module, CHILD)
    if isinstance(layer, AttentionState):
        if layer.owner is not None and layer.owner != variant.config.to_dict():
            raise ValueError(
                f"layer {index} of this cache was filled by {layer.owner}, which {variant.config.to_dict()} cannot read. "
                "Start with a new cache."
            )
        return layer
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.get_seq_length() > 0:
        held = f"{layer.get_seq_length()} tokens in a {type(layer).__name__}"
        raise ValueError(
            f"variant {variant.config.name!r} keeps a decoder state of its own, but layer {index} of this cache holds {held}. "
            "Give an empty DynamicCache (or none) from the first token on."
        )
    cache.layers[index] = variant.make_state()
    cache.layers[index].owner = variant.config.to_dict()
    if getattr(layer, "record_past", False):
        cache.layers[index].activate_past_recording()
    return cache.layers[index]


AttentionInterface.register(NAME, efficient_attention_forward)
AttentionMaskInterface.register(NAME, efficient_attention_mask)
