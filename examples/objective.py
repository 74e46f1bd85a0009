"""
What is computed on a batch? The loss that is trained and the figures that are reported, for each task.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from examples.metrics import classification_scores, likelihood_scores
from hf_efficient_attn.auxiliary import auxiliary_loss
from hf_efficient_attn.losses import IGNORED, causal_lm_losses, has_plain_head


class Objective(nn.Module):
    """
    A model with its task: batch -> what training and evaluation need. Wrapped, so that the whole loss runs inside the
    forward that data-parallel training hooks into.

    For causal language modelling the logits are never held: the loss is computed in chunks of positions, unless the
    model does more to its logits than apply its head.
    """

    def __init__(self, model: nn.Module, task: str, chunk_size: int = 1024) -> None:
        super().__init__()
        self.model, self.task, self.chunk_size = model, task, chunk_size
        self.chunked: bool | None = None  # found out on the first batch

    def forward(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """
        batch: `input_ids` (B, N), and by task `attention_mask`, `labels`, `n_bytes`.

        Returns `loss` (a scalar) and, one value for each text: `nll` (sum of -ln p), `tokens` (what was predicted),
        and the `prediction` and `reference` of a classification or the `n_bytes` of a text.
        """
        if self.task == "causal-lm":
            return self._causal(batch)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels") if name in batch}
        outputs = self.model(**inputs)
        logits, labels = outputs.logits.float(), batch["labels"]
        if self.task == "classification":
            nll = cross_entropy(logits.detach(), labels, reduction="none")
            return {"loss": outputs.loss, "nll": nll, "prediction": logits.argmax(-1), "reference": labels}
        with torch.no_grad():
            nll = cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
        return {"loss": outputs.loss, "nll": nll.sum(1), "tokens": (labels != IGNORED).sum(1)}

    def _causal(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        ids = batch["input_ids"]
        if self.chunked is None:
            self.chunked = has_plain_head(model, ids)
        if self.chunked:
            nll, predicted = causal_lm_losses(model, ids, chunk_size=self.chunk_size)
        else:
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            nll = cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            predicted = torch.ones_like(nll, dtype=torch.bool)
        loss, extra = nll.sum() / predicted.sum(), auxiliary_loss(model)
        figures = {
            "loss": loss if extra is None else loss + extra,
            "nll": nll.detach().sum(1),
            "tokens": predicted.sum(1),
        }
        return figures | ({"n_bytes": batch["n_bytes"]} if "n_bytes" in batch else {})


def scores(task: str, figures: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """The metrics of a task from the per-text figures of a whole evaluation; the first is the one that rows are ranked by."""
    if task == "classification":
        named = classification_scores(figures["prediction"].tolist(), figures["reference"].tolist())
    else:
        n_bytes = figures["n_bytes"].tolist() if task == "causal-lm" else None
        named = likelihood_scores(figures["nll"].tolist(), figures["tokens"].tolist(), n_bytes)
    texts_or_tokens = figures["tokens"].sum() if "tokens" in figures else len(figures["nll"])
    return named | {"loss": float(figures["nll"].double().sum() / texts_or_tokens)}


METRIC = {"classification": "accuracy", "masked-lm": "perplexity", "causal-lm": "perplexity"}
HIGHER_IS_BETTER = {"accuracy": True, "perplexity": False}
