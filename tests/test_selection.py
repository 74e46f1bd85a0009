"""The mapping that meets a budget is found from one pass, checked by running it, and never worse than a uniform choice."""

from __future__ import annotations

import math

import pytest
import torch
from zoo import ZOO

from hf_efficient_attn import (
    BlockConfig,
    ClusterFormerConfig,
    CombinedConfig,
    FlashConfig,
    SlidingWindowConfig,
    describe,
    patch_model,
    selection,
    unpatch_model,
)
from hf_efficient_attn.hosts import find_hosts
from hf_efficient_attn.patching import STRATEGIES
from hf_efficient_attn.recovery import attention_errors
from hf_efficient_attn.selection import Budget, _calibrate, _labelled, _mapping, default_loss, select_variants

CANDIDATES = [
    ("narrow", SlidingWindowConfig(window=2, num_sinks=1)),
    ("wide", SlidingWindowConfig(window=24, num_sinks=1)),
    ("block", BlockConfig(block_size=4, num_sinks=1)),
]


def sharpened(name: str = "llama"):
    """A tiny model whose attention matters, and texts for it."""
    tiny = ZOO[name]
    model = tiny.build()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if any(word in key for word in ("q_proj", "k_proj", "v_proj", "o_proj", "query", "key", "value")):
                parameter.mul_(4)
    batches = [tiny.inputs(2, 40), tiny.inputs(2, 40, "left")]
    if tiny.kind == "encoder":
        batches = [{**b, "labels": b["input_ids"].masked_fill(b["attention_mask"] == 0, -100)} for b in batches]
    return model, batches


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_what_is_chosen_keeps_its_promise_and_the_model_stays(name: str) -> None:
    model, batches = sharpened(name)
    cls, before = type(model), [default_loss(model, batch).item() for batch in batches]
    budget = Budget(max_loss=0.05, cost="flops")
    found = select_variants(model, batches, candidates=CANDIDATES, budget=budget)
    assert type(model) is cls and [default_loss(model, batch).item() for batch in batches] == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert found.dense_loss == pytest.approx(sum(before) / 2, abs=1e-5)
    assert found.chosen.measured <= 0.05
    if found.mapping:
        patch_model(model, found.mapping)
        after = sum(default_loss(model, batch).item() for batch in batches) / 2
        assert math.expm1(after - found.dense_loss) == pytest.approx(found.chosen.measured, abs=1e-5)
    for point in found.uniform:
        assert not (point.measured <= 0.05 and point.cost < found.chosen.cost), "a uniform choice is better"
    assert [point.cost for point in found.curve] == sorted(point.cost for point in found.curve)
    predicted = [point.predicted for point in found.curve]
    assert predicted == sorted(predicted, reverse=True) and predicted[-1] == pytest.approx(0, abs=1e-6)
    assert max(predicted) > 1e-4, "the candidates lose nothing: this tests nothing"


def test_the_best_within_a_cost() -> None:
    model, batches = sharpened()
    found = select_variants(model, batches, candidates=CANDIDATES, budget=Budget(max_cost=0.6, cost="state"))
    assert found.chosen.cost <= 0.6
    for point in [*found.curve, *found.uniform]:
        if point.measured is not None and point.cost <= 0.6:
            assert point.measured >= found.chosen.measured
    assert found.costs["state"]["narrow"] < found.costs["state"]["wide"] < 1 == found.costs["state"]["dense"]


def test_of_several_costs_none_is_above_the_limit() -> None:
    model, batches = sharpened()
    pair = [("cheap state", {"variant": "linear"}), ("narrow", CANDIDATES[0][1])]
    found = select_variants(model, batches, candidates=pair, budget=Budget(max_cost=0.85, cost=("flops", "state")))
    for kind in ("flops", "state"):
        shares = [found.costs[kind][label] for label in found.chosen.labels]
        assert sum(shares) / len(shares) <= found.chosen.cost <= 0.85
    dear = {label: max(found.costs[kind][label] for kind in ("flops", "state")) for label in ("cheap state", "narrow")}
    assert [point.cost for point in found.uniform] == pytest.approx(list(dear.values()))


