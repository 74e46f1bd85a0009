"""
What does another attention cost a pretrained model, and what does it save?

    python examples/finetune.py --preset demo
    python examples/finetune.py --model bert-base-uncased --dataset imdb --variants sliding_window linformer \\
        --max-length 512
    accelerate launch examples/finetune.py --model smollm2 --task causal-lm --variants variants.yaml --max-length 2048

Every variant is put into the same pretrained model, evaluated, fine-tuned with the same seed, steps and data as the
dense model, and evaluated again. Then the memory and time of all are measured one after the other, each in a process of
its own. examples/README.md documents the output.
"""

from __future__ import annotations

import gc
import json
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from accelerate import PartialState
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers.utils import logging as transformers_logging

from examples import models, report
from examples.cost import CostFailed, measure_in_own_process
from examples.data import Collator, Examples, Schedule
from examples.objective import Objective
from examples.options import parse
from examples.recover import TransferObjective, learning_layers, transfer_recipe
from examples.session import Session, broadcast, model_folder, rows_to_push, write_json
from examples.training import Diverged, Recipe, checkpoint_folder, evaluate_objective, train
from examples.variants import EAGER, RunSpec, read_runs
from hf_efficient_attn import describe
from hf_efficient_attn.recovery import attention_errors, attention_transfer, patched_layers

HALVINGS = 4  # of what a layer learned, before it is put back as a whole


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """
    Runs what the arguments ask for and returns the results, as results.json has them.

    Raises:
        ValueError, FileNotFoundError: something that was asked for cannot be; nothing has been written then.
    """
    command = ["examples/finetune.py", *(sys.argv[1:] if args is None else args)]
    args = parse(command[1:])
    if args.output_dir is None:
        PartialState(cpu=args.cpu)  # processes may begin in different seconds
        args.output_dir = broadcast(f"runs/{Path(args.model).name}-{args.task}-{time.strftime('%Y%m%d-%H%M%S')}")
    transformers_logging.disable_progress_bar()  # every run loads the base; its bars would break ours
    session = Session(args, read_runs(args.variants))
    runs = session.runs
    session.results["command"] = shlex.join(["python", *command])
    session.accelerator.init_trackers("hf_efficient_attn", config={k: str(v) for k, v in session.arguments.items()})
    finished = {row["label"] for row in session.results["rows"]}
    order = {EAGER: 0.5} | {run.label: place for place, run in enumerate(runs)}  # behind dense
    with progress_bars(enabled=session.accelerator.is_main_process and not args.quiet) as bars:
        overall = bars.add_task("all runs", total=len(runs), word="")
        if any(run.label not in finished for run in runs):
            warm_start(session, bars)
        for run in runs:
            if run.label not in finished:
                session.results["rows"].append(one_run(session, run, bars))
                session.results["rows"].sort(key=lambda row: order[row["label"]])
                session.save()
            bars.advance(overall)
        if not args.no_cost:
            measure_costs(session, bars)
    if session.accelerator.is_main_process:
        report.write(session.results, session.folder)
        report.print_table(session.results)
        print(f"in {session.folder}: {', '.join(sorted(file.name for file in session.folder.glob('*.*')))}")
        if args.push_to_hub:
            push(session)
        shutil.rmtree(session.base_folder, ignore_errors=True)
    session.accelerator.end_training()
    return session.results


