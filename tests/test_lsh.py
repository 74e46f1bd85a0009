"""`lsh`: Reformer's form beside its formula and an independent package, and what hashing is to do."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from naive import naive_attention
from torch.nn.functional import normalize

from hf_efficient_attn import HostShape, LshConfig
from hf_efficient_attn.registry import build
from hf_efficient_attn.variants.lsh import _centred, _completions

HEADS, GROUPS, SIZE = 4, 2, 8


def make(config, causal=False, groups=GROUPS):
    return build(config, HostShape(HEADS, groups, SIZE, HEADS * SIZE, causal)).double().eval()


def tensors(batch, length, groups=GROUPS):
    return [torch.randn(batch, h, length, SIZE, dtype=torch.float64) for h in (HEADS, groups, groups)]


@pytest.mark.parametrize("hashes", [1, 3])
@pytest.mark.parametrize("length", [1, 13])
@pytest.mark.parametrize("window", [1, 4])
def test_shared_qk_is_its_formula(hashes, length, window):
    config = LshConfig(num_buckets=4, num_hashes=hashes, window=window, shared_qk=True)
    module = make(config)
    counts = torch.tensor([length, max(1, length // 2), 1])
    for padding in (None, torch.arange(length) < counts[:, None], torch.arange(length) >= length - counts[:, None]):
        query, key, value = (x.requires_grad_() for x in tensors(3, length))
        got = module(query, key, value, padding=padding, scaling=2.0, causal=False)
        want = naive_attention(
            "lsh", query, key, value, padding, config=config, scaling=2.0, causal=False, module=module
        )
        torch.testing.assert_close(got, want, atol=1e-9, rtol=0)
        ours, theirs = (torch.autograd.grad(x.square().sum(), (query, value)) for x in (got, want))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-8, rtol=0)
    if length > 1:
        apart = LshConfig(num_buckets=4, num_hashes=hashes, window=window)
        assert (make(apart)(query, key, value, scaling=2.0, causal=False) - got).abs().max() > 1e-2


def test_shared_qk_equals_the_reference_package():
    """One round; the package lets the first chunk read the last one, ours does not, so that is left out."""
    reference = pytest.importorskip("reformer_pytorch.reformer_pytorch")
    n, window = 32, 4
    config = LshConfig(num_buckets=n // window, num_hashes=1, window=window, shared_qk=True)
    module = make(config, groups=HEADS)
    query, key, value = tensors(1, n, HEADS)
    labels = module._hash(query)[0, ..., 0]
    theirs = reference.LSHAttention(bucket_size=window, n_hashes=1, causal=False).eval()
    theirs.hash_vectors = lambda buckets, vectors, **options: labels
    want, _, _ = theirs(query[0], value[0])
    got = module(query, key, value, scaling=SIZE**-0.5, causal=False)[0]
    rank = torch.argsort(torch.argsort(labels, dim=-1, stable=True), dim=-1)
    inner = rank >= window
    torch.testing.assert_close(got[inner], want[inner].to(got), atol=1e-6, rtol=0)
    assert (got[~inner] - want[~inner]).abs().max() > 1e-2


def test_forms_that_read_the_whole_text_are_for_encoders():
    with pytest.raises(ValueError, match="shared_qk = False"):
        make(LshConfig(shared_qk=True), causal=True)
    with pytest.raises(ValueError, match="inner_products = False"):
        make(LshConfig(inner_products=True), causal=True)
    with pytest.raises(ValueError, match="an even number, or 1"):
        LshConfig(num_buckets=3)


def test_near_vectors_meet_more_often_than_far_ones():
    config = LshConfig(num_buckets=8, num_hashes=400)
    module = make(config)
    x = normalize(torch.randn(1, HEADS, 1, SIZE, dtype=torch.float64), dim=-1)
    side = normalize(torch.randn_like(x), dim=-1)
    side = normalize(side - (side * x).sum(-1, keepdim=True) * x, dim=-1)
    rates = []
    for angle in (0.0, math.pi / 8, math.pi / 4, math.pi / 2, math.pi):
        y = math.cos(angle) * x + math.sin(angle) * side
        rates.append((module._hash(x) == module._hash(y)).double().mean().item())
    assert rates[0] == 1
    assert rates[-1] == 0  # the opposite vector has the opposite bucket
    assert all(near > far + 0.03 for near, far in itertools.pairwise(rates))


def test_completion_makes_the_encoder_hash_by_inner_product():
    """Keys of one direction and different lengths share the decoder's bucket; an encoder tells long from short ones."""
    config = LshConfig(num_buckets=16, num_hashes=200)
    query = normalize(torch.randn(1, HEADS, 1, SIZE, dtype=torch.float64), dim=-1)
    key = torch.cat([query[:, ::2] * 3, query[:, ::2] * 0.3], 2)  # the first query head of each group
    decoder, encoder = make(config, causal=True), make(replace(config, inner_products=True))
    assert torch.equal(decoder._hash(key)[:, :, 0], decoder._hash(key)[:, :, 1])
    more = _completions(query, key)
    for x, extra in zip((query, key), more, strict=True):
        lengths = x.square().sum(-1) + extra**2
        torch.testing.assert_close(lengths, torch.full_like(lengths, 10.0))
    ours, theirs = encoder._hash(query, more[0], -1)[:, ::2], encoder._hash(key, more[1], -2)
    rates = (ours == theirs).double().mean((0, 1, 3))
    assert rates[0] > rates[1] + 0.05


