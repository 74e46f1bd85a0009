"""cosformer: its length is fixed, nearer tokens count more, and nothing in common gives zero."""

import pytest
import torch

from hf_efficient_attn.registry import build
from hf_efficient_attn.variant import HostShape
from hf_efficient_attn.variants.cosformer import CosformerAttention, CosformerConfig


def host(causal, **fields):
    return HostShape(2, 2, 8, 16, causal, **fields)


def make(causal, max_length=20):
    return build(CosformerConfig(max_length=max_length), host(causal)).double()


def test_more_than_max_length_raises():
    args = [torch.randn(1, 2, 21, 8, dtype=torch.float64) for _ in range(3)]
    for causal in (False, True):
        with pytest.raises(ValueError, match=r"21 tokens.*max_length = 20"):
            make(causal)(*args, scaling=1.0, causal=causal)
    module = make(True)
    state = module.make_state()
    for size in (15, 5, 1):
        part = [x[:, :, :size] for x in args]
        state.update(part[1], part[2])
        if size == 1:
            with pytest.raises(ValueError, match=r"21 tokens"):
                module(*part, scaling=1.0, causal=True, state=state)
        else:
            assert module(*part, scaling=1.0, causal=True, state=state).shape == part[0].shape
    padding = torch.arange(21) < 20  # padding does not count
    assert make(False)(*args, padding=padding[None], scaling=1.0, causal=False).shape == args[0].shape


def test_max_length_is_what_the_model_can_read():
    lengths = [
        CosformerAttention.resolve(CosformerConfig(), host(True, max_positions=p)).max_length for p in (77, None)
    ]
    assert lengths == [77, 4096]


def test_nearer_tokens_count_more():
    query = key = torch.ones(1, 2, 20, 8, dtype=torch.float64)
    value = torch.eye(20, 8, dtype=torch.float64).expand(1, 2, -1, -1)  # what token 19 takes from tokens 0..7
    weights = make(True)(query, key, value, scaling=1.0, causal=True)[0, 0, 19]
    distance = 19 - torch.arange(8, dtype=torch.float64)
    want = torch.cos(torch.pi / 2 * distance / 20)
    torch.testing.assert_close(weights / weights[7], want / want[7], atol=1e-12, rtol=0)
    assert (weights.diff() > 0.004).all()


@pytest.mark.parametrize("causal", [False, True])
def test_nothing_in_common_gives_zero(causal):
    args = [torch.rand(1, 2, 9, 8, dtype=torch.float64) for _ in range(3)]
    args[0][:, :, 4] *= -1
    args[0].requires_grad_()
    output = make(causal)(*args, scaling=1.0, causal=causal)
    assert (output[:, :, 4] == 0).all() and (output[:, :, 3] != 0).all()
    output.sum().backward()
    assert torch.isfinite(args[0].grad).all() and (args[0].grad[:, :, 3] != 0).any()
