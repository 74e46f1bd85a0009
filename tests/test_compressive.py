"""compressive: XLNet's attention over compressed and plain memories, what is cut between calls, and how slots are made."""

from __future__ import annotations

import pytest
import torch
from contract import decode
from naive import naive_attention
from transformers.models.xlnet.modeling_xlnet import XLNetConfig, XLNetRelativeAttention

from hf_efficient_attn.registry import build
from hf_efficient_attn.variant import HostShape
from hf_efficient_attn.variants.compressive import CompressiveConfig

SCALING = 8**-0.5


def make(causal=True, groups=2, **fields):
    fields = {
        "segment_size": 4,
        "memory_size": 4,
        "compressed_size": 3,
        "compression_rate": 2,
        "num_sinks": 0,
        **fields,
    }
    return build(CompressiveConfig(**fields), HostShape(4, groups, 8, 32, causal)).double()


def run(module, args, **kwargs):
    return module(*args, scaling=SCALING, causal=module.host.causal, **kwargs)


def inputs(length, groups=2):
    return [torch.randn(2, heads, length, 8, dtype=torch.float64) for heads in (4, groups, groups)]


def xlnet_layer():
    """An attention layer of XLNet without its relative positions: softmax attention over memories and new tokens."""
    layer = XLNetRelativeAttention(XLNetConfig(d_model=32, n_head=4, dropout=0.0)).double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.3)
        for parameter in (layer.r, layer.r_w_bias, layer.r_r_bias, layer.r_s_bias, layer.seg_embed):
            parameter.zero_()
    return layer


def project(x, weight):
    """x (N, B, E), weight (E, H, D) -> (B, H, N, D), as XLNet does it."""
    return torch.einsum("nbe,ehd->bhnd", x, weight)


@torch.no_grad()
def test_it_is_xlnet_with_compressed_hidden_states_before_its_memory():
    """Linear projections make the mean of keys the key of a mean: the paper's compressed memory goes into `mems`."""
    layer, module, hidden = xlnet_layer(), make(groups=4), torch.randn(27, 2, 32, dtype=torch.float64)
    query, key, value = (project(hidden, weight) for weight in (layer.q, layer.k, layer.v))
    output, without = run(module, (query, key, value)), run(make(groups=4, compressed_size=1), (query, key, value))
    for begin in range(0, 27, 4):
        new, before = hidden[begin : begin + 4], max(begin - 4, 0)
        means = hidden[:before].unflatten(0, (-1, 2)).mean(1)[-3:]
        mems = torch.cat([means, hidden[max(begin - 4, 0) : begin]])
        n, m = len(new), len(mems)
        future = torch.arange(m + n) > m + torch.arange(n)[:, None]
        mask = future.double()[:, :, None, None].expand(-1, -1, 2, 4)
        positions = torch.zeros(m + 2 * n, 2, 32, dtype=torch.float64)
        keys = torch.cat([mems, new])
        got = layer.rel_attn_core(
            project_first(new, layer.q), project_first(keys, layer.k), project_first(keys, layer.v),
            project_first(positions, layer.r), attn_mask=mask,
        )  # fmt: skip
        want = got.permute(1, 2, 0, 3)
        torch.testing.assert_close(output[:, :, begin : begin + 4], want, atol=1e-10, rtol=0)
        if begin >= 12:
            assert (without[:, :, begin : begin + 4] - want).abs().max() > 1e-3


def project_first(x, weight):
    """x (N, B, E), weight (E, H, D) -> (N, B, H, D)."""
    return torch.einsum("nbe,ehd->nbhd", x, weight)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("compression", ["mean", "max", "conv"])
def test_long_rows_of_default_proportions_are_the_formula(compression, causal):
    """Whole windows of slots, without a mask, for queries far from the begin, in one call and in several."""
    sizes = {"segment_size": 16, "memory_size": 16, "compressed_size": 8, "compression_rate": 4, "num_sinks": 5}
    module, args = make(causal, compression=compression, **sizes), inputs(150)
    if causal:
        with torch.no_grad():
            module.slot_bias += torch.randn(4)
    want = naive_attention("compressive", *args, config=module.config, scaling=SCALING, causal=causal, module=module)
    torch.testing.assert_close(run(module, args), want, atol=1e-10, rtol=0)
    if causal:
        for splits in ((100, 50), (7, 96, 1, 46), (120, *[1] * 30)):
            torch.testing.assert_close(decode(module, args, splits, scaling=SCALING), want, atol=1e-10, rtol=0)


def test_a_convolution_starts_as_the_mean():
    args = inputs(29)
    mean, conv = run(make(num_sinks=3), args), run(make(num_sinks=3, compression="conv"), args)
    torch.testing.assert_close(conv, mean, atol=1e-12, rtol=0)
    assert (run(make(num_sinks=3, compression="max"), args) - mean).abs().max() > 1e-3


def test_gradients_stop_between_calls_and_reach_slots_within_one():
    module = make()
    args = [x.requires_grad_() for x in inputs(24)]
    run(module, args)[:, :, 20:].sum().backward()
    assert args[1].grad[:, :, 10:16].abs().amax((0, 1, 3)).min() > 0  # three slots of two tokens before the memory
    assert args[1].grad[:, :, :10].abs().max() == 0
    for x in args:
        x.grad = None
    state = module.make_state()
    for part in zip(*(x.split((18, 6), 2) for x in args), strict=True):
        state.update(part[1], part[2])
        output = run(module, part, state=state)
    output.sum().backward()
    assert args[1].grad[:, :, :18].abs().max() == 0 and args[1].grad[:, :, 18:].abs().max() > 0


def test_sizes_that_cut_a_slot_are_refused():
    for field in ("segment_size", "memory_size"):
        with pytest.raises(ValueError, match=f"{field} = 6 must be a multiple of compression_rate = 4"):
            CompressiveConfig(**{"segment_size": 8, "memory_size": 8, "compression_rate": 4, field: 6})
    assert CompressiveConfig(segment_size=8, memory_size=4, compression_rate=4).memory_size == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compression", ["mean", "conv"])
def test_slots_are_rounded_once(compression, dtype):
    """Of keys that share a large part, as where a model gives them a bias; their sum would be beyond float16."""
    config = CompressiveConfig(segment_size=99, memory_size=99, compression_rate=99, compression=compression)
    module, g = build(config, HostShape(4, 2, 8, 32, True)), torch.Generator().manual_seed(0)
    key = torch.randn(2, 2, 3, 99, 8, generator=g).add(700).to(dtype)
    real = torch.rand(2, 3, 99, generator=g) < 0.7
    for given in (real, None):
        got, want = (module.summarise(x, x, given)[0] for x in (key, key.float()))
        torch.testing.assert_close(got, want.to(dtype), rtol=torch.finfo(dtype).eps / 2, atol=0)
