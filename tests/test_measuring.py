"""Measured costs against sizes known by arithmetic."""

from __future__ import annotations

import time

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count
from transformers import GPT2Config, GPT2LMHeadModel
from zoo import ZOO

from benchmarks import decoding
from hf_efficient_attn import kernels, measuring, patch_model
from hf_efficient_attn.measuring import (
    cache_bytes,
    count_flops,
    measure_model,
    median_time,
    peak_memory,
    resident_bytes,
    state_bytes,
    time_ratio,
)
from hf_efficient_attn.recovery import patched_layers


def test_peak_memory_sees_a_square_that_is_gone_again():
    n = 500

    def square_inside() -> torch.Tensor:
        return torch.ones(n, n).sum()

    assert n * n * 4 <= peak_memory(square_inside) <= n * n * 4 + 1000
    assert peak_memory(lambda: torch.ones(n).sum()) < n * 4 + 1000


def test_peak_memory_counts_what_lives_together_only():
    n = 100_000
    assert peak_memory(lambda: (torch.ones(n).sum(), torch.ones(n).sum())) < 1.1 * n * 4
    assert peak_memory(lambda: (torch.ones(n), torch.ones(n))) >= 2 * n * 4


def test_peak_memory_counts_what_a_kernels_thread_holds():
    n, threads = 100_000, torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = peak_memory(lambda: kernels.in_parallel(lambda _: torch.ones(n).sum(), range(2)))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert n * 4 <= found < 1.1 * n * 4


def test_peak_memory_is_not_lowered_by_releasing_older_tensors():
    held = [torch.ones(100_000)]

    def swap() -> None:
        torch.ones(50_000).sum()
        held.clear()

    assert 200_000 <= peak_memory(swap) < 210_000


def test_peak_memory_tells_eager_from_fused_attention():
    n = 1024
    q = torch.randn(1, 2, n, 16, requires_grad=True)

    def eager() -> None:
        (torch.softmax(q @ q.transpose(-1, -2), -1) @ q).sum().backward()

    def fused() -> None:
        scaled_dot_product_attention(q, q, q).sum().backward()

    square = 2 * n * n * 4
    assert peak_memory(eager) > square
    assert peak_memory(fused) < square / 2


def test_peak_memory_refuses_other_devices():
    with pytest.raises(ValueError, match="'cpu' and 'cuda'"):
        peak_memory(lambda: None, "meta")


@pytest.mark.parametrize("causal", [False, True])
def test_flops_of_fused_attention_equal_its_products(causal):
    b, h, n, d = 2, 3, 64, 16
    q, k, v = (torch.randn(b, h, n, d, requires_grad=True) for _ in range(3))
    product = 2 * b * h * n * n * d
    assert count_flops(lambda: scaled_dot_product_attention(q, k, v, is_causal=causal)) == 2 * product
    # backward: four products for the gradients, and the logits once more because the forward did not keep them
    both = count_flops(lambda: scaled_dot_product_attention(q, k, v, is_causal=causal).sum().backward())
    assert both == (2 + 5) * product


def test_flops_of_einsum_forward_and_backward():
    x, y = torch.randn(4, 8, 16, requires_grad=True), torch.randn(4, 16, 32, requires_grad=True)
    product = 2 * 4 * 8 * 16 * 32
    assert count_flops(lambda: torch.einsum("bij,bjk->bik", x, y).sum().backward()) == 3 * product


def test_time_ratio_is_the_ratio():
    result = time_ratio(lambda: time.sleep(0.03), lambda: time.sleep(0.01), repeats=5)
    assert 1.5 < result.ratio < 4.5
    assert result.seconds == pytest.approx(result.ratio * result.baseline_seconds)
    assert 0.01 <= median_time(lambda: time.sleep(0.01)) < 0.1
    with pytest.raises(ValueError, match="at least 1"):
        time_ratio(lambda: None, lambda: None, repeats=0)


def tiny_gpt2(attention: str = "sdpa") -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=50, n_positions=256, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return GPT2LMHeadModel._from_config(config, attn_implementation=attention)


def measured(attention: str, length: int = 256):
    model = tiny_gpt2(attention)
    ids = torch.randint(0, 50, (2, length))
    optimizer = torch.optim.AdamW(model.parameters())
    return model, measure_model(model, {"input_ids": ids, "labels": ids}, optimizer=optimizer, repeats=1, decodes=True)


