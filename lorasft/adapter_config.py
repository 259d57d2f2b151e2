"""An adapter's files, as PEFT writes them: their names, and a config that can be trusted before anything is loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import Required, TypedDict

from lorasft.errors import ModelError, UnsafeError, in_words
from lorasft.tensors import open_tensors

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_AGAIN = "fetch the adapter again"
_LARGEST = 16 << 20  # bytes of a config
# What names code, other files, or places that PEFT would read or write; a text of targets is a pattern.
_CODE = (
    "auto_mapping auto_map megatron_config loftq_config eva_config corda_config lora_ga_config trust_remote_code "
    "tokenizer_kwargs model_kwargs target_modules exclude_modules"
)
# Of no effect on a trained adapter.
_IDLE = "task_type peft_version inference_mode init_lora_weights megatron_core runtime_config qalora_group_size"


def _check_pattern(pattern: str) -> str:
    """Refuse what might run for ever: PEFT's own patterns are paths, those of people say `.*` or `layers.[0-7].`."""
    repeated = re.findall(r"[*+?{]", pattern)
    if len(pattern) > 200 or len(repeated) > 2 or pattern.count("(") > 2 or re.search(r"\)[*+?{]", pattern):
        raise ValueError("a pattern that might run for ever")
    return pattern


_Names = list[str]
_Pattern = Annotated[str, AfterValidator(_check_pattern)]
_Rank = Annotated[int, Field(ge=1, le=1024)]
_Positive = Annotated[float, Field(gt=0)]
_Index = Annotated[int, Field(ge=0)]


# Forbidden: what is not known may compute something else, as variants of LoRA do, or take any amount of memory.
@with_config(ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))
class _Fields(TypedDict, total=False):
    """The fields that are read."""

    peft_type: Required[Literal["LORA"]]
    base_model_name_or_path: Required[Annotated[str, Field(min_length=1)]]
    revision: str
    r: Required[_Rank]
    lora_alpha: Required[_Positive]
    lora_dropout: Annotated[float, Field(ge=0, lt=1)]
    target_modules: _Names
    exclude_modules: _Names
    target_parameters: _Names
    modules_to_save: _Names
    layers_to_transform: _Index | list[_Index]
    layers_pattern: _Pattern | list[_Pattern]
    rank_pattern: dict[_Pattern, _Rank]
    alpha_pattern: dict[_Pattern, _Positive]
    trainable_token_indices: list[_Index] | dict[str, list[_Index]]
    bias: Literal["none", "all", "lora_only"]
    fan_in_fan_out: bool
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    ensure_weight_tying: bool


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """What adapter_config.json says, in PEFT's fields, checked; fields that are null or of no effect are left out.

    Raises ModelError for what is not a LoRA or not known, UnsafeError for what names code.
    """
    path = folder / CONFIG
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError("too large")
        config = json.loads(path.read_bytes())
        known = {key: value for key, value in config.items() if value or key in _Fields.__annotations__}
    except (ValueError, OSError, AttributeError, RecursionError) as error:
        raise ModelError(f"cannot read the adapter's config: {error}", where=str(path), hint=_AGAIN) from None
    fields = {key: value for key, value in known.items() if value is not None and key not in _IDLE.split()}
    try:
        TypeAdapter(_Fields).validate_python(fields)
    except ValidationError as error:
        found = error.errors()
        code = [one for one in found if one["type"] == "value_error" or one["loc"][-1] in _CODE.split()]
        if code:
            what = f"the adapter's config names code or a pattern: {in_words(code[:1])}"
            raise UnsafeError(what, where=str(path), hint="take it out if the adapter is of use without it") from None
        hint = "lorasft takes LoRA, rslora and DoRA adapters as PEFT writes them"
        raise ModelError(in_words(found[:1]), where=str(path), hint=hint) from None
    return fields


def read_adapter_weights(folder: Path) -> dict[str, Tensor]:
    """The adapter's tensors by their names on disk, all finite.

    Raises ModelError when there are none, or none that an adapter could have; UnsafeError when they are a pickle.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        if (folder / "adapter_model.bin").is_file():
            what = "the adapter is a pickle, which could run code when it is read"
            raise UnsafeError(what, where=str(folder), hint=f"convert it to {WEIGHTS}")
        raise ModelError(f"no {WEIGHTS}", where=str(folder), hint=_AGAIN)
    file = open_tensors(path)
    tensors = {}
    for name, spec in file.specs.items():
        if spec.dtype not in ("F32", "F16", "BF16"):
            raise ModelError(f"{name} is {spec.dtype}", where=str(path), hint="save it in 16 or 32 bits")
        tensors[name] = file.read(name)
        if not tensors[name].isfinite().all():
            raise ModelError(f"{name} is not finite", where=str(path), hint="train it again, or take an earlier one")
    return tensors
