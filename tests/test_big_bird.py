"""big_bird: Transformers' own BigBird given the same blocks, and what the random blocks depend on."""

from __future__ import annotations

import pytest
import torch
from contract import decode
from naive import naive_attention
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel
from transformers.models.big_bird.modeling_big_bird import BigBirdConfig as ReferenceConfig

from hf_efficient_attn.registry import build
from hf_efficient_attn.variant import HostShape
from hf_efficient_attn.variants.big_bird import BigBirdConfig

SCALING = 8**-0.5


def make(causal=False, groups=4, layer=0, **fields):
    sizes = {"block_size": 4, "num_global_blocks": 1, "num_random_blocks": 1}
    return build(BigBirdConfig(**{**sizes, **fields}), HostShape(4, groups, 8, 32, causal, layer=layer, num_layers=2))


def run(module, args, **kwargs):
    return module(*args, scaling=SCALING, causal=module.host.causal, **kwargs)


def inputs(length, groups=4, batch=2):
    return [torch.randn(batch, heads, length, 8, dtype=torch.float64) for heads in (4, groups, groups)]


def drawn(module, count, blocks=None):
    """(G, count, slots): the random blocks of `count` query blocks, -1 where there is none."""
    slots = module.config.num_random_blocks
    blocks = torch.arange(count)[None, :] + 1 if blocks is None else blocks
    chosen, valid = module._choose(torch.arange(count)[None], blocks, module.host.causal)
    return chosen.masked_fill(~valid, -1)[0, ..., -slots:]


@torch.no_grad()
@pytest.mark.parametrize("random_blocks", [1, 2])
def test_it_is_transformers_big_bird(random_blocks):
    """The last block, which is global there and not here, is masked there and absent here; random blocks are ours."""
    length, size = 44, 4
    config = ReferenceConfig(
        hidden_size=32, num_attention_heads=4, block_size=size, num_random_blocks=random_blocks,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    reference, hidden = BigBirdBlockSparseAttention(config).double(), torch.randn(2, length, 32, dtype=torch.float64)
    for layer in (reference.query, reference.key, reference.value):
        layer.weight.normal_(std=0.3)
    for seed in range(10**6):  # until no block is drawn twice: there it would count twice
        module = make(num_random_blocks=random_blocks, seed=seed)
        plan = drawn(module, length // size - 1, blocks=length // size - 1)[:, 1:].numpy()
        if (plan > 0).all():
            break
    reference._bigbird_block_rand_mask_with_head = lambda **_: list(plan)
    mask = torch.ones(2, length, dtype=torch.float64)
    mask[:, -size:] = 0
    blocked, band, from_mask, to_mask = BigBirdModel.create_masks_for_block_sparse_attn(mask, size)
    want, _ = reference(hidden, band, from_mask, to_mask, blocked, blocked)
    args = [
        layer(hidden).unflatten(2, (4, 8)).transpose(1, 2)[:, :, :-size]
        for layer in (reference.query, reference.key, reference.value)
    ]
    got = run(module, args).transpose(1, 2).flatten(2)
    torch.testing.assert_close(got, want[:, :-size], atol=1e-6, rtol=0)  # its masks are rounded to -10000
    other = run(make(num_random_blocks=random_blocks, seed=seed + 1), args).transpose(1, 2).flatten(2)
    assert (other - got).abs().max() > 1e-3


def test_random_blocks_depend_on_seed_layer_head_block_and_slot_alone():
    many = {"causal": True, "num_random_blocks": 5}
    first = drawn(make(**many), 60)
    assert torch.equal(drawn(make(**many), 60), first)
    assert torch.equal(drawn(make(**many), 90)[:, :60], first)  # a decoder's do not know how long the text gets
    for other in (make(**many, seed=1), make(**many, layer=1)):
        assert (drawn(other, 60) != first).float().mean() > 0.5
    assert (first[0] != first[1]).float().mean() > 0.5
    i = torch.arange(60)[:, None]
    assert ((first == -1) | ((first >= 1) & (first <= i - 2))).all()  # neither global nor in the window, in the past
    assert ((first >= 0).sum(-1)[:, 3:] >= 1).all() and (first[:, :3] == -1).all()


def test_random_blocks_are_uniform():
    choices = drawn(make(groups=2, num_random_blocks=1), 2000, blocks=2000)[..., 0].flatten()
    counts = torch.histc(choices.double(), 20, 0, 2000)
    assert counts.sum() == 4000
    assert ((counts - 200).square() / 200).sum() < 44  # chi-square, 19 degrees of freedom, one in a thousand


def test_a_block_drawn_twice_counts_once():
    module = make(causal=True, groups=2, num_random_blocks=12).double()
    assert (drawn(module, 8)[:, 5:] == -1).any()
    args = inputs(30, groups=2)
    want = naive_attention("big_bird", *args, config=module.config, scaling=SCALING, causal=True, module=module)
    torch.testing.assert_close(run(module, args), want, atol=1e-10, rtol=0)


def test_default_proportions_and_calls_of_any_length():
    module, args = make(causal=True, groups=2, block_size=8, num_random_blocks=3).double(), inputs(170, groups=2)
    want = naive_attention("big_bird", *args, config=module.config, scaling=SCALING, causal=True, module=module)
    torch.testing.assert_close(run(module, args), want, atol=1e-10, rtol=0)
    for splits in ((100, 70), (9, 40, 1, 17, 103), (150, *[1] * 20)):
        torch.testing.assert_close(decode(module, args, splits, scaling=SCALING), want, atol=1e-10, rtol=0)
