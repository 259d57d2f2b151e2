"""Stand-ins for llama.cpp's `llama-quantize`: scripts on the PATH that are called as it is."""

from __future__ import annotations

import sys
from pathlib import Path

START = """
import shutil, sys
from pathlib import Path
source, target, kind = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
print("version: 7 (of a stand-in)")
"""
# Every matrix in one type, by the quantizer of llama.cpp's own library ggml, which the wheel xllamacpp has inside.
QUANTIZE_BY_GGML = """
import ctypes, math
import gguf, numpy, xllamacpp.xllamacpp
ggml = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
pointer, number = ctypes.c_void_p, ctypes.c_int64
ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
type = gguf.GGMLQuantizationType[{15: "Q4_K", 17: "Q5_K", 18: "Q6_K"}[kind]]
reader = gguf.GGUFReader(source)
writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
for key, field in reader.fields.items():
    if not key.startswith("GGUF.") and key != "general.architecture":
        writer.add_key_value(key, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
for tensor in reader.tensors:
    values = numpy.ascontiguousarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), numpy.float32)
    if values.ndim < 2:
        writer.add_tensor(tensor.name, values)
        continue
    numbers, size = gguf.GGML_QUANT_SIZES[type]
    blocks = numpy.empty((len(values), values.shape[1] // numbers * size), numpy.uint8)
    ggml.ggml_quantize_chunk(type, values.ctypes.data, blocks.ctypes.data, 0, *values.shape, None)
    writer.add_tensor(tensor.name, blocks, raw_dtype=type)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""


def make_tool(folder: Path, body: str, *, start: str = START) -> Path:
    """A `llama-quantize` in the new folder, which is returned: for the PATH."""
    folder.mkdir()
    tool = folder / "llama-quantize"
    tool.write_text(f"#!{sys.executable} -u\n{start}{body}", encoding="utf-8")
    tool.chmod(0o755)
    return folder
