"""funnel: Transformers' own Funnel layer, long rows in calls of any length, and what a step of the decoder reads."""

from __future__ import annotations

import pytest
import torch
from contract import decode
from naive import naive_attention
from transformers import FunnelConfig as ReferenceConfig
from transformers.models.funnel.modeling_funnel import FunnelAttentionStructure, FunnelRelMultiheadAttention

from hf_efficient_attn import measuring
from hf_efficient_attn.registry import build
from hf_efficient_attn.variant import HostShape
from hf_efficient_attn.variants import funnel
from hf_efficient_attn.variants.funnel import FunnelConfig

SCALING = 8**-0.5


def make(causal, pooling=4, groups=2):
    return build(FunnelConfig(pooling=pooling), HostShape(4, groups, 8, 32, causal)).double()


def run(module, args, **kwargs):
    return module(*args, scaling=SCALING, causal=module.host.causal, **kwargs)


def inputs(length, groups=2):
    return [torch.randn(2, heads, length, 8, dtype=torch.float64) for heads in (4, groups, groups)]


@torch.no_grad()
def test_an_encoder_is_transformers_funnel_without_its_positions():
    """Pooled hidden states attend to all: linear projections make the mean of queries the query of a mean."""
    config = ReferenceConfig(
        d_model=32,
        n_head=4,
        d_head=8,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        separate_cls=False,
        truncate_seq=False,
    )
    layer, structure = FunnelRelMultiheadAttention(config, 1).eval(), FunnelAttentionStructure(config)
    hidden = torch.randn(2, 22, 32)
    for parameter in layer.parameters():
        parameter.normal_(std=0.3)
    for parameter in (layer.r_kernel, layer.r_w_bias, layer.r_r_bias, layer.r_s_bias, layer.seg_embed):
        parameter.zero_()
    given = structure.init_attention_inputs(hidden, None, torch.zeros(2, 22, dtype=torch.long))
    pooled, given = structure.pre_attention_pooling(hidden, given)
    _, weights = layer(pooled, hidden, hidden, given, output_attentions=True)
    query, key, value = (
        x.unflatten(2, (4, 8)).transpose(1, 2)
        for x in (layer.q_head(hidden), layer.k_head(hidden), layer.v_head(hidden))
    )
    got = run(make(False, 2, groups=4), (query, key, value))
    torch.testing.assert_close(got[:, :, ::2], weights @ value, atol=1e-5, rtol=0)
    torch.testing.assert_close(got[:, :, 1::2], got[:, :, ::2], atol=0, rtol=0)
    dense = run(make(False, 1, groups=4), (query, key, value))
    assert (dense - got).abs().max() > 1e-3


@pytest.mark.parametrize("pooling", [1, 2])
def test_many_tiles_are_the_formula_in_calls_of_any_length(pooling, monkeypatch):
    """More stretches than one tile has, and calls that end inside a stretch."""
    monkeypatch.setattr(funnel, "TILE", 8)
    module, args = make(True, pooling), [x.requires_grad_() for x in inputs(70)]
    output, weight = run(module, args), torch.randn(2, 4, 70, 8, dtype=torch.float64)
    want = naive_attention("funnel", *args, config=module.config, scaling=SCALING, causal=True)
    torch.testing.assert_close(output, want, atol=1e-10, rtol=0)
    ours, theirs = (torch.autograd.grad((x * weight).sum(), args, retain_graph=True) for x in (output, want))
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-8, rtol=0)
    with torch.no_grad():
        for splits in ((41, 29), (7, 60, 1, 1, 1)):
            torch.testing.assert_close(decode(module, args, splits, scaling=SCALING), want, atol=1e-10, rtol=0)


def test_a_step_inside_a_stretch_reads_the_stretch_alone():
    module, args = make(True), inputs(203)
    state, flops = module.make_state(), []

    def step(begin, end):
        part = [x[:, :, begin:end] for x in args]
        state.update(part[1], part[2])
        run(module, part, state=state)

    step(0, 200)
    for t in (200, 201, 202):
        flops.append(measuring.count_flops(lambda t=t: step(t, t + 1)))
    assert flops[0] > 10 * flops[1] and flops[1] == flops[2] > 0


def test_half_precision_keeps_what_tells_keys_apart():
    """Keys that share a large part, as where a model gives them a bias."""
    args = [x + shared for x, shared in zip(inputs(40), (2, 90, 0), strict=True)]
    half = [x.bfloat16() for x in args]
    want = run(make(True).float(), [x.float() for x in half])
    assert (run(make(True).bfloat16(), half) - want).abs().max() < 2e-2


def test_a_mean_of_many_queries_in_half_precision():
    """Whose sum float16 could not hold."""
    query, key, value = inputs(200)
    half = [x.half() for x in (query + 700, key / 100, value)]
    want = run(make(False, pooling=200).float(), [x.float() for x in half])
    assert (run(make(False, pooling=200).half(), half) - want).abs().max() < 1e-2
