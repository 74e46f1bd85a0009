"""
What does a run cost? Memory, time and FLOPs of one model, measured in a process of its own.

`python -m examples.cost` reads a job as JSON from its standard input and writes the result as the last line of its
standard output. One process measures one model, so that nothing an earlier model left behind (fragments, caches,
warmed kernels) is in the figures, and a model that runs out of memory takes nothing else with it.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


class CostFailed(RuntimeError):
    """The measuring process did not deliver; the message says why."""


def measure_in_own_process(job: dict[str, Any], timeout: float = 1800) -> dict[str, Any]:
    """
    Runs a job (see `measure`) in a fresh process.

    Raises:
        CostFailed: it raised, was killed (as for lack of memory), or took longer than `timeout` seconds.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in LAUNCHER and not name.startswith(("ACCELERATE_", "TORCHELASTIC_"))
    }
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        done = subprocess.run(
            [sys.executable, "-m", "examples.cost"],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            env=environment,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise CostFailed(f"measuring took longer than {timeout:.0f} s") from None
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise CostFailed(
            f"the measuring process was ended by {name}" + (": out of memory?" if name == "SIGKILL" else "")
        )
    if done.returncode:
        raise CostFailed((done.stderr.strip().splitlines() or ["the measuring process failed without a word"])[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """
    Job keys: `base` (folder), `task`, `patch`, `attention` ("sdpa" or "eager"), `batch_size`, `accumulation` (batches of
    that size in a step), `length`, `mixed_precision`, `gradient_checkpointing`, `lora_rank`, `lora_targets`, `bits`,
    `chunk_size`, `repeats`, `seed`, `device`. The batch is full: every row has `length` random tokens.

    Returns the fields of `hf_efficient_attn.measuring.ModelCost` and `process_peak_bytes`, the whole process's
    resident set as the operating system saw it (on a GPU, of the host).
    """
    import torch

    from examples.models import add_lora, fit_positions, install, open_base
    from examples.objective import Objective
    from examples.training import adamw
    from hf_efficient_attn.measuring import measure_model

    device = torch.device(job["device"])
    model = open_base(job["base"], job["task"], job["attention"], bits=job["bits"], device=device)
    fit_positions(model, job["length"], extend=True)
    added = install(model, job["patch"], job["seed"])
    if not job["bits"]:
        model.to(device)
    if job["gradient_checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    whole = add_lora(model, job["task"], job["lora_rank"], job["lora_targets"], added) if job["lora_rank"] else model
    shape = (job["batch_size"], job["length"])
    generator = torch.Generator().manual_seed(job["seed"])
    ids = torch.randint(model.config.vocab_size, shape, generator=generator)
    if model.config.pad_token_id is not None:
        ids[ids == model.config.pad_token_id] = (model.config.pad_token_id + 1) % model.config.vocab_size
    batch = {"input_ids": ids}
    if job["task"] == "classification":
        batch["attention_mask"] = torch.ones_like(ids)
        batch["labels"] = torch.zeros(shape[0], dtype=torch.long)
    elif job["task"] == "masked-lm":
        batch["labels"] = ids.clone()
        batch["labels"][torch.rand(shape, generator=generator) > 0.15] = -100
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    objective = Objective(whole, job["task"], job["chunk_size"]).to(device)
    precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(job["mixed_precision"])
    autocast = nullcontext if precision is None else lambda: torch.autocast(device.type, precision)
    cost = measure_model(
        whole,
        batch,
        loss=lambda: objective(batch)["loss"],
        optimizer=adamw([p for p in whole.parameters() if p.requires_grad], 1e-6),
        autocast=autocast,
        accumulation=job["accumulation"],
        repeats=job["repeats"],
        decodes=job["task"] == "causal-lm",
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return asdict(cost) | {"process_peak_bytes": peak}


if __name__ == "__main__":
    print(json.dumps(measure(json.load(sys.stdin))))