def test_measure_model_adds_up():
    model, cost = measured("sdpa")
    weights = sum(p.numel() for p in model.parameters()) * 4  # the head is tied to the embedding and counts once
    assert (cost.batch_size, cost.length) == (2, 256)
    assert cost.inference.resident_bytes == pytest.approx(weights, rel=0.05)
    assert cost.train_step.resident_bytes == pytest.approx(3 * weights, rel=0.05)  # AdamW keeps two moments
    for step in (cost.train_step, cost.inference):
        assert step.peak_bytes == step.resident_bytes + step.working_bytes
        assert step.tokens_per_second == pytest.approx(2 * 256 / step.seconds)
    assert cost.train_step.flops > 3 * cost.inference.flops  # which leaves out the head, but for one position
    assert cost.train_step.working_bytes > weights  # gradients at least
    assert cost.cache_bytes_per_sequence == 2 * 2 * 256 * 32 * 4  # layers x (keys, values) x tokens x width x float32


def test_modules_stay_in_the_modes_they_are_in():
    model = tiny_gpt2().train()
    model.transformer.drop.eval()
    modes = [module.training for module in model.modules()]
    ids = torch.randint(0, 50, (1, 16))
    measure_model(model, {"input_ids": ids, "labels": ids}, optimizer=torch.optim.SGD(model.parameters()), repeats=1)
    assert [module.training for module in model.modules()] == modes


def test_batches_that_make_up_a_step():
    """As much work as the batch at once, with less of it held, but the gradients meanwhile."""
    model, ids = tiny_gpt2(), torch.randint(0, 50, (4, 256))
    optimizer = torch.optim.AdamW(model.parameters())
    whole, parts = (
        measure_model(
            model, {"input_ids": x, "labels": x}, optimizer=optimizer, accumulation=4 // len(x), repeats=1, decodes=True
        )
        for x in (ids, ids[:1])
    )
    assert (parts.batch_size, parts.length) == (whole.batch_size, whole.length) == (4, 256)
    assert parts.train_step.flops == whole.train_step.flops and parts.inference.flops == whole.inference.flops
    assert parts.train_step.working_bytes < 0.5 * whole.train_step.working_bytes
    assert parts.inference.working_bytes < 0.5 * whole.inference.working_bytes
    assert parts.cache_bytes_per_sequence == whole.cache_bytes_per_sequence


def test_measure_model_sees_the_squares_of_eager_attention():
    fused, eager = (measured(name)[1] for name in ("sdpa", "eager"))
    square = 2 * 2 * 256 * 256 * 4  # rows x heads x queries x keys x float32
    assert eager.train_step.working_bytes > fused.train_step.working_bytes + square
    assert eager.train_step.flops == pytest.approx(fused.train_step.flops, rel=0.15)


def test_resident_bytes_counts_shared_storage_once():
    layer = torch.nn.Linear(10, 10, bias=False)
    twice = torch.nn.Sequential(layer, layer)
    assert resident_bytes(twice) == resident_bytes(layer) == 400


def test_cache_bytes_believes_a_layer_that_knows():
    class Holder:
        def __init__(self, **values):
            vars(self).update(values)

    cache = Holder(layers=[Holder(nbytes=7), Holder(keys=torch.zeros(10), values=torch.zeros(10), note="x")])
    assert cache_bytes(cache) == 7 + 80


def test_state_bytes_are_the_most_while_a_segment_fills():
    """Of a block of 8 and no sinks: seven tokens before the eighth completes it; of a window what it keeps."""
    model = patch_model(
        ZOO["llama"].build(), {"0": {"variant": "block", "block_size": 8, "num_sinks": 0}, "1": "flash"}
    )
    block, flash = (variant for _, _, variant in patched_layers(model))
    token = 2 * block.host.num_kv_heads * block.host.head_dim * 4
    assert [state_bytes(block, n) for n in (8, 16, 12)] == [7 * token, 7 * token, 4 * token]
    assert state_bytes(flash, 16) == 16 * token


def test_the_benchmark_of_decoding(tmp_path):
    file = tmp_path / "d.csv"
    asked = ["--lengths", "40", "80", "--repeats", "1", "--output", str(file)]
    rows = decoding.main(["--variants", "sliding_window", "mixture_of_depths", *asked])
    assert file.read_text().count("\n") == 1 + len(rows) == 9
    assert {row["metric"] for row in rows} == {"token_speedup", "state_ratio"}
    assert all(row["value"] > 0 for row in rows)
    with pytest.raises(SystemExit):
        decoding.main(["--variants", "block", *asked])


def test_flops_of_fused_attention_are_pytorch_s():
    """With fewer key heads as well, which PyTorch's own count refuses in 2.11."""
    query, few = (2, 4, 7, 8), (2, 2, 9, 8)
    many = (2, 4, 9, 8)
    assert measuring._attention_flops(query, many, many) == sdpa_flop_count(query, many, many)
    assert measuring._attention_backward_flops(query, query, many, many) == sdpa_backward_flop_count(
        query, query, many, many
    )
    assert measuring._attention_flops(query, few, few) == measuring._attention_flops(query, many, many)
    assert measuring._attention_backward_flops(query, query, few, few) == 2.5 * measuring._attention_flops(
        query, few, few
    )
