"""
Speed and memory of every variant's attention alone, forward and backward, against PyTorch's SDPA of the same causality,
measured in the same run, turn by turn. One row per measurement goes into a CSV; a table is printed.

    python -m benchmarks.attention --lengths 1024 4096 --output results/attention_cpu.csv

Columns: variant, mode (encoder or decoder), metric, unit, length (tokens), value, low and high (20th and 80th percentile where
there are repeats), config (JSON), device, threads, dtype, time (UTC), torch.
Metrics: speedup (times SDPA's speed, forward and backward), forward_speedup, peak_ratio (peak bytes over SDPA's),
peak_bytes, flops_ratio (FLOPs over SDPA's), break_even (shortest measured length from which the variant is never slower).
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention

from hf_efficient_attn import HostShape, available_variants, measuring
from hf_efficient_attn.config import EfficientAttentionConfig
from hf_efficient_attn.registry import build, get_info

COLUMNS = ["variant", "mode", "metric", "unit", "length", "value", "low", "high", "config", "device", "threads"]
COLUMNS += ["dtype", "time", "torch"]
HEADS, HEAD_DIM = 12, 64


def comparable_config(name: str, longest: int) -> EfficientAttentionConfig:
    """The variant's defaults; a bound on the length is raised to the longest measured."""
    config_class = get_info(name).config_class
    return config_class(max_length=longest) if "max_length" in config_class.options() else config_class()


def attention(
    module: torch.nn.Module | None, causal: bool, length: int, backward: bool, device: str, dtype: torch.dtype
) -> Callable[[], None]:
    """One pass of a variant's module, or of SDPA where it is None."""
    options = {"device": device, "dtype": dtype, "generator": torch.Generator(device).manual_seed(0)}
    query, key, value = (torch.randn(1, HEADS, length, HEAD_DIM, **options, requires_grad=backward) for _ in range(3))
    hidden = torch.randn(1, length, HEADS * HEAD_DIM, **options) if getattr(module, "needs_hidden", False) else None

    def run() -> None:
        with torch.set_grad_enabled(backward):
            if module is None:
                output = scaled_dot_product_attention(query, key, value, is_causal=causal)
            else:
                output = module(query, key, value, scaling=HEAD_DIM**-0.5, causal=causal, hidden=hidden)
            if backward:
                output.sum().backward()
                query.grad = key.grad = value.grad = None

    return run


def described(name: str, mode: str, config: EfficientAttentionConfig, device: str, dtype: torch.dtype) -> dict:
    """The columns of a row that say what was measured, and on what."""
    return {
        "variant": name,
        "mode": mode,
        "config": json.dumps(config.to_dict()),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "torch": torch.__version__,
    }


def measure(
    name: str, causal: bool, lengths: Sequence[int], repeats: int, device: str, dtype: torch.dtype
) -> list[dict]:
    """All rows of one variant in one direction."""
    config = comparable_config(name, max(lengths))
    host = HostShape(HEADS, HEADS, HEAD_DIM, HEADS * HEAD_DIM, causal)
    module = build(config, host).to(device, dtype)
    common = described(name, "decoder" if causal else "encoder", config, device, dtype)
    rows, faster = [], {}

    def row(
        metric: str, unit: str, length: int, value: float, low: float | None = None, high: float | None = None
    ) -> None:
        rows.append(
            {**common, "metric": metric, "unit": unit, "length": length, "value": value, "low": low, "high": high}
        )

    for length in lengths:
        ours, dense = (attention(m, causal, length, True, device, dtype) for m in (module, None))
        ratio = measuring.time_ratio(dense, ours, repeats=repeats, device=device)
        faster[length] = ratio.ratio
        row("speedup", "times SDPA", length, ratio.ratio, ratio.low, ratio.high)
        forward = measuring.time_ratio(
            *(attention(m, causal, length, False, device, dtype) for m in (None, module)), repeats=repeats, device=device
        )  # fmt: skip
        row("forward_speedup", "times SDPA", length, forward.ratio, forward.low, forward.high)
        peaks = [measuring.peak_memory(step, device) for step in (ours, dense)]
        row("peak_bytes", "bytes", length, peaks[0])
        row("peak_ratio", "of SDPA", length, peaks[0] / peaks[1])
        row("flops_ratio", "of SDPA", length, measuring.count_flops(ours) / measuring.count_flops(dense))
    even = [n for n in lengths if all(faster[m] >= 1 for m in lengths if m >= n)]
    row("break_even", "tokens", max(lengths), even[0] if even else float("nan"))
    return rows


def show(rows: list[dict], lengths: Sequence[int]) -> None:
    table = Table(title="forward and backward, times SDPA's speed (peak bytes over SDPA's)")
    table.add_column("variant")
    table.add_column("mode")
    for length in lengths:
        table.add_column(f"N = {length}", justify="right")
    table.add_column("break-even", justify="right")
    for name, mode in dict.fromkeys((r["variant"], r["mode"]) for r in rows):
        own = {
            (r["metric"], int(r["length"])): float(r["value"])
            for r in rows
            if (r["variant"], r["mode"]) == (name, mode)
        }
        cells = [f"{own['speedup', n]:.2f}x ({own['peak_ratio', n]:.2f})" for n in lengths]
        table.add_row(name, mode, *cells, f"{own['break_even', max(lengths)]:.0f}")
    Console(width=120).print(table)


def write(rows: list[dict], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def main(args: Sequence[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=list(available_variants("attention")), metavar="NAME")
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 1024, 2048, 4096], metavar="N")
    parser.add_argument("--modes", nargs="+", choices=["encoder", "decoder"], default=["encoder", "decoder"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="CSV to write; an existing file is not overwritten")
    options = parser.parse_args(args)
    if options.output and options.output.exists():
        parser.error(f"{options.output} exists; give another name or remove it.")
    lengths = sorted(options.lengths)
    rows = []
    for name in options.variants:
        for mode in options.modes:
            rows += measure(
                name, mode == "decoder", lengths, options.repeats, options.device, getattr(torch, options.dtype)
            )
            print(f"measured {name} as {mode}", flush=True)
    show(rows, lengths)
    if options.output:
        write(rows, options.output)
    return rows


if __name__ == "__main__":
    main()
