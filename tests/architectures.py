"""
What patching does to every architecture that Transformers has: a tiny random model from a shrunken config, dense against
patched.

Nothing here knows an architecture: sizes are cut down by the names of config fields, inputs are made from the names of
forward's parameters. What cannot be built or run that way is counted and named, not hidden.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

import hf_efficient_attn
from hf_efficient_attn import patch_model, unpatch_model
from hf_efficient_attn.dispatch import CHILD, PatchedForward

LENGTH, WIDTH, HEADS, HEAD_DIM, LAYERS, VOCABULARY = 12, 64, 4, 16, 2, 100
LARGEST = 30_000_000  # parameters; what stays larger after shrinking is not built
TOLERANCE = 1e-4

SIZES: dict[str, int] = {  # the first pattern that matches a whole field name decides
    r"vocab_size(_.*)?|.*_vocab_size|num_embeddings": VOCABULARY,
    r"codebook_size": 128,
    r"(num_|n_)?(\w+_)?(layers?|blocks|depth)|.*_num_layers": LAYERS,
    r"num_key_value_heads|.*num_kv_heads|n_kv_heads?|.*_key_value_heads|multi_query_group_num": 2,
    r".*n_heads?|.*num_heads|.*attention_heads|num_.*_heads": HEADS,
    r"qk_nope_head_dim|qk_rope_head_dim|v_head_dim": 8,
    r".*head_dim|d_kv|.*head_size|key_value_proj_dim|.*_rank": HEAD_DIM,
    r".*intermediate_size.*|.*ffn_dim|d_ff|n_inner|.*mlp_dim|ffn_hidden_size|.*feed_?forward.*dim": WIDTH,
    r".*hidden_size|d_model|n_embd|dim|.*hidden_dim|.*embedding_size|.*embed_dim|projection_dim|proj_dim": WIDTH,
    r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts": 4,
    r"num_experts_per_tok(en)?|moe_topk|top_k|moe_k": 2,
    r"n_group|topk_group|n_shared_experts|num_shared_experts": 1,
    r"image_size|img_size": 16,
    r"patch_size": 4,
}
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


@dataclass(frozen=True)
class Outcome:
    """
    kind: "unbuilt" or "unrun" (no generic config or input fits), "refused" (patch_model raised), "raised" (the patched
    forward raised one of our errors), "equal" (patched and exact) or "wrong". note: why, in a line.
    """

    name: str
    kind: str
    note: str = ""


def shrunken(given: PreTrainedConfig) -> dict[str, Any]:
    """Keyword arguments that make a tiny config of the same class."""
    values, tiny = given.to_dict(), {}
    for name, value in values.items():
        part = getattr(given, name, None)
        if isinstance(part, PreTrainedConfig):
            tiny[name] = {**shrunken(part), "model_type": part.model_type}
        elif isinstance(value, bool) or not value:
            continue
        elif isinstance(value, int) and name.endswith(("_id", "_index")):
            tiny[name] = value if value < 90 else 70 + len(name) % 20
        elif isinstance(value, int):
            size = next((size for pattern, size in SIZES.items() if re.fullmatch(pattern, name)), None)
            if size is not None:
                tiny[name] = size if "heads" not in name else min(size, value)
            elif "position" in name:
                tiny[name] = min(value, 512)
        elif isinstance(value, float) and "drop" in name:
            tiny[name] = 0.0
        elif name.endswith("token_id") and isinstance(value, list):
            tiny[name] = [80 + i for i in range(len(value))]
    if "kv_lora_rank" in values:
        tiny["num_key_value_heads"] = HEADS
    count = next((values[name] for name in LAYER_COUNTS if isinstance(values.get(name), int)), None)
    for name, value in values.items():  # per-layer lists keep one layer of each kind, two at least
        if isinstance(value, list) and count is not None and count == len(value) > LAYERS:
            kinds = list(dict.fromkeys(value)) if isinstance(value[0], str) else value[:LAYERS]
            kinds = kinds if len(kinds) >= LAYERS else kinds * LAYERS
            tiny[name] = kinds
            tiny.update({field: len(kinds) for field in LAYER_COUNTS if field in values})
    rope = values.get("rope_parameters")
    if isinstance(rope, dict) and "mrope_section" in rope:
        half = int(HEAD_DIM // 2 * (rope.get("partial_rotary_factor") or 1))
        tiny["rope_parameters"] = {**rope, "mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}
    return tiny


def model_class(config: type[PreTrainedConfig]) -> type[PreTrainedModel] | None:
    """The base model of a config class, from the Auto classes or from the file beside the config's."""
    for mapping in (MODEL_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
        found = mapping.get(config, None)
        if found is not None:
            return found[0] if isinstance(found, tuple) else found
    module = importlib.import_module(config.__module__.replace(".configuration_", ".modeling_"))
    classes = [
        cls
        for cls in vars(module).values()
        if isinstance(cls, type) and issubclass(cls, PreTrainedModel) and cls.config_class is config
        and cls.__module__ == module.__name__ and "forward" in vars(cls)
    ]  # fmt: skip
    return min(classes, key=lambda cls: ("For" in cls.__name__, len(cls.__name__)), default=None)


def build(name: str) -> PreTrainedModel:
    """
    The tiny model, its weights random and large enough that attention matters.

    Raises:
        Exception: of any kind, where the shrunken config does not fit the architecture.
    """
    config = CONFIG_MAPPING[name](**shrunken(CONFIG_MAPPING[name]()))
    cls = model_class(type(config))
    if cls is None:
        raise LookupError("no model class")
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise MemoryError(f"{size / 1e6:.0f} million parameters")
    model = cls._from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise * 1.2 / p[0].numel() ** 0.5) if p.ndim > 1 else p.add_(noise * 0.1)
    return model


