"""The folder of a run: checked, recorded, and compared with the recipe that wants to continue in it."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from lorasft import __version__
from lorasft.data.prepare import Prepared, read_ingredients
from lorasft.errors import RecipeError
from lorasft.files import LOCK, locked, make_folder, refuse_overlap, remove_folder, replace_file, sweep
from lorasft.recipe import Recipe, mathematics
from lorasft.recipe.load import dump_recipe, load_recipe
from lorasft.tensors import fingerprint
from lorasft.train.state import State

# By a start that failed.
_LEFT_BEHIND = {LOCK, "tokens", "memory.json", "checkpoints", "checkpoints/step-000000", "provenance.json"}
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "tokenizers", "safetensors", "numpy")


@contextmanager
def take_folder(recipe: Recipe, *, resume: bool) -> Iterator[str]:
    """Hold the run folder, cleared of what a failed start left. Gives the process that was killed in it, if any."""
    folder, base = Path(recipe.run.output), Path(recipe.model.base)
    refuse_overlap(folder, *([base] if base.is_dir() else []))
    check_run_folder(folder, resume=resume)
    make_folder(folder)
    with locked(folder) as left:
        check_run_folder(folder, resume=resume)  # it may have become a run before the lock was ours
        sweep(folder)
        sweep(folder / "checkpoints")
        for name in () if resume else ("tokens", "checkpoints"):
            if (folder / name).is_dir():
                remove_folder(folder / name)
        yield left


def check_run_folder(folder: Path, *, resume: bool) -> None:
    """Raise RecipeError when the run folder is taken or holds other files, or when there is nothing to resume."""
    is_run = (folder / "recipe.yaml").is_file()
    if resume and not is_run:
        raise RecipeError("there is no run to resume", where=str(folder), hint="leave out --resume to start one")
    if not resume and is_run:
        hint = f"--resume to continue it, or run.output={folder}-2 to start another"
        raise RecipeError("this run folder exists", where=str(folder), hint=hint)
    ours = _LEFT_BEHIND if (folder / LOCK).is_file() else ()
    paths = (path.relative_to(folder) for names in ("[!.]*", "checkpoints/[!.]*") for path in folder.glob(names))
    strangers = [] if is_run else [str(path) for path in paths if str(path) not in ours]
    if strangers:
        what = f"the folder holds {len(strangers)} files that are not a run's, {strangers[0]} among them"
        raise RecipeError(what, where=str(folder), hint="run.output=NEW_FOLDER")


def read_run_id(folder: Path) -> str | None:
    """The id of the run in `folder`; None when provenance.json, which holds it, is lost."""
    try:
        return str(json.loads((folder / "provenance.json").read_bytes()).get("run", ""))
    except (OSError, ValueError, AttributeError):
        return None


def refuse_changes(recipe: Recipe, folder: Path, saved: State, *, prepared: Prepared) -> None:
    """Raise RecipeError, with a table old -> new, when what decides the result differs from what the run began with."""
    before, now = mathematics(load_recipe(str(folder / "recipe.yaml"))), mathematics(recipe)
    what = "the recipe differs from the one that this run was started with"
    if before == now:
        if saved.data == prepared.key:
            return
        before, now = (read_ingredients(folder / "tokens", key) for key in (saved.data, prepared.key))
        what = f"the data, the tokenizer or their libraries changed since step {saved.step}"
    hint = "restore them, or start another run with run.output=FOLDER"
    raise RecipeError(f"{what}:\n{compare(before, now)}", where=str(folder), hint=hint)


def compare(before: dict[str, Any], now: dict[str, Any], *, most: int = 10) -> str:
    """What differs, a line each: `key: old -> new`; long values from a little before the place where they differ."""
    old, new = _flatten(before), _flatten(now)
    lines = []
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            texts = [" ".join(str(values.get(key)).split()) for values in (old, new)]
            same = next((place for place, pair in enumerate(zip(*texts, strict=False)) if len({*pair}) > 1), 0)
            start = max(0, same - 12) if max(map(len, texts)) > 60 else 0
            lines.append(f"  {key}: {' -> '.join(text[start:][:60] for text in texts)}")
    return "\n".join(lines[:most] + ([f"  and {len(lines) - most} more"] if len(lines) > most else []))


def write_start(folder: Path, recipe: Recipe, prepared: Prepared, *, state: State, config: Any) -> None:
    """Record what the run is made of; recipe.yaml comes last and makes the folder a run."""
    base, commit = Path(recipe.model.base), getattr(config, "_commit_hash", None)
    if not base.is_dir():  # where the hub's client keeps what was loaded from it
        base = Path(snapshot_download(recipe.model.base, revision=commit, local_files_only=True))
    provenance = {
        "lorasft": __version__,
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "run": state.run,
        "layout": asdict(state.layout),
        "threads": torch.get_num_threads(),
        "base": {"name": recipe.model.base, "commit": commit, "fingerprint": fingerprint(base)},
        "data": prepared.key,
        "report": prepared.report.as_dict(),
    }
    replace_file(folder / "provenance.json", json.dumps(provenance, indent=1).encode())
    replace_file(folder / "recipe.yaml", dump_recipe(recipe).encode())


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
