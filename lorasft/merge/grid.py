"""The base's weights as a run in 4 bit saw them: put into NF4 and taken out again, a block of rows at a time.

No whole weight is needed: NF4 works on groups of 64 numbers, and what is kept of a weight between its two passes is 4
bits a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from accelerate import PartialState
from bitsandbytes.functional import (
    QuantState,
    dequantize_4bit,
    dequantize_blockwise,
    quantize_4bit,
    quantize_blockwise,
)
from torch import Tensor

from lorasft.artifact import Artifact
from lorasft.merge.blocks import Rows, Stored
from lorasft.merge.names import Places
from lorasft.merge.shards import Shard
from lorasft.model.base import compute_dtype, find_quantized, read_config

_GROUP = 64  # numbers that share a scale: what bitsandbytes does, and the loader with it
_PART = 1 << 18  # numbers quantized at once


def find_grid(artifact: Artifact, shards: Sequence[Shard]) -> dict[str, Callable[[Stored], Rows]]:
    """How a 4-bit run saw the tensors that it had in NF4, by their names in the files; none for other runs."""
    if artifact.model.quantization != "nf4":
        return {}
    trained = artifact.provenance.dtype if artifact.provenance else artifact.model.dtype
    dtype = compute_dtype(trained, PartialState().device)
    return {name: partial(Requantized, dtype=dtype) for name in find_quantized_tensors(artifact, shards)}


def find_quantized_tensors(artifact: Artifact, shards: Sequence[Shard]) -> list[str]:
    """The tensors that NF4 takes of the base, by their names in the files."""
    places = Places(shards, base=artifact.base)
    return [places.find(f"{path}.weight").name for path in find_quantized(read_config(str(artifact.base)))]


class Requantized:
    """A stored weight put into NF4 and taken out again, in the dtype of training: the weight that was trained against.

    The same bits as `bitsandbytes.nn.Linear4bit` with double quantization, which the loader uses (a test compares).
    """

    def __init__(self, stored: Stored, dtype: torch.dtype) -> None:
        self.stored, self.dtype = stored, dtype
        self.count = math.prod(stored.entry.shape)
        parts = [self._quantize(first) for first in range(0, self.count, _PART)]
        self.codes = [codes for codes, _ in parts]
        scales = torch.cat([state.absmax for _, state in parts])
        self.levels = parts[0][1].code
        offset = scales.mean()
        packed, second = quantize_blockwise(scales - offset, blocksize=256)
        self.scales = dequantize_blockwise(packed, second) + offset

    def read(self, first: int, count: int) -> Tensor:
        """Rows `first` to `first + count`, in the dtype of training: (count, width)."""
        width = self.stored.entry.width
        start, end = first * width, (first + count) * width
        parts = [self._dequantize(part) for part in range(start // _PART, -(-end // _PART))]
        skipped = start // _PART * _PART
        return torch.cat(parts)[start - skipped : end - skipped].view(count, width)

    def _quantize(self, first: int) -> tuple[Tensor, QuantState]:
        numbers = self.stored.numbers(first, min(_PART, self.count - first)).to(self.dtype)
        codes, state = quantize_4bit(numbers, blocksize=_GROUP, quant_type="nf4")
        return codes, state

    def _dequantize(self, part: int) -> Tensor:
        first = part * _PART
        count = min(_PART, self.count - first)
        scales = self.scales[first // _GROUP : -(-(first + count) // _GROUP)]
        state = QuantState(
            absmax=scales,
            shape=torch.Size([count]),
            dtype=self.dtype,
            blocksize=_GROUP,
            code=self.levels,
            quant_type="nf4",
        )
        numbers: Tensor = dequantize_4bit(self.codes[part], state)
        return numbers.view(-1)