def one_run(session: Session, run: RunSpec, bars: Progress) -> dict[str, Any]:
    """Evaluates, trains, evaluates again and measures one run. What goes wrong with it becomes its row's status."""
    row = empty_row(run)
    task = bars.add_task(run.label, total=None, word="")
    accelerator, args = session.accelerator, session.args
    model = objective = None
    try:
        model = models.open_base(session.base_folder, args.task, bits=args.bits, device=accelerator.device)
        added = models.install(model, run.patch, args.seed)
        row["layers"] = models.patched_layers(model)
        row["parameters_added"] = sum(p.numel() for name, p in model.named_parameters() if name in set(added))
        train_examples, eval_examples = session.examples(run.max_length or args.max_length)
        objective = Objective(model, args.task, args.loss_chunk)
        row["before"] = evaluate_run(session, objective, eval_examples, bars, task, f"{run.label}: before")
        if args.recover and run.kind == "variant":
            row["recovery"] = recover_run(session, run, model, train_examples, bars, task)
            row["recovered"] = evaluate_run(session, objective, eval_examples, bars, task, f"{run.label}: recovered")
        objective = fit_for_training(session, model, added)
        row["parameters_trained"] = sum(p.numel() for p in objective.parameters() if p.requires_grad)
        if session.recipe.steps:
            recipe = session.recipe_of(run)
            schedule = session.schedule(train_examples, recipe.examples(accelerator.num_processes), shuffle=True)
            row["training"] = train_run(session, run.label, run.folder, objective, schedule, recipe, bars, task)
            row["after"] = evaluate_run(session, objective, eval_examples, bars, task, f"{run.label}: after")
        if (args.save_models or args.push_to_hub) and run.kind != "control" and accelerator.is_main_process:
            keep = model_folder(session.folder, run.label)
            models.merged(objective.model).save_pretrained(keep)
            session.tokenizer.save_pretrained(keep)
    except Diverged as error:
        kept = checkpoint_folder(session.folder / run.folder)
        words = f"; its last checkpoint is {kept}" if kept.exists() else ""
        row["status"], row["error"] = "diverged", f"{error}{words}"
    except Exception as error:
        row["status"], row["error"] = "failed", f"{type(error).__name__}: {error}"
    finally:
        del model, objective
        accelerator.free_memory()
        gc.collect()
        bars.remove_task(task)
    if row["status"] != "diverged":
        shutil.rmtree(checkpoint_folder(session.folder / run.folder), ignore_errors=True)
    for kept in (session.folder / run.folder).glob("recovered-*.pt"):
        kept.unlink()
    return row


def recover_run(
    session: Session, run: RunSpec, model, examples: Examples, bars: Progress, task: TaskID
) -> dict[str, Any]:
    """
    Attention transfer, of all layers or block by block, or the word that there is nothing to train. Of a layer whose error
    rose half of the change is put back, up to `HALVINGS` times, and then all of it; layers of which one owns what all learn
    stay together, and their errors are added up. What a block learned is kept beside the run's checkpoint, so that a run
    which is continued does not learn it again.
    """
    args, folder = session.args, session.folder / run.folder
    groups = learning_layers(model)
    if not groups:
        return {"tokens": 0, "note": "its attention has no parameters to train", "errors": []}
    variants = {number: variant for number, _, variant in patched_layers(model)}
    probe = session.probe(examples)
    found = {
        "steps": 0,
        "tokens": 0,
        "seconds": 0.0,
        "losses": [],
        "errors_before": errors_of(model, probe),
        "shortened": [],
        "undone": [],
    }
    size = args.recover_blocks or len(groups)
    for begin in range(0, len(groups), size):
        chosen = groups[begin : begin + size]
        block = sorted(number for group in chosen for number in group)
        kept = folder / f"recovered-{block[0]}.pt"
        with attention_transfer(model, block) as transfer:
            if kept.exists():
                saved = torch.load(kept, weights_only=True)
                for number, state in saved["states"].items():
                    variants[number].load_state_dict(state)
            else:
                saved = {"training": transfer_block(session, run, model, transfer, block, examples, bars, task)}
                if session.accelerator.is_main_process:
                    folder.mkdir(parents=True, exist_ok=True)
                    states = {number: variants[number].state_dict() for number in block}
                    saved["states"] = {n: {name: x.cpu() for name, x in state.items()} for n, state in states.items()}
                    torch.save(saved, kept.with_suffix(".new"))  # whole before it has its name
                    kept.with_suffix(".new").replace(kept)
                    shutil.rmtree(folder / "transfer", ignore_errors=True)
            session.accelerator.wait_for_everyone()
        worse = shorter = worse_layers(chosen, found["errors_before"], errors_of(model, probe))
        for _ in range(HALVINGS):
            if worse:
                transfer.undo(worse, keep=0.5)
                worse = worse_layers(chosen, found["errors_before"], errors_of(model, probe))
        if worse:
            transfer.undo(worse)
        found["shortened"] += [number for number in shorter if number not in worse]
        found["undone"] += worse
        for name, value in saved["training"].items():
            found[name] += value
    return found | {"errors": errors_of(model, probe)}


