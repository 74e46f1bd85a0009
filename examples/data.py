"""
Which texts does a run read, and in which order? From a data set's name to the tensors of every training step.

Training data is unrolled: item p of `Schedule` is the p-th example that training will see, and it depends on the seed
and p only. A run that stopped after p examples goes on with item p, and every variant sees the same examples in the
same order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import torch
from transformers import PreTrainedTokenizerBase

from examples import embedded

EMBEDDED = "embedded"
READERS = {"csv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet", "txt": "text"}
EVAL_SPLITS = ("test", "validation", "dev", "valid")
MASKED_SHARE = 0.15
IGNORED = -100


@dataclass(frozen=True)
class Texts:
    """Two splits of documents; `labels` names the classes, or is None for language modelling."""

    name: str
    train: list[str]
    test: list[str]
    train_labels: list[int] | None = None
    test_labels: list[int] | None = None
    labels: list[str] | None = None
    split: str = "test"

    @property
    def fingerprint(self) -> str:
        """Tells these texts and classes from others."""
        digest = hashlib.sha256(repr((self.train_labels, self.test_labels, self.labels)).encode())
        for part in (self.train, self.test):
            for text in part:
                digest.update(f"{len(text)}:{text}".encode())
            digest.update(b".")
        return digest.hexdigest()


def load_texts(
    name: str,
    task: str,
    *,
    text_column: str = "text",
    label_column: str = "label",
    config: str | None = None,
    train_split: str = "train",
    eval_split: str | None = None,
    seed: int = 0,
) -> Texts:
    """
    The documents of a data set: "embedded", a local file or folder, or a Hub id.

    A folder has files whose names begin with train and with test, validation or dev. A single file, a folder without
    such names, or a data set with a train split only is split by documents, nine to one; a single document, near nine
    tenths, at a blank line.

    Raises:
        ValueError: a column is missing, a text is empty, labels are missing or unknown to the training split, or no
            file is readable.
        FileNotFoundError: a path with no data in it.
    """
    if name == EMBEDDED:
        return _embedded(task)
    splits = _load_splits(name, config)
    columns = next(iter(splits.values())).column_names
    wanted = [text_column] + ([label_column] if task == "classification" else [])
    for column in wanted:
        if column not in columns:
            option = "--text-column" if column == text_column else "--label-column"
            raise ValueError(f"{name} has no column {column!r}; it has {', '.join(columns)}. Choose one with {option}.")
    if train_split not in splits:
        raise ValueError(
            f"{name} has no split {train_split!r}; it has {', '.join(splits)}. Choose one with --train-split."
        )
    held_out = eval_split or next((split for split in EVAL_SPLITS if split in splits and split != train_split), None)
    if held_out is not None and held_out not in splits:
        raise ValueError(f"{name} has no split {held_out!r}; it has {', '.join(splits)}.")
    train = splits[train_split]
    if held_out is not None:
        test = splits[held_out]
    elif len(train) > 1:
        held_out = "held-out tenth"
        parts = train.train_test_split(test_size=0.1, seed=seed)
        train, test = parts["train"], parts["test"]
    elif task != "classification":
        (text,) = _checked_texts(train[text_column], name)
        return Texts(name, *([part] for part in _cut(text, name)), split="last tenth")
    else:
        raise ValueError(f"{name} is one document; classification needs more.")
    texts = [
        _checked_texts(part[text_column], f"{name}, {which}") for part, which in ((train, "train"), (test, held_out))
    ]
    if task != "classification":
        return Texts(name, *texts, split=held_out)
    labels, numbers = _label_numbers(train, test, label_column, name, held_out)
    return Texts(name, *texts, *numbers, labels, held_out)


def _embedded(task: str) -> Texts:
    if task != "classification":
        documents = embedded.language_documents()
        return Texts("embedded (Python's documentation)", documents["train"], documents["test"])
    rows = embedded.source_documents()
    texts = [[row["text"] for row in rows[split]] for split in ("train", "test")]
    numbers = [[row["label"] for row in rows[split]] for split in ("train", "test")]
    return Texts("embedded (which package of Python's library)", *texts, *numbers, list(embedded.PACKAGES))


def _load_splits(name: str, config: str | None) -> dict[str, datasets.Dataset]:
    path = Path(name)
    if path.is_dir():
        readable = sorted(file for file in path.iterdir() if _kind(file) is not None)
        if not readable:
            raise FileNotFoundError(f"{name}: no file that ends in {', '.join(READERS)} (or .gz of these).")
        files: dict[str, list[str]] = {}
        for file in readable:
            split = next((split for split in ("train", *EVAL_SPLITS) if file.name.startswith(split)), None)
            if split is not None:
                files.setdefault(split, []).append(str(file))
        files = files or {"train": [str(file) for file in readable]}
        kinds = {_kind(Path(file)) for group in files.values() for file in group}
        if len(kinds) > 1:
            raise ValueError(
                f"{name}: files of different kinds ({', '.join(sorted(kinds))}); keep one kind in a folder."
            )
        return _read_files(kinds.pop(), files)
    if path.is_file():
        kind = _kind(path)
        if kind is None:
            raise ValueError(f"{name}: cannot read this kind of file; use {', '.join(READERS)} (or .gz of these).")
        return _read_files(kind, {"train": [str(path)]})
    if path.suffix or name.count("/") > 1 or name.startswith((".", "/")):
        raise FileNotFoundError(f"{name}: no such file or folder.")
    try:
        return dict(datasets.load_dataset(name, config))
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError, OSError) as error:
        raise FileNotFoundError(
            f"{name!r} is no local file or folder, and could not be loaded as a data set of the Hub: {error}"
        ) from error


def _kind(file: Path) -> str | None:
    suffixes = [suffix.lstrip(".").lower() for suffix in file.suffixes if suffix.lower() != ".gz"]
    return READERS.get(suffixes[-1]) if suffixes else None


def _read_files(kind: str, files: dict[str, list[str]]) -> dict[str, datasets.Dataset]:
    options: dict[str, Any] = {"sample_by": "document"} if kind == "text" else {}
    try:
        return dict(datasets.load_dataset(kind, data_files=files, **options))
    except (datasets.exceptions.DatasetGenerationError, pyarrow.ArrowInvalid) as error:
        reason = error.__cause__ or error
        raise ValueError(
            f"cannot read {', '.join(file for group in files.values() for file in group)} as {kind}: {reason}"
        ) from error


def _checked_texts(texts: Sequence[Any], where: str) -> list[str]:
    texts = list(texts)
    bad = [index for index, text in enumerate(texts) if not isinstance(text, str) or not text.strip()]
    if bad:
        raise ValueError(
            f"{where}: {len(bad)} of {len(texts)} rows have no text, the first is row {bad[0]}. Remove them."
        )
    if not texts:
        raise ValueError(f"{where}: there are no rows.")
    return texts


def _cut(text: str, name: str) -> tuple[str, str]:
    """The text up to the last blank line before nine tenths of it, and the rest."""
    at = text.rfind("\n\n", 0, int(0.9 * len(text)))
    if at <= 0:
        raise ValueError(
            f"{name} is one document without a blank line to split it at; give train and test files instead."
        )
    return text[:at], text[at:]


def _label_numbers(train, test, column: str, name: str, held_out: str) -> tuple[list[str], list[list[int]]]:
    """Names of the classes, in order, and each split's labels as indices into them."""
    feature = train.features[column]
    values = [list(train[column]), list(test[column])]
    for part, which in zip(values, ("train", held_out), strict=True):
        bad = [index for index, value in enumerate(part) if not isinstance(value, (int, str)) or value == -1]
        if bad:
            raise ValueError(
                f"{name}, {which}: {len(bad)} rows have no class in {column!r} (row {bad[0]} has {part[bad[0]]!r}); "
                "classes are integers or strings, one for each text. Choose another --label-column, or a labelled split "
                "with --eval-split."
            )
    classes = sorted(set(values[0]))
    unknown = sorted(set(values[1]) - set(classes))
    if unknown:
        raise ValueError(f"{name}, {held_out}: classes {unknown[:5]} never occur in the training split.")
    if len(classes) < 2:
        raise ValueError(f"{name}: {column!r} holds one class only ({classes[0]!r}).")
    number = {value: index for index, value in enumerate(classes)}
    named = isinstance(feature, datasets.ClassLabel)
    names = [feature.int2str(value) if named else str(value) for value in classes]
    return names, [[number[value] for value in part] for part in values]


