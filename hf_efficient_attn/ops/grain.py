"""
How much is done at one time. On a CPU as much as stays in its cache; elsewhere more, since each operator has to be started
there, which takes longer than a small one runs, and in a graph that is written down, where each one is a node.
"""

from __future__ import annotations

import torch

STARTED, WRITTEN = 2**22, 2**21  # numbers that are worth an operator where it has to be started, and as a node


def has_price(device: torch.device) -> bool:
    """Whether operators have a price of their own on this device."""
    return device.type != "cpu" or torch.compiler.is_exporting()


def at_once(numbers: int, device: torch.device) -> int:
    """How many numbers exist at one time on this device, for what takes `numbers` of them on a CPU."""
    if not has_price(device):
        return numbers
    return max(numbers, STARTED if device.type != "cpu" else WRITTEN)
