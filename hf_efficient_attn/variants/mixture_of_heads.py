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
from ..ops.lines import line_attention
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
    also=("moh",),
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
    picked = chosen.flatten().nonzero()[:, 0]
    output = query.new_zeros(batch * heads * n, size)
    if len(picked):
        queries, counts = query.reshape(-1, size).index_select(0, picked), chosen.sum(2).flatten().tolist()
        ends, at = _per_row(key.shape[2] if used is None else used, batch), None
        if causal:
            starts = torch.as_tensor(offset, device=picked.device).expand(batch)
            at = picked % n + starts[picked // (heads * n)]
        found = line_attention(queries, key, value, counts, at, ends, scaling=scaling, dropout=dropout)
        output = output.index_copy(0, picked, found * gates.reshape(-1)[picked, None].to(query.dtype))
    return output.view(query.shape)


def _per_row(count: Count, batch: int) -> list[int]:
    return [count] * batch if isinstance(count, int) else count.tolist()
