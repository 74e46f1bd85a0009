"""
Each variant learns what attention is for, in a decoder of two layers from scratch, over texts several times its window:

    recall      pairs of a key and its value stand among noise; at the end keys are asked for, and their values answered,
    copying     symbols stand among noise; at the end the first, the second, ... of them are asked for.

What is asked of a variant follows from what it sees: the share of answers that change with what is asked for. Windows see
none of it, and must stay at chance. Who sees all symbols but cannot tell them apart is right in two of five answers at most,
which does not pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from zoo import ZOO

from hf_efficient_attn import available_variants, patch_model

LENGTH, FIRST, LAST, ASKED = 64, 4, 20, 20  # tokens; where symbols may stand; how many tokens at the end ask for one
SYMBOLS = 8  # that an answer chooses from
CHANCE, PASS = 1 / SYMBOLS, 0.6  # accuracy without knowledge; what of the rest, of what is seen, is asked
BATCH, RATE, SEED = 32, 5e-3, 0
STEPS = 600

OUT_OF_REACH = {
    "block": "a token sees its block and the sinks; blocks of two layers are the same blocks",
    "sliding_window": "two layers reach back two windows",
    "transformer_xl": "two layers reach back two segments and their memories",
    "compressive": "two layers reach back two memories, of which the compressed part is as bounded as the rest",
}
STRIDED = {"variant": "strided", "stride": 4, "local_size": 4}
# What the smallest configs would make needlessly hard.
SIZES: dict[str, dict[str, Any]] = {
    "big_bird": {"num_random_blocks": 4},
    "cluster_former": {"num_clusters": 2, "window": 16},
    "combined": {"parts": [[{"variant": "block", "block_size": 8}, 1], [STRIDED, 1]]},
    "lsh": {"num_hashes": 4},
    "mixture_of_depths": {"decay": 0.9},
    "performer": {"num_features": 64},
    "rfa": {"num_features": 128},
    "routing": {"num_clusters": 2, "window": 16},
    "sinkhorn": {"block_size": 16},
    "strided": {"stride": 4, "local_size": 4},
}
# Of a variant's own parameters, times RATE; else 10.
OWN_RATE = {"infini": 40.0, "mixture_of_depths": 0.2, "rfa": 1.0, "sinkhorn": 1.0}


@dataclass(frozen=True)
class Texts:
    """tokens (B, N), of which the last n ask for the answers (B, n); place (B, n): where what is asked for stands."""

    tokens: Tensor
    answers: Tensor
    place: Tensor


def symbols(generator: torch.Generator, batch: int, n: int) -> tuple[Tensor, Tensor]:
    """(B, n): different places in random order, and symbols."""
    place = FIRST + torch.rand(batch, LAST - FIRST, generator=generator).argsort(1)[:, :n]
    return place, torch.randint(SYMBOLS, (batch, n), generator=generator)


def asked(generator: torch.Generator, tokens: Tensor, place: Tensor, values: Tensor) -> Texts:
    """Token 1 + i asks for symbol i."""
    which = torch.randint(place.shape[1], (len(tokens), ASKED), generator=generator)
    tokens[:, -ASKED:] = 1 + which
    return Texts(tokens, values.gather(1, which), place.gather(1, which))


def recall(generator: torch.Generator, batch: int, keys: int = 4) -> Texts:
    """Each pair of a key and a value is a token of its own."""
    place, values = symbols(generator, batch, keys)
    tokens = torch.zeros(batch, LENGTH, dtype=torch.int64)
    tokens.scatter_(1, place, 1 + keys + SYMBOLS * torch.arange(keys) + values)
    return asked(generator, tokens, place, values)


def copying(generator: torch.Generator, batch: int, n: int = 3) -> Texts:
    place, values = symbols(generator, batch, n)
    place, tokens = place.sort(1).values, torch.zeros(batch, LENGTH, dtype=torch.int64)
    return asked(generator, tokens.scatter_(1, place, 1 + n + values), place, values)


TASKS: dict[str, Callable[[torch.Generator, int], Texts]] = {"recall": recall, "copying": copying}


def make_model(variant: str | None) -> PreTrainedModel:
    model = ZOO["gpt2"].build(SEED, initializer_range=0.2)
    if variant is not None:
        config = available_variants()[variant].config_class.tiny(True)
        patch_model(model, replace(config, **SIZES.get(variant, {})))
    return model


def answer(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """(B, n, SYMBOLS): the logits of the tokens that ask."""
    given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return model(**given, use_cache=False, logits_to_keep=ASKED).logits[..., -SYMBOLS:]


def train(model: PreTrainedModel, task: str, steps: int, own_rate: float, enough: float) -> None:
    """Ends where a tenth more than `enough` answers are right."""
    groups: list[dict[str, Any]] = [{"params": [], "peak": RATE}, {"params": [], "peak": own_rate * RATE}]
    for name, parameter in model.named_parameters():
        groups[".efficient_attn." in name]["params"].append(parameter)
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    generator, right = torch.Generator().manual_seed(SEED), 0.0
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * min(1, (step + 1) / 20) * (1 - 0.9 * step / steps)
        texts = TASKS[task](generator, BATCH)
        logits = answer(model, texts.tokens)
        optimizer.zero_grad()
        cross_entropy(logits.flatten(0, 1), texts.answers.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        right += 0.1 * ((logits.argmax(-1) == texts.answers).float().mean().item() - right)
        if right > enough + 0.1:
            break
    model.eval()


@torch.no_grad()
def accuracy(model: PreTrainedModel, task: str) -> float:
    texts = TASKS[task](torch.Generator().manual_seed(SEED + 1), 256)
    return (answer(model, texts.tokens).argmax(-1) == texts.answers).float().mean().item()


@torch.no_grad()
def seen(model: PreTrainedModel, task: str) -> float:
    """The share of answers that change when what they ask for is replaced by noise."""
    texts, changed = TASKS[task](torch.Generator().manual_seed(SEED + 1), 32), []
    before = answer(model, texts.tokens)
    for i in range(ASKED):
        without = answer(model, texts.tokens.scatter(1, texts.place[:, i : i + 1], 0))
        changed.append((without - before)[:, i].abs().amax(-1) > 0)
    return torch.stack(changed).float().mean().item()


def learns_what_it_sees(variant: str | None, task: str) -> None:
    model = make_model(variant)
    before = seen(model, task)
    needed = CHANCE + PASS * before * (1 - CHANCE)
    train(model, task, STEPS if before else 60, OWN_RATE.get(variant, 10.0), needed)
    share, reached = seen(model, task), accuracy(model, task)
    report = f"{variant}, {task}: sees {before:.3f}, {share:.3f} after training, answers {reached:.3f}"
    print(report)  # shown by pytest -rP
    if variant in OUT_OF_REACH:
        assert share == before == 0, f"{report}: it is not to see anything"
        assert abs(reached - CHANCE) < 0.05, report
    else:
        assert reached > needed, report


VARIANTS = available_variants("attention")


@pytest.mark.parametrize("task", TASKS)
def test_the_dense_model_learns(task: str) -> None:
    learns_what_it_sees(None, task)


@pytest.mark.parametrize("task", TASKS)
def test_an_untrained_model_knows_nothing(task: str) -> None:
    assert abs(accuracy(make_model(None), task) - CHANCE) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "task"), [(variant, task) for task in TASKS for variant in VARIANTS])
def test_each_variant_learns_what_it_sees(variant: str, task: str) -> None:
    learns_what_it_sees(variant, task)
