"""rfa: its directions, the convergence of the estimate, and the gate."""

import itertools

import pytest
import torch
from contract import decode

from hf_efficient_attn.registry import build
from hf_efficient_attn.variant import HostShape
from hf_efficient_attn.variants.rfa import RfaConfig


def make(causal=True, heads=2, dim=8, layer=0, **fields):
    return build(RfaConfig(**fields), HostShape(heads, heads, dim, heads * dim, causal, layer=layer, num_layers=2))


def test_directions_depend_on_seed_layer_and_head_and_survive_a_cast():
    directions = make(num_features=400).directions
    assert directions.shape == (2, 200, 8) and torch.equal(directions, make(num_features=400).directions)
    assert abs(directions.mean()) < 0.06 and abs(directions.std() - 1) < 0.06
    others = [make(num_features=400, seed=1), make(num_features=400, layer=1)]
    assert all((x.directions != directions).any() for x in others) and (directions[0] != directions[1]).any()
    assert torch.equal(directions.bfloat16().float(), directions)


@pytest.mark.parametrize("causal", [False, True])
def test_it_converges_to_the_softmax_of_normalised_keys_as_one_over_root_m(causal):
    torch.manual_seed(0)
    args = [torch.randn(2, 8, 64, 16) for _ in range(3)]
    unit = [torch.nn.functional.normalize(x, dim=-1) for x in args[:2]]
    dense = torch.nn.functional.scaled_dot_product_attention(*unit, args[2], is_causal=causal, scale=1.0)
    errors = []
    for m in (128, 2048, 32768):
        got = make(causal, heads=8, dim=16, num_features=m)(*args, scaling=0.3, causal=causal)
        errors.append((got - dense).square().mean().sqrt())
    assert errors[2] < 0.05 * dense.std()
    for fewer, more in itertools.pairwise(errors):
        assert 2.5 < fewer / more < 6.5  # sixteen times the features: a quarter of the error


def test_an_odd_number_of_features_raises():
    with pytest.raises(ValueError, match="num_features = 7"):
        RfaConfig(num_features=7)
    assert RfaConfig(num_features=8).num_features == 8


def test_the_gate_starts_near_one_and_belongs_to_decoders():
    module, hidden = make(gate=True), torch.randn(1, 5, 16)
    assert module.needs_hidden and not make(gate=False).needs_hidden and not make(False, gate=True).needs_hidden
    assert torch.allclose(module.gate(hidden).sigmoid(), torch.tensor(0.99753), atol=1e-4)


@pytest.mark.parametrize("bias", [-6.0, 0.0, 6.0])
def test_the_gate_is_its_recurrence_over_many_tokens(bias):
    """In float32, over a length at which the product of all gates underflows."""
    module, n = make(gate=True, num_features=16), 700
    with torch.no_grad():
        module.gate.bias.fill_(bias)
        module.gate.weight.normal_(0, 0.1)
    generator = torch.Generator().manual_seed(0)
    args = [torch.randn(1, 2, n, 8, generator=generator, requires_grad=True) for _ in range(3)]
    hidden = torch.randn(1, n, 16, generator=generator)
    output = module(*args, scaling=1.0, causal=True, hidden=hidden)
    output.sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in (*args, *module.parameters()))
    module, (query, key, value) = module.double(), (x.detach().double() for x in args)
    gates = module.gate(hidden.double()).sigmoid()[0].T  # (G, N)

    def phi(x):
        u = torch.nn.functional.normalize(x, dim=-1)[0] @ module.directions.mT
        return torch.cat([u.sin(), u.cos()], -1) / 8**0.5

    phi_q, phi_k, total, count, rows = phi(query), phi(key), 0, 0, []
    for t in range(n):
        left, new = gates[:, t], 1 - gates[:, t]
        row = torch.cat([value[0, :, t], torch.ones(2, 1, dtype=torch.float64)], 1)
        total = left[:, None, None] * total + new[:, None, None] * phi_k[:, t, :, None] * row[:, None]
        count = left * count + new
        read = (phi_q[:, t, None] @ total)[:, 0] / count[:, None]
        rows.append(read[:, :-1] / torch.where(read[:, -1:] < 0, -1, 1) / read[:, -1:].abs().clamp_min(0.01))
    torch.testing.assert_close(output[0].double(), torch.stack(rows, 1), atol=2e-3, rtol=1e-3)


@torch.no_grad()
def test_no_later_token_moves_a_digit_of_an_earlier_one():
    """Sums are relative to logarithms that a piece of the text has in common."""
    module, g = make(gate=True, dim=16, num_features=16), torch.Generator().manual_seed(0)
    module.gate.weight.normal_(generator=g).mul_(0.5)
    module.gate.bias.fill_(1.0)
    args = [torch.randn(1, 2, 300, 16, generator=g) for _ in range(3)] + [torch.randn(1, 300, 32, generator=g)]
    outputs = []
    for factor in (1, -3):
        args[1][:, :, 200] *= factor
        args[3][:, 200] *= factor
        outputs.append(module(*args[:3], scaling=0.3, causal=True, hidden=args[3]))
    assert torch.equal(*(x[:, :, :200] for x in outputs)) and not torch.equal(*outputs)


@torch.no_grad()
def test_a_fading_past_costs_no_accuracy_in_a_long_text():
    """Logarithms of what the gate leaves add up to thousands; what counts is their difference over some tokens."""
    module, g = make(gate=True, num_features=16), torch.Generator().manual_seed(0)
    module.gate.bias.fill_(0.0)
    args = [torch.randn(1, 2, 4096, 8, generator=g) for _ in range(3)] + [torch.randn(1, 4096, 16, generator=g)]
    whole = module(*args[:3], scaling=0.3, causal=True, hidden=args[3])
    in_calls = decode(module, args, (3000, 1, 1095), scaling=0.3)
    exact = [x.double() for x in args]
    want = module.double()(*exact[:3], scaling=0.3, causal=True, hidden=exact[3])
    for got in (whole, in_calls):
        assert (got - want).abs().median() < 1e-6