@pytest.mark.parametrize("loss_of", ["token", "text"])
def test_scores_are_the_formula_s(loss_of) -> None:
    """
    T / 2 sum_t (g_t . d_t)^2, or B / 2 sum_b (sum_t g_bt . d_bt)^2, with g and d computed one layer at a time, by hand.
    """
    model, batches = sharpened()
    batch = batches[1]
    table = _labelled(model, [("narrow", CANDIDATES[0][1]), ("exact", FlashConfig())], None, [])
    *_, scores = _calibrate(model, [batch], table, default_loss, loss_of)
    by_layer = {(score.layer, score.label): score for score in scores}
    for layer in range(2):
        seen = {}

        def keep(module, args, seen=seen):
            if args[0].requires_grad:
                seen["dense"] = args[0]
                args[0].retain_grad()

        weight = model.model.layers[layer].self_attn.o_proj
        handle = weight.register_forward_pre_hook(keep)
        default_loss(model, batch).backward()
        handle.remove()
        dense, gradient = seen["dense"].detach(), seen["dense"].grad
        patch_model(model, CANDIDATES[0][1], layers=[layer])
        handle = weight.register_forward_pre_hook(lambda m, args, seen=seen: seen.update(ours=args[0].detach()))
        default_loss(model, batch)
        handle.remove()
        unpatch_model(model)
        real = batch["attention_mask"].bool()
        along = ((seen["ours"] - dense) * gradient).sum(-1) * real
        expected = real.sum() / 2 * along.square().sum()
        if loss_of == "text":
            expected = len(real) / 2 * along.sum(1).square().sum()
        score = by_layer[layer, "narrow"]
        assert score.rise == pytest.approx(expected.item(), rel=1e-3)
        assert by_layer[layer, "exact"].rise < 1e-9 < score.rise
    patch_model(model, CANDIDATES[0][1])
    for error in attention_errors(model, [batch]):
        assert by_layer[error.layer, "narrow"].error == pytest.approx(error.error, rel=1e-3)


def test_a_classifier_s_loss_is_one_of_each_text(monkeypatch) -> None:
    """Where there is one label for each text, nobody need say that there is one loss for each."""
    encoder, batches = sharpened("bert")
    asked = []
    monkeypatch.setattr(selection, "_calibrate", lambda *given: asked.append(given[4]) or _calibrate(*given))

    def loss(model, batch):
        labels = batch["labels"] if batch["labels"].dim() == 1 else batch["labels"][:, 1] % 2
        first = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0, :2]
        return torch.nn.functional.cross_entropy(first, labels)

    of_texts = [{**batch, "labels": torch.tensor([0, 1])} for batch in batches]
    for given in (batches, of_texts):
        select_variants(encoder, given, candidates=CANDIDATES[:1], budget=Budget(max_loss=9.0, cost="flops"), loss=loss)
    assert asked == ["token", "text"]


def test_each_head_can_have_its_own() -> None:
    """The score of a head is what changing this head alone does; the mapping is run, and no uniform choice is better."""
    model, batches = sharpened()
    table = _labelled(model, CANDIDATES[:1], None, [host.shape for host in find_hosts(model)])
    *_, scores = _calibrate(model, batches[:1], table, default_loss, per_head=True)
    *_, alone = _calibrate(
        model,
        batches[:1],
        {"0": CombinedConfig(parts=[table["narrow"], "flash"]), "1": CombinedConfig(parts=["flash", table["narrow"]])},
        default_loss,
    )
    by_place = {(score.layer, str(score.head)): score for score in scores}
    assert len(by_place) == 4
    for score in alone:  # whose error is relative to both heads
        assert by_place[score.layer, score.label].rise == pytest.approx(score.rise, rel=1e-4)
    assert len({round(score.error, 6) for score in scores}) == 4
    budget = Budget(max_cost=0.75, cost="state")
    found = select_variants(model, batches, candidates=CANDIDATES, budget=budget, per_head=True)
    assert len(found.chosen.labels) == 4 and found.chosen.cost <= 0.75
    assert all(p.measured >= found.chosen.measured for p in found.uniform if p.cost <= 0.75)
    mixed = [p for p in found.curve if p.measured is not None and len(set(p.labels[:2])) == 2]
    assert mixed, "no layer was split: this tests nothing"
    mapping = _mapping(mixed[0].labels, [0, 0, 1, 1], _labelled(model, CANDIDATES, None, []))
    patch_model(model, mapping)
    assert describe(model)[0].variant == "combined"
    after = sum(default_loss(model, batch).item() for batch in batches) / 2
    assert math.expm1(after - found.dense_loss) == pytest.approx(mixed[0].measured, abs=1e-5)


