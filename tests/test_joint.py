"""The joint softmax equals one softmax over all keys, forward and backward, by either kernel."""

import pytest
import torch

from hf_efficient_attn import kernels
from hf_efficient_attn.measuring import peak_memory
from hf_efficient_attn.ops import joint
from hf_efficient_attn.ops.joint import Part, joint_attention, joint_attention_and_lse
from hf_efficient_attn.ops.local import band_encoder


def dense(query, key, value, mask, bias):
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * 0.3 + bias
    return torch.softmax(scores.masked_fill(~mask, float("-inf")), -1).nan_to_num(0.0) @ value


@pytest.mark.parametrize("fused", [True, False])
def test_union_of_key_sets_is_one_softmax(fused, monkeypatch):
    if not fused:
        monkeypatch.setattr(joint, "_fused", lambda query, dropout: False)
    monkeypatch.setattr(joint, "CHUNK", 4)
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
    query, key, value, bias = make(2, 4, 10, 8), make(2, 2, 16, 8), make(2, 2, 16, 8), make(4)
    mask = torch.rand(2, 1, 10, 16) > 0.4
    mask[:, :, :, :6] = torch.ones(10, 6).tril().bool()  # a causal part
    mask[:, :, 3] = False  # a query that sees nothing but its causal part
    mask[0, 0, 3, 0] = True
    mask[:, :, 3, :4] = True
    cut = [slice(0, 6), slice(6, 11), slice(11, 16)]
    parts = [
        Part(key[:, :, cut[0]], value[:, :, cut[0]], causal=True),
        Part(key[:, :, cut[1]], value[:, :, cut[1]], mask=mask[..., cut[1]]),
        Part(key[:, :, cut[2]], value[:, :, cut[2]], mask=lambda i, j: mask[:, :, i:j, cut[2]], bias=bias),
    ]
    added = torch.cat([bias.new_zeros(4, 11), bias[:, None].expand(4, 5)], 1)[None, :, None]
    got, want = joint_attention(query, parts, scaling=0.3), dense(query, key, value, mask, added)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    weight = torch.randn_like(got)
    inputs = (query, key, value, bias)
    grads = [torch.autograd.grad((x * weight).sum(), inputs, retain_graph=True) for x in (got, want)]
    for ours, theirs in zip(*grads, strict=True):
        assert theirs.abs().max() > 1e-3
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=0)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("used", ["both", "lse"])
def test_the_gradient_of_the_log_sum_exp(used, fused, monkeypatch):
    """Beside the output's, whose gradient is zero for one query, or alone."""
    if not fused:
        monkeypatch.setattr(joint, "_fused", lambda query, dropout: False)
    query, key, value = (
        torch.randn(2, h, n, 8, dtype=torch.float64, requires_grad=True) for h, n in ((4, 5), (2, 9), (2, 9))
    )
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    parts = [Part(key[:, :, :5], value[:, :, :5], causal=True), Part(key[:, :, 5:], value[:, :, 5:], bias=bias)]
    output, lse = joint_attention_and_lse(query, parts, scaling=0.3)
    logits = 0.3 * query @ key.repeat_interleave(2, 1).mT
    logits = logits + torch.cat([bias.new_zeros(4, 5), bias[:, None].expand(4, 4)], 1)[None, :, None]
    logits = logits.masked_fill(torch.ones(5, 9, dtype=torch.bool).triu(1) & (torch.arange(9) < 5), float("-inf"))
    want = logits.softmax(-1) @ value.repeat_interleave(2, 1), logits.logsumexp(-1)
    weights = torch.randn_like(output), torch.randn_like(lse)
    weights[0][:, :, 2] = 0
    torch.testing.assert_close(lse, want[1], atol=1e-12, rtol=0)
    grads = []
    for pair in ((output, lse), want):
        terms = [(x * w).sum() for x, w in zip(pair, weights, strict=True)]
        chosen = sum(terms) if used == "both" else terms[1]
        grads.append(torch.autograd.grad(chosen, (query, key, value, bias), allow_unused=True))
    for ours, theirs in zip(*grads, strict=True):
        theirs = torch.zeros_like(ours) if theirs is None else theirs
        assert theirs.abs().max() > 1e-3 or used == "lse"
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=0)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("dtype", "shared"), [(torch.bfloat16, 90), (torch.float16, 90), (torch.float16, 2000)])
def test_half_precision_keeps_what_tells_keys_apart(dtype, shared, fused, monkeypatch):
    """Keys have much in common where a model gives them a bias; products with it may be beyond float16."""
    if not fused:
        monkeypatch.setattr(joint, "_fused", lambda query, dropout: False)
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, h, n, 32, generator=g) for h, n in ((4, 9), (2, 40), (2, 40)))
    half = [x.to(dtype) for x in (query + 2, key + shared, value)]
    got, want = (
        joint_attention(q, [Part(k[:, :, cut], v[:, :, cut]) for cut in (slice(0, 25), slice(25, 40))], scaling=0.3)
        for q, k, v in (half, [x.float() for x in half])
    )
    assert (got - want).abs().max() < 2e-2


