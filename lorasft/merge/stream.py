"""Full weights, shard by shard, in the memory of a few rows: a checkpoint's own layout with some tensors updated.

Only names, dtypes and shapes of the files count, never the modules that transformers makes of them. Headers are
copied as they stand; a tensor that no update names is copied as bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from lorasft.errors import ModelError
from lorasft.files import need_space, new_file, refuse_existing, staged_folder
from lorasft.merge.fold import Update, fold, read_updates

_BLOCK = 4 << 20  # bytes held of a tensor at a time
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_CONV1D_MODELS = {"gpt2", "openai-gpt"}  # their checkpoints store linears (in, out)
_SIDECARS = {".json", ".txt", ".model", ".jinja", ".tiktoken"}
_GENERATION = "generation_config.json"
_INDEX = "model.safetensors.index.json"

Progress = Callable[[int, int], None]  # bytes written, bytes in all


@dataclass(frozen=True)
class Entry:
    """A tensor of a shard: its place counts from the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Shard:
    """A safetensors file: its header as it stands and its tensors in the order of their bytes."""

    path: Path
    header: bytes  # the length and the JSON behind it
    entries: tuple[Entry, ...]

    @property
    def size(self) -> int:
        return len(self.header) + (self.entries[-1].end if self.entries else 0)


@dataclass(frozen=True)
class Merged:
    """What a merge did."""

    folder: Path
    updated: int  # tensors that an update was added to
    unchanged: int  # of these, how many the rounding left as they were
    copied: int  # tensors copied as they are
    size: int  # bytes of weights


def merge(base: Path, adapter: Path, out: Path, *, on_progress: Progress | None = None) -> Merged:
    """Write `base` with `adapter` folded in to the new folder `out`.

    Raises ModelError before anything is written when the adapter does not fit, CapacityError when `out` has no
    room; a failed merge leaves nothing under `out`.
    """
    refuse_existing(out)
    refuse_overlap(out, base, adapter)
    config = _read_config(base)
    shards = [read_shard(path) for path in find_shards(base)]
    updates = place_updates(read_updates(adapter, conv1d=config["model_type"] in _CONV1D_MODELS), shards, base=base)
    total = sum(shard.size for shard in shards)
    need_space(out, total)
    unchanged = done = 0
    with staged_folder(out) as stage:
        for shard in shards:
            with open(shard.path, "rb") as source, new_file(stage / shard.path.name) as target:
                target.write(shard.header)
                for entry in shard.entries:
                    source.seek(len(shard.header) + entry.start)
                    if entry.name in updates:
                        unchanged += not _write_updated(source, target, entry, updates[entry.name])
                    else:
                        _copy(source, target, entry.end - entry.start)
                    done += entry.end - entry.start
                    if on_progress:
                        on_progress(done, total)
        _copy_sidecars(base, adapter, stage)
        _check_shards(stage, shards)
    if unchanged == len(updates):
        shutil.rmtree(out)
        raise ModelError(
            "no weight changed: the adapter is empty, or too small for the base's dtype", where=str(adapter)
        )
    tensors = sum(len(shard.entries) for shard in shards)
    return Merged(out, len(updates), unchanged, tensors - len(updates), total)


def find_shards(base: Path) -> list[Path]:
    """The safetensors files that a loader reads: those of the index, else the single one. Others are left aside."""
    index = base / _INDEX
    names = _read_index(index) if index.is_file() else ["model.safetensors"]
    for name in names:
        if Path(name).name != name:
            raise ModelError(f"the index names a file outside its folder: {name}", where=str(index))
        if not (base / name).is_file():
            raise ModelError(f"{name} is missing", where=str(base), hint="the base must be there as safetensors")
    return [base / name for name in names]


