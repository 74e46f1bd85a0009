"""memory_compressed: its slots are those of a grouped convolution, and slots never lie across a segment's border."""

import pytest
import torch
from torch.nn.functional import conv1d, scaled_dot_product_attention

from hf_efficient_attn.registry import build
from hf_efficient_attn.variant import HostShape
from hf_efficient_attn.variants.memory_compressed import MemoryCompressedConfig


def test_slots_are_a_depthwise_convolution():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, heads, 20, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    module = build(MemoryCompressedConfig(compression=4), HostShape(4, 2, 8, 32, False)).double()

    def convolved(x, weight):
        channels = x.transpose(2, 3).flatten(1, 2)
        return conv1d(channels, weight.transpose(1, 2).flatten(0, 1)[:, None], stride=4, groups=16).view(3, 2, 8, 5).mT

    for trained in (False, True):
        if trained:
            torch.nn.init.normal_(module.conv_k)
            torch.nn.init.normal_(module.conv_v)
        slots = convolved(key, module.conv_k), convolved(value, module.conv_v)
        want = scaled_dot_product_attention(query, *slots, scale=0.4, enable_gqa=True)
        torch.testing.assert_close(module(query, key, value, scaling=0.4, causal=False), want, atol=1e-12, rtol=0)
        means = torch.allclose(slots[0], key.unflatten(2, (5, 4)).mean(3))
        assert means is not trained


def test_a_segment_is_whole_slots():
    with pytest.raises(ValueError, match="segment_size = 10 must be a multiple of compression = 4"):
        MemoryCompressedConfig(segment_size=10, compression=4)
    assert MemoryCompressedConfig(segment_size=12, compression=4).segments()["segment_size"] == 12
