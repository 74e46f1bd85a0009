"""`moe` against its formula, on feed-forwards of every shape: plain, gated, fused, transposed, inline; capacity; balance."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from naive import ORACLES
from zoo import TASKS, USUAL_TASK, ZOO

from hf_efficient_attn import describe, patch_model, unpatch_model
from hf_efficient_attn.auxiliary import auxiliary_loss
from hf_efficient_attn.dispatch import PREVIOUS
from hf_efficient_attn.hosts import find_feed_forwards, find_hosts
from hf_efficient_attn.measuring import count_flops
from hf_efficient_attn.registry import get_config_class

WHOLE = (
    "llama",
    "gpt2",
    "gpt_neox",
    "phi3",
    "modernbert",
    "distilbert",
    "vit",
    "t5",
)  # their feed-forward is one module
OPTIONS = [{"num_experts": 3}, {"num_experts": 4, "top_k": 2}, {"num_experts": 3, "top_k": 3}, {"num_experts": 1}]


def patched(arch: str, **options):
    """The model in float64, its experts and routers moved off their start; its first feed-forward; the variant in it."""
    model = ZOO[arch].build().double()
    place = find_feed_forwards(model)[0]
    dense = copy.deepcopy(place.module)
    patch_model(model, "moe", **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".efficient_attn." in name:
                parameter += 0.3 * torch.randn_like(parameter)
    return model, place, dense


def experts_of(place, dense):
    """Each expert as a dense feed-forward of its own: the pretrained one, and copies that hold the others' weights."""
    functions = []
    for expert in [None, *place.module.efficient_attn.experts]:
        module = copy.deepcopy(dense)
        if expert is not None:
            module.load_state_dict(expert.state_dict())
        functions.append(lambda x, f=module: f(x[None, None])[0, 0])
    return functions


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("arch", WHOLE)
def test_forward_and_gradients_are_the_formula(arch, options) -> None:
    _, place, dense = patched(arch, **options)
    moe = place.module.efficient_attn
    x = torch.randn(2, 11, 32, dtype=torch.float64, requires_grad=True)
    got = place.module(x)
    want = torch.stack(
        [ORACLES["moe"](row, experts_of(place, dense), config=moe.config, router=moe.router.weight) for row in x]
    )
    torch.testing.assert_close(got, want, atol=1e-11, rtol=0)
    assert moe.config.num_experts == 1 or (got - dense(x)).abs().max() > 1e-2
    weight = torch.randn_like(got)
    ours, theirs = (torch.autograd.grad((y * weight).sum(), [x, moe.router.weight]) for y in (got, want))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)
    assert moe.config.num_experts == 1 or ours[1].abs().max() > 1e-4