def worse_layers(groups: list[list[int]], before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[int]:
    """Layers of the groups whose error rose, or is no number."""
    rise = {old["layer"]: new["error"] - old["error"] for old, new in zip(before, after, strict=True)}
    return [number for group in groups if not sum(rise[n] for n in group) <= 0 for number in group]


def errors_of(model, batches) -> list[dict[str, Any]]:
    """`attention_errors` as a row holds them."""
    return [vars(error) for error in attention_errors(model, batches)]


def transfer_block(
    session: Session, run: RunSpec, model, transfer, block: list[int], examples: Examples, bars: Progress, task: TaskID
) -> dict[str, Any]:
    """Trains some layers to give their dense attention."""
    args, processes = session.args, session.accelerator.num_processes
    length = run.max_length or args.max_length
    recipe = transfer_recipe(session.recipe_of(run), args.recover, length, processes, args.recover_learning_rate)
    schedule = session.schedule(examples, recipe.examples(processes), shuffle=True)
    words = f"{run.label}: transfer" + (f" from layer {block[0]}" if args.recover_blocks else "")
    objective = TransferObjective(model, transfer)
    return train_run(session, words, f"{run.folder}/transfer", objective, schedule, recipe, bars, task)


def warm_start(session: Session, bars: Progress) -> None:
    """Trains the dense base once, before all runs, for `--warm-start-steps`."""
    steps = session.args.warm_start_steps
    done = session.base_folder / "warm_start.json"
    if not steps or done.exists():
        return
    accelerator = session.accelerator
    changes = {"steps": steps, "seed": session.args.seed + 1, "learning_rate": session.args.warm_start_learning_rate}
    recipe = Recipe(**{**vars(session.recipe), **changes})
    task = bars.add_task("warm start", total=None, word="")
    model = models.open_base(session.base_folder, session.args.task)
    objective = Objective(model, session.args.task, session.args.loss_chunk)
    schedule = Schedule(
        session.examples(session.warm_length())[0],
        recipe.examples(accelerator.num_processes),
        recipe.seed,
        session.tokenizer,
        session.args.task == "masked-lm",
    )
    training = train_run(session, "warm start", "warm_start", objective, schedule, recipe, bars, task)
    if accelerator.is_main_process:
        fresh = session.folder / "base.new"
        model.save_pretrained(fresh)
        session.tokenizer.save_pretrained(fresh)
        write_json(fresh / "warm_start.json", training)
        shutil.rmtree(session.base_folder)
        fresh.rename(session.base_folder)
        shutil.rmtree(session.folder / "warm_start", ignore_errors=True)
    accelerator.free_memory()
    accelerator.wait_for_everyone()
    bars.remove_task(task)


def fit_for_training(session: Session, model, added: list[str]) -> Objective:
    """The model with gradient checkpointing and adapters as asked for, and its task's loss."""
    args = session.args
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if args.lora_rank:
        model = models.add_lora(model, args.task, args.lora_rank, args.lora_targets, added)
    patched = any(layer.variant for layer in describe(model))
    return Objective(model, args.task, args.loss_chunk, args.distill if patched else 0.0, args.layer_decay)


def train_run(session, label, folder, objective, schedule, recipe, bars: Progress, task: TaskID) -> dict[str, Any]:
    """Trains and returns the row's `training`."""
    bars.reset(task, total=recipe.steps, description=f"{label}: training", word="")
    progress = train(
        session.accelerator,
        objective,
        schedule,
        Collator(session.tokenizer.pad_token_id),
        recipe,
        session.folder / folder,
        {"label": label, **{k: v for k, v in session.arguments.items() if k not in ("variants", "runs")}},
        lambda steps, word: bars.update(task, advance=steps, word=word),
        lambda values, step: session.accelerator.log(
            {f"{label}/{name}": value for name, value in values.items()}, step=step
        ),
    )
    return {"steps": progress.step, "tokens": progress.tokens, "seconds": progress.seconds, "losses": progress.losses}


def evaluate_run(session, objective, examples: Examples, bars: Progress, task: TaskID, words: str) -> dict[str, float]:
    """The task's metrics on the evaluation split."""
    batches = math.ceil(len(examples.rows) / (session.args.batch_size * session.accelerator.num_processes))
    bars.reset(task, total=batches, description=words, word="")
    scores = evaluate_objective(
        session.accelerator,
        objective,
        session.schedule(examples, len(examples.rows), shuffle=False),
        Collator(session.tokenizer.pad_token_id),
        session.args.batch_size,
        lambda steps, word: bars.update(task, advance=steps, word=word),
    )
    session.accelerator.log({f"{words}/{name}": value for name, value in scores.items()}, step=session.recipe.steps)
    return scores


def cost_of(session: Session, run: RunSpec, attention: str) -> tuple[dict[str, Any] | None, str | None]:
    """Memory and time of a run, or why they could not be measured; the same on every process."""
    args = session.args
    size, accumulation = session.cost_batch(run)
    answer: tuple[dict[str, Any] | None, str | None] = (None, None)
    if session.accelerator.is_main_process:
        job = {
            "base": str(session.base_folder),
            "task": args.task,
            "patch": run.patch,
            "attention": attention,
            "batch_size": size,
            "accumulation": accumulation,
            "length": run.max_length or args.cost_length or args.max_length,
            "mixed_precision": session.accelerator.mixed_precision,
            "gradient_checkpointing": args.gradient_checkpointing,
            "lora_rank": args.lora_rank,
            "lora_targets": args.lora_targets,
            "bits": args.bits,
            "chunk_size": args.loss_chunk,
            "repeats": args.cost_repeats,
            "seed": args.seed,
            "device": session.accelerator.device.type,
        }
        try:
            answer = (measure_in_own_process(job), None)
        except CostFailed as error:
            answer = (None, str(error))
    return broadcast(answer)


def measure_costs(session: Session, bars: Progress) -> None:
    """
    Memory and time of every run that has none yet, one after the other, so that they meet the same machine; and of dense
    attention in its N x N form, a row that is measured only, since it computes what dense does.
    """
    rows = {row["label"]: row for row in session.results["rows"]}
    if EAGER not in rows:
        rows[EAGER] = empty_row(RunSpec(EAGER, "dense"))
        session.results["rows"].insert(1, rows[EAGER])
    task = bars.add_task("memory and time", total=len(rows), word="")
    for run in [*session.runs, RunSpec(EAGER, "dense")]:
        row = rows[run.label]
        if row["cost"] is None and row["cost_error"] is None:
            attention = "eager" if run.label == EAGER else "sdpa"
            row["cost"], row["cost_error"] = cost_of(session, run, attention)
            session.save()
        bars.update(task, advance=1, word=run.label)


def push(session: Session) -> None:
    """Pushes the model of every variant, its tokenizer, its model card and the results it was made from."""
    import transformers
    from huggingface_hub import HfApi

    from hf_efficient_attn.hub import TASKS, model_card

    rows = rows_to_push(session.results["rows"])
    folders = {row["label"]: model_folder(session.folder, row["label"]) for row in rows}
    auto_class = getattr(transformers, TASKS[session.args.task][1])
    for row in rows:
        name = session.args.push_to_hub + ("" if len(rows) == 1 else f"-{folders[row['label']].parent.name}")
        auto_class.from_pretrained(folders[row["label"]]).push_to_hub(name)
        session.tokenizer.push_to_hub(name)
        card = model_card(session.results, row["label"], repo_id=name)
        files = {"README.md": card, "results.json": json.dumps(session.results, indent=1)}
        for path, text in files.items():
            HfApi().upload_file(path_or_fileobj=text.encode(), path_in_repo=path, repo_id=name)
        print(f"pushed {row['label']} to {name}")


def empty_row(run: RunSpec) -> dict[str, Any]:
    """A row before anything is known of it."""
    return {
        "label": run.label,
        "kind": run.kind,
        "control_of": run.control_of,
        "read_tokens": run.max_length,
        "micro_batch": run.micro_batch,
        "status": "ok",
        "error": None,
        "layers": [],
        "parameters_added": 0,
        "parameters_trained": None,
        "before": None,
        "recovery": None,
        "recovered": None,
        "after": None,
        "training": None,
        "cost": None,
        "cost_error": None,
    }


def progress_bars(enabled: bool) -> Progress:
    """Bars with the loss and the time left."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[word]}"),
        disable=not enabled,
    )


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        main()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"finetune.py: {error}")
