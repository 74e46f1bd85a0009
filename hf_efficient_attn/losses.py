"""
The loss of a causal language model without its logits: cross-entropy in chunks of positions.

For T positions of width E and a vocabulary of V, the logits, their float32 copy and their gradient are three tensors
of T x V, and for long texts they are most of a training step's memory (8,192 x 49,152 in float32: 1.6 GB each). Here
nll_t = logsumexp_v(h_t W_v) - h_t W_{y_t} is computed for `chunk_size` positions at a time: memory chunk_size x V. Where the
head learns, each chunk's logits are recomputed in the backward pass, one more product with the head. Where it does not, as
under adapters, d nll_t / d h_t is all that a backward pass can ask for and is computed at once, while the logits are there
(Hsu 2024, Liger Kernel, arXiv:2410.10989, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from .modes import evaluating

IGNORED = -100  # the label of a position that is not predicted


def positions_at_once(hidden: Tensor) -> int:
    """
    How many positions' logits to hold where nobody says: 1,024, on a CPU 128. Logits of more are memory that the allocator
    takes from the system each time, and new pages cost more than the product.
    """
    return 128 if hidden.device.type == "cpu" else 1024


def chunked_cross_entropy(hidden: Tensor, head: nn.Module, labels: Tensor, chunk_size: int | None = None) -> Tensor:
    """
    The negative log-likelihood of each label, in nats and float32; 0 where the label is -100.

    Args:
        hidden: (T, E), what the head reads.
        head: maps (t, E) to logits (t, V).
        labels: (T,), integers below V, or -100.
        chunk_size: positions whose logits are held at a time; None: `positions_at_once`.

    Returns:
        (T,) losses.

    Raises:
        ValueError: `chunk_size` below 1, or shapes that do not fit.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size = {chunk_size}: at least 1 position.")
    if hidden.dim() != 2 or labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and labels {tuple(labels.shape)}: expected (T, E) and (T,); flatten the batch first."
        )

    def losses(part: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(head(part).float(), target, reduction="none", ignore_index=IGNORED)

    return in_chunks(losses, hidden, labels, head, chunk_size)


def in_chunks(
    losses: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, target: Tensor, head: nn.Module, chunk_size: int | None
) -> Tensor:
    """
    `losses` of some positions at a time, hidden (t, E) and target (t, ...) -> (t,), each of its own position alone, without
    their logits, which `head` makes of `hidden`.
    """
    chunk_size = positions_at_once(hidden) if chunk_size is None else chunk_size
    parts = zip(hidden.split(chunk_size), target.split(chunk_size), strict=True)
    learns = [parameter.requires_grad for parameter in head.parameters()]
    if not learns or any(learns):  # without parameters a gradient is as large as the logits, which are there already
        found = [checkpoint(losses, *part, use_reentrant=False) for part in parts]
    else:
        found = [_Graded.apply(*part, losses) for part in parts]
    return torch.cat(found)


class _Graded(torch.autograd.Function):
    """Losses (t,) of hidden (t, E), which keep their gradients (t, E) in place of logits."""

    @staticmethod
    def forward(ctx, hidden: Tensor, target: Tensor, losses: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        if not ctx.needs_input_grad[0]:
            return losses(hidden, target)
        with torch.enable_grad():
            own = hidden.detach().requires_grad_()
            found = losses(own, target)
            found.sum().backward(inputs=[own])  # of autograd.grad what counts FLOPs knows nothing
        ctx.save_for_backward(own.grad)
        return found.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * outer.unsqueeze(1)).to(gradient.dtype), None, None


def causal_lm_losses(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    chunk_size: int | None = None,
    hidden: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """
    The negative log-likelihood of every token given those before it, by a Transformers model for causal language
    modelling.

    The body's last hidden state goes through the output embedding in chunks; `has_plain_head` says whether that is
    all this model does.

    Args:
        input_ids: (B, N).
        attention_mask: (B, N), 1 = keep; padded tokens are not predicted.
        hidden: (B, N, E), the body's last hidden state, where it was computed already.

    Returns:
        losses (B, N - 1) in nats, 0 where nothing is predicted, and a bool mask (B, N - 1) of the predicted tokens.
    """
    if hidden is None:
        hidden = model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]
    labels = input_ids[:, 1:]
    predicted = torch.ones_like(labels, dtype=torch.bool)
    if attention_mask is not None:
        predicted = attention_mask[:, 1:].bool() & attention_mask[:, :-1].bool()
        labels = labels.masked_fill(~predicted, IGNORED)
    losses = chunked_cross_entropy(
        hidden[:, :-1].flatten(0, 1), model.get_output_embeddings(), labels.flatten(), chunk_size
    )
    return losses.view_as(labels), predicted


@torch.no_grad()
def has_plain_head(model: nn.Module, input_ids: Tensor, tokens: int = 16) -> bool:
    """
    Whether the logits of this model are its output embedding applied to its body's last hidden state.

    Tried on a few tokens rather than looked up: some models cap or scale the logits, and for those the chunked loss
    would be wrong.
    """
    if model.get_output_embeddings() is None or model.base_model is model:
        return False
    with evaluating(model):
        probe = input_ids[:1, :tokens]
        logits = model(input_ids=probe, use_cache=False).logits
        hidden = model.base_model(input_ids=probe, use_cache=False)[0]
        plain = model.get_output_embeddings()(hidden)
    return logits.shape == plain.shape and torch.allclose(logits.float(), plain.float(), rtol=1e-3, atol=1e-3)
