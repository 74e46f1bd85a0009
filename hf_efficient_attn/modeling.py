"""
Which classes a patched model is saved as and loaded by: `EfficientBertConfig` (model_type `efficient_bert`) and
`EfficientBert...` for every `AutoModelFor...` that BERT has, for every architecture of Transformers.

They are made when they are first asked for and registered with the Auto classes. A reader without this library gets
Transformers' own "unrecognized model type" instead of a silently dense model. Classes that are given by name, such as
`BertForMaskedLM.from_pretrained`, stay dense.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
import threading
from collections.abc import Callable, Mapping
from functools import cache, wraps
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .auxiliary import auxiliary_loss
from .caching import AttentionState
from .dispatch import CHILD, NAME, PatchedForward, layer_state
from .hosts import cache_argument, find_hosts, names_in
from .registry import get_info
from .swapping import (
    LOADING,
    as_list,
    dispatch_again,
    exchange_maps,
    is_patched,
    layer_names,
    loading,
    parse_layers,
    plan,
    revert_layers,
    saved_form,
    swap_layers,
)

PREFIX = "efficient_"
FIELD = "efficient_attention"
NAMES = "efficient_attention_layers"


class EfficientConfigMixin:
    """
    A config that carries the variants: `efficient_attention`, a mapping layers -> variant as `patch_model` takes it, and
    `efficient_attention_layers`, what all attention layers are called in the model that was patched.
    """

    dense_class: type[PreTrainedConfig]


class DenseMixin:
    """A model of which the feed-forwards alone are patched may be given another implementation of its dense attention."""

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """As Transformers' own; layers go on telling feed-forwards what is padding."""
        super().set_attn_implementation(attn_implementation, *args, **kwargs)
        if attn_implementation != NAME and is_patched(self) and not is_patched(self, "attention"):
            dispatch_again(self)


class StateMixin:
    """`generate` on a patched model: its layers take their places in the cache before anything is asked of the cache."""

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        cache = cache_argument((), model_kwargs)  # "past_key_values" until Transformers 5.23, "cache" since
        own = getattr(cache, "self_attention_cache", cache)
        fixed = own is not None and own.layer_class_to_replicate is None
        read = _dense_class(self.config.get_text_config(decoder=True))
        for module in self.modules():
            if not isinstance(module, PatchedForward) or not module.efficient_attn.host.causal:
                continue
            if _dense_class(module.config) is not read:  # a further decoder, which has a cache of its own
                continue
            if not fixed or module.layer_idx < len(own.layers):  # a draft by the first layers has no others
                layer_state(module, cache)
        if cache is not None and generation_config.is_assistant:
            cache.activate_past_recording()

    @wraps(GenerationMixin._assisted_decoding)  # of which `generate` asks what it takes
    def _assisted_decoding(self, *args: Any, **kwargs: Any) -> Any:
        """As Transformers' own, which leaves a cache recording: each later call would keep the state before it."""
        try:
            return super()._assisted_decoding(*args, **kwargs)
        finally:
            cache = cache_argument(args, kwargs)
            for layer in getattr(getattr(cache, "self_attention_cache", cache), "layers", ()):
                if isinstance(layer, AttentionState):
                    layer.stop_past_recording()

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Raises ValueError: it would set an attention implementation of its own."""
        raise ValueError(
            f"{self.dense_class.__name__} is patched, and continuous batching (generate_batch) keeps keys in pages that no "
            "variant reads. Call generate(), or unpatch_model(model) first."
        )


def _dense_class(config: PreTrainedConfig) -> type[PreTrainedConfig]:
    return getattr(type(config), "dense_class", type(config))


class TyingMixin:
    """A patched model keeps one parameter where its layers share one, as a language model does with its embeddings."""

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Also what layers share, whatever the config says of embeddings."""
        return super().get_expanded_tied_weights_keys(all_submodels) | tied_names(self)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """What layers share may stand in a `state_dict` once, under its first name, as in saved files."""
        for name, first in declared_ties(self).items():
            if prefix + first in state_dict:
                state_dict.setdefault(prefix + name, state_dict[prefix + first])
        super()._load_from_state_dict(state_dict, prefix, *args)


