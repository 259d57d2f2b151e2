"""Large embeddings beside that of the input, such as Gemma's per-layer ones: a card takes the rows of its tokens."""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

_SHARE = 8  # what takes more than this part of a card is not put there


def vocabulary_tables(model: Any) -> list[Any]:
    """Embedding and head of `model`, without what PEFT put around them."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    return [getattr(one, "original_module", one) for one in modules]


def keep_on_host(model: Any, device: torch.device, *, card: int | None = None) -> list[str]:
    """Let the embeddings of `model` that are too large for `device`, or for a `card` of so many bytes, stay in the
    host's memory: they look up rows there and copy them, bit for bit, to where the ids are. Returns their paths."""
    card = card or (torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0)
    embeddings = {path: one for path, one in model.named_modules() if isinstance(one, nn.Embedding)}
    large = {path: one for path, one in embeddings.items() if 0 < card < _SHARE * one.weight.nbytes}
    tables = {path: one for path, one in large.items() if one is not model.get_input_embeddings()}
    for table in tables.values():
        table.forward, table.weight.on_host = MethodType(_look_up, table), True  # type: ignore[method-assign, attr-defined]
    return list(tables)


def _look_up(table: Any, ids: Tensor) -> Tensor:
    """What the own forward of `table` gives for `ids`, from their rows alone."""
    weight, where = table.weight, ids.flatten().to(table.weight.device)
    like = {"dtype": weight.dtype, "device": weight.device, "pin_memory": ids.is_cuda}
    rows = torch.index_select(weight, 0, where, out=torch.empty(len(where), weight.shape[1], **like))
    small = copy.copy(table)
    vars(small).update(weight=rows.to(ids.device, non_blocking=True), padding_idx=None)  # found before parameters
    return type(table).forward(small, torch.arange(len(where), device=ids.device).view_as(ids))  # type: ignore[no-any-return]
