"""The main job on a tiny model: examples/finetune.py from the command line's arguments to its report."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from examples import finetune, report  # noqa: E402
from examples.controls import remove_attention  # noqa: E402
from examples.data import Schedule, load_texts, tokenize  # noqa: E402
from examples.embedded import language_documents, source_documents  # noqa: E402
from examples.metrics import classification_scores, likelihood_scores  # noqa: E402
from examples.models import fit_positions, position_limit  # noqa: E402
from examples.options import parse  # noqa: E402
from examples.variants import read_runs  # noqa: E402

ANIMALS = ("cat", "dog", "fish", "bird")


def sentences(count: int, seed: int) -> list[tuple[str, str]]:
    """(text, class): which animal is named most often."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        words = [ANIMALS[i] for i in torch.randint(4, (21,), generator=generator)]
        winner = max(ANIMALS, key=lambda animal: (words.count(animal), animal))
        rows.append((" ".join(["the", *words]), winner))
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Tiny models with their tokenizers, and data in every format."""
    root = tmp_path_factory.mktemp("tiny")
    texts = [text for text, _ in sentences(50, 0)]
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=special))
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    size = len(wrapped)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    bert = BertForMaskedLM(BertConfig(vocab_size=size, max_position_embeddings=64, pad_token_id=0, **shape))
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=size, n_positions=64, n_embd=16, n_layer=2, n_head=2))
    for name, model in (("bert", bert), ("gpt2", gpt2)):
        model.save_pretrained(root / name)
        wrapped.save_pretrained(root / name)
    data = root / "data"
    data.mkdir()
    for split, count, seed in (("train", 40, 1), ("test", 16, 2)):
        rows = [{"text": text, "label": label} for text, label in sentences(count, seed)]
        (data / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def arguments(folder: Path, output: Path, *more: str, model: str = "bert", task: str = "classification") -> list[str]:
    common = {
        "--model": folder / model,
        "--task": task,
        "--dataset": folder / "data",
        "--max-length": 24,
        "--max-steps": 4,
        "--batch-size": 4,
        "--output-dir": output,
    }
    flags = [str(part) for pair in common.items() for part in pair]
    return [*flags, "--cpu", "--quiet", *more]


def rows_of(results: dict) -> dict[str, dict]:
    return report.by_label(results)


def test_dense_and_controls_run_end_to_end(folder, tmp_path):
    results = finetune.main(arguments(folder, tmp_path / "out", "--no-cost"))
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    assert all(row["status"] == "ok" for row in results["rows"])
