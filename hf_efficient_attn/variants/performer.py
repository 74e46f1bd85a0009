"""
`performer` (FAVOR+): softmax attention estimated without bias by m positive random features,
    exp(q . k) = E_w [exp(w . q - |q|^2 / 2) exp(w . k - |k|^2 / 2)],  w ~ N(0, I_D),
with q and k times sqrt(scaling), the m directions w orthogonal within blocks of D, and norms drawn from chi(D).
kernel="relu" is the generalised form phi(x) = relu(w . x) / sqrt(m), which estimates another kernel.

Paper: Choromanski et al. 2021, Rethinking attention with Performers, arXiv:2009.14794. Cost N m D. Decoder: sums
(G, D + 1, m) and a maximum per feature (G, m), O(1). No dense limit: the error falls as 1 / sqrt(m) where q and k are
small, but its constant grows as exp(|q + k|^2 / 2), so that with pretrained weights a patched model must be trained.

Directions belong to key/value heads and are a buffer, `features` (G, m, D), drawn from `seed` and saved with the model;
they are rounded to bfloat16, so that a cast of the model leaves them alone. No learned parameters.
`redraw_interval` n > 0 draws new ones after every n training forwards whose backward pass came, at the start of a
later training forward: never while a forward waits for its backward pass, so that what activation checkpointing
computes again is the same; a decoder state keeps the directions it began with. Draws depend on `seed`, the layer and
their number.

From the paper: no epsilon is added to the features (it biases them); `ops.chunked_scan` divides out a maximum per
feature where exponentials could overflow. The normaliser of the relu form, whose features can all be zero, is at
least 1e-6. Attention dropout is ignored: no probabilities are formed.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from ..caching import AttentionState
from ..config import EfficientAttentionConfig, option
from ..ops.chunked_scan import attend_linearly, stored_sums
from ..ops.draws import normal, source
from ..ops.exponentials import exponential_attention, has_kernel
from ..ops.features import Features, project
from ..registry import register_variant
from ..variant import EfficientAttention, HostShape


@dataclass(kw_only=True)
class PerformerConfig(EfficientAttentionConfig):
    num_features: int = option(256, "random features per key/value head", minimum=1)
    kernel: str = option("softmax", "what the features estimate", choices=("softmax", "relu"))
    seed: int = option(0, "of the random directions", minimum=0)
    redraw_interval: int = option(0, "training steps between new directions; 0 keeps the first ones", minimum=0)

    @classmethod
    def tiny(cls, causal: bool) -> PerformerConfig:
        return cls(num_features=12)

    @classmethod
    def variations(cls, causal: bool) -> list[PerformerConfig]:
        return [cls(num_features=12, kernel="relu"), cls(num_features=3, seed=5)]


class _Open:
    """A training forward whose backward pass has not come; it lives as long as the forward's graph."""


