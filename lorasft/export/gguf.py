"""A model folder into one GGUF file, a few rows at a time, or an adapter alone, which llama.cpp and Ollama put on a
GGUF of its base: names, order of rows and types as llama.cpp reads them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from lorasft.adapter_files import PREFIX, list_adapted, lora_scale, read_adapter_weights
from lorasft.artifact import MERGE_RECORD, Artifact
from lorasft.data.tokenizer import load_tokenizer
from lorasft.errors import DeviceError, ModelError, reading
from lorasft.export.families import GgufLayout, not_converted, read_gguf_layout
from lorasft.export.quantize import K_QUANTS, quantize
from lorasft.export.tokenizer import describe_tokenizer, find_raw_start
from lorasft.files import make_folder, need_space, read_objects, scratch_folder, staged_file
from lorasft.tensors import TensorFile, find_weights, open_tensors
from lorasft.terminal import quote

Kind = Literal["f16", "bf16", "q8_0", "q4_k_m", "q5_k_m", "q6_k"]
_BLOCK = 4 << 20  # numbers held of a tensor at a time
_EYES = ("vision_tower.", "multi_modal_projector.")  # of a Gemma 3 that has these the language model is exported


@dataclass(frozen=True)
class Tensor:
    """A tensor on its way from a file into a GGUF. GGUFWriter asks `dtype`, `nbytes` and `tofile` of an array."""

    shard: TensorFile
    source: str
    shape: tuple[int, ...]
    type: Any  # there: gguf.GGMLQuantizationType
    nbytes: int
    turned: int  # of GgufLayout
    offset: float  # is added
    dtype = np.dtype(np.float32)  # of no effect beside `type`

    def tofile(self, file: BinaryIO) -> None:
        """Write it, a few rows at a time, whole heads where their rows change places. Raises ModelError for numbers
        that leave the range of the type."""
        import gguf

        unit, rows = self.turned or 1, math.prod(self.shape[:-1])
        step = max(1, _BLOCK // (self.shape[-1] * unit)) * unit
        for first in range(0, rows, step):
            block = self.shard.read(self.source, first, min(step, rows - first)).float().numpy()
            block = turn_heads(block if rows > 1 else block[0], self.turned)
            with np.errstate(over="ignore", invalid="ignore"):
                packed = gguf.quants.quantize(block + self.offset if self.offset else block, self.type)
                finite = np.isfinite(gguf.quants.dequantize(packed, self.type)).all()
            if not finite:
                raise ModelError(f"{self.source} leaves the range of {self.type.name}", where=self.shard.path)
            file.write(packed.tobytes())


def turn_heads(rows: Any, turned: int) -> Any:
    """Rows of whole heads, or a vector, as GgufLayout.turned says: those of a head's two halves in turns."""
    return rows.reshape(-1, 2, turned // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape) if turned else rows


def require_gguf() -> Any:
    """The package that writes GGUF. Raises DeviceError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise DeviceError("the export needs gguf, which is not installed", hint="pip install gguf") from None
    return gguf


def write_gguf(model: Path, out: Path, *, kind: Kind = "f16") -> dict[str, Any]:
    """Write the model in the folder `model`, with its tokenizer and chat template, to the new file `out`.

    Matrices become `kind`, what is not a matrix fp32. Raises ModelError for what llama.cpp would not read or compute
    alike, DeviceError without the package gguf or the quantizer, CapacityError when there is no room; then there is no
    `out`. Returns what was written, and what quantize found; `raw_start`: of find_raw_start; `short_context`: above
    which llama.cpp takes other factors for positions; `longest_row`: of training, where it is known.
    """
    gguf = require_gguf()
    layout = read_gguf_layout(model)
    tokenizer = describe_tokenizer(model, layout.config.vocab_size)
    tensors = dict(_find_tensors(gguf, model, layout, kind))
    size = sum(tensor.nbytes for tensor in tensors.values())
    need_space(out.parent, size * 8 // 5 if kind in K_QUANTS else size)  # at most Q8_0, 8.5 bits, beside what had 16
    own = {f"{layout.family.name}.{name}": value for name, value in layout.fields.items()}
    own["general.file_type"] = int(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])
    with scratch_folder(out) as scratch, staged_file(out) as stage:
        whole = scratch / "whole.gguf" if kind in K_QUANTS else stage
        write_fields(whole, layout, {"general.type": "model"} | own | tokenizer, layout.extra | tensors)
        found = quantize(whole, stage, kind=kind) if kind in K_QUANTS else {}
    return found | {
        "file": str(out),
        "architecture": layout.family.name,
        "type": kind,
        "size": out.stat().st_size,
        "raw_start": find_raw_start(load_tokenizer(str(model))),
        "short_context": layout.fields.get("rope.scaling.original_context_length"),
        "longest_row": next(read_objects(model / MERGE_RECORD), {}).get("longest_row"),
    }


def write_gguf_lora(artifact: Artifact, out: Path) -> dict[str, Any]:
    """Write the adapter of `artifact` to the new file `out`, in fp32, and read back what it does to a vector.

    llama.cpp computes alpha / rank * B A with one alpha (src/llama-adapter.h): what rslora and patterns scale otherwise
    goes into B. Raises ModelError for what it has no place for; then there is no `out`. Returns what was written.
    """
    gguf, folder, config = require_gguf(), artifact.require_adapter(), artifact.adapter_config
    layout = read_gguf_layout(artifact.base)
    artifact.verify()
    weights, find_name, alpha = read_adapter_weights(folder), name_tensors(layout), float(config["lora_alpha"])
    left = {*weights, *filter(None, [config.get("init_lora_weights")])}  # a start that changed the base
    tensors: dict[str, Any] = {}
    probes: dict[str, Any] = {}
    for path in list_adapted(weights, config):
        name, pair = find_name(f"{path}.weight"), {f"{PREFIX}{path}.lora_{part}.weight" for part in "AB"}
        tied_head = layout.config.tie_word_embeddings and name == "output.weight"
        if name is None or tied_head or not pair <= weights.keys():
            continue
        left -= pair
        a, b = (weights[key].float().numpy() for key in sorted(pair))
        factor, turned = lora_scale(config, path)[1], layout.turned(name)
        with reading(f"{path} has shapes that do not fit", where=folder, hint="train it again"):
            scaled = turn_heads(b * np.float32(factor * len(a) / alpha), turned)
            given = np.random.default_rng(0).standard_normal(a.shape[1])
            probes[name] = given, turn_heads(factor * (b @ (a @ given)), turned)
        tensors |= {f"{name}.lora_a": a, f"{name}.lora_b": scaled}
    if left:
        what, hint = f"llama.cpp's adapters have no place for {min(left)}", "merge it: lorasft export "
        raise ModelError(what, where=folder, hint=f"{hint}{quote(artifact.name)} --to gguf")
    make_folder(out.absolute().parent)
    with staged_file(out) as stage:
        fields = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": alpha}
        origin = {"general.base_model.count": 1, "general.base_model.0.name": Path(artifact.model.base).name}
        write_fields(stage, layout, fields | origin, tensors)
        read = {tensor.name: tensor.data for tensor in gguf.GGUFReader(stage).tensors}
        for name, (given, wanted) in probes.items():
            a, b = (read[f"{name}.lora_{part}"] for part in "ab")
            off = np.linalg.norm(alpha / len(a) * (b @ (a @ given)) - wanted)
            if not off <= 1e-5 * np.linalg.norm(wanted):
                raise ModelError(f"read back, {name} does not do what the adapter does", where=folder)
    return {"file": str(out), "architecture": layout.family.name, "type": "f32", "size": out.stat().st_size}


def write_fields(file: Path, layout: GgufLayout, fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Write a new GGUF for models of `layout`, from fields and from tensors: arrays, or what is like Tensor."""
    gguf = require_gguf()
    with closing(gguf.GGUFWriter(file, layout.family.name)) as writer:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        for name, value in fields.items():
            add.get(type(value), writer.add_array)(name, value)
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor, raw_dtype=getattr(tensor, "type", None))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file(progress=sys.stderr.isatty())


