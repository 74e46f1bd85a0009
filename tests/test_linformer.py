"""linformer: every way of sharing projections is the formula, and a shared matrix survives copies, saving and loading."""

import copy
import pickle

import pytest
import torch
from contract import decode
from naive import naive_attention

from hf_efficient_attn.registry import build
from hf_efficient_attn.variant import HostShape
from hf_efficient_attn.variants.linformer import LinformerConfig

OWNED = {"none": (2, 2), "headwise": (1, 1), "key-value": (1, None), "layerwise": (1, None)}


def make(sharing: str, causal: bool, layer: int = 0, **fields):
    fields = {"rank": 8, "max_length": 34, "segment_size": 8, "num_sinks": 3, **fields}
    host = HostShape(4, 2, 8, 32, causal, layer=layer, num_layers=3)
    return build(LinformerConfig(sharing=sharing, **fields), host).double()


def shake(module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)


def run(module, args, padding=None):
    return module(*args, padding=padding, scaling=0.4, causal=module.host.causal)


def inputs(length: int):
    return [torch.randn(3, heads, length, 8, dtype=torch.float64) for heads in (4, 2, 2)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sharing", list(OWNED))
def test_every_sharing_is_the_formula(sharing, causal):
    module = make(sharing, causal)
    shake(module)
    matrices, values = OWNED[sharing]
    assert module.proj_k.shape == ((matrices, 2, 8) if causal else (matrices, 8, 34))
    assert ("proj_v" in dict(module.named_parameters())) is (values is not None)
    for length in (1, 8, 29):
        args = inputs(length)
        padding = torch.arange(length) >= torch.tensor([0, 3, length - 1])[:, None]
        padding[:, -1] = True
        want = naive_attention(
            "linformer", *args, padding, config=module.config, scaling=0.4, causal=causal, module=module
        )
        torch.testing.assert_close(run(module, args, padding), want, atol=1e-10, rtol=0)


@pytest.mark.parametrize("exact_segments", [0, 1, 2])
@pytest.mark.parametrize("num_sinks", [0, 4, 11])
def test_a_decoder_s_exact_part_is_as_long_as_asked(exact_segments, num_sinks):
    """Sinks that fill a whole segment and part of the next, or none; no exact segment, or two."""
    module = make("none", True, exact_segments=exact_segments, num_sinks=num_sinks, segment_size=5, rank=14)
    shake(module)
    args = inputs(37)
    want = naive_attention("linformer", *args, config=module.config, scaling=0.4, causal=True, module=module)
    torch.testing.assert_close(run(module, args), want, atol=1e-10, rtol=0)
    for splits in ((37,), (3, 20, 14), (11, 1, 1, 24), (1,) * 37):
        torch.testing.assert_close(decode(module, args, splits), want, atol=1e-10, rtol=0)


def test_a_state_that_let_go_of_nothing_can_be_cropped():
    module = make("headwise", True)
    shake(module)
    args, other = inputs(15), inputs(4)
    state = module.make_state()

    def step(part):
        state.update(part[1], part[2])
        return module(*part, scaling=0.4, causal=True, state=state)

    step([x[:, :, :7] for x in args])
    step(other)  # completes a segment, which is then taken back
    assert state.entries["slots"].count == 2
    state.crop(-4)
    assert state.entries["slots"].count == 0
    torch.testing.assert_close(step([x[:, :, 7:] for x in args]), run(module, args)[:, :, 7:], atol=1e-10, rtol=0)


def test_it_starts_as_means_over_near_equal_stretches():
    matrix = make("headwise", False, rank=5, max_length=13).proj_k[0]
    sizes = (matrix > 0).sum(1)
    assert sizes.sum() == 13 and set(sizes.tolist()) == {2, 3}
    torch.testing.assert_close(matrix.sum(1), torch.ones(5, dtype=torch.float64))
    assert torch.equal(make("headwise", False, rank=6, max_length=6).proj_k[0], torch.eye(6, dtype=torch.float64))


def layers(sharing: str, **fields):
    modules = torch.nn.ModuleList(
        make(sharing, causal, layer, **fields) for layer, causal in enumerate([False, True] * 2)
    )
    type(modules[0]).tie_parameters(list(modules))
    return modules


def test_layerwise_sharing_has_one_matrix_per_direction():
    modules = layers("layerwise")
    names = [name for name, _ in modules.named_parameters()]
    assert names == ["0.proj_k", "1.proj_k", "1.slot_bias", "3.slot_bias"]
    assert list(modules.state_dict()) == ["0.proj_k", "1.proj_k", "1.slot_bias", "2.proj_k", "3.proj_k", "3.slot_bias"]
    assert modules[2].proj_k is modules[0].proj_k and modules[3].proj_v is modules[1].proj_k
    run(modules[2], inputs(9)).sum().backward()
    assert modules[0].proj_k.grad.abs().max() > 0
    assert len(list(layers("headwise").parameters())) == 4 * 2 + 2


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict", "assign", "dtype"])
def test_a_shared_matrix_stays_shared(how):
    modules = layers("layerwise")
    shake(modules)
    args = inputs(9)
    before = run(modules[2], args)
    if how == "deepcopy":
        modules = copy.deepcopy(modules)
    elif how == "pickle":
        modules = pickle.loads(pickle.dumps(modules))
    elif how == "dtype":
        modules = modules.float().double()
    else:
        saved = copy.deepcopy(modules.state_dict())
        modules = layers("layerwise")
        assert not torch.equal(run(modules[2], args), before)
        modules.load_state_dict(saved, assign=how == "assign")
    assert modules[2].proj_k is modules[0].proj_k or how == "assign"
    torch.testing.assert_close(run(modules[2], args), before, atol=1e-5 if how == "dtype" else 0, rtol=0)


def test_longer_than_max_length_raises():
    with pytest.raises(ValueError, match=r"35 tokens.*max_length = 34"):
        run(make("headwise", False), inputs(35))
    assert run(make("headwise", True), inputs(35)).shape[2] == 35
    with pytest.raises(ValueError, match=r"rank = 9 is more than max_length = 8"):
        LinformerConfig(rank=9, max_length=8)


def test_the_window_alone_is_a_decoder_s_exact_part():
    module = make("headwise", True)
    window = build(module.config.window_only(causal=True), module.host)
    args = inputs(16)
    torch.testing.assert_close(run(window, args), run(module, args), atol=1e-10, rtol=0)
    args = inputs(17)  # the third segment is the first that sees slots
    assert (run(window, args) - run(module, args))[:, :, :16].abs().max() < 1e-10
    assert (run(window, args) - run(module, args))[:, :, 16].abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sharing", ["none", "headwise"])
def test_slots_are_rounded_once(sharing, dtype):
    """Of keys that share a large part, as where a model gives them a bias; parameters in float32, as under autocast."""
    module, g = make(sharing, True, segment_size=9, rank=3, max_length=9).float(), torch.Generator().manual_seed(0)
    key, real = torch.randn(2, 2, 3, 9, 8, generator=g).add(700).to(dtype), torch.rand(2, 3, 9, generator=g) < 0.7
    for given in (real, None):
        got, want = (module.summarise(x, x, given)[0] for x in (key, key.float()))
        torch.testing.assert_close(got, want.to(dtype), rtol=torch.finfo(dtype).eps / 2, atol=0)