def make_inputs(model: PreTrainedModel, pad: str, more: bool = False) -> dict[str, Any]:
    """Inputs by the names of forward's parameters; `pad` is "none", "left" or "right", `more` adds an image to a text."""
    parameters = inspect.signature(model.forward).parameters
    required = {n for n, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 70, (2, LENGTH), generator=generator)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    if pad != "none":
        mask[1, slice(4) if pad == "left" else slice(-4, None)] = 0
    known: dict[str, Any] = {"use_cache": False}
    known |= {"decoder_input_ids": ids.flip(1), "decoder_attention_mask": mask if pad == "left" else mask * 0 + 1}
    if "input_ids" in parameters:
        known |= {"input_ids": ids, "attention_mask": mask}
    if more or "input_ids" not in parameters:
        vision = getattr(model.config, "vision_config", model.config)
        side = getattr(vision, "image_size", 16)
        side = side if isinstance(side, int) and side < 300 else 16
        known["pixel_values"] = torch.randn(2, 3, side, side, generator=generator)
        known["input_values"] = torch.randn(2, 8000, generator=generator)
        bands = next(
            (getattr(model.config, n) for n in ("num_mel_bins", "feature_size") if hasattr(model.config, n)), 80
        )
        frames = 2 * getattr(model.config, "max_source_positions", 50)
        known["input_features"] = torch.randn(2, bands, frames, generator=generator)
    for name in required & {"hidden_states", "inputs_embeds", "query_embeds"}:
        known |= {name: torch.randn(2, LENGTH, WIDTH, generator=generator), "attention_mask": mask}
    return {name: value for name, value in known.items() if name in parameters}


@torch.no_grad()
def outputs(model: PreTrainedModel, inputs: dict[str, Any]) -> list[Tensor]:
    """Every floating tensor that the model returns, at real tokens; pooled ones only where no token is padded."""
    torch.manual_seed(0)
    masks = [inputs[name].bool() for name in ("attention_mask", "decoder_attention_mask") if name in inputs]
    real = torch.stack(masks).all(0) if masks else None
    found: list[Tensor] = []

    def collect(value: Any) -> None:
        if isinstance(value, Tensor) and value.is_floating_point():
            if real is None or real.all():
                found.append(value)
            elif value.shape[:2] == real.shape:
                found.append(value[real])
        elif isinstance(value, (dict, tuple, list)):
            for part in value.values() if isinstance(value, dict) else value:
                collect(part)

    collect(model(**inputs))
    return found


