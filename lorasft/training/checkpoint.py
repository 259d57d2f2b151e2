"""The folder of a run: taken, recorded, compared with the recipe that resumes it; and its checkpoints.

A checkpoint is written whole or not at all, verified, restored; what a disk does not take costs one save.

checkpoints/step-000200/   adapter_model.safetensors, adapter_config.json   the adapter, in PEFT's format
                           optimizer.safetensors                            its moments, of all that is trained
                           state.json                                       step, layout, where metrics end
                           manifest.json                                    hashes of the above
"""

from __future__ import annotations

import importlib.metadata
import json
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from transformers.utils import cached_file

from lorasft import __version__, files
from lorasft.adapter_files import read_adapter_weights
from lorasft.artifact import CHANGED, RESTORE, check_run_folder
from lorasft.data.prepare import open_prepared
from lorasft.data.store import changed_rows, example_lengths
from lorasft.errors import CapacityError, DivergedError, LorasftError, ModelError, RecipeError, out_of_memory, reading
from lorasft.model.adapter import adapter_weights, give_weights, write_adapter
from lorasft.recipe import Recipe
from lorasft.recipe.load import compare, dump_recipe, load_recipe
from lorasft.tensors import fingerprint
from lorasft.terminal import say, train_command
from lorasft.training.optimizer import optimizer_state, restore_optimizer
from lorasft.training.state import Run, RunInputs, State

_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "tokenizers", "safetensors", "numpy")


@contextmanager
def take_folder(recipe: Recipe, *, resume: bool) -> Iterator[None]:
    """Hold the run folder, cleared of what a killed start left. A start that fails leaves nothing in it."""
    folder = Path(recipe.run.output)
    check_run_folder(recipe, resume=resume)
    present, absent = set(folder.glob("*")), [one for one in (folder, *folder.parents) if not one.exists()]
    files.make_folder(folder)
    with files.locked(folder) as left:
        if left:
            say(f"process {left} ended without a word: it was killed, or the power was lost")
        check_run_folder(recipe, resume=resume)  # it may have become a run before the lock was ours
        files.sweep(folder)
        files.sweep(folder / "checkpoints")
        for name in () if resume else ("tokens", "checkpoints/step-000000"):
            if (folder / name).is_dir():
                files.remove_folder(folder / name)
        try:
            yield
        finally:
            if not (folder / "recipe.yaml").is_file():
                files.remove_new(folder, present, absent)


def write_start(run: Run, state: State) -> None:
    """Record what the run is made of; recipe.yaml comes last and makes the folder a run."""
    recipe, prepared = run.recipe, run.inputs.prepared
    commit = getattr(run.inputs.config, "_commit_hash", None)
    base = Path(cached_file(recipe.model.base, "config.json", revision=commit)).parent
    lengths = example_lengths(prepared.store)
    quantiles = {f"{share:.0%}": int(np.quantile(lengths, share, method="higher")) for share in (0.5, 0.9, 0.99, 1.0)}
    provenance = {
        "lorasft": __version__,
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "run": state.run,
        "layout": asdict(state.layout),
        "base": {"name": recipe.model.base, "commit": commit, "fingerprint": fingerprint(base)},
        "new_tokens": dict(zip(sorted(recipe.model.new_tokens), run.inputs.new_rows, strict=True)),
        "start": fingerprint(run.inputs.start.require_adapter()) if run.inputs.start else None,
        "steps": run.plan.steps,
        "data": prepared.key,
        "report": {**prepared.report.as_dict(), "length_quantiles": quantiles},
    }
    files.replace_file(run.folder / "provenance.json", json.dumps(provenance, indent=1))
    files.replace_file(run.folder / "recipe.yaml", dump_recipe(recipe))


def save_checkpoint(run: Run, state: State) -> None:
    """Commit the checkpoint of `state`. Raises DivergedError rather than save a tensor that is not finite."""
    tensors = run.moments or optimizer_state(run.optimizer)
    for name, tensor in {**adapter_weights(run.model), **tensors}.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise DivergedError(f"{name} is not finite: the checkpoint is not saved", hint="lower the learning rate")
    target = run.checkpoint(state.step)
    if target.exists() or target.is_symlink():  # damaged, or another run's: skipped at the start, not ours to delete
        files.rename(target, target.with_name(f"{target.name}.aside-{secrets.token_hex(4)}"))
    with files.staged_folder(target) as stage:
        write_adapter(run.model, stage, base=run.recipe.model)
        files.write_file(stage / "optimizer.safetensors", to_bytes(tensors))
        files.write_file(stage / "state.json", json.dumps(asdict(state), indent=1))


def restore_checkpoint(path: Path, run: Run) -> None:
    """Put adapter and optimizer back as they were when `path` was saved, bit for bit. Raises ModelError."""
    give_weights(run.model, read_adapter_weights(path), where=path)
    run.trained.refresh()
    with reading("cannot read the optimizer", SafetensorError, where=path):
        restore_optimizer(run.optimizer, load_file(path / "optimizer.safetensors"))


def read_state(path: Path, *, run: str | None) -> State:
    """The state of a checkpoint of `run` (None: any) that verifies. Raises ModelError when it is none."""
    files.verify_folder(path)
    with reading("no readable state.json", where=path):
        state = TypeAdapter(State).validate_json((path / "state.json").read_bytes(), strict=True)
    if path.name != f"step-{state.step:06d}":
        raise ModelError(f"a copy of step {state.step}", where=path)
    if run is not None and state.run != run:
        raise ModelError("of another run", where=path)
    return state


