"""A second derivative is right or refused: kernels that compute one gradient must not pass for constants of the next."""

from __future__ import annotations

import pytest
import torch
from contract import HEADS, KV_HEADS, Subject, expected, run
from torch import Tensor

from hf_efficient_attn import available_variants


def second(function, args: list[Tensor]) -> list[Tensor]:
    first = torch.autograd.grad(function(*args).pow(3).sum(), args[:3], create_graph=True)
    return torch.autograd.grad(sum(x.pow(2).sum() for x in first), args[:3])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
@pytest.mark.parametrize("name", available_variants("attention"))
def test_right_or_refused(name: str, causal: bool, dtype: torch.dtype) -> None:
    subject = Subject(name, causal, name)
    module = subject.build(dtype=dtype, head_dim=16, hidden_size=HEADS * 16)
    shapes = [(2, heads, 37, 16) for heads in (HEADS, KV_HEADS, KV_HEADS)] + [(2, 37, HEADS * 16)]
    args = [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]
    try:
        got = second(lambda *x: run(module, *x), args)
    except RuntimeError as error:
        if any(words in str(error) for words in ("no second derivative", "is not implemented")):
            return
        raise
    want = second(lambda *x: expected(subject, module, *x), args)
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() < 1e-2 * b.norm()
