"""
How does a patched model get its quality back?

1. Attention transfer (Zhang 2024, Hedgehog, arXiv:2402.04347, section 4.2; Zhang 2025, LoLCATs, arXiv:2410.10254, eq. 5):
   each patched layer learns to give the output of its dense attention on the same inputs,
       error_l = sum_t |variant_l(x)_t - dense_l(x)_t|^2 / sum_t |dense_l(x)_t|^2      over real tokens t,
   while the dense output flows on to the next layer, so that every layer sees what it saw in the pretrained model. Only the
   variants' own parameters train. One forward of one model gives all layers' errors: no second copy of the weights.
2. Distillation: the patched model learns to give the token distribution of the same weights under dense attention
   (`dense_attention`), beside the task's own loss.

    with attention_transfer(model) as transfer:
        optimizer = torch.optim.AdamW(transfer.groups(lr=0.05), weight_decay=0.0)
        for batch in batches:
            model(**batch)
            transfer.loss().backward()
            optimizer.step(); optimizer.zero_grad()
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .dispatch import CHILD
from .hosts import base_model, find_hosts
from .losses import in_chunks
from .modes import evaluating
from .ops.exact import exact_attention
from .ops.rows import Rows
from .swapping import Layers, is_patched, parse_layers
from .variant import EfficientAttention


@dataclass(frozen=True)
class LayerError:
    """How far a patched layer's attention is from dense: `error` is the squared distance relative to dense's square."""

    layer: int
    name: str
    variant: str
    error: float


class _Watch:
    """
    A forward hook of one variant, which hands on the dense output in its place. Where it `learns` it keeps the variant's
    squared distance from dense and dense's square, summed over real tokens, and over the layers that share the variant.
    """

    def __init__(self, learns: bool) -> None:
        self.learns = learns
        self.begin()

    def begin(self) -> None:
        """A forward of the model begins."""
        self.distance: Tensor | None = None
        self.square: Tensor | None = None
        self.graded = True

    def __call__(self, variant: EfficientAttention, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        if kwargs.get("state") is not None:
            raise ValueError("leave out use_cache=True: attention is compared with dense on whole texts.")
        rows = kwargs.get("padding")
        rows = Rows.of(rows) if isinstance(rows, Tensor) else rows

        def exact(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None = None) -> Tensor:
            options = {"scaling": kwargs["scaling"], "causal": kwargs["causal"]}
            return exact_attention(query, key, value, lengths=lengths, **options)

        dense = exact(*args) if rows is None else rows.over(exact, *args)
        if self.learns:
            right = dense.detach().float()
            distance, square = (output.float() - right).square().sum(), right.square().sum()  # zeros at padding in both
            if torch._C._current_graph_task_id() == -1:  # not a recomputation in the backward pass
                self.distance = distance if self.distance is None else self.distance + distance
                self.square = square if self.square is None else self.square + square
                self.graded &= torch.is_grad_enabled()
        return dense

    def error(self) -> Tensor:
        """The relative error of the latest forward."""
        return self.distance / self.square.clamp_min(torch.finfo(torch.float32).tiny)


class Transfer:
    """
    What `attention_transfer` gives: `parameters`, those of the chosen layers' variants, and `groups(lr)` of them for an
    optimizer; `loss()`, the mean of the layers' relative errors in the latest forward; `errors()`, the errors by layer;
    `undo(layers)`, which puts back, in whole or in part, what a layer's parameters were when the transfer began.
    """

    def __init__(self, layers: list[tuple[int, str, EfficientAttention]]) -> None:
        self._layers = layers
        self._watches = [_Watch(learns=True) for _ in layers]
        self.parameters: list[nn.Parameter] = list({p: None for _, _, v in layers for p in v.parameters()})
        self._start = [{name: x.clone() for name, x in v.state_dict().items()} for _, _, v in layers]

    def groups(self, lr: float) -> list[dict[str, Any]]:
        """
        The parameters, each with a rate relative to its size: lr times the root mean square of its entries that are not
        zero (of a map that begins as the identity: 1), or lr where all are. One rate for all would leave feature maps as
        they are or tear small projections apart (Shazeer and Stern 2018, Adafactor, arXiv:1804.04235, section 8). A variant
        may know better of its own (`EfficientAttention.step_of`).

        Raises:
            ValueError: these variants bring no parameters.
        """
        if not self.parameters:
            raise ValueError("these variants bring no parameters to train; fine-tune the model's own weights.")
        steps = {}
        for _, _, variant in self._layers:
            for part in variant.modules():
                for name, p in part.named_parameters(recurse=False):
                    step = part.step_of(name, p.detach()) if isinstance(part, EfficientAttention) else None
                    steps[p] = _size(p) if step is None else step
        return [{"params": [p], "lr": lr * steps[p]} for p in self.parameters]

    def _check_called(self) -> None:
        if any(watch.distance is None for watch in self._watches):
            raise RuntimeError("there is nothing to compare yet: call the model first.")

    @torch.no_grad()
    def undo(self, layers: Layers, keep: float = 0.0) -> None:
        """
        Puts back what these layers' variants held when the transfer began, but for the share `keep` of what changed since;
        parameters that layers share for all of them.

        Raises:
            ValueError: a layer that takes no part.
        """
        own = [number for number, _, _ in self._layers]
        chosen = parse_layers(layers, max(own) + 1)
        if set(chosen) - set(own):
            raise ValueError(f"layers = {layers!r}: the transfer has layers {own}.")
        done = set()
        for (number, _, variant), start in zip(self._layers, self._start, strict=True):
            if number not in chosen:
                continue
            for name, x in variant.state_dict().items():  # which are the variant's own tensors
                if x.data_ptr() not in done and not torch.equal(x, start[name]):  # a threshold may be -inf
                    part_way = keep and x.is_floating_point()
                    x.copy_(torch.lerp(start[name], x, keep) if part_way else start[name])
                done.add(x.data_ptr())

    def loss(self) -> Tensor:
        """
        Where no parameter took part, as those of summaries in a text that none is made of, its gradients are zeros.

        Raises:
            RuntimeError: the model was not called yet, or without gradients.
        """
        self._check_called()
        errors = [watch.error() for watch in self._watches]
        loss = torch.stack([error.to(errors[0].device) for error in errors]).mean()
        if loss.requires_grad or not self.parameters or not torch.is_grad_enabled():
            return loss
        if not all(watch.graded for watch in self._watches):
            raise RuntimeError(
                "the model was called without gradients: leave out torch.no_grad(), and use gradient checkpointing with "
                'gradient_checkpointing_kwargs={"use_reentrant": False}.'
            )
        return loss + 0 * sum(parameter.sum().to(loss.device) for parameter in self.parameters)

    def errors(self) -> list[LayerError]:
        """
        Raises:
            RuntimeError: the model was not called yet.
        """
        self._check_called()
        return [
            LayerError(number, name, variant.config.name, float(watch.error().detach()))
            for (number, name, variant), watch in zip(self._layers, self._watches, strict=True)
        ]


def _size(parameter: Tensor) -> float:
    entries = parameter.detach().float()
    return (entries.square().sum() / entries.count_nonzero().clamp_min(1)).sqrt().item() or 1.0


def patched_layers(model: nn.Module, layers: Layers = None) -> list[tuple[int, str, EfficientAttention]]:
    """
    Number, name and variant of every patched attention layer, or of those among `layers`.

    Raises:
        ValueError: none of them is patched.
    """
    found = _patched_layers(model, layers)
    if not found:
        raise ValueError(f"no attention layer of this {type(model).__name__} is patched; call patch_model first.")
    return found


def _patched_layers(model: nn.Module, layers: Layers = None) -> list[tuple[int, str, EfficientAttention]]:
    hosts = find_hosts(base_model(model))
    chosen = [hosts[number] for number in parse_layers(layers, len(hosts))]
    return [(h.shape.layer, h.name, getattr(h.module, CHILD)) for h in chosen if hasattr(h.module, CHILD)]


@contextmanager
def attention_transfer(model: nn.Module, layers: Layers = None) -> Iterator[Transfer]:
    """
    Inside the block the model runs on dense attention, and its variants (of `layers`, or all) are compared with it and can
    learn from it; everything but their parameters is frozen. Give a few `layers` at a time where all do not fit.

    A variant without parameters has an error but nothing to train: `transfer.parameters` is empty then.

    Raises:
        ValueError: no such layer is patched.
    """
    transfer = Transfer(patched_layers(model, layers))
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for parameter in before:
            parameter.requires_grad_(False)
        for parameter in transfer.parameters:
            parameter.requires_grad_(True)
        watched = {id(v): w for (_, _, v), w in zip(transfer._layers, transfer._watches, strict=True)}
        with _hooked(model, watched):
            yield transfer
    finally:
        for parameter, wanted in before.items():
            parameter.requires_grad_(wanted)


@contextmanager
def dense_attention(model: nn.Module) -> Iterator[nn.Module]:
    """
    Inside the block every patched layer gives dense attention's output: the teacher, made of the student's weights. What was
    patched beside attention, such as `moe`, stays as it is.

    Raises:
        ValueError: the model is not patched.
    """
    if not is_patched(base_model(model)):
        patched_layers(model)  # which says so
    with _hooked(model, {}):
        yield model


@contextmanager
def _hooked(model: nn.Module, watches: Mapping[int, _Watch]) -> Iterator[None]:
    """The given watches on their variants, and one that only hands on dense output on all others; no cache by default."""
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    configs = {id(part.config): part.config for part in parts}
    caching = [(config, config.use_cache) for config in configs.values() if hasattr(config, "use_cache")]
    handles = []
    try:
        for config, _ in caching:
            config.use_cache = False
        for _, _, variant in _patched_layers(model):
            watch = watches.get(id(variant)) or _Watch(learns=False)
            handles.append(variant.register_forward_hook(watch, with_kwargs=True))
        handles += [part.register_forward_pre_hook(_Beginning(part, watches)) for part in parts if watches]
        yield
    finally:
        for handle in handles:
            handle.remove()
        for config, wanted in caching:
            config.use_cache = wanted


class _Beginning:
    """A forward pre-hook: the watches of what lies in a part of the model begin anew when it is called."""

    def __init__(self, part: nn.Module, watches: Mapping[int, _Watch]) -> None:
        self.watches = [watches[id(module)] for module in part.modules() if id(module) in watches]

    def __call__(self, part: nn.Module, args: tuple) -> None:
        for watch in self.watches:
            watch.begin()


@torch.no_grad()
def attention_errors(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> list[LayerError]:
    """
    The relative error of every patched layer's attention, over all real tokens of the batches, each layer fed with what it
    sees in the dense model. A batch holds the model's keyword arguments.

    Raises:
        ValueError: the model is not patched, or there is no batch.
    """
    seen: list[list[tuple[Tensor, Tensor]]] = []
    with evaluating(model), attention_transfer(model) as transfer:
        for batch in batches:
            model(**batch)
            seen.append([(watch.distance, watch.square) for watch in transfer._watches])
        if not seen:
            raise ValueError("no batch was given to measure the attention's error on.")
        for watch, pairs in zip(transfer._watches, zip(*seen, strict=True), strict=True):
            watch.distance, watch.square = map(sum, zip(*pairs, strict=True))
        return transfer.errors()


def distillation_losses(
    hidden: Tensor, teacher_hidden: Tensor, head: nn.Module, temperature: float = 1.0, chunk_size: int | None = None
) -> Tensor:
    """
    KL(teacher || student) of each position's token distribution in nats, times temperature^2 (Hinton 2015, arXiv:1503.02531):
    hidden and teacher_hidden (T, E) -> (T,). Both go through `head`, (t, E) -> (t, V), `chunk_size` positions at a time,
    and no logits are kept (`hf_efficient_attn.losses`).
    """

    def losses(own: Tensor, other: Tensor) -> Tensor:
        with torch.no_grad():
            target = (head(other).float() / temperature).log_softmax(-1)
        log_p = (head(own).float() / temperature).log_softmax(-1)
        return (target.exp() * (target - log_p)).sum(-1) * temperature**2

    return in_chunks(losses, hidden, teacher_hidden, head, chunk_size)