def test_the_short_form(monkeypatch) -> None:
    model, batches = sharpened()
    budget = {"max_cost": 0.7, "cost": "state"}
    patch_model(model, "auto", data=batches, budget=budget, candidates=CANDIDATES)
    chosen = [row.variant for row in describe(model)]
    assert any(name == "sliding_window" or name == "block" for name in chosen)
    unpatch_model(model)
    patch_model(model, "auto", data=batches, budget=budget, candidates=CANDIDATES, layers=iter([1]))
    assert describe(model)[0].variant is None and describe(model)[1].variant is not None
    unpatch_model(model)
    patch_model(model, "auto", data=batches, budget={"max_cost": 0.9, "cost": "flops"}, per_head=True)
    assert describe(model)[0].variant is not None
    unpatch_model(model)
    with pytest.raises(ValueError, match="give data="):
        patch_model(model, "auto", budget=budget)
    with pytest.raises(
        ValueError, match="'auto' takes no 'window'; it takes data, candidates, budget, loss, loss_of, runs"
    ):
        patch_model(model, "auto", data=batches, budget=budget, window=3)
    with pytest.raises(ValueError, match="runs = 0: at least one"):
        patch_model(model, "auto", data=batches, budget=budget, candidates=CANDIDATES, runs=0)
    monkeypatch.setitem(STRATEGIES, "auto", lambda model, **given: {})
    with pytest.raises(ValueError, match="nothing better than dense"):
        patch_model(model, "auto", data=batches, budget=budget)
    assert [row.variant for row in describe(model)] == [None, None]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": []}, "must be a list of batches, and has none"),
        ({"data": {"input_ids": torch.ones(1, 4, dtype=torch.int64)}}, "must be a list of batches"),
        ({"candidates": "block"}, "give a list of variants"),
        ({"candidates": ["moe"]}, "replaces no attention"),
        (
            {"candidates": [SlidingWindowConfig(dilation=[1, 3])], "per_head": True},
            "by itself .per_head.: .*1 key/value head",
        ),
        ({"candidates": [SlidingWindowConfig(dilation=[1])], "per_head": True}, "2 key/value heads"),
        ({"runs": 0}, "at least one mapping"),
        ({"loss_of": "word"}, 'choose "token" or "text"'),
        ({"layers": [2]}, "layer 2 does not exist"),
        ({"data": [{"input_ids": torch.full((1, 1), 7)}]}, "loss on this text is nan"),
        ({"candidates": []}, "at least one candidate"),
        ({"candidates": ["block", "block"]}, "two candidates are called 'block'"),
        ({"candidates": ["blocks"]}, "Did you mean 'block'"),
        ({"budget": {"max_cost": 0.001, "cost": "flops"}}, "the cheapest mapping"),
        ({"budget": {"max_loss": 0.1, "max_cost": 0.5}}, "give either"),
        ({"budget": 0.1}, "budget = 0.1: give max_loss or max_cost"),
        ({"budget": {"max_loss": -1.0}}, "no number above 0"),
        ({"budget": {"max_loss": "2%"}}, "'2%' is no number above 0"),
        ({"data": ["a text"]}, "data holds a str: give a list of batches"),
        ({"budget": {"max_loss": 0.1, "cost": "money"}}, "choose one or more of time"),
        ({"budget": {"max_loss": 0.1, "cost": ()}}, "choose one or more of time"),
        ({"budget": {"max_cost": 0.001, "cost": ("flops", "state")}}, "dense attention's flops and state"),
    ],
)
def test_bad_input(change: dict, words: str) -> None:
    model, batches = sharpened()
    given = {"data": batches, "candidates": CANDIDATES, "budget": {"max_loss": 0.1, "cost": "flops"}} | change
    with pytest.raises(ValueError, match=words):
        select_variants(model, given.pop("data"), **given)
    assert type(model).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("per_head", [False, True])
def test_texts_of_one_row_are_chosen_for_as_rows_of_their_own(per_head: bool) -> None:
    model, _ = sharpened()
    ids = ZOO["llama"].inputs(2, 24)["input_ids"]
    labels = ids.clone()
    labels[:, 0] = -100
    rows = {"input_ids": ids, "labels": labels, "use_cache": False}
    packed = {"input_ids": ids.view(1, 48), "labels": labels.view(1, 48), "use_cache": False}
    packed["position_ids"] = torch.arange(24).repeat(2)[None]
    options = {"candidates": CANDIDATES, "budget": Budget(max_cost=0.8, cost="flops"), "per_head": per_head}
    one, two = (select_variants(model, [batch], **options) for batch in (rows, packed))
    assert (one.mapping, one.costs["flops"]) == (two.mapping, two.costs["flops"])
    assert one.dense_loss == pytest.approx(two.dense_loss, rel=1e-5)
    for a, b in zip(one.scores, two.scores, strict=True):
        assert (a.error, a.rise) == pytest.approx((b.error, b.rise), rel=1e-3, abs=1e-7)


