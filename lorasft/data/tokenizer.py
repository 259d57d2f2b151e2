"""The tokenizer, of a base or with an adapter's files: loaded; its new tokens and untrained ones."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, decoders

from lorasft.artifact import Artifact
from lorasft.errors import DataError, LorasftError, RecipeError, reading
from lorasft.hub import find_local, is_folder, loading
from lorasft.tensors import TensorFile, find_weights, open_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FastTokenizer: TypeAlias = "PreTrainedTokenizerFast"  # whose import takes a second
_MORE_TEMPLATES, _PROCESSORS_TEMPLATE = "additional_chat_templates", "chat_template.json"
TEMPLATE = re.compile(rf"chat_template\.(jinja|json)|{_MORE_TEMPLATES}/.*")  # names of files
TOKENIZER = re.compile(
    rf"tokenizer.*|(special_tokens_map|added_tokens)\.json|(vocab|merges)\..*|.*\.(model|tiktoken)|{TEMPLATE.pattern}"
)
_SIDECARS = {".json", ".txt", ".model", ".jinja", ".tiktoken"}
# The embedding and the head; when a row of one counts as untrained.
_TABLES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "lm_head.weight")
_SMALL, _ALIKE = 0.02, 0.01  # of an ordinary row's norm; of the row's own norm


def load_tokenizer(base: str, revision: str | None = None) -> FastTokenizer:
    """The fast tokenizer of a folder (which may hold nothing else) or of a hub id; runs no code that came with it."""
    from transformers import AutoTokenizer

    how: Any = {"revision": revision, "trust_remote_code": False, "local_files_only": is_folder(base)}
    hint = "the folder needs a tokenizer.json that is whole; or name another base"
    with loading("the tokenizer", base, hint=hint):
        tokenizer = AutoTokenizer.from_pretrained(base, **how)
        tokenizer.backend_tokenizer.encode("a")  # slow ones have none; a file at odds with itself shows here
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


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
        path = own[_PROCESSORS_TEMPLATE]
        with reading("this is no chat template", where=path, hint="take it away, or fetch the adapter again"):
            tokenizer.chat_template = json.loads(path.read_bytes())["chat_template"]
    if tokenizer.chat_template is None:
        tokenizer.chat_template = load_tokenizer(model.base, model.revision).chat_template
    return tokenizer


def adds_bos(tokenizer: FastTokenizer) -> bool:
    """Whether the tokenizer's own encoding of a text begins with its BOS token."""
    first = tokenizer.backend_tokenizer.encode("a").ids[:1]
    return tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]


def add_tokens(tokenizer: FastTokenizer, new_tokens: Mapping[str, str]) -> dict[int, list[int]]:
    """Give `tokenizer` the recipe's new tokens, as ordinary text. Returns the id of each, in alphabetical order, with
    those of the text that it starts as. Raises RecipeError for one that is there, or would split another."""
    backend, entries, starts = tokenizer.backend_tokenizer, new_tokens and tokenizer.get_vocab(), []
    decode, text = (backend.decoder or decoders.Fuse()).decode, "\0".join(entries)
    for token in sorted(new_tokens):
        pieces, back = backend.encode(token, add_special_tokens=False), decode(["x", token])[1:]
        own = token if tokenizer.unk_token_id in pieces.ids else "".join(pieces.tokens).removeprefix("\u2581")
        split = [one for one in (*tokenizer.get_added_vocab(), *new_tokens) if one in token and one != token]
        split += [entry for entry in entries if own in entry] if own in text else []  # in the tokenizer's alphabet
        starts.append(backend.encode(new_tokens[token], add_special_tokens=False).ids)
        if split or back != token or not token.strip():
            reason = f"would split the token {decode(split[:1])}" if split else f"would come out as {back}"
            reason = "is blank" if not token.strip() else "is a token already" if own in split else reason
            hint = "another one, with marks, as <name>"
            raise RecipeError(f"{token!r} {reason}", where="model.new_tokens", hint=hint)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in sorted(new_tokens)])
    return dict(zip(tokenizer.convert_tokens_to_ids(sorted(new_tokens)), starts, strict=True))


def needed_rows(rows: int, tokens: Iterable[int]) -> int:
    """Rows of an embedding that has `rows`, and needs some for `tokens`: as many or, if too few, a multiple of 64."""
    return rows if (most := max(tokens, default=0)) < rows else 64 * (most // 64 + 1)


def refuse_untrained(base: str, tokenizer: FastTokenizer, *, supervised: Sequence[int]) -> None:
    """Raise DataError when special tokens among `supervised` (token ids) look untrained in the weights of `base`: their
    rows are tiny, or all alike. Where there are no weights to read, nothing is said."""
    added = sorted(tokenizer.added_tokens_decoder)
    try:
        files = find_weights(find_local(base, "config.json").parent) if supervised else []
    except LorasftError:  # none here
        files = []
    found: set[int] = set()
    for file in map(open_tensors, files):
        for name, spec in file.specs.items():  # the embedding and the head
            if name.endswith(_TABLES) and spec.dtype in ("F32", "F16", "BF16") and len(spec.shape) == 2:
                found.update(untrained_rows(file, name, supervised, added=added))
    if found:
        names = ", ".join(tokenizer.convert_ids_to_tokens(sorted(found))[:10])
        what = f"the data asks to learn {names}, which the base never trained: its row is empty"
        hint = "model.base=the instruct model of this family, or chat.template=plain, which needs no such token"
        raise DataError(what, where=base, hint=hint)


def untrained_rows(file: TensorFile, name: str, supervised: Sequence[int], *, added: Sequence[int]) -> Iterator[int]:
    """The ids of `supervised` whose rows are empty next to ordinary ones, or equal to two idle ones of `added`."""
    count = file.specs[name].rows
    some = {place * (count - 1) // 255 for place in range(256)}
    ordinary, idle = some.difference(added), [token for token in added if token < count and token not in supervised]
    usual, others = ([_read_row(file, name, token) for token in ids] for ids in (sorted(ordinary), idle[:64]))
    for token in (token for token in supervised if token < count and usual):
        row = _read_row(file, name, token)
        norm = np.linalg.norm(row)
        alike = sum(np.linalg.norm(other - row) <= _ALIKE * norm for other in others)
        if norm < _SMALL * np.median(np.linalg.norm(usual, axis=1)) or alike >= 2:
            yield token


def _read_row(file: TensorFile, name: str, row: int) -> NDArray[np.float32]:
    """A row in fp32, without torch, which takes a second to import."""
    spec = file.specs[name]
    content = file.read_bytes(name, row * (spec.size // spec.rows), spec.size // spec.rows)
    if spec.dtype == "BF16":  # the upper half of fp32
        return (np.frombuffer(content, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(content, {"F32": np.float32, "F16": np.float16}[spec.dtype]).astype(np.float32)
