"""Arithmetic that chooses its own dtypes is not to have them chosen again by autocast."""

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
