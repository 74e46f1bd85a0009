"""Linear attention by chunks is the explicit sum over keys: values, gradients, splits into calls, extreme features."""

from dataclasses import replace

import pytest
import torch

from hf_efficient_attn import HostShape, InfiniConfig, LinearConfig
from hf_efficient_attn.ops import chunked_scan
from hf_efficient_attn.ops.chunked_scan import linear_attention
from hf_efficient_attn.ops.features import Features, positive
from hf_efficient_attn.registry import build

GROUPS, HEADS, SIZE, WIDTH = 2, 4, 5, 6


@pytest.fixture(autouse=True)
def small_spans(monkeypatch):
    monkeypatch.setattr(chunked_scan, "SPAN", 16)
    monkeypatch.setattr(chunked_scan, "CHUNK", 4)


@pytest.fixture(params=["one by one", "side by side"])
def chunks(request, monkeypatch):
    """As on a CPU, and as where operators have a price."""
    if request.param == "side by side":
        monkeypatch.setattr(chunked_scan, "sizes", lambda query, features: (4, 16, 16))


def project(x, w):
    return torch.einsum("bgrtd,gmd->bgrtm", x.unflatten(1, (GROUPS, -1)), w).flatten(1, 2)


def maps(logarithmic: bool) -> Features:
    w = torch.randn(GROUPS, SIZE, WIDTH, dtype=torch.float64, requires_grad=True)
    if logarithmic:
        return Features(project, lambda x, w: project(x, w) - x.square().sum(-1, keepdim=True) / 2, SIZE, (w,), True)
    return Features(lambda x, w: project(x, w).exp(), lambda x, w: project(x, w).exp(), SIZE, (w,))


def inputs(length: int, scale: float):
    shapes = [(HEADS, scale), (GROUPS, scale), (GROUPS, 1.0)]
    return [(s * torch.randn(2, h, length, WIDTH, dtype=torch.float64)).requires_grad_() for h, s in shapes]


