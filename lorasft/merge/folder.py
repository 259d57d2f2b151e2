"""A merge from an adapter to a folder that deploys: weights, config, tokenizer, template, and what was measured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasft.errors import ModelError
from lorasft.files import need_space, refuse_existing, staged_folder
from lorasft.merge.changes import read_changes
from lorasft.merge.shards import find_shards, read_shard
from lorasft.merge.stream import Progress, write_weights

_SIDECARS = {".json", ".txt", ".model", ".jinja", ".tiktoken"}
_GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Merged:
    """What a merge did."""

    folder: Path
    updated: int  # tensors that the adapter changes
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
    changes = read_changes(adapter, shards, config=config)
    size = sum(shard.size for shard in shards)
    need_space(out, size)
    with staged_folder(out) as stage:
        written = write_weights(stage, shards, changes, grid={}, onto_grid=False, on_progress=on_progress)
        unchanged = sum(not written[name].changed for name in changes)
        if unchanged == len(changes):
            what = "no weight changed: the adapter is empty, or too small for the base's dtype"
            raise ModelError(what, where=str(adapter))
        _copy_sidecars(base, adapter, stage)
    tensors = sum(len(shard.entries) for shard in shards)
    return Merged(out, len(changes), unchanged, tensors - len(written), size)


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
