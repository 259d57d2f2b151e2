"""The tokenizer and chat template of an artifact, from wherever their files lie."""

from __future__ import annotations

import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lorasft.artifact import Artifact
from lorasft.data.tokenizer import add_tokens, load_tokenizer

_MORE_TEMPLATES, _PROCESSORS_TEMPLATE = "additional_chat_templates", "chat_template.json"
TEMPLATE = re.compile(rf"chat_template\.(jinja|json)|{_MORE_TEMPLATES}/.*")  # names of files
TOKENIZER = re.compile(
    rf"tokenizer.*|(special_tokens_map|added_tokens)\.json|(vocab|merges)\..*|.*\.(model|tiktoken)|{TEMPLATE.pattern}"
)
_SIDECARS = {".json", ".txt", ".model", ".jinja", ".tiktoken"}


def list_sidecars(folder: Path) -> dict[str, Path]:
    """What lies beside the weights in `folder`, by its name there."""
    found = (*folder.iterdir(), *(folder / _MORE_TEMPLATES).glob("*.jinja"))
    return {path.relative_to(folder).as_posix(): path for path in found if path.is_file() and path.suffix in _SIDECARS}


def own_files(artifact: Artifact) -> dict[str, Path]:
    """The files of tokenizer and chat template that the adapter brings, by their names."""
    found = list_sidecars(artifact.adapter) if artifact.adapter else {}
    return {name: path for name, path in found.items() if TOKENIZER.fullmatch(name)}


def read_tokenizer(artifact: Artifact) -> Any:
    """The tokenizer that was saved with the adapter, completed by the base's where it is less than a whole one: another
    tool's adapter may bring none, or nothing but a template."""
    own, model = own_files(artifact), artifact.model
    if not own:
        tokenizer = load_tokenizer(model.base, model.revision)
        add_tokens(tokenizer, model.new_tokens)  # which a checkpoint was trained with
        return tokenizer
    replaced = TOKENIZER if "tokenizer.json" in own else TEMPLATE
    # The model's config stays among them: transformers chooses the class of a tokenizer by it.
    files = {name: path for name, path in list_sidecars(artifact.base).items() if not replaced.fullmatch(name)} | own
    with TemporaryDirectory(prefix="lorasft-") as scratch:
        for name, path in files.items():
            (Path(scratch) / name).parent.mkdir(exist_ok=True)
            (Path(scratch) / name).symlink_to(path.resolve())
        tokenizer = load_tokenizer(scratch)
    tokenizer.name_or_path = str(artifact.adapter)
    if tokenizer.chat_template is None and _PROCESSORS_TEMPLATE in own:
        tokenizer.chat_template = json.loads(own[_PROCESSORS_TEMPLATE].read_bytes())["chat_template"]
    if tokenizer.chat_template is None:
        tokenizer.chat_template = load_tokenizer(model.base, model.revision).chat_template
    return tokenizer
