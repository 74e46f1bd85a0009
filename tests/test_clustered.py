"""`clustered`: its k-means, what queries of a cluster share, how near its forms come to softmax attention, a step's cost."""

from __future__ import annotations

import itertools

import pytest
import torch
from contract import decode
from naive import naive_attention
from naive.clustered import k_means as naive_k_means

from hf_efficient_attn import ClusteredConfig, HostShape, measuring
from hf_efficient_attn.ops.codes import k_means
from hf_efficient_attn.registry import build
from hf_efficient_attn.variants import clustered

SCALING = 8**-0.5


def make(causal, layer=0, **config):
    return build(ClusteredConfig(**config), HostShape(4, 2, 8, 32, causal, layer=layer)).double()


def run(module, args, **kwargs):
    return module(*args, scaling=SCALING, causal=module.host.causal, **kwargs)


def inputs(length, batch=2):
    return [torch.randn(batch, heads, length, 8, dtype=torch.float64) for heads in (4, 2, 2)]


def alike(length, kinds=8, spread=0.2):
    """Queries of a few kinds, as k-means hopes for; keys and values of none."""
    _, key, value = inputs(length)
    centres = 2 * torch.randn(2, 4, kinds, 8, dtype=torch.float64)
    kind = torch.randint(kinds, (length,))
    return [centres[:, :, kind] + spread * torch.randn(2, 4, length, 8, dtype=torch.float64), key, value]


def dense(args, causal):
    config = ClusteredConfig.dense_limit(args[0].shape[2], causal)
    return naive_attention("flash", *args, config=config, scaling=SCALING, causal=causal)


def codes_of(*shape):
    bits = torch.where(torch.randn(*shape) > 0, 1.0, -1.0)
    return torch.cat([bits, torch.ones(*shape[:-1], 1)], -1)


def test_k_means_is_lloyd_s_algorithm():
    code = codes_of(3, 40, 7)
    labels, centres = k_means(code, 6, 4, None)
    for row in range(3):
        want, found = naive_k_means(code[row, :, :-1] > 0, 6, 4)
        assert labels[row].tolist() == want
        assert torch.equal(centres[row, :, :-1] > 0, torch.stack(found))
    assert not torch.equal(labels, k_means(code, 6, 0, None)[0])


def test_k_means_lowers_its_objective():
    code = codes_of(4, 200, 31)
    objectives = []
    for iterations in range(6):
        labels, centres = k_means(code, 8, iterations, None)
        own = torch.gather(centres, 1, labels[..., None].expand(-1, -1, 32))
        objectives.append((code != own)[..., :-1].sum())
    assert all(later <= earlier for earlier, later in itertools.pairwise(objectives))
    assert objectives[-1] < 0.95 * objectives[0]


def test_k_means_leaves_padding_out():
    code, lengths = codes_of(2, 50, 15), torch.tensor([50, 31])
    padded = code.clone()
    padded[1, 31:] = 0
    labels, centres = k_means(padded, 5, 3, lengths)
    alone, found = k_means(code[1:, :31], 5, 3, None)
    assert torch.equal(labels[1:, :31], alone)
    assert torch.equal(centres[1:], found)
    assert not torch.equal(k_means(code, 5, 3, None)[0][1:, :31], alone)


def test_plain_queries_of_a_cluster_receive_the_same():
    args = inputs(60)
    for improved in (False, True):
        output = run(make(False, num_clusters=5, improved=improved), args)
        results = len(output[0, 0].mul(1e9).round().unique(dim=0))
        assert results == (60 if improved else 5)


