"""A model folder into one GGUF file, a few rows at a time: names, order of rows and types as llama.cpp reads them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from lorasft.errors import DeviceError, ModelError
from lorasft.export.families import Layout, read_layout, usual_converter
from lorasft.export.tokenizer import describe_tokenizer
from lorasft.files import need_space, refuse_existing, staged_file

Kind = Literal["f16", "q8_0"]
Progress = Callable[[int, int], None]  # bytes written, bytes in all
_BLOCK = 4 << 20  # numbers held of a tensor at a time
_READ = (torch.bfloat16, torch.float16, torch.float32)
_NOT_TEXT = ("vision_tower.", "multi_modal_projector.")  # of a Gemma 3 with eyes: its language model is exported
_PREFIXES = {
    "model.language_model.": "model.",
    "language_model.": "",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}


@dataclass(frozen=True)
class Tensor:
    """A tensor on its way: where it lies, what it is called in the GGUF, and its type there."""

    shard: Path
    source: str
    name: str
    shape: tuple[int, ...]
    type: Any  # gguf.GGMLQuantizationType
    size: int  # bytes


@dataclass(frozen=True)
class Written:
    """What an export did."""

    file: Path
    architecture: str
    type: str
    tensors: int
    size: int  # bytes of the file


def load_library() -> Any:
    """The package gguf, which is an extra. Raises DeviceError when it is not installed."""
    try:
        import gguf
    except ImportError:
        hint = "pip install 'lorasft[gguf]', or pip install gguf"
        raise DeviceError("the export needs the package gguf, which is not installed", hint=hint) from None
    return gguf


def write_gguf(model: Path, out: Path, *, kind: Kind = "f16", on_progress: Progress | None = None) -> Written:
    """Write the model in the folder `model`, with its tokenizer and chat template, to the new file `out`.

    Matrices become `kind`, what is no matrix fp32. Raises ModelError for what llama.cpp would not read or compute
    alike, DeviceError without the package gguf, CapacityError when there is no room; then there is no `out`.
    """
    gguf = load_library()
    refuse_existing(out)
    layout = read_layout(model)
    tokenizer = describe_tokenizer(model, layout.vocabulary)
    tensors = list(_plan(gguf, model, layout, kind))
    _check_complete(tensors, layout, model)
    total = sum(tensor.size for tensor in tensors)
    need_space(out.parent, total)
    with staged_file(out) as stage:
        _write_header(gguf, stage, layout=layout, tokenizer=tokenizer, tensors=tensors, kind=kind)
        with open(stage, "ab") as file:
            done = 0
            for values in layout.extra.values():
                _write_padded(file, np.array(values, np.float32))
            for tensor in tensors:
                for block in _blocks(tensor, layout):
                    _write(gguf, file, block, tensor)
                _pad(file)
                done += tensor.size
                if on_progress:
                    on_progress(done, total)
        size = stage.stat().st_size
    return Written(out, layout.family.name, kind, len(tensors) + len(layout.extra), size)


def _shards(model: Path) -> list[Path]:
    index = model / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    for name in names:
        if Path(name).name != name or not (model / name).is_file():
            raise ModelError(f"{name} is missing", where=str(model), hint="the weights must be there as safetensors")
    return [model / name for name in names]


def _plan(gguf: Any, model: Path, layout: Layout, kind: Kind) -> Iterator[Tensor]:
    """Every tensor of the folder with its place in the GGUF. Raises ModelError for one that has none."""
    from safetensors import SafetensorError, safe_open

    architecture = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[layout.family.name]
    names = gguf.get_tensor_name_map(architecture, layout.layers)
    for shard in _shards(model):
        try:
            with safe_open(shard, "pt") as file:
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as fault:
            raise ModelError(f"cannot read the weights: {fault}", where=str(shard)) from None
        for source, shape in shapes.items():
            plain = _without_prefix(source)
            tied_head = layout.tied and plain == "lm_head.weight"
            if plain.startswith(_NOT_TEXT) or tied_head or plain.endswith("rotary_emb.inv_freq"):
                continue
            name = names.get_name(plain, (".weight", ".bias"))
            if name is None or (plain.endswith(".bias") and not layout.family.biases):
                what = f"{source} has no place in a GGUF of {layout.family.name}"
                raise ModelError(what, where=str(shard), hint=usual_converter(model))
            yield _placed(gguf, Tensor(shard, source, name, shape, None, 0), kind)


def _without_prefix(name: str) -> str:
    for prefix, plain in _PREFIXES.items():
        if name.startswith(prefix):
            return plain + name[len(prefix) :]
    return name


def _placed(gguf: Any, tensor: Tensor, kind: Kind) -> Tensor:
    """The tensor with its type and size: a matrix whose rows are no whole blocks of Q8_0 stays in fp16."""
    types = gguf.GGMLQuantizationType
    chosen = types.F32
    if len(tensor.shape) > 1:
        chosen = types.Q8_0 if kind == "q8_0" and not tensor.shape[-1] % 32 else types.F16
    numbers, bytes_each = gguf.GGML_QUANT_SIZES[chosen]
    size = int(np.prod(tensor.shape)) // numbers * bytes_each
    return Tensor(tensor.shard, tensor.source, tensor.name, tensor.shape, chosen, size)


def _check_complete(tensors: list[Tensor], layout: Layout, model: Path) -> None:
    """Every layer has the tensors that the first one has, and there are embedding, last norm and head."""
    names = [tensor.name for tensor in tensors]
    needed = {"token_embd.weight", "output_norm.weight"} | (set() if layout.tied else {"output.weight"})
    of_layer = {name.removeprefix("blk.0.") for name in names if name.startswith("blk.0.")}
    needed |= {f"blk.{at}.{name}" for at in range(layout.layers) for name in of_layer or {"attn_norm.weight"}}
    if missing := sorted(needed.difference(names)):
        raise ModelError(f"the weights lack {missing[0]} ({len(missing)} missing)", where=str(model))
    if len(names) != len(needed):
        what = "tensors twice" if len(set(names)) < len(names) else "tensors that other layers lack"
        raise ModelError(f"the weights have {what}", where=str(model))
    shape = next(tensor.shape for tensor in tensors if tensor.name == "token_embd.weight")
    if shape[0] != layout.vocabulary:
        raise ModelError(f"the embedding has {shape[0]} rows, the config says {layout.vocabulary}", where=str(model))


def _write_header(
    gguf: Any, stage: Path, *, layout: Layout, tokenizer: dict[str, Any], tensors: list[Tensor], kind: Kind
) -> None:
    writer = gguf.GGUFWriter(None, layout.family.name)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if kind == "f16" else gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    own = {f"{layout.family.name}.{name}": value for name, value in layout.fields.items()}
    for name, value in (own | tokenizer).items():
        _add_field(writer, name, value)
    for name, values in layout.extra.items():
        writer.add_tensor_info(name, (len(values),), np.dtype(np.float32), 4 * len(values))
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.size, raw_dtype=tensor.type)
    writer.write_header_to_file(stage)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with open(stage, "ab") as file:
        _pad(file)


def _add_field(writer: Any, name: str, value: Any) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add.get(type(value), writer.add_array)(name, value)


def _blocks(tensor: Tensor, layout: Layout) -> Iterator[np.ndarray[Any, Any]]:
    """The tensor in fp32, some rows at a time, as llama.cpp wants it. Whole heads, where their rows change places."""
    from safetensors import safe_open

    turns = layout.family.paired and (".attn_q." in tensor.name or ".attn_k." in tensor.name)
    step = max(1, _BLOCK // int(np.prod(tensor.shape[1:], dtype=int)))
    step = max(layout.head_size, step - step % layout.head_size) if turns else step
    with safe_open(tensor.shard, "pt") as file:
        rows = file.get_slice(tensor.source)
        for start in range(0, tensor.shape[0], step):
            block = rows[start : start + step]
            if block.dtype not in _READ:
                raise ModelError(f"{tensor.source} is {block.dtype}", where=str(tensor.shard))
            numbers = block.float()
            if turns:
                numbers = _pair_rows(numbers, layout.head_size)
            if layout.family.norm_offset and tensor.name.endswith("norm.weight"):
                numbers = numbers + layout.family.norm_offset
            yield numbers.numpy()


def _pair_rows(rows: torch.Tensor, head_size: int) -> torch.Tensor:
    """Rows half a head apart, which transformers turns together, beside each other. rows: (heads * head_size, ...)."""
    heads = rows.reshape(-1, 2, head_size // 2, *rows.shape[1:])
    return heads.transpose(1, 2).reshape(rows.shape)


def _write(gguf: Any, file: Any, block: np.ndarray[Any, Any], tensor: Tensor) -> None:
    with np.errstate(over="ignore"):
        packed = gguf.quants.quantize(block, tensor.type)
    halves = packed.reshape(-1, 34)[:, :2].copy().view(np.float16) if packed.dtype == np.uint8 else packed
    if not np.isfinite(halves).all():
        raise ModelError(f"{tensor.source} leaves the range of fp16", where=str(tensor.shard))
    file.write(packed.tobytes())


def _write_padded(file: Any, values: np.ndarray[Any, Any]) -> None:
    file.write(values.tobytes())
    _pad(file)


def _pad(file: Any) -> None:
    """Tensors begin at multiples of 32 bytes."""
    file.write(bytes(-file.tell() % 32))
