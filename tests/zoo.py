"""
A tiny random model of every architecture the tests run on: built from a config, never downloaded.

A new architecture is one line in `ZOO`. All of them have 4 heads of 8, learned positions up to 512, 100 tokens (1 is
padding, 2 begins, 3 ends a text), no dropout, and weights large enough (standard deviation 0.2) that attention is far
from uniform. Sliding windows that belong to an architecture are 64 tokens: shorter inputs see everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

VOCABULARY, PAD, BEGIN, END = 100, 1, 2, 3
PATCH = 4  # pixels; an image of `length` tokens is one patch high

TASKS = {
    "base": "AutoModel",
    "masked-lm": "AutoModelForMaskedLM",
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "multiple-choice": "AutoModelForMultipleChoice",
    "image-classification": "AutoModelForImageClassification",
}
USUAL_TASK = {
    "encoder": "masked-lm",
    "decoder": "causal-lm",
    "encoder-decoder": "seq2seq-lm",
    "vision": "image-classification",
}


@dataclass(frozen=True)
class Tiny:
    """
    One architecture.

    Attributes:
        name: its key in `ZOO`.
        kind: "encoder", "decoder", "encoder-decoder" or "vision".
        model_type: the name under which Transformers knows the config.
        options: config fields that differ from what all share.
        n_layers: self-attention layers, of encoder and decoder together.
        learned_positions: whether a table of learned positions bounds the length of a text.
        refused: the keyword argument of the attention call for which patching has to raise, or None.
        feed_forward: whether its layers have a feed-forward of linear maps, and not a mixture of experts already.
    """

    name: str
    kind: str
    model_type: str
    options: Mapping[str, Any] = field(default_factory=dict)
    n_layers: int = 2
    learned_positions: bool = False
    refused: str | None = None
    feed_forward: bool = True

    def config(self, **overrides: Any) -> transformers.PreTrainedConfig:
        """The config, every dropout 0; `overrides` win over the options of this architecture."""
        shared = {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "initializer_range": 0.2,
            "pad_token_id": PAD,
            "bos_token_id": BEGIN,
            "eos_token_id": END,
        }
        config = AutoConfig.for_model(self.model_type, **{**shared, **self.options, **overrides})
        for key, value in config.to_dict().items():
            if "drop" in key and isinstance(value, float) and key not in overrides:
                setattr(config, key, 0.0)
        return config

    def build(self, seed: int = 0, **overrides: Any) -> PreTrainedModel:
        """The model with the head usual for its kind, in eval mode; the same seed gives the same weights."""
        return self.build_for(USUAL_TASK[self.kind], seed, **overrides)

    def build_for(self, task: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
        """As `build`, with the head of one of `TASKS`; Transformers raises ValueError where it has no such head."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return getattr(transformers, TASKS[task]).from_config(self.config(**overrides)).eval()

    def inputs(self, batch: int = 2, length: int = 20, pad: str = "none", seed: int = 0) -> dict[str, Any]:
        """
        Random inputs of `length` tokens.

        With `pad` "left" or "right" the first row is full (unless it is the only one) and every other row has between
        half and all but one of its tokens. Texts carry an attention mask in any case, images none: they cannot be
        padded. An image of `length` tokens is a strip of `length - 1` patches beside the class token. An
        encoder-decoder gets a decoder text of the same length, padded alike with lengths of its own.
        """
        if pad not in ("none", "left", "right"):
            raise ValueError(f"pad = {pad!r}: choose 'none', 'left' or 'right'.")
        generator = torch.Generator().manual_seed(seed)
        if self.kind == "vision":
            if pad != "none":
                raise ValueError(f"{self.name} reads images, which have no padding: pad must be 'none', not {pad!r}.")
            pixels = torch.randn(batch, 3, PATCH, PATCH * (length - 1), generator=generator)
            return {"pixel_values": pixels, "interpolate_pos_encoding": True}
        inputs = _text(batch, length, pad, generator)
        if self.kind == "encoder-decoder":
            target = _text(batch, length, pad, generator)
            inputs |= {f"decoder_{name}": value for name, value in target.items()}
        return inputs


def _text(batch: int, length: int, pad: str, generator: torch.Generator) -> dict[str, torch.Tensor]:
    ids = torch.randint(END + 1, VOCABULARY, (batch, length), generator=generator)
    keep = torch.full((batch,), length)
    if pad != "none" and length > 1:
        first = 0 if batch == 1 else 1
        keep[first:] = torch.randint((length + 1) // 2, length, (batch - first,), generator=generator)
    column = torch.arange(length)
    mask = column < keep[:, None] if pad != "left" else column >= length - keep[:, None]
    return {"input_ids": ids.where(mask, PAD), "attention_mask": mask.long()}


_WINDOW = {"sliding_window": 64}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
_BART = {
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "init_std": 0.2,
}
_BART |= {"decoder_start_token_id": BEGIN, "forced_eos_token_id": None}
_T5 = {"d_kv": 8, "d_ff": 64, "num_decoder_layers": 2, "decoder_start_token_id": PAD}
_GPT_OSS = {
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
_GEMMA2 = _GROUPED | _WINDOW | {"query_pre_attn_scalar": 8}

ZOO: dict[str, Tiny] = {
    tiny.name: tiny
    for tiny in (
        Tiny("bert", "encoder", "bert", learned_positions=True),
        Tiny("roberta", "encoder", "roberta", {"max_position_embeddings": 514}, learned_positions=True),
        Tiny("distilbert", "encoder", "distilbert", {"hidden_dim": 64}, learned_positions=True),
        Tiny("electra", "encoder", "electra", {"embedding_size": 32}, learned_positions=True),
        Tiny("modernbert", "encoder", "modernbert", {"num_hidden_layers": 4, "local_attention": 128}, n_layers=4),
        Tiny("gpt2", "decoder", "gpt2", {"n_inner": 64}, learned_positions=True),
        Tiny(
            "opt", "decoder", "opt", {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.2}, learned_positions=True
        ),
        Tiny("gpt_neox", "decoder", "gpt_neox"),
        Tiny("llama", "decoder", "llama", _GROUPED),
        Tiny("mistral", "decoder", "mistral", _GROUPED | _WINDOW),
        Tiny("qwen3", "decoder", "qwen3", _GROUPED),
        Tiny("gemma2", "decoder", "gemma2", _GEMMA2, refused="softcap"),
        Tiny("gemma2_nocap", "decoder", "gemma2", _GEMMA2 | {"attn_logit_softcapping": None}),
        Tiny("phi3", "decoder", "phi3", {"num_key_value_heads": 2}),
        Tiny("gpt_oss", "decoder", "gpt_oss", _GROUPED | _WINDOW | _GPT_OSS, refused="s_aux", feed_forward=False),
        Tiny("vit", "vision", "vit", {"image_size": 4 * PATCH, "patch_size": PATCH}),
        Tiny("bart", "encoder-decoder", "bart", _BART, n_layers=4, learned_positions=True),
        Tiny("t5", "encoder-decoder", "t5", _T5, n_layers=4, refused="position_bias"),
    )
}