def _read_index(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelError("this index names no shards", where=str(index), hint="download it again") from None


def read_shard(path: Path) -> Shard:
    """The header of a safetensors file. Raises ModelError when it is none, or is cut short."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if prefix.startswith(b"version "):
            raise ModelError("this is a Git LFS pointer, not the weights", where=str(path), hint="git lfs pull")
        if len(prefix) < 8 or length > min(size, 100 << 20):
            raise ModelError("not a safetensors file", where=str(path), hint="download it again")
        text = file.read(length)
    try:
        fields: dict[str, Any] = json.loads(text)
        entries = [
            Entry(name, field["dtype"], tuple(field["shape"]), *field["data_offsets"])
            for name, field in fields.items()
            if name != "__metadata__"
        ]
    except (ValueError, KeyError, TypeError) as fault:
        raise ModelError(f"bad safetensors header: {fault}", where=str(path), hint="download it again") from None
    shard = Shard(path, prefix + text, tuple(sorted(entries, key=lambda entry: entry.start)))
    if shard.size != size or any(a.end != b.start for a, b in zip(shard.entries, shard.entries[1:], strict=False)):
        raise ModelError(f"{size:,} bytes, its header says {shard.size:,}", where=str(path), hint="download it again")
    return shard


def place_updates(updates: list[Update], shards: list[Shard], *, base: Path) -> dict[str, Update]:
    """Updates by the name of their tensor in the files. Raises ModelError naming the first that has none."""
    entries = {entry.name: entry for shard in shards for entry in shard.entries}
    placed: dict[str, Update] = {}
    for update in updates:
        # A checkpoint may have been saved from the backbone (GPT-2's is), without the first part of the name.
        names = [f"{update.module}.weight", f"{update.module.partition('.')[2]}.weight"]
        name = next((name for name in names if name in entries), None)
        if name is None:
            raise ModelError(
                f"the base has no tensor for {update.module}", where=str(base), hint="is it the right base?"
            )
        if entries[name].shape != update.shape:
            raise ModelError(f"{name} is {entries[name].shape}, the adapter fits {update.shape}", where=str(base))
        if entries[name].dtype not in _DTYPES:
            raise ModelError(f"{name} is {entries[name].dtype}", where=str(base), hint="merge into the 16-bit original")
        placed[name] = update
    return placed


def refuse_overlap(out: Path, *inputs: Path) -> None:
    """Raise ModelError when `out` would lie in an input or hold one."""
    place = out.resolve()
    for given in (path.resolve() for path in inputs):
        if place == given or place in given.parents or given in place.parents:
            raise ModelError(f"{out} and {given} lie in each other", where=str(out), hint="name another --out")


def _read_config(base: Path) -> dict[str, Any]:
    path = base / "config.json"
    if not path.is_file():
        raise ModelError("no config.json: this is no model folder", where=str(base))
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if "quantization_config" in config:
        raise ModelError("the base is quantized", where=str(path), hint="merge into the 16-bit original with --base")
    return config


def _write_updated(source: BinaryIO, target: BinaryIO, entry: Entry, update: Update) -> bool:
    """Write one tensor with its update, a block of rows at a time. Returns whether any byte changed."""
    width = (entry.end - entry.start) // entry.shape[0]
    rows = max(1, _BLOCK // width)
    buffer = bytearray(rows * width)
    changed = False
    for start in range(0, entry.shape[0], rows):
        count = min(rows, entry.shape[0] - start)
        view = memoryview(buffer)[: count * width]
        source.readinto(view)  # type: ignore[attr-defined]
        before = torch.frombuffer(view, dtype=_DTYPES[entry.dtype]).view(count, -1)
        after = fold(before, update, start)
        if not after.isfinite().all():
            raise ModelError(f"{entry.name} leaves the range of {entry.dtype}", where=str(target.name))
        changed = changed or not torch.equal(before, after)
        target.write(after.view(torch.uint8).numpy().data)
    return changed


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> None:
    while size:
        block = source.read(min(_BLOCK, size))
        target.write(block)
        size -= len(block)


def _copy_sidecars(base: Path, adapter: Path, stage: Path) -> None:
    """Config, tokenizer and generation config byte for byte as the base has them; the template of training."""
    changed = {"chat_template.jinja"} if (adapter / "chat_template.jinja").is_file() else set()
    if _stops(adapter) - _stops(base):  # training found that generation would run past the end of a turn
        changed.add(_GENERATION)
    for path in sorted(_sidecars(base)):
        if path.name not in changed:
            shutil.copyfile(path, stage / path.name)
    for name in sorted(changed):
        shutil.copyfile(adapter / name, stage / name)


def _stops(folder: Path) -> set[int]:
    """The tokens that end generation, by the folder's generation config."""
    path = folder / _GENERATION
    stops = json.loads(path.read_bytes()).get("eos_token_id") if path.is_file() else None
    return set(stops if isinstance(stops, list) else [] if stops is None else [stops])


def _sidecars(base: Path) -> Iterator[Path]:
    return (path for path in base.iterdir() if path.is_file() and path.suffix in _SIDECARS)


def _check_shards(stage: Path, shards: list[Shard]) -> None:
    """Read every header back: names, dtypes and shapes as the base has them."""
    for shard in shards:
        if read_shard(stage / shard.path.name).entries != shard.entries:
            raise ModelError("the written shard differs from its base", where=str(stage / shard.path.name))
