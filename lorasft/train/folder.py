"""The folder of a run: claimed, recorded, and compared with the recipe that wants to go on in it."""

from __future__ import annotations

import importlib.metadata
import json
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lorasft import __version__
from lorasft.data.prepare import Prepared, read_ingredients
from lorasft.errors import RecipeError
from lorasft.files import LOCK, replace_file
from lorasft.recipe import Recipe, dump_recipe, load_recipe, mathematics
from lorasft.tensors import fingerprint
from lorasft.train.state import State

_LEFT_BEHIND = {"tokens", LOCK, "checkpoints", "provenance.json"}  # by a start that failed


def claim(folder: Path, *, resume: bool) -> None:
    """Raise RecipeError when the run folder is taken, or when there is nothing to resume."""
    is_run = (folder / "recipe.yaml").is_file()
    if resume and not is_run:
        raise RecipeError("there is no run to resume", where=str(folder), hint="leave out --resume to start one")
    if not resume and is_run:
        raise RecipeError(
            "this run folder exists",
            where=str(folder),
            hint=f"--resume to go on with it, or run.output={folder}-2 to start another",
        )
    if not is_run:
        _refuse_strangers(folder)


def _refuse_strangers(folder: Path) -> None:
    """Raise RecipeError unless `folder` holds nothing but what a start that failed has left, which is deleted."""
    present = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    checkpoints = folder / "checkpoints"
    saved = [path.name for path in checkpoints.iterdir()] if checkpoints.is_dir() else []
    ours = _LEFT_BEHIND if LOCK in present else set()
    strangers = [name for name in present if name not in ours and not name.startswith(".")]
    strangers += [f"checkpoints/{name}" for name in saved if name != "step-000000" and not name.startswith(".")]
    if strangers:
        raise RecipeError(
            f"the folder holds {len(strangers)} files that are no run's, {strangers[0]} among them",
            where=str(folder),
            hint="run.output=NEW_FOLDER",
        )


def new_run_id() -> str:
    """A name for this run that no other has: its checkpoints carry it."""
    return secrets.token_hex(8)


def read_run_id(folder: Path) -> str | None:
    """The id of the run in `folder`; None when provenance.json, which holds it, is lost."""
    try:
        return str(json.loads((folder / "provenance.json").read_bytes()).get("run", ""))
    except (OSError, ValueError, AttributeError):
        return None


def refuse_changes(recipe: Recipe, folder: Path, saved: State, *, prepared: Prepared) -> None:
    """Raise RecipeError, with a table old -> new, when what decides the result differs from what the run began with."""
    before, now = (_flatten(mathematics(one)) for one in (load_recipe(str(folder / "recipe.yaml")), recipe))
    if before != now:
        what = "the recipe differs from the one that this run was started with"
        hint = "restore these values, or start another run with run.output=FOLDER"
        raise RecipeError(f"{what}:\n{compare(before, now)}", where=str(folder), hint=hint)
    if saved.data != prepared.key:
        what = f"the data, the tokenizer or their libraries changed since step {saved.step}"
        hint = "restore them, or start another run with run.output=FOLDER"
        table = compare(*(_flatten(read_ingredients(folder / "tokens", key)) for key in (saved.data, prepared.key)))
        raise RecipeError(f"{what}:\n{table}", where=str(folder), hint=hint)


def compare(before: dict[str, Any], now: dict[str, Any], *, most: int = 10) -> str:
    """What differs, a line each: `key: old -> new`."""
    keys = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    lines = [f"  {key}: {' -> '.join(_shorten(before.get(key), now.get(key)))}" for key in keys]
    return "\n".join(lines[:most] + ([f"  and {len(lines) - most} more"] if len(lines) > most else []))


def _shorten(*values: Any, most: int = 60) -> list[str]:
    """Texts of `values`, long ones from a little before the place where they begin to differ."""
    texts = [" ".join(str(value).split()) for value in values]
    same = next((place for place, pair in enumerate(zip(*texts, strict=False)) if len(set(pair)) > 1), 0)
    start = max(0, same - 12) if max(map(len, texts)) > most else 0
    cut = [f"{'...' * (start > 0)}{text[start : start + most]}" for text in texts]
    return [f"{part}..." if len(text) > start + most else part for part, text in zip(cut, texts, strict=True)]


def write_start(folder: Path, recipe: Recipe, prepared: Prepared, *, state: State, config: Any) -> None:
    """Record what the run stands on; recipe.yaml comes last and makes the folder a run."""
    base, commit = Path(recipe.model.base), getattr(config, "_commit_hash", None)
    packages = ("torch", "transformers", "peft", "bitsandbytes", "tokenizers", "safetensors", "numpy")
    provenance = {
        "lorasft": __version__,
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "run": state.run,
        "layout": asdict(state.layout),
        "threads": torch.get_num_threads(),
        "base": {
            "name": recipe.model.base,
            "commit": commit,
            "fingerprint": fingerprint(base if base.is_dir() else _find_snapshot(recipe.model.base, commit)),
        },
        "data": prepared.key,
        "report": prepared.report.as_dict(),
    }
    replace_file(folder / "provenance.json", json.dumps(provenance, indent=1).encode())
    replace_file(folder / "recipe.yaml", dump_recipe(recipe).encode())


def _find_snapshot(name: str, commit: str | None) -> Path:
    """Where the hub's client keeps a model that was loaded from it."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, revision=commit, local_files_only=True))


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
