"""Checkpoints of a run: written whole or not at all, verified, restored; what a disk does not take costs one save.

checkpoints/step-000200/   adapter_model.safetensors, adapter_config.json   the adapter, in PEFT's format
                           optimizer.safetensors                            its moments, by parameter
                           state.json                                       step, layout, where metrics end
                           manifest.json                                    hashes of the above
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import time
from dataclasses import asdict, replace
from pathlib import Path

from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from lorasft.adapter_config import read_adapter_weights
from lorasft.errors import CapacityError, DivergedError, LorasftError, ModelError, RecipeError
from lorasft.files import remove_folder, rename, staged_folder, verify_folder, write_file
from lorasft.model.adapter import adapter_weights, give_weights, write_adapter
from lorasft.terminal import say
from lorasft.train.oom import plain_oom_errors
from lorasft.train.optimizer import optimizer_state, restore_optimizer
from lorasft.train.state import Run, State

_NAME = re.compile(r"step-(\d{6,})")


def save_checkpoint(run: Run, state: State) -> None:
    """Commit the checkpoint of `state`. Raises DivergedError rather than save a tensor that is not finite."""
    tensors = optimizer_state(run.optimizer, run.parameters)
    for name, tensor in {**adapter_weights(run.model), **tensors}.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise DivergedError(f"{name} is not finite: the checkpoint is not saved", hint="lower the learning rate")
    target = run.checkpoints / f"step-{state.step:06d}"
    if target.exists() or target.is_symlink():  # damaged, or another run's: skipped at the start, not ours to delete
        rename(target, target.with_name(f"{target.name}.aside-{secrets.token_hex(4)}"))
    with staged_folder(target) as stage:
        write_adapter(run.model, stage, base=run.recipe.model)
        write_file(stage / "optimizer.safetensors", to_bytes(tensors))
        write_file(stage / "state.json", json.dumps(asdict(state), indent=1).encode())


def restore_checkpoint(path: Path, run: Run) -> None:
    """Put adapter and optimizer back as they were when `path` was saved, bit for bit. Raises ModelError."""
    give_weights(run.model, read_adapter_weights(path), where=str(path))
    try:
        restore_optimizer(run.optimizer, run.parameters, load_file(path / "optimizer.safetensors"))
    except (SafetensorError, OSError, LookupError, ValueError, RuntimeError) as error:
        raise ModelError(f"cannot read the optimizer: {error}", where=str(path)) from None


def read_state(path: Path, *, run: str | None) -> State:
    """The state of a checkpoint of `run` (None: any) that verifies. Raises ModelError when it is none."""
    verify_folder(path)
    try:
        state = TypeAdapter(State).validate_json((path / "state.json").read_bytes(), strict=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"no readable state.json: {' '.join(str(error).split())[:200]}", where=str(path)) from None
    if path.name != f"step-{state.step:06d}":
        raise ModelError(f"a copy of step {state.step}", where=str(path))
    if run is not None and state.run != run:
        raise ModelError("of another run", where=str(path))
    return state


def newest_checkpoint(folder: Path, *, run: str | None) -> tuple[Path, State, list[str]]:
    """The newest checkpoint of `run` that verifies, its state, and why each newer one was skipped.

    Raises ModelError when none does: a resumed run never starts from nothing.
    """
    skipped: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return path, read_state(path, run=run), skipped
        except LorasftError as error:
            skipped.append(f"{path.name}: {error.what}")
    what = f"no checkpoint to resume from ({'; '.join(skipped) or 'there is none'})"
    raise ModelError(what, where=str(folder), hint="start anew with another run.output=FOLDER")


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints under their final names, oldest first; links and other files are not ours."""
    folders = (path for path in folder.glob("step-*") if path.is_dir() and not path.is_symlink())
    return sorted((path for path in folders if _NAME.fullmatch(path.name)), key=lambda path: int(path.name[5:]))


def prune_checkpoints(run: Run, state: State) -> None:
    """Delete this run's checkpoints, oldest first, but the newest `run.keep` that verify and the best.

    What does not verify counts for nothing and is left alone, like what is another run's.
    """
    own = []
    for path in list_checkpoints(run.checkpoints):
        with contextlib.suppress(ModelError):
            own.append((path, read_state(path, run=state.run).step))
    for path, step in own[: -run.recipe.run.keep]:
        if not run.recipe.run.keep_best or step != state.best_step:
            remove_folder(path)


def save(run: Run, state: State) -> State:
    """Secure the metrics, commit a checkpoint, then let go of the ones that are no longer kept."""
    state = replace(state, metrics_bytes=run.metrics.secure(), layout=run.layout)
    save_checkpoint(run, state)
    prune_checkpoints(run, state)
    return state


class CheckpointSaver:
    """The saves of a run: since when, and whether the last one failed."""

    def __init__(self, state: State, *, minutes: float | None) -> None:
        self.last = state
        self.minutes = minutes
        self.time = time.monotonic()
        self.failed = False

    def overdue(self) -> bool:
        """Whether `run.save_minutes` have passed since the last save."""
        return self.minutes is not None and time.monotonic() - self.time > 60 * self.minutes

    def attempt(self, run: Run, state: State, *, final: bool) -> State:
        """Save. When disk or memory does not allow it, say so and continue with what was saved before.

        Raises CapacityError when that happens twice in a row, or in the `final` save of a run.
        """
        self.time = time.monotonic()
        try:
            with plain_oom_errors(run.folder):
                self.last = save(run, state)
        except (OSError, CapacityError, RecipeError) as error:
            what = f"the save after step {state.step} failed: {getattr(error, 'what', error)}"
            if self.failed or final:
                hint = f"make room on the disk and continue with --resume from step {self.last.step}"
                raise CapacityError(what, where=str(run.checkpoints), hint=hint) from error
            self.failed = True
            say(f"{what}; saved up to step {self.last.step}, continuing")
            return replace(state, best_step=self.last.best_step, best_loss=self.last.best_loss)
        self.failed = False
        return self.last
