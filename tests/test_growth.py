"""What a variant of default sizes costs at 16,384 tokens over what it costs at 8,192, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from hf_efficient_attn import HostShape, available_variants, measuring
from hf_efficient_attn.registry import build, get_info

SHORT, LONG = 8192, 16384
HEADS, DIM = 2, 16


def step(function, length: int):
    """One call of function(query, key, value, hidden) forward and backward; its gradients are let go."""
    tensors = [torch.randn(1, HEADS, length, DIM, requires_grad=True) for _ in range(3)]
    hidden = torch.randn(1, length, HEADS * DIM)

    def run() -> None:
        function(*tensors, hidden).sum().backward()
        for x in tensors:
            x.grad = None

    return run


def growth(function, lengths=(LONG, SHORT)) -> tuple[float, float]:
    """Peak bytes and FLOPs at the first length over those at the second."""
    runs = [step(function, length) for length in lengths]
    peaks = [measuring.peak_memory(run) for run in runs]
    flops = [measuring.count_flops(run) for run in runs]
    return peaks[0] / peaks[1], flops[0] / flops[1]


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
@pytest.mark.parametrize("name", available_variants("attention"))
def test_memory_is_linear_and_time_as_documented(name: str, causal: bool) -> None:
    info, host = get_info(name), HostShape(HEADS, HEADS, DIM, HEADS * DIM, causal)
    sizes = {"max_length": LONG} if "max_length" in info.config_class.options() else {}
    module = build(info.config_class(**sizes), host).eval()

    def attend(query, key, value, hidden):
        return module(query, key, value, scaling=DIM**-0.5, causal=causal, hidden=hidden)

    peak, flops = growth(attend)
    assert 1.0 < peak < 2.3
    assert 1.0 < flops < (2.3 if type(module).linear_cost else 4.2)


@pytest.mark.slow
def test_the_measure_sees_a_square() -> None:
    def eager(query, key, value, hidden):
        return (query @ key.transpose(2, 3)).softmax(-1) @ value

    peak, flops = growth(eager, (2048, 1024))
    assert peak > 3.5 and flops > 3.5

    def fused(query, key, value, hidden):
        return scaled_dot_product_attention(query, key, value)

    peak, flops = growth(fused, (2048, 1024))
    assert peak < 2.3 and flops > 3.5
