"""4-bit weights as numbers: those that checkpoints of bitsandbytes store, and a base's as a 4-bit run saw them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from bitsandbytes import functional
from torch import Tensor

from lorasft.errors import ModelError
from lorasft.tensors import DTYPES, TensorFile, TensorSpec

_STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(nf4|fp4)")
_NAMES = {DTYPES[name]: name for name in ("BF16", "F16", "F32")}
_MOST = 1 << 16  # bytes of a description; real ones have 200


def read_packed(weight: str, spec: TensorSpec, files: Mapping[str, TensorFile]) -> Tensor:
    """The numbers of a weight that find_packed found, in the dtype that they were quantized from: the same bits as
    bitsandbytes' own."""
    try:
        parts = {name.removeprefix(f"{weight}."): file.read(name) for name, file in files.items()}
        codes = parts.pop(weight)
        state = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
        return _dequantize(codes, state).view(spec.shape)
    except (KeyError, ValueError, RuntimeError, AssertionError) as error:
        raise ModelError(f"{weight} does not fit its own description: {error}") from None


def find_packed(files: Sequence[TensorFile]) -> dict[str, tuple[TensorSpec, dict[str, TensorFile]]]:
    """The 4-bit weights of a checkpoint by their names: what their numbers look like, and the files of codes, scales
    and tables by the names of their tensors. Raises ModelError where their description makes no sense."""
    places = {name: file for file in files for name in file.specs}
    found = {}
    for state in places:
        if (match := _STATE.fullmatch(state)) and match[1] in places:
            weight, file = match[1], places[state]
            parts = {name: file for name, file in places.items() if name == weight or name.startswith(f"{weight}.")}
            try:
                described = json.loads(file.read_bytes(state, 0, _MOST))
                dtype, shape = _NAMES[described["dtype"]], tuple(int(size) for size in described["shape"])
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ModelError(f"{state} is not what bitsandbytes writes: {error}", where=str(file.path)) from None
            spec = TensorSpec(dtype, shape, math.prod(shape) * (4 if dtype == "F32" else 2))
            found[weight] = (spec, parts)
    return found


def nf4_view(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight put into NF4 and taken out again, in `dtype`, that of training: what a 4-bit run computed with.

    The same bits as `bitsandbytes.nn.Linear4bit` with double quantization, which the loader uses (a test compares). Of
    a stack of experts each matrix alone.
    """
    if weight.dim() == 3:
        return torch.stack([nf4_view(matrix, dtype) for matrix in weight])
    quantize = functional.quantize_4bit
    codes, state = quantize(weight.to(dtype).contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4")
    return _dequantize(codes, state).view(weight.shape)


def read_as_nf4(files: Mapping[str, TensorFile], dtype: torch.dtype, name: str, *, transposed: bool) -> Tensor:
    """The tensor `name` as a 4-bit run saw it that joined those of `files`, one below the other, to one weight.

    `transposed`: the run turned it before, as it is stored (in, out).
    """
    whole = torch.cat([file.read(one) for one, file in files.items()])
    whole = nf4_view(whole.mT, dtype).mT if transposed else nf4_view(whole, dtype)
    heights = [file.specs[one].shape[0] for one, file in files.items()]
    return dict(zip(files, torch.split(whole, heights), strict=True))[name]


def _dequantize(codes: Tensor, state: Any) -> Tensor:
    """As one row: bitsandbytes 0.50 is wrong on a CPU where its groups go over the ends of rows."""
    state.shape = torch.Size([math.prod(state.shape)])
    numbers: Tensor = functional.dequantize_4bit(codes.view(-1).view(torch.uint8).unsqueeze(1), state)
    return numbers.view(-1)
