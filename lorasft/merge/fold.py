"""W + scaling * B A: fp32 product and sum, one rounding; the same bits as PEFT's merge of a plain LoRA."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from lorasft.adapter_files import CONFIG, WEIGHTS, read_adapter_config, refuse_pickle
from lorasft.errors import ModelError

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Update:
    """What an adapter adds to one weight."""

    module: str  # as the model names it
    down: Tensor  # A: (rank, in) fp32
    up: Tensor  # B: (out, rank) fp32
    scaling: float
    transposed: bool  # the weight is stored (in, out), as GPT-2's Conv1D does

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the weight that this fits, as it is stored."""
        out, into = self.up.shape[0], self.down.shape[1]
        return (into, out) if self.transposed else (out, into)


def fold(rows: Tensor, update: Update, start: int) -> Tensor:
    """Rows `start`, `start + 1`, ... of a weight with the update added, rounded once to their dtype."""
    part = slice(start, start + len(rows))
    change = update.down[:, part].T @ update.up.T if update.transposed else update.up[part] @ update.down
    return (rows.float() + change.mul_(update.scaling)).to(rows.dtype)


def read_updates(adapter: Path, *, conv1d: bool) -> list[Update]:
    """The updates of a plain LoRA adapter. `conv1d`: the base stores its linears (in, out).

    Raises ModelError, naming it, for anything that is not plain LoRA, before anything is written.
    """
    config = _read_plain_config(adapter)
    tensors = _read_tensors(adapter)
    modules = sorted({name.rsplit(".lora_", 1)[0] for name in tensors})
    updates = []
    for module in modules:
        try:
            down, up = tensors.pop(f"{module}.lora_A.weight"), tensors.pop(f"{module}.lora_B.weight")
        except KeyError as missing:
            raise ModelError(f"the adapter has no {missing.args[0]}", where=str(adapter)) from None
        if up.shape[1] != config["r"] or down.shape[0] != config["r"]:
            raise ModelError(f"{module} has rank {down.shape[0]}, the config says {config['r']}", where=str(adapter))
        root = math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
        scaling = config["lora_alpha"] / root
        updates.append(Update(module.removeprefix(_PREFIX), down.float(), up.float(), scaling, conv1d))
    if tensors or not updates:
        raise ModelError(f"not plain LoRA: {sorted(tensors)[:3] or 'no tensors at all'}", where=str(adapter))
    return updates


def _read_plain_config(adapter: Path) -> dict[str, Any]:
    config = read_adapter_config(adapter)
    unsupported = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "target_parameters",
                   "trainable_token_indices", "lora_bias", "layer_replication")  # fmt: skip
    given = [key for key in unsupported if config.get(key)]
    if config.get("bias", "none") != "none":
        given.append(f"bias {config.get('bias')}")
    if given:
        what = f"cannot merge an adapter with {', '.join(given)}"
        raise ModelError(what, where=str(adapter / CONFIG), hint="plain LoRA merges")
    return config


def _read_tensors(adapter: Path) -> dict[str, Tensor]:
    refuse_pickle(adapter)
    path = adapter / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except Exception as fault:  # safetensors raises its own error type, and OSError
        raise ModelError(f"cannot read the adapter: {fault}", where=str(path)) from None
    broken = next(_non_finite(tensors), None)
    if broken:
        raise ModelError(f"{broken} is not finite", where=str(path))
    return tensors


def _non_finite(tensors: dict[str, Tensor]) -> Iterator[str]:
    return (name for name, tensor in tensors.items() if not tensor.isfinite().all())
