"""The judge of a trial: what a dead run may leave on the disk, and what the resumed one must make of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file

from faults.subject import KEEP, SAVE_EVERY
from lorasft.errors import LorasftError
from lorasft.files import HALF_DONE, sha256, verify_folder
from lorasft.training.checkpoint import list_checkpoints, read_state
from lorasft.training.state import State

CLOCKS = ("seconds", "tokens_per_second", "memory_bytes")


class Result(NamedTuple):
    """What a finished run must be the same in, whatever happened to it: every logged number, and the adapter."""

    lines: list[dict[str, Any]]
    adapter: str  # SHA-256


def read_result(folder: Path) -> Result:
    """The result of a finished run, without clocks and memory. Raises OSError where it is not finished."""
    return Result(read_metrics(folder), sha256(folder / "adapter/adapter_model.safetensors"))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl, without clocks and memory."""
    path = folder / "metrics.jsonl"
    whole = path.read_bytes().rpartition(b"\n")[0].splitlines() if path.exists() else []
    return [{key: value for key, value in json.loads(line).items() if key not in CLOCKS} for line in whole]


def judge_remains(folder: Path, *, commits: int, done: int | None = None) -> tuple[list[str], int]:
    """What is wrong with what a dead run has left after `commits` checkpoints, and how many steps it has lost.

    Every checkpoint under a final name must be whole and finite, as many as promised must be there, and the newest
    may lie back by one save interval from the last step that was `done` (None: that was logged).
    """
    wrong: list[str] = []
    good: list[State] = []
    for path in list_checkpoints(folder / "checkpoints"):
        try:
            good.append(read_state(path, run=None))
            tensors = [load_file(path / name) for name in ("adapter_model.safetensors", "optimizer.safetensors")]
            if not all(tensor.isfinite().all() for loaded in tensors for tensor in loaded.values()):
                wrong.append(f"{path.name} is not finite")
        except LorasftError as error:
            wrong.append(f"torn: {path.name}: {error.what}")
    promised = min(commits, KEEP) if (folder / "recipe.yaml").is_file() else 0  # a start that failed leaves nothing
    if len(good) < promised:
        wrong.append(f"{len(good)} checkpoints of {promised} promised")
    if done is None:
        done = max((line["step"] for line in read_metrics(folder) if "loss" in line), default=0)
    lost = max(0, done - good[-1].step) if good else done
    if commits and lost > SAVE_EVERY:
        wrong.append(f"{lost} steps lost")
    return wrong, lost


def judge_result(folder: Path, reference: Result) -> list[str]:
    """What is wrong with a run that was brought to its end: it must be the uninterrupted one bit for bit, and tidy."""
    try:
        verify_folder(folder / "adapter")
        result = read_result(folder)
    except (OSError, LorasftError) as error:
        return [f"no result: {error}"]
    wrong = [] if result.adapter == reference.adapter else ["another adapter"]
    if result.lines != reference.lines:
        other = [line for line in result.lines if line not in reference.lines][:1]
        wrong.append(f"other metrics: {other} steps {[line['step'] for line in result.lines]}")
    names = [path.name for place in (folder, folder / "checkpoints") for path in place.iterdir()]
    return wrong + [f"left behind: {name}" for name in names if HALF_DONE.fullmatch(name)]
