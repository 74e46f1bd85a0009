"""Numbers drawn from a seed, the same whatever dtype and device tensors have by default, as they do while a model is loaded."""

from __future__ import annotations

import torch
from torch import Tensor


def source(seed: int, layer: int, number: int = 0) -> torch.Generator:
    """What a layer's numbers are drawn from; `number` counts its draws."""
    return torch.Generator().manual_seed(seed + 1_000_003 * layer + 1_000_000_007 * number)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal, float32, on the CPU."""
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
