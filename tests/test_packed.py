"""Packed sequences: several texts in a row, told apart by positions that start again or by `cu_seq_lens`."""

from __future__ import annotations

import pytest
import torch
from test_auxiliary import counting  # noqa: F401
from torch import Tensor
from transformers import DataCollatorWithFlattening, DynamicCache, Trainer, TrainingArguments
from zoo import ZOO

from hf_efficient_attn import patch_model
from hf_efficient_attn.auxiliary import AuxiliaryLearner, auxiliary_loss
from hf_efficient_attn.ops.rows import Texts
from hf_efficient_attn.recovery import attention_errors, attention_transfer

LENGTHS = [7, 1, 13, 3, 2, 24]
WINDOW = {"window": 4, "num_sinks": 2}
DECODERS = ("gpt2", "gpt_neox", "llama", "mistral", "qwen3", "gemma2_nocap", "phi3")


def packed(lengths: list[int] = LENGTHS, batch: int = 1) -> dict[str, Tensor]:
    tokens = torch.randint(5, 90, (batch, sum(lengths)), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens, "position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}


def ends(lengths: list[int] = LENGTHS) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


@torch.no_grad()
def alone(model, tokens: Tensor, lengths: list[int] = LENGTHS, **options) -> Tensor:
    return torch.cat([model(input_ids=text, **options)[0] for text in tokens.split(lengths, 1)], 1)


def apart(x: Tensor, y: Tensor) -> float:
    return (x - y).abs().max().item()


@torch.no_grad()
@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("sliding_window", WINDOW),
        ("hedgehog", {"window": 4}),
        ("topk_blocks", {"block_size": 2, "top_k": 2}),
        ("infini", {}),
    ],
)
@pytest.mark.parametrize("name", DECODERS)
def test_texts_are_what_they_are_alone(name: str, variant: str, options: dict):
    model = patch_model(ZOO[name].build(), variant, **options)
    inputs = packed(batch=2)
    output = model(**inputs, use_cache=False).logits
    assert apart(output, alone(model, inputs["input_ids"], use_cache=False)) < 1e-4
    assert apart(output, model(inputs["input_ids"], use_cache=False).logits) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("variant", ["block", "linformer", "routing", "clustered"])
def test_cumulative_lengths_tell_an_encoder_s_texts_apart(variant: str):
    model, inputs = patch_model(ZOO["bert"].build_for("base"), variant), packed()
    output = model(**inputs, cu_seq_lens_q=ends())[0]
    assert apart(output, alone(model, inputs["input_ids"])) < 1e-4
    assert apart(output, model(**inputs)[0]) > 1e-2


@torch.no_grad()
def test_both_ways_agree():
    model, inputs = patch_model(ZOO["llama"].build(), "sliding_window", **WINDOW), packed()
    texts = [{"input_ids": text.tolist()} for text in inputs["input_ids"][0].split(LENGTHS)]
    flat = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(texts)
    output = model(**inputs, use_cache=False).logits
    assert apart(model(**flat, use_cache=False).logits, output) == 0
    del flat["position_ids"]
    assert apart(model(**flat, use_cache=False).logits, output) < 1e-4  # rotary attention sees distances only


@torch.no_grad()
def test_lengths_of_several_rows():
    model, inputs = patch_model(ZOO["llama"].build(), "sliding_window", **WINDOW), packed(batch=2)
    both = torch.cat([ends(), ends()[1:] + sum(LENGTHS)])
    output = model(**inputs, use_cache=False).logits
    assert apart(model(**inputs, use_cache=False, cu_seq_lens_q=both).logits, output) == 0
    with pytest.raises(ValueError, match="the end of each row"):
        model(inputs["input_ids"], use_cache=False, cu_seq_lens_q=torch.tensor([0, 40, 60, 100]))


@torch.no_grad()
def test_layers_that_stay_dense_keep_texts_apart_too():
    model, inputs = patch_model(ZOO["llama"].build(), "sliding_window", **WINDOW, layers="0"), packed()
    output = model(**inputs, use_cache=False).logits
    assert apart(output, alone(model, inputs["input_ids"], use_cache=False)) < 1e-4
    bert = patch_model(ZOO["bert"].build(), "block", layers="0")
    with pytest.raises(ValueError, match="layers that stay dense cannot honour"):
        bert(packed()["input_ids"], cu_seq_lens_q=ends())


@torch.no_grad()
def test_a_text_for_each_row_needs_no_telling_apart():
    model, inputs = patch_model(ZOO["llama"].build(), "sliding_window", **WINDOW, layers="0"), packed([9], 2)
    output = model(inputs["input_ids"], use_cache=False).logits
    assert apart(model(**inputs, use_cache=False, cu_seq_lens_q=torch.tensor([0, 9, 18])).logits, output) == 0


@torch.no_grad()
@pytest.mark.parametrize("told", ["position_ids", "cu_seq_lens_q"])
def test_experts_have_room_for_each_text_by_itself(told: str):
    model = patch_model(ZOO["llama"].build(), {None: ["flash", {"variant": "moe", "capacity_factor": 0.5}]}).train()
    for name, parameter in model.named_parameters():
        if "router" in name:
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    inputs = packed(batch=2)
    tokens, inputs["cu_seq_lens_q"] = inputs["input_ids"], torch.cat([ends(), ends()[1:] + sum(LENGTHS)])
    output = model(input_ids=tokens, use_cache=False, **{told: inputs[told]}).logits
    assert apart(output, alone(model, tokens, use_cache=False)) < 1e-4
    assert apart(output, model(input_ids=tokens, use_cache=False).logits) > 1e-2