class EfficientModelMixin(TyingMixin, StateMixin, DenseMixin):
    """A model whose layers are patched as soon as it is built from an `Efficient...Config`."""

    dense_class: type[PreTrainedModel]

    @classmethod
    def is_custom_code(cls) -> bool:
        """Whether Transformers takes the class for a user's own, whose buffers it does not make anew."""
        return cls.dense_class.is_custom_code()

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        choices = getattr(config, FIELD, None)
        if not isinstance(choices, Mapping) or not choices:
            raise ValueError(f"{type(config).__name__}.{FIELD} must map layers to variants, got {choices!r}.")
        if self.dense_class.config_class in config.sub_configs.values():
            raise _other_layers(self, f"it reads a part of {type(config).dense_class.__name__}")
        if config._attn_implementation == NAME:  # the config of a model that is patched already
            config = copy.deepcopy(config)
            config._attn_implementation = None
        super().__init__(config, *args, **kwargs)
        if not is_patched(self):
            self._check_layers(choices, getattr(config, NAMES, None))
            install(self, choices)

    def _check_layers(self, choices: Mapping[Any, Any], names: Mapping[str, str] | None) -> None:
        """Raises ValueError where a number means another layer than in the model that was patched, of those `names`."""
        if names is None:
            return
        known, own = (_numbered(table) for table in (names, layer_names(self)))
        chosen = {number for layers in choices for number in parse_layers(layers, len(known))}
        for layer in sorted(chosen & own.keys()):  # `plan` refuses what is missing
            less, more = sorted((known[layer].split("."), own[layer].split(".")), key=len)
            rest = iter(more)
            if not all(part in rest for part in less):  # in this order, as around a base model stand others
                raise _other_layers(self, f"layer {layer} is {own[layer]}, not {known[layer]}")

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """
        As Transformers' own.

        Raises:
            ValueError: layers were taken out or put in after the patch, so that its mapping names others.
        """
        hosts = find_hosts(self)
        entries = ((layers, c) for layers, value in getattr(self.config, FIELD).items() for c in as_list(value))
        named = [layers for layers, c in entries if get_info(c["variant"]).kind == "attention"]
        patched = {host.shape.layer for host in hosts if isinstance(host.module, PatchedForward)}
        try:
            fits = patched == {number for layers in named for number in parse_layers(layers, len(hosts))}
        except ValueError:  # one that does not exist
            fits = False
        if not fits:
            raise ValueError(
                f"the model has {len(hosts)} layers, of which {sorted(patched)} are patched, but config.{FIELD} names "
                f"{', '.join(map(str, named))}: layers were taken out or put in after the patch. Write into it what the model "
                "has, or change the layers of the model before it is patched."
            )
        setattr(self.config, NAMES, layer_names(self))
        super().save_pretrained(*args, **kwargs)

    @classmethod
    def _from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> Any:
        """As Transformers' own, which writes its keywords into the config: that of a patched model stays as it is."""
        return super()._from_config(copy.deepcopy(config), **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        """
        While a model around this one is loaded or built, Transformers gives first values to what has none, this model last.

        Raises:
            ValueError: a weight of a variant has none: the checkpoint of the whole lacks it.
        """
        super()._init_weights(module)
        built = getattr(self, "_is_hf_initialized", False)  # then somebody begins anew; copied tensors have no mark
        if module is self and not built and not LOADING.get():  # `from_pretrained` checks by itself
            tensors = _variant_tensors(self)
            missing = [name for name, x in tensors if not x.is_meta and not getattr(x, "_is_hf_initialized", False)]
            if missing:
                raise _misfit(type(self).__name__, "missing_keys", missing)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """
        As Transformers' own.

        Raises:
            ValueError: a weight of a variant is missing from the checkpoint or does not fit.
        """
        wanted = kwargs.pop("output_loading_info", False)
        with loading():
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        exchange_maps(model.modules())
        marker = f".{CHILD}."
        faults = {kind: [str(key) for key in info.get(kind) or () if marker in str(key)] for kind in _FAULTS}
        for kind, keys in faults.items():
            if keys:
                raise _misfit(pretrained_model_name_or_path, kind, keys)
        return (model, info) if wanted else model


def _other_layers(model: PreTrainedModel, why: str) -> ValueError:
    return ValueError(
        f"{model.dense_class.__name__} has other attention layers than the model that was patched ({why}), so its variants "
        "cannot be put in place. Load the checkpoint by the Auto class that it was saved by."
    )


def _numbered(names: Mapping[str, str]) -> dict[int, str]:
    return {number: name for layers, name in names.items() for number in parse_layers(layers, sys.maxsize)}


_FAULTS = ("missing_keys", "mismatched_keys", "unexpected_keys")


def _misfit(source: Any, kind: str, keys: list[str]) -> ValueError:
    return ValueError(
        f"{source}: the checkpoint does not fit its variants, {kind.replace('_', ' ')}: "
        f"{', '.join(keys[:5])}{' ...' if len(keys) > 5 else ''}. It is damaged or was changed by hand."
    )


def _variant_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """What the variants of a model save: their parameters, and buffers that are not made anew."""
    saved = model.state_dict().keys()
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return [(name, x) for name, x in tensors if f".{CHILD}." in name and name in saved]


class ForeignModelMixin(TyingMixin, StateMixin, DenseMixin):
    """A patched model of code outside Transformers: it runs and trains, but the Auto classes could not load it."""

    dense_class: type[PreTrainedModel]

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            f"{self.dense_class.__name__} is not a class of Transformers, so its patched form cannot be loaded again. "
            "Save the dense model (unpatch_model) and the state_dict of the patched one."
        )