@pytest.mark.parametrize("arch", [name for name in ZOO if name != "gpt_oss"])
def test_every_token_gets_its_expert_in_every_architecture(arch) -> None:
    """With one expert per token, each linear map's output is that of the token's expert, wherever the maps stand."""
    tiny = ZOO[arch]
    model = tiny.build().double()
    dense = copy.deepcopy(model)
    patch_model(model, "moe", num_experts=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".efficient_attn." in name:
                parameter += 0.3 * torch.randn_like(parameter)
    inputs = tiny.inputs(2, 12)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].double()
    before = dense(**inputs).logits
    for place in find_feed_forwards(dense).values():
        moe = model.get_submodule(place.name).efficient_attn
        assert list(place.shape.maps) == list(moe.host.maps)
        chosen = {}
        for path, module in place.maps.items():
            others = [expert.get_submodule(path) for expert in moe.experts]

            def select(module, args, output, path=path, others=others, moe=moe, chosen=chosen):
                if path == moe.host.maps[0]:
                    chosen["expert"] = (args[0] @ moe.router.weight.T).argmax(-1, keepdim=True)
                for e, other in enumerate(others, 1):
                    output = torch.where(chosen["expert"] == e, other(args[0]), output)
                return output

            module.register_forward_hook(select)
    want = dense(**inputs).logits
    assert (want - before).abs().max() > 1e-2
    torch.testing.assert_close(model(**inputs).logits, want, atol=1e-9, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", [{"num_experts": 3}, {"num_experts": 4, "top_k": 2}], ids=str)
def test_capacity_is_per_sequence_over_real_tokens_in_training_only(options, side) -> None:
    model, place, dense = patched("llama", capacity_factor=0.7, **options)
    moe, functions = place.module.efficient_attn, experts_of(place, dense)
    x = torch.randn(3, 11, 32, dtype=torch.float64)
    counts = torch.tensor([11, 7, 4])[:, None]
    real = torch.arange(11) < counts if side == "right" else torch.arange(11) >= 11 - counts
    outputs = {}
    for training in (True, False):
        model.train(training)
        moe.note_tokens(3, 11, real)
        outputs[training] = got = place.module(x)
        for row in range(3):
            want = ORACLES["moe"](
                x[row, real[row]], functions, config=moe.config, router=moe.router.weight, training=training
            )
            torch.testing.assert_close(got[row, real[row]], want, atol=1e-11, rtol=0)
    assert (outputs[True] == 0).all(-1)[real].any(), "nothing was dropped"
    model.train()
    moe.note_tokens(3, 11, real)
    poisoned = place.module(x.masked_fill(~real[..., None], 7.0))
    torch.testing.assert_close(poisoned[real], outputs[True][real])


@pytest.mark.parametrize("arch", ["llama", "bert", "opt", "bart"])
def test_padding_counts_neither_in_the_loss_nor_in_capacity(arch) -> None:
    """A batch of one text, alone and with padding behind it: the same logits in training, the same auxiliary loss."""
    tiny = ZOO[arch]
    model = tiny.build()
    patch_model(model, "moe", num_experts=3, capacity_factor=0.6, balance=1.0)
    model.train()
    prefix = ["", "decoder_"] if tiny.kind == "encoder-decoder" else [""]
    inputs = tiny.inputs(2, 12)
    losses, logits = [], []
    for extra in (0, 5):
        padded = {}
        for name in prefix:
            fill = torch.nn.functional.pad
            padded[f"{name}input_ids"] = fill(inputs[f"{name}input_ids"], (0, extra), value=1)
            padded[f"{name}attention_mask"] = fill(inputs[f"{name}attention_mask"], (0, extra))
        logits.append(model(**padded).logits[:, :12])
        losses.append(auxiliary_loss(model))
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=0)
    blind = {k: torch.ones_like(v) if "mask" in k else v for k, v in padded.items()}
    model(**blind)
    assert (auxiliary_loss(model) - losses[0]).abs() > 1e-5, "padding would not have counted anyway"


@pytest.mark.parametrize("arch", ["bert", "llama"])
def test_dense_attention_beside_it_may_have_another_implementation(arch, tmp_path) -> None:
    """It goes on telling what is padding, and the model is saved, patched further and given back as before."""
    model, inputs = patch_model(ZOO[arch].build(), "moe").train(), ZOO[arch].inputs(pad="right")
    others = {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])}

    def losses() -> list[float]:  # what is told of the one batch is not true of the other
        return [float(model(**batch, labels=batch["input_ids"]).loss) for batch in (others, inputs)]

    expected = losses()
    model.set_attn_implementation("eager")
    assert losses() == pytest.approx(expected, rel=1e-5)
    assert {getattr(host.module, PREVIOUS) for host in find_hosts(model)} == {"eager"}
    model.save_pretrained(tmp_path)
    loaded = getattr(transformers, TASKS[USUAL_TASK[ZOO[arch].kind]]).from_pretrained(tmp_path)
    with torch.no_grad():
        assert (loaded(**inputs)[0] - model.eval()(**inputs)[0]).abs().max() < 1e-5
        both = [patch_model(each, "sliding_window", window=2)(**inputs)[0] for each in (model, loaded)]
        assert (both[0] - both[1]).abs().max() < 1e-5
    assert unpatch_model(model).config._attn_implementation == "eager"


