"""The slow, obvious formula of every variant, one file each; see `naive.base`."""

import importlib
import pkgutil

from .base import ORACLES, as_config, naive_attention, naive_row

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["ORACLES", "as_config", "naive_attention", "naive_row"]
