"""K-quants: by llama.cpp's own quantizer, which chooses a type for each matrix; what it wrote is read back."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from lorasft.errors import DeviceError

K_QUANTS = ("q4_k_m", "q5_k_m", "q6_k")
_PROBED = 4 << 20  # numbers compared of a tensor, in rows spread over it
_OFF = 0.5  # relative error: other numbers, or these in another order, have 1 and more, Q4_K less than 0.1
# In a process of its own, as llama.cpp ends the one that it is in where a model is not to its liking.
_CALL = """import ctypes, sys, llama_cpp
print("version:", llama_cpp.__version__, flush=True)
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = int(sys.argv[3])
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(params)))"""


def find_quantizer() -> tuple[str, list[str]]:
    """Name and command of llama.cpp's quantizer: on the PATH, else in a Python package. Raises DeviceError."""
    if tool := shutil.which("llama-quantize"):
        return "llama-quantize", [tool]
    if find_spec("llama_cpp"):
        return "llama-cpp-python", [sys.executable, "-P", "-c", _CALL]
    hint = "put llama-quantize of a llama.cpp release on the PATH, or pip install llama-cpp-python; or take --type q8_0"
    raise DeviceError("K-quants take llama.cpp's own quantizer, which is not here", hint=hint)


def quantize(source: Path, target: Path, *, kind: str) -> dict[str, Any]:
    """Quantize a GGUF into a new one, which has to have its fields and tensors. Returns which `quantizer` did it, the
    relative `error` of the weights, and how many `tensors` have which type. Raises DeviceError where it fails."""
    import gguf

    name, command = find_quantizer()
    words = [*command, str(source), str(target), str(int(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"]))]
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        said = done.stdout.decode(errors="replace").strip()
        if done.returncode:
            raise ValueError(f"exit code {done.returncode}, {said[-200:] or 'without a word'}")
        found = _compare(gguf, gguf.GGUFReader(source), gguf.GGUFReader(target))
    except (OSError, ValueError, LookupError) as error:
        what = f"{name} did not write this model as {kind}: {error}"
        raise DeviceError(what, where=command[0], hint="take a newer llama.cpp, or --type q8_0") from None
    version = re.search(r"(?:version|build)\s*[:=]\s*(.+)", said)
    return {"quantizer": f"{name} {version[1] if version else '(no version said)'}", **found}


def _compare(gguf: Any, before: Any, after: Any) -> dict[str, Any]:
    """Error and types of the tensors of one reader in another. Raises ValueError or LookupError for another model."""
    for key, field in before.fields.items():
        if not key.startswith("GGUF.") and field.contents() != after.fields[key].contents():  # those are counts
            raise ValueError(f"{key} is another")
    missed, whole, types = 0.0, 0.0, Counter[str]()
    ordered = (sorted(reader.tensors, key=lambda tensor: str(tensor.name)) for reader in (before, after))
    for tensors in zip(*ordered, strict=True):
        step = -(-tensors[0].n_elements // _PROBED)
        want, got = (gguf.quants.dequantize(one.data[::step], one.tensor_type).astype(float) for one in tensors)
        off, size, type = np.square(got - want).sum(), np.square(want).sum(), tensors[1].tensor_type.name
        if want.ndim > 1 and want.shape[1] % 256 == 0 and not type.endswith("_K"):
            raise ValueError(f"{tensors[1].name} is still {type}")
        if tensors[0].name != tensors[1].name or not off <= _OFF**2 * size:
            raise ValueError(f"{tensors[1].name}, read back from {type}, has other numbers than {tensors[0].name}")
        missed, whole = missed + off, whole + size
        types[type] += 1
    return {"error": float(missed / whole) ** 0.5, "tensors": types}
