"""
How is one run trained and evaluated? An Accelerate loop that goes on, bit for bit, from where a checkpoint left it.

Nothing about a step depends on how it was reached: the data of step s follow from the seed
(`examples.data.Schedule`), the learning rate from s, and the rest (weights, optimizer, random states, loss scale) is
in the checkpoint.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, Dataset, Subset

from examples.objective import Objective, scores

Advance = Callable[[int, str], None]  # steps done since the last call, a word on how it goes


# share of the steps after the warm-up that are still to come -> share of the highest rate
SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda rest: rest,
    "cosine": lambda rest: math.sin(math.pi / 2 * rest) ** 2,
    "constant": lambda rest: 1.0,
}


class Diverged(RuntimeError):
    """The loss is no longer a finite number."""


@dataclass(frozen=True)
class Recipe:
    """How long and how hard to train. A step is one update of the weights, over all processes and accumulated micro-batches."""

    steps: int
    batch_size: int
    accumulation: int
    learning_rate: float
    weight_decay: float
    warmup: float
    max_grad_norm: float
    seed: int
    checkpoint_every: int
    schedule: str = "linear"

    def rate(self, step: int) -> float:
        """
        The learning rate of step 0, 1, ...: up over the warm-up share, then down to zero after the last step, linearly or as
        half a cosine, or not down at all ("constant").
        """
        warm = max(1, round(self.warmup * self.steps))
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        return self.learning_rate * SCHEDULES[self.schedule]((self.steps - step) / max(1, self.steps - warm))

    def examples(self, processes: int) -> int:
        """How many examples the whole training sees."""
        return self.steps * self.batch_size * self.accumulation * processes


@dataclass
class Progress:
    """
    How far a run is: what a checkpoint keeps beside the weights, and what the report says of training. `tokens` are those of
    texts, over all processes, without padding.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)


def train(
    accelerator: Accelerator,
    objective: Objective,
    schedule: Dataset,
    collate: Callable,
    recipe: Recipe,
    folder: Path,
    fingerprint: dict,
    advance: Advance,
    log: Callable[[dict[str, float], int], None],
) -> Progress:
    """
    Trains the objective's model in place, from the folder's checkpoint where there is one.

    Args:
        schedule: as many examples as `recipe.examples` says, in their order.
        folder: where the checkpoint of this run lies while it runs.
        fingerprint: what a checkpoint must have been made with to be continued.
        advance, log: told of progress and of the loss of each step.

    Raises:
        Diverged: the loss of a step is not finite.
        ValueError: the folder's checkpoint is unreadable or another run's.
    """
    accelerator.free_memory()  # what was prepared before, as a transfer, is no part of this run or of its checkpoints
    accelerator.gradient_accumulation_steps = recipe.accumulation
    set_seed(recipe.seed, device_specific=accelerator.num_processes > 1)
    groups = objective.parameter_groups()
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = adamw(groups, recipe.learning_rate, recipe.weight_decay)
    wrapped, optimizer = accelerator.prepare(objective, optimizer)
    progress = _restore(accelerator, folder, fingerprint)
    advance(progress.step, "")
    done = progress.step * recipe.batch_size * recipe.accumulation * accelerator.num_processes
    rest = Subset(schedule, range(done, len(schedule)))
    own = torch.Generator()  # or the loader would draw from the global generator, once for each time training begins
    loader = accelerator.prepare(DataLoader(rest, recipe.batch_size, shuffle=False, collate_fn=collate, generator=own))
    wrapped.train()
    start, earlier, summed = time.perf_counter(), progress.seconds, 0.0
    for batch in loader:
        with accelerator.accumulate(wrapped):
            rate = recipe.rate(progress.step)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            loss = wrapped(batch)["loss"]
            summed += accelerator.gather(loss.detach()).mean().item() / recipe.accumulation
            accelerator.backward(loss)
            read = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum()
            progress.tokens += int(accelerator.gather(read).sum())
            if not accelerator.sync_gradients:
                continue
            if not math.isfinite(summed):
                raise Diverged(f"the loss became {summed} at step {progress.step + 1}")
            if recipe.max_grad_norm:
                accelerator.clip_grad_norm_(parameters, recipe.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.losses.append(summed)
        progress.seconds = earlier + time.perf_counter() - start
        log({"loss": summed, "learning_rate": rate}, progress.step)
        advance(1, f"loss {summed:.3f}")
        summed = 0.0
        due = recipe.checkpoint_every and progress.step % recipe.checkpoint_every == 0 and progress.step < recipe.steps
        if due and all(bool(p.isfinite().all()) for p in parameters):  # else the last good one stays
            _save(accelerator, folder, fingerprint, progress)
    return progress


def adamw(parameters: list, rate: float, decay: float = 0.0) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) in one fused kernel, without temporary copies of all weights."""
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, fused=True)


@torch.no_grad()
def evaluate_objective(
    accelerator: Accelerator,
    objective: Objective,
    examples: Dataset,
    collate: Callable,
    batch_size: int,
    advance: Advance,
) -> dict[str, float]:
    """The task's metrics over all examples, gathered from all processes."""
    wrapped = objective.to(accelerator.device)
    loader = accelerator.prepare(DataLoader(examples, batch_size, shuffle=False, collate_fn=collate))
    training = wrapped.training
    wrapped.eval()
    parts = []
    for batch in loader:
        with accelerator.autocast():
            figures = wrapped(batch)
        figures.pop("loss")
        parts.append({name: tensor.cpu() for name, tensor in accelerator.gather_for_metrics(figures).items()})
        advance(1, "")
    wrapped.train(training)
    return scores(objective.task, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def checkpoint_folder(folder: Path) -> Path:
    """Where a run's checkpoint lies."""
    return folder / "checkpoint"


def _save(accelerator: Accelerator, folder: Path, fingerprint: dict, progress: Progress) -> None:
    """Writes beside the old checkpoint and swaps, so that a crash while writing leaves one that works."""
    target, fresh = checkpoint_folder(folder), folder / "checkpoint.new"
    accelerator.save_state(str(fresh), safe_serialization=False)  # keeps tied weights tied
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        state = {"fingerprint": fingerprint, "progress": asdict(progress)}
        (fresh / "progress.json").write_text(json.dumps(state), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)
    accelerator.wait_for_everyone()


def _restore(accelerator: Accelerator, folder: Path, fingerprint: dict) -> Progress:
    checkpoint = checkpoint_folder(folder)
    if not checkpoint.exists():
        return Progress()
    try:
        state = json.loads((checkpoint / "progress.json").read_text(encoding="utf-8"))
        saved, progress = state["fingerprint"], Progress(**state["progress"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{checkpoint} is no checkpoint of this program ({error}); remove it to start this run anew."
        ) from error
    differing = sorted(key for key in saved.keys() | fingerprint.keys() if saved.get(key) != fingerprint.get(key))
    if differing:
        raise ValueError(
            f"{checkpoint} belongs to another run: {', '.join(differing)} differ. Remove it to start this run anew."
        )
    try:
        accelerator.load_state(str(checkpoint))
    except Exception as error:  # whatever unreadable bytes make the readers of four formats raise
        raise ValueError(f"{checkpoint} is damaged ({error}); remove it to start this run anew.") from error
    return progress
