"""Checkpoints of a run: written whole or not at all, verified, restored.

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
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from lorasft.errors import DivergedError, LorasftError, ModelError
from lorasft.files import remove_folder, rename, staged_folder, verify_folder, write_file
from lorasft.model.adapter import adapter_weights, give_weights, read_adapter_weights, write_adapter
from lorasft.recipe import ModelSettings
from lorasft.train.optimizer import optimizer_state, restore_optimizer
from lorasft.train.state import Learner, State

_NAME = re.compile(r"step-(\d{6,})")


def save_checkpoint(folder: Path, state: State, learner: Learner, *, base: ModelSettings) -> Path:
    """Commit `folder`/step-N. Raises DivergedError rather than save a tensor that is not finite."""
    tensors = optimizer_state(learner.optimizer, learner.parameters)
    for name, tensor in {**adapter_weights(learner.model), **tensors}.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise DivergedError(f"{name} is not finite: the checkpoint is not saved", hint="lower the learning rate")
    target = folder / f"step-{state.step:06d}"
    if target.exists() or target.is_symlink():  # damaged, or another run's: skipped at the start, not ours to delete
        rename(target, target.with_name(f"{target.name}.aside-{secrets.token_hex(4)}"))
    with staged_folder(target) as stage:
        write_adapter(learner.model, stage, base=base)
        write_file(stage / "optimizer.safetensors", save(tensors))
        write_file(stage / "state.json", json.dumps(asdict(state), indent=1).encode())
    return target


def restore_checkpoint(path: Path, learner: Learner) -> None:
    """Put adapter and optimizer back as they were when `path` was saved, bit for bit. Raises ModelError."""
    give_weights(learner.model, read_adapter_weights(path), where=str(path))
    try:
        restore_optimizer(learner.optimizer, learner.parameters, load_file(path / "optimizer.safetensors"))
    except (SafetensorError, OSError, ValueError) as error:
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
        except LorasftError as fault:
            skipped.append(f"{path.name}: {fault.what}")
    what = f"no checkpoint to resume from ({'; '.join(skipped) or 'there is none'})"
    raise ModelError(what, where=str(folder), hint="start anew with another run.output=FOLDER")


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints under their final names, oldest first; links and other files are not ours."""
    present = folder.iterdir() if folder.is_dir() else ()
    paths = [path for path in present if _NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()]
    return sorted(paths, key=lambda path: int(path.name.removeprefix("step-")))


def prune_checkpoints(folder: Path, *, run: str, keep: int, best_step: int | None) -> None:
    """Delete this run's checkpoints, oldest first, but the newest `keep` that verify and the best.

    What does not verify counts for nothing and is left alone, like what is another run's.
    """
    own = []
    for path in list_checkpoints(folder):
        with contextlib.suppress(ModelError):
            own.append((path, read_state(path, run=run).step))
    for path, step in own[:-keep]:
        if step != best_step:
            remove_folder(path)