@register_variant(
    "performer",
    family="kernels",
    summary="positive orthogonal random features of the softmax kernel",
    paper="Choromanski 2020, arXiv:2009.14794",
    also=("favor",),
)
class PerformerAttention(EfficientAttention):
    config_class = PerformerConfig
    constant_state = True

    def __init__(self, config: PerformerConfig, host: HostShape) -> None:
        super().__init__(config, host)
        self.register_buffer("features", self.draw(0).to(torch.get_default_dtype()))
        if config.redraw_interval:
            self.register_buffer("steps", torch.zeros(1, dtype=torch.int64, device="cpu"))
            self.register_buffer("drawn", torch.zeros(1, dtype=torch.int64, device="cpu"))
        self._open: weakref.WeakSet[_Open] = weakref.WeakSet()

    def __getstate__(self) -> dict:
        state = super().__getstate__()
        return {name: x for name, x in state.items() if name != "_open"}  # belongs to graphs, which stay behind

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._open = weakref.WeakSet()

    def draw(self, number: int) -> Tensor:
        """Set `number` of directions, (G, m, D) float32 on the CPU."""
        config, host = self.config, self.host
        generator = source(config.seed, host.layer, number)
        blocks = -(-config.num_features // host.head_dim)
        q, r = torch.linalg.qr(normal(generator, host.num_kv_heads, blocks, host.head_dim, host.head_dim))
        q = q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]  # without this the directions are not uniform
        directions = q.mT.flatten(1, 2)[:, : config.num_features]
        norms = normal(generator, *directions.shape).norm(dim=-1, keepdim=True)
        return (directions * norms).bfloat16().float()

    def attend(self, query, key, value, *, lengths, scaling, dropout, causal, state, hidden) -> Tensor:
        directions = self.features
        if self.config.redraw_interval:
            directions = self._directions(state)
        directions = directions.to(torch.promote_types(query.dtype, torch.float32))
        if self.config.kernel == "softmax":
            output = self._estimate(query, key, value, directions, scaling, causal=causal, lengths=lengths, state=state)
        else:
            features = self._relu(directions)
            output = attend_linearly(query, key, value, features, causal=causal, lengths=lengths, state=state)
        if self.config.redraw_interval and self.training and output.requires_grad:
            self._count(output)
        return output

    def _estimate(self, query, key, value, directions, scaling: float, *, causal, lengths, state) -> Tensor:
        """Softmax attention, by the compiled kernel where it can do this."""
        maps = directions * math.sqrt(scaling)
        if causal and has_kernel(query, maps, state):
            before = stored_sums(state)
            output, after = exponential_attention(query, key, value, maps, scaling / 2, lengths=lengths, before=before)
            if state is not None:
                state.entries.update(total=after.total, top=after.top)
            return output
        features = self._softmax(directions, scaling, len(query))
        return attend_linearly(query, key, value, features, causal=causal, lengths=lengths, state=state)

    def _softmax(self, directions: Tensor, scaling: float, batch: int) -> Features:
        def key(x: Tensor, w: Tensor) -> Tensor:
            raw = project(x, w)
            raw.mT.sub_(scaling / 2 * x.square().sum(-1)[:, :, None])
            return raw

        def pull_key(x: Tensor, slope: Tensor, w: Tensor) -> Tensor:
            return _pull(x, slope, w).addcmul_(x, slope.sum(-1, keepdim=True), value=-scaling)

        w = (directions * math.sqrt(scaling)).expand(batch, -1, -1, -1).contiguous()  # |q|^2 cancels
        return Features(project, key, directions.shape[1], (w,), logarithmic=True, pulls=(_pull, pull_key))

    def _relu(self, directions: Tensor) -> Features:
        def both(x: Tensor, w: Tensor) -> Tensor:
            return project(x, w).relu()

        size = directions.shape[1]
        return Features(both, both, size, (directions[None] / math.sqrt(size),), floor=1e-6)

    @torch.compiler.disable
    def _directions(self, state: AttentionState | None) -> Tensor:
        """Those that the state began with; else the current ones, which are drawn anew here when it is time."""
        if state is not None and "drawn" in state.entries:
            number = state.entries["drawn"]
            return self.features if number == int(self.drawn) else self.draw(number).to(self.features)
        due = int(self.steps) // self.config.redraw_interval
        if self.training and due != int(self.drawn) and not self._open and not _in_backward():
            self.features = self.draw(due).to(self.features)
            self.drawn.fill_(due)
        if state is not None:
            state.entries["drawn"] = int(self.drawn)
        return self.features

    @torch.compiler.disable
    def _count(self, output: Tensor) -> None:
        """Counts this forward once its gradient arrives; one that is only a recomputation never gets any, or is it."""
        forward = _Open()
        if not _in_backward():
            self._open.add(forward)

        def arrived(grad: Tensor) -> None:
            self._open.discard(forward)
            self.steps += 1

        output.register_hook(arrived)


def _pull(x: Tensor, slope: Tensor, w: Tensor) -> Tensor:
    """The gradient of `project` by x."""
    return (slope.unflatten(1, (w.shape[1], -1)).flatten(2, 3) @ w).view_as(x)


def _in_backward() -> bool:
    """Whether this call computes again, for a backward pass, what activation checkpointing did not keep."""
    return torch._C._current_graph_task_id() != -1
