"""perceiver: latents that ask for one token each give dense attention, and its defaults depend on the direction."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from hf_efficient_attn.ops.summaries import SoftmaxPool
from hf_efficient_attn.registry import build
from hf_efficient_attn.variant import HostShape
from hf_efficient_attn.variants.perceiver import PerceiverAttention, PerceiverConfig


def make(causal: bool, layer: int = 0, **fields) -> PerceiverAttention:
    host = HostShape(4, 2, 8, 32, causal, layer=layer, num_layers=3)
    return build(PerceiverAttention.resolve(PerceiverConfig(**fields), host), host).double()


def test_latents_per_direction():
    assert make(False).latents.shape == (2, 256, 8)
    assert make(True).latents.shape == (2, 16, 8)
    assert make(True, num_latents=5).latents.shape == (2, 5, 8)


def test_latents_come_from_the_seed_and_the_layer():
    first = make(False).latents
    assert torch.equal(first, make(False).latents)
    for other in (make(False, seed=1), make(False, layer=1)):
        assert (other.latents - first).abs().max() > 0.1


def test_a_latent_for_each_token_is_dense_attention():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 12, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    key = torch.nn.functional.normalize(key, dim=-1)  # the token that a latent points at has its largest logit
    module = make(False, num_latents=12)
    dense = scaled_dot_product_attention(query, key, value, scale=0.4, enable_gqa=True)
    assert (module(query, key, value, scaling=0.4, causal=False) - dense).abs().max() > 1e-2
    with torch.no_grad():
        module.latents.copy_(1e4 * key[0])
    assert (module(query, key, value, scaling=0.4, causal=False) - dense).abs().max() < 1e-10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_segment_is_read_in_full_precision(dtype):
    """Of keys that share a large part, as where a model gives them a bias: each slot is what it is, rounded once."""
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(2, 2, 3, 24, 32, generator=generator).add(x).to(dtype) for x in (700, 0))
    pool = SoftmaxPool(torch.randn(2, 4, 32, generator=generator).abs().to(dtype))
    real = torch.rand(2, 3, 24, generator=generator) < 0.7
    for x, wide in zip(pool.summarise(key, value, real), pool.summarise(key.float(), value.float(), real), strict=True):
        assert x.dtype == dtype
        torch.testing.assert_close(x, wide.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-4)