@torch.no_grad()
def test_an_architecture_s_own_window_is_compared_with_the_longest_text():
    model = patch_model(ZOO["mistral"].build(sliding_window=24), "sliding_window", **WINDOW)
    inputs = packed()
    assert apart(model(**inputs, use_cache=False).logits, alone(model, inputs["input_ids"], use_cache=False)) < 1e-4
    with pytest.raises(ValueError, match="would hide some"):
        model(**packed([25, 3]), use_cache=False)


@pytest.mark.parametrize("given", [[0, 10], [0, 60], [1, 50], [0, 30, 20, 50], []])
def test_lengths_that_do_not_fit_raise(given: list[int]):
    model = patch_model(ZOO["llama"].build(), "block")
    with pytest.raises(ValueError, match="do not cut 1 x 50 tokens into texts"):
        model(packed()["input_ids"], cu_seq_lens_q=torch.tensor(given), use_cache=False)


def test_lengths_that_contradict_the_positions_raise():
    model = patch_model(ZOO["llama"].build(), "block")
    with pytest.raises(ValueError, match="tell different texts apart"):
        model(**packed(), cu_seq_lens_q=torch.tensor([0, 7, 50]), use_cache=False)
    with pytest.raises(ValueError, match="tell different texts apart"):
        model(**packed(), cu_seq_lens_q=ends([8, 1, 12, 3, 2, 24]), use_cache=False)


def test_a_cache_or_padding_beside_raises():
    model, inputs = patch_model(ZOO["llama"].build(), "block"), packed()
    with pytest.raises(ValueError, match="without a cache"):
        model(**inputs, cu_seq_lens_q=ends(), past_key_values=DynamicCache())
    mask = torch.ones_like(inputs["input_ids"])
    mask[:, -1] = 0
    with pytest.raises(ValueError, match="a mask that hides tokens"):
        model(**inputs, cu_seq_lens_q=ends(), attention_mask=mask, use_cache=False)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_on_flattened_batches_is_training_on_padded_ones(checkpointing: bool):
    texts = [{"input_ids": text.tolist()} for text in packed()["input_ids"][0].split([5, 21, 24])]
    flat = DataCollatorWithFlattening()(texts)
    length = max(len(text["input_ids"]) for text in texts)
    rows = [text["input_ids"] + [0] * (length - len(text["input_ids"])) for text in texts]
    real = torch.tensor([[i < len(text["input_ids"]) for i in range(length)] for text in texts])
    padded = {"input_ids": torch.tensor(rows), "attention_mask": real.long()}
    padded["labels"] = padded["input_ids"].masked_fill(~real, -100)
    gradients = []
    for batch in (flat, padded):
        model = patch_model(ZOO["llama"].build(), "hedgehog", window=8).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**batch, use_cache=False).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert gradients[0].abs().max() > 1e-2
    assert apart(*gradients) < 1e-5


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("variant", ["counting", "combined"])
def test_what_is_learned_beside_counts_each_token_once(counting, variant: str, reentrant):  # noqa: F811
    options = {"parts": ["counting", "block"]} if variant == "combined" else {}
    model = patch_model(ZOO["llama"].build(), variant, **options).train()
    learners = [
        module for module in model.modules() if isinstance(module, AuxiliaryLearner) and hasattr(module, "seen")
    ]
    assert len(learners) == 2
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    inputs = packed()
    for step in (1, 2):
        output = model(**inputs, use_cache=False).logits
        if not reentrant:
            assert float(auxiliary_loss(model)) == pytest.approx(6)
        output.square().mean().backward()
        assert [float(learner.seen) for learner in learners] == [sum(LENGTHS) * step] * 2


def test_attention_transfer_sees_each_text_by_itself():
    model, inputs = patch_model(ZOO["llama"].build(), "hedgehog", window=4), packed([24, 24])
    rows = {"input_ids": inputs["input_ids"].view(2, 24)}
    for one, two in zip(attention_errors(model, [inputs]), attention_errors(model, [rows]), strict=True):
        assert one.error == pytest.approx(two.error, rel=1e-4)
    joined = attention_errors(model, [{"input_ids": inputs["input_ids"]}])
    assert abs(joined[1].error - one.error) > 1e-3
    with attention_transfer(model) as transfer:
        model(**inputs)
        transfer.loss().backward()
    assert all(p.grad is not None for p in transfer.parameters)


def test_a_long_text_among_short_ones_does_not_pad_them():
    index = torch.cat([torch.zeros(1000), torch.arange(1, 501).repeat_interleave(6)]).long()[None]
    texts = Texts.of(index)
    assert sum(places.numel() for places, *_ in texts.groups) == 4000
    lengths = torch.randint(1, 300, (200,), generator=torch.Generator().manual_seed(0))
    texts = Texts.of(torch.arange(200).repeat_interleave(lengths)[None])
    assert sum(places.numel() for places, *_ in texts.groups) < 2 * lengths.sum()
    assert texts.longest == lengths.max()


@pytest.mark.parametrize("lengths", [False, True], ids=["positions", "positions and lengths"])
def test_a_trainer_reads_flattened_batches_as_padded_ones(lengths: bool, tmp_path):
    texts = [{"input_ids": text.tolist()} for text in packed()["input_ids"][0].split([5, 21, 24])]

    def padded(rows):
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True)
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids.masked_fill(ids == 0, -100)}

    losses = []
    for collator in (DataCollatorWithFlattening(return_flash_attn_kwargs=lengths), padded):
        model = patch_model(ZOO["llama"].build(), "sliding_window", **WINDOW)
        settings = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=3,
            max_steps=3,
            learning_rate=0.1,
            report_to=[],
            use_cpu=True,
        )
        losses.append(Trainer(model, settings, train_dataset=texts, data_collator=collator).train().training_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