def gap(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest difference, relative to the larger of the largest output and 1."""
    worst = 0.0
    for x, y in zip(one, other, strict=True):
        finite = torch.isfinite(x)
        if not torch.equal(finite, torch.isfinite(y)):
            return float("inf")
        if finite.any():
            worst = max(worst, ((x - y)[finite].abs().max() / x[finite].abs().max().clamp_min(1)).item())
    return worst


def is_ours(error: Exception) -> bool:
    """Whether an error was raised by this package, on purpose."""
    trace = error.__traceback__
    while trace.tb_next:
        trace = trace.tb_next
    inside = trace.tb_frame.f_code.co_filename.startswith(hf_efficient_attn.__path__[0])
    return inside and isinstance(error, (ValueError, RuntimeError, AttributeError))


def layers_reached(model: PreTrainedModel, run: Callable[[], Any]) -> dict[str, bool]:
    """The patched layers that `run` calls: whether their variants were called, too."""
    called: dict[str, bool] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, PatchedForward):
            enter = module.register_forward_pre_hook(lambda *_, name=name: called.update({name: False}))
            reach = getattr(module, CHILD).register_forward_pre_hook(lambda *_, name=name: called.update({name: True}))
            handles += [enter, reach]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return called


def stayed_dense(model: PreTrainedModel, run: Callable[[], Any]) -> list[str]:
    """The patched layers that `run` calls without reaching their variants."""
    return [name for name, reached in layers_reached(model, run).items() if not reached]


def classify(name: str) -> Outcome:
    """What becomes of one architecture: `flash` must leave every output as it was, on padded rows, too, or raise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = build(name)
        except Exception as error:
            return Outcome(name, "unbuilt", f"{type(error).__name__}: {error}"[:200])
        dense, note = _dense_runs(model)
        try:
            patch_model(model, "flash")
        except Exception as error:
            return Outcome(name, "refused" if is_ours(error) and isinstance(error, ValueError) else "wrong", str(error))
        if not dense:
            return Outcome(name, "unrun", note)
        return _compare(name, model, dense)


def _dense_runs(model: PreTrainedModel) -> tuple[dict[str, tuple[dict, list[Tensor]]], str]:
    runs, note = {}, ""
    for pad in ("none", "left", "right"):
        for more in (False, True):
            inputs = make_inputs(model, pad, more)
            try:
                runs[pad] = inputs, outputs(model, inputs)
                break
            except Exception as error:
                note = f"{type(error).__name__}: {error}"[:200]
    return runs, note


def _compare(name: str, model: PreTrainedModel, dense: dict) -> Outcome:
    for pad, (inputs, expected) in dense.items():
        got: list[Tensor] = []
        try:
            reached = layers_reached(model, lambda inputs=inputs, got=got: got.extend(outputs(model, inputs)))
        except Exception as error:
            return Outcome(name, "raised" if is_ours(error) else "wrong", f"{pad}: {type(error).__name__}: {error}")
        if not reached:
            return Outcome(name, "unrun", "these inputs reach no patched layer")
        if not all(reached.values()):
            return Outcome(name, "wrong", f"stays dense: {next(n for n, was in reached.items() if not was)}")
        if gap(expected, got) > TOLERANCE and gap(_eager(model, inputs), got) > TOLERANCE:
            return Outcome(name, "wrong", f"{pad}: differs by {gap(expected, got):.2g}")
    return Outcome(name, "equal")


def _eager(model: PreTrainedModel, inputs: dict[str, Any]) -> list[Tensor]:
    """What eager attention says where SDPA is given no mask and reads in another direction than the model means."""
    unpatch_model(model)
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    expected = outputs(model, inputs)
    model.set_attn_implementation(before)
    patch_model(model, "flash")
    return expected


def dispatching() -> list[str]:
    """The model types whose modeling file hands its heads to Transformers' table of attention functions."""
    names = []
    for name in CONFIG_MAPPING_NAMES:
        try:
            config = CONFIG_MAPPING[name]
            module = importlib.import_module(config.__module__.replace(".configuration_", ".modeling_"))
        except (ImportError, AttributeError, KeyError):
            continue
        if "ALL_ATTENTION_FUNCTIONS.get_interface" in inspect.getsource(module):
            names.append(name)
    return names
