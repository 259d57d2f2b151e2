"""An adapter's files, as PEFT writes them: their names, and a config that can be trusted before anything is loaded."""

from __future__ import annotations

import json
import re
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
    target_modules: list[str] | None = None
    target_parameters: list[str] | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None


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
    # A pattern from a file could be made to run for ever.
    named += [key for key in ("target_modules", "exclude_modules") if isinstance(config.get(key), str)]
    named += [key for key in ("rank_pattern", "alpha_pattern") if any(map(_is_odd, config.get(key) or {}))]
    if named:
        raise UnsafeError(f"the adapter's config names code or patterns: {', '.join(named)}", where=str(path))
    try:
        _Fields.model_validate(config)
    except ValidationError as fault:
        first = fault.errors(include_url=False)[0]
        raise ModelError(f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}", where=str(path)) from None
    return config


def _is_odd(pattern: str) -> bool:
    """Whether a pattern might take long: PEFT's own are paths, those of people say `.*` or `layers.[0-7].`."""
    repeated = re.findall(r"[*+?{]", pattern)
    return len(pattern) > 200 or len(repeated) > 2 or pattern.count("(") > 2 or bool(re.search(r"\)[*+?{]", pattern))


def refuse_pickle(folder: Path) -> None:
    """Raise ModelError when `folder` has no adapter weights, UnsafeError when they are a pickle."""
    if not (folder / WEIGHTS).is_file():
        if (folder / "adapter_model.bin").is_file():
            raise UnsafeError("the adapter is a pickle", where=str(folder), hint=f"convert it to {WEIGHTS}")
        raise ModelError(f"no {WEIGHTS}", where=str(folder))
