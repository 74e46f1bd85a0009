"""Any architecture that Transformers dispatches through its attention interface patches or raises; none stays dense."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import transformers
from architectures import build, classify, dispatching, gap, make_inputs, outputs, stayed_dense
from conftest import DeprecationRecorder

from hf_efficient_attn import patch_model
from hf_efficient_attn.dispatch import PatchedForward

EXACT = ("albert", "clip_text_model", "cohere", "gemma", "layoutlm", "m2m_100", "opt", "qwen2_moe", "vit", "whisper")
REFUSED = ("t5", "gpt_oss", "deepseek_v3", "mt5")
RAISED = ("git", "doge")


@pytest.fixture(autouse=True)
def models_may_warn_about_themselves(deprecations: DeprecationRecorder):
    """Shrunken configs and old models make Transformers log; what it calls deprecated there is not our use of it."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)
    deprecations.messages.clear()


@pytest.mark.parametrize("name", EXACT)
def test_patches_exactly(name: str):
    outcome = classify(name)
    assert outcome.kind == "equal", outcome


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused(name: str):
    outcome = classify(name)
    assert outcome.kind == "refused", outcome


@pytest.mark.parametrize("name", RAISED)
def test_raises_when_called(name: str):
    outcome = classify(name)
    assert outcome.kind == "raised", outcome


@pytest.mark.parametrize("name", EXACT)
def test_a_sparse_variant_changes_every_architecture(name: str):
    """The control: what is compared above does depend on attention."""
    model = build(name)
    inputs = make_inputs(model, "none")
    dense = outputs(model, inputs)
    patch_model(model, "sliding_window", window=1, num_sinks=0)
    assert gap(dense, outputs(model, inputs)) > 1e-3


def test_a_layer_that_stays_dense_is_noticed():
    model = patch_model(build("bert"), "flash")
    inputs = make_inputs(model, "none")
    assert stayed_dense(model, lambda: outputs(model, inputs)) == []
    layer = next(module for module in model.modules() if isinstance(module, PatchedForward))
    layer.forward = lambda hidden_states, *args, **kwargs: (torch.zeros_like(hidden_states), None)
    assert len(stayed_dense(model, lambda: outputs(model, inputs))) == 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_architecture_patches_or_raises():
    outcomes = [classify(name) for name in dispatching()]
    counts = Counter(outcome.kind for outcome in outcomes)
    print(dict(counts), *(o for o in outcomes if o.kind not in ("equal", "refused")), sep="\n")
    assert [outcome for outcome in outcomes if outcome.kind == "wrong"] == []
    assert counts["equal"] >= 200
    assert counts["equal"] + counts["refused"] + counts["raised"] >= 280
