"""Which tensors of the base's files an adapter changes, and how; refused by name before anything is written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from lorasft.adapter_files import CONFIG, WEIGHTS, read_adapter_config, refuse_pickle
from lorasft.errors import ModelError
from lorasft.merge.fold import Update
from lorasft.merge.shards import DTYPES, Entry, Shard
from lorasft.merge.stream import Change

_PREFIX = "base_model.model."
_CONV1D_MODELS = {"gpt2", "openai-gpt"}  # their checkpoints store linears (in, out)


def read_changes(adapter: Path, shards: Sequence[Shard], *, config: Mapping[str, Any]) -> dict[str, Change]:
    """What the adapter does to the base's tensors, by their names in the files. `config`: the base's config.json.

    Every tensor of the adapter is used exactly once. Raises ModelError, naming it, for anything else.
    """
    conv1d = config["model_type"] in _CONV1D_MODELS
    places = Places(shards)
    changes: dict[str, Change] = {}
    for update in read_updates(adapter, conv1d=conv1d):
        entry = places.find(update.module)
        if entry.shape != update.shape:
            raise ModelError(f"{entry.name} is {entry.shape}, the adapter fits {update.shape}", where=str(adapter))
        changes[entry.name] = update
    return changes


class Places:
    """Where the parameters of the model's modules lie in a checkpoint's files."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.entries = {entry.name: entry for shard in shards for entry in shard.entries}

    def find(self, module: str) -> Entry:
        """The weight of a module by its path in the model. Raises ModelError when the files have none."""
        # A checkpoint may have been saved from the backbone (GPT-2's is), without the first part of the name.
        names = [f"{module}.weight", f"{module.partition('.')[2]}.weight"]
        name = next((name for name in names if name in self.entries), None)
        if name is None:
            raise ModelError(f"the base has no tensor for {module}", hint="is it the right base?")
        if self.entries[name].dtype not in DTYPES:
            raise ModelError(f"{name} is {self.entries[name].dtype}", hint="merge into the 16-bit original")
        return self.entries[name]


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
