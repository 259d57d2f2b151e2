"""The weights of a checkpoint as numbers, however it stores them: as they are, in bitsandbytes' 4 bit, FP8 or MXFP4.
Each is read when a merge or transformers' loader asks for it. And those of a base as a 4-bit run saw them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from bitsandbytes import functional
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from lorasft.errors import ModelError, reading
from lorasft.tensors import DTYPES, TensorFile, TensorSpec

NF4: dict[str, Any] = {"blocksize": 64, "quant_type": "nf4", "compress_statistics": True}  # as bitsandbytes is told
_STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(nf4|fp4)")
_NAMES = {DTYPES[name]: name for name in ("BF16", "F16", "F32")}
_MOST = 1 << 16  # bytes of a description; real ones have 200


@dataclass(frozen=True)
class StoredWeight:
    """A weight as it is to be, and what the files have of it."""

    spec: TensorSpec
    parts: Mapping[str, TensorFile]  # the tensors that it is made of; the first is the one in whose place it comes
    convert: Callable[..., Tensor] | None = None  # its numbers from these; None: they are stored as they are

    def read(self) -> Tensor:
        """The numbers, in the dtype that they were quantized from; FP8 in fp32. Raises ModelError for broken files."""
        with reading(f"{next(iter(self.parts))} does not fit its own description", AssertionError):
            parts = [file.read(name) for name, file in self.parts.items()]
            return self.convert(*parts) if self.convert else parts[0]

    def __getitem__(self, _: Any) -> Tensor:
        """The numbers: transformers asks for them by `[...]`."""
        return self.read()


def list_stored(files: Sequence[TensorFile]) -> dict[str, StoredWeight]:
    """The weights of a checkpoint by their names in 16 bits. Raises ModelError for one whose scales are not known."""
    places = {name: file for file in files for name in file.specs}
    found = _find_4bit(places) or _find_scaled(places)
    for name in places.keys() - {part for weight in found.values() for part in weight.parts}:
        found[name] = StoredWeight(places[name].specs[name], {name: places[name]})
        if found[name].spec.dtype.startswith(("F8", "F4")):
            what = f"{name} is {found[name].spec.dtype}, and its scales are not known"
            raise ModelError(what, where=places[name].path, hint="take the 16-bit original")
    return found


def _find_scaled(places: Mapping[str, TensorFile]) -> dict[str, StoredWeight]:
    """Those in FP8 (`weight`, `weight_scale_inv`) and MXFP4 (`..._blocks`, `..._scales`)."""
    found = {}
    for name, file in places.items():
        dtype, shape = file.specs[name].dtype, file.specs[name].shape
        weight, scales = name, f"{name}_scale_inv"
        convert: Callable[..., Tensor] = _scale_fp8
        if dtype == "U8" and name.endswith("_blocks") and len(shape) == 4:
            weight, scales, convert = name[:-7], f"{name[:-7]}_scales", _unpack_mxfp4
            shape = (shape[0], 2 * shape[2] * shape[3], shape[1])
        if dtype in ("F8_E4M3", "U8") and scales in places:
            unused = f"{name.removesuffix('weight')}activation_scale"
            parts = {part: places[part] for part in (name, scales, unused) if part in places}
            found[weight] = StoredWeight(TensorSpec("BF16", shape, 2 * math.prod(shape)), parts, convert)
    return found


def _scale_fp8(codes: Tensor, scales: Tensor, *_: Tensor) -> Tensor:
    """FP8 (..., rows, columns) -> fp32, which transformers' Fp8Dequantize casts from.

    A scale is for the whole weight, or for a block of 128 x 128 numbers or another power of two; the last may be cut
    off (DeepSeek-V3; transformers 5.23 does not read it).
    """
    numbers = codes.to(torch.float32)
    scales = (scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales).to(torch.float32)
    scales = scales.view(1, 1) if scales.dim() < 2 else scales
    for dim in (-2, -1):
        block = 1 << math.ceil(math.log2(numbers.shape[dim] / scales.shape[dim]))
        scales = scales.repeat_interleave(block, dim).narrow(dim, 0, numbers.shape[dim])
    return numbers.mul_(scales)


def _unpack_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Blocks (experts, out, groups, 16) of two codes in a byte, scales (experts, out, groups) -> (experts, in, out) in
    bf16, where each number is exact. An expert at a time: it takes several times its size."""
    numbers = torch.empty(len(blocks), blocks.shape[1], 32 * blocks.shape[2], dtype=torch.bfloat16).mT
    for number in range(len(blocks)):
        numbers[number] = convert_moe_packed_tensors(blocks[number, None], scales[number, None])[0]
    return numbers


def _find_4bit(places: Mapping[str, TensorFile]) -> dict[str, StoredWeight]:
    """Those of bitsandbytes. Raises ModelError where their description makes no sense."""
    found = {}
    for state in places:
        if (match := _STATE.fullmatch(state)) and match[1] in places:
            weight, file = match[1], places[state]
            names = [weight, *(name for name in places if name.startswith(f"{weight}."))]
            with reading(f"{state} is not what bitsandbytes writes", where=file.path):
                described = json.loads(file.read_bytes(state, 0, _MOST))
                dtype, shape = _NAMES[described["dtype"]], tuple(int(size) for size in described["shape"])
            spec = TensorSpec(dtype, shape, math.prod(shape) * (4 if dtype == "F32" else 2))
            parts = {name: places[name] for name in names}
            found[weight] = StoredWeight(spec, parts, partial(_unpack_4bit, names=names, shape=shape))
    return found


def _unpack_4bit(codes: Tensor, *parts: Tensor, names: Sequence[str], shape: tuple[int, ...]) -> Tensor:
    """The same bits as bitsandbytes' own."""
    state = dict(zip(names[1:], parts, strict=True))
    return _dequantize(codes, functional.QuantState.from_dict(state, device=torch.device("cpu"))).view(shape)


def nf4_view(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight put into NF4 and taken out again, in `dtype`, that of training: what a 4-bit run computed with.

    The same bits as `bitsandbytes.nn.Linear4bit` with double quantization, which the loader uses (a test compares). Of
    a stack of experts each matrix alone.
    """
    if weight.dim() == 3:
        return torch.stack([nf4_view(matrix, dtype) for matrix in weight])
    codes, state = functional.quantize_4bit(weight.to(dtype).contiguous(), **NF4)
    return _dequantize(codes, state).view(weight.shape)


def read_as_nf4(weights: Mapping[str, StoredWeight], dtype: torch.dtype, name: str, *, transposed: bool) -> Tensor:
    """The weight `name` as a 4-bit run saw it that joined `weights`, one below the other, to one.
    `transposed`: the run turned it before, as it is stored (in, out)."""
    whole = torch.cat([weight.read() for weight in weights.values()])
    whole = nf4_view(whole.mT, dtype).mT if transposed else nf4_view(whole, dtype)
    heights = [weight.spec.shape[0] for weight in weights.values()]
    return dict(zip(weights, torch.split(whole, heights), strict=True))[name]


def _dequantize(codes: Tensor, state: Any) -> Tensor:
    """As one row: bitsandbytes 0.50 is wrong on a CPU where its groups go over the ends of rows."""
    state.shape = torch.Size([math.prod(state.shape)])
    numbers: Tensor = functional.dequantize_4bit(codes.view(-1).view(torch.uint8).unsqueeze(1), state)
    return numbers.view(-1)