def install(model: PreTrainedModel, choices: Mapping[Any, Any], outer: nn.Module | None = None) -> dict[str, dict]:
    """
    Patches the layers of a model and leaves its class as it is; returns the mapping in its saved form.

    Raises:
        ValueError: the mapping cannot be served.
    """
    swaps, mapping = plan(model, choices)
    swap_layers(model, swaps, outer)
    attention = is_patched(model, "attention")
    for part in _models(model):  # each may be called by itself
        if attention and refuse_attention_maps not in part._forward_pre_hooks.values():
            part.register_forward_pre_hook(refuse_attention_maps, with_kwargs=True)
        if add_auxiliary_loss not in part._forward_hooks.values():
            part.register_forward_hook(add_auxiliary_loss, with_kwargs=True)
    declare_ties(model)
    for _, tensor in _variant_tensors(model):
        if not tensor.is_meta:  # else it waits for a checkpoint
            tensor._is_hf_initialized = True
    return mapping


def declare_ties(model: PreTrainedModel) -> None:
    """Tells Transformers which parameters variants share: a later one names the first in its module's `_tied_weights_keys`."""
    first: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if f".{CHILD}." in name and first.setdefault(parameter, name) != name:
            owner, _, leaf = name.rpartition(".")
            vars(model.get_submodule(owner)).setdefault("_tied_weights_keys", {})[leaf] = first[parameter]
    if hasattr(model, "all_tied_weights_keys"):  # from post_init, which models of a user's own may not call
        others = {name: key for name, key in model.all_tied_weights_keys.items() if f".{CHILD}." not in name}
        model.all_tied_weights_keys = others | tied_names(model)


def declared_ties(model: nn.Module) -> dict[str, str]:
    """The parameters that variants were given to share, each with the name of the first one."""
    return {
        f"{name}.{leaf}": first
        for name, module in model.named_modules()
        if f".{CHILD}" in name
        for leaf, first in vars(module).get("_tied_weights_keys", {}).items()
    }


