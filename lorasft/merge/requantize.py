"""Merged weights as a 4-bit checkpoint of bitsandbytes, and how much of the merge survives in it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from bitsandbytes.functional import quantize_4bit
from torch import Tensor

from lorasft.errors import ModelError
from lorasft.merge.blocks import Stored
from lorasft.merge.shards import Shard, read_shard
from lorasft.model.base import load_base, quiet_progress
from lorasft.recipe import ModelSettings
from lorasft.tensors import find_weights

_PART = 1 << 20  # numbers compared at once


def write_quantized(merged: Path, stage: Path, *, base: Iterable[Shard], tensors: Iterable[str]) -> float:
    """Put the checkpoint in `merged` into NF4 and save it to `stage`. Returns the share of 4-bit codes that the merge
    changed in `tensors`.

    Raises ModelError when it changed none: the update is smaller than the steps of NF4.
    """
    share = _changed_share(base, [read_shard(path) for path in find_weights(merged)], set(tensors))
    if not share:
        raise ModelError("no 4-bit code changed: the update is too small for NF4", hint="merge without --quantize")
    model = load_base(ModelSettings(base=str(merged)), torch.device("cpu"))
    with quiet_progress():
        model.save_pretrained(stage)
    mask = os.umask(0)
    os.umask(mask)
    for path in stage.glob("*.safetensors"):  # safetensors lets nobody else read them
        path.chmod(0o666 & ~mask)
    return share


def _changed_share(base: Iterable[Shard], merged: Iterable[Shard], tensors: set[str]) -> float:
    changed = count = 0
    for before, after in zip(base, merged, strict=True):
        with ExitStack() as stack:
            files = [stack.enter_context(open(shard.path, "rb")) for shard in (before, after)]
            places = {entry.name: entry for entry in after.entries}
            for entry in before.entries:
                if entry.name in tensors:
                    starts = len(before.header) + entry.start, len(after.header) + places[entry.name].start
                    old, new = (_codes(Stored(f, entry, start=start)) for f, start in zip(files, starts, strict=True))
                    for a, b in zip(old, new, strict=True):
                        differing = a ^ b  # two codes in a byte
                        changed += int((differing >> 4 > 0).sum()) + int((differing & 15 > 0).sum())
                        count += 2 * a.numel()
    return changed / max(count, 1)


def _codes(stored: Stored) -> Iterator[Tensor]:
    total = stored.entry.rows * stored.entry.width
    for first in range(0, total, _PART):
        numbers = stored.numbers(first, min(_PART, total - first))
        yield quantize_4bit(numbers, blocksize=64, quant_type="nf4")[0]
