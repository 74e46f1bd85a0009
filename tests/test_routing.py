"""`routing` beside an independent package, and what is peculiar to it."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from hf_efficient_attn import HostShape, RoutingConfig
from hf_efficient_attn.ops.kmeans import nearest
from hf_efficient_attn.registry import build


def module_and_inputs(causal, config, heads=2, length=24, size=8):
    host = HostShape(heads, heads, size, heads * size, causal)
    return build(config, host).eval(), [torch.randn(1, heads, length, size) for _ in range(3)]


def reference_attention(module, window, causal):
    """KmeansAttention of routing-transformer with our centroids, and without the memory that it adds in decoders."""
    reference = pytest.importorskip("routing_transformer.routing_transformer")
    heads, clusters, size = module.centroids.shape
    theirs = reference.KmeansAttention(clusters, window, heads, size, causal=causal).eval()
    theirs.kmeans.means.copy_(module.centroids)
    theirs.kmeans.initted.fill_(True)
    theirs.num_mem_kv = 0
    theirs.mem_key = theirs.mem_value = torch.nn.Parameter(torch.zeros(heads, clusters, 0, size))
    return lambda *inputs: theirs(*inputs)[0]


PACKAGE = {"atol": 5e-5, "rtol": 0}  # it divides sums by counts + 1e-5


@pytest.mark.parametrize("causal", [False, True])
def test_one_cluster_equals_the_reference_package(causal):
    module, inputs = module_and_inputs(causal, RoutingConfig(num_clusters=1, window=24))
    want = reference_attention(module, 24, causal)(*inputs)
    torch.testing.assert_close(module(*inputs, scaling=8**-0.5, causal=causal), want, **PACKAGE)
    narrow, _ = module_and_inputs(causal, RoutingConfig(num_clusters=1, window=3))
    assert (narrow(*inputs, scaling=8**-0.5, causal=causal) - want).abs().max() > 1e-2


@pytest.mark.parametrize("causal", [False, True])
def test_clusters_of_one_size_equal_the_reference_package(causal):
    """The package cuts clusters to one size; where queries and keys fall into clusters of that size both read the same."""
    module, (_, _, value) = module_and_inputs(causal, RoutingConfig(num_clusters=3, window=24, num_sinks=0))
    x = module.centroids[:, torch.randperm(24) % 3][None] * 2 + 0.05 * torch.randn(1, 2, 24, 8)
    want = reference_attention(module, 8, causal)(x, x, value)
    torch.testing.assert_close(module(x, x, value, scaling=8**-0.5, causal=causal), want, **PACKAGE)
    shuffled = module(x[:, :, torch.randperm(24)], x, value, scaling=8**-0.5, causal=causal)
    assert (shuffled - want).abs().max() > 1e-2


def test_clusters_are_those_of_the_reference_package():
    reference = pytest.importorskip("routing_transformer.routing_transformer")
    module, (query, _, _) = module_and_inputs(False, RoutingConfig(num_clusters=5))
    distances, _ = reference.dists_and_buckets(normalize(query, dim=-1), module.centroids)
    assert torch.equal(distances.argmax(-1), nearest(query, module.centroids)[0])
    assert len(distances.argmax(-1).unique()) > 2


@pytest.mark.parametrize("causal", [False, True])
def test_a_cluster_without_keys_leaves_the_own_key(causal):
    module, (query, key, value) = module_and_inputs(causal, RoutingConfig(num_clusters=2, window=4, num_sinks=0))
    centroids = module.centroids
    query = centroids[:, :1].expand(-1, query.shape[2], -1)[None]
    key = -query + 0 * key
    module.centroids = torch.stack([centroids[:, 0], -centroids[:, 0]], 1)
    torch.testing.assert_close(module(query, key, value, scaling=1.0, causal=causal), value)
    assert (module(-query, key, value, scaling=1.0, causal=causal) - value).abs().max() > 1e-2