def tied_names(model: nn.Module) -> dict[str, str]:
    """As `declared_ties`, without those that are copies by now and learned other values, as PEFT's do."""
    parameters = dict(model.named_parameters(remove_duplicate=False))

    def equal(a: nn.Parameter, b: nn.Parameter) -> bool:
        return a is b or a.is_meta or b.is_meta or torch.equal(a, b)

    return {
        name: first
        for name, first in declared_ties(model).items()
        if {name, first} <= parameters.keys() and equal(parameters[name], parameters[first])
    }


def adopt(model: PreTrainedModel, choices: Mapping[Any, Any], outer: nn.Module | None = None) -> None:
    """
    Patches a model and gives it and its config the classes that save and load it patched; `outer` is a wrapper around it.
    A model that has them, patched with a variant of another kind, adds to what its config says.
    """
    if isinstance(model, (EfficientModelMixin, ForeignModelMixin)):
        mapping = install(model, choices, outer)
        if isinstance(model, EfficientModelMixin):
            earlier = getattr(model.config, FIELD)
            setattr(model.config, FIELD, saved_form([*earlier.items(), *mapping.items()]))
        return
    config_class = type(model.config)
    known = config_class.model_type in CONFIG_MAPPING and CONFIG_MAPPING[config_class.model_type] is config_class
    model_class = getattr(transformers, type(model).__name__, None) is type(model) and known
    patched_class = efficient_model_class(type(model), config_class) if model_class else _foreign_class(type(model))
    mapping = install(model, choices, outer)
    model.__class__ = patched_class
    if model_class:
        model.config.__class__ = patched_class.config_class
        setattr(model.config, FIELD, mapping)
        setattr(model.config, NAMES, layer_names(model))


def release(model: PreTrainedModel, kind: str | None = None) -> None:
    """The inverse of `adopt`; of a `kind`, for the variants of that kind."""
    revert_layers(model, kind)
    declare_ties(model)
    for part in _models(model):
        if not is_patched(model, "attention"):
            for key in [key for key, hook in part._forward_pre_hooks.items() if hook is refuse_attention_maps]:
                del part._forward_pre_hooks[key]
                part._forward_pre_hooks_with_kwargs.pop(key, None)
        if not is_patched(model):
            for key in [key for key, hook in part._forward_hooks.items() if hook is add_auxiliary_loss]:
                del part._forward_hooks[key]
                part._forward_hooks_with_kwargs.pop(key, None)
    if is_patched(model):
        if isinstance(model, EfficientModelMixin):
            entries = ((layers, c) for layers, value in getattr(model.config, FIELD).items() for c in as_list(value))
            left = saved_form((layers, c) for layers, c in entries if get_info(c["variant"]).kind != kind)
            setattr(model.config, FIELD, left)
        return
    for part in _models(model):  # also those that were patched before they became part of the model
        if isinstance(part.config, EfficientConfigMixin):
            for name in (FIELD, NAMES):
                part.config.__dict__.pop(name, None)
            part.config.__class__ = part.config.dense_class
        if isinstance(part, (EfficientModelMixin, ForeignModelMixin)):
            part.__class__ = part.dense_class


def _models(model: PreTrainedModel) -> list[PreTrainedModel]:
    return [part for part in model.modules() if isinstance(part, PreTrainedModel)]


