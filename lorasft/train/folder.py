"""The folder of a run: claimed, recorded, and compared with the recipe that wants to go on in it."""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lorasft import __version__
from lorasft.data.prepare import Prepared
from lorasft.errors import RecipeError
from lorasft.files import fingerprint, replace_file
from lorasft.recipe import Recipe, dump_recipe, load_recipe, mathematics
from lorasft.train.checkpoint import Layout, State, list_checkpoints

_LEFT_BEHIND = {"tokens", "run.lock", "checkpoints", "provenance.json"}  # by a start that failed


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
    if not is_run and any(path.name != "step-000000" for path in list_checkpoints(folder / "checkpoints")):
        raise RecipeError(
            "the folder holds checkpoints and no recipe.yaml", where=str(folder), hint="run.output=FOLDER"
        )
    strangers = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    strangers = [name for name in strangers if name not in _LEFT_BEHIND and not name.startswith(".")]
    if not is_run and strangers:
        raise RecipeError(
            f"the folder holds {len(strangers)} files that are no run's, {strangers[0]} among them",
            where=str(folder),
            hint="run.output=NEW_FOLDER",
        )


def refuse_changes(recipe: Recipe, folder: Path, saved: State, *, data: str) -> None:
    """Raise RecipeError when what decides the result differs from what the run was started with."""
    before, now = (_flatten(mathematics(one)) for one in (load_recipe(str(folder / "recipe.yaml")), recipe))
    changed = [f"{key}: {before.get(key)} -> {now.get(key)}" for key in sorted(before.keys() | now.keys())
               if before.get(key) != now.get(key)]  # fmt: skip
    if changed:
        raise RecipeError(
            "the recipe differs from the one that this run was started with",
            where="; ".join(changed[:10]),
            hint="restore these values, or start another run with run.output=FOLDER",
        )
    if saved.data != data:
        raise RecipeError(
            f"the data or the tokenizer changed since step {saved.step}",
            where=str(folder),
            hint="restore the files, or start another run with run.output=FOLDER",
        )


def write_start(folder: Path, recipe: Recipe, prepared: Prepared, *, layout: Layout, config: Any) -> None:
    """Record what the run stands on; recipe.yaml comes last and makes the folder a run."""
    base, commit = Path(recipe.model.base), getattr(config, "_commit_hash", None)
    packages = ("torch", "transformers", "peft", "bitsandbytes", "tokenizers", "safetensors", "numpy")
    provenance = {
        "lorasft": __version__,
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "layout": asdict(layout),
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
