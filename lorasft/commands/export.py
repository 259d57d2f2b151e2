"""`lorasft export`: a merged model as GGUF for llama.cpp, or as a folder for Ollama."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lorasft.commands.arguments import add_json, show
from lorasft.terminal import say, size_text


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN|DIR", help="a run or an adapter, merged first, or a model folder")
    parser.add_argument("--to", choices=["gguf", "ollama"], required=True, help="a GGUF file, or that with a Modelfile")
    parser.add_argument("--out", required=True, metavar="FILE", help="a file, or for ollama a folder, not there yet")
    parser.add_argument("--type", choices=["f16", "q8_0"], default="f16", help="of the matrices (default: f16)")
    add_json(parser, "what was done")


def run(model: str, to: str, out: str, type: Any, as_json: bool) -> None:
    """Export the folder `model`, or a run or adapter, merged first beside `out`; the path of the file on stdout."""
    from lorasft.artifact import find_artifact
    from lorasft.export.gguf import require_gguf, write_gguf
    from lorasft.export.ollama import write_ollama
    from lorasft.files import STAGE, make_folder, refuse_existing

    refuse_existing(Path(out))
    require_gguf()
    artifact, beside = find_artifact(model), Path(out).absolute().parent
    make_folder(beside)
    with TemporaryDirectory(prefix=STAGE, dir=beside) as scratch:
        folder = Path(scratch) / "merged" if artifact.adapter else artifact.base
        if artifact.adapter:
            from lorasft.merge.merge import merge

            merged = merge(artifact, folder)
            say(f"merged first, onto the {merged['onto']} weights ({merged['why']})")
        write = write_ollama if to == "ollama" else write_gguf
        written = write(folder, Path(out), kind=type)
    # Where llama.cpp or Ollama does otherwise than training did:
    if not written.get("system", True):
        say("the chat template takes no system messages: Ollama will leave them out")
    if written.get("trims"):
        say("the chat template trims messages, Ollama does not: send none with blanks at its ends")
    if (start := written["raw_start"]) != "":
        what = f"has the ids of training on texts only after {start!r}" if start else "has other ids than in training"
        say(f"prompts of the chat template begin as in training; text without it (/completion) {what}")
    if context := written["short_context"]:
        longest = written["longest_row"]
        rows = f"the longest row of training has {longest} tokens" if longest else "the rows of training are not known"
        say(f"llama.cpp takes the factors for long prompts for short ones, too, above -c {context}; {rows}")
    say(f"{written['architecture']} as {written['type']}, {size_text(written['size'])}")
    show(written, [out], as_json=as_json)
