"""
Which model does a run train? The same base for all runs, with the run's variant or control put in.

The base (pretrained weights, a new head, positions extended if asked) is made once and saved; every run and every
measuring process loads those bytes, so that runs differ in nothing but their attention.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from examples import embedded
from examples.controls import remove_attention
from examples.options import ALL_LINEAR
from hf_efficient_attn import describe, extend_positions, patch_model
from hf_efficient_attn.dispatch import CHILD, PatchedLinear
from hf_efficient_attn.hosts import base_model, find_hosts, learned_positions
from hf_efficient_attn.registry import config_from_dict

AUTO_CLASSES = {
    "classification": AutoModelForSequenceClassification,
    "masked-lm": AutoModelForMaskedLM,
    "causal-lm": AutoModelForCausalLM,
}


def source(name: str) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` takes for an embedded name, a local path or a Hub id: the place, and keywords."""
    if name not in embedded.MODELS or Path(name).exists():
        return name, {}
    keywords = embedded.model_source(name)
    return keywords.pop("path"), keywords


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; one without a padding token pads with its end-of-text token."""
    place, keywords = source(name)
    tokenizer = AutoTokenizer.from_pretrained(place, **keywords)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_max_length = 10**9  # lengths are cut by --max-length, not by a warning
    return tokenizer


def make_base(
    name: str,
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    labels: list[str] | None,
    max_length: int,
    extend: bool,
    seed: int,
    dropout: float | None = None,
) -> PreTrainedModel:
    """
    The pretrained model with the head of the task, in float32, able to read `max_length` tokens, with `dropout` in place
    of its own probabilities where one is given.

    Raises:
        ValueError: `max_length` is beyond the model's positions and `extend` is off; the checkpoint is patched already.
    """
    place, keywords = source(name)
    if task == "classification" and labels is not None:
        keywords |= {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: index for index, label in enumerate(labels)},
        }
    if dropout is not None:
        config = AutoConfig.from_pretrained(place, **{k: v for k, v in keywords.items() if k == "gguf_file"}).to_dict()
        given = {
            name for name, value in config.items() if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        keywords |= {
            name: dropout for name in given if "drop" in name and "layerdrop" not in name
        }  # not of whole layers
    set_seed(seed)  # the new head's weights
    model = AUTO_CLASSES[task].from_pretrained(place, dtype=torch.float32, attn_implementation="sdpa", **keywords)
    if "gguf_file" in keywords and getattr(model, "hf_quantizer", None) is not None:
        # Its weights are float32 now, but Transformers refuses to save what was once quantised.
        model.hf_quantizer.remove_quantization_config(model)
    if getattr(model.config, "efficient_attention", None):
        raise ValueError(f"{name} is patched already; fine-tune from the dense checkpoint it was made of.")
    if task == "classification":
        model.config.problem_type = "single_label_classification"
        model.config.pad_token_id = tokenizer.pad_token_id  # a decoder's head reads the last token before the padding
    fit_positions(model, max_length, extend, tokenizer)
    return model


def position_limit(model: PreTrainedModel) -> int | None:
    """The longest text the model's positions reach, or None where the config names no limit."""
    learned = learned_positions(base_model(model))
    return getattr(model.config, "max_position_embeddings", None) if learned is None else learned


def fit_positions(
    model: PreTrainedModel, max_length: int, extend: bool, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Extends the model's positions to `max_length` where they are too few and `extend` is on; ValueError where it is off."""
    limit = position_limit(model)
    if limit is None or max_length <= limit:
        return
    if not extend:
        raise ValueError(
            f"max_length = {max_length} is beyond the {limit} positions of this {model.config.model_type} model: "
            "choose a smaller --max-length, or add --extend-positions (hf_efficient_attn.extend_positions repeats the "
            "learned positions)."
        )
    extend_positions(model, max_length, tokenizer)


def open_base(
    folder: Path | str,
    task: str,
    attention: str = "sdpa",
    *,
    bits: int | None = None,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """The saved base, dense; with `bits` its weights are quantised, on the device."""
    keywords = {}
    if bits:
        quantiser = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
        keywords = {"quantization_config": quantiser, "device_map": {"": device}}
    model = AUTO_CLASSES[task].from_pretrained(folder, dtype=torch.float32, attn_implementation=attention, **keywords)
    model.config.use_cache = False
    return model


def install(model: PreTrainedModel, patch: dict[str, Any] | None, seed: int) -> list[str]:
    """
    Puts a run's attention into a dense model, in place.

    Args:
        patch: None (dense); {"zero_attention": true}; {"config": {...}, "layers": ...}; or {"mapping": {layers:
            {...}}}, as `examples.variants` makes them.
        seed: for the variant's new parameters.

    Returns:
        The names of the parameters that the variant added.
    """
    before = {name for name, _ in model.named_parameters()}
    if patch is None:
        return []
    if patch.get("zero_attention"):
        remove_attention(model)
        return []
    set_seed(seed)
    if "mapping" in patch:
        patch_model(model, {layers: config_from_dict(config) for layers, config in patch["mapping"].items()})
    else:
        patch_model(model, config_from_dict(patch["config"]), layers=patch["layers"])
    return [name for name, _ in model.named_parameters() if name not in before]


def add_lora(
    model: PreTrainedModel, task: str, rank: int, targets: list[str] | None, added: list[str]
) -> torch.nn.Module:
    """
    LoRA by peft on a (patched) model: adapters, the new head and the variant's own parameters train, the rest is
    frozen. Of "all-linear" the maps of variants, which train themselves, and those that experts stand beside are left out.

    Raises:
        ValueError: peft found none of the targets.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    kinds = {"classification": TaskType.SEQ_CLS, "causal-lm": TaskType.CAUSAL_LM, "masked-lm": None}
    everywhere = targets == [ALL_LINEAR]
    served = [name for name, part in model.named_modules() if f".{CHILD}." in name or isinstance(part, PatchedLinear)]
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=ALL_LINEAR if everywhere else targets,
        exclude_modules=served if everywhere else None,
        task_type=kinds[task],
    )
    tuned = get_peft_model(model, config)
    own = {f"base_model.model.{name}" for name in added}
    for name, parameter in tuned.named_parameters():
        if name in own:
            parameter.requires_grad_(True)
    return tuned


def merged(model: torch.nn.Module) -> PreTrainedModel:
    """The model to save: adapters merged into the weights, where there are any."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def describe_model(name: str, model: PreTrainedModel) -> dict[str, Any]:
    """The report's words on the base model."""
    return {
        "name": name,
        "base_model": embedded.HUB_NAMES.get(name) if name in embedded.MODELS or Path(name).exists() else name,
        "type": model.config.model_type,
        "class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "positions": position_limit(model),
    }


def is_causal(model: PreTrainedModel) -> bool:
    """Whether the model's self-attention looks back only."""
    return all(host.shape.causal for host in find_hosts(base_model(model)))


def patched_layers(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Each patched layer with its variant and hyper-parameters, as results.json has them."""
    return [
        {
            "layer": layer.layer,
            "variant": layer.variant,
            "config": layer.hyper_parameters,
            "added_parameters": layer.added_parameters,
        }
        for layer in describe(model)
        if layer.variant is not None
    ]
