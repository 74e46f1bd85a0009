"""
The command line: `hf-efficient-attn variants | options | measure | select | card`.

    hf-efficient-attn variants
    hf-efficient-attn measure gpt2 --variants sliding_window --variants topk_blocks --lengths 512 --lengths 1024
    hf-efficient-attn select gpt2 book.txt --length 1024 --candidates sliding_window --candidates block --max-loss 0.02
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel

from . import hub, measuring
from .hosts import learned_positions
from .patching import patch_model
from .positions import extend_positions
from .registry import available_variants, get_info
from .selection import Budget, Selection, select_variants

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Efficient attention for pretrained Transformers.")
console = Console()
app.command("card")(hub.main)

Model = Annotated[str, typer.Argument(help="a Hub id or a local folder")]
Masked = Annotated[
    bool, typer.Option("--masked-lm", help="the model is an encoder with a masked language modelling head")
]
Gguf = Annotated[str | None, typer.Option(help="the file in that folder, where the weights are in GGUF")]
Device = Annotated[str | None, typer.Option(help="where to run, such as cpu or cuda:1; the first GPU if there is one")]


@app.command()
def variants() -> None:
    """The registered variants: family, what a token attends to, paper."""
    table = Table("name", "family", "what it is", "paper")
    for info in available_variants().values():
        table.add_row(info.name, info.family, info.summary, info.paper)
    console.print(table)


@app.command()
def options(name: Annotated[str, typer.Argument(help="a variant's name")]) -> None:
    """The hyper-parameters of a variant, with their defaults."""
    config_class = _or_exit(lambda: get_info(name)).config_class
    table = Table("hyper-parameter", "default", "meaning", title=name)
    for field, meaning in config_class.options().items():
        table.add_row(field, escape(repr(getattr(config_class(), field))), escape(meaning))
    console.print(table)


@app.command()
def measure(
    model: Model,
    variants: Annotated[list[str], typer.Option(help="a variant's name; may be repeated")],
    lengths: Annotated[list[int], typer.Option(help="tokens of a text; may be repeated")],
    masked_lm: Masked = False,
    gguf_file: Gguf = None,
    device: Device = None,
    batch_size: Annotated[int, typer.Option(help="texts at a time", min=1)] = 1,
    repeats: Annotated[int, typer.Option(help="timed calls, of which the median counts", min=1)] = 3,
) -> None:
    """
    Time and peak memory of reading a text with each variant, as a share of dense attention's (PyTorch's SDPA) in the same
    run, and the length from which on it is faster: what to give as `dense_below`.
    """
    if min(lengths) < 1:
        _exit(f"--lengths {min(lengths)}: a text has at least one token.")
    for name in variants:
        _or_exit(lambda name=name: get_info(name))
    net = _or_exit(lambda: _load(model, masked_lm, max(lengths), gguf_file, device))
    table = Table("variant", *(f"{n:,} tokens: time, memory" for n in sorted(lengths)), "faster from")
    for name in variants:
        twin = copy.deepcopy(net, {id(weight): weight for weight in net.parameters()})  # the same weights beside it
        _or_exit(lambda name=name, twin=twin: patch_model(twin, name))
        cells, faster = [], {}
        for n in sorted(lengths):
            ids = torch.randint(net.config.vocab_size, (batch_size, n), generator=torch.Generator().manual_seed(0))
            read, ours = (_reader(which, ids.to(net.device)) for which in (net, twin))
            ratio = measuring.time_ratio(ours, read, repeats=repeats, device=net.device)
            peak = measuring.peak_memory(ours, net.device) / measuring.peak_memory(read, net.device)
            faster[n] = ratio.ratio < 1
            cells.append(f"{ratio.ratio:.2f}, {peak:.2f}")
        even = [n for n in faster if all(faster[m] for m in faster if m >= n)]
        table.add_row(name, *cells, f"{even[0]:,}" if even else "not within these lengths")
    console.print(table)


@app.command()
def select(
    model: Model,
    text: Annotated[
        Path, typer.Argument(help="a text file like what the model will read", exists=True, dir_okay=False)
    ],
    candidates: Annotated[list[str], typer.Option(help="a variant's name, or its config as JSON; may be repeated")],
    length: Annotated[int, typer.Option(help="tokens of a text", min=2)],
    texts: Annotated[int, typer.Option(help="how many stretches of that length to read", min=1)] = 4,
    max_loss: Annotated[
        float | None, typer.Option(help="at most this relative rise of perplexity, such as 0.02")
    ] = None,
    max_cost: Annotated[float | None, typer.Option(help="at most this share of dense attention's cost")] = None,
    cost: Annotated[list[str], typer.Option(help="time, memory, flops or state; the dearest counts if repeated")] = (
        "time",
    ),
    per_head: Annotated[
        bool, typer.Option("--per-head", help="choose for each key/value head, not for each layer")
    ] = False,
    masked_lm: Masked = False,
    gguf_file: Gguf = None,
    device: Device = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file for the mapping")] = None,
) -> None:
    """Find the mapping of layers to variants that meets a budget on your text, for `patch_model(model, mapping)`."""
    if output is not None and not output.parent.is_dir():
        _exit(f"--output {output}: there is no folder {output.parent}; make it first.")
    if output is not None and output.is_dir():
        _exit(f"--output {output}: a folder is there; give the name of a file.")
    choices = _or_exit(lambda: _candidates(candidates))
    budget = _or_exit(lambda: Budget(max_loss=max_loss, max_cost=max_cost, cost=cost))
    net = _or_exit(lambda: _load(model, masked_lm, length, gguf_file, device))
    tokenizer = _or_exit(lambda: AutoTokenizer.from_pretrained(model, **_gguf(gguf_file)))
    batches = _or_exit(lambda: _stretches(tokenizer, net, text, length, texts, masked_lm))
    found = _or_exit(lambda: select_variants(net, batches, candidates=choices, budget=budget, per_head=per_head))
    _show(found)
    if output is not None:
        mapping = {layers: config.to_dict() for layers, config in found.mapping.items()}
        output.write_text(json.dumps(mapping, indent=1) + "\n", encoding="utf-8")


def _show(found: Selection) -> None:
    table = Table(
        "layers",
        f"share of dense attention's {' and '.join(found.budget.costs)}",
        "predicted rise, %",
        "measured rise, %",
    )
    named = [("chosen", found.chosen)] + [(f"{point.labels[0]} in all", point) for point in found.uniform]
    for name, point in named:
        measured = "-" if point.measured is None else f"{100 * point.measured:+.2f}"
        table.add_row(escape(name), f"{point.cost:.3f}", f"{100 * point.predicted:+.2f}", measured)
    console.print(table)
    for layers, config in found.mapping.items():
        console.print(f"layers {layers}: {config.to_dict()}", markup=False)
    changed = {layer for layers in found.mapping for layer in layers.split(",")}
    kept = [layer for layer in dict.fromkeys(str(score.layer) for score in found.scores) if layer not in changed]
    if kept:
        console.print(f"layers {','.join(kept)}: dense")


def _load(model: str, masked_lm: bool, length: int, gguf_file: str | None, device: str | None) -> PreTrainedModel:
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {place}: not on this machine ({str(error).splitlines()[0]}).") from error
    auto = AutoModelForMaskedLM if masked_lm else AutoModelForCausalLM
    net = auto.from_pretrained(model, **_gguf(gguf_file)).eval().to(place)
    reach = learned_positions(net)
    if reach is not None and length > reach:
        console.print(f"{length:,} tokens are beyond the {reach:,} learned positions, which are repeated for this.")
        extend_positions(net, length)
    return net


def _gguf(file: str | None) -> dict[str, str]:
    return {} if file is None else {"gguf_file": file}


def _reader(net: PreTrainedModel, ids: torch.Tensor) -> Any:
    inputs = {} if "MaskedLM" in type(net).__name__ else {"use_cache": False, "logits_to_keep": 1}

    @torch.no_grad()
    def read() -> None:
        net(input_ids=ids, **inputs)

    return read


def _stretches(tokenizer, net, text: Path, length: int, count: int, masked_lm: bool) -> list[dict[str, torch.Tensor]]:
    ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids
    if ids.shape[1] < length:
        raise ValueError(
            f"{text} has {ids.shape[1]:,} tokens, fewer than the {length:,} asked for; give a longer text."
        )
    parts = [part.to(net.device) for part in ids.split(length, 1)[:count] if part.shape[1] == length]
    if not masked_lm:
        return [{"input_ids": part} for part in parts]
    generator = torch.Generator().manual_seed(0)
    batches = []
    for part in parts:
        hidden = (torch.rand(part.shape, generator=generator) < 0.15).to(part.device)
        labels = part.masked_fill(~hidden, -100)
        batches.append({"input_ids": part.masked_fill(hidden, tokenizer.mask_token_id), "labels": labels})
    return batches


def _candidates(texts: list[str]) -> list[Any]:
    """Variants' names and configs; a config goes by the JSON that says it where there are several of its variant."""
    choices = []
    for text in texts:
        try:
            choices.append(json.loads(text) if text.startswith("{") else text)
        except json.JSONDecodeError as error:
            raise ValueError(f"--candidates {text}: not JSON ({error}).") from error
    names = [choice.get("variant") if isinstance(choice, dict) else choice for choice in choices]
    return [
        (text, choice) if isinstance(choice, dict) and names.count(name) > 1 else choice
        for text, choice, name in zip(texts, choices, names, strict=True)
    ]


def _or_exit(function: Any) -> Any:
    """The function's result; its ValueError, or a file that is missing, becomes a sentence and an exit code."""
    try:
        return function()
    except (ValueError, OSError) as error:
        _exit(str(error), error)


def _exit(sentence: str, error: Exception | None = None) -> NoReturn:
    console.print(sentence, style="red", markup=False, highlight=False)
    raise typer.Exit(2) from error


def main() -> None:
    app()


if __name__ == "__main__":
    main()
