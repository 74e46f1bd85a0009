"""
The one attention function: patched layers go to their variant, all others to what the model had before.

`NAME` is registered with Transformers once, beside the names that exist; nothing is overwritten.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .caching import AttentionState
from .hosts import HostCode, cache_argument, hidden_input, other_source
from .masking import HIDES, OWN, AttentionMask, efficient_attention_mask, key_padding, real_tokens, texts_of
from .ops.rows import Rows, Texts
from .variant import EfficientAttention

NAME = "efficient_attention"
CHILD = "efficient_attn"  # the variant, a child of the patched module
PREVIOUS = "_dense_implementation"  # on every dispatching module of a patched model: what it ran before
# The owner of a patched feed-forward: on its linear maps with their path, on its layer's attention with what sees to the maps.
FEED_FORWARD = "_efficient_feed_forward"
CALL = "efficient_attn_call"  # the keyword argument that carries a `Call` through the host's forward


class Call:
    """What a patched layer knows of one forward and the attention function has to know, too."""

    def __init__(self, state: AttentionState | None, hidden: Tensor | None) -> None:
        self.state = state
        self.hidden = hidden
        self.before = 0 if state is None else state.seen
        self.arrived = False


REFUSED_ARGUMENTS = {
    "softcap": "logits are capped (softcap)",
    "s_aux": "the softmax has sink logits (s_aux)",
    "sinks": "the softmax has sink logits (sinks)",
    "indices": "the architecture chooses the tokens that are attended to (indices)",
    "block_indices": "the architecture chooses the tokens that are attended to (block_indices)",
    "position_bias": "a position bias is added to the logits",
    "cache": "the cache is paged (continuous batching)",
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
    efficient_attn_call: Call | None = None,  # `CALL`; after a pop torch.compile guards nothing else in kwargs
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """
    query (B, H, N, D), key and value (B, G, M, D) -> output (B, N, H, D) and no attention weights, as Transformers calls it.

    Raises:
        ValueError: an argument that changes the result and that no variant honours.
    """
    call = efficient_attn_call
    beside = getattr(module, FEED_FORWARD, None)
    if beside is not None:
        owner, see_to_maps = beside
        if not torch.compiler.is_compiling():
            see_to_maps([owner])  # a quantiser may have put others there while a model around this one was loaded
        if module.training:
            batch, _, n, _ = query.shape
            texts = _texts(attention_mask, kwargs.get("cu_seq_lens_q"), batch, n)
            real = real_tokens(attention_mask, n, query.device) if texts is None else texts.to(query.device)
            getattr(owner, CHILD).note_tokens(batch, n, real)
    variant: EfficientAttention | None = getattr(module, CHILD, None)
    if variant is None:
        if is_causal is not None:
            kwargs["is_causal"] = is_causal
        return _dense(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    state = None if call is None else call.state
    if call is not None:
        if call.arrived and state is not None:
            raise ValueError(_refuses(variant, "the layer attends several times per call, and its cache counts one"))
        if state is not None and state.seen != call.before + query.shape[2]:
            raise ValueError(_refuses(variant, "the layer keeps its keys in another layer's place of the cache"))
        call.arrived = True
    causal = variant.host.causal if is_causal is None else is_causal
    rows = None
    _check_heads(variant, query, key, value)
    if isinstance(attention_mask, AttentionMask):
        causal = causal if attention_mask.causal is None else attention_mask.causal
        if attention_mask.custom is not None:
            raise ValueError(_refuses(variant, attention_mask.custom))
        tokens = key.shape[2] if state is None else state.seen
        if attention_mask.length != tokens:
            raise ValueError(
                _refuses(variant, f"the mask covers {attention_mask.length} tokens, the layer has {tokens}")
            )
        rows = attention_mask.rows(query.shape[2], query.device)
        if state is not None and not state.record_past and attention_mask.contradicts(state):
            raise ValueError(
                _refuses(variant, "the mask hides other tokens of the cache than were hidden when it read them")
            )
        if state is not None:
            state.shared = attention_mask.shared(query.device)
    elif attention_mask is not None and not causal and (padding := key_padding(attention_mask)) is not None:
        rows = Rows.of(padding)
    elif attention_mask is not None:
        raise ValueError(_refuses(variant, f"a {attention_mask.ndim}-D mask {tuple(attention_mask.shape)} is given"))
    for name in (*REFUSED_ARGUMENTS, *module.host_code.own_terms):
        if kwargs.get(name) is not None:
            reason = REFUSED_ARGUMENTS.get(name, f"this architecture's softmax has a term of its own ({name})")
            raise ValueError(_refuses(variant, reason))
    cumulative = kwargs.get("cu_seq_lens_q")
    if cumulative is not None and isinstance(rows, Texts):
        if not attention_mask.agrees(cumulative):
            raise ValueError(_refuses(variant, "cu_seq_lens and position_ids tell different texts apart"))
    elif cumulative is not None:
        rows = _cut(variant, rows, cumulative, query.shape[0], query.shape[2])
    window, longest = kwargs.get("sliding_window"), key.shape[2] if state is None else state.seen
    if window is not None and (rows.longest if isinstance(rows, Texts) else longest) > window:
        raise ValueError(_refuses(variant, HIDES.format(window)))
    index = attention_mask.index if isinstance(attention_mask, AttentionMask) and rows is None else None
    run = variant if index is None else partial(_of_texts, variant, *index)
    output = run(
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


@torch.compiler.disable
def _cut(variant: EfficientAttention, rows: Rows | None, cumulative: Tensor, batch: int, tokens: int) -> Texts:
    """The texts that cu_seq_lens tell apart; a compiled model's rows may hide nothing."""
    if rows is not None and not bool(rows.real.all()):
        raise ValueError(_refuses(variant, "cu_seq_lens are given beside a mask that hides tokens"))
    return texts_of(cumulative, batch, tokens)


