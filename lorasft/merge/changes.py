"""Which tensors of the base's files an adapter changes, and how; refused by name before anything is written."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lorasft.adapter_config import WEIGHTS, check_weights
from lorasft.artifact import Artifact
from lorasft.errors import ModelError
from lorasft.merge.fold import Change, Dora, Replacement, Series, Shift, Stack, Tokens, Update, scale, split_experts
from lorasft.merge.names import Places
from lorasft.merge.shards import Entry, Shard

_PREFIX = "base_model.model."
_CONV1D_MODELS = {"gpt2", "openai-gpt"}  # their checkpoints store linears (in, out)
_TOKENS = "token_adapter.trainable_tokens_delta"
_PARTS = re.compile(
    r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_magnitude_vector|lora_embedding_A|lora_embedding_B"
    r"|token_adapter\.trainable_tokens_delta)"
)


def read_changes(artifact: Artifact, shards: Sequence[Shard]) -> dict[str, Change]:
    """What the adapter does to the base's tensors, by their names in the files.

    Every tensor of the adapter is used exactly once. Raises ModelError, naming it, for anything else.
    """
    places = Places(shards, base=shards[0].path.parent)
    adapter, config = artifact.require_adapter(), artifact.base_config
    given = read_adapter(artifact)
    vocabulary = {**config, **(config.get("text_config") or {})}.get("vocab_size")
    found: dict[str, list[Change]] = {}
    for parameter, change in _untie(given, places, vocabulary=vocabulary):
        for entry, part in _place(parameter, change, places, given=given):
            found.setdefault(entry.name, []).append(part)
    if not found:
        raise ModelError("the adapter has no tensors", where=str(adapter))
    for name, parts in found.items():  # all but a whole embedding that is adapted as well has one change
        if [part.replaces for part in parts] not in ([True], [False], [True, False]):
            raise ModelError(f"the adapter changes {name} more than once", where=str(adapter))
    changes = {name: parts[0] if len(parts) == 1 else Series(parts) for name, parts in found.items()}
    _refuse_misfits(changes, places, where=str(adapter))
    return changes


@dataclass(frozen=True)
class Adapter:
    """An adapter's files: its config and its tensors in fp32 by module and part, or by name if they are whole ones."""

    folder: Path
    config: Mapping[str, Any]
    conv1d: bool  # the base stores its linears (in, out)
    modules: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def scaling(self, path: str, rank: int) -> float:
        """What B A of the module or parameter is multiplied by. Raises ModelError unless it has the config's rank."""
        wanted = match_pattern(self.config.get("rank_pattern"), path, self.config["r"])
        if rank != wanted:
            raise self.fault(f"{path} has rank {rank}, the config says {wanted}")
        alpha = match_pattern(self.config.get("alpha_pattern"), path, self.config["lora_alpha"])
        return scale(alpha, rank, rslora=bool(self.config.get("use_rslora")))

    def fault(self, what: str) -> ModelError:
        return ModelError(what, where=str(self.folder), hint="--base with what it was trained on, or fetch it again")


def read_adapter(artifact: Artifact) -> Adapter:
    """An adapter's files, checked. Raises ModelError for a variant that cannot be merged, or broken files."""
    folder, config = artifact.require_adapter(), artifact.adapter_config
    adapter = Adapter(folder, config, artifact.base_config["model_type"] in _CONV1D_MODELS)
    for name, tensor in _read_tensors(folder).items():
        if not name.startswith(_PREFIX):
            raise adapter.fault(f"the adapter has a tensor of another kind: {name}")
        path = name.removeprefix(_PREFIX)
        match = _PARTS.fullmatch(path)
        if match:
            adapter.modules.setdefault(match[1], {})[match[2]] = tensor.float()
        elif "lora_" in path:
            raise adapter.fault(f"no part of LoRA or DoRA: {name}")
        else:
            adapter.tensors[path] = tensor
    for saved in config.get("modules_to_save") or []:
        if not any(parent.endswith(saved) for path in adapter.tensors for parent in _parents(path)):
            raise adapter.fault(f"modules_to_save names {saved}, of which the adapter has no tensor")
    if config.get("trainable_token_indices") and not any(_TOKENS in parts for parts in adapter.modules.values()):
        raise adapter.fault("trainable_token_indices names tokens, of which the adapter has no tensor")
    return adapter