def test_a_query_that_sees_nothing_gets_zeros_and_finite_gradients():
    query = torch.randn(1, 2, 4, 8, requires_grad=True)
    key = torch.randn(1, 2, 5, 8, requires_grad=True)
    mask = torch.ones(1, 1, 4, 5, dtype=torch.bool)
    mask[:, :, 2] = False
    out = joint_attention(query, [Part(key, key, mask=mask)], scaling=1.0)
    assert (out[:, :, 2] == 0).all() and (out[:, :, 1] != 0).all()
    out.square().sum().backward()
    assert torch.isfinite(query.grad).all() and torch.isfinite(key.grad).all() and query.grad[:, :, 2].abs().max() == 0


def test_dropout_keeps_the_mean_and_its_gradient_is_that_of_the_kept_weights():
    torch.manual_seed(0)
    query, key = torch.randn(1, 1, 1, 4, dtype=torch.float64), torch.randn(1, 1, 6, 4, dtype=torch.float64)
    value = torch.randn(1, 1, 6, 4, dtype=torch.float64, requires_grad=True)
    clean = joint_attention(query, [Part(key, value)], scaling=1.0)
    drawn = torch.stack([joint_attention(query, [Part(key, value)], scaling=1.0, dropout=0.3) for _ in range(4000)])
    assert (drawn[0] - clean).abs().max() > 1e-3
    torch.testing.assert_close(drawn.mean(0), clean, atol=0.05, rtol=0)
    query.requires_grad_()

    def run(q, k, v):
        torch.manual_seed(1)
        return joint_attention(
            q, [Part(k[:, :, :3], v[:, :, :3]), Part(k[:, :, 3:], v[:, :, 3:])], scaling=1.0, dropout=0.3
        )

    assert torch.autograd.gradcheck(run, (query, key.requires_grad_(), value))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_some_groups_of_queries_at_a_time(dropout, monkeypatch):
    """Where weights are formed, those of all tiles of a long text would be many times what is given."""
    monkeypatch.setattr(joint, "_fused", lambda query, dropout: False)
    inputs = [torch.randn(2, heads, 640, 16, requires_grad=True) for heads in (4, 2, 2)]

    def run():
        torch.manual_seed(0)
        output = band_encoder(*inputs, window=64, lengths=torch.tensor([640, 500]), scaling=0.3, dropout=dropout)
        return output, *torch.autograd.grad(output.square().sum(), inputs)

    found = []
    with kernels.off():
        for weights in (2**24, 2**17):
            monkeypatch.setattr(joint, "WEIGHTS", weights)
            found.append((run(), peak_memory(run)))
    (want, whole), (got, some) = found
    assert some < 0.5 * whole
    for x, y in zip(got, want, strict=True):  # the same are dropped
        torch.testing.assert_close(x, y)
