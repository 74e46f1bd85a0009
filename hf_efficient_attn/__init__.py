"""
Efficient attention for pretrained Transformers: `patch_model(model, "linformer")`.

Importing registers the variants and the classes that load patched checkpoints; a model that is not patched is not changed.
"""

from . import variants as _variants  # noqa: F401  (registers every variant)
from .config import EfficientAttentionConfig, VariantConfig, option
from .patching import describe, patch_model, patched, unpatch_model
from .positions import extend_positions
from .registry import VariantInfo, available_variants, get_config_class, register_variant, unregister_variant
from .selection import Budget, Selection, select_variants
from .variant import EfficientAttention, EfficientFeedForward, FeedForwardShape, HostShape
from .variants.adaptive import harden
from .version import __version__

_CONFIGS = {info.config_class.__name__: info.config_class for info in available_variants().values()}
globals().update(_CONFIGS)

__all__ = [
    "__version__",
    "Budget",
    "EfficientAttention",
    "EfficientAttentionConfig",
    "EfficientFeedForward",
    "FeedForwardShape",
    "HostShape",
    "Selection",
    "VariantConfig",
    "VariantInfo",
    "available_variants",
    "describe",
    "extend_positions",
    "get_config_class",
    "harden",
    "option",
    "patch_model",
    "patched",
    "register_variant",
    "select_variants",
    "unpatch_model",
    "unregister_variant",
    *_CONFIGS,
]
