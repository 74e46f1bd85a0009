"""
What do the runs of one call share? The data, the base model, the accelerator, the folder, and the head of results.json.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list
from torch.utils.data import DataLoader

from examples import models
from examples.data import Collator, Examples, Schedule, load_texts, tokenize
from examples.objective import METRIC
from examples.options import FREE, build_parser
from examples.training import Recipe
from examples.variants import RunSpec, read_runs, stored_run, with_controls

SCHEMA = "hf_efficient_attn/finetune/1"
TEXTS = "texts_fingerprint"  # in arguments.json, beside the arguments
PROBE = 4  # texts that attention is compared on before and after a transfer
PACKAGES = ("hf_efficient_attn", "torch", "transformers", "accelerate", "datasets", "evaluate", "peft")


class Session:
    """What the runs of one call share: arguments, data, the base model, the accelerator and the results so far."""

    def __init__(self, args: argparse.Namespace, runs: list[RunSpec]) -> None:
        self.args = args
        precision = auto_precision(args.cpu) if args.mixed_precision == "auto" else args.mixed_precision
        self.folder = Path(args.output_dir)
        self.accelerator = Accelerator(
            mixed_precision=precision,
            gradient_accumulation_steps=args.gradient_accumulation,
            cpu=args.cpu,
            log_with=args.trackers or None,
            project_dir=str(self.folder),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        self.arguments = {name: value for name, value in vars(args).items() if name not in FREE}
        self.arguments["processes"] = self.accelerator.num_processes
        self.arguments["runs"] = [vars(run) for run in runs]  # what the variants meant
        check_folder(self.folder, self.arguments, args.resume)
        if args.push_to_hub:
            check_models(self.folder)
        self.accelerator.wait_for_everyone()  # nobody writes before everybody has looked
        self.texts = load_texts(
            args.dataset,
            args.task,
            text_column=args.text_column,
            label_column=args.label_column,
            config=args.dataset_config,
            train_split=args.train_split,
            eval_split=args.eval_split,
            seed=args.seed,
        )
        check_texts(self.folder, args.dataset, self.texts.fingerprint)
        self.tokenizer = models.load_tokenizer(args.model)
        if args.task == "masked-lm" and self.tokenizer.mask_token_id is None:
            raise ValueError(f"{args.model} has no mask token; masked-lm needs an encoder such as BERT.")
        self.cache: dict[int, tuple[Examples, Examples]] = {}
        train_examples, eval_examples = self.examples(args.max_length)
        per_step = args.batch_size * args.gradient_accumulation * self.accelerator.num_processes
        steps = (
            math.ceil(args.epochs * len(train_examples.rows) / per_step) if args.max_steps is None else args.max_steps
        )
        self.recipe = Recipe(
            steps=steps,
            batch_size=args.batch_size,
            accumulation=args.gradient_accumulation,
            learning_rate=args.learning_rate,
            weight_decay=args.weight_decay,
            warmup=args.warmup,
            max_grad_norm=args.max_grad_norm,
            seed=args.seed,
            checkpoint_every=args.checkpoint_every,
            schedule=args.schedule,
        )
        for run in runs:
            self.recipe_of(run)  # or the error comes when it is the run's turn
            if not args.no_cost:
                self.cost_batch(run)
        base = models.make_base(
            args.model,
            args.task,
            self.tokenizer,
            labels=self.texts.labels,
            max_length=max(args.max_length, *(run.max_length or 0 for run in runs), self.warm_length()),
            extend=args.extend_positions,
            seed=args.seed,
            dropout=args.dropout,
        )
        self.runs = with_controls(runs, args.controls, models.is_causal(base))
        self.results = new_results(self, base, train_examples, eval_examples)
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            saved = self.folder / "results.json"
            if args.resume and saved.exists():
                self.results["rows"] = json.loads(saved.read_text(encoding="utf-8"))["rows"]
            write_json(self.folder / "arguments.json", self.arguments | {TEXTS: self.texts.fingerprint})
        self.results["rows"] = broadcast(self.results["rows"])
        self.base_folder = self.folder / "base"
        if self.accelerator.is_main_process and not self.base_folder.exists():
            fresh = self.folder / "base.new"
            shutil.rmtree(
                fresh, ignore_errors=True
            )  # of a warm start that ended before its weights were in their place
            base.save_pretrained(fresh)
            self.tokenizer.save_pretrained(fresh)
            fresh.rename(self.base_folder)
        self.accelerator.wait_for_everyone()

    def warm_length(self) -> int:
        """Tokens of the texts of the warm start; 0 where there is none."""
        return (self.args.warm_start_length or self.args.max_length) if self.args.warm_start_steps else 0

    def recipe_of(self, run: RunSpec) -> Recipe:
        """
        The recipe with as many examples in a step, of which the run reads its micro-batch at a time.

        Raises:
            ValueError: they do not make up a step.
        """
        whole = self.recipe.batch_size * self.recipe.accumulation
        size = run.micro_batch or self.recipe.batch_size
        if whole % size:
            raise ValueError(f"run {run.label!r}: micro_batch = {size} does not divide the {whole} texts of a step.")
        return replace(self.recipe, batch_size=size, accumulation=whole // size)

    def cost_batch(self, run: RunSpec) -> tuple[int, int]:
        """
        The texts that the run reads at a time where its cost is measured, and how many times: as many texts as the others.

        Raises:
            ValueError: they do not make up the measured batch.
        """
        whole = self.args.cost_batch_size or self.args.batch_size
        size = min(run.micro_batch or whole, whole)
        if whole % size:
            raise ValueError(
                f"run {run.label!r}: micro_batch = {size} does not divide the {whole} texts that costs are measured on; give "
                f"--cost-batch-size a multiple of {size}, or leave costs out with --no-cost."
            )
        return size, whole // size

    def examples(self, max_length: int) -> tuple[Examples, Examples]:
        """The tokenised splits, cut at that many tokens."""
        if max_length not in self.cache:
            args, texts = self.args, self.texts
            splits = [
                (texts.train, texts.train_labels, args.max_train_samples),
                (texts.test, texts.test_labels, args.max_eval_samples),
            ]
            self.cache[max_length] = tuple(
                tokenize(documents, labels, self.tokenizer, max_length, limit, args.seed)
                for documents, labels, limit in splits
            )
        return self.cache[max_length]

    def schedule(self, examples: Examples, length: int, shuffle: bool) -> Schedule:
        """Examples in the order of training, or each once for evaluation."""
        return Schedule(examples, length, self.args.seed, self.tokenizer, self.args.task == "masked-lm", shuffle)

    def probe(self, examples: Examples) -> list[dict[str, torch.Tensor]]:
        """The first few examples as batches on the device, without labels: what layers are compared on."""
        schedule = self.schedule(examples, min(PROBE, len(examples.rows)), shuffle=False)
        batches = DataLoader(schedule, self.args.batch_size, collate_fn=Collator(self.tokenizer.pad_token_id))
        names = ("input_ids", "attention_mask")
        return [{n: x.to(self.accelerator.device) for n, x in b.items() if n in names} for b in batches]

    def save(self) -> None:
        """results.json, replaced as a whole."""
        if self.accelerator.is_main_process:
            write_json(self.folder / "results.json", self.results)


def check_folder(folder: Path, arguments: dict[str, Any], resume: bool) -> None:
    """ValueError where the folder holds another run, or where there is none to resume. Variants may have been added to it."""
    saved = folder / "arguments.json"
    if resume:
        if not saved.exists():
            raise ValueError(f"--resume: {folder} holds no run; leave out --resume to start one there.")
        earlier = {**vars(build_parser().parse_args([])), **json.loads(saved.read_text(encoding="utf-8"))}
        now = json.loads(json.dumps(arguments))
        compared = (earlier.keys() | now.keys()) - {*FREE, TEXTS}
        differing = sorted(key for key in compared if earlier.get(key) != now.get(key))
        runs = [stored_run(run) for run in earlier["runs"]] if "runs" in earlier else read_runs(earlier["variants"])
        if all(vars(run) in now["runs"] for run in runs):
            differing = [name for name in differing if name not in ("variants", "runs")]  # more of them
        elif "variants" in differing:
            differing.remove("runs")
        if differing:
            changes = "; ".join(f"{key} was {earlier.get(key)!r}, is {now.get(key)!r}" for key in differing)
            raise ValueError(f"--resume: the run in {folder} had other arguments: {changes}.")
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"{folder} is not empty: choose another --output-dir, or continue the run in it with --resume."
        )


def check_texts(folder: Path, name: str, fingerprint: str) -> None:
    """ValueError where the run that the folder holds began with other texts; early ones did not note theirs."""
    saved = folder / "arguments.json"
    noted = json.loads(saved.read_text(encoding="utf-8")).get(TEXTS) if saved.exists() else None
    if noted not in (None, fingerprint):
        raise ValueError(
            f"--resume: {name} no longer holds the texts that the run in {folder} began with, so its rows could not be "
            "compared. Bring them back, or start anew in another --output-dir."
        )


def check_models(folder: Path) -> None:
    """ValueError where a run to push is finished and its model was not kept."""
    saved = folder / "results.json"
    rows = json.loads(saved.read_text(encoding="utf-8"))["rows"] if saved.exists() else []
    missing = [row["label"] for row in rows_to_push(rows) if not model_folder(folder, row["label"]).exists()]
    if missing:
        raise ValueError(
            f"--push-to-hub: {folder} holds no models of {', '.join(missing)}, which ran without --save-models; leave out "
            "--push-to-hub, or start anew in another --output-dir."
        )


def rows_to_push(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of variants that went well."""
    return [row for row in rows if row["kind"] == "variant" and row["status"] == "ok"]


