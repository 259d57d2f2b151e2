"""What the base's config and index say, and what they have to say after the merge."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorasft.errors import ModelError
from lorasft.merge.shards import Shard
from lorasft.tensors import INDEX

CONFIG = "config.json"
_ORIGINALS = ("base_model", "base_model_name_or_path", "original_model", "model_name_or_path", "_name_or_path")


def read_config(base: Path) -> dict[str, Any]:
    """config.json of a base. Raises ModelError when there is none, or it is quantized by another than bitsandbytes."""
    path = base / CONFIG
    if not path.is_file():
        raise ModelError("no config.json: this is no model folder", where=str(base), hint="--base MODEL")
    try:
        config: dict[str, Any] = json.loads(path.read_bytes())
        scheme = config.get("quantization_config") or {}
        if not isinstance(config["model_type"], str) or not isinstance(scheme, dict):
            raise TypeError("model_type or quantization_config is of another kind")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as fault:
        what = f"cannot read the base's config: {fault!r}"
        raise ModelError(what, where=str(path), hint="download it again") from None
    if scheme and not (scheme.get("load_in_4bit") or scheme.get("_load_in_4bit")):
        method = scheme.get("quant_method", "an unknown method")
        fields = [given.get(key) for given in (scheme, config) for key in _ORIGINALS]
        named = [name for name in fields if isinstance(name, str) and name and Path(name).name != base.name]
        hint = f"merge into the 16-bit original: --base {named[0] if named else 'MODEL'}"
        raise ModelError(f"the base is quantized with {method}", where=str(path), hint=hint)
    return config


def rewrite_config(
    base: Path, shards: Sequence[Shard], targets: Sequence[Shard], *, vocabulary: int | None
) -> dict[str, bytes]:
    """The base's config and index where its tensors get other forms or names; else nothing.

    `vocabulary`: how many tokens the embedding has, if the adapter changed that.
    """
    if list(shards) == list(targets):
        return {}
    config = json.loads((base / CONFIG).read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    if vocabulary is not None:
        config.get("text_config", config)["vocab_size"] = vocabulary
    after = {entry.name: entry for shard in targets for entry in shard.entries}
    files = {CONFIG: _to_json(config)}
    if (base / INDEX).is_file():
        index = json.loads((base / INDEX).read_text(encoding="utf-8"))
        index["weight_map"] = {name: file for name, file in index["weight_map"].items() if name in after}
        index.setdefault("metadata", {})["total_size"] = sum(entry.size for entry in after.values())
        files[INDEX] = _to_json(index)
    return files


def _to_json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
