"""
Runs every variant on a device that is not the CPU (`other_device`) and on the CPU without kernels, and compares.

    python tests/on_other_device.py modules|long|models|tokens

Prints a line of JSON for each case: its name, and what went wrong or null.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator

os.environ["HF_EFFICIENT_ATTN_KERNELS"] = "0"

import other_device
import torch
from contract import Subject, decode, inputs, paddings, run
from other_device import elsewhere
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import DynamicCache, PreTrainedModel
from zoo import ZOO

from hf_efficient_attn import available_variants, patch_model, select_variants
from hf_efficient_attn.ops import grain
from hf_efficient_attn.ops.exact import exact_attention
from hf_efficient_attn.ops.rows import Texts
from hf_efficient_attn.recovery import attention_errors, attention_transfer
from hf_efficient_attn.registry import get_config_class, get_info

LENGTH = 1024
WINDOWED = ("block", "sliding_window", "transformer_xl", "infini", "hedgehog", "nystrom", "linformer")
# Operators that a layer may start, and numbers that it may wait for, where that is not 900 and 6. Linear maps compute chunks
# side by side.
MOST = {
    "linear": (120, 0),
    "performer": (190, 1),
    "rfa": (200, 0),
    "cosformer": (130, 0),
    "hedgehog": (550, 0),
    "mixture_of_heads": (800, 3),
}


def same(here: Tensor, there: Tensor, tolerance: float, what: str) -> None:
    assert there.device.type == other_device.NAME, f"{what}: on {there.device}"
    off = (here - there.cpu()).abs().max().item()
    assert off <= tolerance, f"{what}: off by {off:.3g}"


def module(name: str, causal: bool) -> None:
    """Values, gradients and generated tokens of the module alone."""
    subject = Subject(name, causal, oracle=name)
    here, there = subject.build(dtype=torch.float32), elsewhere(subject.build(dtype=torch.float32))
    index = torch.arange(29).div(10, rounding_mode="floor").expand(4, -1)
    for label in ("left", "packed"):
        here.train(label == "left")
        there.train(label == "left")
        given = [x.requires_grad_() for x in inputs(4, 29, dtype=torch.float32)]
        moved = [elsewhere(x).requires_grad_() for x in given]
        rows = None if label == "packed" else paddings(29)[label]
        ours, theirs = (Texts.of(index), Texts.of(elsewhere(index))) if label == "packed" else (rows, elsewhere(rows))
        one, two = run(here, *given, padding=ours), run(there, *moved, padding=theirs)
        same(one, two, 1e-4, f"{label}: output")
        weight = torch.randn(one.shape)
        (one * weight).sum().backward()
        (two * elsewhere(weight)).sum().backward()
        for i in range(3):
            same(given[i].grad, moved[i].grad, 1e-3, f"{label}: gradient {i}")
        for (what, p), q in zip(here.named_parameters(), there.parameters(), strict=True):
            if p.grad is not None:
                same(p.grad, q.grad, 1e-3, f"{label}: gradient of {what}")
        if causal and label != "packed":
            splits = (9, *[1] * 12, 8)
            with torch.no_grad():
                one, two = decode(here, given, splits, rows), decode(there, moved, splits, elsewhere(rows))
            same(one, two, 1e-4, "calls of several lengths")


def long(name: str, causal: bool) -> None:
    """Default sizes: values, gradients, and how many operators a forward and a backward pass have to start."""
    subject = Subject(name, causal, oracle=name)
    options = get_config_class(name).options()
    config = get_config_class(name)(**({"max_length": LENGTH} if "max_length" in options else {}))
    here, there = subject.build(config, dtype=torch.float32), elsewhere(subject.build(config, dtype=torch.float32))
    given = [x.requires_grad_() for x in inputs(1, LENGTH, dtype=torch.float32)]
    moved = [elsewhere(x).requires_grad_() for x in given]
    weight = torch.randn(given[0].shape)
    (run(here, *given) * weight).sum().backward()
    with other_device.counting() as counts:
        output = run(there, *moved)
        (output * elsewhere(weight)).sum().backward()
    same(run(here, *given), output, 1e-4, "output")
    for i in range(3):
        same(given[i].grad, moved[i].grad, 1e-3, f"gradient {i}")
    started, waited = MOST.get(name, (900, 6))
    assert counts["started"] <= started, f"{counts['started']} operators are started"
    assert counts["waited for"] <= waited, f"{counts['waited for']} numbers are waited for"


def small_steps() -> None:
    """As on a CPU."""
    grain.STARTED = 0
    try:
        long("hedgehog", False)
    finally:
        grain.STARTED = 2**22


def model(name: str, architecture: str) -> None:
    """A model that is moved when it is patched, and one that is patched when it is moved."""
    tiny = ZOO[architecture]
    given = tiny.inputs(2, 20, "right" if architecture == "bert" else "left")
    moved = {key: elsewhere(x) for key, x in given.items()}
    here, there = patch_model(tiny.build(), name), elsewhere(patch_model(tiny.build(), name))
    patched_there = patch_model(elsewhere(tiny.build()), name)
    for x in (*patched_there.parameters(), *patched_there.buffers()):
        assert x.device.type == other_device.NAME, "what a variant brings is on another device than the model"
    loss = here.train()(**given, labels=given["input_ids"]).loss
    for one in (there.train(), patched_there.train()):
        found = one(**moved, labels=moved["input_ids"]).loss
        same(loss, found, 1e-3, "loss")
        found.backward()
    here.eval(), there.eval()
    if name != "moe":
        errors = [[x.error for x in attention_errors(*pair)] for pair in ((here, [given]), (there, [moved]))]
        assert max(abs(x - y) for x, y in zip(*errors, strict=True)) < 1e-3, "errors of attention transfer"
    if (name, architecture) == ("flash", "llama"):  # once
        options = {"candidates": ["block", "hedgehog", "topk_blocks"], "budget": {"max_cost": 2, "cost": "time"}}
        scores = [
            select_variants(elsewhere(tiny.build()), [moved], **options),
            select_variants(tiny.build(), [given], **options),
        ]
        for x, y in zip(*(found.scores for found in scores), strict=True):
            assert abs(x.rise - y.rise) < 1e-3, "choice"
    if architecture == "llama":
        for options in ({}, {"num_beams": 2}):
            options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1, **options}
            same(here.generate(**given, **options), there.generate(**moved, **options), 0, f"generate {options}")


def spread(name: str, architecture: str) -> None:
    """A model whose second layer lies on the other device, as a `device_map` spreads models over several."""
    other_device.strict = True
    tiny, options = ZOO[architecture], {"layers": "1"} if name == "flash" else {}
    given = tiny.inputs(2, 20, "right" if architecture == "bert" else "left")
    model, alone = (patch_model(tiny.build(), name, **options).train() for _ in range(2))
    _spread(model, architecture)
    ours, theirs = (m(**given, labels=given["input_ids"]) for m in (alone, model))
    assert (ours.logits - theirs.logits).abs().max() < 1e-3
    assert (ours.loss - theirs.loss).abs() < 1e-3
    theirs.loss.backward()
    if name == "hedgehog":
        with attention_transfer(model) as transfer:
            model(**given)
            transfer.loss().backward()
        dense = tiny.build(), _spread(tiny.build(), architecture)
        labels = {"labels": given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)}
        options = {"candidates": ["block", "hedgehog"], "budget": {"max_cost": 2, "cost": "flops"}}
        ours, theirs = (select_variants(m, [given | labels], **options).scores for m in dense)
        assert all(abs(a.rise - b.rise) < 1e-3 for a, b in zip(ours, theirs, strict=True))
    if architecture == "llama":
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
        assert torch.equal(alone.eval().generate(**given, **options), model.eval().generate(**given, **options))
        packed = {"input_ids": given["input_ids"], "position_ids": torch.arange(20).remainder(11)[None]}
        ours, theirs = (m(**packed, use_cache=False).logits for m in (alone, model))
        assert (ours - theirs).abs().max() < 1e-3


def _spread(model: PreTrainedModel, architecture: str) -> PreTrainedModel:
    layer = model.model.layers[1] if architecture == "llama" else model.bert.encoder.layer[1]
    layer.register_forward_pre_hook(lambda _, args, kwargs: tree_map(_there, (args, kwargs)), with_kwargs=True)
    layer.register_forward_hook(lambda _, args, output: tree_map(lambda x: x.cpu(), output))
    elsewhere(layer)
    return model


def _there(x: object) -> object:
    return x.to(other_device.NAME) if isinstance(x, Tensor) else x


def tokens(name: str) -> None:
    """How many operators generated tokens have to start where rows have come unequally far."""
    tiny, started = ZOO["llama"], {}
    model = elsewhere(patch_model(tiny.build(), get_config_class(name).tiny(True)))
    for pad in ("none", "left"):
        given, cache = tiny.inputs(2, 48, pad), DynamicCache()
        ids, mask = elsewhere(given["input_ids"]), elsewhere(given["attention_mask"])

        def read(begin: int, end: int, ids=ids, mask=mask, cache=cache) -> None:
            model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache)

        with torch.no_grad():
            read(0, 40)
            read(40, 41)
            with other_device.counting() as counts:
                for n in range(41, 48):
                    read(n, n + 1)
        started[pad] = counts["started"]
    assert started["left"] <= 1.55 * started["none"], f"{started} operators are started"


def fault() -> None:
    """A mask on the wrong device."""
    x = elsewhere(torch.randn(1, 2, 5, 8))
    exact_attention(x, x, x, lengths=torch.tensor([3]), scaling=1.0, causal=False)


def cases(part: str) -> Iterator[tuple[str, object]]:
    if part == "models":
        for name in available_variants():
            for architecture in ("bert", "llama"):
                yield f"{name}, {architecture}", lambda n=name, a=architecture: model(n, a)
        # Last, since they are strict.
        for name in ("flash", "hedgehog", "mixture_of_heads", "moe"):
            for architecture in ("bert", "llama"):
                yield f"{name}, spread {architecture}", lambda n=name, a=architecture: spread(n, a)
        return
    if part == "tokens":
        yield from ((name, lambda n=name: tokens(n)) for name in WINDOWED)
        return
    if part == "long":
        yield "small steps", small_steps
    else:
        yield "fault", fault
    case = long if part == "long" else module
    for name in available_variants():
        for causal in (False, True) if get_info(name).module_class.kind == "attention" else ():
            yield f"{name}, {'decoder' if causal else 'encoder'}", lambda n=name, c=causal: case(n, c)


def main(part: str) -> None:
    other_device.begin()
    for name, case in cases(part):
        torch.manual_seed(0)
        try:
            case()
            error = None
        except Exception as caught:
            error = f"{type(caught).__name__}: {caught}"
        print(json.dumps([name, error]), flush=True)
    os._exit(0)  # PyTorch's thread for the device's gradients does not end by itself


if __name__ == "__main__":
    main(sys.argv[1])
