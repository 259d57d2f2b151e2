"""Full weights, shard by shard, in the memory of a few rows: a checkpoint's own layout with some tensors changed.

Only names, dtypes and shapes of the files count, never the modules that transformers makes of them. Headers are
copied as they stand where no tensor gets another form; a tensor that nothing changes is copied by the kernel.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorasft.errors import ModelError
from lorasft.files import new_file
from lorasft.merge.blocks import Blank, Rows, Stored, Weight
from lorasft.merge.fold import Change
from lorasft.merge.plan import Plan
from lorasft.merge.products import apply, bring, choose_device
from lorasft.merge.shards import Entry, Shard, read_shard
from lorasft.merge.writer import Writer

_BLOCK = 1 << 18  # numbers of a weight in hand at a time: small enough for a core's cache in fp32

Progress = Callable[[int, int], None]  # bytes written, bytes in all


@dataclass(frozen=True)
class Written:
    """What became of one tensor. The sizes are Euclidean norms."""

    changed: bool  # any of its bytes
    update: float  # of what the adapter changed
    quantization: float  # of what NF4 changed, where the weight was put into it


def write_weights(
    stage: Path,
    plan: Plan,
    *,
    grid: Mapping[str, Callable[[Stored], Rows]],
    onto_grid: bool,
    on_progress: Progress | None = None,
) -> tuple[dict[str, Written], dict[str, str]]:
    """Write the checkpoint of `plan` to the folder `stage`. Returns what became of each tensor in question, and the
    SHA-256 of each file.

    `grid`: how training saw the tensors that it had in NF4; with `onto_grid` they are written so, else as they are
    stored. Raises ModelError when a number leaves its dtype's range.
    """
    with _one_thread():
        device = choose_device(plan.changes.values(), numbers=_BLOCK)
    done = 0
    written: dict[str, Written] = {}
    hashes: dict[str, str] = {}
    for shard, target in zip(plan.shards, plan.targets, strict=True):
        stored = {entry.name: entry for entry in shard.entries}
        place = stage / shard.path.name
        with _one_thread(), open(shard.path, "rb") as source, new_file(place) as file, Writer(file) as writer:
            writer.write(target.header)
            for entry in target.entries:
                name, start = entry.name, len(shard.header) + stored[entry.name].start
                if name in plan.changes or name in plan.packed or (onto_grid and name in grid):
                    plain = Stored(source, entry, start=start) if entry.form == stored[name].form else Blank(entry)
                    weight = plan.packed[name].open() if name in plan.packed else plain
                    seen = grid[name](weight) if isinstance(weight, Stored) and name in grid else None
                    written[name] = _write_changed(writer, weight, seen, plan.changes.get(name), device, onto_grid)
                else:
                    writer.copy(source, start, size=entry.size)
                done += entry.size
                if on_progress:
                    on_progress(done, plan.size)
        hashes[shard.path.name] = writer.sha256.hexdigest()
    _refuse_differences(stage, plan.targets)
    return written, hashes


def _write_changed(
    target: Writer, weight: Weight, seen: Rows | None, change: Change | None, device: torch.device, onto_seen: bool
) -> Written:
    """Write one tensor, a block of rows at a time: its change added in fp32, then rounded once."""
    entry, change = weight.entry, bring(change, device)
    rows = entry.rows if change is not None and change.whole else max(1, _BLOCK // entry.width)
    changed, update, error = False, 0.0, 0.0
    for start in range(0, entry.rows, rows):
        given = weight.read(start, min(rows, entry.rows - start))
        total = given.to(torch.float32, copy=True)
        if seen is not None:
            quantized = seen.read(start, len(given)).to(torch.float32, copy=True)
            error += _square(quantized - total)
            total = quantized if onto_seen else total
        before = total.clone() if seen is not None else None
        if change is not None:
            apply(change, total, start, device)
        if before is not None:
            update += _square(before.sub_(total))
        after = total.to(weight.dtype)
        _refuse_non_finite(after, entry)
        changed = changed or not torch.equal(given, after)
        target.write(after)
    return Written(changed, math.sqrt(update), math.sqrt(error))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """One thread of torch: blocks are small, and threads that wait for the next would keep the writer from its core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _square(block: Tensor) -> float:
    return float(block.view(-1).dot(block.view(-1)))


def _refuse_non_finite(block: Tensor, entry: Entry) -> None:
    low, high = torch.aminmax(block)  # a third of what isfinite costs; not-a-number shows in both
    if not math.isfinite(low) or not math.isfinite(high):
        raise ModelError(f"{entry.name} leaves the range of {entry.dtype}", where=str(entry.name))


def _refuse_differences(stage: Path, shards: Sequence[Shard]) -> None:
    """Read every header back: names, dtypes and shapes as they are to be."""
    for shard in shards:
        if read_shard(stage / shard.path.name).entries != shard.entries:
            raise ModelError("the written shard is not what it was to be", where=str(stage / shard.path.name))
