"""How fast does which parameter learn? Parameter groups with a `scale` each, by which the rate of a step is multiplied."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from hf_efficient_attn.hosts import base_model, find_hosts

LAYER = re.compile(r".*?\.\d+(?=\.)")  # "model.layers.3" of "model.layers.3.self_attn"


def layerwise(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """
    What of the model is trained, at `decay` to the power of how far below the head it lies: the head 1, the last layer
    `decay`, ..., the embeddings least (Howard and Ruder 2018, arXiv:1801.06146; Clark 2020, ELECTRA, arXiv:2003.10555).
    """
    trained = [(f".{name}", p) for name, p in model.named_parameters() if p.requires_grad]
    if decay == 1:
        return [{"params": [p for _, p in trained], "scale": 1.0}]
    found = (LAYER.match(host.name) for host in find_hosts(base_model(model)))
    layers = list(dict.fromkeys(f".{match.group()}." for match in found if match))
    depths: dict[int, list[nn.Parameter]] = {}
    depth, top = 0, len(layers) + 1  # what stands before the first layer lies below it, what stands after one above all
    places = [next((i for i, layer in enumerate(layers, 1) if layer in name), None) for name, _ in trained]
    for (_, parameter), place in zip(trained, places, strict=True):
        depth = place if place is not None else (top if depth else 0)
        depths.setdefault(depth, []).append(parameter)
    return [{"params": parameters, "scale": decay ** (top - depth)} for depth, parameters in sorted(depths.items())]
