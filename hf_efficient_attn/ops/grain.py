"""
How much is done at one time. On a CPU as much as stays in its cache; elsewhere more, since each operator has to be started
there, which takes longer than a small one runs.
"""

from __future__ import annotations

import torch

WORTH = 2**22  # numbers that are worth an operator of their own where operators have to be started


def at_once(numbers: int, device: torch.device) -> int:
    """How many numbers exist at one time on this device, for what takes `numbers` of them on a CPU."""
    return numbers if device.type == "cpu" else max(numbers, WORTH)
