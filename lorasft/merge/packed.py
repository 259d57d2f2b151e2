"""The 4-bit weights of bitsandbytes checkpoints: their numbers, a block of rows at a time."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorasft.errors import ModelError
from lorasft.merge.shards import DTYPES, Entry, Form, Shard

_STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(nf4|fp4)")
_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_KINDS = {"U8": torch.uint8, "I8": torch.int8, **DTYPES}
_MOST = 1 << 16  # bytes of a description; real ones have 200


@dataclass(frozen=True)
class Packed:
    """A weight of which a checkpoint stores codes of 4 bits, in groups that share a scale, and how to read them."""

    name: str
    form: Form  # of the numbers
    parts: dict[str, tuple[Shard, Entry]]  # codes under "", scales and tables under their names

    def open(self) -> Unpacked:
        """The numbers, to be read; the scales come into memory."""
        return Unpacked(self)


class Unpacked:
    """A 4-bit weight's numbers in the dtype that it was quantized from: the same bits as bitsandbytes' own."""

    def __init__(self, packed: Packed) -> None:
        from bitsandbytes.functional import QuantState, dequantize_blockwise

        parts = {name: read_tensor(*part) for name, part in packed.parts.items() if name}
        state = QuantState.from_dict(parts, device=torch.device("cpu"))
        if state.nested:
            state.absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset
        self.state, self.shard, codes = state, *packed.parts[""]
        self.first_byte = len(self.shard.header) + codes.start
        self.dtype = DTYPES[packed.form.dtype]
        size = math.prod(packed.form.shape) * self.dtype.itemsize
        self.entry = Entry(packed.name, packed.form.dtype, packed.form.shape, 0, size)

    def read(self, first: int, count: int) -> Tensor:
        """Rows `first` to `first + count`: (count, width)."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        width, group = self.entry.width, self.state.blocksize
        start, end = first * width, (first + count) * width
        low, high = start // group, -(-end // group)
        stop = min(high * group, self.entry.rows * width)
        content = bytearray(-(-(stop - low * group) // 2))
        with open(self.shard.path, "rb") as file:
            os.preadv(file.fileno(), [content], self.first_byte + low * group // 2)
        state = QuantState(
            absmax=self.state.absmax[low:high].float(),
            shape=torch.Size([stop - low * group]),
            dtype=self.dtype,
            blocksize=group,
            code=self.state.code,
            quant_type=self.state.quant_type,
        )
        numbers: Tensor = dequantize_4bit(torch.frombuffer(content, dtype=torch.uint8).unsqueeze(1), state)
        return numbers.view(-1)[start - low * group : end - low * group].view(count, width)


def find_packed(shards: Sequence[Shard]) -> dict[str, Packed]:
    """The 4-bit weights of a checkpoint by their names. Raises ModelError where their description makes no sense."""
    places = {entry.name: (shard, entry) for shard in shards for entry in shard.entries}
    packed = {}
    for name in places:
        match = _STATE.fullmatch(name)
        if match and match[1] in places:
            weight = match[1]
            parts = {part.removeprefix(f"{weight}."): places[part] for part in places if part.startswith(f"{weight}.")}
            packed[weight] = Packed(weight, _read_form(name, *places[name]), {"": places[weight], **parts})
            _refuse_nonsense(packed[weight])
    return packed


def unpacked_forms(packed: dict[str, Packed]) -> dict[str, Form | None]:
    """What the tensors of a checkpoint become when its weights are unpacked: None for what has no use any more."""
    forms: dict[str, Form | None] = {weight.name: weight.form for weight in packed.values()}
    return forms | {f"{weight.name}.{part}": None for weight in packed.values() for part in weight.parts if part}


def read_tensor(shard: Shard, entry: Entry) -> Tensor:
    """A small tensor of a shard."""
    content = bytearray(entry.size)
    with open(shard.path, "rb") as file:
        os.preadv(file.fileno(), [content], len(shard.header) + entry.start)
    return torch.frombuffer(content, dtype=_KINDS[entry.dtype]).view(entry.shape)


def _read_form(name: str, shard: Shard, entry: Entry) -> Form:
    try:
        if entry.dtype != "U8" or entry.size > _MOST:
            raise ValueError(f"{entry.size} bytes of {entry.dtype}")
        state: dict[str, Any] = json.loads(read_tensor(shard, entry).numpy().tobytes())
        return Form(_NAMES[state["dtype"]], tuple(int(size) for size in state["shape"]))
    except (ValueError, KeyError, TypeError) as fault:
        raise ModelError(f"{name} is not what bitsandbytes writes: {fault}", where=str(shard.path)) from None


def _refuse_nonsense(packed: Packed) -> None:
    shard, codes = packed.parts[""]
    kinds = {part: entry.dtype for part, (_, entry) in packed.parts.items()}
    count = math.prod(packed.form.shape)
    if len(packed.form.shape) != 2 or codes.size != -(-count // 2) or "absmax" not in kinds or "quant_map" not in kinds:
        raise ModelError(f"{packed.name} does not fit its own description", where=str(shard.path))
    if not kinds.items() <= {(part, kind) for part in kinds for kind in _KINDS}:
        raise ModelError(f"{packed.name} has parts of unknown types", where=str(shard.path))
