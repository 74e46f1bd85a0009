"""
Perplexity of a pretrained causal language model on long texts, dense and with each variant swapped in and nothing
trained.

    python -m examples.perplexity --model smollm2 --texts book.txt.gz --lengths 2048 8192 \\
        --variants sliding_window topk_blocks --output results.json

Each text gives its first `--windows` stretches of `length` tokens. For every length and variant: perplexity, its rise
over dense in per cent, and over those of dense in the same run the peak memory, the most bytes in the cache, and the seconds,
which dense and the variant take in turns. The file is written after every row, and rows that it holds already are not
computed again.
"""

from __future__ import annotations

import argparse
import gzip
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache

from examples.embedded import MODELS, topics_text
from examples.models import source
from examples.rows import (
    Help,
    add_row,
    check_counts,
    open_results,
    read_variants,
    run_program,
    seconds_ratio,
    show,
    swapped,
)
from hf_efficient_attn import available_variants
from hf_efficient_attn.dispatch import CHILD
from hf_efficient_attn.hosts import base_model, find_hosts, learned_positions
from hf_efficient_attn.losses import causal_lm_losses
from hf_efficient_attn.measuring import cache_bytes, peak_memory, state_bytes


def load(name: str, longest: int = 0) -> tuple[torch.nn.Module, object]:
    """
    An embedded model by name, or any that `from_pretrained` finds.

    Raises:
        ValueError: its learned positions end before `longest` tokens.
    """
    place, keywords = source(name)
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **keywords).eval()
    limit = learned_positions(base_model(model))
    if limit is not None and limit < longest:
        raise ValueError(
            f"{name} reads {limit} tokens at most, as its learned positions end there; {longest} are asked for. Give a "
            "smaller length, or save the model with more (hf_efficient_attn.extend_positions)."
        )
    return model, AutoTokenizer.from_pretrained(place, **keywords)


def read_text(path: str) -> str:
    if path == "topics":
        return topics_text()
    opener = gzip.open if path.endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8") as file:
        return file.read()


def stretches(tokenizer, texts: Sequence[str], length: int, windows: int) -> list[torch.Tensor]:
    """
    The first `windows` stretches of `length` tokens of every text, each (1, length).

    Raises:
        ValueError: a text is too short.
    """
    found = []
    for name in texts:
        ids = tokenizer(read_text(name), return_tensors="pt", verbose=False).input_ids
        if ids.shape[1] < length * windows:
            raise ValueError(
                f"{name} has {ids.shape[1]} tokens; {windows} stretches of {length} need {length * windows}."
            )
        found += list(ids[:, : length * windows].split(length, 1))
    return found


@torch.no_grad()
def read(model: torch.nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, Cache]:
    """The body's last hidden states, and the cache that it fills as at the start of `generate()`."""
    return model.base_model(ids, use_cache=True)[:2]


def largest_cache(model: torch.nn.Module, cache: Cache, length: int) -> int:
    """Bytes of a cache of that many tokens; of a patched layer the most that it holds while its last segment fills."""
    total = cache_bytes(cache)
    for host in find_hosts(base_model(model)):
        variant = getattr(host.module, CHILD, None)
        if variant is not None:
            total += state_bytes(variant, length) - cache.layers[host.shape.layer].nbytes
    return total


@torch.no_grad()
def measure(model: torch.nn.Module, parts: Sequence[torch.Tensor]) -> dict[str, float | int]:
    """
    `perplexity`, exp of the mean negative log-likelihood over all predicted tokens; the most bytes that reading one part
    held above the weights, and the most bytes that its cache holds.
    """
    total, tokens, peaks, caches = 0.0, 0, [], []
    for ids in parts:
        found = []
        peaks.append(peak_memory(lambda ids=ids, found=found: found.extend(read(model, ids)), ids.device))
        caches.append(largest_cache(model, found[1], ids.shape[1]))
        losses, counted = causal_lm_losses(model, ids, hidden=found[0], chunk_size=256)
        total, tokens = total + losses.sum().item(), tokens + int(counted.sum())
    return {"perplexity": math.exp(total / tokens), "peak_bytes": max(peaks), "cache_bytes": max(caches)}


def main(args: Sequence[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--model", default="smollm2", help=f"a Hub id, a folder, or one of: {', '.join(MODELS)}")
    parser.add_argument("--texts", nargs="+", default=["topics"], help="text files (also .gz), or 'topics'")
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048], help="tokens of a text")
    parser.add_argument("--windows", type=int, default=2, help="stretches of each text")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of dense and variant that are timed")
    parser.add_argument(
        "--variants",
        nargs="+",
        default=list(available_variants()),
        metavar="NAME|FILE",
        help="names, and YAML files label -> variant; by default every variant",
    )
    parser.add_argument("--output", type=Path, required=True, help="a JSON file; rows in it are kept")
    options = parser.parse_args(args)
    check_counts(options, lengths=2, windows=1, repeats=1)
    chosen = read_variants(options.variants)
    settings = {"model": options.model, "texts": [Path(t).name for t in options.texts], "windows": options.windows}
    results = open_results(options.output, settings, "examples.perplexity", args, chosen)
    model, tokenizer = load(options.model, max(options.lengths))
    for length in options.lengths:
        parts = stretches(tokenizer, options.texts, length, options.windows)
        for label, config in chosen.items():
            done = {(row["label"], row["length"]): row for row in results["rows"]}
            if (label, length) in done:
                continue
            row = {"label": label, "length": length, "config": config, "tokens": length * len(parts)}
            try:
                with swapped(model, config):
                    row |= measure(model, parts)
                first = parts[0]
                row["seconds_ratio"] = seconds_ratio(model, config, lambda: read(model, first), options.repeats)  # noqa: B023
            except Exception as error:  # a variant that fails is a row that says so
                row["error"] = f"{type(error).__name__}: {error}"
            dense = done.get(("dense", length), row)
            if "perplexity" in row and "perplexity" in dense:
                row["rise_percent"] = 100 * (row["perplexity"] / dense["perplexity"] - 1)
                for cost in ("peak", "cache"):
                    row[f"{cost}_ratio"] = row[f"{cost}_bytes"] / dense[f"{cost}_bytes"]
            add_row(results, row, options.output)
    ratios = {"time": "{seconds_ratio:.2f}", "peak memory": "{peak_ratio:.2f}", "cache": "{cache_ratio:.2f}"}
    columns = {"perplexity": "{perplexity:.2f}", "rise": "{rise_percent:+.1f} %", **ratios}
    show(results, "untrained; time, memory and cache over those of dense", columns)
    return results


if __name__ == "__main__":
    run_program(main)
