"""Eight ways to get the commit of a checkpoint wrong, and the campaign that catches each: proof that they can fail.

    python -m faults --mutants [--trials 60]

A mutant is a patch in the fork of a trial; no file of the package knows of it. There is no pointer file that could be
written before the rename; the fifth instead writes state.json after it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save as pack

from faults.campaigns import Tally, run_campaign
from faults.damage import seal
from faults.subject import KEEP
from faults.trial import Bench
from lorasft import files
from lorasft.training import checkpoint
from lorasft.training import state as state_module
from lorasft.training.optimizer import optimizer_state


def sync_only(folders: bool) -> None:
    plain = files._sync
    files._sync = lambda path: plain(path) if path.is_dir() == folders else None


def rename_before_sync() -> None:
    """The folder has its final name before its files are on the disk."""
    plain_sync, plain_rename = files._sync, files.rename
    late: list[Path] = []
    files._sync = lambda path: late.append(path) if ".stage-step" in str(path) and path.is_file() else plain_sync(path)

    def rename(source: Path, target: Path) -> None:
        plain_rename(source, target)
        for path in late:
            plain_sync(target / path.name)
        late.clear()

    files.rename = rename


def manifest_first() -> None:
    """The manifest appears under the final name, and then the files that it lists."""
    plain = files.commit_folder

    def commit(stage: Path, target: Path, *, hashes: Mapping[str, str]) -> None:
        if not target.name.startswith("step-"):
            return plain(stage, target, hashes=hashes)
        files.make_folder(target)
        files.write_file(target / files.MANIFEST, seal(stage))
        for path in sorted(stage.iterdir()):
            files.rename(path, target / path.name)
        files._remove(stage)

    files.commit_folder = commit


def state_after_rename() -> None:
    def save_checkpoint(run: Any, state: Any) -> None:
        tensors = optimizer_state(run.optimizer)
        target = run.checkpoints / f"step-{state.step:06d}"
        with files.staged_folder(target) as stage:
            checkpoint.write_adapter(run.model, stage, base=run.recipe.model)
            files.write_file(stage / "optimizer.safetensors", pack(tensors))
        files.write_file(target / "state.json", json.dumps(asdict(state)).encode())

    checkpoint.save_checkpoint = save_checkpoint


def retain_unverified() -> None:
    """The newest count as kept, whole or not, and the rest goes before the new one is there."""
    plain = checkpoint.save_checkpoint

    def save_checkpoint(run: Any, state: Any) -> None:
        for path in checkpoint.list_checkpoints(run.checkpoints)[: 1 - KEEP]:
            files.remove_folder(path)
        plain(run, state)

    checkpoint.save_checkpoint, checkpoint.prune_checkpoints = save_checkpoint, lambda run, state: None


def overwrite_in_place() -> None:
    """Written under the final name from the first byte."""

    @contextmanager
    def written_folder(target: Path, **named: Any) -> Iterator[Path]:
        files.make_folder(target)
        yield target
        files.write_file(target / files.MANIFEST, seal(target))
        files.rename(target, target)  # no effect but that the trace counts a commit

    files.staged_folder = written_folder


def resume_by_number() -> None:
    def newest(folder: Path, *, run: str | None) -> Any:
        path = checkpoint.list_checkpoints(folder)[-1]
        print(f"skipped {path.name}")
        return checkpoint.TypeAdapter(state_module.State).validate_json((path / "state.json").read_bytes())

    checkpoint.newest_checkpoint = newest


MUTANTS: dict[str, tuple[Callable[[], None], str]] = {
    "no fsync of files": (partial(sync_only, folders=True), "P1"),
    "no fsync of folders": (partial(sync_only, folders=False), "P1"),
    "rename before fsync": (rename_before_sync, "P1"),
    "manifest first": (manifest_first, "P1"),
    "state after rename": (state_after_rename, "P1"),
    "retention before the save": (retain_unverified, "K1"),
    "overwritten in place": (overwrite_in_place, "K1"),
    "resume by the highest number": (resume_by_number, "T1"),
}


def catch(name: str, bench: Bench) -> Tally:
    """What the mutant's campaign says about it, until it finds the first thing wrong."""
    patch, campaign = MUTANTS[name]
    return run_campaign(campaign, bench.patched(patch), most_wrong=1)