def name_tensors(layout: GgufLayout) -> Callable[[str], str | None]:
    """What gives a weight or bias of a checkpoint its name in a GGUF; None where it has no place there."""
    gguf = require_gguf()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[layout.family.name.upper()], layout.config.num_hidden_layers)
    return lambda source: names.get_name(source.replace("language_model.", "", 1), (".weight", ".bias"))


def _find_tensors(gguf: Any, model: Path, layout: GgufLayout, kind: Kind) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the folder with its name in the GGUF. Raises ModelError for one that has none."""
    find_name = name_tensors(layout)
    for shard in map(open_tensors, find_weights(model)):
        for source, spec in sorted(shard.specs.items()):
            plain = source.replace("language_model.", "", 1)
            tied_head = layout.config.tie_word_embeddings and plain == "lm_head.weight"
            if tied_head or plain.removeprefix("model.").startswith(_EYES) or plain.endswith("rotary_emb.inv_freq"):
                continue
            if spec.dtype not in ("BF16", "F16", "F32"):
                what = f"the model is quantized: {source} is {spec.dtype}"
                raise ModelError(what, where=shard.path, hint="export 16-bit weights, such as merge writes")
            name = find_name(source)
            if name is None or (plain.endswith(".bias") and not layout.family.biases):
                raise not_converted(f"{source} has no place in a GGUF of {layout.family.name}", shard.path)
            # A matrix whose rows are not whole blocks of Q8_0 stays in fp16; one to be quantized later stays as it is.
            chosen = spec.dtype if kind in K_QUANTS else "F16" if kind == "q8_0" and spec.width % 32 else kind.upper()
            chosen = chosen if len(spec.shape) > 1 else "F32"
            type = gguf.GGMLQuantizationType[chosen]
            nbytes = math.prod(gguf.quants.quant_shape_to_byte_shape(spec.shape, type))
            offset = layout.family.norm_offset if name.endswith("norm.weight") else 0.0
            yield name, Tensor(shard, source, spec.shape, type, nbytes, layout.turned(name), offset)
