"""An adapter's files, as PEFT and other tools write them: the config, checked, and the tensors under PEFT's names.

They are a stranger's. The tensors say what is adapted, the config with which scale; what it says of where, or of how
training began, is not read, but for starts that changed the base.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Required

from pydantic import AfterValidator, ConfigDict, Field, PositiveFloat, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic asks for this one below Python 3.12

from lorasft.errors import ModelError, UnsafeError, in_words, reading
from lorasft.recipe.yaml_reader import read_yaml
from lorasft.tensors import TensorFile, open_tensors
from lorasft.terminal import say

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."  # of the names in PEFT's files
_FETCH_AGAIN = "fetch the adapter again"
_LARGEST = 16 << 20  # bytes of a config
_TABLES = read_yaml(Path(__file__).with_name("adapter_files.yaml")).value
_STATE_ONLY = re.compile("|".join(_TABLES["state_only"]))
_EXPERT = re.compile(r"\.experts\.\d+\.")
_MODULE = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_(?:embedding_)?[AB](?:\.weight)?")


def _check_pattern(pattern: str) -> str:
    """Refuse what might run for ever: PEFT's own patterns are paths, those of people say `.*` or `layers.[0-7].`."""
    repeated = re.findall(r"[*+?{]", pattern)
    if len(pattern) > 200 or len(repeated) > 2 or pattern.count("(") > 2 or re.search(r"\)[*+?{]", pattern):
        raise ValueError("a pattern that might run for ever")
    return pattern


_Pattern = Annotated[str, AfterValidator(_check_pattern)]
_Rank = Annotated[int, Field(ge=1, le=1024)]
_Index = Annotated[int, Field(ge=0, lt=1 << 20)]  # of a token, for which an embedding may have to grow


# What is read. Other fields are refused: they may compute something else, as variants of LoRA do, or take any memory.
@with_config(ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))
class _Fields(TypedDict, total=False):
    peft_type: Required[Literal["LORA"]]
    base_model_name_or_path: str
    revision: str
    r: Required[_Rank]
    lora_alpha: Required[PositiveFloat]
    lora_dropout: Annotated[float, Field(ge=0, lt=1)]
    target_parameters: list[str]
    modules_to_save: list[str]
    rank_pattern: dict[_Pattern, _Rank]
    alpha_pattern: dict[_Pattern, PositiveFloat]
    trainable_token_indices: list[_Index] | dict[str, list[_Index]]
    bias: Literal["none", "all", "lora_only"]
    fan_in_fan_out: bool
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    ensure_weight_tying: bool


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """What adapter_config.json says, in PEFT's fields, checked; fields that are null or of no effect are left out.

    An adapter whose start was taken out of the base (then init_lora_weights is `pissa` or another's name) is described
    as `subtract_start` makes it: with twice the rank. Raises ModelError for what is not a LoRA or not known,
    UnsafeError for what names code.
    """
    path = folder / CONFIG
    with reading("cannot read the adapter's config", where=path, hint=_FETCH_AGAIN):
        if path.stat().st_size > _LARGEST:
            raise ValueError("too large")
        config = json.loads(path.read_bytes())
        known = {key: value for key, value in config.items() if value or key in _Fields.__annotations__}
    if "peft_type" not in known and {"lora_parameters", "fine_tune_type"} & known.keys():
        hint = "mlx_lm.fuse makes a model of it; PEFT has lora_a.T, lora_b.T and as lora_alpha scale * rank"
        raise ModelError("this is an adapter of mlx-lm", where=path, hint=hint)
    fields = {key: value for key, value in known.items() if value is not None and key not in _TABLES["idle"]}
    try:
        TypeAdapter(_Fields).validate_python(fields)
    except ValidationError as error:
        found = error.errors()
        code = [one for one in found if one["type"] == "value_error" or one["loc"][-1] in _TABLES["code"]]
        if code:
            what = f"the adapter's config names code or a pattern: {in_words(code[:1])}"
            raise UnsafeError(what, where=path, hint="lorasft runs no code from files: take another adapter") from None
        hint = "lorasft takes LoRA, rslora and DoRA adapters as PEFT writes them"
        raise ModelError(in_words(found[:1]), where=path, hint=hint) from None
    init, starts = str(known.get("init_lora_weights")).lower(), _TABLES["starts"]
    if kind := next((kind for kind in starts if init.startswith(kind)), None):
        computed = init == "pissa" or (init == "olora" and not fields.get("fan_in_fan_out"))  # PEFT's would not fit
        known_start = computed or (kind != "loftq" and _find_start(folder, kind))
        if not known_start or fields.get("target_parameters"):
            what = f"the adapter began with {starts[kind]} ({init}), which changed the base: how is not known here"
            hint = "convert it into plain LoRA where it was trained: PEFT's save_pretrained does that with "
            hint += f"path_initial_model_for_weight_conversion; or put its start beside it, as {kind}_init"
            raise ModelError(what, where=path, hint=hint)
        times = {"rank_pattern": 2, "alpha_pattern": math.sqrt(2) if fields.get("use_rslora") else 2}
        fields |= {key: {path: by * one for path, one in fields.get(key, {}).items()} for key, by in times.items()}
        fields |= {"r": 2 * fields["r"], "lora_alpha": times["alpha_pattern"] * fields["lora_alpha"]}
        fields["init_lora_weights"] = kind
    return fields


