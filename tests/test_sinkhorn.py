"""What is peculiar to `sinkhorn`: the sorting matrix, in both directions, and what the untrained one prefers."""

from __future__ import annotations

import pytest
import torch

from hf_efficient_attn import HostShape, SinkhornConfig
from hf_efficient_attn.registry import build
from hf_efficient_attn.variants.sinkhorn import _Partners

HEADS, GROUPS, D, BLOCK = 4, 2, 8, 4


def module(causal: bool = False, **options):
    host = HostShape(HEADS, GROUPS, D, HEADS * D, causal)
    return build(SinkhornConfig(block_size=BLOCK, num_sinks=0, **options), host).double()


def tokens(blocks: int, scale: float = 1.0, seed: int = 0) -> list[torch.Tensor]:
    """query and key; the value of a token is its block's unit vector, so that a partner's values are a row of S."""
    generator = torch.Generator().manual_seed(seed)
    query = scale * torch.randn(1, HEADS, blocks * BLOCK, D, generator=generator, dtype=torch.float64)
    key = scale * torch.randn(1, GROUPS, blocks * BLOCK, D, generator=generator, dtype=torch.float64)
    value = torch.eye(blocks, dtype=torch.float64).repeat_interleave(BLOCK, 0).expand(1, GROUPS, -1, -1)
    return [query, key, value]


def sorting(blocks: int, scale: float = 1.0, **options) -> torch.Tensor:
    """S of an encoder: (G, blocks, blocks)."""
    _, values, _ = module(**options)._sort(*tokens(blocks, scale), None, 1.0)
    return values[0, :, :, 0]


def test_iterations_make_the_matrix_doubly_stochastic() -> None:
    few, many = sorting(7, iterations=0), sorting(7, iterations=40)
    for matrix in (few, many):
        torch.testing.assert_close(matrix.sum(2), torch.ones(GROUPS, 7, dtype=torch.float64))
        assert matrix.diagonal(dim1=1, dim2=2).abs().max() == 0
    assert (many.sum(1) - 1).abs().max() < 1e-4
    assert (few.sum(1) - 1).abs().max() > 0.1


def test_low_temperature_makes_a_permutation() -> None:
    soft, hard = sorting(6, iterations=200, temperature=4.0), sorting(6, iterations=400, temperature=0.005)
    assert (hard.amax(2) > 0.95).all()
    assert all(sorted(row.argmax(1).tolist()) == list(range(6)) for row in hard)
    assert soft.amax(2).max() < 0.9


def test_equals_the_sorting_operator_of_sinkhorn_transformer() -> None:
    reference = pytest.importorskip("sinkhorn_transformer.sinkhorn_transformer").sinkhorn_sorting_operator
    layer, (query, key, value) = module(iterations=5), tokens(6)
    means = [x.unflatten(2, (-1, BLOCK)).mean(3)[0] for x in (query, key)]
    scores = means[0].unflatten(0, (GROUPS, -1)).mean(1) @ means[1].mT / layer.config.temperature
    scores = scores.masked_fill(torch.eye(6, dtype=torch.bool), -1e30)
    want = reference(scores, 5)
    want = want / want.sum(2, keepdim=True)
    got = layer._sort(query, key, value, None, 1.0)[1][0, :, :, 0]
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    assert (got - reference(scores, 0)).abs().max() > 0.01


def test_decoder_columns_never_exceed_one_before_the_last_step() -> None:
    """Rows up to i share what a column has to give, whatever comes later: the first block is not everybody's partner."""
    blocks = 9
    query, key, value = tokens(blocks)
    key[:, :, :BLOCK] = 4 * query.unflatten(1, (GROUPS, -1)).mean(2).mean(2, keepdim=True)  # block 0 fits all of them
    shares = {}
    for iterations in (0, 8):
        start, _, values = module(True, iterations=iterations)._partners(query, key, value, None, None, 1.0)
        assert start == 1
        matrix = values[0, :, :, 0]  # rows are blocks 1..8
        torch.testing.assert_close(matrix.sum(2), torch.ones(GROUPS, blocks - 1, dtype=torch.float64))
        assert matrix[:, :, 1:].triu().abs().max() == 0  # row i, which is block i + 1, has partners 0..i
        shares[iterations] = matrix[:, :, 0].sum(1)
    assert (shares[8] < shares[0]).all()


def test_untrained_partner_is_the_block_whose_keys_fit() -> None:
    query, key, value = tokens(5, scale=0.1)
    key[:, :, BLOCK : 2 * BLOCK] += 3.0
    query[:, :, 4 * BLOCK :] += 3.0  # block 4 asks for what block 1 holds
    fits = module()._sort(query, key, value, None, 1.0)[1][0, :, 4, 0]
    assert (fits[:, 1] > 0.9).all()
    assert (sorting(5, 0.1)[:, 4, 1] < 0.5).all()


def test_sinks_beyond_the_first_block_are_refused() -> None:
    with pytest.raises(ValueError, match="num_sinks = 5 must be at most block_size = 4"):
        SinkhornConfig(block_size=4, num_sinks=5)
    assert SinkhornConfig(block_size=4, num_sinks=4).num_sinks == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixtures_are_rounded_once(dtype) -> None:
    """Weights that did not sum to 1 would scale what all keys share, as where a model gives them a bias."""
    g = torch.Generator().manual_seed(0)
    weights, tokens = torch.randn(2, 2, 3, 5, generator=g).softmax(-1), torch.randn(2, 2, 22, 8, generator=g).add(700)
    tokens, found = tokens.to(dtype), []
    for x in (tokens, tokens.float()):
        given = weights.clone().requires_grad_(), x.clone().requires_grad_()
        partners = _Partners.apply(*given, 4, 0)
        found.append([partners, *torch.autograd.grad(partners.sum(), given)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want.to(got.dtype), rtol=1e-6, atol=1e-6)