def test_what_has_no_loss_or_no_state_is_refused() -> None:
    encoder, labelled = sharpened("bert")
    batches = [ZOO["bert"].inputs(2, 20)]
    assert "state" not in select_variants(encoder, labelled, candidates=["block"], budget={"max_loss": 1e3}).costs
    with pytest.raises(ValueError, match="does not predict the next token; give batches with `labels`"):
        select_variants(encoder, batches, candidates=["block"], budget=Budget(max_loss=0.1))
    with pytest.raises(ValueError, match="keeps no decoder state"):
        select_variants(encoder, batches, candidates=["block"], budget=Budget(max_loss=0.1, cost=("flops", "state")))
    with pytest.raises(ValueError, match=r"^BertForMaskedLM does not predict"):
        default_loss(patch_model(encoder, "block"), batches[0])


def test_a_loss_that_is_not_a_number_is_the_worst() -> None:
    """The narrow window costs least, and breaks: neither it nor a mapping with it is chosen."""
    model, batches = sharpened()

    def broken(model, batch):
        narrow = any(row.hyper_parameters.get("window") == 2 for row in describe(model))
        return default_loss(model, batch) * (math.nan if narrow else 1.0)

    found = select_variants(
        model, batches, candidates=CANDIDATES, budget=Budget(max_cost=0.95, cost="state"), loss=broken
    )
    assert math.isinf(found.uniform[0].measured) and "narrow" not in found.chosen.labels
    assert math.isfinite(found.chosen.measured)


def test_what_else_is_in_the_model_stays() -> None:
    """Beside mixtures of experts, which choosing neither removes nor resets."""
    model, batches = sharpened()
    patch_model(model, "moe", num_experts=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name or "router" in name:
                parameter.add_(0.01)
    state, before = model.state_dict(), default_loss(model, batches[0]).item()
    found = select_variants(model, batches, candidates=CANDIDATES, budget=Budget(max_cost=0.7, cost="state"))
    assert [row.variant for row in describe(model)] == [None, "moe"] * 2
    assert model.state_dict().keys() == state.keys() and default_loss(model, batches[0]).item() == before
    assert model.config.efficient_attention.keys() == {"0-1"}
    assert model(**batches[0], output_attentions=False) is not None
    patch_model(model, found.mapping)
    assert {row.variant for row in describe(model)} > {"moe"}
    unpatch_model(model)
    assert type(model).__name__ == "LlamaForCausalLM" and {row.variant for row in describe(model)} == {None}


@pytest.mark.parametrize("per_head", [False, True])
def test_candidates_that_read_the_layer_s_input(per_head: bool) -> None:
    model, batches = sharpened()
    candidates = ["mixture_of_depths", CANDIDATES[1]] if per_head else ["mixture_of_heads", "mixture_of_depths"]
    budget = Budget(max_cost=100.0, cost="flops")
    found = select_variants(model, batches, candidates=candidates, budget=budget, per_head=per_head)
    assert all(score.error > 0 and score.rise >= 0 for score in found.scores) and len(found.uniform) == 2


def test_state_is_counted_in_the_model_s_precision_and_of_layers_that_alternate() -> None:
    """A window of 8 with 4 sinks of 64 tokens; cluster_former keeps all tokens, and a label for each, in every other layer."""
    candidates = [
        "flash",
        ("window", SlidingWindowConfig(window=8, num_sinks=4)),
        ("clusters", ClusterFormerConfig(window=8, num_sinks=4, num_clusters=2)),
    ]
    shares = []
    for dtype in (torch.float32, torch.bfloat16):
        model, batches = ZOO["llama"].build().to(dtype), [ZOO["llama"].inputs(2, 64)]
        budget = {"max_loss": 1e3, "cost": "state"}
        before = torch.random.get_rng_state()
        shares.append(select_variants(model, batches, candidates=candidates, budget=budget).costs["state"])
        assert torch.equal(torch.random.get_rng_state(), before)
    assert shares[0]["flash"] == shares[1]["flash"] == 1
    assert shares[0]["window"] == shares[1]["window"] == pytest.approx(11 / 64)
    assert 0.5 < shares[0]["clusters"] < 0.7


def test_dense_is_chosen_where_nothing_is_saved() -> None:
    model, batches = sharpened()
    wide = [("all", SlidingWindowConfig(window=500, num_sinks=0))]
    found = select_variants(model, batches, candidates=wide, budget=Budget(max_loss=0.1, cost="state"))
    assert found.costs["state"]["all"] == 1 and found.mapping == {}


def test_a_budget_that_is_just_met() -> None:
    """The mean of three equal shares is this share, whatever their sum is rounded to."""
    model = ZOO["llama"].build(num_hidden_layers=3)
    narrow = [("n", SlidingWindowConfig(window=3, num_sinks=2))]
    batches = [{"input_ids": torch.randint(5, 50, (1, 40))}]
    budget = Budget(max_cost=0.1, cost="state")
    assert select_variants(model, batches, candidates=narrow, budget=budget).chosen.cost == pytest.approx(0.1)