@pytest.mark.parametrize("length", [6, None])
def test_what_all_keys_share_changes_no_bucket(length):
    query, key, value = tensors(1, 9)
    shared = 5 * torch.randn(1, GROUPS, 1, SIZE, dtype=torch.float64)
    padding = None if length is None else torch.arange(9)[None] < length
    outputs = {}
    for inner_products in (False, True):
        module = make(LshConfig(num_buckets=4, num_hashes=2, window=3, inner_products=inner_products))
        options = {"padding": padding, "scaling": 1.0, "causal": False}
        outputs[inner_products] = [module(query, k, value, **options) for k in (key, key + shared)]
    torch.testing.assert_close(*outputs[False], atol=1e-9, rtol=0)
    assert (outputs[True][0] - outputs[True][1]).abs().max() > 1e-2


def test_more_rounds_come_nearer_to_dense():
    errors = []
    query, key, value = tensors(2, 80)
    dense = make(LshConfig.dense_limit(80, False))(query, key, value, scaling=1.0, causal=False)
    for hashes in (1, 4, 12):
        module = make(LshConfig(num_buckets=8, num_hashes=hashes, window=80))
        errors.append((module(query, key, value, scaling=1.0, causal=False) - dense).square().mean().item())
    assert errors[0] > 1.5 * errors[1] > 2 * 1.5 * errors[2]


def test_keys_of_half_precision_are_centred_in_float32() -> None:
    """4,096 keys about 30 sum up to more than half precision holds."""
    key = torch.randn(1, 2, 4096, 8, generator=torch.Generator().manual_seed(0)) + 30
    found = _centred(key.half(), None)
    assert found.dtype is torch.float32 and torch.allclose(found, _centred(key.half().float(), None), atol=1e-5)
    assert key.half().sum(2).isinf().all(), "the sum fits: this tests nothing"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_queries_of_zeros_serve_as_keys_in_half_precision(dtype):
    module = make(LshConfig(num_buckets=4, window=4, shared_qk=True)).to(dtype)
    query, key, value = (x.to(dtype).requires_grad_() for x in tensors(1, 20))
    padding = torch.arange(20)[None] < 15
    output = module(query, key, value, padding=padding, scaling=1.0, causal=False)
    assert output.isfinite().all()
    for grad in torch.autograd.grad(output.float().sum(), (query, value)):
        assert grad.isfinite().all()
        assert grad.abs().max() > 0
