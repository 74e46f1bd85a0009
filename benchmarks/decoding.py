"""
What one generated token costs each decoder variant's attention, against a dense cache (Transformers' `DynamicCache`: append,
then PyTorch's SDPA), measured in the same run, turn by turn. Rows go into a CSV; a table is printed.

    python -m benchmarks.decoding --lengths 2048 8192 --repeats 9 --output results/decoding_cpu.csv

The columns are those of benchmarks/attention.py. Metrics: token_speedup (times the dense cache's speed, one token after
`length` others, batch 1) and state_ratio (bytes of the state over those of the dense cache, the most while a segment fills).
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import DynamicLayer

from benchmarks.attention import HEAD_DIM, HEADS, comparable_config, described, write
from hf_efficient_attn import HostShape, available_variants, measuring
from hf_efficient_attn.registry import build
from hf_efficient_attn.variant import EfficientAttention

TOKENS = 32  # of a timed call


def tokens(length: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query, key, value (1, H, N, D) and hidden (1, N, E)."""
    generator = torch.Generator(device).manual_seed(0)
    query, key, value = (torch.randn(1, HEADS, length, HEAD_DIM, device=device, generator=generator) for _ in range(3))
    return query, key, value, query.transpose(1, 2).flatten(2)


@torch.no_grad()
def decoding(module: EfficientAttention | None, length: int, device: str) -> Callable[[], None]:
    """A call that adds `TOKENS` tokens, one by one, behind those that were read before; dense where there is no module."""
    cache = DynamicLayer() if module is None else module.make_state()
    query, key, value, hidden = tokens(length, device)
    cache.update(key, value)
    options = {"scaling": HEAD_DIM**-0.5, "causal": True}
    if module is not None:
        extra = {"hidden": hidden} if module.needs_hidden else {}
        module(query, key, value, state=cache, **options, **extra)
    query, key, value, hidden = tokens(TOKENS, device)

    @torch.no_grad()
    def run() -> None:
        for i in range(TOKENS):
            q, k, v = (x[:, :, i : i + 1] for x in (query, key, value))
            keys, values = cache.update(k, v)
            if module is None:
                scaled_dot_product_attention(q, keys, values)
            else:
                extra = {"hidden": hidden[:, i : i + 1]} if module.needs_hidden else {}
                module(q, k, v, state=cache, **options, **extra)

    return run


def measure(name: str, lengths: Sequence[int], repeats: int, device: str) -> list[dict]:
    config = comparable_config(name, max(lengths) + (repeats + 2) * TOKENS)
    module = build(config, HostShape(HEADS, HEADS, HEAD_DIM, HEADS * HEAD_DIM, True)).to(device).eval()
    rows = []
    for length in lengths:
        dense, ours = decoding(None, length, device), decoding(module, length, device)
        ratio = measuring.time_ratio(dense, ours, repeats=repeats, device=device)
        held = measuring.state_bytes(module, length) / (2 * HEADS * length * HEAD_DIM * 4)
        common = described(name, "decoding", config, device, torch.float32) | {"length": length}
        found = {"value": ratio.ratio, "low": ratio.low, "high": ratio.high}
        rows.append({**common, "metric": "token_speedup", "unit": "times a dense cache", **found})
        rows.append(
            {**common, "metric": "state_ratio", "unit": "of a dense cache", "value": held, "low": None, "high": None}
        )
    return rows


def keep_memory() -> None:
    """
    Has glibc keep what is freed: what a dense cache takes for a token, which copies it, varies several times over where this
    memory is paged in anew.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            mallopt(option, 2**30)


def main(args: Sequence[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=list(available_variants("attention")), metavar="NAME")
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 8192], metavar="N")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch; further ones do little for a single token")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="CSV to write; an existing file is not overwritten")
    options = parser.parse_args(args)
    torch.set_num_threads(options.threads)
    if options.output and options.output.exists():
        parser.error(f"{options.output} exists; give another name or remove it.")
    lengths, rows = sorted(options.lengths), []
    table = Table("variant", *(f"N = {n}" for n in lengths), title="one token, times a dense cache's speed (state)")
    for name in options.variants:
        own = measure(name, lengths, options.repeats, options.device)
        rows += own
        found = {(row["metric"], row["length"]): row["value"] for row in own}
        cells = [f"{found['token_speedup', n]:.2f}x ({found['state_ratio', n]:.2f})" for n in lengths]
        table.add_row(name, *cells)
        print(f"measured {name}", *cells, flush=True)
    Console(width=100).print(table)
    if options.output:
        write(rows, options.output)
    return rows


if __name__ == "__main__":
    keep_memory()
    main()
