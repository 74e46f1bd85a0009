"""
What a module learns beside the model's loss: running statistics (centroids, thresholds), which no gradient moves, and
auxiliary losses (load balance), which are added to the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class AuxiliaryLearner(nn.Module):
    """
    A training forward calls `observe` with sums over its real tokens and `add_loss` with losses. The sums reach
    `update_statistics` once the backward pass is through with the forward that made them, so that a recomputation of
    that forward (gradient checkpointing) sees the same statistics; in eval nothing moves. They are summed over processes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._observed: dict[str, Tensor] | None = None
        self._loss: Tensor | None = None
        self._share: float | Tensor | None = None  # of a call's tokens, while it is read in parts

    def __getstate__(self) -> dict:
        """Without what waits for a backward pass: it belongs to a graph, which is not copied."""
        return {**self.__dict__, "_observed": None, "_loss": None}

    def observe(self, **sums: Tensor) -> None:
        """Notes this forward's sums; ignored in eval."""
        if self.training:
            earlier = {} if self._share is None else self._observed or {}
            self._observed = {name: earlier.get(name, 0) + x.detach() for name, x in sums.items()}

    def add_loss(self, loss: Tensor) -> None:
        """A scalar to add to the model's loss; ignored in eval, and where no gradient comes of it."""
        if self.training and loss.requires_grad:
            loss = loss if self._share is None else loss * self._share
            self._loss = loss if self._loss is None else self._loss + loss

    @contextmanager
    def in_parts(self, attend: Callable[..., Tensor], tokens: int) -> Iterator[Callable[..., Tensor]]:
        """
        attend(query (B, H, N, D), *others, lengths (B,) or None) for a call of so many tokens that is read in parts: sums are
        added up, and a loss counts by the tokens of its part.
        """
        learners = [module for module in self.modules() if isinstance(module, AuxiliaryLearner)]

        def attend_part(query: Tensor, *rest: Tensor | None) -> Tensor:
            lengths = rest[-1]
            read = query.shape[0] * query.shape[2] if lengths is None else lengths.sum()
            for learner in learners:
                learner._share = read / tokens
            return attend(query, *rest)

        for learner in learners:
            learner._observed = None  # of a forward that is computed again
        try:
            yield attend_part
        finally:
            for learner in learners:
                learner._share = None

    def update_statistics(self, **sums: Tensor) -> None:
        """What `observe` was given, over all processes. Assign new buffers; a stored one may belong to a graph."""
        raise NotImplementedError(f"{type(self).__name__} observes and must define update_statistics().")

    def after_backward(self, given: Tensor, output: Tensor) -> None:
        """Called by a forward at its end: arranges for what it noted to be used when its gradients are through."""
        last = given if given.requires_grad else output
        if (self._observed is not None or self._loss is not None) and last.requires_grad:
            last.register_hook(self._settle)

    def _settle(self, gradient: Tensor) -> None:
        observed, self._observed, self._loss = self._observed, None, None
        if observed is None:
            return
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for x in observed.values():
                torch.distributed.all_reduce(x)
        with torch.no_grad():
            self.update_statistics(**observed)


def auxiliary_loss(model: nn.Module) -> Tensor | None:
    """
    The sum of the auxiliary losses that training forwards of `model` left since it was asked for or a backward pass came, or
    None. A model that is given labels adds it to its loss by itself; ask for it where you compute the loss yourself, as a
    `Trainer` does under label smoothing or with a loss function of your own. It is given out once.
    """
    learners = [module for module in model.modules() if isinstance(module, AuxiliaryLearner)]
    losses = [module._loss for module in learners if module._loss is not None]
    for module in learners:
        module._loss = None
    return torch.stack([loss.to(losses[0].device) for loss in losses]).sum() if losses else None