def model_folder(folder: Path, label: str) -> Path:
    """Where a run's model is kept."""
    return folder / RunSpec(label, "variant").folder / "model"


def new_results(session: Session, base, train_examples: Examples, eval_examples: Examples) -> dict[str, Any]:
    """results.json without its rows; examples/README.md explains the fields."""
    accelerator, args, recipe = session.accelerator, session.args, session.recipe
    if accelerator.device.type == "cuda":
        device = torch.cuda.get_device_name(accelerator.device)
    else:
        device = f"{accelerator.device.type}, {torch.get_num_threads()} threads"
    if accelerator.num_processes > 1:
        device += f", {accelerator.num_processes} processes"
    return {
        "schema": SCHEMA,
        "command": "",
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "git_revision": git_revision(),
        "versions": {"python": sys.version.split()[0], **{name: version(name) for name in PACKAGES}},
        "seed": args.seed,
        "device": device,
        "precision": accelerator.mixed_precision,
        "model": models.describe_model(args.model, base),
        "task": args.task,
        "dataset": {
            "name": session.texts.name,
            "split": session.texts.split,
            "train_examples": len(train_examples.rows),
            "eval_examples": len(eval_examples.rows),
            "train_tokens": train_examples.tokens,
            "eval_tokens": eval_examples.tokens,
            "labels": session.texts.labels,
        },
        "max_length": args.max_length,
        "metric": METRIC[args.task],
        "recipe": {
            **vars(recipe),
            "examples_per_step": recipe.batch_size * recipe.accumulation * accelerator.num_processes,
            "warm_start_steps": args.warm_start_steps,
            "warm_start_length": args.warm_start_length or args.max_length,
            "warm_start_learning_rate": args.warm_start_learning_rate,
            "layer_decay": args.layer_decay,
            "lora_rank": args.lora_rank,
            "bits": args.bits,
            "gradient_checkpointing": args.gradient_checkpointing,
        },
        "arguments": session.arguments,
        "rows": [],
    }


def auto_precision(cpu: bool) -> str:
    """bf16 where the processor has instructions for it, else float32."""
    if torch.cuda.is_available() and not cpu:
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    native = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return "bf16" if any(check() for check in native if check is not None) else "no"


def broadcast(value: Any) -> Any:
    """The main process's value, on every process."""
    return broadcast_object_list([value])[0]


def write_json(path: Path, content: Any) -> None:
    """Writes beside the old file and swaps."""
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    fresh.replace(path)


def version(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_revision() -> str | None:
    """The commit of this checkout, with a + where tracked files differ from it; None outside a repository."""
    here = Path(__file__).resolve().parent
    commands = (["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"])
    try:
        commit, changes = (
            subprocess.run(c, cwd=here, capture_output=True, text=True, check=True).stdout.strip() for c in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changes else "")
