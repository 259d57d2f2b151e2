"""An adapter's files, as PEFT writes them: their names, and a config that can be trusted before anything is loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lorasft.errors import ModelError, UnsafeError
from lorasft.weight_files import read_header

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_AGAIN = "fetch the adapter again"
LARGEST_HEADER, MOST_TENSORS = 16 << 20, 50_000
_DTYPES = {"F32", "F16", "BF16"}
# What names code, other files, or places that PEFT would read or write.
_CODE = (
    "auto_mapping auto_map megatron_config loftq_config eva_config corda_config lora_ga_config trust_remote_code "
    "tokenizer_kwargs model_kwargs"
)
# What is known beside the fields below: of no effect on a trained adapter, read by PEFT, or refused by the merge.
_KNOWN = (
    "task_type peft_version inference_mode exclude_modules lora_dropout fan_in_fan_out bias use_rslora use_dora "
    "init_lora_weights layers_to_transform layers_pattern megatron_core lora_bias layer_replication runtime_config "
    "use_qalora qalora_group_size alora_invocation_tokens arrow_config kasa_config velora_config monteclora_config "
    "use_bdlora ensure_weight_tying"
)


class _Fields(BaseModel):
    """The fields that are read here."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    peft_type: str
    base_model_name_or_path: str
    revision: str | None = None
    r: int = Field(ge=1, le=1024)
    lora_alpha: float = Field(gt=0)
    target_modules: list[str] | None = None
    target_parameters: list[str] | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json, checked. Raises ModelError for what is no LoRA or not known, UnsafeError for code."""
    path = folder / CONFIG
    if not path.is_file():
        raise ModelError(f"no {CONFIG}: this is no adapter", where=str(folder), hint="name an adapter's folder")
    try:
        config = json.loads(path.read_bytes())
        if not isinstance(config, dict):
            raise ValueError("not a mapping")
    except (ValueError, OSError, RecursionError) as fault:
        raise ModelError(f"cannot read the adapter's config: {fault}", where=str(path), hint=_AGAIN) from None
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ModelError(f"peft_type {kind} is not LORA", where=str(path), hint="lorasft takes LoRA adapters only")
    named = [key for key in _CODE.split() if config.get(key)]
    # A pattern from a file could be made to run for ever.
    named += [key for key in ("target_modules", "exclude_modules") if isinstance(config.get(key), str)]
    for key in ("rank_pattern", "alpha_pattern", "layers_pattern"):
        patterns = config.get(key) or ()
        patterns = [patterns] if isinstance(patterns, str) else patterns
        named += [key] if isinstance(patterns, (dict, list)) and any(_is_odd(str(one)) for one in patterns) else []
    if named:
        what = f"the adapter's config names code or patterns: {', '.join(named)}"
        raise UnsafeError(what, where=str(path), hint="take these out if the adapter is of use without them")
    known = {*_KNOWN.split(), *_Fields.model_fields}
    unknown = [key for key, value in config.items() if value and key not in known]
    if unknown:
        what = f"the adapter's config has fields that are not known here: {', '.join(unknown[:5])}"
        raise ModelError(what, where=str(path), hint="take them out if the adapter is of use without them")
    try:
        _Fields.model_validate(config)
    except ValidationError as fault:
        first = fault.errors(include_url=False)[0]
        what = f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}"
        raise ModelError(what, where=str(path), hint=_AGAIN) from None
    return config


def _is_odd(pattern: str) -> bool:
    """Whether a pattern might take long: PEFT's own are paths, those of people say `.*` or `layers.[0-7].`."""
    repeated = re.findall(r"[*+?{]", pattern)
    return len(pattern) > 200 or len(repeated) > 2 or pattern.count("(") > 2 or bool(re.search(r"\)[*+?{]", pattern))


def check_weights(folder: Path) -> None:
    """Look at an adapter's weights before a tensor is read.

    Raises ModelError when there are none, or none that an adapter could have; UnsafeError when they are a pickle.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        if (folder / "adapter_model.bin").is_file():
            what = "the adapter is a pickle, which could run code when it is read"
            raise UnsafeError(what, where=str(folder), hint=f"convert it to {WEIGHTS}")
        raise ModelError(f"no {WEIGHTS}", where=str(folder), hint=_AGAIN)
    _, fields = read_header(path, largest=LARGEST_HEADER)
    tensors = {name: field["dtype"] for name, field in fields.items() if name != "__metadata__"}
    if len(tensors) > MOST_TENSORS:
        raise ModelError(f"{len(tensors):,} tensors are no adapter's", where=str(path), hint=_AGAIN)
    odd = next((name for name, dtype in tensors.items() if dtype not in _DTYPES), None)
    if odd is not None:
        what = f"{odd} is {tensors[odd]}: an adapter's tensors are {', '.join(sorted(_DTYPES))}"
        raise ModelError(what, where=str(path), hint="save the adapter in 16 or 32 bits")