# ---------------------------------------------------------------------------------------------- from texts to examples


@dataclass(frozen=True)
class Examples:
    """Tokenised texts: `rows` have `input_ids`, and `label` or `n_bytes`."""

    rows: list[dict[str, Any]]
    tokens: int


def tokenize(
    texts: list[str],
    labels: list[int] | None,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    limit: int | None = None,
    seed: int = 0,
) -> Examples:
    """
    Classification: one example a text, cut at `max_length`. Language modelling: texts joined end to end and cut into
    blocks of exactly `max_length` tokens; the rest is dropped. `limit` keeps that many examples, chosen by the seed.

    Raises:
        ValueError: the texts together are shorter than one block, or a block has nothing to predict.
    """
    if labels is not None:
        chosen = _choose(len(texts), limit, seed)
        encoded = tokenizer([texts[i] for i in chosen], truncation=True, max_length=max_length)["input_ids"]
        rows = [{"input_ids": ids, "label": labels[i]} for i, ids in zip(chosen, encoded, strict=True)]
        return Examples(rows, sum(len(row["input_ids"]) for row in rows))
    special = [t for t in (tokenizer.cls_token_id, tokenizer.sep_token_id) if t is not None]
    first, last = (special[:1], special[1:]) if len(special) == 2 else ([], [])
    end = [tokenizer.eos_token_id] if not first and tokenizer.eos_token_id is not None else []
    stream: list[int] = []
    for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        stream += [*ids, *end]
    size = max_length - len(first) - len(last)
    least = len(first) + len(last) + (1 if first else 2)  # one token is masked; the second follows from the first
    if max_length < least:
        raise ValueError(f"--max-length {max_length} leaves no token to predict; give {least} or more.")
    blocks = [[*first, *stream[i : i + size], *last] for i in range(0, len(stream) - size + 1, size)]
    if not blocks:
        raise ValueError(
            f"the text is {len(stream)} tokens, shorter than the {max_length} asked for: "
            "give more text or a smaller --max-length."
        )
    blocks = [blocks[i] for i in _choose(len(blocks), limit, seed)]
    decoded = tokenizer.batch_decode([block[1:] for block in blocks], skip_special_tokens=True)
    rows = [{"input_ids": ids, "n_bytes": len(text.encode())} for ids, text in zip(blocks, decoded, strict=True)]
    return Examples(rows, len(rows) * max_length)


