"""The suite is tested: broken variants must fail the check that is there for their fault, and a sound one must pass all."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from contract import CHECKS, Subject

from hf_efficient_attn import EfficientAttention, EfficientAttentionConfig, option, register_variant, unregister_variant
from hf_efficient_attn.ops.exact import exact_attention, masked_attention, sdpa


@dataclass(kw_only=True)
class ToyConfig(EfficientAttentionConfig):
    """Blocks, as in `block`, so that its oracle serves."""

    block_size: int = option(8, "tokens", minimum=1)
    num_sinks: int = option(0, "tokens", minimum=0)
    global_tokens = 0  # which its oracle asks for

    @classmethod
    def dense_limit(cls, length, causal):
        return cls(block_size=length)


class Sound(EfficientAttention):
    """Block attention by a mask in query chunks: slow, and right."""

    config_class = ToyConfig
    linear_cost = False

    def attend(self, query, key, value, *, lengths, scaling, dropout, causal, state, hidden):
        first = torch.zeros(query.shape[0], dtype=torch.long) if state is None else state.count
        first = torch.as_tensor(first).expand(query.shape[0])
        length = query.shape[2] if lengths is None else lengths
        if state is not None:
            buffer = state.store("tokens").extend(key, value, lengths)
            key, value, length = buffer.key, buffer.value, buffer.length
        slots = torch.arange(key.shape[2])
        used = slots < torch.as_tensor(length).expand(query.shape[0])[:, None]

        def visible(begin, end):
            t = first[:, None, None] + torch.arange(begin, end)[:, None]
            return self.sees(t, slots[None, None], causal, used[:, None])[:, None]

        return masked_attention(query, key, value, visible, scaling=scaling, dropout=dropout)

    def sees(self, t, j, causal, used):
        size = self.config.block_size
        return (t // size == j // size) & (j <= t if causal else used)


class PeeksAhead(Sound):
    """Lets a decoder's query see its whole block."""

    def sees(self, t, j, causal, used):
        return (t // self.config.block_size == j // self.config.block_size) & used


class IgnoresPadding(Sound):
    """Counts padded keys as real ones."""

    def sees(self, t, j, causal, used):
        same = t // self.config.block_size == j // self.config.block_size
        return same & (j <= t) if causal else same.expand(used.shape[0], -1, -1)


class ForgetsItsState(Sound):
    """Starts anew with every call."""

    def attend(self, *args, state, **kwargs):
        return super().attend(*args, state=None, **kwargs)


class CountsPerCall(Sound):
    """Counts positions from the start of the call, so blocks depend on how the text was split."""

    def attend(self, *args, state, **kwargs):
        if state is not None:
            count, state.count = state.count, 0
            try:
                return super().attend(*args, state=state, **kwargs)
            finally:
                state.count = count
        return super().attend(*args, state=state, **kwargs)


class LeaksThroughPooling(Sound):
    """Adds the mean of all values of the call: in a decoder that is the future."""

    def attend(self, query, key, value, **kwargs):
        mean = value.mean(2, keepdim=True).repeat_interleave(query.shape[1] // value.shape[1], 1)
        return super().attend(query, key, value, **kwargs) + 0.1 * mean


class AllocatesTheMatrix(Sound):
    """Forms N x N weights."""

    def attend(self, query, key, value, *, scaling, causal, lengths, **kwargs):
        n = query.shape[2]
        t, j = torch.arange(n)[:, None], torch.arange(n)
        used = j[None, None] < torch.as_tensor(n if lengths is None else lengths).expand(len(query))[:, None, None]
        mask = self.sees(t[None], j[None, None], causal, used)[:, None]
        return sdpa(query, key, value, scaling=scaling, mask=mask)


class IsDense(Sound):
    """Attends to everything, whatever its block size."""

    def attend(self, query, key, value, *, lengths, scaling, dropout, causal, state, hidden):
        return exact_attention(query, key, value, lengths=lengths, scaling=scaling, causal=causal)


class DropsGradients(Sound):
    """Cuts the keys off the graph."""

    def attend(self, query, key, value, **kwargs):
        return super().attend(query, key.detach(), value, **kwargs)


class WritesIntoItsState(Sound):
    """Overwrites what it stored, so a recorded call cannot be taken back."""

    def attend(self, query, key, value, *, state, **kwargs):
        output = super().attend(query, key, value, state=state, **kwargs)
        if state is not None:
            for name in ("key", "value"):
                stored = state.entries["tokens"].entries[name]
                stored[:, :, : -key.shape[2]] *= 1.5
                state.entries["tokens"].entries[name] = stored
        return output


class SharesItsBatch(Sound):
    """Adds what the first row says to all of them."""

    def attend(self, query, key, value, **kwargs):
        output = super().attend(query, key, value, **kwargs)
        return output + 0.1 * output[:1]


class RoundsInHalf(Sound):
    """Loses half of its digits."""

    def attend(self, query, key, value, **kwargs):
        return super().attend(query, key, value, **kwargs).to(torch.bfloat16).to(query.dtype)


@contextmanager
def registered(module_class):
    register_variant("toy", family="fixed patterns", summary="a toy", paper="none")(module_class)
    try:
        yield
    finally:
        unregister_variant("toy")


FAULTS = [
    (PeeksAhead, True, "causality"),
    (PeeksAhead, True, "forward_is_the_formula"),
    (IgnoresPadding, False, "padding_does_not_matter"),
    (IgnoresPadding, False, "forward_is_the_formula"),
    (ForgetsItsState, True, "decoding"),
    (ForgetsItsState, True, "beams"),
    (CountsPerCall, True, "decoding"),
    (CountsPerCall, True, "long_second_call"),
    (LeaksThroughPooling, True, "causality"),
    (LeaksThroughPooling, False, "padding_does_not_matter"),
    (AllocatesTheMatrix, True, "growth"),
    (AllocatesTheMatrix, False, "growth"),
    (IsDense, False, "dense_limit"),
    (IsDense, True, "forward_is_the_formula"),
    (DropsGradients, True, "gradients_are_the_formula_s"),
    (WritesIntoItsState, True, "crop"),
    (SharesItsBatch, True, "packed_texts"),
    (SharesItsBatch, False, "packed_texts"),
    (RoundsInHalf, False, "head_layouts"),
    (RoundsInHalf, False, "dense_limit"),
]


@pytest.mark.parametrize(("toy", "causal", "check"), FAULTS)
def test_a_broken_variant_fails(toy, causal, check) -> None:
    with registered(toy), pytest.raises(AssertionError):
        CHECKS[check](Subject("toy", causal, oracle="block"))


@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
@pytest.mark.parametrize("check", [name for name in CHECKS if name != "growth"])
def test_a_sound_variant_passes(check, causal) -> None:
    with registered(Sound):
        CHECKS[check](Subject("toy", causal, oracle="block"))


def test_a_sound_variant_passes_growth() -> None:
    """Its masks are made in query chunks; its cost is quadratic, and it says so."""
    with registered(Sound):
        CHECKS["growth"](Subject("toy", True, oracle="block"))