def _find_start(folder: Path, kind: str) -> Path | None:
    """The folder with the tensors that an adapter began with, where it lies in or beside that of the adapter."""
    places = [parent / f"{kind}_init" for parent in (folder, folder.absolute().parent)]
    return next((place for place in places if (place / WEIGHTS).is_file()), None)


def subtract_start(
    weights: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path, read: Callable[[str], Tensor]
) -> dict[str, Tensor]:
    """The tensors of the adapter in `folder`, in the rank that `config` has: less what its start took from the base.

    W - s B0 A0 + s B A was trained. On W that is plain LoRA of twice the rank, B beside -B0 and A on top of A0, as PEFT
    converts it. `read`: gives a module's weight in the base. Raises ModelError where the start does not fit.
    """
    import torch

    plain, kind = dict(weights), config.get("init_lora_weights")
    if kind is None:
        return plain
    saved = _find_start(folder, kind)
    began = read_adapter_weights(saved) if saved else {}
    say(f"{'reading' if saved else 'computing'} what the adapter began with ({kind})")
    what, hint = f"the adapter does not fit what it began with ({kind})", "--base with the one of training, in 16 bits"
    with reading(what, where=folder, hint=hint):
        for path in list_adapted(weights, {}):
            down, up = (f"{PREFIX}{path}.lora_{part}.weight" for part in "AB")
            if not (weight := read(path).detach()).is_floating_point():
                raise TypeError("its start was taken out of weights in 16 bits, the base is in 4 bit")
            if not saved:
                rank, scaling = lora_scale(config, path)
                weight = weight.float().T if config.get("fan_in_fan_out") else weight.float()
                began[down], began[up] = _compute_start(kind, weight, rank // 2, scaling)
            plain[down] = torch.cat([weights[down].float(), began[down].float().cpu()])
            plain[up] = torch.cat([weights[up].float(), -began[up].float().cpu()], dim=1)
    return plain


def _compute_start(kind: str, weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A0 (rank, in) and B0 (out, rank) of a weight, (out, in): PiSSA's (arXiv:2404.02948) or OLoRA's (2406.01775)."""
    import torch

    if kind == "olora":
        basis, rest = torch.linalg.qr(weight)
        return rest[:rank], basis[:, :rank]
    left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
    roots = (sizes[:rank] / scaling).sqrt()
    return roots.unsqueeze(1) * right[:rank], left[:, :rank] * roots


def lora_scale(config: Mapping[str, Any], path: str) -> tuple[int, float]:
    """Rank and factor of a module or parameter by PEFT's rule: of the patterns the first that ends its path."""

    def look_up(patterns: str, other: float) -> Any:
        said: Mapping[str, Any] = config.get(patterns) or {}
        return next((value for pattern, value in said.items() if re.match(rf"(.*\.)?({pattern})$", path)), other)

    rank, alpha = look_up("rank_pattern", config["r"]), look_up("alpha_pattern", config["lora_alpha"])
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def open_adapter(folder: Path) -> TensorFile:
    """The file of an adapter's tensors. Raises ModelError when there is none, UnsafeError when it is a pickle."""
    if (folder / WEIGHTS).is_file():
        return open_tensors(folder / WEIGHTS)
    if (folder / "adapter_model.bin").is_file():
        what = "the adapter is a pickle, which could run code when it is read"
        hint = f"save it anew where it was made: PEFT 0.6 and later write {WEIGHTS}"
        raise UnsafeError(what, where=folder, hint=hint)
    raise ModelError(f"no {WEIGHTS}", where=folder, hint=_FETCH_AGAIN)


def list_adapted(names: Iterable[str], config: Mapping[str, Any]) -> list[str]:
    """The modules whose A or B is among an adapter's tensors, but for the owners of the config's target_parameters."""
    found = {match[1] for match in map(_MODULE.fullmatch, map(_peft_name, names)) if match}
    owners = (".experts", *(f".{target}".rpartition(".")[0] for target in config.get("target_parameters") or ()))
    return sorted(path for path in found if not f".{path}".removesuffix(".base_layer").endswith(owners))


def adapts_experts(config: Mapping[str, Any]) -> bool:
    """Whether there is LoRA on experts, which are one tensor by now, or on parameters that are no linears."""
    return bool(config.get("target_parameters")) or any(map(_EXPERT.search, config["target_modules"]))


def read_adapter_weights(folder: Path) -> dict[str, Tensor]:
    """The adapter's tensors by their names in PEFT's files, all finite.

    Raises ModelError when there are none, or none that an adapter could have; UnsafeError when they are a pickle.
    """
    file, where = open_adapter(folder), folder / WEIGHTS
    tensors: dict[str, Tensor] = {}
    for name, spec in file.specs.items():
        if spec.dtype not in ("F32", "F16", "BF16"):
            raise ModelError(f"{name} is {spec.dtype}", where=where, hint="save it in 16 or 32 bits")
        tensor, known_as = file.read(name), _peft_name(name)
        if not tensor.isfinite().all():
            raise ModelError(f"{name} is not finite", where=where, hint="train it again, or take an earlier one")
        if known_as in tensors:
            raise ModelError(f"more than one adapter is in it: {name}", where=where, hint="save one of them alone")
        tensors[known_as] = tensor
    return tensors


def _peft_name(name: str) -> str:
    """The name that a tensor has in PEFT's files, also from those in a model's own state."""
    return PREFIX + _STATE_ONLY.sub("", name)
