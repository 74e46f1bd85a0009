"""
What a computation costs: peak memory, time and FLOPs of a function, and of a model's training step and inference.

Everything is measured, nothing is estimated, and nothing is printed. Sizes are bytes, times are seconds.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import Cache

from . import kernels
from .modes import evaluating
from .variant import EfficientAttention


@dataclass(frozen=True)
class TimeRatio:
    """
    `seconds` and `baseline_seconds` are medians of `repeats` interleaved calls; `ratio` is the first over the second,
    `low` and `high` the 20th and 80th percentile of the ratios of neighbouring calls.
    """

    ratio: float
    low: float
    high: float
    seconds: float
    baseline_seconds: float
    repeats: int


@dataclass(frozen=True)
class StepCost:
    """
    One training step or one inference call.

    Attributes:
        peak_bytes: all tensors at the peak: `resident_bytes` and `working_bytes` together.
        resident_bytes: weights, buffers and optimizer state, there before the step.
        working_bytes: the most that the step held above that: activations, gradients, temporaries.
        seconds: the median over the repeats.
        tokens_per_second: tokens of the batch over `seconds`.
        flops: floating-point operations of matrix products and attention kernels (a multiply-add is two).
    """

    peak_bytes: int
    resident_bytes: int
    working_bytes: int
    seconds: float
    tokens_per_second: float
    flops: int


@dataclass(frozen=True)
class ModelCost:
    """What `measure_model` found. `cache_bytes_per_sequence` is None where the model does not decode."""

    batch_size: int
    length: int
    train_step: StepCost | None
    inference: StepCost
    cache_bytes_per_sequence: int | None


def peak_memory(fn: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """
    Bytes of live tensors at the peak of `fn()`, above what was live when it began.

    On CUDA this is what the caching allocator recorded. On the CPU every allocation and release of the tensor allocator
    is recorded by the profiler, in order, and the greatest partial sum is the peak: exact and repeatable, whatever else
    the process or the machine does. It runs on one thread, the only one that the profiler sees; others would each need room for
    a head of their own in kernels. What `fn` returns still counts; memory that libraries take outside the tensor allocator does
    not.

    Raises:
        ValueError: a device that is neither the CPU nor CUDA.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        fn()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        raise ValueError(f"memory on {device.type!r} cannot be measured; it can on 'cpu' and 'cuda'.")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            fn()
    finally:
        torch.set_num_threads(threads)
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def count_flops(fn: Callable[[], Any]) -> int:
    """
    Floating-point operations of `fn()`, forward and backward: matrix products, convolutions and attention kernels.

    A multiply-add is two; element-wise work is not counted, and PyTorch's operators stand in for compiled kernels. A
    fused attention kernel counts all queries x keys also where it is causal, as `torch.utils.flop_counter` does for all
    its kernels.
    """
    with kernels.off(), FlopCounterMode(display=False, custom_mapping=_ATTENTION_FLOPS) as counter:
        fn()
    return int(counter.get_total_flops())


def time_ratio(
    fn: Callable[[], Any], baseline: Callable[[], Any], repeats: int = 5, device: torch.device | str = "cpu"
) -> TimeRatio:
    """
    How many times the baseline's time `fn` takes: below 1 is faster.

    The calls alternate, so that a machine which slows down or speeds up meanwhile does so for both; each is called once
    before the clock starts.
    """
    if repeats < 1:
        raise ValueError(f"repeats = {repeats}: at least 1.")
    fn()
    baseline()
    pairs = [(_seconds(fn, device), _seconds(baseline, device)) for _ in range(repeats)]
    own, other = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratios = sorted(a / b for a, b in pairs)
    low, high = (ratios[round(share * (repeats - 1))] for share in (0.2, 0.8))
    return TimeRatio(own / other, low, high, own, other, repeats)


def median_time(fn: Callable[[], Any], repeats: int = 3, device: torch.device | str = "cpu") -> float:
    """Seconds of one call, the median of `repeats`, after one call that is not counted."""
    if repeats < 1:
        raise ValueError(f"repeats = {repeats}: at least 1.")
    fn()
    return statistics.median(_seconds(fn, device) for _ in range(repeats))


