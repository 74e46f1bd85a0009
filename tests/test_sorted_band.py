"""Intervals of keys in several orders, codes and their clusters, largest products: by kernels and by PyTorch's operators."""

from __future__ import annotations

import pytest
import torch
from contract import decode
from torch import Tensor

from hf_efficient_attn import (
    ClusteredConfig,
    ClusterFormerConfig,
    HostShape,
    LshConfig,
    RoutingConfig,
    kernels,
)
from hf_efficient_attn.ops.codes import find_clusters, nearest_clusters
from hf_efficient_attn.ops.largest import largest_products
from hf_efficient_attn.ops.sorted_band import Intervals, interval_attention_and_lse
from hf_efficient_attn.registry import build

needs_compiler = pytest.mark.skipif(kernels.load("intervals") is None, reason="no C compiler here")
FORMS = [pytest.param(True, marks=needs_compiler, id="kernel"), pytest.param(False, id="operators")]
BATCH, HEADS, GROUPS = 2, 6, 2


def run(by_kernel: bool, function, *args, **options):
    if by_kernel:
        return function(*args, **options)
    with kernels.off():
        return function(*args, **options)


def random(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g)


def intervals(g: torch.Generator, units: int, size: int, n: int, entries: int | None = None) -> Intervals:
    """A random order, or of so many entries of which some are the same, and bounds that ascend together, some empty."""
    shuffled = torch.rand(BATCH, units, size, generator=g).argsort(-1)
    order = shuffled if entries is None else torch.randint(0, size, (BATCH, units, entries), generator=g)
    bounds = torch.randint(0, order.shape[2] + 1, (2, BATCH, units, HEADS // units * n), generator=g).sort(-1).values
    place = torch.rand(bounds.shape[1:], generator=g).argsort(-1)
    return Intervals(
        order, *(torch.gather(x, 2, place).view(BATCH, HEADS, n) for x in (bounds.amin(0), bounds.amax(0)))
    )


def weights(rounds: list[Intervals], size: int, own=None, apart=None, lead=None) -> Tensor:
    """How often each query reads each key, (B, H, N, S)."""
    shape = rounds[0].low.shape
    times, before = torch.zeros(*shape, size), torch.zeros(*shape, size, dtype=torch.bool)
    for one in rounds:
        keys = one.order.repeat_interleave(HEADS // one.order.shape[1], 1)[:, :, None].expand(*shape, -1)
        rank = torch.arange(keys.shape[3])
        seen = (rank >= one.low[..., None]) & (rank < one.high[..., None])
        found = torch.zeros(*shape, size).scatter_add_(3, keys, seen.float())
        times += found.masked_fill(before, 0)
        before |= found > 0
    if apart is not None:
        away = torch.zeros(*shape, size + 1).scatter_(3, torch.where(apart < 0, size, apart), 1.0)[..., :size]
        times = times * (1 - away)
    if own is not None:
        times += torch.nn.functional.one_hot(own + 1, size + 1)[..., 1:]
    if lead is not None:
        times += (torch.arange(size) < lead[:, None, :, None]).float()
    return times


def formula(query, key, value, times: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    key, value = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (key, value))
    nothing = times.sum(-1) == 0
    logits = scaling * query @ key.mT + torch.where(nothing[..., None], 1.0, times).to(query.dtype).log()
    output = (logits.softmax(-1) @ value).masked_fill(nothing[..., None], 0)
    return output, logits.logsumexp(-1).masked_fill(nothing, float("-inf"))


@pytest.mark.parametrize("by_kernel", FORMS)
@pytest.mark.parametrize("case", ["one order", "three orders", "own", "apart", "lead", "of heads", "twice"])
@pytest.mark.parametrize(("size", "n", "dim"), [(150, 150, 16), (40, 7, 80), (300, 200, 64)])
def test_intervals_are_their_formula(by_kernel, calls, case, size, n, dim):
    g = torch.Generator().manual_seed(size)
    rounds, beside = [intervals(g, GROUPS, size, n)], {}
    if case == "three orders":
        rounds += [intervals(g, GROUPS, size, n) for _ in range(2)]
    elif case == "own":
        read = weights(rounds, size)
        own = torch.randint(0, size, (BATCH, HEADS, n), generator=g)
        free = torch.gather(read, 3, own[..., None])[..., 0] == 0
        beside["own"] = torch.where(free, own, -1)
        assert free.any()
        assert not free.all()
    elif case == "apart":
        rounds.append(intervals(g, GROUPS, size, n))
        beside["apart"] = torch.randint(-1, size, (BATCH, HEADS, n, 5), generator=g)
    elif case == "lead":
        rounds = [Intervals(one.order, one.low.clamp_min(9), one.high.clamp_min(9)) for one in rounds]
        identity = torch.arange(size).expand(BATCH, GROUPS, -1)
        rounds = [Intervals(identity, rounds[0].low, rounds[0].high)]
        beside["lead"] = torch.randint(0, 10, (BATCH, n), generator=g)
    elif case == "of heads":
        rounds.append(intervals(g, HEADS, size, n))
    elif case == "twice":
        rounds.append(intervals(g, HEADS, size, n, entries=2 * size))
    given = [random(g, BATCH, heads, length, dim) for heads, length in ((HEADS, n), (GROUPS, size), (GROUPS, size))]
    slope, slope_of_lse = random(g, BATCH, HEADS, n, dim), random(g, BATCH, HEADS, n)
    results = []
    for function, dtype in ((None, torch.float64), (interval_attention_and_lse, torch.float32)):
        own = [x.to(dtype).requires_grad_() for x in given]
        if function is None:
            output, lse = formula(*own, weights(rounds, size, **beside), 0.3)
        else:
            output, lse = run(by_kernel, function, *own, rounds, **beside, scaling=0.3)
        loss = (output * slope).sum() + (lse * slope_of_lse).masked_fill(lse == float("-inf"), 0).sum()
        results.append([output, lse, *torch.autograd.grad(loss, own)])
    assert ("intervals_backward" in calls) == by_kernel
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want.float(), atol=3e-5, rtol=1e-4)
        assert got.nan_to_num(neginf=0.0).abs().max() > 0.1


@pytest.mark.parametrize("by_kernel", FORMS)
@pytest.mark.parametrize("bits", [1, 9, 63, 64, 100])
@pytest.mark.parametrize("padded", [False, True])
def test_clusters_of_bits_are_those_of_rows(by_kernel, calls, bits, padded):
    """Beside rows of 1 and -1 in double precision; whole numbers, whose products have no rounding and ties in plenty."""
    g = torch.Generator().manual_seed(bits)
    x, planes = (torch.randint(-3, 4, shape, generator=g).float() for shape in ((2, 3, 2, 70, 16), (16, bits)))
    lengths = torch.tensor([70, 41]) if padded else None
    labels, codes = run(by_kernel, find_clusters, x, planes, 6, 5, lengths)
    assert ("cluster_codes" in calls) == by_kernel
    want, want_codes = find_clusters(x.double(), planes.double(), 6, 5, lengths)
    real = torch.arange(70) < (torch.tensor([70, 70]) if lengths is None else lengths)[:, None]
    real = real[:, None, None].expand_as(labels)
    assert torch.equal(labels[real], want[real])
    assert torch.equal(codes, want_codes)
    assert len(labels[real].unique()) > 1
    none = find_clusters(x.double(), planes.double(), 6, 0, lengths)[0]
    assert bits == 1 or not torch.equal(none[real], want[real])

    codes[..., 2, -1] = -1e6  # a cluster that nobody is to belong to
    others = torch.randint(-3, 4, (2, 3, 100, 16), generator=g).float()
    stand = ((torch.arange(100) + 20) // 70).expand(2, -1)
    near = run(by_kernel, nearest_clusters, others, planes, codes, stand, 20, 70)
    assert torch.equal(near, nearest_clusters(others.double(), planes.double(), codes, stand, 20, 70))
    assert torch.equal(near // 6, stand[:, None].expand_as(near))
    assert not (near % 6 == 2).any()
    one = run(by_kernel, nearest_clusters, others[:, :, 60:63], planes, codes, stand[:, 60:63], 10, 70)
    assert torch.equal(one, near[:, :, 60:63])


@pytest.mark.parametrize("by_kernel", FORMS)
@pytest.mark.parametrize(("size", "picks"), [(200, 1), (200, 20), (130, 64), (9, 16)])
def test_largest_products_are_found_by_sorting(by_kernel, calls, size, picks):
    g = torch.Generator().manual_seed(0)
    query, key = (torch.randint(-2, 3, (BATCH, heads, n, 16), generator=g).float() for heads, n in ((6, 60), (2, size)))
    ends = torch.randint(0, size + 1, (BATCH, 60), generator=g)
    got = run(by_kernel, largest_products, query, key, ends, picks)
    assert bool(calls) == by_kernel
    beyond = torch.where(ends == size, 5 * size, ends)  # than there are keys
    assert torch.equal(run(by_kernel, largest_products, query, key, beyond, picks), got)
    scores = query @ key.repeat_interleave(3, 1).mT
    for b, h, r in torch.cartesian_prod(torch.arange(BATCH), torch.arange(6), torch.arange(60)).tolist():
        best = torch.argsort(scores[b, h, r, : ends[b, r]], descending=True, stable=True)[:picks].sort().values.tolist()
        assert got[b, h, r].tolist() == best + [0] * (picks - len(best))


VARIANTS = [
    LshConfig(num_buckets=8, window=16),
    LshConfig(num_buckets=4, num_hashes=3, window=40, num_sinks=0),
    LshConfig(num_buckets=4, window=32, shared_qk=True),
    RoutingConfig(num_clusters=4, window=32),
    ClusterFormerConfig(num_clusters=4, window=32, chunk_size=64, alternate=False),
    ClusteredConfig(num_clusters=8, top_k=12, chunk_size=48),
    ClusteredConfig(num_clusters=5, improved=False, chunk_size=48),
]


def results(config, causal: bool, padded: bool, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    module = build(config, HostShape(HEADS, GROUPS, 32, 192, causal)).to(dtype).eval()
    g = torch.Generator().manual_seed(0)
    given = [(random(g, 3, heads, 333, 32) * scale).to(dtype).requires_grad_() for heads in (HEADS, GROUPS, GROUPS)]
    padding = torch.arange(333) >= torch.tensor([0, 40, 200])[:, None] if padded else None
    output = module(*given, padding=padding, scaling=32**-0.5, causal=causal)
    slope = random(g, *output.shape).to(dtype)
    return [output.detach(), *torch.autograd.grad((output * slope).sum(), given, materialize_grads=True)]


@needs_compiler
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("config", "causal"),
    [(x, causal) for x in VARIANTS for causal in (False, True) if not (causal and getattr(x, "shared_qk", False))],
)
def test_variants_are_the_same_with_the_kernels(calls, config, causal, padded):
    ours = results(config, causal, padded)
    assert {"intervals_forward", "intervals_backward"} <= set(calls)
    calls.clear()
    with kernels.off():
        theirs = results(config, causal, padded)
    assert not calls
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, atol=3e-5, rtol=1e-4)
    assert ours[0].abs().max() > 0.1


@needs_compiler
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("config", [VARIANTS[0], VARIANTS[3]], ids=lambda config: config.name)
def test_large_logits_do_not_overflow(config, causal):
    """Logits of hundreds: as near to double precision as PyTorch's operators are."""
    ours, exact = (results(config, causal, False, 12.0, dtype) for dtype in (torch.float32, torch.float64))
    with kernels.off():
        theirs = results(config, causal, False, 12.0)
    for got, other, want in zip(ours, theirs, exact, strict=True):
        assert (got - want).abs().max() <= 3 * (other - want).abs().max() + 1e-4 * want.abs().max()


@needs_compiler
@pytest.mark.parametrize("splits", [(333,), (100, 1, 20, 212)])
@pytest.mark.parametrize("config", [VARIANTS[1], *VARIANTS[3:]], ids=lambda config: config.name)
def test_later_calls_of_many_tokens(calls, config, splits):
    """Rows of a batch that stand at different positions."""
    module = build(config, HostShape(HEADS, GROUPS, 32, 192, True)).eval()
    g = torch.Generator().manual_seed(0)
    inputs = [random(g, 3, heads, 333, 32) for heads in (HEADS, GROUPS, GROUPS)]
    padding = torch.arange(333) >= torch.tensor([0, 21, 90])[:, None]
    with torch.no_grad():
        with kernels.off():
            want = module(*inputs, padding=padding, scaling=0.2, causal=True)
        got = decode(module, inputs, splits, padding, scaling=0.2)
    assert "intervals_forward" in calls
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