def match_pattern(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """What a config's rank_pattern or alpha_pattern says of a module, by PEFT's rule: the first that ends its path."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def _parents(path: str) -> list[str]:
    return [path[: dot.start()] for dot in re.finditer(r"\.", path)]


def _read_tensors(adapter: Path) -> dict[str, Tensor]:
    check_weights(adapter)
    path = adapter / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except Exception as fault:  # safetensors raises its own error type, and OSError
        what = f"cannot read the adapter: {fault}"
        raise ModelError(what, where=str(path), hint="fetch the adapter again") from None
    broken = next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)
    if broken:
        raise ModelError(f"{broken} is not finite", where=str(path), hint="train it again, or take an earlier one")
    return tensors


def _list_changes(adapter: Adapter, places: Places) -> Iterator[tuple[str, Change]]:
    """What becomes of the model's parameters, by their paths in it: whole tensors first."""
    for name, tensor in adapter.tensors.items():
        yield _name_whole(name, adapter, places), Replacement(tensor)
    wrapped = set(_wrapped_parameters(adapter, places)) if adapter.config.get("target_parameters") else set()
    for module, parts in adapter.modules.items():
        if module not in wrapped:
            yield from _read_module(module, parts, adapter, places)
    if wrapped:
        yield from _read_wrapped(adapter, places)


def _read_module(
    module: str, parts: dict[str, Tensor], adapter: Adapter, places: Places
) -> Iterator[tuple[str, Change]]:
    weight, dora = f"{module}.weight", bool(adapter.config.get("use_dora"))
    match sorted(parts):
        case ["lora_A.weight", "lora_B.weight", *rest] if rest == (["lora_magnitude_vector"] if dora else []):
            update = _make_update(module, parts["lora_A.weight"], parts["lora_B.weight"], adapter, adapter.conv1d)
            yield weight, Dora(update, parts["lora_magnitude_vector"]) if dora else update
        case ["lora_A.weight", "lora_B.bias", "lora_B.weight"] if not dora:
            update = _make_update(module, parts["lora_A.weight"], parts["lora_B.weight"], adapter, adapter.conv1d)
            yield weight, update
            yield f"{module}.bias", Shift(parts["lora_B.bias"], update.scaling)
        case ["lora_embedding_A", "lora_embedding_B"] if not dora:
            yield weight, _make_update(module, parts["lora_embedding_A"], parts["lora_embedding_B"], adapter, True)
        case [name] if name == _TOKENS:
            yield weight, _read_tokens(module, parts[_TOKENS], adapter, places)
        case ["lora_A.weight"] | ["lora_B.weight"] as names:
            other = "lora_B.weight" if "A" in names[0] else "lora_A.weight"
            raise adapter.fault(f"{module} has {names[0]} and no {other}")
        case names:
            wanted = "lora_A.weight and lora_B.weight" + (", with use_dora lora_magnitude_vector too" if dora else "")
            raise adapter.fault(f"{module} has {', '.join(names)}: LoRA makes {wanted}")


def _make_update(module: str, down: Tensor, up: Tensor, adapter: Adapter, transposed: bool) -> Update:
    if down.dim() != 2 or up.dim() != 2:
        raise adapter.fault(f"{module} is no linear")
    if up.shape[1] != down.shape[0]:
        raise adapter.fault(f"{module}: A has rank {down.shape[0]}, B {up.shape[1]}")
    return Update(down, up, adapter.scaling(module, down.shape[0]), transposed)


def _read_tokens(module: str, values: Tensor, adapter: Adapter, places: Places) -> Tokens:
    given = adapter.config.get("trainable_token_indices") or []
    named = next((given[name] for name in given if module.endswith(name)), []) if isinstance(given, dict) else given
    indices: list[int] = list(named)
    shape = places.find(f"{module}.weight").shape
    if len(set(indices)) != len(indices) or tuple(values.shape) != (len(indices), shape[-1]):
        raise adapter.fault(f"{module} has {len(values)} trained tokens, the config names {len(indices)}")
    if not all(0 <= index < shape[0] for index in indices):
        raise adapter.fault(f"{module}: a trained token is outside the vocabulary of {shape[0]}")
    return Tokens(dict(zip(indices, values, strict=True)), shape)


def _name_whole(name: str, adapter: Adapter, places: Places) -> str:
    """The parameter that a whole tensor replaces. Raises ModelError unless the config has a reason for it."""
    parameter = name.replace(".base_layer.", ".")
    module, _, kind = parameter.rpartition(".")
    biases = adapter.config.get("bias", "none")
    saved = adapter.config.get("modules_to_save") or []
    if (
        any(parent.endswith(given) for parent in _parents(parameter) for given in saved)  # as PEFT matches them
        or (kind == "bias" and (biases == "all" or (biases == "lora_only" and module in adapter.modules)))
        or parameter in places.embeddings  # PEFT adds them where the vocabulary was resized or they are adapted
    ):
        return parameter
    raise adapter.fault(f"nothing in the adapter's config explains {name}")


def _wrapped_parameters(adapter: Adapter, places: Places) -> dict[str, str]:
    """Modules of the adapter -> the parameter that they change, where the config's target_parameters name it.

    PEFT wraps a module once for each of its targeted parameters, in their own order, the last one outside.
    """
    wrapped: dict[str, str] = {}
    targets = adapter.config["target_parameters"]
    for module in {name.replace(".base_layer", "") for name in adapter.modules}:
        paths = [path for path in places.parameters if path.rpartition(".")[0] == module]
        named = [path for path in paths if any(path == to or path.endswith(f".{to}") for to in targets)]
        wrapped |= {f"{module}{'.base_layer' * depth}": path for depth, path in enumerate(reversed(named))}
    return wrapped


def _read_wrapped(adapter: Adapter, places: Places) -> Iterator[tuple[str, Change]]:
    for module, parameter in _wrapped_parameters(adapter, places).items():
        parts = adapter.modules.get(module, {})
        if sorted(parts) != ["lora_A.weight", "lora_B.weight"]:
            raise adapter.fault(f"{parameter} has {', '.join(parts) or 'no A and B'}: not what LoRA makes")
        owner = places.model.get_submodule(parameter.rpartition(".")[0])
        shape = places.parameters[parameter].shape
        down, up = parts["lora_A.weight"], parts["lora_B.weight"]
        if len(shape) == 2:
            yield parameter, _make_update(parameter, down, up, adapter, False)
            continue
        experts = shape[0]
        if len(shape) != 3 or down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1] or len(down) % experts:
            raise adapter.fault(f"A and B of {parameter} do not fit its {experts} experts")
        scaling = adapter.scaling(parameter, len(down) // experts)
        transposed = bool(getattr(owner, "is_transposed", False))
        yield parameter, Stack(split_experts(down, up, experts=experts, scaling=scaling, transposed=transposed))


def _untie(adapter: Adapter, places: Places, *, vocabulary: int | None) -> Iterator[tuple[str, Change]]:
    """The changes, those of a tied embedding and head as one. Raises ModelError where only one of them would change.

    PEFT changes both then, or unties them in the merged model: neither is what was trained, or what the base is.
    """
    twins: dict[str, Replacement] = {}
    for parameter, change in _list_changes(adapter, places):
        tall = vocabulary is None or vocabulary in change.shape or change.replaces
        if not tall or parameter not in places.tied:
            yield parameter, change
        elif isinstance(change, Replacement):
            twins[parameter] = change
        elif isinstance(change, Tokens):
            yield from ((twin, change) for twin in places.stored_twins)
        else:
            raise adapter.fault(f"{parameter} is tied to its twin, which the adapter does not change along")
    if twins:
        first, *others = twins.values()
        if len(twins) < len(places.tied) or not all(torch.equal(first.tensor, other.tensor) for other in others):
            raise adapter.fault(f"{next(iter(twins))} is tied to its twin, which was not trained along")
        yield from ((twin, first) for twin in places.stored_twins)


def _place(parameter: str, change: Change, places: Places, *, given: Adapter) -> Iterator[tuple[Entry, Change]]:
    """The tensors of the files that a parameter's change concerns, and what becomes of each."""
    if not isinstance(change, Stack):
        yield places.find(parameter), change
        return
    stored = places.find_experts(parameter)
    if len(stored) == 1 and len(change.updates) > 1:
        yield stored[0][0], change
        return
    if len(stored) != len(change.updates):
        raise given.fault(f"the base has {len(stored)} experts for {parameter}, the adapter {len(change.updates)}")
    for update, parts in zip(change.updates, stored, strict=True):
        heights = [entry.shape[0] for entry in parts]
        if update.transposed or sum(heights) != len(update.up):
            raise given.fault(f"{parameter} does not fit {', '.join(entry.name for entry in parts)}")
        for entry, up in zip(parts, torch.split(update.up, heights), strict=True):
            yield entry, Update(update.down, up.contiguous(), update.scaling, False)


def _refuse_misfits(changes: Mapping[str, Change], places: Places, *, where: str) -> None:
    """Only an embedding and its head may get another height, and then the same."""
    resized = set()
    for name, change in changes.items():
        entry = places.entries[name]
        parts = change.changes if isinstance(change, Series) else [change]
        if any(part.shape != change.shape for part in parts):
            what = f"what the adapter does to {name} does not fit together"
            raise ModelError(what, where=where, hint="fetch the adapter again")
        if change.shape != entry.shape:
            if not change.replaces or len(change.shape) != 2 or change.shape[1:] != entry.shape[1:]:
                what = f"{name} is {entry.shape}, the adapter fits {change.shape}"
                raise ModelError(what, where=where, hint="--base with what it was trained on")
            resized.add(name)
    if resized:
        embeddings = {places.find(parameter).name for parameter in places.stored_twins or places.embeddings}
        heights = {changes[name].shape[0] if name in changes else places.entries[name].shape[0] for name in embeddings}
        if not resized <= embeddings or len(heights) > 1:
            raise ModelError(f"the adapter gives {', '.join(sorted(resized))} another height alone", where=where)
