"""Local patterns where the contract's tiny settings do not reach: dilations, odd memories, many sinks, tiles of all sizes."""

import pytest
import torch
from contract import HEAD_DIM, HEADS, KV_HEADS, Subject, decode, inputs, run
from naive import naive_attention

from hf_efficient_attn.ops import exact, joint, local
from hf_efficient_attn.variants.block import BlockConfig
from hf_efficient_attn.variants.flash import FlashConfig
from hf_efficient_attn.variants.sliding_window import SlidingWindowConfig
from hf_efficient_attn.variants.transformer_xl import TransformerXLConfig

CONFIGS = [
    BlockConfig(block_size=3, num_sinks=7),
    BlockConfig(block_size=1, num_sinks=0),
    BlockConfig(block_size=4, global_tokens=1),
    BlockConfig(block_size=3, global_tokens=8),
    SlidingWindowConfig(window=1, num_sinks=3),
    SlidingWindowConfig(window=3, num_sinks=6, global_tokens=9),
    SlidingWindowConfig(window=30, global_tokens=2),
    SlidingWindowConfig(window=4, dilation=3, num_sinks=5, global_tokens=5),
    SlidingWindowConfig(window=3, dilation=[1, 4], num_sinks=2, global_tokens=2),
    SlidingWindowConfig(window=2, dilation=[3, 3], num_sinks=0),
    TransformerXLConfig(segment_size=6, memory_size=6, num_sinks=8),
    TransformerXLConfig(segment_size=4, memory_size=9, num_sinks=0),
    TransformerXLConfig(segment_size=7, memory_size=0, num_sinks=3),
    TransformerXLConfig(segment_size=4, memory_size=2, global_tokens=1),
    TransformerXLConfig(segment_size=3, memory_size=5, global_tokens=7),
    TransformerXLConfig(segment_size=20, memory_size=3, global_tokens=24),
]


def subject(config, causal):
    return Subject(config.name, causal, config.name)


@pytest.fixture(autouse=True)
def tiles_of_a_few_tokens(monkeypatch):
    monkeypatch.setattr(local, "TILE", (2, 4))
    monkeypatch.setattr(joint, "CHUNK", 3)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_equals_its_formula_forward_backward_and_decoding(config, causal, fused, monkeypatch):
    if not fused:
        monkeypatch.setattr(joint, "_fused", lambda query, dropout: False)
        monkeypatch.setattr(joint, "AREA", 8)
    module = subject(config, causal).build(config)
    for length in (1, 25):
        query, key, value, _ = (x.requires_grad_() for x in inputs(3, length))
        padding = torch.rand(3, length) > 0.2
        padding[0] = True
        got = run(module, query, key, value, padding=padding)
        want = naive_attention(
            config.name, query, key, value, padding, config=config, scaling=0.4, causal=causal, module=module
        )
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
        weight = torch.randn_like(got)
        grads = [torch.autograd.grad((x * weight).sum(), (query, key, value)) for x in (got, want)]
        for ours, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=0)
        assert theirs.abs().max() > 1e-3
        if not causal:
            continue
        uneven = [length - 9, 8, 1] if length > 9 else [length]
        for splits in ([1] * length, [length // 2, length - length // 2], uneven):
            got = decode(module, (query, key, value), splits, padding)
            torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def test_gradients_stop_between_calls_of_transformer_xl_and_not_inside_one():
    config = TransformerXLConfig(segment_size=4, memory_size=8)
    module = subject(config, True).build(config)
    query, key, value, _ = (x.requires_grad_() for x in inputs(1, 12))

    def gradient_of_last_four(calls):
        state, begin = module.make_state(), 0
        for end in calls:
            part = [x[:, :, begin:end] for x in (query, key, value)]
            state.update(*part[1:])
            output, begin = run(module, *part, state=state), end
        return torch.autograd.grad(output[:, :, -4:].sum(), value)[0].abs().sum((0, 1, 3))

    assert (gradient_of_last_four([12]) > 0).all()
    apart = gradient_of_last_four([8, 12])
    assert (apart[:8] == 0).all() and (apart[8:] > 0).all()


def test_a_dilated_ring_holds_the_window_and_no_more():
    config = SlidingWindowConfig(window=4, dilation=[1, 3], num_sinks=2)
    module = subject(config, True).build(config)
    state = module.make_state()
    for begin in range(0, 60, 20):
        tokens = [x[:, :, begin : begin + 20] for x in inputs(1, 60)[:3]]
        state.update(*tokens[1:])
        run(module, *tokens, state=state)
    stored = state.entries["recent"].entries["key"]
    assert stored.shape == (1, KV_HEADS, 9, HEAD_DIM)
    assert stored.untyped_storage().nbytes() == stored.nbytes
    assert state.nbytes == 2 * (9 + 2) * KV_HEADS * HEAD_DIM * 8


@pytest.mark.parametrize("causal", [True, False])
def test_dropout_of_flash_on_cpu_repeats_itself_in_the_backward_pass(causal, monkeypatch):
    monkeypatch.setattr(exact, "CHUNK", 4)
    module = subject(FlashConfig(), causal).build(FlashConfig())
    args = [x.requires_grad_() for x in inputs(1, 10)[:3]]
    padding = torch.arange(10)[None] < 9

    def seeded(*args):
        torch.manual_seed(3)
        return run(module, *args, padding=padding, dropout=0.3)

    assert torch.autograd.gradcheck(seeded, args, fast_mode=True)
    assert (seeded(*args) - run(module, *args, padding=padding)).abs().max() > 1e-2


def test_dropout_of_flash_on_cpu_forms_no_square_of_weights(monkeypatch):
    monkeypatch.setattr(exact, "CHUNK", 16)
    module = subject(FlashConfig(), True).build(FlashConfig(), dtype=torch.float32)
    args = [x.requires_grad_() for x in inputs(1, 160, dtype=torch.float32)[:3]]
    largest = []

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            largest.extend(
                x.numel() for x in (result if isinstance(result, tuple) else (result,)) if torch.is_tensor(x)
            )
            return result

    with Largest():
        run(module, *args, dropout=0.1).sum().backward()
    assert HEADS * 16 * 160 <= max(largest) < HEADS * 160 * 160 / 4
