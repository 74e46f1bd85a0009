"""The oracles themselves: dense where they must be, causal, blind to padding, and what hand-worked cases say."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from naive import ORACLES, as_config, naive_attention, naive_row
from naive.flash import naive_flash
from torch.nn.functional import scaled_dot_product_attention

from hf_efficient_attn import available_variants

H, G, N, D = 4, 2, 13, 8
SCALING = D**-0.5

# Small settings that must differ from dense, and settings that must equal it for any N up to 13.
SMALL = {
    "block": [as_config("block", block_size=4, num_sinks=1, global_tokens=1)],
    "strided": [as_config("strided", stride=3, local_size=2, num_sinks=1)],
    "sliding_window": [
        as_config("sliding_window", window=2, dilation=1, num_sinks=1, global_tokens=0),
        as_config("sliding_window", window=2, dilation=[1, 2], num_sinks=1, global_tokens=2),
    ],
    "transformer_xl": [as_config("transformer_xl", segment_size=3, memory_size=2, num_sinks=1, global_tokens=1)],
    "topk_blocks": [
        as_config("topk_blocks", block_size=2, top_k=3, summary=summary, share_group=share, query_block=width)
        for summary, share, width in itertools.product(["mean", "minmax"], [False, True], [0, 2])
    ],
    "linformer": [
        as_config("linformer", rank=4, max_length=16, segment_size=4, exact_segments=n, num_sinks=2) for n in (0, 1)
    ],
    "linear": [as_config("linear")],
    "performer": [as_config("performer", kernel=kernel, num_features=16) for kernel in ("softmax", "relu")],
}
SMALL["combined"] = [as_config("combined", parts=[[SMALL["block"][0], 0.5], [SMALL["topk_blocks"][0], 0.5]])]

DENSE = {
    "flash": [as_config("flash")],
    "block": [as_config("block", block_size=16, num_sinks=n, global_tokens=0) for n in (0, 4)],
    "strided": [as_config("strided", stride=1, local_size=1, num_sinks=0)],
    "sliding_window": [
        as_config("sliding_window", window=13, dilation=1, num_sinks=n, global_tokens=0) for n in (0, 4)
    ],
    "topk_blocks": [
        as_config("topk_blocks", block_size=4, top_k=4, summary=summary, share_group=True, query_block=4)
        for summary in ("mean", "minmax")
    ],
}
DENSE["combined"] = [as_config("combined", parts=[[DENSE["block"][0], 1], [DENSE["strided"][0], 1]])]
DENSE_DECODER = DENSE | {
    "transformer_xl": [as_config("transformer_xl", segment_size=3, memory_size=13, num_sinks=0, global_tokens=0)],
    "linformer": [as_config("linformer", rank=4, max_length=16, segment_size=13, exact_segments=0, num_sinks=0)],
}
DENSE_ENCODER = DENSE | {
    "transformer_xl": [as_config("transformer_xl", segment_size=13, memory_size=0, num_sinks=0, global_tokens=0)],
    "linformer": [as_config("linformer", rank=16, max_length=16)],
}
CASES = [(config, causal) for configs in SMALL.values() for config in configs for causal in (True, False)]
LIMITS = [
    (config, causal)
    for causal, table in ((True, DENSE_DECODER), (False, DENSE_ENCODER))
    for configs in table.values()
    for config in configs
]
IDS = [f"{config.name}-{'decoder' if causal else 'encoder'}" for config, causal in CASES]
LIMIT_IDS = [f"{config.name}-{'decoder' if causal else 'encoder'}" for config, causal in LIMITS]


def tensors(batch=None, length=N, std=1.0):
    lead = () if batch is None else (batch,)
    return [std * torch.randn(*lead, heads, length, D, dtype=torch.float64) for heads in (H, G, G)]


def module_for(config, causal, random=True):
    """The parameters that a variant's module has: random ones, or segment means / the identity for `linformer`."""
    if config.name == "performer":
        return SimpleNamespace(features=torch.randn(G, config.num_features, D, dtype=torch.float64))
    if config.name != "linformer":
        return None
    columns = config.segment_size if causal else config.max_length
    rank = max(1, round(config.rank * columns / config.max_length))
    if random:
        weights = [torch.randn(G, rank, columns, dtype=torch.float64) for _ in range(2)]
    else:
        means = (torch.arange(columns) * rank // columns == torch.arange(rank)[:, None]).double()
        weights = [(means / means.sum(1, keepdim=True))[None]] * 2
    return SimpleNamespace(proj_k=weights[0], proj_v=weights[1], slot_bias=torch.zeros(H, dtype=torch.float64))


def run(config, causal, query, key, value, module=None, scaling=SCALING):
    return naive_row(config.name, query, key, value, config=config, scaling=scaling, causal=causal, module=module)


def seen(config, causal, length=N, head=0, module=None):
    """Position -> the set of positions whose value its output depends on, found by autograd."""
    query, key, value = tensors(length=length)
    value.requires_grad_()
    out = run(config, causal, query, key, value, module)
    group = head // (H // G)
    rows = []
    for t in range(length):
        (grad,) = torch.autograd.grad(out[head, t].sum(), value, retain_graph=True)
        rows.append(set(grad[group].abs().sum(-1).nonzero()[:, 0].tolist()))
    return rows


def test_every_variant_has_an_oracle():
    assert set(ORACLES) == set(available_variants())
    assert set(SMALL) < set(ORACLES)


@pytest.mark.parametrize("causal", [True, False])
def test_flash_equals_sdpa(causal):
    query, key, value = tensors(batch=2)
    out = naive_attention("flash", query, key, value, config=as_config("flash"), scaling=0.3, causal=causal)
    expected = scaled_dot_product_attention(query, key, value, is_causal=causal, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("length", [1, 4, N])
@pytest.mark.parametrize(("config", "causal"), LIMITS, ids=LIMIT_IDS)
def test_dense_limit(config, causal, length):
    query, key, value = tensors(length=length)
    dense = naive_flash(query, key, value, config=config, scaling=SCALING, causal=causal)
    out = run(config, causal, query, key, value, module_for(config, causal, random=False))
    assert (out - dense).abs().max() < 1e-10


@pytest.mark.parametrize(("config", "causal"), CASES, ids=IDS)
def test_a_small_setting_is_not_dense(config, causal):
    query, key, value = tensors()
    dense = naive_flash(query, key, value, config=config, scaling=SCALING, causal=causal)
    out = run(config, causal, query, key, value, module_for(config, causal))
    assert torch.isfinite(out).all()
    assert (out - dense).abs().max() > 1e-3


@pytest.mark.parametrize(("config", "causal"), CASES, ids=IDS)
def test_dense_below(config, causal):
    query, key, value = tensors()
    module = module_for(config, causal)
    dense = naive_flash(query, key, value, config=config, scaling=SCALING, causal=causal)
    out = run(config, causal, query, key, value, module)
    at_the_length = SimpleNamespace(**vars(config) | {"dense_below": N})
    mixed = run(at_the_length, causal, query, key, value, module)
    torch.testing.assert_close(mixed, dense if causal else out, atol=0, rtol=0)
    early = SimpleNamespace(**vars(config) | {"dense_below": 7 if causal else N + 1})
    mixed = run(early, causal, query, key, value, module)
    if causal:
        torch.testing.assert_close(mixed[:, :7], dense[:, :7], atol=0, rtol=0)
        torch.testing.assert_close(mixed[:, 7:], out[:, 7:], atol=0, rtol=0)
    else:
        torch.testing.assert_close(mixed, dense, atol=0, rtol=0)


@pytest.mark.parametrize("t", [0, 5, 11])
@pytest.mark.parametrize(("config", "causal"), CASES, ids=IDS)
def test_only_an_encoder_sees_the_future(config, causal, t):
    query, key, value = tensors()
    module = module_for(config, causal)
    before = run(config, causal, query, key, value, module)
    changed = [x.clone() for x in (query, key, value)]
    for x in changed:
        x[:, t] = torch.randn(x.shape[0], D, dtype=torch.float64) * 3
    moved = (run(config, causal, *changed, module) - before).abs().amax((0, 2))
    if causal:
        assert t == 0 or moved[:t].max() == 0
    elif t > 0:
        assert moved[:t].max() > 1e-6
    assert moved[t:].max() > 1e-3


@pytest.mark.parametrize(("config", "causal"), CASES, ids=IDS)
def test_padding_leaves_real_rows_alone(config, causal):
    """Left, right, holes, and a row without any token."""
    query, key, value = tensors(batch=4)
    module = module_for(config, causal)
    padding = torch.ones(4, N, dtype=torch.bool)
    padding[0, :4] = padding[1, 9:] = padding[2, 3:6] = padding[3] = False
    for x in (query, key, value):
        x.transpose(1, 2)[~padding] = 1e9
    how = {"config": config, "scaling": SCALING, "causal": causal, "module": module}
    out = naive_attention(config.name, query, key, value, padding, **how)
    for b in range(3):
        real = padding[b]
        alone = run(config, causal, query[b][:, real], key[b][:, real], value[b][:, real], module)
        torch.testing.assert_close(out[b][:, real], alone, atol=0, rtol=0)
    assert (out.transpose(1, 2)[~padding] == 0).all()
    assert (naive_attention(config.name, query, key, value, **how)[0] - out[0]).abs().max() > 1e-3


@pytest.mark.parametrize("config", [c for c, causal in CASES if causal], ids=[c.name for c, causal in CASES if causal])
def test_the_last_queries_alone_give_the_last_rows(config):
    query, key, value = tensors(batch=2)
    how = {"config": config, "scaling": SCALING, "causal": True, "module": module_for(config, True)}
    padding = torch.ones(2, N, dtype=torch.bool)
    padding[0, :4] = padding[1, 8:10] = False
    full = naive_attention(config.name, query, key, value, padding, **how)
    last = naive_attention(config.name, query[:, :, -5:], key, value, padding, **how)
    torch.testing.assert_close(last, full[:, :, -5:], atol=1e-12, rtol=0)
    assert (last[:, :, -1] - full[:, :, -2]).abs().max() > 1e-3


@pytest.mark.parametrize(("config", "causal"), CASES, ids=IDS)
def test_gradients_agree_with_finite_differences(config, causal):
    query, key, value = (x[:, :6].clone().requires_grad_() for x in tensors())
    module = module_for(config, causal)
    names = [] if module is None else [n for n in vars(module) if n != "features" and (causal or n != "slot_bias")]
    learned = [getattr(module, n).requires_grad_() for n in names]

    def function(query, key, value, *learned):
        inner = None if module is None else SimpleNamespace(**vars(module) | dict(zip(names, learned, strict=True)))
        return run(config, causal, query, key, value, inner)

    assert torch.autograd.gradcheck(function, (query, key, value, *learned), fast_mode=True)


# ---------------------------------------------------------------------------------------------------- worked by hand


def test_block_sees():
    config = as_config("block", block_size=4, num_sinks=2, global_tokens=0)
    decoder, encoder = seen(config, True, 10), seen(config, False, 10)
    assert [decoder[t] for t in (0, 3, 4, 9)] == [{0}, {0, 1, 2, 3}, {0, 1, 4}, {0, 1, 8, 9}]
    assert [encoder[t] for t in (0, 5, 8)] == [{0, 1, 2, 3}, {4, 5, 6, 7}, {8, 9}]
    config.global_tokens = 1
    assert seen(config, True, 10) == decoder
    encoder = seen(config, False, 10)
    assert [encoder[t] for t in (0, 1, 5, 8)] == [set(range(10)), {0, 1, 2, 3}, {0, 4, 5, 6, 7}, {0, 8, 9}]


def test_strided_sees():
    config = as_config("strided", stride=4, local_size=2, num_sinks=1)
    assert seen(config, True)[10] == {0, 2, 6, 9, 10}
    assert seen(config, False)[6] == {2, 4, 5, 6, 7, 8, 10}


def test_sliding_window_sees():
    config = as_config("sliding_window", window=2, dilation=[1, 3], num_sinks=2, global_tokens=1)
    assert seen(config, True)[8] == {0, 1, 7, 8}
    assert seen(config, True, head=2)[8] == {0, 1, 5, 8}
    assert seen(config, True)[0] == {0}
    assert seen(config, False)[8] == {0, 6, 7, 8, 9, 10}
    assert seen(config, False, head=3)[7] == {0, 1, 4, 7, 10}
    assert seen(config, False)[0] == set(range(N))


def test_transformer_xl_sees():
    config = as_config("transformer_xl", segment_size=4, memory_size=3, num_sinks=1, global_tokens=2)
    assert seen(config, True)[9] == {0, 5, 6, 7, 8, 9}
    assert seen(config, True)[2] == {0, 1, 2}
    assert seen(config, False)[9] == {0, 1, 5, 6, 7, 8, 9, 10, 11}
    assert seen(config, False)[1] == set(range(N))


def test_combined_gives_whole_groups_to_its_parts():
    wide, narrow = (as_config("sliding_window", window=w, dilation=1, num_sinks=0, global_tokens=0) for w in (3, 1))
    config = as_config("combined", parts=[[wide, 0.5], [narrow, 0.5]])
    assert [seen(config, True, head=h)[9] for h in range(4)] == [{7, 8, 9}] * 2 + [{9}] * 2
    with pytest.raises(ValueError, match="no key/value group out of 2"):
        seen(as_config("combined", parts=[[wide, 1], [narrow, 1], [wide, 1]]), True)
    query, key, value = (torch.randn(3, 5, D, dtype=torch.float64) for _ in range(3))  # three groups: two and one
    out = run(config, True, query, key, value)
    torch.testing.assert_close(out[:2], run(wide, True, query[:2], key[:2], value[:2]))
    torch.testing.assert_close(out[2:], value[2:])


def blocks_seen(config, causal, query, key, head=0):
    value = torch.randn_like(key).requires_grad_()
    out = run(config, causal, query, key, value)
    chosen = []
    for t in range(query.shape[1]):
        (grad,) = torch.autograd.grad(out[head, t].sum(), value, retain_graph=True)
        chosen.append({j // config.block_size for j in grad[head // (H // G)].abs().sum(-1).nonzero()[:, 0].tolist()})
    return chosen


def topk(top_k, summary="mean", share_group=False, query_block=0):
    options = {"summary": summary, "share_group": share_group, "query_block": query_block}
    return as_config("topk_blocks", block_size=2, top_k=top_k, **options)


def test_topk_blocks_own_first_and_best():
    query, key = torch.zeros(H, 11, D, dtype=torch.float64), torch.zeros(G, 11, D, dtype=torch.float64)
    query[..., 0] = 1.0
    key[:, :, 0] = torch.tensor([0, 0, 0, 0, 2, 2, 1, 1, 0, 0, 3]).double()  # best: block 5 (one token), 2, 3
    assert blocks_seen(topk(1), True, query, key)[10] == {5}
    assert blocks_seen(topk(2), True, query, key)[10] == {0, 5}
    assert blocks_seen(topk(3), True, query, key)[10] == {0, 2, 5}
    assert blocks_seen(topk(3), True, query, key)[5] == {0, 1, 2}  # the own block once, block 1 for want of better
    assert blocks_seen(topk(3), False, query, key)[2] == {0, 1, 5}  # the partial block counts over its one token
    assert blocks_seen(topk(3), False, query, key)[0] == {0, 2, 5}  # own block and block 0 are one
    key.zero_()
    assert blocks_seen(topk(4), True, query, key)[10] == {0, 1, 2, 5}  # ties go to the lower block


def test_topk_blocks_summaries_differ():
    query, key = torch.zeros(H, 8, D, dtype=torch.float64), torch.zeros(G, 8, D, dtype=torch.float64)
    query[..., 0] = 1.0
    key[:, :, 0] = torch.tensor([0, 0, 5, -5, 1, 1, 0, 0]).double()  # block 1 averages to 0 but holds the best key
    assert blocks_seen(topk(3), True, query, key)[7] == {0, 2, 3}
    assert blocks_seen(topk(3, "minmax"), True, query, key)[7] == {0, 1, 3}
    assert blocks_seen(topk(3, "minmax"), True, -query, key)[7] == {0, 1, 3}


def test_topk_blocks_choose_together():
    query, key = torch.zeros(H, 8, D, dtype=torch.float64), torch.zeros(G, 8, D, dtype=torch.float64)
    key[:, 2:4, 0] = key[:, 4:6, 1] = 1.0
    query[0, :, 0], query[1, :, 1] = 1.0, 2.0  # head 0 wants block 1, head 1 block 2, and more strongly
    assert [blocks_seen(topk(3), True, query, key, head=h)[7] for h in (0, 1)] == [{0, 1, 3}, {0, 2, 3}]
    assert [blocks_seen(topk(3, share_group=True), True, query, key, head=h)[7] for h in (0, 1)] == [{0, 2, 3}] * 2
    query.zero_()
    query[:, 6, 0], query[:, 7, 1] = 1.0, 2.0  # two queries of one block disagree
    assert blocks_seen(topk(3), False, query, key)[6:] == [{0, 1, 3}, {0, 2, 3}]
    assert blocks_seen(topk(3, query_block=2), False, query, key)[6:] == [{0, 2, 3}] * 2
    assert blocks_seen(topk(3, query_block=2), True, query, key)[6:] == [{0, 1, 3}, {0, 2, 3}]  # never in a decoder
    with pytest.raises(ValueError, match="does not divide"):
        blocks_seen(topk(3, query_block=4), False, query, key)


def test_linformer_encoder_is_the_mean_of_segments():
    """max_length 16 in 4 slots, 6 tokens: slots of 4 and of 2 tokens, the others masked."""
    config = as_config("linformer", rank=4, max_length=16)
    query, key, value = tensors(length=6)
    out = run(config, False, query, key, value, module_for(config, False, random=False))
    pooled = [torch.stack([x[:, :4].mean(1), x[:, 4:].mean(1)], 1).repeat_interleave(2, 0) for x in (key, value)]
    torch.testing.assert_close(out, scaled_dot_product_attention(query, *pooled, scale=SCALING))
    with pytest.raises(ValueError, match="max_length is 16"):
        run(config, False, *tensors(length=17), module_for(config, False))


def test_linformer_decoder_joins_exact_tokens_and_slots():
    """Segments of 4, 1 slot, 1 sink: t = 13 sees 8..13 and the sink exactly, the means of 1..3 and of 4..7 as slots."""
    config = as_config("linformer", rank=4, max_length=16, segment_size=4, exact_segments=1, num_sinks=1)
    query, key, value = tensors(length=14)
    module = module_for(config, True, random=False)
    assert module.proj_k.shape == (1, 1, 4)
    module.slot_bias = torch.tensor([0.5, -1.0, 0.0, 2.0], dtype=torch.float64)
    out = run(config, True, query, key, value, module)[:, 13]

    def states(x):
        x = x.repeat_interleave(2, 0)
        return torch.cat([x[:, :1], x[:, 8:14], x[:, 1:4].mean(1, True), x[:, 4:8].mean(1, True)], 1)

    logits = SCALING * torch.einsum("hd,hjd->hj", query[:, 13], states(key))
    logits[:, -2:] += module.slot_bias[:, None]
    torch.testing.assert_close(out, torch.einsum("hj,hjd->hd", logits.softmax(-1), states(value)))
    assert seen(config, True, 14, module=module)[13] == set(range(14))
    without = as_config("linformer", rank=4, max_length=16, segment_size=4, exact_segments=0, num_sinks=8)
    many = run(without, True, query, key, value, module)  # both first segments are sinks: no slot of theirs is left
    dense = naive_flash(query, key, value, config=without, scaling=SCALING, causal=True)
    torch.testing.assert_close(many[:, :12], dense[:, :12])
    assert (many[:, 12:] - dense[:, 12:]).abs().max() > 1e-3


def test_linear_equals_its_recurrent_form():
    query, key, value = tensors()
    out = run(as_config("linear"), True, query, key, value)
    for h in range(H):
        memory, normaliser = torch.zeros(D, D, dtype=torch.float64), torch.zeros(D, dtype=torch.float64)
        for t in range(N):
            phi_q, phi_k = (torch.where(x > 0, x + 1, x.exp()) for x in (query[h, t], key[h // 2, t]))
            memory, normaliser = memory + torch.outer(phi_k, value[h // 2, t]), normaliser + phi_k
            torch.testing.assert_close(out[h, t], phi_q @ memory / (phi_q @ normaliser))
    other = run(as_config("linear"), True, query, key, value, scaling=7.0)
    torch.testing.assert_close(other, out, atol=0, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
def test_performer_converges_to_softmax(causal):
    query, key, value = tensors(std=0.3)
    dense = naive_flash(query, key, value, config=None, scaling=SCALING, causal=causal)
    errors = []
    for m in (64, 4096):
        config = as_config("performer", kernel="softmax", num_features=m)
        tries = [run(config, causal, query, key, value, module_for(config, causal)) for _ in range(4)]
        errors.append(math.sqrt(sum((out - dense).square().mean().item() for out in tries) / 4))
    assert 5 < errors[0] / errors[1] < 13  # 64 times the features, about an eighth of the error


@pytest.mark.parametrize("kernel", ["softmax", "relu"])
def test_performer_stays_finite(kernel):
    config = as_config("performer", kernel=kernel, num_features=8)
    query, key, value = tensors(std=100.0)
    out = run(config, True, query, key, value, module_for(config, True))
    assert torch.isfinite(out).all()
    if kernel == "relu":
        features = torch.ones(G, 8, D, dtype=torch.float64)
        nothing = run(config, True, -query.abs(), key, value, SimpleNamespace(features=features))
        assert (nothing == 0).all()
