"""
How is a variant brought near its dense attention before its task is trained? By attention transfer
(`hf_efficient_attn.recovery`), in the same Accelerate loop as fine-tuning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from examples.training import Recipe
from hf_efficient_attn.hosts import base_model
from hf_efficient_attn.recovery import Transfer, patched_layers
from hf_efficient_attn.swapping import is_patched


def learning_layers(model: PreTrainedModel) -> list[list[int]]:
    """
    The patched layers with parameters, in lists of those that share some, as linformer's sharing="layerwise" has them. No
    layer where none has any.
    """
    layers = patched_layers(model) if is_patched(base_model(model), "attention") else []
    groups: list[list[int]] = []
    of: dict[nn.Parameter, list[int]] = {}
    for number, _, variant in layers:
        parameters = list(variant.parameters())
        if not parameters:
            continue
        group = next((of[p] for p in parameters if p in of), None)
        if group is None:
            groups.append(group := [])
        group.append(number)
        of |= dict.fromkeys(parameters, group)
    return groups


class TransferObjective(nn.Module):
    """
    Batch -> the mean relative error of the layers' attention; the model runs on dense attention meanwhile, without dropout,
    so that layers learn from what they will see.
    """

    def __init__(self, model: PreTrainedModel, transfer: Transfer) -> None:
        super().__init__()
        self.model, self.transfer = model, transfer

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": group["params"], "scale": group["lr"]} for group in self.transfer.groups(lr=1.0)]

    def train(self, mode: bool = True) -> TransferObjective:
        super().train(mode)
        if mode:
            self.model.eval()
            for _, _, variant in patched_layers(self.model):
                variant.train()
        return self

    def forward(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        self.model.base_model(**inputs)
        return {"loss": self.transfer.loss()}


def transfer_recipe(recipe: Recipe, tokens: int, max_length: int, processes: int, learning_rate: float) -> Recipe:
    """The fine-tune's recipe for a transfer on at most `tokens` tokens, at least one step."""
    per_step = recipe.batch_size * recipe.accumulation * processes * max_length
    return replace(recipe, steps=max(1, tokens // per_step), learning_rate=learning_rate, weight_decay=0.0)