def measure_model(
    model: torch.nn.Module,
    batch: Mapping[str, torch.Tensor],
    *,
    loss: Callable[[], torch.Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    accumulation: int = 1,
    repeats: int = 3,
    decodes: bool = False,
) -> ModelCost:
    """
    The cost of a model on one batch: a training step (with `optimizer`), inference, and the decoding cache (if it
    `decodes`).

    A training step is forward, loss, backward and the optimizer's update. It is made once before anything is
    measured, so that the optimizer's state counts as resident; the model's weights change by as many steps as are
    made, and the optimizer forgets its state. The model's modules stay in the modes they are in.

    Args:
        batch: `input_ids` (batch, length) and whatever else the model takes, on the model's device.
        loss: returns the scalar that training minimises on this batch; by default `model(**batch).loss`.
        autocast: returns the context in which forward passes run.
        accumulation: how often the batch is read, one after the other, in a training step and in inference.
        decodes: the model generates text: inference computes the logits of the last token only, as reading a prompt
            does, and the cache that one sequence of this length leaves behind is measured.
    """
    device = batch["input_ids"].device
    size, length = batch["input_ids"].shape
    size *= accumulation

    def cost(step: Callable[[], Any], prepare: Callable[[], Any]) -> StepCost:
        step()  # allocates what stays: optimizer state, lazily built buffers
        prepare()
        resident = resident_bytes(model, optimizer)
        working = peak_memory(step, device)
        prepare()
        flops = count_flops(step)
        times = []
        for _ in range(repeats):
            prepare()
            times.append(_seconds(step, device))
        seconds = statistics.median(times)
        return StepCost(resident + working, resident, working, seconds, size * length / seconds, flops)

    train_step = None
    if optimizer is not None:

        def train() -> None:
            for _ in range(accumulation):
                with autocast():
                    value = model(**batch).loss if loss is None else loss()
                value.backward()
            optimizer.step()

        with evaluating(model):  # which puts every module back into its mode
            model.train()
            train_step = cost(train, lambda: optimizer.zero_grad(set_to_none=True))
        optimizer.zero_grad(set_to_none=True)
        optimizer.state.clear()  # inference does not hold it

    inputs: dict[str, Any] = {name: tensor for name, tensor in batch.items() if name != "labels"}
    if decodes:
        inputs |= {"use_cache": False, "logits_to_keep": 1}

    @torch.no_grad()
    def infer() -> None:
        for _ in range(accumulation):
            with autocast():
                model(**inputs)

    cache = None
    with evaluating(model):
        inference = cost(infer, lambda: None)
        if decodes:
            with torch.no_grad(), autocast():
                output = model(batch["input_ids"][:1], use_cache=True, logits_to_keep=1)
            cache = cache_bytes(next(part for part in output.to_tuple() if isinstance(part, Cache)))
    return ModelCost(size, length, train_step, inference, cache)


def resident_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Bytes of weights, buffers and optimizer state; storage that several of them share counts once."""
    tensors = [*model.parameters(), *model.buffers()]
    for state in optimizer.state.values() if optimizer is not None else ():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return storage_bytes(tensors)


def cache_bytes(past_key_values: Any) -> int:
    """
    Bytes a decoding cache holds, over all its layers.

    A layer that reports `nbytes` is believed (it knows its running state); of any other layer the tensors it holds
    are counted.
    """
    total = 0
    for layer in past_key_values.layers:
        own = getattr(layer, "nbytes", None)
        tensors = [value for value in vars(layer).values() if isinstance(value, torch.Tensor)]
        total += storage_bytes(tensors) if own is None else int(own() if callable(own) else own)
    return total


@torch.no_grad()
def state_bytes(variant: EfficientAttention, length: int, like: torch.Tensor | None = None) -> int:
    """
    Bytes that a decoder variant's state holds for one text of `length` tokens: the most after the last token or the one
    before it, since what keeps segments whole holds least where one has just ended. The text has the dtype and device of
    `like`; by default of the variant's parameters, or float32.
    """
    shape, found = variant.host, []
    like = next(variant.parameters(), torch.empty(0)) if like is None else like
    generator = torch.Generator(like.device).manual_seed(0)
    placed = {"dtype": like.dtype, "device": like.device, "generator": generator}
    for n in {max(length - 1, 1), length}:
        query, key, value = (
            torch.randn(1, heads, n, shape.head_dim, **placed)
            for heads in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        )
        hidden = torch.randn(1, n, shape.hidden_size, **placed)
        state, extra = variant.make_state(), {"hidden": hidden} if variant.needs_hidden else {}
        state.update(key, value)
        variant(query, key, value, scaling=shape.head_dim**-0.5, causal=True, state=state, **extra)
        found.append(state.nbytes)
    return max(found)


def storage_bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes behind these tensors; a storage that several share counts once."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr(), tensor.device] = storage.nbytes()
    return sum(storages.values())


def _seconds(fn: Callable[[], Any], device: torch.device | str) -> float:
    place = torch.device(device)

    def wait() -> None:
        if place.type != "cpu":
            torch.get_device_module(place).synchronize()

    wait()
    start = time.perf_counter()
    fn()
    wait()
    return time.perf_counter() - start


def _attention_flops(query, key, value, *_args, out_shape=None, **_kwargs) -> int:
    """Of shapes (B, H, N, D), (B, G, M, D), (B, G, M, E): logits and what they weigh."""
    return 2 * math.prod(query[:3]) * key[2] * (query[3] + value[3])


def _attention_backward_flops(grad, query, key, value, *_args, out_shape=None, **_kwargs) -> int:
    """Logits again, and the gradients of values, weights, queries and keys."""
    return 2 * math.prod(query[:3]) * key[2] * (3 * query[3] + 2 * value[3])


# PyTorch's own counter takes the CPU's fused attention for nothing, and in 2.11 refuses fewer key heads than query heads.
_KINDS = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
_ATTENTION_FLOPS = {
    getattr(torch.ops.aten, f"_scaled_dot_product_{kind}{end}"): count
    for kind in _KINDS
    for end, count in (("", _attention_flops), ("_backward", _attention_backward_flops))
}
