"""Online spherical k-means, and the two variants whose centroids it moves."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.functional import normalize
from zoo import ZOO

from hf_efficient_attn import HostShape, patch_model
from hf_efficient_attn.ops.kmeans import cluster_sums, draw_centroids, follow, nearest
from hf_efficient_attn.registry import build, get_info

GROUPS, CLUSTERS, SIZE = 2, 4, 8
HOST = HostShape(4, GROUPS, SIZE, 4 * SIZE, False, patched_index=1)
SMALL = {"num_clusters": CLUSTERS, "window": 8, "decay": 0.5, "seed": 5}  # not the seed of the tokens


def clustered_tokens(length=200, noise=0.1):
    """(1, G, N, D) around as many directions as there are clusters."""
    directions = normalize(torch.randn(GROUPS, CLUSTERS, SIZE), dim=-1)
    member = torch.randint(0, CLUSTERS, (GROUPS, length))
    x = torch.stack([directions[g, member[g]] for g in range(GROUPS)]) + noise * torch.randn(GROUPS, length, SIZE)
    return (x * torch.rand(GROUPS, length, 1).add(0.5))[None]


def objective(x, centroids):
    """The mean of 1 - cosine to the nearest centroid."""
    return 1 - nearest(x, centroids)[1].mean().item()


def test_labels_and_sums_are_those_of_a_loop():
    x, centroids = torch.randn(3, 4, 11, SIZE), draw_centroids(GROUPS, CLUSTERS, SIZE, 1, 0)
    lengths = torch.tensor([11, 4, 1])
    labels, cosine = nearest(x, centroids)
    sums, counts = cluster_sums(x, labels, CLUSTERS, GROUPS, lengths)
    wanted, number = torch.zeros_like(sums), torch.zeros_like(counts)
    for b in range(3):
        for h in range(4):
            for i in range(11):
                unit = x[b, h, i] / x[b, h, i].norm()
                scores = centroids[h // 2] @ unit
                assert labels[b, h, i] == scores.argmax()
                torch.testing.assert_close(cosine[b, h, i], scores.max())
                if i < lengths[b]:
                    wanted[h // 2, labels[b, h, i]] += unit
                    number[h // 2, labels[b, h, i]] += 1
    torch.testing.assert_close(sums, wanted)
    assert torch.equal(counts, number)
    assert not torch.equal(counts, cluster_sums(x, labels, CLUSTERS, GROUPS, None)[1])


def test_equally_near_centroids_and_empty_clusters():
    centroids = torch.ones(1, 3, 2)
    labels, _ = nearest(torch.randn(1, 1, 50, 2), centroids)
    assert (labels == 0).all()
    sums, counts = cluster_sums(torch.ones(1, 1, 5, 2), torch.zeros(1, 1, 5, dtype=torch.int64), 3, 1, None)
    moved = follow(torch.eye(3)[None, :, :2], sums, counts, 0.9)
    assert torch.equal(moved[0, 1:], torch.eye(3)[1:, :2])  # no token, no move
    assert moved[0, 0, 1] > 0


def test_centroids_keep_moving_in_half_precision():
    centroids = draw_centroids(1, 2, SIZE, 0, 0).bfloat16()
    target = normalize(torch.randn(1, 2, SIZE), dim=-1)
    start = centroids.float()
    for _ in range(300):
        centroids = follow(centroids, target * 5, torch.full((1, 2, 1), 5.0), 0.999)
    assert (centroids - target).norm() < 0.9 * (start - target).norm()  # a bfloat16 cannot hold one step


@pytest.mark.parametrize("name", ["routing", "cluster_former"])
def test_the_objective_falls_in_training_only(name):
    module = build(get_info(name).config_class(**SMALL), HOST)
    x = clustered_tokens()
    query = x.repeat_interleave(2, 1)
    first, start = module.centroids.clone(), objective(x, module.centroids)
    values = []
    for training in (False, True):
        module.train(training)
        for _ in range(15):
            inputs = [y.clone().requires_grad_() for y in (query, x, x)]
            output = module(*inputs, scaling=0.5, causal=False)
            used = module.centroids
            output.sum().backward()
            assert training is not torch.equal(module.centroids, used)
            values.append(objective(x, module.centroids))
        if not training:
            assert torch.equal(module.centroids, first)
    assert values[0] == start
    assert all(later <= earlier + 1e-3 for earlier, later in itertools.pairwise(values[15:]))
    assert values[-1] < 0.6 * start


def test_only_real_tokens_count():
    modules = [build(get_info("routing").config_class(**SMALL), HOST).train() for _ in range(3)]
    x = clustered_tokens(40)
    padded = torch.cat([x, 9 * torch.randn(1, GROUPS, 13, SIZE)], 2)
    real = (torch.arange(53) < 40)[None]
    for module, y, padding in zip(modules, (x, padded, padded), (None, real, None), strict=True):
        query = y.repeat_interleave(2, 1).requires_grad_()
        module(query, y, y, padding=padding, scaling=0.5, causal=False).sum().backward()
    torch.testing.assert_close(modules[0].centroids, modules[1].centroids)
    assert (modules[0].centroids - modules[2].centroids).abs().max() > 1e-3


def test_first_centroids_depend_on_seed_and_layer():
    config_class = get_info("routing").config_class
    one, same, other = (build(config_class(seed=s), HOST).centroids for s in (0, 0, 1))
    deeper = build(config_class(), HostShape(4, GROUPS, SIZE, 4 * SIZE, False, layer=1)).centroids
    assert torch.equal(one, same)
    assert (one - other).abs().max() > 0.1
    assert (one - deeper).abs().max() > 0.1
    torch.testing.assert_close(one.norm(dim=-1), torch.ones(GROUPS, 16), atol=1e-2, rtol=0)


def test_cluster_former_takes_turns():
    model = ZOO["llama"].build()
    patch_model(model, "cluster_former", window=4, num_clusters=3)
    kinds = [hasattr(layer.self_attn.efficient_attn, "centroids") for layer in model.model.layers]
    assert kinds == [False, True]


@pytest.mark.parametrize("name", ["routing", "cluster_former"])
@pytest.mark.parametrize("arch", ["bert", "llama"])
def test_a_recomputed_forward_sees_the_centroids_of_the_first(name, arch):
    """Two models, one with activation checkpointing, take the same steps while their centroids move fast."""
    results = []
    for checkpointing in (False, True):
        model = ZOO[arch].build().train()
        options = {"alternate": False} if name == "cluster_former" else {}
        patch_model(model, name, num_clusters=3, window=4, decay=0.5, **options)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        buffers = {n: b.clone() for n, b in model.named_buffers() if n.endswith("centroids")}
        for _ in range(2):
            model.zero_grad()
            model(**ZOO[arch].inputs(2, 40), use_cache=False).logits.square().mean().backward()
        moved = {n: b for n, b in model.named_buffers() if n.endswith("centroids")}
        assert all((b - buffers[n]).abs().max() > 0.1 for n, b in moved.items())
        results.append(moved | {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for n, x in results[0].items():
        torch.testing.assert_close(results[1][n], x, atol=1e-6, rtol=1e-4)