def test_a_closed_gate_forgets():
    args, hidden = [torch.randn(1, 2, 30, 8) for _ in range(3)], torch.randn(1, 30, 16)
    moved = [args[0], args[1], args[2].clone()]
    moved[2][:, :, 0] += 1
    changes = []
    for bias in (0.0, 6.0):
        module = make(gate=True)
        torch.nn.init.constant_(module.gate.bias, bias)
        outputs = [module(*x, scaling=1.0, causal=True, hidden=hidden)[:, :, -1] for x in (args, moved)]
        changes.append((outputs[0] - outputs[1]).abs().max())
    assert changes[0] < 1e-5 < 1e-3 < changes[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_padding_leaves_a_fast_gate_s_gradients_alone(dtype):
    """Behind a row's end gates go on counting, further than either precision does."""
    module, n = make(gate=True).to(dtype), 1000
    torch.nn.init.constant_(module.gate.bias, -2)
    args = [torch.randn(2, 2, n, 8, dtype=dtype, requires_grad=True) for _ in range(3)]
    hidden, padding = torch.randn(2, n, 16, dtype=dtype), torch.arange(n) < torch.tensor([n, 60])[:, None]
    output = module(*args, hidden=hidden, padding=padding, scaling=1.0, causal=True)
    short = module(*(x[1:, :, :60] for x in args), hidden=hidden[1:, :60], scaling=1.0, causal=True)
    torch.testing.assert_close(output[1:, :, :60], short)
    wanted, near = [*args, *module.parameters()], 1e-9 if dtype is torch.float64 else 1e-3
    for got, want in zip(*(torch.autograd.grad(x.sum(), wanted) for x in (output[1], short)), strict=True):
        torch.testing.assert_close(got, want, atol=near * want.abs().max().item(), rtol=0)
        assert want.abs().max() > 1e-3


@pytest.mark.parametrize("bias", [-2.0, -5.0])
@torch.no_grad()
def test_a_row_without_keys_leaves_the_others_alone(bias):
    """Where none has come yet there is no largest weight to follow."""
    module, n = make(gate=True, dim=16), 300
    torch.nn.init.constant_(module.gate.bias, bias)
    args, hidden = [torch.randn(2, 2, n, 16) for _ in range(3)], torch.randn(2, n, 32)
    padding = torch.ones(2, n, dtype=torch.bool)
    padding[1] = False
    want = module(*(x[:1] for x in args), hidden=hidden[:1], scaling=1.0, causal=True)
    got = module(*args, hidden=hidden, padding=padding, scaling=1.0, causal=True)
    torch.testing.assert_close(got[:1], want, atol=1e-3, rtol=1e-3)
    padding[1, 200:] = True  # its first token comes with the third call
    got = decode(module, [*args, hidden], (100, 100, 100), padding, scaling=1.0)
    torch.testing.assert_close(got[:1], want, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("bias", [6.0, 1.0, -1.0])
@torch.no_grad()
def test_gates_are_summed_in_full_precision_under_autocast(bias):
    module, args, hidden = (
        make(gate=True, num_features=256),
        [torch.randn(1, 2, 1000, 8) for _ in range(3)],
        torch.randn(1, 1000, 16),
    )
    torch.nn.init.constant_(module.gate.bias, bias)
    want = module(*args, hidden=hidden, scaling=1.0, causal=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = module(*args, hidden=hidden, scaling=1.0, causal=True)
    assert (got - want).norm() < 0.01 * want.norm()


@torch.no_grad()
def test_an_open_gate_has_nothing_to_read():
    """In float32 sigmoid(104) is 1."""
    module = make(gate=True, dim=16)
    torch.nn.init.constant_(module.gate.bias, 104)
    output = module(
        *(torch.randn(1, 2, 50, 16) for _ in range(3)), hidden=torch.randn(1, 50, 32), scaling=1.0, causal=True
    )
    assert torch.isfinite(output).all()


@pytest.mark.parametrize("bias", [6.0, -5.0])
def test_sums_are_kept_once_a_span_however_fast_the_gate(bias):
    module, kept = make(gate=True, dim=16, num_features=64), {}
    torch.nn.init.constant_(module.gate.bias, bias)
    args, hidden = [torch.randn(1, 2, 1024, 16, requires_grad=True) for _ in range(3)], torch.randn(1, 1024, 32)

    def pack(x):
        kept[x.data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        module(*args, hidden=hidden, scaling=1.0, causal=True)
    sums, inputs = 4 * 2 * 64 * 17 * (1024 // 256), sum(x.nbytes for x in args)
    assert sums < sum(kept.values()) < sums + 3 * inputs


def test_gradients_of_a_gate_go_through_a_state():
    torch.manual_seed(0)
    module = make(heads=2, num_features=12, gate=True).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    args = [torch.randn(1, 2, 20, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    hidden = torch.randn(1, 20, 16, dtype=torch.float64, requires_grad=True)
    leaves, slope = (*args, hidden, *module.parameters()), torch.randn(1, 2, 20, 8, dtype=torch.float64)
    parts = decode(module, [*args, hidden], (12, 8), scaling=1.0)
    full = module(*args, hidden=hidden, scaling=1.0, causal=True)
    grads = [torch.autograd.grad((x * slope).sum(), leaves) for x in (parts, full)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)
