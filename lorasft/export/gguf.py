"""A model folder into one GGUF file, a few rows at a time: names, order of rows and types as llama.cpp reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from lorasft.errors import DeviceError, ModelError
from lorasft.export.families import GgufLayout, read_gguf_layout, usual_converter
from lorasft.export.tokenizer import describe_tokenizer
from lorasft.files import make_folder, need_space, refuse_existing, staged_file
from lorasft.tensors import TensorFile, TensorSpec, find_weights, open_tensors

Kind = Literal["f16", "q8_0"]
Progress = Callable[[int, int], None]  # bytes written, bytes in all
_BLOCK = 4 << 20  # numbers held of a tensor at a time
_EYES = ("vision_tower.", "multi_modal_projector.")  # of a Gemma 3 that has these the language model is exported


@dataclass(frozen=True)
class Tensor:
    """A tensor on its way: where it lies, what it is called in the GGUF, and its type there."""

    shard: TensorFile
    source: str
    spec: TensorSpec  # as it is stored
    name: str
    type: Any  # gguf.GGMLQuantizationType
    size: int  # bytes


def write_gguf(model: Path, out: Path, *, kind: Kind = "f16", on_progress: Progress | None = None) -> dict[str, Any]:
    """Write the model in the folder `model`, with its tokenizer and chat template, to the new file `out`.

    Matrices become `kind`, what is not a matrix fp32. Raises ModelError for what llama.cpp would not read or compute
    alike, DeviceError without the package gguf, CapacityError when there is no room; then there is no `out`.
    """
    try:
        import gguf
    except ImportError:
        hint = "pip install 'lorasft[gguf]', or pip install gguf"
        raise DeviceError("the export needs the package gguf, which is not installed", hint=hint) from None
    refuse_existing(out)
    layout = read_gguf_layout(model)
    tokenizer = describe_tokenizer(model, layout.config.vocab_size)
    tensors = list(_find_tensors(gguf, model, layout, kind))
    total, done = sum(tensor.size for tensor in tensors), 0
    need_space(out.parent, total)
    make_folder(out.parent)
    with staged_file(out) as stage:
        _write_header(gguf, stage, layout=layout, tokenizer=tokenizer, tensors=tensors, kind=kind)
        with open(stage, "ab") as file:
            _pad(file)
            for values in layout.extra.values():
                file.write(np.array(values, np.float32).tobytes())
                _pad(file)
            for tensor in tensors:
                for block in _read_blocks(tensor, layout):
                    file.write(_convert(gguf, block, tensor))
                _pad(file)
                done += tensor.size
                if on_progress:
                    on_progress(done, total)
            size = file.tell()
    count = len(tensors) + len(layout.extra)
    return {"file": str(out), "architecture": layout.family.name, "type": kind, "tensors": count, "size": size}


def _find_tensors(gguf: Any, model: Path, layout: GgufLayout, kind: Kind) -> Iterator[Tensor]:
    """Every tensor of the folder with its place in the GGUF. Raises ModelError for one that has none."""
    architecture = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[layout.family.name]
    names = gguf.get_tensor_name_map(architecture, layout.config.num_hidden_layers)
    for shard in map(open_tensors, find_weights(model)):
        for source, spec in sorted(shard.specs.items()):
            plain = source.replace("language_model.", "", 1)
            tied_head = layout.config.tie_word_embeddings and plain == "lm_head.weight"
            if tied_head or plain.removeprefix("model.").startswith(_EYES) or plain.endswith("rotary_emb.inv_freq"):
                continue
            name = names.get_name(plain, (".weight", ".bias"))
            if name is None or (plain.endswith(".bias") and not layout.family.biases):
                what = f"{source} has no place in a GGUF of {layout.family.name}"
                raise ModelError(what, where=str(shard.path), hint=usual_converter(model))
            if spec.dtype not in ("BF16", "F16", "F32"):
                raise ModelError(f"{source} is {spec.dtype}", where=str(shard.path))
            # A matrix whose rows are not whole blocks of Q8_0 stays in fp16.
            chosen = "F32" if len(spec.shape) < 2 else "Q8_0" if kind == "q8_0" and not spec.width % 32 else "F16"
            type = gguf.GGMLQuantizationType[chosen]
            numbers, size = gguf.GGML_QUANT_SIZES[type]
            yield Tensor(shard, source, spec, name, type, spec.rows * spec.width // numbers * size)


def _write_header(
    gguf: Any, stage: Path, *, layout: GgufLayout, tokenizer: dict[str, Any], tensors: list[Tensor], kind: Kind
) -> None:
    writer = gguf.GGUFWriter(None, layout.family.name)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if kind == "f16" else gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    own = {f"{layout.family.name}.{name}": value for name, value in layout.fields.items()}
    for name, value in (own | tokenizer).items():
        add.get(type(value), writer.add_array)(name, value)
    for name, values in layout.extra.items():
        writer.add_tensor_info(name, (len(values),), np.dtype(np.float32), 4 * len(values))
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.spec.shape, np.dtype(np.float32), tensor.size, raw_dtype=tensor.type)
    writer.write_header_to_file(stage)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _read_blocks(tensor: Tensor, layout: GgufLayout) -> Iterator[torch.Tensor]:
    """The tensor in fp32, some rows at a time, as llama.cpp wants it. Whole heads, where their rows change places."""
    spec = tensor.spec
    turns = layout.family.paired and (".attn_q." in tensor.name or ".attn_k." in tensor.name)
    step = max(1, _BLOCK // spec.width)
    step = max(layout.head_size, step - step % layout.head_size) if turns else step
    for first in range(0, spec.rows, step):
        block = tensor.shard.read(tensor.source, first, min(step, spec.rows - first)).float()
        if turns:
            heads = block.view(-1, 2, layout.head_size // 2, block.shape[-1] if len(spec.shape) > 1 else 1)
            # Rows half a head apart, which transformers turns together, beside each other.
            block = heads.transpose(1, 2).reshape(block.shape)
        if layout.family.norm_offset and tensor.name.endswith("norm.weight"):
            block = block + layout.family.norm_offset
        yield block


def _convert(gguf: Any, block: torch.Tensor, tensor: Tensor) -> bytes:
    """Rows in the type of the GGUF. Raises ModelError for numbers that leave the range of fp16."""
    with np.errstate(over="ignore"):
        packed = gguf.quants.quantize(block.numpy(), tensor.type)
    halves = packed.reshape(-1, 34)[:, :2].copy().view(np.float16) if packed.dtype == np.uint8 else packed
    if not np.isfinite(halves).all():
        raise ModelError(f"{tensor.source} leaves the range of fp16", where=str(tensor.shard.path))
    content: bytes = packed.tobytes()
    return content


def _pad(file: Any) -> None:
    """Tensors begin at multiples of 32 bytes."""
    file.write(bytes(-file.tell() % 32))
