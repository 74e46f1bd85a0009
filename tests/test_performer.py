"""performer: its directions, the convergence of the estimate, and when new directions are drawn."""

import copy
import itertools
import pickle

import pytest
import torch
from naive import naive_attention
from torch.utils.checkpoint import checkpoint

from hf_efficient_attn.registry import build
from hf_efficient_attn.variant import HostShape
from hf_efficient_attn.variants.performer import PerformerConfig


def make(causal=False, layer=0, heads=2, dim=8, **fields):
    return build(
        PerformerConfig(**fields), HostShape(heads, heads, dim, heads * dim, causal, layer=layer, num_layers=2)
    )


def run(module, args, **kwargs):
    return module(*args, scaling=0.4, causal=module.host.causal, **kwargs)


def inputs(length=6, heads=2, dim=8, std=1.0):
    return [(std * torch.randn(2, heads, length, dim)).requires_grad_() for _ in range(3)]


def test_directions_are_orthogonal_uniform_and_of_chi_length():
    features = make(heads=400, num_features=12).features
    assert features.shape == (400, 12, 8)
    unit = features / features.norm(dim=-1, keepdim=True)
    first, second = unit[:, :8], unit[:, 8:]
    off = first @ first.mT - torch.eye(8)
    assert off.abs().max() < 0.02  # rounded to bfloat16
    assert (second @ second.mT - torch.eye(4)).abs().max() < 0.02 and (first @ second.mT).abs().max() > 0.5
    assert unit.mean((0, 1)).abs().max() < 0.05, "directions are not uniform"
    assert abs(features.square().sum(-1).mean() - 8) < 0.3  # the mean of chi^2 with 8 degrees of freedom
    assert torch.equal(features.bfloat16().float(), features)


def test_directions_depend_on_seed_layer_and_head_alone():
    features = make(num_features=12).features
    assert torch.equal(make(num_features=12).features, features)
    others = [make(num_features=12, seed=1), make(num_features=12, layer=1)]
    assert all((other.features != features).any() for other in others) and (features[0] != features[1]).any()


@pytest.mark.parametrize("causal", [False, True])
def test_it_converges_to_softmax_as_one_over_root_m(causal):
    torch.manual_seed(0)
    args = [x.detach() for x in inputs(64, 8, 16, std=0.3)]
    dense = torch.nn.functional.scaled_dot_product_attention(*args, is_causal=causal, scale=0.4)
    errors = [
        (run(make(causal, heads=8, dim=16, num_features=m), args) - dense).square().mean().sqrt()
        for m in (64, 1024, 16384)
    ]
    assert errors[2] < 0.01 * dense.std()
    for fewer, more in itertools.pairwise(errors):
        assert 2.5 < fewer / more < 6.5  # sixteen times the features: a quarter of the error


def train(module, args, times=1):
    for _ in range(times):
        run(module, args).sum().backward()


def test_new_directions_come_after_so_many_training_steps():
    module, args = make(redraw_interval=3).train(), inputs()
    first = module.features
    train(module, args, 3)
    assert module.features is first and int(module.steps) == 3
    module.eval()
    run(module, args)
    assert module.features is first  # never outside training
    module.train()
    train(module, args)
    assert int(module.drawn) == 1 and (module.features != first).any()
    assert torch.equal(module.features, module.draw(1))
    never = make().train()
    train(never, args, 5)
    assert torch.equal(never.features, first) and "steps" not in never.state_dict()


def test_a_forward_that_waits_for_its_backward_pass_keeps_its_directions():
    module, args = make(redraw_interval=1).train(), inputs()
    train(module, args)  # due now
    module.features = module.features.clone()
    pending = checkpoint(run, module, args, use_reentrant=False)
    drawn = module.features
    train(module, args, 2)
    assert module.features is drawn
    pending.sum().backward()
    train(module, args)
    assert module.features is not drawn
    lost = run(module, args)  # a forward that is dropped does not hold them for ever
    drawn = module.features
    del lost
    train(module, args)
    train(module, args)
    assert module.features is not drawn


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_equal_gradients(reentrant):
    kept, again = make(redraw_interval=2).train(), make(redraw_interval=2).train()
    for step in range(5):
        args = inputs()
        grads = torch.autograd.grad(run(kept, args).square().sum(), args)
        copies = [x.detach().clone().requires_grad_() for x in args]
        checkpoint(lambda *args: run(again, args), *copies, use_reentrant=reentrant).square().sum().backward()
        for want, x in zip(grads, copies, strict=True):
            torch.testing.assert_close(x.grad, want)
        assert int(kept.steps) == int(again.steps) == step + 1
    assert int(kept.drawn) == 2 and torch.equal(kept.features, again.features)


def test_a_decoder_state_keeps_the_directions_it_began_with():
    module, args = make(causal=True, redraw_interval=1).train(), [x.detach() for x in inputs(12)]
    full = run(module, args)
    state = module.make_state()

    def step(begin, end):
        part = [x[:, :, begin:end] for x in args]
        state.update(part[1], part[2])
        return run(module, part, state=state)

    first = step(0, 7)
    before = module.features
    train(module, inputs(), 2)
    assert (module.features != before).any()
    torch.testing.assert_close(torch.cat([first, step(7, 12)], 2), full, atol=1e-5, rtol=1e-4)
    assert (run(module.eval(), args) - full).abs().max() > 1e-3  # the new ones give something else


def test_a_resumed_module_draws_what_an_uninterrupted_one_does():
    module, args = make(redraw_interval=2).train(), inputs()
    train(module, args, 3)
    resumed = make(redraw_interval=2).train()
    resumed.load_state_dict(module.state_dict())
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), resumed]
    train(module, args, 4)
    for other in copies:
        train(other, args, 4)
        assert torch.equal(other.features, module.features) and int(other.drawn) == int(module.drawn) == 3


@pytest.mark.parametrize("causal", [False, True])
def test_the_relu_form_is_its_formula(causal):
    module, args = make(causal, kernel="relu", num_features=16).double(), [x.double() for x in inputs(9)]
    with torch.no_grad():
        args[0][:, :, 4] = 0  # no feature at all
    want = naive_attention("performer", *args, config=module.config, scaling=0.4, causal=causal, module=module)
    got = run(module, args)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    assert (got[:, :, 4] == 0).all() and (got[:, :, 3] != 0).any()
    torch.testing.assert_close(module(*args, scaling=7.0, causal=causal), want, atol=1e-12, rtol=0)
    soft = make(causal, num_features=16).double()
    assert (soft(*args, scaling=7.0, causal=causal) - run(soft, args)).abs().max() > 1e-2