def test_the_balance_loss_is_that_of_the_formula() -> None:
    model, place, _ = patched("llama", num_experts=4, top_k=2, balance=0.5)
    moe = place.module.efficient_attn
    x, real = torch.randn(2, 9, 32, dtype=torch.float64), torch.arange(9) < torch.tensor([[9], [5]])
    model.train()
    moe.note_tokens(2, 9, real)
    place.module(x)
    p = (x[real] @ moe.router.weight.T).softmax(-1)
    share = torch.bincount(p.topk(2).indices.flatten(), minlength=4) / (2 * len(p))
    torch.testing.assert_close(auxiliary_loss(model), 0.5 * 4 * (share * p.mean(0)).sum())
    assert (share - 0.25).abs().max() > 0.02


def test_cost_follows_top_k_and_not_the_number_of_experts() -> None:
    x = torch.randn(4, 256, 32, dtype=torch.float64)

    def flops(**options):
        _, place, dense = patched("llama", **options)
        return count_flops(lambda: place.module(x)) / count_flops(lambda: dense(x))

    assert flops(num_experts=2) < 1.1
    assert flops(num_experts=8) < 1.2
    assert 1.9 < flops(num_experts=8, top_k=2) < 2.2


def test_training_specialises_and_balances_the_experts() -> None:
    """Tokens of eight kinds, two inner features: four experts learn outputs that one cannot, and none is left out."""
    kinds, targets = 2 * torch.randn(8, 32), torch.randn(8, 32)
    losses = {}
    for experts in (1, 4):
        model = ZOO["llama"].build(intermediate_size=2)
        place = find_feed_forwards(model)[0]
        patch_model(model, "moe", num_experts=experts, balance=0.1)
        moe = place.module.efficient_attn
        optimizer = torch.optim.Adam(place.module.parameters(), 2e-2)
        model.train()
        for step in range(200):
            generator = torch.Generator().manual_seed(step)
            kind = torch.randint(8, (8, 16), generator=generator)
            x = kinds[kind] + 0.1 * torch.randn(8, 16, 32, generator=generator)
            moe.note_tokens(8, 16, None)
            error = (place.module(x) - targets[kind]).square().mean()
            optimizer.zero_grad()
            (error + auxiliary_loss(model)).backward()
            optimizer.step()
        losses[experts] = error.item()
        used = torch.bincount(moe.router(x).argmax(-1).flatten(), minlength=experts)
    assert losses[4] < 0.8 * losses[1]
    assert (used > 8).all(), f"an expert is left out: {used.tolist()}"


def test_refusals_name_what_is_wrong() -> None:
    model = ZOO["llama"].build()
    with pytest.raises(ValueError, match="top_k = 3 is more than num_experts = 2"):
        patch_model(model, "moe", num_experts=2, top_k=3)
    with pytest.raises(ValueError, match="mixture of experts already"):
        patch_model(ZOO["gpt_oss"].build(), "moe")
    patch_model(model, "moe", layers=[1])
    with pytest.raises(ValueError, match="the feed-forward of EfficientLlamaForCausalLM is patched already"):
        patch_model(model, "moe", layers=[0])
    assert [(row.layer, row.variant) for row in describe(model)] == [(0, None), (1, None), (1, "moe")]
    with pytest.raises(ValueError, match="given two variants"):
        patch_model(ZOO["llama"].build(), {"0-1": ["moe", "block"], 0: "moe"})
    chunked = ZOO["bert"].build(chunk_size_feed_forward=4)
    patch_model(chunked, "moe").train()
    with pytest.raises(ValueError, match="chunk_size_feed_forward"):
        chunked(**ZOO["bert"].inputs(2, 12))
    assert get_config_class("moe")().capacity_factor is None
