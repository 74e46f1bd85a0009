"""nystrom: two independent implementations agree; its decoder's matrix solves what it says, and comes near dense attention."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from hf_efficient_attn import kernels
from hf_efficient_attn.registry import build
from hf_efficient_attn.variant import HostShape
from hf_efficient_attn.variants.nystrom import NystromConfig, _solve_by_iteration


def make(causal: bool, heads: int = 1, kv_heads: int = 1, dim: int = 16, **fields):
    return build(NystromConfig(**fields), HostShape(heads, kv_heads, dim, heads * dim, causal))


def inputs(length: int, heads: int = 1, kv_heads: int = 1, dim: int = 16, batch: int = 1, scale: float = 1.0):
    g = torch.Generator().manual_seed(0)
    shapes = [(batch, h, length, dim) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=g).mul_(scale).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("convolved", [False, True])
@pytest.mark.parametrize("iterations_differ", [False, True])
def test_transformers_nystromformer(convolved, iterations_differ):
    """One head and one row, since there the iteration starts from the largest norm in the batch, and here from each its own."""
    modeling = pytest.importorskip("transformers.models.nystromformer.modeling_nystromformer")
    config = modeling.NystromformerConfig(
        hidden_size=16, num_attention_heads=1, num_landmarks=8, segment_means_seq_len=64, conv_kernel_size=5,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    reference, hidden = modeling.NystromformerSelfAttention(config).eval(), torch.randn(1, 64, 16)
    module = make(
        False, num_landmarks=8, conv_kernel=5 if convolved else None, iterations=5 if iterations_differ else 6
    )
    with torch.no_grad():
        if convolved:
            module.conv.copy_(reference.conv.weight[:, 0, :, 0])
        else:
            reference.conv.weight.zero_()
    query, key, value = (getattr(reference, name)(hidden)[:, None] for name in ("query", "key", "value"))
    got = module(query, key, value, scaling=0.25, causal=False)
    error = (got - reference(hidden)[0][:, None]).abs().max()
    assert error > 1e-3 if iterations_differ else error < 1e-5


def test_nystrom_attention():
    package = pytest.importorskip("nystrom_attention")
    reference = package.NystromAttention(
        dim=16, dim_head=16, heads=1, num_landmarks=8, pinv_iterations=6, residual=True, residual_conv_kernel=5
    ).eval()
    hidden = torch.randn(1, 64, 16)
    query, key, value = reference.to_qkv(hidden)[:, None].chunk(3, -1)
    module = make(False, num_landmarks=8, conv_kernel=5)
    with torch.no_grad():
        module.conv.copy_(reference.res_conv.weight[:, 0, :, 0])
    got = reference.to_out(module(query, key, value, scaling=0.25, causal=False)[:, 0])
    torch.testing.assert_close(got, reference(hidden), atol=1e-5, rtol=0)
    other = make(False, num_landmarks=4, conv_kernel=5)
    assert (reference.to_out(other(query, key, value, scaling=0.25, causal=False)[:, 0]) - got).abs().max() > 1e-3


def test_the_iteration_comes_to_the_inverse():
    a = torch.randn(2, 3, 12, 12, dtype=torch.float64).mul(2).softmax(-1)
    x = torch.randn(2, 3, 12, 5, dtype=torch.float64)
    errors = [(a @ _solve_by_iteration(a, x, n) - x).abs().max() for n in (2, 40)]
    assert errors[1] < 1e-6 < 1e-1 < errors[0]


def test_a_decoder_reads_uniform_segments_as_they_are():
    """Where all of a segment's keys are alike, and its queries, landmarks lose nothing: the output is dense attention's."""
    g = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, 6, 16, generator=g, dtype=torch.float64).repeat_interleave(8, 2) for _ in range(2))
    value = torch.randn(1, 2, 48, 16, generator=g, dtype=torch.float64)
    module = make(True, 2, 2, segment_size=8, exact_segments=0, num_sinks=0).double()
    for_all = scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3)
    torch.testing.assert_close(module(query, key, value, scaling=0.3, causal=True), for_all, atol=1e-9, rtol=0)
    key = key + 0.5 * torch.randn(key.shape, generator=g, dtype=torch.float64)
    for_all = scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3)
    assert (module(query, key, value, scaling=0.3, causal=True) - for_all).abs().max() > 1e-2


@pytest.mark.parametrize("causal", [False, True])
def test_a_matrix_near_singular_stays_finite(causal):
    module, (query, key, value) = make(causal, num_landmarks=8, segment_size=8), inputs(200, scale=30.0)
    output = module(query, key, value, scaling=1.0, causal=causal)
    output.sum().backward()
    assert all(torch.isfinite(x).all() for x in (output, query.grad, key.grad, value.grad))


@pytest.mark.parametrize("segment_size", [1, 8])
def test_values_of_landmarks_are_bounded(segment_size):
    """Of large logits, where landmarks attend to others more than to themselves; without the ridge they reach 1e5 and more."""
    module, (query, key, value) = make(True, segment_size=segment_size, exact_segments=0), inputs(200, scale=3.0)
    output = module(query, key, value, scaling=0.25, causal=True)
    assert 0.1 * value.abs().max() < output.abs().max() <= 3 * value.abs().max()


@pytest.mark.skipif(kernels.load("ranges") is None, reason="no C compiler here")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("fields", [{"segment_size": 64}, {"segment_size": 20, "num_sinks": 45, "exact_segments": 0}])
def test_the_kernel_is_the_joint_softmax(padded, fields):
    def results():
        module, args = make(True, 6, 2, 32, **fields), inputs(300, 6, 2, 32, batch=3)
        torch.nn.init.constant_(module.slot_bias, 0.3)
        padding = torch.arange(300) >= torch.tensor([0, 40, 299])[:, None] if padded else None
        output = module(*args, padding=padding, scaling=0.2, causal=True)
        weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
        return [output.detach(), *torch.autograd.grad((output * weight).sum(), [*args, module.slot_bias])]

    ours = results()
    with kernels.off():
        theirs = results()
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        assert want.abs().max() > 0.1


def test_half_precision_keeps_what_an_inverse_makes_large():
    """The landmarks' values, of both signs, and keys that share a large part."""
    g = torch.Generator().manual_seed(0)
    query, key, value = inputs(70, 4, 2, 32)
    half = [x.bfloat16() for x in (query, key + 40 * torch.randn(1, 2, 1, 32, generator=g), value)]
    module = make(False, 4, 2, 32, num_landmarks=4)
    want = module(*(x.float() for x in half), scaling=32**-0.5, causal=False)
    assert (module(*half, scaling=32**-0.5, causal=False) - want).abs().max() < 2e-2 * want.abs().max()
