"""
Which variant for which layer of a sentence encoder whose embeddings a classifier reads: chosen on some texts, judged on others.

    python -m examples.choose_encoder --model minilm --dataset texts/ --max-length 2048 \
        --variants candidates.yaml --max-cost 0.33 --output results.json

The classifier is a logistic regression on the dense embeddings of `--train-texts` texts. Nothing is trained after that, and
choosing needs no labels: `hf_efficient_attn.select_variants` finds the mapping by how well what the classifier says of
`--choose-texts` texts of the other split is still said. The rest of them give the accuracy with dense attention, with the
chosen mapping, and with every candidate in all layers.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from examples.choose import add_choice, add_rows, budget_of, candidates, check_counts, show
from examples.data import load_texts, tokenize
from examples.embedded import MODELS
from examples.embeddings import embed, embedding, open_encoder
from examples.rows import open_results, run_program
from hf_efficient_attn.selection import select_variants


def main(args: Sequence[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm", help=f"a Hub id, a folder, or one of: {', '.join(MODELS)}")
    parser.add_argument("--dataset", default="embedded", help="labelled texts, as for examples/finetune.py")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens that a text is cut at")
    parser.add_argument("--train-texts", type=int, default=200, help="to train the classifier on")
    parser.add_argument("--choose-texts", type=int, default=40, help="to choose on")
    parser.add_argument("--test-texts", type=int, default=100, help="to report on")
    parser.add_argument("--strength", type=float, default=100.0, help="C of the logistic regression")
    add_choice(parser)
    options = parser.parse_args(args)
    check_counts(options, max_length=1, train_texts=2, choose_texts=1, test_texts=1)
    budget = budget_of(parser, options)
    settings = {name: value for name, value in vars(options).items() if name not in ("variants", "output")}
    results = open_results(options.output, settings, "examples.choose_encoder", args)
    table = candidates(options)
    model, tokenizer = open_encoder(options.model, options.max_length)
    data = load_texts(options.dataset, "classification")
    train, held_out = (
        tokenize(texts, labels, tokenizer, options.max_length, limit).rows
        for texts, labels, limit in (
            (data.train, data.train_labels, options.train_texts),
            (data.test, data.test_labels, options.choose_texts + options.test_texts),
        )
    )
    choose_on, test = held_out[: options.choose_texts], held_out[options.choose_texts :]
    if not test:
        raise ValueError(
            f"{options.dataset}: {len(held_out)} texts are held out, none beside --choose-texts to report on."
        )
    probe = Probe(model, train, options.strength)
    batches = [{"input_ids": torch.tensor([row["input_ids"]]), "said": probe.says(model, row)} for row in choose_on]
    found = select_variants(
        model, batches, candidates=list(table.items()), budget=budget, loss=probe.loss, per_head=options.per_head
    )

    def judge(row: dict, dense: dict) -> dict:
        return {"lost_points": 100 * (dense["accuracy"] - row["accuracy"])}

    add_rows(results, model, found, table, lambda: {"accuracy": probe.accuracy(model, test)}, judge, options.output)
    show(results, "accuracy", "lost_points")
    return results


class Probe:
    """A linear classifier of embeddings, trained on those of dense attention."""

    def __init__(self, model: nn.Module, rows: Sequence[Mapping[str, Any]], strength: float) -> None:
        vectors, labels = embed(model, [row["input_ids"] for row in rows]), [row["label"] for row in rows]
        fitted = LogisticRegression(C=strength, max_iter=2000).fit(vectors, labels)
        self.weight, self.bias = (torch.tensor(x, dtype=torch.float32) for x in (fitted.coef_, fitted.intercept_))
        if len(fitted.classes_) == 2:  # which have one logit between them
            self.weight, self.bias = (torch.cat([torch.zeros_like(x), x]) for x in (self.weight, self.bias))
        self.classes = list(fitted.classes_)

    def logits(self, model: nn.Module, ids: Sequence[int]) -> Tensor:
        """(classes,)"""
        return self.weight @ embedding(model, ids) + self.bias

    @torch.no_grad()
    def says(self, model: nn.Module, row: Mapping[str, Any]) -> Tensor:
        """The place of the class."""
        return self.logits(model, row["input_ids"]).argmax()

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        return nn.functional.cross_entropy(self.logits(model, batch["input_ids"][0].tolist()), batch["said"])

    def accuracy(self, model: nn.Module, rows: Sequence[Mapping[str, Any]]) -> float:
        return sum(self.classes[self.says(model, row)] == row["label"] for row in rows) / len(rows)


if __name__ == "__main__":
    run_program(main)
