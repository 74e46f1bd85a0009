"""What can be asked for? The command line of `examples/finetune.py`, and presets: YAML files with the same names."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from examples.embedded import MODELS
from examples.rows import Help
from examples.training import SCHEDULES

ALL_LINEAR = "all-linear"  # peft's word for the linear maps of a model but its head
PRESETS = Path(__file__).parent / "presets"

# Arguments that may differ between a run and its continuation: they say where and how to look, not what to compute.
FREE = {"resume", "output_dir", "trackers", "push_to_hub", "quiet", "preset"}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="finetune.py",
        description="Fine-tune a pretrained model with each attention variant; report quality lost, memory and time saved.",
        formatter_class=Help,
    )
    add = parser.add_argument
    add(
        "--preset",
        help=f"a YAML file of arguments, or one of: {preset_names()}",
    )

    add = parser.add_argument_group("what").add_argument
    add("--model", default="minilm", help=f"a Hub id, a local folder, or one of: {', '.join(MODELS)}")
    add(
        "--task", default="classification", choices=("classification", "masked-lm", "causal-lm"), help="what is learned"
    )
    add(
        "--variants",
        nargs="+",
        default=["dense"],
        metavar="NAME|FILE",
        help="variants, or YAML files label -> variant; dense is always added",
    )
    add(
        "--controls",
        default="all",
        choices=("all", "zero", "none"),
        help="rows beside the variants: zero attention, and the windows of hybrids alone (all)",
    )
    add("--max-length", type=int, default=512, help="tokens a text is cut at, or a block holds")
    add(
        "--extend-positions",
        action="store_true",
        help="repeat the learned positions of a model that reads less than --max-length",
    )

    add = parser.add_argument_group("data").add_argument
    add(
        "--dataset",
        default="embedded",
        help="a Hub id, a csv, json, jsonl, parquet or txt file (also .gz), a folder of them, or 'embedded'",
    )
    add("--dataset-config", help="the configuration of a Hub data set")
    add("--text-column", default="text", help="the column that holds the text")
    add("--label-column", default="label", help="the column that holds the class")
    add("--train-split", default="train", help="the split to train on")
    add("--eval-split", help="the split to report on; by default test, validation or a held-out tenth")
    add("--max-train-samples", type=int, help="train on that many examples only")
    add("--max-eval-samples", type=int, help="report on that many examples only")

    add = parser.add_argument_group("training").add_argument
    add("--max-steps", type=int, help="updates of the weights; overrides --epochs; 0 measures without training")
    add("--epochs", type=float, default=1.0, help="passes over the training data")
    add("--batch-size", type=int, default=8, help="examples of a process in one forward pass")
    add("--gradient-accumulation", type=int, default=1, help="forward passes for one update")
    add("--learning-rate", type=float, default=1e-4, help="the highest of the schedule")
    add("--schedule", default="linear", choices=SCHEDULES, help="of the rate after the warm-up")
    add(
        "--layer-decay",
        type=float,
        default=1.0,
        help="each layer learns at that share of the rate of the layer above it",
    )
    add("--weight-decay", type=float, default=0.01, help="of AdamW")
    add("--warmup", type=float, default=0.1, help="the share of steps in which the learning rate rises")
    add("--max-grad-norm", type=float, default=1.0, help="gradients are clipped to this norm; 0: not at all")
    add("--seed", type=int, default=0, help="of weights, data order, masks and dropout, the same for every variant")
    add(
        "--warm-start-steps",
        type=int,
        default=0,
        help="train the dense model that many steps first and start every run from it, so that 'before' does not measure a "
        "head that knows nothing",
    )
    add("--warm-start-length", type=int, help="tokens of the texts of the warm start; by default --max-length")
    add("--warm-start-learning-rate", type=float, help="of the warm start; by default --learning-rate")
    add(
        "--dropout",
        type=float,
        help="everywhere in the model, instead of its own; with attention dropout PyTorch's fused attention falls back to "
        "the N x N form on the CPU",
    )
    add(
        "--recover",
        type=int,
        default=0,
        metavar="TOKENS",
        help="before fine-tuning, let each variant's own parameters learn their layer's dense attention on that many tokens",
    )
    add(
        "--recover-learning-rate",
        type=float,
        default=0.05,
        help="under --recover, relative to each parameter's size, the root mean square of what is not zero in it",
    )
    add(
        "--recover-blocks",
        type=int,
        default=0,
        metavar="LAYERS",
        help="let that many layers learn at a time, each block on all --recover tokens, for models that do not fit; 0: all",
    )
    add(
        "--distill",
        type=float,
        default=0.0,
        metavar="WEIGHT",
        help="of KL to the predictions of the same weights under dense attention (adapters off), added to the loss",
    )
    add(
        "--mixed-precision",
        default="no",
        choices=("no", "fp16", "bf16", "auto"),
        help="auto: bf16 where the processor has instructions for it",
    )
    add("--gradient-checkpointing", action="store_true", help="recompute activations in the backward pass")
    add(
        "--loss-chunk",
        type=int,
        help="positions whose logits a causal language model holds at a time; by default 1,024, on a CPU 128",
    )
    add(
        "--lora-rank",
        type=int,
        default=0,
        help="train adapters of this rank (by peft) and what the variant adds; 0 trains all weights",
    )
    add(
        "--lora-targets",
        nargs="+",
        help=f"modules that get adapters, or {ALL_LINEAR}; by default what peft knows for the model",
    )
    add(
        "--bits",
        type=int,
        choices=(4, 8),
        help="of the pretrained weights, quantised by bitsandbytes while adapters train; needs --lora-rank, and for 4 a GPU",
    )
    add("--cpu", action="store_true", help="do not use an accelerator")

    add = parser.add_argument_group("measuring").add_argument
    add("--no-cost", action="store_true", help="do not measure memory and time")
    add("--cost-length", type=int, help="tokens of the measured texts; by default --max-length")
    add("--cost-batch-size", type=int, help="texts of the measured batch; by default --batch-size")
    add("--cost-repeats", type=int, default=3, help="timed steps, of which the median counts")

    add = parser.add_argument_group("output").add_argument
    add("--output-dir", help="where results go; by default runs/<model>-<task>-<time>")
    add("--resume", action="store_true", help="continue the run in --output-dir")
    add(
        "--checkpoint-every", type=int, default=0, help="steps between checkpoints of the run in progress; 0 makes none"
    )
    add(
        "--save-models",
        action="store_true",
        help="keep the model of dense and of every variant, as its training left it",
    )
    add(
        "--push-to-hub",
        metavar="REPO",
        help="push the model of every variant, with tokenizer and model card, to REPO (REPO-<label> if there are several)",
    )
    add("--trackers", nargs="*", default=[], help="of Accelerate, as tensorboard or trackio")
    add("--quiet", action="store_true", help="no progress bars")
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """
    The arguments: those given, else those of the preset, else the defaults.

    Raises:
        SystemExit: with a sentence, where they make no sense.
    """
    parser = build_parser()
    preset = parser.parse_known_args(argv)[0].preset
    if preset is not None:
        try:
            parser.set_defaults(**_read_preset(preset, parser))
        except ValueError as error:
            parser.error(f"--preset {preset}: {error}")
    args = parser.parse_args(argv)
    for name in (
        "max_steps",
        "warm_start_steps",
        "recover",
        "recover_blocks",
        "distill",
        "lora_rank",
        "checkpoint_every",
        "seed",
        "weight_decay",
        "max_grad_norm",
    ):
        if not (getattr(args, name) or 0) >= 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 0.")
    for name in (
        "max_length",
        "batch_size",
        "gradient_accumulation",
        "cost_repeats",
        "max_train_samples",
        "max_eval_samples",
        "warm_start_length",
        "cost_length",
        "cost_batch_size",
        "loss_chunk",
    ):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1.")
    if args.warm_start_learning_rate is None:
        args.warm_start_learning_rate = args.learning_rate
    rates = args.learning_rate, args.recover_learning_rate, args.warm_start_learning_rate
    if min(*rates, args.epochs) <= 0 or not 0 <= args.warmup <= 1:
        parser.error("learning rates and --epochs must be above 0, --warmup between 0 and 1.")
    if not 0 < args.layer_decay <= 1:
        parser.error(f"--layer-decay {args.layer_decay}: above 0, at most 1.")
    if args.dropout is not None and not 0 <= args.dropout < 1:
        parser.error(f"--dropout {args.dropout}: from 0 to below 1.")
    if ALL_LINEAR in (args.lora_targets or ()) and len(args.lora_targets) > 1:
        parser.error(f"--lora-targets {ALL_LINEAR} stands alone; leave out the others, or name all modules.")
    if args.bits and not args.lora_rank:
        parser.error(f"--bits {args.bits}: quantised weights do not train; give adapters a --lora-rank.")
    if args.resume and args.output_dir is None:
        parser.error("--resume needs the --output-dir of the run to continue.")
    return args


def preset_names() -> str:
    """The presets that come with the program: those of the files there that name a model."""
    files = sorted(PRESETS.glob("*.yaml"))
    return ", ".join(file.stem for file in files if "model" in yaml.safe_load(file.read_text(encoding="utf-8")))


def _read_preset(preset: str, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """
    The values of a preset, read as the command line reads its words.

    Raises:
        ValueError: there is no such file, or it holds what the arguments do not take.
    """
    path = Path(preset) if preset.endswith((".yaml", ".yml")) else PRESETS / f"{preset}.yaml"
    if not path.is_file():
        raise ValueError(f"no such preset or file; presets are {preset_names()}.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {error}") from error
    known = {action.dest: action for action in parser._actions if action.dest not in ("help", "preset")}
    if not isinstance(values, dict) or values.keys() - known:
        unknown = sorted(map(str, values.keys() - known)) if isinstance(values, dict) else values
        raise ValueError(f"expected a mapping of arguments, with _ for -; cannot use {unknown}.")
    values = {name: value for name, value in values.items() if value is not None}
    runs = values.pop("variants", [])  # may be a mapping, which the command line has in files only
    runs = runs if isinstance(runs, list) else [runs]
    if not all(isinstance(run, (str, dict)) for run in runs):
        raise ValueError(f"variants: expected names, files, or a mapping from labels to variants, got {runs!r}.")

    def refuse(message: str) -> NoReturn:
        raise ValueError(message)

    reader = copy.copy(parser)
    reader.error = refuse
    read = reader.parse_args([word for name, value in values.items() for word in _words(known[name], value)])
    return {name: getattr(read, name) for name in values} | ({"variants": runs} if runs else {})


def _words(action: argparse.Action, value: Any) -> list[str]:
    """A preset's value as the command line has it."""
    flag = action.option_strings[0]
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"{action.dest}: expected true or false, got {value!r}.")
        return [flag] * value
    if value is False and "no" in (action.choices or ()):
        value = "no"  # YAML's reading of it
    items = value if isinstance(value, list) and action.nargs else [value]
    if any(isinstance(item, (bool, list, dict)) for item in items):
        raise ValueError(f"{action.dest}: expected text or a number, got {value!r}.")
    return [flag, *map(str, items)] if action.nargs else [f"{flag}={value}"]
