"""Safetensors files as their headers say: which tensors, of what type and shape, at which bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorasft.tensors import open_tensors

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class Form:
    """What a tensor looks like."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """A tensor of a shard: its place counts from the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def form(self) -> Form:
        return Form(self.dtype, self.shape)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start

    @property
    def rows(self) -> int:
        """Rows of the tensor seen as a matrix: all dimensions but the last; a vector is one row."""
        return math.prod(self.shape[:-1])

    @property
    def width(self) -> int:
        """Numbers in a row."""
        return self.shape[-1] if self.shape else 1


@dataclass(frozen=True)
class Shard:
    """A safetensors file: its header as it stands and its tensors in the order of their bytes."""

    path: Path
    header: bytes  # the length and the JSON behind it
    entries: tuple[Entry, ...]

    @property
    def size(self) -> int:
        return len(self.header) + (self.entries[-1].end if self.entries else 0)


def reform_shard(shard: Shard, forms: Mapping[str, Form | None]) -> Shard:
    """The shard with tensors in other forms, and without those whose form is None; its own header if there are none."""
    if all(entry.name not in forms or forms[entry.name] == entry.form for entry in shard.entries):
        return shard
    fields: dict[str, Any] = {}
    metadata = json.loads(shard.header[8:]).get("__metadata__")
    if metadata is not None:
        fields["__metadata__"] = metadata
    entries: list[Entry] = []
    for entry in shard.entries:
        form = forms.get(entry.name, entry.form)
        if form is not None:
            start = entries[-1].end if entries else 0
            size = entry.size if form == entry.form else math.prod(form.shape) * DTYPES[form.dtype].itemsize
            end = start + size
            entries.append(Entry(entry.name, form.dtype, form.shape, start, end))
            fields[entry.name] = {"dtype": form.dtype, "shape": form.shape, "data_offsets": (start, end)}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return Shard(shard.path, len(text).to_bytes(8, "little") + text, tuple(entries))


def read_shard(path: Path) -> Shard:
    """The header of a safetensors file. Raises ModelError when it is none, or is cut short."""
    found = open_tensors(path)
    size = 8 + len(found.header)
    entries = [
        Entry(name, spec.dtype, spec.shape, found.starts[name] - size, found.starts[name] - size + spec.size)
        for name, spec in found.specs.items()
    ]
    return Shard(path, len(found.header).to_bytes(8, "little") + found.header, tuple(entries))