def explicit(query, key, value, features, causal, lengths=None):
    """Through log-sum-exp over features, so that nothing over- or underflows."""
    phi_q, phi_k = features.query(query, *features.params), features.key(key, *features.params)
    if not features.logarithmic:
        phi_q, phi_k = phi_q.log(), phi_k.log()
    phi_k, value = phi_k.repeat_interleave(HEADS // GROUPS, 1), value.repeat_interleave(HEADS // GROUPS, 1)
    weights = (phi_q[:, :, :, None] + phi_k[:, :, None]).logsumexp(-1)
    n = query.shape[2]
    if causal:
        weights = weights.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf"))
    if lengths is not None:
        weights = weights.masked_fill((torch.arange(n) >= lengths[:, None])[:, None, None], float("-inf"))
    return weights.softmax(-1) @ value


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("logarithmic", "scale"), [(False, 0.5), (True, 0.5), (True, 12.0)])
def test_it_is_the_sum_over_keys(logarithmic, scale, causal):
    features = maps(logarithmic)
    for length in (1, 3, 4, 5, 16, 17, 37):
        args = inputs(length, scale)
        for lengths in (None, torch.tensor([length, (length + 1) // 2])):
            got, _ = linear_attention(*args, features, causal=causal, lengths=lengths)
            want = explicit(*args, features, causal, lengths)
            weight = torch.randn_like(got)
            if lengths is not None:
                weight *= (torch.arange(length) < lengths[:, None])[:, None, :, None]
            torch.testing.assert_close(got * (weight != 0), want * (weight != 0), atol=1e-10, rtol=1e-10)
            leaves = (*args, *features.params)
            grads = [torch.autograd.grad((x * weight).sum(), leaves, retain_graph=True) for x in (got, want)]
            for ours, theirs in zip(*grads, strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-8 * theirs.abs().max().item() + 1e-9, rtol=0)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("logarithmic", [False, True])
@pytest.mark.parametrize("splits", [(1, 7, 20, 2, 7), (14, 16, 7)])
def test_calls_continue_one_another_with_their_gradients(splits, logarithmic):
    features, args = maps(logarithmic), inputs(37, 0.5)
    full, _ = linear_attention(*args, features, causal=True)
    sums, parts, begin = None, [], 0
    for size in splits:
        part = [x[:, :, begin : begin + size] for x in args]
        output, sums = linear_attention(*part, features, causal=True, before=sums)
        parts.append(output)
        begin += size
    torch.testing.assert_close(torch.cat(parts, 2), full, atol=1e-12, rtol=0)
    weight = torch.randn_like(full)
    grads = [torch.autograd.grad((x * weight).sum(), args) for x in (torch.cat(parts, 2), full)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=0)
    alone, _ = linear_attention(*[x[:, :, 30:] for x in args], features, causal=True)
    assert (alone - full[:, :, 30:]).abs().max() > 1e-2


@pytest.mark.parametrize("scale", [0.5, 12.0])
@pytest.mark.parametrize("kind", ["plain", "logarithmic", "weighted", "handed out"])
def test_a_generated_token_is_read_as_many_are(kind, scale):
    """Without gradients, by a pass of its own; the second row is padding now and then, also at the start."""
    features, args = maps(kind == "logarithmic"), [x.detach() for x in inputs(23, scale)]
    if kind == "handed out":
        features = replace(features, floor=None)
    logs = [s * torch.randn(2, GROUPS, 23, dtype=torch.float64).cumsum(2) for s in (-scale, scale)]
    lengths = torch.stack([torch.ones(23, dtype=torch.int64), torch.tensor([0, 0, 0, *[1, 0, 1, 1] * 5])], 1)

    def read(begin, end, real, sums):
        part = [x[:, :, begin:end] for x in args]
        weights = chunked_scan.Weights(*(x[:, :, begin:end] for x in logs)) if kind == "weighted" else None
        return linear_attention(*part, features, causal=True, lengths=real, before=sums, weights=weights)

    sums, many = None, None
    for i in range(23):
        with torch.no_grad():
            got, sums = read(i, i + 1, lengths[i], sums)
        want, many = read(i, i + 1, lengths[i], many)  # where there are gradients, the pass for many tokens
        for ours, theirs in ((got, want), (sums.total, many.total)):
            torch.testing.assert_close(ours, theirs, atol=1e-12 * theirs.abs().max().item(), rtol=1e-9)
        assert (sums.top == many.top).all()
    with torch.no_grad():
        full, _ = read(0, 23, None, None)
    last = full[1, :, -1]
    assert (last - got[1, :, -1]).abs().max() > 1e-3 * last.abs().max()  # what was padding counts there


@pytest.mark.usefixtures("chunks")
def test_a_later_key_of_enormous_weight_does_not_drown_earlier_queries():
    """In float32, with keys whose features are e^200 apart inside one span."""
    features, (query, key, value) = maps(True), inputs(16, 1.0)
    with torch.no_grad():
        key[:, :, :8] *= 12  # exp(-|k|^2 / 2) is about e^-400
        key[:, :, 8:] *= 0.1
    want = explicit(query, key, value, features, True)
    single = Features(features.query, features.key, SIZE, (features.params[0].detach().float(),), True)
    args = [x.detach().float().requires_grad_() for x in (query, key, value)]
    got, _ = linear_attention(*args, single, causal=True)
    raw = features.key(key, *features.params)
    assert (raw[:, :, 8:].amax(2) - raw[:, :, :8].amax(2)).max() > 100  # exp of this overflows float32
    torch.testing.assert_close(got.double(), want, atol=1e-3, rtol=0)
    got.sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in args)


def test_nothing_in_common_fades_to_zero():
    features = Features(torch.relu, torch.relu, WIDTH, floor=1e-6)
    query, key, value = inputs(5, 1.0)
    with torch.no_grad():
        query[:, :, 3] = -1
    output, _ = linear_attention(query, key, value, features, causal=True)
    assert (output[:, :, 3] == 0).all() and (output[:, :, 2] != 0).any()
    output.sum().backward()
    assert torch.isfinite(key.grad).all() and (query.grad[:, :, 3] == 0).all() and (query.grad[:, :, 2] != 0).any()


@pytest.mark.usefixtures("chunks")
def test_numerators_and_normalisers_are_handed_out():
    features, args = maps(False), inputs(37, 0.5)
    read, _ = chunked_scan.read_past(*args, features)
    want, _ = linear_attention(*args, features, causal=True)
    torch.testing.assert_close(read[..., :-1] / read[..., -1:], want, atol=1e-12, rtol=0)
    phi_q, phi_k = features.query(args[0], *features.params), features.key(args[1], *features.params)
    normaliser = (phi_q @ phi_k.repeat_interleave(HEADS // GROUPS, 1).mT).tril().sum(3)
    torch.testing.assert_close(read[..., -1], normaliser, atol=1e-10, rtol=1e-12)
    empty, sums = chunked_scan.read_past(*[x[:, :, :0] for x in args], features)
    assert empty.shape == (2, HEADS, 0, WIDTH + 1) and (sums.total == 0).all()


def test_a_mask_of_keys_and_a_number_of_keys_are_alike():
    features, args, lengths = maps(False), inputs(37, 0.5), torch.tensor([37, 20])
    mask = torch.arange(37) < lengths[:, None]
    counted, _ = chunked_scan.read_past(*args, features, real=lengths)
    masked, _ = chunked_scan.read_past(*args, features, real=mask)
    torch.testing.assert_close(masked, counted, atol=0, rtol=0)
    others, _ = chunked_scan.read_past(*args, features, real=~mask)
    everything, _ = chunked_scan.read_past(*args, features)
    torch.testing.assert_close(masked + others, everything, atol=1e-10, rtol=0)
    assert (masked - everything)[1, :, 20:].abs().max() > 1e-2


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("steepness", [0.1, 30.0])
def test_weights_of_tokens(steepness):
    """Up to e^600 apart within a chunk, which no float32 could hold side by side."""
    features, args = maps(False), inputs(37, 0.5)
    log_k = (steepness * torch.randn(2, GROUPS, 37, dtype=torch.float64).abs().cumsum(2)).requires_grad_()
    log_q = -log_k.detach()
    phi_q, phi_k = features.query(args[0], *features.params), features.key(args[1], *features.params)
    logs = (phi_q @ phi_k.repeat_interleave(HEADS // GROUPS, 1).mT).log()
    logs = logs + log_k.repeat_interleave(HEADS // GROUPS, 1)[:, :, None]
    logs = logs.masked_fill(torch.ones(37, 37, dtype=torch.bool).triu(1), float("-inf"))
    want = logs.softmax(-1) @ args[2].repeat_interleave(HEADS // GROUPS, 1)
    weights = chunked_scan.Weights(log_q, log_k)
    got, _ = linear_attention(*args, features, causal=True, weights=weights)
    torch.testing.assert_close(got, want, atol=1e-10, rtol=0)
    leaves, slope = (*args, log_k, *features.params), torch.randn_like(got)
    grads = [torch.autograd.grad((x * slope).sum(), leaves, retain_graph=True) for x in (got, want)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9 * max(theirs.abs().max().item(), 1), rtol=0)
    plain, _ = linear_attention(*args, features, causal=True)
    assert (plain - got).abs().max() > 1e-2


@pytest.mark.parametrize("config", [LinearConfig(), InfiniConfig(segment_size=8)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shared", [-12.0, -24.0])
def test_small_features_keep_their_digits(config, causal, shared):
    """elu(x) + 1 of coordinates that are all far below 0, forward and backward: 1e-5 and less, which 1 would swallow."""
    module, found = build(config, HostShape(4, 2, 16, 64, causal)), []
    for dtype in (torch.float32, torch.float64):
        g = torch.Generator().manual_seed(0)
        args = [torch.randn(2, h, 50, 16, generator=g).add(x) for h, x in ((4, shared), (2, shared), (2, 0))]
        args = [x.to(dtype).requires_grad_() for x in args]
        output = module.to(dtype)(*args, scaling=1e-3, causal=causal)
        found.append([output, *torch.autograd.grad((output * torch.randn(output.shape, generator=g)).sum(), args)])
    for got, want in zip(*found, strict=True):
        assert (got - want).abs().max() < 1e-5 * want.abs().max() > 0


def test_the_gradient_of_small_features_at_zero():
    x = torch.zeros(3, requires_grad=True)
    y = positive(x)
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [1, 1, 1] == y.tolist()