@torch.compiler.disable
def _texts(mask: AttentionMask | Tensor | None, cumulative: Tensor | None, batch: int, tokens: int) -> Texts | None:
    """The texts that the rows of a call hold, or None where each holds one."""
    if cumulative is not None:
        return texts_of(cumulative, batch, tokens)
    if not isinstance(mask, AttentionMask) or mask.index is None:
        return mask.texts if isinstance(mask, AttentionMask) else None
    return Texts.of(mask.index[0]) if bool(mask.index[0].any()) else None


@torch.compiler.disable
def _of_texts(
    variant: EfficientAttention, index: Tensor, ahead: Tensor, *args: Tensor, padding: None, **options
) -> Tensor:
    """`AttentionMask.index` read in a compiled model, where numbers can be looked at."""
    index = index.to(args[0].device)
    if variant.host.causal and bool(ahead.any()):
        raise ValueError(_refuses(variant, OWN))
    return variant(*args, padding=Texts.of(index) if bool(index.any()) else padding, **options)


def _refuses(variant: EfficientAttention, reason: str) -> str:
    return (
        f"variant {variant.config.name!r} in layer {variant.host.layer}: {reason}, which it cannot honour. "
        "Leave the layer out with `layers=`, or call the model without it."
    )


def _check_heads(variant: EfficientAttention, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raises ValueError where a layer's heads are not what `hosts` read off its module, or its keys not its own tokens."""
    host, n = variant.host, query.shape[2]
    built = ((host.num_heads, host.head_dim), *[(host.num_kv_heads, host.head_dim)] * 2)
    given = tuple((x.shape[1], x.shape[3]) for x in (query, key, value))
    if given != built:
        raise ValueError(
            _refuses(variant, f"(heads, head size) of query, key and value are {given} where {built} was expected")
        )
    if key.shape[2] != n:
        raise ValueError(
            _refuses(
                variant,
                f"{n} queries meet {key.shape[2]} keys, so some keys come from elsewhere than the layer's tokens",
            )
        )


def _dense(module: nn.Module, query, key, value, attention_mask, **kwargs) -> tuple[Tensor, Tensor | None]:
    """The layer as it was before the patch."""
    implementation = getattr(module, PREVIOUS, None)
    if implementation is None:
        raise RuntimeError(
            f"{type(module).__name__} was called with attention implementation {NAME!r} but belongs to no patched model. "
            "Use patch_model(model, ...) rather than attn_implementation=."
        )
    if isinstance(attention_mask, AttentionMask):
        cumulative = kwargs.get("cu_seq_lens_q")
        several = cumulative is not None and len(cumulative) > len(query) + 1  # than a text for each row
        told = attention_mask.texts is not None or attention_mask.index is not None
        if several and not told and "flash" not in implementation:
            raise ValueError(
                f"cu_seq_lens are given, which layers that stay dense cannot honour in {implementation!r} attention. Patch all "
                "layers, or give position_ids that start again with each text (decoders)."
            )
        if attention_mask.shape[-1] != key.shape[2]:
            raise RuntimeError(
                f"a dense {type(module).__name__} has {key.shape[2]} keys where its mask covers {attention_mask.shape[-1]}: it "
                "uses the keys of a patched layer, which no longer keeps all of them. Patch both layers or neither."
            )
        attention_mask = attention_mask.dense(implementation, query.device)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
    return function(module, query, key, value, attention_mask, **kwargs)


class PatchedForward:
    """
    Mixin of every generated `Efficient<Host>` class: brings the layer's decoder state to the attention function and makes
    sure that the call went there.
    """

    dense_class: type
    host_code: HostCode

    def forward(self, *args, **kwargs):
        if self.config._attn_implementation != NAME:
            raise RuntimeError(
                f"layer {self.efficient_attn.host.layer} is patched, but the model's attention implementation was set to "
                f"{self.config._attn_implementation!r} afterwards, which would run it dense. Call unpatch_model(model) first."
            )
        given = self.host_code.arguments(args, kwargs)
        source = other_source(given)
        if source is not None:
            raise ValueError(_refuses(self.efficient_attn, f"keys come from another sequence ({source})"))
        cache = cache_argument(args, kwargs)
        if cache is not None and torch.compiler.is_compiling() and not torch.is_grad_enabled():
            return _uncompiled(PatchedForward.forward, self, *args, **kwargs)
        state = layer_state(self, cache, given.get("layer_idx"))
        if not self.host_code.hands_on:
            return super().forward(*args, **kwargs)
        call = Call(state, hidden_input(args, kwargs))
        try:
            output = super().forward(*args, **{**kwargs, CALL: call})
        except BaseException:
            if state is not None:
                state.interrupted = True
            raise
        if not call.arrived:
            raise RuntimeError(
                f"{self.dense_class.__name__} did not call Transformers' attention function, so layer "
                f"{self.efficient_attn.host.layer} would have stayed dense. This architecture cannot be patched."
            )
        return output


@torch.compiler.disable
def _uncompiled(function: Callable, *args, **kwargs) -> Any:
    """Generation: counts of a state are numbers of Python, of which a compiled graph would hold two for each layer."""
    return function(*args, **kwargs)


class PatchedLinear:
    """
    Mixin of the generated class of every linear map in a patched feed-forward: its output is what the variant makes of it.
    """

    dense_class: type

    def forward(self, x: Tensor) -> Tensor:
        owner, path = getattr(self, FEED_FORWARD)
        if owner.get_submodule(path) is not self:
            raise ValueError(
                f"{path!r} of a patched feed-forward is wrapped (by an adapter), or a replica of it runs (DataParallel). An "
                "adapter there would act on the tokens of all experts: give adapters to the experts, whose names contain "
                f"'{CHILD}.experts.', and leave the pretrained map out (in PEFT by exclude_modules)."
            )
        return getattr(owner, CHILD).project(path, super().forward, x)


# A word in the class name of a cache's layer -> why a state cannot take its place.
OTHER_LAYERS = {
    "Static": "; a cache of fixed size has no place for it",
    "Quantized": "; a quantised cache has no place for it",
}


def layer_state(module: nn.Module, cache: Any, index: int | None = None) -> AttentionState | None:
    """
    The layer's own state in the user's cache, at `index` where the call says so (one module that serves several layers), or
    at the module's `layer_idx`; an empty layer of the cache is replaced by it on first use.

    Raises:
        ValueError: the layer's place in the cache holds something that this layer cannot read.
    """
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if cache is None:
        return None
    index = getattr(module, "layer_idx", None) if index is None else index
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
        if layer.interrupted:
            raise ValueError(
                f"a call failed in layer {index} of this cache, which holds a part of its tokens. Start with a new cache, or "
                "reset this one."
            )
        layer.expected = True
        return layer
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.get_seq_length() > 0:
        held = f"{layer.get_seq_length()} tokens in a {type(layer).__name__}"
        kinds = [cls.__name__ for cls in type(layer).__mro__]
        why = next((why for word, why in OTHER_LAYERS.items() if any(word in kind for kind in kinds)), "")
        raise ValueError(
            f"variant {variant.config.name!r} keeps a decoder state of its own, but layer {index} of this cache holds {held}. "
            f"Give an empty DynamicCache (or none) from the first token on{why}."
        )
    if getattr(cache, "offloading", False):
        raise ValueError(
            "an offloaded cache moves keys away as soon as they are added, before a patched layer has read them. Use a "
            "DynamicCache() without offloading; most variants keep a smaller state."
        )
    state = cache.layers[index] = variant.make_state()
    state.owner, state.expected = variant.config.to_dict(), True
    if getattr(layer, "record_past", False):
        state.activate_past_recording()
    return state


AttentionInterface.register(NAME, efficient_attention_forward)
AttentionMaskInterface.register(NAME, efficient_attention_mask)
