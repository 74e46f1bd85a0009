"""In which precision is attention computed, and what do our own forward and backward passes ask of autograd?"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce, wraps

import torch
from torch import Tensor


def of_one_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """
    The tensors in one dtype. Under autocast, queries and keys that were turned by float32 positions meet values in half
    precision: all get autocast's dtype then, as in PyTorch's attention, but on a CPU, where kernels read float32, the widest.
    """
    kinds, device = {x.dtype for x in tensors}, tensors[0].device.type
    if len(kinds) == 1:
        return tensors
    halve = device != "cpu" and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if halve else reduce(torch.promote_types, kinds)
    return tuple(x.to(dtype) for x in tensors)


@torch.compiler.assume_constant_result
def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on devices that have no other, such as Apple's GPUs."""
    try:
        return torch.zeros((), dtype=torch.float64, device=device).dtype
    except (TypeError, RuntimeError):
        return torch.float32


def without_autocast(function: Callable) -> Callable:
    """Autocast is off inside, on the device of the first tensor; also for an autograd.Function's forward or backward."""

    @wraps(function)
    def run(*args):
        device = next((x.device.type for x in args if isinstance(x, Tensor)), "cpu")  # no gradient may have arrived
        with torch.autocast(device, enabled=False):
            return function(*args)

    return run


def first_order(function: Callable) -> Callable:
    """
    Of an autograd.Function's backward, whose result is not a function of its inputs to autograd. A second derivative would
    lack its share without a word (also with PyTorch's `once_differentiable`, where other paths lead to the same inputs).

    Raises:
        RuntimeError: the gradient is to have a graph of its own (`create_graph=True`).
    """

    @wraps(function)
    def run(ctx, *grads):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "efficient attention has no second derivative: call backward() and autograd.grad() without "
                "create_graph=True, or use dense attention there."
            )
        return function(ctx, *grads)

    return run
