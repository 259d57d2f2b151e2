"""An adapter's files, as PEFT writes them: their names, and a config that can be trusted before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lorasft.errors import ModelError, UnsafeError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_CODE = ("auto_mapping", "megatron_config", "loftq_config", "eva_config", "corda_config")  # name code or other files


class _Fields(BaseModel):
    """The fields that are read here; PEFT knows many more."""

    model_config = ConfigDict(extra="allow", strict=True)

    peft_type: str
    base_model_name_or_path: str
    revision: str | None = None
    r: int = Field(ge=1, le=1024)
    lora_alpha: float = Field(gt=0)
    target_modules: list[str]


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json, checked. Raises ModelError for what is no LoRA, UnsafeError for code or patterns."""
    path = folder / CONFIG
    if not path.is_file():
        raise ModelError(f"no {CONFIG}: this is no adapter", where=str(folder))
    try:
        config = json.loads(path.read_bytes())
        if not isinstance(config, dict):
            raise ValueError("not a mapping")
    except (ValueError, OSError) as fault:
        raise ModelError(f"cannot read the adapter's config: {fault}", where=str(path)) from None
    if config.get("peft_type") != "LORA":
        raise ModelError(f"peft_type {config.get('peft_type')} is not LORA", where=str(path))
    named = [key for key in _CODE if config.get(key)]
    if isinstance(config.get("target_modules"), str):
        named.append("target_modules")  # a pattern from a file could be made to run for ever
    if named:
        raise UnsafeError(f"the adapter's config names code or patterns: {', '.join(named)}", where=str(path))
    try:
        _Fields.model_validate(config)
    except ValidationError as fault:
        first = fault.errors(include_url=False)[0]
        raise ModelError(f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}", where=str(path)) from None
    return config


def refuse_pickle(folder: Path) -> None:
    """Raise ModelError when `folder` has no adapter weights, UnsafeError when they are a pickle."""
    if not (folder / WEIGHTS).is_file():
        if (folder / "adapter_model.bin").is_file():
            raise UnsafeError("the adapter is a pickle", where=str(folder), hint=f"convert it to {WEIGHTS}")
        raise ModelError(f"no {WEIGHTS}", where=str(folder))
