"""long_short: every token is read once, exactly or in its segment's summaries; the kernel is the joint softmax."""

import pytest
import torch

from hf_efficient_attn import kernels
from hf_efficient_attn.registry import build
from hf_efficient_attn.variant import HostShape
from hf_efficient_attn.variants.long_short import LongShortConfig


def make(causal: bool, dim: int = 8, **fields):
    module = build(LongShortConfig(**fields), HostShape(4, 2, dim, 4 * dim, causal))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return module


def inputs(length: int, dim: int = 8) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(3, heads, length, dim, generator=g).requires_grad_() for heads in (4, 2, 2)]


@pytest.mark.parametrize("causal", [False, True])
def test_no_token_is_lost_and_the_window_is_exact(causal):
    """What a value adds to an output: something for every token seen; for one of a summarised segment, its share of a slot."""
    module, (query, key, value) = make(causal, window=6, segment_size=4, rank=2, num_sinks=0).double(), inputs(30)
    query, key, value = query.double(), key.double(), value.detach().double().requires_grad_()
    output = module(query, key, value, scaling=0.4, causal=causal)
    for t in (0, 7, 17, 29):
        (weights,) = torch.autograd.grad(output[0, 0, t, 0], value, retain_graph=True)
        weights = weights[0, 0, :, 0]
        seen = t + 1 if causal else 30
        assert (weights[:seen] > 0).all() and (weights[seen:] == 0).all()
        torch.testing.assert_close(weights.sum(), weights.new_tensor(1.0))
        begin = max((t - 5) // 4 * 4, 0)
        near = torch.arange(begin, t + 1)
        ratios = weights[near] / torch.exp(0.4 * key[0, 0, near] @ query[0, 0, t])
        torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios))  # exact: weights as in dense attention
        if begin:
            far = torch.arange(begin)
            ratios = weights[far] / torch.exp(0.4 * key[0, 0, far] @ query[0, 0, t])
            assert ratios.max() > 1.5 * ratios.min()


@pytest.mark.skipif(kernels.load("ranges") is None, reason="no C compiler here")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("dim", "fields"),
    [
        (64, {"window": 64, "segment_size": 32, "rank": 3}),
        (16, {"window": 50, "segment_size": 7, "rank": 2, "dual_norm": True}),
        (32, {"window": 1, "segment_size": 70, "rank": 5, "num_sinks": 0}),
    ],
)
def test_the_kernel_is_the_joint_softmax(causal, padded, dim, fields):
    length = 301

    def results():
        module, args = make(causal, dim, **fields), inputs(length, dim)
        padding = torch.arange(length) >= torch.tensor([0, 40, length - 1])[:, None] if padded else None
        output = module(*args, padding=padding, scaling=dim**-0.5, causal=causal)
        weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
        return [output.detach(), *torch.autograd.grad((output * weight).sum(), [*args, *module.parameters()])]

    ours = results()
    with kernels.off():
        theirs = results()
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, atol=5e-5, rtol=1e-4)
        assert want.abs().max() > 0.1


def test_dual_norm_starts_as_a_layer_norm():
    _, key, value = inputs(20)
    plain, normed = (
        make(True, window=4, segment_size=4),
        build(LongShortConfig(window=4, segment_size=4, dual_norm=True), HostShape(4, 2, 8, 32, True)),
    )
    key_norm, value_norm = normed.norm("near_norm", key, value)
    torch.testing.assert_close(key_norm, torch.nn.functional.layer_norm(key, (8,)))
    torch.testing.assert_close(value_norm, torch.nn.functional.layer_norm(value, (8,)))
    assert plain.norm("near_norm", key, value)[0] is key