def find_checkpoint(recipe: Recipe, inputs: RunInputs) -> State:
    """The newest checkpoint in the run folder of `recipe`. Raises RecipeError, with a table old -> new, when other
    files than those that the run began with decide the result; where they are now decides nothing."""
    folder, prepared = Path(recipe.run.output), inputs.prepared
    record = next(files.read_objects(folder / "provenance.json"), {})  # what the run was made of, unless that is lost
    saved = newest_checkpoint(folder / "checkpoints", run=record.get("run"))
    what, changes = CHANGED, [*_changed_files(load_recipe(str(folder / "recipe.yaml")), recipe, inputs, record)]
    if not changes:
        if saved.data == prepared.key:
            return saved
        what = f"the data, the tokenizer or their libraries changed since step {saved.step}:"
        of_run, of_sweep = (one / saved.data[:16] for one in (prepared.folder.parent, folder.parent / "tokens"))
        before = of_sweep if of_sweep.is_dir() and not of_run.is_dir() else of_run
        records = (next(files.read_objects(one / "prepared.json"), {}) for one in (before, prepared.folder))
        made_from = (one.get("ingredients", {}) for one in records)
        changes = list(compare(*({**one, "files": sum(map(len, one.get("files", ())))} for one in made_from)))
        with suppress(ModelError, OSError):
            changes += changed_rows(open_prepared(before).store, prepared.store)
    if saved.data != prepared.key:
        files.remove_folder(prepared.folder)
    changes = changes[:10] or ["the same rows in files of other bytes"]
    raise RecipeError("\n  ".join([what, *changes]), where=folder, hint=RESTORE)


def _changed_files(before: Recipe, now: Recipe, inputs: RunInputs, record: dict[str, Any]) -> Iterator[str]:
    """The base and the starting adapter, where they are not those that a run of `record` began with."""
    start, recorded = inputs.start and inputs.start.adapter, record.get("base", {}).get("fingerprint")
    for name, old, new, folder, known in (
        ("model.base", before.model.base, now.model.base, Path(now.model.base), recorded),
        ("adapter.start", before.adapter.start, now.adapter.start, start, record.get("start")),
    ):
        if fingerprint(folder) != known if known and folder and folder.is_dir() else old != new:
            yield f"{name}: {old!r} -> {new!r}, other files"


def newest_checkpoint(folder: Path, *, run: str | None) -> State:
    """The state of the newest checkpoint of `run` that verifies; says why each newer one is skipped. Raises ModelError
    when none does: a resumed run never starts from nothing."""
    for path in reversed(list_checkpoints(folder)):
        try:
            return read_state(path, run=run)
        except LorasftError as error:
            say(f"skipped {path.name}: {error.what}")
    raise ModelError("no checkpoint to resume from", where=folder, hint="start anew with another run.output=FOLDER")


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints under their final names, oldest first; links and other files are not ours."""
    named = (path for path in folder.glob("step-??????*") if path.name[5:].isdecimal())
    ours = (path for path in named if path.is_dir() and not path.is_symlink())
    return sorted(ours, key=lambda path: int(path.name[5:]))


def prune_checkpoints(run: Run, state: State) -> None:
    """Delete this run's checkpoints, oldest first, but the newest `run.keep` that verify and the best.
    What does not verify counts for nothing and is left alone, like what is another run's."""
    own = []  # steps
    for path in list_checkpoints(run.checkpoints):
        with suppress(ModelError):
            own.append(read_state(path, run=state.run).step)
    for step in own[: -run.recipe.run.keep]:
        if not run.recipe.run.keep_best or step != (state.best_step or 0):  # the base is, until it is known not to be
            files.remove_folder(run.checkpoint(step))


def save(run: Run, state: State) -> State:
    """Secure the metrics, commit a checkpoint, then let go of the ones that are no longer kept."""
    state = replace(state, metrics_bytes=run.metrics.secure(), layout=run.layout)
    save_checkpoint(run, state)
    prune_checkpoints(run, state)
    return state


@dataclass
class CheckpointSaver:
    """The saves of a run: what was saved, when the last save was tried, and whether it failed."""

    last: State
    tried: float = field(default_factory=time.monotonic)
    failed: bool = False

    def attempt(self, run: Run, state: State, *, final: bool) -> State:
        """Save. When disk or memory does not allow it, say so and continue with what was saved before; raises
        CapacityError when that happens twice in a row, or in the `final` save of a run."""
        self.tried = time.monotonic()
        try:
            self.last = save(run, state)
        except (OSError, RuntimeError, MemoryError, CapacityError, RecipeError) as error:
            if isinstance(error, RuntimeError) and not out_of_memory(error):
                raise
            what = f"the save after step {state.step} failed: {getattr(error, 'what', error)}"
            if self.failed or final:
                hint = f"make room on the disk; from step {self.last.step}: {train_command(run.folder)} --resume"
                raise CapacityError(what, where=run.checkpoints, hint=hint) from error
            self.failed = True
            say(f"{what}; saved up to step {self.last.step}, continuing")
            best = self.last if run.recipe.run.keep_best and state.best_step == state.step else state
            return replace(state, best_step=best.best_step, best_loss=best.best_loss)
        self.failed = False
        return self.last