def refuse_attention_maps(model: PreTrainedModel, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook of a patched model: a variant forms no N x N weights to give back."""
    asked = kwargs.get("output_attentions")
    if asked is None:
        asked = getattr(model.config, "output_attentions", False)
    if asked:
        raise ValueError(
            "output_attentions=True: a patched layer forms no attention matrix that could be returned. Call "
            "unpatch_model(model) to look at the dense attention."
        )


def add_auxiliary_loss(model: PreTrainedModel, args: tuple, kwargs: dict, output: Any) -> Any:
    """Forward hook of a patched model: in training its loss includes those of its variants."""
    asked = getattr(output, "loss", None) is not None or (
        isinstance(output, tuple) and kwargs.get("labels") is not None
    )
    if not (model.training and asked):
        return None
    extra = auxiliary_loss(model)
    if extra is None:
        return None
    labels, items = kwargs.get("labels"), kwargs.get("num_items_in_batch")
    shared = "loss_function" in names_in(type(model).forward)  # the model's own loss is divided by `items` then
    if shared and isinstance(labels, Tensor) and items is not None:  # those of batches whose losses a Trainer adds up
        extra = extra * ((labels != -100).sum() / items).to(extra)
    if isinstance(output, tuple):
        return output[0] + extra.to(output[0].device), *output[1:]
    output.loss = output.loss + extra.to(output.loss.device)
    return output


_CONFIG_CLASSES: dict[type[PreTrainedConfig], type[PreTrainedConfig]] = {}
_MAKING = threading.RLock()


def _one_at_a_time(function: Callable) -> Callable:
    """A thread that asks for classes that another one makes waits until all of them are registered."""

    @wraps(function)
    def waiting(*args: Any) -> Any:
        with _MAKING:
            return function(*args)

    return waiting


@_one_at_a_time
def efficient_config_class(dense_class: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """`EfficientBertConfig` of `BertConfig`, registered with `AutoConfig`."""
    if dense_class in _CONFIG_CLASSES:
        return _CONFIG_CLASSES[dense_class]
    name = f"Efficient{dense_class.__name__}"
    cls = type(
        name,
        (EfficientConfigMixin, dense_class),
        {
            "__module__": __name__,
            "__doc__": f"{dense_class.__name__} of a model whose attention is patched; see `{FIELD}`.",
            "__annotations__": {FIELD: dict | None, NAMES: dict | None},
            FIELD: None,
            NAMES: None,
            "model_type": PREFIX + dense_class.model_type,
            "dense_class": dense_class,
        },
    )
    setattr(sys.modules[__name__], name, cls)
    _CONFIG_CLASSES[dense_class] = cls  # before the models, which ask for it
    _register_models(dense_class, cls)
    _share_tables(dense_class.model_type, cls.model_type)
    AutoConfig.register(cls.model_type, cls, exist_ok=True)  # last, as its table is read without waiting
    return cls


_MODEL_CLASSES: dict[tuple[type[PreTrainedModel], type[PreTrainedConfig]], type[PreTrainedModel]] = {}


@_one_at_a_time
def efficient_model_class(
    dense_class: type[PreTrainedModel], dense_config: type[PreTrainedConfig] | None = None
) -> type[PreTrainedModel]:
    """`EfficientBertForMaskedLM` of `BertForMaskedLM`; `dense_config` where one class serves several model types."""
    dense_config = dense_config or dense_class.config_class
    config_class = efficient_config_class(dense_config)  # makes the classes it registers, perhaps this one
    key = (dense_class, dense_config)
    if key not in _MODEL_CLASSES:
        own = dense_config is dense_class.config_class
        name = f"Efficient{'' if own else dense_config.__name__.removesuffix('Config')}{dense_class.__name__}"
        members = {
            "__module__": __name__,
            "__doc__": f"{dense_class.__name__} with patched attention.",
            "dense_class": dense_class,
            "config_class": config_class,
        }
        if not own:
            members["__reduce_ex__"] = _reduce_shared
        cls = type(name, (EfficientModelMixin, dense_class), members)
        setattr(sys.modules[__name__], name, cls)
        cls.config_class = config_class  # Transformers sets it anew for every subclass
        _MODEL_CLASSES[key] = cls
    return _MODEL_CLASSES[key]


def _reduce_shared(self, protocol):
    """Pickled and copied by the two classes that it was made from: the class is no attribute of this module elsewhere."""
    return _remake_shared, (type(self).dense_class, type(self).config_class.dense_class), self.__dict__.copy()


def _remake_shared(dense_class: type[PreTrainedModel], dense_config: type[PreTrainedConfig]) -> PreTrainedModel:
    cls = efficient_model_class(dense_class, dense_config)
    return cls.__new__(cls)


@cache
def _foreign_class(dense_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    members = {"__module__": __name__, "dense_class": dense_class, "__reduce_ex__": _reduce_foreign}
    return type(f"Efficient{dense_class.__name__}", (ForeignModelMixin, dense_class), members)


def _reduce_foreign(self, protocol):
    """Pickled and copied by the class it was made from, which only its own module knows by name."""
    return _remake_foreign, (type(self).dense_class,), self.__dict__.copy()


def _remake_foreign(dense_class: type[PreTrainedModel]) -> PreTrainedModel:
    cls = _foreign_class(dense_class)
    return cls.__new__(cls)


def _auto_classes() -> list[type]:
    return [
        value
        for name, value in vars(modeling_auto).items()
        if name.startswith("AutoModel") and isinstance(value, type) and hasattr(value, "_model_mapping")
    ]


def _register_models(dense_config: type[PreTrainedConfig], config: type[PreTrainedConfig]) -> None:
    for auto in _auto_classes():
        mapping = auto._model_mapping
        if dense_config not in mapping._extra_content and dense_config.model_type not in mapping._model_mapping:
            continue
        found = mapping[dense_config]
        classes = tuple(
            efficient_model_class(dense, dense_config)
            for dense in (found if isinstance(found, tuple) else (found,))
            if isinstance(dense, type) and issubclass(dense, PreTrainedModel)
        )
        if classes:
            auto.register(config, classes[0], exist_ok=True)
        if len(classes) > 1:  # of which a checkpoint names one
            mapping.register(config, classes, exist_ok=True)


def _share_tables(dense_type: str, efficient_type: str) -> None:
    """What Transformers and PEFT look up by model type holds for the patched type as well."""
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )

    conversion = get_checkpoint_conversion_mapping(dense_type)
    if conversion is not None:
        register_checkpoint_conversion_mapping(efficient_type, conversion, overwrite=True)
    if importlib.util.find_spec("peft") is None:
        return
    try:
        from peft.utils import constants
    except Exception:  # not made for this Transformers, as it tells whoever uses it
        return
    for name, table in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict) and dense_type in table:
            table[efficient_type] = table[dense_type]


class _MadeOnDemand(dict):
    """The config classes registered with Transformers from outside; `efficient_<type>` is made when it is looked up."""

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or self._make(key) is not None

    def __getitem__(self, key: str) -> type[PreTrainedConfig]:
        if not super().__contains__(key):
            self._make(key)
        return super().__getitem__(key)

    def _make(self, key: object) -> type[PreTrainedConfig] | None:
        if not isinstance(key, str) or not key.startswith(PREFIX):
            return None
        dense_type = key.removeprefix(PREFIX)
        if dense_type not in CONFIG_MAPPING._mapping:
            return None
        return efficient_config_class(CONFIG_MAPPING[dense_type])


if not isinstance(CONFIG_MAPPING._extra_content, _MadeOnDemand):
    CONFIG_MAPPING._extra_content = _MadeOnDemand(CONFIG_MAPPING._extra_content)


def __getattr__(name: str) -> type:
    """`EfficientBertForMaskedLM` and the like by name, so that they can be imported and pickled."""
    dense = getattr(transformers, name.removeprefix("Efficient"), None) if name.startswith("Efficient") else None
    if isinstance(dense, type) and issubclass(dense, PreTrainedModel):
        return efficient_model_class(dense)
    if isinstance(dense, type) and issubclass(dense, PreTrainedConfig):
        return efficient_config_class(dense)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
