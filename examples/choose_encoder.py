"""
Which variant for which layer of a sentence encoder whose embeddings a classifier reads: chosen on some texts, judged on others.

    python -m examples.choose_encoder --model minilm --dataset texts/ --max-length 2048 \\
        --variants candidates.yaml --max-cost 0.33 --output results.json

The classifier is a logistic regression on the dense embeddings of `--train-texts` texts. Nothing is trained after that, and
choosing needs no labels: `hf_efficient_attn.select_variants` finds the mapping by the Kullback-Leibler divergence from what
the classifier says of `--choose-texts` texts of the other split with dense attention. The rest of them give the accuracy with
dense attention, with the chosen mapping, and with every candidate in all layers, and in how many texts the class is another.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from examples.choose import add_choice, add_rows, budget_of, candidates, show
from examples.data import load_texts, tokenize
from examples.embedded import MODELS
from examples.embeddings import embed, embedding, open_encoder
from examples.rows import Help, check_counts, open_results, run_program
from hf_efficient_attn.selection import select_variants


def main(args: Sequence[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
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
    found = select_variants(
        model,
        probe.batches(model, choose_on),
        candidates=list(table.items()),
        budget=budget,
        loss=probe.loss,
        loss_of="text",
        per_head=options.per_head,
    )

    def measured() -> dict:
        said = probe.says(model, test)
        return {"accuracy": sum(a == row["label"] for a, row in zip(said, test, strict=True)) / len(test), "said": said}

    def judge(row: dict, dense: dict) -> dict:
        changed = sum(a != b for a, b in zip(row["said"], dense["said"], strict=True))
        return {"lost_points": 100 * (dense["accuracy"] - row["accuracy"]), "changed": changed}

    add_rows(results, model, found, table, measured, judge, options.output)
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
        self.classes = fitted.classes_.tolist()

    def logits(self, model: nn.Module, ids: Sequence[int]) -> Tensor:
        """(classes,)"""
        return self.weight @ embedding(model, ids) + self.bias

    @torch.no_grad()
    def says(self, model: nn.Module, rows: Sequence[Mapping[str, Any]]) -> list[Any]:
        """The class of each text."""
        return [self.classes[self.logits(model, row["input_ids"]).argmax()] for row in rows]

    @torch.no_grad()
    def batches(self, model: nn.Module, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Tensor]]:
        """For `loss`: each text with the (dense) model's probabilities of the classes and one class drawn from them."""
        found = [self.logits(model, row["input_ids"]).softmax(-1) for row in rows]
        random = torch.Generator().manual_seed(0)
        return [
            {
                "input_ids": torch.tensor([row["input_ids"]]),
                "said": said,
                "drawn": torch.multinomial(said, 1, generator=random),
            }
            for row, said in zip(rows, found, strict=True)
        ]

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """
        The cross-entropy to what dense attention says, whose least value is at dense: its gradient there is zero, and so it
        is given that of a drawn class, of which the expected square is the curvature (the Fisher matrix).
        """
        found = self.logits(model, batch["input_ids"][0].tolist()).log_softmax(-1)
        drawn = -found[batch["drawn"]].sum()
        return drawn - drawn.detach() - (batch["said"] * found.detach()).sum()


if __name__ == "__main__":
    run_program(main)
