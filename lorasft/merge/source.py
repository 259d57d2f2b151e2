"""What is merged: an adapter and the folder of its base, found without loading either."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from lorasft.adapter_files import CONFIG, read_adapter_config, refuse_remote
from lorasft.errors import ModelError
from lorasft.files import MANIFEST, verify_folder
from lorasft.hub import find_hub, refuse_offline
from lorasft.tensors import fingerprint

_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]


_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

Onto = Literal["original", "dequantized"]


@dataclass(frozen=True)
class Choice:
    """Which base the update is added to, and why in one line."""

    onto: Onto
    why: str


@dataclass(frozen=True)
class Source:
    """An adapter, its base on this machine, and the run that made it, if one did."""

    adapter: Path
    base: Path
    base_name: str
    run: Path | None = None
    commit: str | None = None  # of the base on the hub
    trained_on: str | None = None  # the fingerprint of the base that the run stood on
    dtype: torch.dtype | None = None  # that the run computed in


def find_source(name: str, *, base: str | None = None, force_base: bool = False) -> Source:
    """The adapter of a run or an adapter folder, with the base that it was trained on or the one given as `base`.

    Raises ModelError when there is no adapter or, but for `force_base`, the base is not the one of training;
    UnsafeError when a stranger's adapter names a base by something else than a folder or a hub id.
    """
    folder = Path(name)
    if (folder / "recipe.yaml").is_file() and not (folder / CONFIG).is_file():
        if not (folder / "adapter").is_dir():
            raise ModelError(
                "this run has no adapter yet", where=name, hint="finish it with lorasft train ... --resume"
            )
        folder = folder / "adapter"
    _refuse_no_adapter(folder, name)
    config = read_adapter_config(folder)
    if (folder / MANIFEST).is_file():
        verify_folder(folder)  # a run's own: what was changed behind it is not what was trained
    origin = config["base_model_name_or_path"]
    if base is None:
        refuse_remote(origin, folder / CONFIG)
    given = base or origin
    found = Path(given) if Path(given).is_dir() else _fetch(given, None if base else config.get("revision"))
    if not (found / "config.json").is_file():
        raise ModelError("no config.json: this is no model folder", where=str(found), hint="--base MODEL")
    run = next((parent for parent in folder.resolve().parents[:2] if (parent / "provenance.json").is_file()), None)
    if run is None:
        return Source(folder, found, given)
    try:
        provenance = json.loads((run / "provenance.json").read_bytes())
        trained, name, commit = (provenance["base"][key] for key in ("fingerprint", "name", "commit"))
        dtype = _DTYPES[provenance["layout"]["dtype"]]
    except (ValueError, KeyError, TypeError, RecursionError) as fault:
        what = f"the run's record cannot be read: {fault}"
        raise ModelError(what, where=str(run / "provenance.json"), hint="name the adapter's folder alone") from None
    if trained and trained != fingerprint(found) and not force_base:
        what = "this base is not the one that the adapter was trained on"
        hint = f"--base FOLDER with the files of {name}, or --force-base"
        raise ModelError(what, where=str(found), hint=hint)
    return Source(folder, found, given, run, commit, trained, dtype)


def _refuse_no_adapter(folder: Path, name: str) -> None:
    """Raise ModelError in the words for what was given instead of an adapter."""
    if not folder.exists():
        raise ModelError("there is no such folder", where=name, hint="name a run or an adapter folder")
    if not (folder / CONFIG).is_file() and (folder / "config.json").is_file():
        what = "this is a model, and merged already" if (folder / "merge.json").is_file() else "this is a model"
        raise ModelError(f"{what}: there is no adapter in it", where=name, hint="name the run, or the adapter's folder")
    if not (folder / CONFIG).is_file() and (folder / "checkpoints").is_dir():
        raise ModelError("this run has no adapter yet", where=name, hint="finish it with lorasft train ... --resume")


def _fetch(name: str, revision: str | None) -> Path:
    """The snapshot of a hub model on this machine, downloaded if need be."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ModelError("there is no such base folder", where=name, hint="--base MODEL")
    find_hub()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_FILES))
    except Exception as fault:  # the hub raises a dozen kinds
        refuse_offline(fault, name)
        reason = str(fault).splitlines()[0] if str(fault) else type(fault).__name__
        raise ModelError(f"cannot get the base: {reason}", where=name, hint="--base FOLDER") from None
