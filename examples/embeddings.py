"""
What is left of a sentence encoder's embeddings when its attention is swapped and nothing is trained?

    python -m examples.embeddings --model minilm --dataset texts/ --max-length 2048 --variants linformer topk_blocks \\
        --output results.json

The model's learned positions are extended to `--max-length` if they end before. Embeddings are means over tokens, of length
1. For every variant: `fidelity`, the mean cosine of a text's embedding with its dense one; `probe_accuracy`, of a
logistic regression that is trained on the variant's embeddings of the training texts; and over those of dense on the
longest text the peak memory and the seconds, which dense and the variant take in turns. The file is written after every
row, and rows that it holds already are not computed again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from examples.data import load_texts, tokenize
from examples.embedded import MODELS
from examples.models import fit_positions, source
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
from hf_efficient_attn.measuring import peak_memory


def open_encoder(name: str, max_length: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """An embedded model by name, or any that `from_pretrained` finds, with positions for that many tokens."""
    place, keywords = source(name)
    model, tokenizer = (kind.from_pretrained(place, **keywords) for kind in (AutoModel, AutoTokenizer))
    fit_positions(model, max_length, extend=True, tokenizer=tokenizer)
    return model.eval(), tokenizer


def embedding(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    """(width,): the mean over the tokens of a text, of length 1."""
    mean = model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
    return torch.nn.functional.normalize(mean, dim=-1)


@torch.no_grad()
def embed(model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> np.ndarray:
    """(texts, width). One text is read at a time, without padding."""
    return torch.stack([embedding(model, ids) for ids in texts]).numpy()


def main(args: Sequence[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--model", default="minilm", help=f"a Hub id, a folder, or one of: {', '.join(MODELS)}")
    parser.add_argument("--dataset", default="embedded", help="labelled texts, as for examples/finetune.py")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens that a text is cut at")
    parser.add_argument("--train-texts", type=int, default=200, help="to train the probe on")
    parser.add_argument("--test-texts", type=int, default=100, help="to report on")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of dense and variant that are timed")
    parser.add_argument(
        "--variants", nargs="+", required=True, metavar="NAME|FILE", help="names, and YAML files label -> variant"
    )
    parser.add_argument("--output", type=Path, required=True, help="a JSON file; rows in it are kept")
    options = parser.parse_args(args)
    check_counts(options, max_length=1, train_texts=2, test_texts=1, repeats=1)
    chosen = read_variants(options.variants)
    names = ("model", "dataset", "max_length", "train_texts", "test_texts")
    settings = {name: getattr(options, name) for name in names}
    results = open_results(options.output, settings, "examples.embeddings", args, chosen)
    model, tokenizer = open_encoder(options.model, options.max_length)
    data = load_texts(options.dataset, "classification")
    splits = [(data.train, data.train_labels, options.train_texts), (data.test, data.test_labels, options.test_texts)]
    train, test = (
        tokenize(texts, labels, tokenizer, options.max_length, limit).rows for texts, labels, limit in splits
    )
    texts, labels = [row["input_ids"] for row in train + test], [row["label"] for row in train + test]
    longest, dense = max(texts, key=len), None
    for label, config in chosen.items():
        done = {row["label"]: row for row in results["rows"]}
        if label in done:
            continue
        if dense is None and config is not None:
            dense = embed(model, texts)  # of an earlier run, whose embeddings were not kept
        row = {"label": label, "config": config}
        try:
            with swapped(model, config):
                found = embed(model, texts)
                row["peak_bytes"] = peak_memory(lambda: embed(model, [longest]))
            row["seconds_ratio"] = seconds_ratio(model, config, lambda: embed(model, [longest]), options.repeats)
            dense = found if config is None else dense
            row["fidelity"] = float((found * dense).sum(1).mean())
            probe = LogisticRegression(C=100.0, max_iter=2000).fit(found[: len(train)], labels[: len(train)])
            row["probe_accuracy"] = float(probe.score(found[len(train) :], labels[len(train) :]))
        except Exception as error:  # a variant that fails is a row that says so
            row["error"] = f"{type(error).__name__}: {error}"
        base = done.get("dense", row)
        if "error" not in row and "error" not in base:
            row["peak_ratio"] = row["peak_bytes"] / base["peak_bytes"]
        results["tokens"] = sum(map(len, texts))
        add_row(results, row, options.output)
    columns = {"fidelity": "{fidelity:.3f}", "probe accuracy": "{probe_accuracy:.3f}"}
    columns |= {"time": "{seconds_ratio:.2f}", "peak memory": "{peak_ratio:.2f}"}
    show(results, "embeddings, untrained; time and memory over those of dense", columns)
    return results


if __name__ == "__main__":
    run_program(main)
