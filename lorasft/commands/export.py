"""`lorasft export`: a merged model as GGUF for llama.cpp, or as a folder for Ollama; or an adapter alone."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from lorasft.commands.arguments import add_json, fill_in, show
from lorasft.errors import RecipeError
from lorasft.terminal import say


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN|DIR", help="a run or an adapter, merged first, or a model folder")
    forms, types = ["gguf", "ollama", "gguf-lora"], ["f16", "bf16", "q8_0", "q4_k_m", "q5_k_m", "q6_k"]
    about = "a GGUF file, or that with a Modelfile; gguf-lora: the adapter alone, not merged"
    parser.add_argument("--to", choices=forms, required=True, help=about)
    parser.add_argument("--out", required=True, metavar="FILE", help="a file, or for ollama a folder, not there yet")
    about = "of the matrices (default: f16), in any case; _k: by llama.cpp's quantizer"
    parser.add_argument("--type", type=str.lower, choices=types, help=about)
    add_json(parser, "what was done")


def run(model: str, to: str, out: str, type: Any, as_json: bool) -> None:
    """Export the folder `model`, or a run or adapter, merged first beside `out`; the path of the file on stdout."""
    from lorasft.artifact import find_artifact
    from lorasft.export.families import read_gguf_layout
    from lorasft.export.gguf import require_gguf, write_gguf, write_gguf_lora
    from lorasft.export.ollama import write_ollama
    from lorasft.export.quantize import K_QUANTS, find_quantizer
    from lorasft.files import refuse_existing, scratch_folder

    if type and to == "gguf-lora":
        raise RecipeError("--type is of a model's matrices, an adapter stays in fp32", hint="leave out --type")
    refuse_existing(Path(out))
    require_gguf()
    if type in K_QUANTS:
        find_quantizer()
    artifact = find_artifact(model)
    if to == "gguf-lora":
        written = write_gguf_lora(artifact, Path(out))
        template = artifact.require_adapter() / "chat_template.jinja"  # the base's may be another, or none
        facts = {"adapter_of": artifact.model, "template": template, "out": out, "path": Path(out).absolute()}
        say(fill_in("export.txt.jinja", facts).strip())
        return show(written, [out], as_json=as_json)
    # Refuses what would be merged in vain; and a signal during an import, which ends at once, leaves no folder behind.
    read_gguf_layout(artifact.base)
    with scratch_folder(Path(out)) as scratch:
        folder = scratch / "merged" if artifact.adapter else artifact.base
        if artifact.adapter:
            from lorasft.merge.merge import merge

            merged = merge(artifact, folder)
            say(f"merged first, onto the {merged['onto']} weights ({merged['why']})")
        write = write_ollama if to == "ollama" else write_gguf
        written = write(folder, Path(out), kind=type or "f16")
    say(fill_in("export.txt.jinja", written).strip())
    show(written, [out], as_json=as_json)
