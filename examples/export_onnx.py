"""
What does an encoder cost on a device that has no PyTorch? Its ONNX form, run by ONNX Runtime, by variant.

    python -m examples.export_onnx --model minilm --length 2048 --variants sliding_window linformer --output results.json

Everything is exported for one text of `--length` tokens and a mask (`torch.onnx.export`), untrained; learned positions are
extended if they end before. For every variant, over those of dense in the same run: the seconds of a run, in turns, and the
bytes that it takes beyond the loaded model, in a process of its own (on Linux); and `apart`, by how much its embedding (the
mean over tokens, of length 1) differs from PyTorch's, at most: more than 1e-4 is an error. `--keep DIR` leaves the files
`LABEL.onnx` there. Needs onnxscript and onnxruntime. The results are written after every row, and rows that they hold already
are not computed again.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.embeddings import open_encoder
from examples.rows import Help, add_row, check_counts, open_results, read_variants, run_program, show, swapped
from hf_efficient_attn.measuring import time_ratio

NAMES = ("input_ids", "attention_mask")
CLOSE = 1e-4  # of embeddings of length 1

# Run by a Python that has loaded nothing else: the peak of a run beyond the loaded model, in KiB; Linux can set peaks back.
PEAK = """
import ctypes, sys
from pathlib import Path
import numpy, onnxruntime
def status(name):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith(name))
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(sys.argv[3])
session = onnxruntime.InferenceSession(sys.argv[1], options)
given = dict(numpy.load(sys.argv[2]))
ctypes.CDLL(None).malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")
loaded = status("VmRSS")
session.run(None, given)
print(status("VmHWM") - loaded)
"""


class Embedder(nn.Module):
    """Tokens and a mask in, the embedding (1, width) of the text out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mean = (hidden * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)
        return nn.functional.normalize(mean, dim=-1)


def open_session(file: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(file, options)


def bytes_of_a_run(file: Path, given: Path, threads: int) -> int:
    """What a run takes beyond the loaded model, in a process of its own."""
    call = [sys.executable, "-c", PEAK, str(file), str(given), str(threads)]
    return 1024 * int(subprocess.run(call, check=True, capture_output=True, text=True).stdout)


@torch.no_grad()
def measure(model: nn.Module, config: dict | None, texts: list[tuple[Tensor, Tensor]], file: Path, options) -> dict:
    """A row's figures; the file is written. texts: what it is exported with, and others that the results are compared on."""
    import numpy as np

    with swapped(model, config):
        embedder = Embedder(model).eval()
        torch.onnx.export(embedder, texts[0], file, dynamo=True, input_names=NAMES, verbose=False, external_data=False)
        session = open_session(file, options.threads)
        given = [dict(zip(NAMES, (x.numpy() for x in text), strict=True)) for text in texts]
        found = [torch.as_tensor(session.run(None, x)[0]) for x in given]
        apart = max((a - embedder(*text)).abs().max().item() for a, text in zip(found, texts, strict=True))
    if not apart < CLOSE:  # NaN is not
        raise ValueError(
            f"what was exported gives another embedding than PyTorch: {apart:.1e} apart, {CLOSE:.0e} allowed."
        )
    row = {"apart": apart, "file_bytes": file.stat().st_size}
    dense = open_session(file.with_name("dense.onnx"), options.threads)
    runs = [lambda s=s: s.run(None, given[0]) for s in (session, dense)]
    row["seconds_ratio"] = 1.0 if config is None else time_ratio(*runs, repeats=options.repeats).ratio
    np.savez(file.with_suffix(".npz"), **given[0])
    row["run_bytes"] = bytes_of_a_run(file, file.with_suffix(".npz"), options.threads)
    return row


def main(args: Sequence[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--model", default="minilm", help="an encoder: an embedded model, a Hub id or a folder")
    parser.add_argument("--length", type=int, default=2048, help="tokens of the text that the files are made for")
    parser.add_argument("--threads", type=int, default=1, help="of ONNX Runtime")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of dense and variant that are timed")
    parser.add_argument(
        "--variants", nargs="+", required=True, metavar="NAME|FILE", help="names, and YAML files label -> variant"
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where the ONNX files stay")
    parser.add_argument("--output", type=Path, required=True, help="a JSON file; rows in it are kept")
    options = parser.parse_args(args)
    check_counts(options, length=1, threads=1, repeats=1)
    settings = {name: getattr(options, name) for name in ("model", "length", "threads")}
    chosen = read_variants(options.variants)
    results = open_results(options.output, settings, "examples.export_onnx", args, chosen)
    done = {row["label"] for row in results["rows"]}
    model, _ = open_encoder(options.model, options.length)
    generator, size = torch.Generator().manual_seed(0), model.config.vocab_size
    ids = torch.randint(size // 10, size, (1, options.length), generator=generator)
    masks = torch.ones_like(ids), (torch.arange(options.length) < options.length * 3 // 4).long()[None]
    texts = [(ids, mask) for mask in masks]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for label, config in chosen.items():
            if label in done and label != "dense":
                continue
            row = {"label": label, "config": config}
            try:
                file = folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', label)}.onnx"
                row |= measure(model, config, texts, file, options)
            except Exception as error:  # a variant that fails is a row that says so
                reason = error.__cause__ or error  # the exporter's own message is that it failed
                row["error"] = f"{type(reason).__name__}: {reason}"[:500]
            if label in done:
                continue  # dense of an earlier run, whose file was not kept
            base = next((other for other in results["rows"] if other["label"] == "dense"), row)
            if "error" not in row and "error" not in base:
                row["run_ratio"] = row["run_bytes"] / max(base["run_bytes"], 1)
            add_row(results, row, options.output)
    title = "ONNX Runtime, untrained; time and memory of a run over those of dense"
    columns = {"time": "{seconds_ratio:.2f}", "memory of a run": "{run_ratio:.2f}", "MiB": "{mib:.0f}"}
    show(results, title, columns | {"apart": "{apart:.0e}"}, mib=lambda row: row["run_bytes"] / 2**20)
    return results


if __name__ == "__main__":
    run_program(main)