def _choose(n: int, limit: int | None, seed: int) -> list[int]:
    if limit is None or limit >= n:
        return list(range(n))
    return sorted(torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:limit].tolist())


class Schedule(torch.utils.data.Dataset):
    """
    The examples of a whole training run in their order: item p is the p-th, a fresh permutation for each pass over
    the data.

    For masked language modelling item p is masked by a generator seeded with (seed, p), the same number of tokens in
    every block, so that the mean over micro-batches is the mean over tokens.
    """

    def __init__(
        self,
        examples: Examples,
        length: int,
        seed: int,
        tokenizer: PreTrainedTokenizerBase,
        masked: bool,
        shuffle: bool = True,
    ) -> None:
        self.examples, self.seed, self.tokenizer, self.masked = examples, seed, tokenizer, masked
        n = len(examples.rows)
        order: list[int] = []
        while len(order) < length:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + len(order) // n)
            order += torch.randperm(n, generator=generator).tolist() if shuffle else range(n)
        self.order = order[:length]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> dict[str, Any]:
        row = self.examples.rows[self.order[position]]
        return self._mask(row, position) if self.masked else row

    def _mask(self, row: dict[str, Any], position: int) -> dict[str, Any]:
        """Devlin et al. 2019: of 15 % of the tokens 80 % become [MASK], 10 % any token, 10 % stay."""
        generator = torch.Generator().manual_seed((self.seed + 1) * 1_000_003 + position)
        ids = torch.tensor(row["input_ids"])
        ordinary = torch.tensor([i for i, t in enumerate(row["input_ids"]) if t not in self.tokenizer.all_special_ids])
        count = max(1, round(MASKED_SHARE * len(ordinary)))
        chosen = ordinary[torch.randperm(len(ordinary), generator=generator)[:count]]
        labels = torch.full_like(ids, IGNORED)
        labels[chosen] = ids[chosen]
        masks, others = round(0.8 * count), round(0.9 * count)
        ids[chosen[:masks]] = self.tokenizer.mask_token_id
        ids[chosen[masks:others]] = torch.randint(len(self.tokenizer), (others - masks,), generator=generator)
        return {**row, "input_ids": ids.tolist(), "labels": labels.tolist()}


class Collator:
    """Rows -> tensors; classification is padded to the longest row, language modelling has nothing to pad."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        padded = [row["input_ids"] + [self.pad_token_id] * (longest - len(row["input_ids"])) for row in rows]
        batch = {"input_ids": torch.tensor(padded)}
        if "label" in rows[0]:
            lengths = torch.tensor([len(row["input_ids"]) for row in rows])
            batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
            batch["labels"] = torch.tensor([row["label"] for row in rows])
        else:
            batch["n_bytes"] = torch.tensor([row["n_bytes"] for row in rows])
            if "labels" in rows[0]:
                batch["labels"] = torch.tensor([row["labels"] for row in rows])
        return batch
