"""`lorasft export`: a merged model as GGUF for llama.cpp, or as a folder for Ollama."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorasft.adapter_files import CONFIG
from lorasft.errors import ModelError
from lorasft.terminal import ByteProgress, say


def run(model: str, to: str, out: str, type: Any, as_json: bool) -> None:
    """Export the folder `model`; the path of what was written on stdout."""
    folder = Path(model)
    _refuse_unmerged(folder)
    started = time.monotonic()
    progress = ByteProgress() if sys.stderr.isatty() else None
    if to == "ollama":
        from lorasft.export.ollama import write_ollama

        written, system = write_ollama(folder, Path(out), kind=type, on_progress=progress)
        if not system:
            say("the chat template takes no system messages: Ollama will leave them out")
    else:
        from lorasft.export.gguf_file import write_gguf

        written = write_gguf(folder, Path(out), kind=type, on_progress=progress)
    what = f"{written.tensors} tensors of {written.architecture} as {written.type}, {written.size / 1e9:.3f} GB"
    say(f"{what} in {time.monotonic() - started:.1f} s")
    if as_json:
        print(json.dumps({**asdict(written), "file": str(written.file)}))
    else:
        print(out)


def _refuse_unmerged(folder: Path) -> None:
    if (folder / CONFIG).is_file() or ((folder / "recipe.yaml").is_file() and not (folder / "config.json").is_file()):
        hint = f"lorasft merge {folder} --out merged, then export merged"
        raise ModelError("this is an adapter: a GGUF holds full weights", where=str(folder), hint=hint)
    if not (folder / "config.json").is_file():
        raise ModelError("no config.json: this is no model folder", where=str(folder))