@pytest.mark.parametrize("improved", [False, True])
def test_the_encoder_equals_the_reference_package(improved, monkeypatch):
    """Given its clusters, which depend on how its k-means begins, in sequences of two lengths; forward and backward."""
    reference = pytest.importorskip("fast_transformers.attention")
    masking = pytest.importorskip("fast_transformers.masking")
    name, more = ("ImprovedClusteredAttention", {"topk": 6}) if improved else ("ClusteredAttention", {})
    theirs = getattr(reference, name)(5, bits=15, softmax_temp=SCALING, attention_dropout=0.0, **more)
    make_groups, made = theirs._create_query_groups, []
    monkeypatch.setattr(theirs, "_create_query_groups", lambda *args: made.append(make_groups(*args)) or made[-1])
    args = [torch.randn(2, 4, 40, 8).requires_grad_() for _ in range(3)]
    lengths = torch.tensor([40, 27])
    mask = masking.LengthMask(lengths, max_len=40)
    want = theirs(*(x.transpose(1, 2) for x in args), masking.FullMask(40), mask, mask).transpose(1, 2)
    (groups, _), order = made[0]
    labels = torch.zeros_like(order).scatter_(2, order, groups.long()).clamp_max(4).flatten(0, 1)  # of padding 6
    found = labels.view(2, 4, 1, 40), torch.zeros(2, 4, 1, 5, 16)
    monkeypatch.setattr(clustered, "find_clusters", lambda query, *rest: found)
    module = build(ClusteredConfig(num_clusters=5, improved=improved, top_k=6), HostShape(4, 4, 8, 32, False))
    real = torch.arange(40) < lengths[:, None]
    got = run(module, args, padding=real)
    want = want * real[:, None, :, None]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    learned = args[2:] if improved else args  # it takes the weight of the top keys, m, for a constant
    ours, others = (torch.autograd.grad(x.square().sum(), learned) for x in (got, want))
    torch.testing.assert_close(ours, others, atol=1e-5, rtol=0)
    other_form = build(ClusteredConfig(num_clusters=5, improved=not improved, top_k=6), HostShape(4, 4, 8, 32, False))
    assert (run(other_form, args, padding=real) - want).abs().max() > 1e-2


def test_plain_with_a_cluster_for_each_token_is_dense():
    args = inputs(23)
    module = make(False, num_clusters=23, improved=False)
    torch.testing.assert_close(run(module, args), dense(args, False), atol=1e-10, rtol=0)
    padding = torch.arange(30) < torch.tensor([30, 23])[:, None]
    longer = [torch.cat([x, torch.randn_like(x[:, :, :7])], 2) for x in args]
    got = run(module, longer, padding=padding)[1:, :, :23]
    torch.testing.assert_close(got, dense(args, False)[1:], atol=1e-10, rtol=0)
    assert (run(make(False, num_clusters=22, improved=False), args) - dense(args, False)).abs().max() > 1e-2


@pytest.mark.parametrize("causal", [False, True])
def test_clusters_and_own_keys_bring_it_nearer_to_dense(causal):
    args = alike(256)
    want = dense(args, causal)

    def error(**config):
        return (run(make(causal, chunk_size=64, **config), args) - want).abs().mean()

    few, many = (error(num_clusters=c, improved=False) for c in (2, 16))
    assert many < 0.5 * few
    assert error(num_clusters=2, improved=True, top_k=64) < 0.8 * few


def test_chunk_0_of_a_decoder_is_exact():
    args = inputs(40)
    difference = (run(make(True, num_clusters=2, chunk_size=16, improved=False), args) - dense(args, True)).abs()
    assert difference[:, :, :16].max() < 1e-10
    assert difference[:, :, 16:].amax((0, 1, 3)).min() > 1e-4


def test_long_rows_in_calls_of_any_length():
    args, module = inputs(400, batch=1), make(True, num_clusters=8, chunk_size=48, top_k=4)
    parts = decode(module, args, (150, 3, 90, 1, 16, 100, 40), scaling=SCALING)
    torch.testing.assert_close(parts, run(module, args), atol=1e-10, rtol=0)


def test_a_step_reads_its_chunk_whatever_came_before_it():
    module, flops = make(True, num_clusters=4, chunk_size=32, top_k=4), {}
    for length in (320, 1280, 1311):
        args, state = inputs(length + 1), module.make_state()
        past, new = ([x[:, :, piece] for x in args] for piece in (slice(length), slice(length, None)))
        for part in (past, new):
            state.update(part[1], part[2])
            flops[length] = measuring.count_flops(lambda part=part, state=state: run(module, part, state=state))
    assert flops[320] == flops[1280]
    assert flops[1311] > 2 * flops[1280]  # this step ends a chunk, whose clusters read all keys


def test_planes_come_from_the_seed_and_the_layer():
    first = make(True).planes
    assert torch.equal(first, make(True).planes)
    assert not torch.equal(first, make(True, seed=1).planes)
    assert not torch.equal(first, make(True, layer=1).planes)
    assert torch.equal(first, first.bfloat16().double())


@pytest.mark.parametrize("causal", [False, True])
def test_a_row_without_a_token_spoils_no_gradient(causal):
    args = [x.requires_grad_() for x in inputs(12)]
    padding = torch.ones(2, 12, dtype=torch.bool)
    padding[1] = False
    output = run(make(causal, num_clusters=2, top_k=3, chunk_size=4), args, padding=padding)
    for grad in torch.autograd.grad(output.sum(), args):
        assert grad[0].abs().max() > 0
        assert (grad[1] == 0).all()
