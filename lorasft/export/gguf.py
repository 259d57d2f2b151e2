"""A model folder into one GGUF file, a few rows at a time: names, order of rows and types as llama.cpp reads them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from lorasft.artifact import MERGE_RECORD
from lorasft.data.tokenizer import load_tokenizer
from lorasft.errors import DeviceError, ModelError
from lorasft.export.families import GgufLayout, read_gguf_layout, usual_converter
from lorasft.export.tokenizer import describe_tokenizer, find_raw_start
from lorasft.files import need_space, read_objects, staged_file
from lorasft.tensors import TensorFile, TensorSpec, find_weights, open_tensors

Kind = Literal["f16", "q8_0"]
_BLOCK = 4 << 20  # numbers held of a tensor at a time
_EYES = ("vision_tower.", "multi_modal_projector.")  # of a Gemma 3 that has these the language model is exported


@dataclass(frozen=True)
class Tensor:
    """A tensor on its way from a file into a GGUF. GGUFWriter asks `dtype`, `nbytes` and `tofile` of an array."""

    shard: TensorFile
    source: str
    spec: TensorSpec  # as it is stored
    name: str  # in the GGUF
    type: Any  # there: gguf.GGMLQuantizationType
    nbytes: int
    turned: int  # the rows of a head, where those half a head apart, which transformers turns together, go side by side
    offset: float  # is added
    dtype = np.dtype(np.float32)  # of no effect beside `type`

    def tofile(self, file: BinaryIO) -> None:
        """Write it, a few rows at a time, whole heads where their rows change places. Raises ModelError for numbers
        that leave the range of fp16."""
        import gguf

        unit = self.turned or 1
        step = max(1, _BLOCK // (self.spec.width * unit)) * unit
        for first in range(0, self.spec.rows, step):
            block = self.shard.read(self.source, first, min(step, self.spec.rows - first)).float()
            if self.turned:
                heads = block.view(-1, 2, self.turned // 2, block.shape[-1] if len(self.spec.shape) > 1 else 1)
                block = heads.transpose(1, 2).reshape(block.shape)
            if self.offset:
                block = block + self.offset
            with np.errstate(over="ignore"):
                packed = gguf.quants.quantize(block.numpy(), self.type)
            halves = packed.reshape(-1, 34)[:, :2].copy().view(np.float16) if packed.dtype == np.uint8 else packed
            if not np.isfinite(halves).all():
                raise ModelError(f"{self.source} leaves the range of fp16", where=self.shard.path)
            file.write(packed.tobytes())


def require_gguf() -> Any:
    """The package that writes GGUF. Raises DeviceError where it is not installed."""
    try:
        import gguf
    except ImportError:
        what = "the export needs the package gguf, which is not installed"
        raise DeviceError(what, hint="pip install gguf") from None
    return gguf


def write_gguf(model: Path, out: Path, *, kind: Kind = "f16") -> dict[str, Any]:
    """Write the model in the folder `model`, with its tokenizer and chat template, to the new file `out`.

    Matrices become `kind`, what is not a matrix fp32. Raises ModelError for what llama.cpp would not read or compute
    alike, DeviceError without the package gguf, CapacityError when there is no room; then there is no `out`. Returns
    what was written; `raw_start`: of find_raw_start; `short_context`: above which llama.cpp takes other factors for
    positions; `longest_row`: of training, where it is known.
    """
    gguf = require_gguf()
    layout = read_gguf_layout(model)
    tokenizer = describe_tokenizer(model, layout.config.vocab_size)
    tensors = list(_find_tensors(gguf, model, layout, kind))
    need_space(out.parent, sum(tensor.nbytes for tensor in tensors))
    with staged_file(out) as stage, closing(gguf.GGUFWriter(stage, layout.family.name)) as writer:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        own = {f"{layout.family.name}.{name}": value for name, value in layout.fields.items()}
        for name, value in (own | tokenizer).items():
            add.get(type(value), writer.add_array)(name, value)
        for name, values in layout.extra.items():
            writer.add_tensor(name, np.array(values, np.float32))
        for tensor in tensors:
            writer.add_tensor(tensor.name, tensor, raw_shape=tensor.spec.shape, raw_dtype=tensor.type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file(progress=sys.stderr.isatty())
    return {
        "file": str(out),
        "architecture": layout.family.name,
        "type": kind,
        "size": out.stat().st_size,
        "raw_start": find_raw_start(load_tokenizer(str(model))),
        "short_context": layout.fields.get("rope.scaling.original_context_length"),
        "longest_row": next(read_objects(model / MERGE_RECORD), {}).get("longest_row"),
    }


def _find_tensors(gguf: Any, model: Path, layout: GgufLayout, kind: Kind) -> Iterator[Tensor]:
    """Every tensor of the folder with its place in the GGUF. Raises ModelError for one that has none."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[layout.family.name.upper()], layout.config.num_hidden_layers)
    for shard in map(open_tensors, find_weights(model)):
        for source, spec in sorted(shard.specs.items()):
            plain = source.replace("language_model.", "", 1)
            tied_head = layout.config.tie_word_embeddings and plain == "lm_head.weight"
            if tied_head or plain.removeprefix("model.").startswith(_EYES) or plain.endswith("rotary_emb.inv_freq"):
                continue
            name = names.get_name(plain, (".weight", ".bias"))
            if name is None or (plain.endswith(".bias") and not layout.family.biases):
                what = f"{source} has no place in a GGUF of {layout.family.name}"
                raise ModelError(what, where=shard.path, hint=usual_converter(model))
            if spec.dtype not in ("BF16", "F16", "F32"):
                raise ModelError(f"{source} is {spec.dtype}", where=shard.path)
            # A matrix whose rows are not whole blocks of Q8_0 stays in fp16.
            chosen = "F32" if len(spec.shape) < 2 else "Q8_0" if kind == "q8_0" and not spec.width % 32 else "F16"
            type = gguf.GGMLQuantizationType[chosen]
            numbers, size = gguf.GGML_QUANT_SIZES[type]
            nbytes = spec.rows * spec.width // numbers * size
            paired = layout.family.paired and (".attn_q." in name or ".attn_k." in name)
            turned = layout.fields["attention.key_length"] if paired else 0
            offset = layout.family.norm_offset if name.endswith("norm.weight") else 0.0
            yield Tensor(shard, source, spec, name, type, nbytes, turned, offset)
