"""What our own forward and backward passes ask of autograd: no autocast inside them, and no derivative of a derivative."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor


def without_autocast(function: Callable) -> Callable:
    """Of an autograd.Function's forward or backward: autocast is off inside, on the device of its first tensor."""

    @wraps(function)
    def run(ctx, *args):
        device = next((x.device.type for x in args if isinstance(x, Tensor)), "cpu")  # no gradient may have arrived
        with torch.autocast(device, enabled=False):
            return function(ctx, *args)

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
