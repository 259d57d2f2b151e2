"""`lorasft export`: a merged model as GGUF for llama.cpp, or as a folder for Ollama."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lorasft.artifact import find_artifact
from lorasft.errors import ModelError
from lorasft.files import STAGE, make_folder, refuse_existing
from lorasft.terminal import ByteProgress, say


def run(model: str, to: str, out: str, type: Any, as_json: bool) -> None:
    """Export the folder `model`, a run or an adapter merged first; the path of what was written on stdout."""
    refuse_existing(Path(out))
    started = time.monotonic()
    with _full_weights(model, Path(out)) as folder:
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


@contextmanager
def _full_weights(name: str, out: Path) -> Iterator[Path]:
    """The model folder `name`; of a run or an adapter, one that is merged beside `out` and goes when it was read."""
    artifact = find_artifact(name)
    if artifact.adapter is None:
        if not (Path(name) / "config.json").is_file():
            raise ModelError("no config.json: this is not a model folder", where=name, hint="name a folder")
        yield Path(name)
        return
    from lorasft.merge.folder import merge

    make_folder(out.absolute().parent)
    with TemporaryDirectory(prefix=STAGE, dir=out.absolute().parent) as scratch:
        merged = merge(artifact, Path(scratch) / "merged")
        say(f"merged first, onto the {merged.onto} weights ({merged.why})")
        yield merged.folder
