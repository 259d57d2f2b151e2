"""Safetensors files before a tensor is read: which there are, and whether a header can be trusted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from lorasft.errors import ModelError, UnsafeError

INDEX = "model.safetensors.index.json"
BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8}
LARGEST_HEADER = 100 << 20  # bytes: safetensors' own limit
_AGAIN = "download it again"


def find_weights(folder: Path) -> list[Path]:
    """The safetensors files that a loader reads: those of the index, else the single one. Others are left aside.

    Raises ModelError when one is not there, UnsafeError when there are pickles only.
    """
    index = folder / INDEX
    names = _read_index(index) if index.is_file() else ["model.safetensors"]
    for name in names:
        if Path(name).name != name:
            raise ModelError(f"the index names a file outside its folder: {name}", where=str(index), hint=_AGAIN)
        if not (folder / name).is_file():
            pickles = [path.name for path in sorted(folder.glob("*.bin"))]
            if pickles and not index.is_file():
                what = f"the weights are a pickle ({pickles[0]}), which could run code when it is read"
                raise UnsafeError(what, where=str(folder), hint="convert them to safetensors, or take another copy")
            raise ModelError(f"{name} is missing", where=str(folder), hint="the base must be there as safetensors")
    return [folder / name for name in names]


def read_header(path: Path, *, largest: int = LARGEST_HEADER) -> tuple[bytes, dict[str, Any]]:
    """The first bytes of a safetensors file, up to its data, and what they say of each tensor.

    Raises ModelError for what is none, is cut short, or has a header of over `largest` bytes.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size, largest):  # else these bytes may be those of any length
            if prefix == b"version ":
                raise ModelError("this is a Git LFS pointer, not the weights", where=str(path), hint="git lfs pull")
            page = prefix.lstrip().startswith(b"<")
            what = (
                "this is a web page (HTML), not the weights" if page else "not a safetensors file, or a header too long"
            )
            raise ModelError(what, where=str(path), hint=_AGAIN)
        text = file.read(length)
    try:
        fields = json.loads(text)
        ends = [_check(name, field) for name, field in fields.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as fault:
        raise ModelError(f"bad safetensors header: {fault}", where=str(path), hint=_AGAIN) from None
    wanted = 8 + len(text) + max(ends, default=0)
    if wanted != size:
        raise ModelError(f"{size:,} bytes, its header says {wanted:,}", where=str(path), hint=_AGAIN)
    return prefix + text, fields


def _check(name: str, field: dict[str, Any]) -> int:
    """Where a tensor's bytes end. Raises ValueError and the like for what is no entry of a header."""
    start, end = field["data_offsets"]
    shape = field["shape"]
    if not isinstance(field["dtype"], str) or not isinstance(shape, list):
        raise ValueError(f"{name} has no dtype and shape")
    if len(shape) > 16 or not all(type(n) is int and 0 <= n < 1 << 62 for n in (start, end, *shape)):
        raise ValueError(f"{name} has odd numbers")
    if (end - start) * 8 != math.prod(shape) * BITS.get(field["dtype"], 0) and field["dtype"] in BITS:
        raise ValueError(f"the bytes of {name} are not those of {field['dtype']} {shape}")
    return int(end)


def _read_index(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ModelError("this index names no shards", where=str(index), hint=_AGAIN) from None
