"""
Where does a small English GPT-2 come from, when none installs as a package? It is trained here, from nothing, on
Python's own documentation.

    python examples/pretrain.py                       # into the user's cache, where --model gpt2-small finds it
    python examples/pretrain.py --output-dir gpt2-small --steps 2000

The text is `examples.embedded.language_documents` (1.7 MB; its test split stays unseen), the tokenizer a byte-level
BPE trained on the same text. Some minutes on two cores, and a language model of the kind that completes docstrings:
enough to see what an attention variant loses.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, set_seed

from examples.data import Collator, Schedule, tokenize
from examples.embedded import language_documents
from examples.metrics import likelihood_scores
from examples.rows import Help
from examples.training import Recipe, adamw
from hf_efficient_attn.losses import causal_lm_losses

END = "<|endoftext|>"


def cached_model() -> Path:
    """The folder of the small GPT-2 in the user's cache; trains it there the first time."""
    base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = base / "hf_efficient_attn" / f"gpt2-small-python{sys.version_info.major}.{sys.version_info.minor}"
    if not folder.exists():
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise FileNotFoundError(
                "the model gpt2-small is not there yet: run `python examples/pretrain.py` once, in one process."
            )
        main(["--output-dir", str(folder)])
    return folder


def train_tokenizer(texts: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `size` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


def perplexity(model: GPT2LMHeadModel, rows: list[dict]) -> float:
    """Of blocks of tokens, by the model."""
    model.eval()
    nll, counts = [], []
    with torch.no_grad():
        for row in rows:
            losses, predicted = causal_lm_losses(model, torch.tensor([row["input_ids"]]))
            nll.append(losses.sum().item())
            counts.append(int(predicted.sum()))
    return likelihood_scores(nll, counts, None)["perplexity"]


def main(args: Sequence[str] | None = None) -> dict[str, float]:
    """
    Trains and saves; returns the perplexity on the held-out documents before and after.

    Raises:
        SystemExit: the output folder exists.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--output-dir", help="by default the user's cache")
    parser.add_argument("--steps", type=int, default=700, help="updates of the weights")
    parser.add_argument("--batch-size", type=int, default=4, help="blocks of a step")
    parser.add_argument("--length", type=int, default=512, help="tokens of a block, and positions of the model")
    parser.add_argument("--layers", type=int, default=4, help="of the model")
    parser.add_argument("--width", type=int, default=256, help="64 for each head")
    parser.add_argument("--vocabulary", type=int, default=4096, help="tokens of the tokenizer")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3, help="the highest of the schedule")
    parser.add_argument("--eval-blocks", type=int, default=32, help="held-out blocks to report on")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data order")
    options = parser.parse_args(args)
    if options.output_dir is None:
        folder = cached_model()
        print(f"the model is in {folder}")
        return {}
    folder = Path(options.output_dir)
    if folder.exists():
        parser.error(f"{folder} exists already; remove it or choose another --output-dir.")
    documents = language_documents()
    tokenizer = train_tokenizer(documents["train"], options.vocabulary)
    examples = tokenize(documents["train"], None, tokenizer, options.length)
    held_out = tokenize(documents["test"], None, tokenizer, options.length, limit=options.eval_blocks).rows
    set_seed(options.seed)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=options.length,
        n_embd=options.width,
        n_layer=options.layers,
        n_head=max(1, options.width // 64),
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = GPT2LMHeadModel(config)
    scores = {"before": perplexity(model, held_out)}
    recipe = Recipe(options.steps, options.batch_size, 1, options.learning_rate, 0.1, 0.05, 1.0, options.seed, 0)
    schedule = Schedule(examples, recipe.examples(1), options.seed, tokenizer, masked=False)
    loader = DataLoader(schedule, options.batch_size, collate_fn=Collator(tokenizer.pad_token_id))
    optimizer = adamw(list(model.parameters()), recipe.learning_rate, recipe.weight_decay)
    model.train()
    for step, batch in enumerate(track(loader, "training gpt2-small", disable=not sys.stderr.isatty())):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        losses, predicted = causal_lm_losses(model, batch["input_ids"])
        (losses.sum() / predicted.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    scores["after"] = perplexity(model, held_out)
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    model.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    fresh.rename(folder)
    print(
        f"{folder}: held-out perplexity {scores['before']:.0f} before, {scores['after']:.1f} after {options.steps} steps"
    )
    return scores


if __name__ == "__main__":
    main()
