"""
What is computed on a batch? The loss that is trained and the figures that are reported, for each task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from examples.metrics import classification_scores, likelihood_scores
from examples.rates import layerwise
from hf_efficient_attn.auxiliary import auxiliary_loss
from hf_efficient_attn.losses import IGNORED, causal_lm_losses, has_plain_head
from hf_efficient_attn.recovery import dense_attention, distillation_losses


class Objective(nn.Module):
    """
    A model with its task: batch -> what training and evaluation need. Wrapped, so that the whole loss runs inside the
    forward that data-parallel training hooks into.

    For causal language modelling the logits are never held: the loss is computed in chunks of positions, unless the
    model does more to its logits than apply its head.

    `distill` > 0, for a patched model: in training the loss has so many times KL(teacher || student) added, the mean over
    predictions. The teacher is the same weights under dense attention, adapters switched off, but with the student's head where
    that is trained as a whole: the model's own may never have been (without adapters all of it moves with the student).
    """

    def __init__(
        self, model: nn.Module, task: str, chunk_size: int | None = None, distill: float = 0.0, layer_decay: float = 1.0
    ) -> None:
        super().__init__()
        self.model, self.task, self.chunk_size, self.distill = model, task, chunk_size, distill
        self.layer_decay = layer_decay
        self.chunked: bool | None = None  # found out on the first batch

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What is trained, each group with the `scale` of its learning rate."""
        return layerwise(self.model, self.layer_decay)

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
        loss = outputs.loss
        if self.training and self.distill:
            predicted = labels != IGNORED
            teacher = self._dense(lambda: self.model(**inputs).logits)
            loss = loss + self._divergence(logits[predicted], teacher[predicted], nn.Identity())
        if self.task == "classification":
            nll = cross_entropy(logits.detach(), labels, reduction="none")
            return {"loss": loss, "nll": nll, "prediction": logits.argmax(-1), "reference": labels}
        with torch.no_grad():
            nll = cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
        return {"loss": loss, "nll": nll.sum(1), "tokens": (labels != IGNORED).sum(1)}

    def _causal(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        ids = batch["input_ids"]
        if self.chunked is None:
            self.chunked = has_plain_head(model, ids)
        body = model.base_model if self.chunked else model
        head = model.get_output_embeddings() if self.chunked else nn.Identity()

        def read() -> torch.Tensor:
            return body(input_ids=ids, use_cache=False)[0]  # hidden states, or logits

        own = read()
        if self.chunked:
            nll, predicted = causal_lm_losses(model, ids, chunk_size=self.chunk_size, hidden=own)
        else:
            nll = cross_entropy(own[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
            predicted = torch.ones_like(nll, dtype=torch.bool)
        loss, extra = nll.sum() / predicted.sum(), auxiliary_loss(model)
        loss = loss if extra is None else loss + extra
        if self.training and self.distill:
            teacher = self._dense(read)[:, :-1].flatten(0, 1)
            loss = loss + self._divergence(own[:, :-1].flatten(0, 1), teacher, head)
        figures = {"loss": loss, "nll": nll.detach().sum(1), "tokens": predicted.sum(1)}
        return figures | ({"n_bytes": batch["n_bytes"]} if "n_bytes" in batch else {})

    def _dense(self, read: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `read` gives under dense attention, without dropout."""
        adapters = _without_adapters(self.model) if hasattr(self.model, "disable_adapter") else nullcontext()
        self.model.eval()
        try:
            with torch.no_grad(), dense_attention(self.model), adapters:
                return read()
        finally:
            self.model.train()

    def _divergence(self, own: torch.Tensor, teacher: torch.Tensor, head: nn.Module) -> torch.Tensor:
        return self.distill * distillation_losses(own, teacher, head, chunk_size=self.chunk_size).mean()


@contextmanager
def _without_adapters(model: nn.Module) -> Iterator[None]:
    """What peft's `disable_adapter` does, but for parts that are trained as a whole."""
    from peft.utils import ModulesToSaveWrapper

    with model.disable_adapter():
        for module in model.modules():
            if isinstance(module, ModulesToSaveWrapper):
                module.enable_adapters(True)
        yield


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
