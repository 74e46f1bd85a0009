"""How a model with learned absolute positions is made to read longer input: its learned rows are repeated."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from .hosts import base_model, position_tables

Model = TypeVar("Model", bound=nn.Module)
LIMITS = ("max_position_embeddings", "max_encoder_position_embeddings", "max_decoder_position_embeddings")
BUFFERS = ("position_ids", "token_type_ids")  # (1, positions) buffers beside a table, made from its length


def extend_positions(model: Model, max_length: int, tokenizer: Any = None) -> Model:
    """
    Lets a model with learned positions (BERT, RoBERTa, GPT-2, OPT, BART, ...) read `max_length` tokens, in place.

    The learned rows are repeated, as Longformer (Beltagy 2020, section 5) and LSG do: position i gets a copy of row
    i modulo the old length, so that everything within one old length of a token looks as it did. Rows that stand for no
    position (RoBERTa's first two) stay where they are. The config's limit is raised with the table and saved with it; give
    the `tokenizer` to raise its `model_max_length` as well.

    Raises:
        ValueError: the model has no learned positions (rotary models: change `rope_parameters` in the config), or reads
            `max_length` tokens already.
    """
    base = base_model(model)
    tables = position_tables(base)
    if not tables:
        rotary = getattr(base.config.get_text_config(), "rope_parameters", None) is not None
        how = (
            "it rotates queries and keys: set `rope_parameters` in its config, for example "
            "{'rope_type': 'yarn', 'factor': 4.0, ...}, and raise `max_position_embeddings`"
            if rotary
            else "its positions have no table to extend"
        )
        raise ValueError(f"{type(base).__name__} has no learned positions; {how}.")
    reach = min(table.module.num_embeddings - table.offset for table in tables)
    if not isinstance(max_length, int) or isinstance(max_length, bool):
        raise ValueError(f"max_length = {max_length!r}: give an integer, a number of tokens.")
    if max_length <= reach:
        raise ValueError(f"max_length = {max_length!r}: {type(base).__name__} reads {reach} tokens already; give more.")
    for name, module in base.named_modules():
        if any(buffer.shape[-2:] == (reach, reach) for buffer in module.buffers(recurse=False)):
            raise ValueError(
                f"{type(base).__name__} keeps a mask of {reach} x {reach} tokens in {name!r} and could not read more; load it "
                "with a longer limit in its config."
            )
    for table in tables:
        if table.module.num_embeddings - table.offset < max_length:
            _extend(base, table.name, table.module, table.offset, max_length)
    _raise_limits(base, reach, max(table.offset for table in tables), max_length)
    if tokenizer is not None:
        tokenizer.model_max_length = max_length
    return model


def _extend(model: nn.Module, name: str, table: nn.Embedding, offset: int, max_length: int) -> None:
    weight = table.weight.data
    learned = weight[offset:]
    rows = torch.arange(max_length, device=weight.device) % len(learned)
    table.weight = nn.Parameter(torch.cat([weight[:offset], learned[rows]]), requires_grad=table.weight.requires_grad)
    table.num_embeddings = max_length + offset
    owner = model.get_submodule(name.rpartition(".")[0])
    for buffer in BUFFERS:
        old = getattr(owner, buffer, None)
        if isinstance(old, torch.Tensor) and old.ndim == 2 and old.shape[1] in (len(learned), len(weight)):
            length = max_length + (old.shape[1] - len(learned))
            new = (
                torch.arange(length, device=old.device).to(old.dtype)
                if buffer == "position_ids"
                else old.new_zeros(length)
            )
            persistent = buffer not in owner._non_persistent_buffers_set
            owner.register_buffer(buffer, new.expand(1, -1), persistent=persistent)


def _raise_limits(model: nn.Module, reach: int, offset: int, max_length: int) -> None:
    """Every config in the model that states a lower limit, counted with or without the rows that stand for no position."""
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        for name in LIMITS:
            limit = getattr(config, name, None)
            if isinstance(limit, int):
                beside = min(max(limit - reach, 0), offset)
                if limit - beside < max_length:
                    setattr(config, name, max_length + beside)
