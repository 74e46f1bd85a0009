"""infini: what its memory recalls, when it is empty, what the delta rule writes, and that it stays finite and small."""

from __future__ import annotations

import pytest
import torch

from hf_efficient_attn.ops import memory
from hf_efficient_attn.registry import build
from hf_efficient_attn.variant import HostShape
from hf_efficient_attn.variants.infini import InfiniConfig


def make(causal=True, gate=-4.0, dtype=torch.float64, **fields):
    module = build(InfiniConfig(**{"segment_size": 4, "num_sinks": 0, **fields}), HostShape(4, 2, 8, 32, causal))
    with torch.no_grad():
        module.gate.fill_(gate)
    return module.to(dtype)


def run(module, args, **kwargs):
    return module(*args, scaling=0.4, causal=module.host.causal, **kwargs)


def inputs(length, dtype=torch.float64, std=1.0):
    return [std * torch.randn(2, heads, length, 8, dtype=dtype) for heads in (4, 2, 2)]


def decode(module, args, splits):
    state, outputs = module.make_state(), []
    for part in zip(*(x.split(splits, 2) for x in args), strict=True):
        state.update(part[1], part[2])
        outputs.append(run(module, part, state=state))
    return torch.cat(outputs, 2), state


@pytest.mark.parametrize("causal", [True, False])
def test_the_gate_has_no_say_while_the_memory_is_empty(causal):
    args = inputs(9)
    closed, open_ = run(make(causal), args), run(make(causal, gate=3.0), args)
    differ = (closed - open_).abs().amax((0, 1, 3)) > 1e-3
    assert differ.tolist() == ([False] * 4 + [True] * 5 if causal else [True] * 9)
    short = [x[:, :, :4] for x in args]
    torch.testing.assert_close(run(make(causal), short), run(make(causal, gate=3.0), short), atol=0, rtol=0)


def test_it_starts_as_its_window_but_for_a_fiftieth():
    module, args = make(segment_size=5, num_sinks=2), inputs(23)
    window = run(build(module.config.window_only(True), module.host), args)
    apart = (run(module, args) - window).abs()
    assert apart.max() > 1e-3
    assert apart.max() < 0.02 * (args[2].abs().max() * 2)


def test_an_encoder_s_memory_leaves_the_own_segment_out():
    args = inputs(11)
    value = args[2].requires_grad_()
    output = run(make(causal=False, gate=40.0), args)  # g = 1: the memory alone
    seen = torch.autograd.grad(output[0, 0, 5].sum(), value)[0][0, 0].abs().sum(-1) > 0
    assert seen.tolist() == [True] * 4 + [False] * 4 + [True] * 3


def one_hot_keys(order):
    """Keys whose features are nearly orthogonal: 30 in one coordinate, -30 in the others."""
    key = torch.full((2, 2, len(order), 8), -30.0, dtype=torch.float64)
    key[:, :, torch.arange(len(order)), torch.tensor(order)] = 30.0
    return key


def test_the_memory_recalls_and_the_delta_rule_replaces_what_changed():
    """Segments of one token: key 0 is given twice, with other values, before it is asked for."""
    key = one_hot_keys([0, 1, 0, 2, 0])
    query, value = key.repeat_interleave(2, 1), torch.randn(2, 2, 5, 8, dtype=torch.float64)
    recalled = {
        rule: run(make(gate=40.0, segment_size=1, rule=rule), (query, key, value)) for rule in ("plain", "delta")
    }
    first, latest = (value[:, :, j].repeat_interleave(2, 1) for j in (0, 2))
    torch.testing.assert_close(recalled["plain"][:, :, 4], (first + latest) / 2, atol=1e-6, rtol=0)
    # z counts the key twice, A holds first + (latest - first)
    torch.testing.assert_close(recalled["delta"][:, :, 4], latest / 2, atol=1e-6, rtol=0)
    for rule in recalled:
        torch.testing.assert_close(recalled[rule][:, :, 2], first, atol=1e-6, rtol=0)


def test_the_delta_rule_writes_nothing_that_the_memory_knows():
    key, value = (torch.randn(2, 2, 1, 8, dtype=torch.float64).repeat(1, 1, 2, 1) for _ in range(2))
    for rule, grows in (("plain", 2.0), ("delta", 1.0)):
        _, state = decode(make(segment_size=1, rule=rule), (key.repeat_interleave(2, 1), key, value), (2,))
        _, once = decode(make(segment_size=1, rule=rule), (key.repeat_interleave(2, 1), key, value), (1, 1))
        after = state.entries["memory"][..., :-1]
        phi = torch.nn.functional.elu(key[:, :, :1]) + 1
        torch.testing.assert_close(after, grows * phi.mT @ value[:, :, :1], atol=1e-10, rtol=0)
        torch.testing.assert_close(once.entries["memory"], state.entries["memory"], atol=1e-10, rtol=0)


@pytest.mark.parametrize("rule", ["plain", "delta"])
def test_calls_of_any_length_agree_and_the_state_stays_small(rule):
    module, args = make(gate=0.0, segment_size=16, rule=rule, num_sinks=4), inputs(150)
    full, sizes = run(module, args), []
    for splits in ((100, 50), (7, 96, 1, 46), (32, *[1] * 118)):
        parts, state = decode(module, args, splits)
        torch.testing.assert_close(parts, full, atol=1e-10, rtol=0)
        sizes.append(state.nbytes)
    _, early = decode(module, [x[:, :, :38] for x in args], (38,))
    assert max(sizes) == early.nbytes > 0


@pytest.mark.parametrize("rule", ["plain", "delta"])
def test_large_inputs_stay_finite(rule):
    args = [x.requires_grad_() for x in inputs(40, torch.float32, std=100.0)]
    output = run(make(gate=0.0, rule=rule, dtype=torch.float32), args)
    output.square().mean().backward()
    assert torch.isfinite(output).all() and all(torch.isfinite(x.grad).all() for x in args)
    assert output.abs().max() > 1


def test_an_encoder_has_no_delta_rule():
    with pytest.raises(ValueError, match="rule = 'plain' for encoders"):
        make(causal=False, rule="delta")


@pytest.mark.parametrize("causal", [True, False])
def test_some_segments_at_a_time(causal, monkeypatch):
    """Forward and backward as at once, the last segment short, rows of two lengths."""
    module, padding = make(causal, gate=0.5), torch.arange(30) < torch.tensor([30, 17])[:, None]
    args, results, spans = [x.requires_grad_() for x in inputs(30)], [], []
    for rows in (2**14, 40):
        monkeypatch.setattr(memory, "ROWS", rows)
        spans.append(len(list(memory._spans(args[0], 4))))
        output = run(module, args, padding=padding)
        results.append([output, *torch.autograd.grad(output.square().sum(), [*args, module.gate])])
    assert spans == [1, 8]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)
        assert one.abs().max() > 0.01
