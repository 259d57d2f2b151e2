"""Safetensors files: which a folder has, whether they can be trusted, their tensors or some rows, and new ones."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lorasft.errors import ModelError, UnsafeError, reading

if TYPE_CHECKING:
    import torch

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Types that are computed with, in the words of safetensors and of torch. Tensors of any type are copied.
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "U8": "uint8", "I8": "int8"}
DTYPES |= {"F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu"}
_AGAIN = "download it again"
_FLUSH = 32 << 20  # bytes after which the system is asked to write them
_COPIED = 1 << 20  # bytes copied at once
_WAITING = 8  # blocks in memory that are not written yet: with fewer the disk's pauses are those of the computation


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor of a file looks like."""

    dtype: str  # in the words of safetensors, as BF16
    shape: tuple[int, ...]
    size: int  # bytes

    @property
    def torch_dtype(self) -> torch.dtype:
        """Raises KeyError for a type that is not in DTYPES."""
        import torch

        return getattr(torch, DTYPES[self.dtype])  # type: ignore[no-any-return]

    @property
    def rows(self) -> int:
        """Rows of the tensor seen as a matrix: all dimensions but the last; a vector is one row."""
        return math.prod(self.shape[:-1])

    @property
    def width(self) -> int:
        """Numbers in a row."""
        return self.shape[-1] if self.shape else 1


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file that was checked: its tensors in the order of their bytes."""

    path: Path
    specs: Mapping[str, TensorSpec]
    starts: Mapping[str, int]  # where the bytes of each begin in the file
    header: bytes  # the JSON
    metadata: Mapping[str, str] | None

    def read(self, name: str, first: int = 0, count: int | None = None) -> torch.Tensor:
        """Rows `first` to `first + count` of a tensor seen as a matrix, (count, width), or all of it in its own shape.

        Read and not mapped: mapped pages count in the size of the process. Raises KeyError for a type not in DTYPES.
        """
        import torch

        spec = self.specs[name]
        tensor = torch.empty(spec.shape if count is None else (count, spec.width), dtype=spec.torch_dtype)
        self._fill(tensor.view(-1).view(torch.uint8).numpy().data, name, first * spec.width * tensor.element_size())
        return tensor

    def read_bytes(self, name: str, start: int, size: int) -> bytearray:
        """Bytes `start` to `start + size` of a tensor, or up to its end."""
        content = bytearray(min(size, self.specs[name].size - start))
        self._fill(content, name, start)
        return content

    def _fill(self, buffer: bytearray | memoryview, name: str, start: int) -> None:
        with open(self.path, "rb") as file:
            file.seek(self.starts[name] + start)
            if file.readinto(buffer) != len(buffer):
                raise ModelError(f"{name} is cut short", where=self.path, hint=_AGAIN)


class TensorWriter:
    """Streams tensors to a safetensors file, in the order of `specs`; a thread writes while the next block is made."""

    def __init__(self, file: BinaryIO, specs: Mapping[str, TensorSpec], metadata: Any, thread: Executor) -> None:
        """Writes the header. `file`: new, and open for writing; `thread`: with one worker; `metadata`: or None."""
        self._file, self._sha256, self._thread, self._asked = file, hashlib.sha256(), thread, 0
        fields: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
        end = 0
        for name, spec in specs.items():
            fields[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": (end, end + spec.size)}
            end += spec.size
        header = json.dumps(fields, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        self._waiting: deque[Future[None]] = deque()
        self._submit(len(header).to_bytes(8, "little") + header)

    def write(self, block: torch.Tensor) -> None:
        """Append the numbers of `block`, which must not change any more."""
        import torch

        self._submit(block.contiguous().view(-1).view(torch.uint8).numpy().data)

    def copy(self, source: TensorFile, name: str) -> None:
        """Append a tensor of another file as its bytes are."""
        for start in range(0, source.specs[name].size, _COPIED):
            self._submit(source.read_bytes(name, start, _COPIED))

    def finish(self) -> str:
        """Wait until all is written. Returns the SHA-256 of the file, in hex."""
        while self._waiting:
            self._waiting.popleft().result()
        return self._sha256.hexdigest()

    def _submit(self, content: bytes | bytearray | memoryview) -> None:
        self._waiting.append(self._thread.submit(self._append, content))
        if len(self._waiting) > _WAITING:
            self._waiting.popleft().result()

    def _append(self, content: bytes | bytearray | memoryview) -> None:
        self._file.write(content)
        self._sha256.update(content)
        if self._file.tell() >= self._asked + _FLUSH:
            # Begins with the disk now, and waits for nothing: else all of it would wait for the fsync at the end.
            os.posix_fadvise(self._file.fileno(), self._asked, _FLUSH, os.POSIX_FADV_DONTNEED)
            self._asked += _FLUSH


def find_weights(folder: Path) -> list[Path]:
    """The safetensors files that a loader reads. Raises ModelError for a missing one, UnsafeError for pickles only."""
    index, paths = folder / INDEX, [folder / SINGLE]
    if index.is_file() and not paths[0].is_file():  # as transformers does
        with reading("this index names no shards", where=index, hint=_AGAIN):
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            paths = [folder / Path(name).name for name in names]  # none lies elsewhere
    elif not paths[0].is_file() and (pickles := sorted(folder.glob("*.bin"))):
        what = f"the weights are a pickle ({pickles[0].name}), which could run code when it is read"
        raise UnsafeError(what, where=folder, hint="convert them to safetensors, or take another copy")
    for path in paths:
        if not path.is_file():
            raise ModelError("these weights are missing", where=path, hint="the base must be there as safetensors")
    return paths


def open_tensors(path: Path) -> TensorFile:
    """Check a safetensors file, of which only the header is read. Raises ModelError for what cannot be trusted."""
    from safetensors import SafetensorError, safe_open

    what, hint = "cannot read the weights (a Git LFS pointer or a web page?)", f"git lfs pull, or {_AGAIN}"
    trusted = reading(what, SafetensorError, where=path, hint=hint)
    with trusted, safe_open(path, "np"), open(path, "rb") as file:  # the first refuses what is not to be trusted
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
        fields = json.loads(header)
    metadata = fields.pop("__metadata__", None)
    ordered = sorted((field["data_offsets"], name, field) for name, field in fields.items())
    specs = {name: TensorSpec(at["dtype"], tuple(at["shape"]), end - start) for (start, end), name, at in ordered}
    starts = {name: 8 + length + start for (start, _), name, _ in ordered}
    return TensorFile(path, specs, starts, header, metadata)


def fingerprint(model: Path) -> str:
    """What tells model folders apart, in hex: SHA-256 over the config, and of the weights the names, sizes and headers
    and the first 4 KiB of each tensor. A fine-tune of the same model differs in these; a whole read would take minutes.
    """
    digest = hashlib.sha256()
    config = model / "config.json"
    if config.is_file():
        digest.update(config.read_bytes())
    pattern = SINGLE if (model / SINGLE).is_file() and (model / INDEX).is_file() else "model*.safetensors"
    for path in sorted(model.glob(pattern)) or sorted(model.glob("*.safetensors")):
        found = open_tensors(path)
        digest.update(f"{path.name}\n{path.stat().st_size}\n".encode() + found.header)
        with open(path, "rb") as file:
            for start in found.starts.values():
                digest.update(os.pread(file.fileno(), 4096, start))
    return digest.hexdigest()
