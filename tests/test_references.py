"""
Independent code computes the same: packages of the papers' readers (the extra `reference`), and Transformers' own models.
More of these stand beside what is peculiar to a variant: test_nystrom, test_lsh, test_routing, test_sinkhorn, test_big_bird,
test_funnel, test_compressive.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LongformerConfig
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from hf_efficient_attn import HostShape, LinearConfig, LinformerConfig, PerformerConfig, SlidingWindowConfig
from hf_efficient_attn.registry import build

HEADS, DIM, LENGTH = 4, 16, 48
SCALING = DIM**-0.5


def make(config, causal: bool = False) -> torch.nn.Module:
    return build(config, HostShape(HEADS, HEADS, DIM, HEADS * DIM, causal)).double()


def inputs() -> list[Tensor]:
    return [torch.randn(2, HEADS, LENGTH, DIM, dtype=torch.float64) for _ in range(3)]


def compare(got: Tensor, want: Tensor, other: Tensor, error: float) -> None:
    """`other` is what a wrong setting gives: the comparison would see it."""
    torch.testing.assert_close(got, want, atol=error, rtol=0)
    assert (other - want).abs().max() > 1000 * error


def test_linformer() -> None:
    package = pytest.importorskip("linformer.linformer")
    reference = package.LinformerSelfAttention(HEADS * DIM, LENGTH, k=12, heads=HEADS).double()
    reference.to_out = torch.nn.Identity()
    hidden = torch.randn(2, LENGTH, HEADS * DIM, dtype=torch.float64)
    heads = [
        to(hidden).unflatten(2, (HEADS, DIM)).transpose(1, 2) for to in (reference.to_q, reference.to_k, reference.to_v)
    ]
    module = make(LinformerConfig(rank=12, max_length=LENGTH, sharing="headwise"))
    untrained = module(*heads, scaling=SCALING, causal=False).transpose(1, 2).flatten(2)
    with torch.no_grad():
        module.proj_k.copy_(reference.proj_k.T[None])
        module.proj_v.copy_(reference.proj_v.T[None])
    got = module(*heads, scaling=SCALING, causal=False).transpose(1, 2).flatten(2)
    compare(got, reference(hidden), untrained, 1e-10)


def test_performer() -> None:
    """Its features without the small number that it adds to them, which makes them another kernel's."""
    package = pytest.importorskip("performer_pytorch.performer_pytorch")
    module, (query, key, value) = make(PerformerConfig(num_features=64)), inputs()
    want = []
    for h in range(HEADS):
        given = {"projection_matrix": module.features[h], "eps": 0.0}
        q, k = (package.softmax_kernel(x[:, h, None], is_query=x is query, **given) for x in (query, key))
        want.append(package.linear_attention(q, k, value[:, h, None]))
    got = module(query, key, value, scaling=SCALING, causal=False)
    other = make(PerformerConfig(num_features=64, seed=1))(query, key, value, scaling=SCALING, causal=False)
    compare(got, torch.cat(want, 1), other, 1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_linear(causal: bool) -> None:
    """Causal: the reference is its recurrence, token by token."""
    package = pytest.importorskip("performer_pytorch.performer_pytorch")
    query, key, value = inputs()
    q, k = (torch.nn.functional.elu(x) + 1 for x in (query, key))
    want = package.linear_attention(q, k, value)
    if causal:
        parts = [
            package.linear_attention(q[:, :, t : t + 1], k[:, :, : t + 1], value[:, :, : t + 1]) for t in range(LENGTH)
        ]
        want = torch.cat(parts, 2)
    got = make(LinearConfig(), causal)(query, key, value, scaling=SCALING, causal=causal)
    compare(got, want, got.flip(2), 1e-10)


@pytest.mark.parametrize("window", [1, 5, 16])
def test_local_attention(window: int) -> None:
    package = pytest.importorskip("local_attention")
    size = window - 1 or 1
    reference = package.LocalAttention(
        window_size=size, causal=True, exact_windowsize=True, autopad=True, use_rotary_pos_emb=False
    )
    query, key, value = inputs()
    want = reference(query, key, value)
    got = make(SlidingWindowConfig(window=size + 1, num_sinks=0), True)(query, key, value, scaling=SCALING, causal=True)
    other = make(SlidingWindowConfig(window=size, num_sinks=0), True)(query, key, value, scaling=SCALING, causal=True)
    compare(got, want, other, 1e-5)  # its mask is a large finite number, and it works in float32 there


@pytest.mark.parametrize("everyone", [0, 3])
def test_longformer(everyone: int) -> None:
    """With the projections of the other tokens for the global ones too, which is how a converted checkpoint begins."""
    window = 8
    config = LongformerConfig(
        hidden_size=HEADS * DIM, num_attention_heads=HEADS, num_hidden_layers=1, attention_window=[2 * window],
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    reference = LongformerSelfAttention(config, 0).double().eval()
    for name in ("query", "key", "value"):
        getattr(reference, f"{name}_global").load_state_dict(getattr(reference, name).state_dict())
    hidden = torch.randn(2, LENGTH, HEADS * DIM, dtype=torch.float64)
    mask = torch.zeros(2, LENGTH, dtype=torch.float64)
    mask[:, :everyone] = 10000.0
    options = {"is_index_masked": mask < 0, "is_index_global_attn": mask > 0, "is_global_attn": everyone > 0}
    want = reference(hidden, attention_mask=mask, **options)[0]
    heads = [
        getattr(reference, name)(hidden).unflatten(2, (HEADS, DIM)).transpose(1, 2)
        for name in ("query", "key", "value")
    ]

    def ours(w: int) -> Tensor:
        module = make(SlidingWindowConfig(window=w, global_tokens=everyone))
        return module(*heads, scaling=SCALING, causal=False).transpose(1, 2).flatten(2)

    compare(ours(window), want, ours(window - 1), 1e-6)  # its masks are large finite numbers
