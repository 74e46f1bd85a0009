"""Few queries over ranges of stored keys: by the compiled kernel and by copies, both beside the formula."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from contract import decode
from torch import Tensor

from hf_efficient_attn import (
    BigBirdConfig,
    ClusteredConfig,
    HostShape,
    LshConfig,
    RoutingConfig,
    StridedConfig,
    TopkBlocksConfig,
    kernels,
)
from hf_efficient_attn.ops.few import attend_blocks, attend_ranges, attend_slots, recent_ranges
from hf_efficient_attn.registry import build

needs_compiler = pytest.mark.skipif(kernels.load("few") is None, reason="no C compiler here")
FORMS = [pytest.param(True, marks=needs_compiler, id="kernel"), pytest.param(False, id="copies")]
BATCH, HEADS, GROUPS, STORED, DIM, SCALING = 2, 6, 2, 50, 32, 0.3


def tensors(n: int, scale: float = 1.0) -> list[Tensor]:
    """Keys and values stand in room for more."""
    g = torch.Generator().manual_seed(0)
    query, room = torch.randn(BATCH, HEADS, n, DIM, generator=g), torch.randn(2, BATCH, GROUPS, 80, DIM, generator=g)
    return [query * scale, *room[:, :, :, :STORED].unbind()]


def formula(query: Tensor, key: Tensor, value: Tensor, sees: Callable[[int, int, int], list[int]]) -> Tensor:
    """sees(b, h, i): the slots of a query; in double precision."""
    output = torch.zeros(query.shape, dtype=torch.float64)
    for b, h, i in product(*map(range, query.shape[:3])):
        slots = sees(b, h, i)
        if slots:
            keys, values = (x[b, h * GROUPS // HEADS, slots].double() for x in (key, value))
            output[b, h, i] = (SCALING * keys @ query[b, h, i].double()).softmax(0) @ values
    return output


def run(calls: list[str], by_kernel: bool, function, *args, **options) -> Tensor:
    calls.clear()
    with torch.no_grad():
        if by_kernel:
            found = function(*args, **options, scaling=SCALING)
            assert calls
        else:
            with kernels.off():
                found = function(*args, **options, scaling=SCALING)
            assert not calls
    return found.double()


@pytest.mark.parametrize("by_kernel", FORMS)
@pytest.mark.parametrize("scale", [1.0, 40.0])
@pytest.mark.parametrize(("n", "shared"), [(1, False), (3, True)])
def test_slots(calls, by_kernel, n, shared, scale) -> None:
    """Slots that count twice, slots that are not seen, and a query that sees none."""
    given, g = tensors(n, scale), torch.Generator().manual_seed(1)
    shape = BATCH, 1 if shared else HEADS, n, 20
    slots, unseen = torch.randint(0, STORED, shape, generator=g), torch.rand(shape, generator=g) < 0.3
    slots[..., 1], unseen[..., :2], unseen[0, 0, 0] = slots[..., 0], False, True

    def sees(b: int, h: int, i: int) -> list[int]:
        h = 0 if shared else h
        return slots[b, h, i][~unseen[b, h, i]].tolist()

    given_slots, seen = (
        x.transpose(1, 2).contiguous().transpose(1, 2) for x in (torch.where(unseen, -7, slots), ~unseen)
    )
    got = run(calls, by_kernel, attend_slots, *given, given_slots, seen)
    torch.testing.assert_close(got, formula(*given, sees), atol=1e-5, rtol=1e-4)
    assert got.abs().max() > 0.5


@pytest.mark.parametrize("by_kernel", FORMS)
@pytest.mark.parametrize("own_heads", [True, False])
def test_blocks(calls, by_kernel, own_heads) -> None:
    """Rows at different positions; the own block is read up to the query."""
    size, position, g = 8, torch.tensor([[40, 41, 42], [20, 21, 22]]), torch.Generator().manual_seed(1)
    given, heads = tensors(3), HEADS if own_heads else GROUPS
    chosen = torch.stack([torch.randperm(5, generator=g)[:3] for _ in range(BATCH * heads * 3)])
    chosen = chosen.view(BATCH, heads, 3, 3)
    valid = chosen < (position // size)[:, None, :, None]

    def sees(b: int, h: int, i: int) -> list[int]:
        h, p = h * heads // HEADS, int(position[b, i])
        blocks = chosen[b, h, i][valid[b, h, i]].tolist()
        return [*range(p // size * size, p + 1), *(c * size + s for c in blocks for s in range(size))]

    got = run(calls, by_kernel, attend_blocks, *given, size, chosen, valid, position)
    torch.testing.assert_close(got, formula(*given, sees), atol=1e-5, rtol=1e-4)
    assert not valid.all()


@needs_compiler
@pytest.mark.parametrize(("window", "num_sinks"), [(1, 0), (5, 3), (60, 2), (4, 60)])
def test_recent_slots_of_a_label(calls, window, num_sinks) -> None:
    """Beside a loop over all slots; three rounds, two queries, one of them within the first slots."""
    g = torch.Generator().manual_seed(window)
    labels = torch.randint(0, 3, (BATCH, GROUPS, 80, 3), generator=g, dtype=torch.int32)[:, :, :STORED]
    asked, position = torch.randint(0, 3, (BATCH, HEADS, 2, 3), generator=g), torch.tensor([[1, 40], [20, 49]])
    begin, end = recent_ranges(asked, labels, position, window, num_sinks)
    assert calls == ["few_recent"]
    for b, h, i in product(range(BATCH), range(HEADS), range(2)):
        at, own = int(position[b, i]), labels[b, h * GROUPS // HEADS]
        want = {at, *range(min(num_sinks, at + 1))}
        for r in range(3):
            of_label = [j for j in range(num_sinks, at + 1) if own[j, r] == asked[b, h, i, r]]
            want |= set(of_label[-window:])
        found = [j for x, y in zip(begin[b, h, i].tolist(), end[b, h, i].tolist(), strict=True) for j in range(x, y)]
        assert sorted(found) == sorted(want)


@needs_compiler
@torch.no_grad()
def test_ranges_and_their_log_sum_exp() -> None:
    query, key, value = tensors(2)
    begin = torch.tensor([0, 20, 30]).expand(BATCH, HEADS, 2, -1)
    end = begin + torch.tensor([[7, 1, 0], [0, 0, 0]])
    output, lse = attend_ranges(query, key, value, begin, end, 8, scaling=SCALING)
    logits = SCALING * query @ key.repeat_interleave(HEADS // GROUPS, 1).mT
    slots = [*range(7), 20]
    torch.testing.assert_close(lse[:, :, 0], logits[:, :, 0, slots].logsumexp(-1))
    torch.testing.assert_close(output, formula(query, key, value, lambda b, h, i: slots if i == 0 else []).float())
    assert (lse[:, :, 1] == float("-inf")).all()


@needs_compiler
def test_many_lines_go_to_several_threads(calls, monkeypatch) -> None:
    given, slots = tensors(1), torch.arange(30).expand(BATCH, HEADS, 1, -1)
    alone = run(calls, True, attend_slots, *given, slots, slots >= 0)
    assert len(calls) == 1
    monkeypatch.setattr("hf_efficient_attn.ops.few.ENOUGH", 2000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    assert torch.equal(run(calls, True, attend_slots, *given, slots, slots >= 0), alone)
    assert len(calls) == 5


@needs_compiler
@pytest.mark.parametrize("given", ["gradients", "half precision", "dropout"])
def test_what_the_kernel_does_not_serve(calls, given) -> None:
    query, key, value = (x.bfloat16() if given == "half precision" else x for x in tensors(1))
    slots = torch.arange(30).expand(BATCH, HEADS, 1, -1)
    with torch.set_grad_enabled(given == "gradients"):
        attend_slots(query, key, value, slots, slots >= 0, scaling=1.0, dropout=0.5 if given == "dropout" else 0.0)
    assert not calls


@needs_compiler
@pytest.mark.parametrize(
    "config",
    [
        TopkBlocksConfig(block_size=16, top_k=4),
        BigBirdConfig(block_size=16),
        StridedConfig(stride=7, local_size=20),
        LshConfig(num_buckets=4, window=20),
        LshConfig(num_buckets=2, num_hashes=3, window=7, num_sinks=0),
        RoutingConfig(num_clusters=3, window=30),
        ClusteredConfig(num_clusters=4, top_k=8, chunk_size=24),
        ClusteredConfig(num_clusters=4, improved=False, chunk_size=30),
    ],
    ids=lambda config: config.name,
)
@torch.no_grad()
def test_tokens_one_by_one(calls, config) -> None:
    """Behind 100 tokens that were read at once, as if all had been."""
    module, g = build(config, HostShape(6, 2, 32, 192, True)).eval(), torch.Generator().manual_seed(0)
    args = [torch.randn(2, heads, 130, 32, generator=g) for heads in (6, 2, 2)]
    with kernels.off():
        want = module(*args, scaling=0.3, causal=True)[:, :, 100:]
    got = decode(module, args, (100, *[1] * 30), scaling=0.3)[:, :, 100:]
    assert calls.count("few_forward") == 30
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
