"""
A router chooses the query heads that a token runs; the others give zeros and are not computed:

    p = softmax(W_r x_i) over the routed heads,    H_i = the first `num_shared_heads` heads and the `top_k` best by p,
    output_ih = (1 + p_h - stopgrad(p_h)) softmax(scaling q_ih K_h^T) V_h for h in H_i, else 0.

Zhang 2022, Mixture of Attention Heads (arXiv:2210.05144); Jin 2024, MoH (arXiv:2410.11842), its shared heads. Of equal
probabilities the lower head wins. x is the layer's input. In training `balance` times the load-balance loss over the
routed heads (`ops.router.py`) joins the model's loss.

Departures: gates are 1 in the forward pass, with the gradient of p in the backward pass, so that a chosen head is worth
what it was worth to the pretrained model (the papers weigh by p, MoH with a second router for the shared heads); MoA gives
its experts one shared key and value projection, here all stay as they were trained.

Cost: N^2 (top_k + num_shared_heads) / H, and no less however the choices fall. Decoder: the same, causally; the state keeps
the keys and values of all heads, O(N), because later tokens may choose any. Dense limit: top_k + num_shared_heads >= H.
New: the router, small and drawn from `seed`; the patched model starts as the pretrained one without the heads it leaves out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..caching import Count, TokenStore
from ..config import EfficientAttentionConfig, option
from ..ops.exact import exact_attention, masked_attention
from ..ops.joint import CHUNK, Part, joint_attention
from ..ops.lines import line_attention
from ..ops.ranges import has_kernel
from ..ops.router import Router, balance_loss, best
from ..registry import register_variant
from ..variant import EfficientAttention, HostShape


@dataclass(kw_only=True)
class MixtureOfHeadsConfig(EfficientAttentionConfig):
    """Hyper-parameters of `mixture_of_heads`."""

    top_k: int | None = option(
        None, "heads that a token chooses; more than there are means all, None a quarter of all heads", minimum=1
    )
    num_shared_heads: int | None = option(None, "first heads, which every token runs; None = a quarter", minimum=0)
    balance: float = option(0.01, "weight of the load-balance loss", minimum=0.0)
    seed: int = option(0, "of the router's first weights", minimum=0)

    @classmethod
    def tiny(cls, causal: bool) -> MixtureOfHeadsConfig:
        return cls(top_k=1, num_shared_heads=1)

    @classmethod
    def variations(cls, causal: bool) -> list[MixtureOfHeadsConfig]:
        return [cls(top_k=2, num_shared_heads=0), cls(top_k=1, num_shared_heads=2), cls()]

    @classmethod
    def dense_limit(cls, length: int, causal: bool) -> MixtureOfHeadsConfig:
        return cls(top_k=2**16)


@register_variant(
    "mixture_of_heads",
    family="sparse models",
    summary="each token runs some of the query heads, chosen by a router",
    paper="Zhang 2022, arXiv:2210.05144; Jin 2024, arXiv:2410.11842",
)
class MixtureOfHeadsAttention(EfficientAttention):
    config_class = MixtureOfHeadsConfig
    needs_hidden = True
    linear_cost = False

    def __init__(self, config: MixtureOfHeadsConfig, host: HostShape) -> None:
        super().__init__(config, host)
        routed = host.num_heads - config.num_shared_heads
        self.router = Router(host.hidden_size, routed, seed=config.seed, layer=host.layer)

    @classmethod
    def resolve(cls, config: MixtureOfHeadsConfig, host: HostShape) -> MixtureOfHeadsConfig:
        quarter = max(1, host.num_heads // 4)
        shared = min(quarter, host.num_heads - 1) if config.num_shared_heads is None else config.num_shared_heads
        return replace(config, top_k=config.top_k or quarter, num_shared_heads=shared)

    @classmethod
    def check_host(cls, config: MixtureOfHeadsConfig, host: HostShape) -> None:
        if config.num_shared_heads >= host.num_heads:
            raise ValueError(
                f"MixtureOfHeadsConfig.num_shared_heads = {config.num_shared_heads} leaves none of the layer's "
                f"{host.num_heads} heads to choose from; give at most {host.num_heads - 1}."
            )

    def attend(self, query, key, value, *, lengths, scaling, dropout, causal, state, hidden) -> Tensor:
        gates, chosen = self._route(hidden, lengths)
        used, offset = lengths, 0
        if state is not None:
            buffer = state.store("past", TokenStore).extend(key, value, lengths)
            key, value, used, offset = buffer.key, buffer.value, buffer.length, buffer.new
        return attend_where(query, key, value, chosen, gates, used, offset, causal, scaling=scaling, dropout=dropout)

    def _route(self, hidden: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """Gates and choices (B, H, N), no choices at padded tokens."""
        shared = self.config.num_shared_heads
        probability = self.router(hidden).softmax(-1)
        chosen = torch.zeros_like(probability, dtype=torch.bool)
        chosen.scatter_(-1, best(probability, self.config.top_k), True)
        real = None
        if lengths is not None:
            real = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
        if self.training:
            self.add_loss(self.config.balance * balance_loss(probability, chosen, real))
        gates = torch.nn.functional.pad(1 + (probability - probability.detach()), (shared, 0), value=1.0)
        chosen = torch.nn.functional.pad(chosen, (shared, 0), value=True)
        chosen = chosen if real is None else chosen & real[..., None]
        return gates.transpose(1, 2), chosen.transpose(1, 2)


@torch.compiler.disable
def attend_where(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chosen: Tensor,
    gates: Tensor,
    used: Count | None,
    offset: Count,
    causal: bool,
    *,
    scaling: float,
    dropout: float,
) -> Tensor:
    """
    Exact attention of the query heads that `chosen` names, times their gates; zeros elsewhere.

    query (B, H, N, D); key, value (B, G, S, D), of which `used` (int, (B,) or None = S) exist; chosen, gates (B, H, N).
    Causal: query n stands at position offset + n. The queries that chose a head make one line, sorted by position, and each
    line is a small attention problem of its own: what was not chosen is in none.
    """
    batch, heads, n, size = query.shape
    group = heads // key.shape[1]
    picked = chosen.flatten().nonzero()[:, 0]
    counts = chosen.sum(2).flatten().tolist()
    queries = query.reshape(-1, size).index_select(0, picked)
    ends, starts = _per_row(key.shape[2] if used is None else used, batch), _per_row(offset, batch)
    output = query.new_zeros(batch * heads * n, size)
    if not len(picked):
        return output.view(query.shape)
    if n > 1 and has_kernel(query, dropout):
        at = picked % n + torch.tensor(starts)[picked // (heads * n)] if causal else None
        found = line_attention(queries, key, value, counts, at, ends, scaling=scaling)
    else:
        places, outputs = (picked % n).split(counts), []
        keys, values = (x.flatten(0, 1).unbind(0) for x in (key, value))
        for line, (q, at) in enumerate(zip(queries.split(counts), places, strict=True)):
            if len(q) == 0:
                continue
            row = line // heads
            q, k, v = q[None, None], *(x[line // group][None, None, : ends[row]] for x in (keys, values))
            if causal:
                outputs.append(_causal_line(q, k, v, at + starts[row], scaling, dropout))
            else:
                outputs.append(exact_attention(q, k, v, lengths=None, scaling=scaling, dropout=dropout, causal=False))
        found = torch.cat(outputs, 2)[0, 0]
    weighted = found * gates.reshape(-1)[picked, None].to(query.dtype)
    return output.index_copy(0, picked, weighted).view(query.shape)


def _per_row(count: Count, batch: int) -> list[int]:
    return [count] * batch if isinstance(count, int) else count.tolist()


def _causal_line(query: Tensor, key: Tensor, value: Tensor, at: Tensor, scaling: float, dropout: float) -> Tensor:
    """query (1, 1, T, D) at the ascending positions `at` (T,); key, value (1, 1, S, D) -> (1, 1, T, D)."""
    chunks = [(begin, min(begin + CHUNK, query.shape[2])) for begin in range(0, query.shape[2], CHUNK)]
    edges = at[[place for begin, end in chunks for place in (begin, end - 1)]].tolist()
    if edges[-1] - edges[0] + 1 == query.shape[2]:  # nothing was left out between
        return exact_attention(
            query, key, value, lengths=edges[-1] + 1, scaling=scaling, dropout=dropout, causal=True, offset=edges[0]
        )
    slots = torch.arange(key.shape[2], device=key.device)
    if dropout:

        def visible(begin: int, end: int) -> Tensor:
            return (slots <= at[begin:end, None])[None, None]

        return masked_attention(query, key, value, visible, scaling=scaling, dropout=dropout)
    parts = []
    for (begin, end), first, last in zip(chunks, edges[0::2], edges[1::2], strict=True):
        parts.append(_stretch(key, value, 0, first + 1, (begin, end), None))  # seen by all of the chunk
        if last > first:
            seen = slots[first + 1 : last + 1] <= at[begin:end, None]
            parts.append(_stretch(key, value, first + 1, last + 1, (begin, end), seen[None, None]))
    return joint_attention(query, parts, scaling=scaling)


def _stretch(key: Tensor, value: Tensor, first: int, last: int, span: tuple[int, int], mask: Tensor | None) -> Part:
    """The keys first..last-1, read where they lie by the queries `span`."""
    return Part(
        key,
        value,
        mask=mask,
        span=span,
        gather=lambda x: x[:, :, first:last],
        scatter=lambda total, gradient: total[:, :, first:last].add_(gradient),
    )
