"""Recipe -> store, in one pass: read, encode, write, hold out; and reuse of what was made from the same ingredients."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lorasft.data.chat_format import ChatFormat
from lorasft.data.examples import Example, RowBlock, read_blocks, shape_block
from lorasft.data.labels import Labeler
from lorasft.data.report import Report
from lorasft.data.sources import load_hub, source_files
from lorasft.data.store import Arrays, TokenStore, append_arrays, map_store, pack_examples
from lorasft.data.tokens import Tokens
from lorasft.data.workers import available_workers, map_blocks
from lorasft.errors import DataError, LorasftError, ModelError
from lorasft.files import remove_folder, sha256, staged_folder, verify_folder, write_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from lorasft.recipe import ChatSettings, DataSettings, DataSource

SCHEMA = 4  # raised whenever the same ingredients give other tokens, or the same tokens lie otherwise in the folder

Digests = npt.NDArray[np.uint64]
NO_DIGESTS: Digests = np.zeros(0, dtype=np.uint64)


@dataclass(frozen=True)
class Prepared:
    """The data of a run, tokenized."""

    folder: Path
    store: TokenStore  # all of it
    train: TokenStore
    held_out: TokenStore | None
    report: Report
    key: str
    stop_ids: tuple[int, ...]  # that end an answer under this template, the usual one first
    supervised_special: tuple[int, ...]  # supervised added tokens

    def __reduce__(self) -> tuple[Any, ...]:
        """Between processes it travels as the folder that was committed, never as a copy of all tokens."""
        return open_prepared, (self.folder,)


def prepare(
    data: DataSettings,
    chat: ChatSettings,
    *,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    workers: int | None = None,
) -> Prepared:
    """The tokenized data of a recipe, from `folder/<key>` when it was made before and still verifies.

    Sets the recipe's template on `tokenizer`. `workers`: processes that share the work (null: as many as pay). Raises
    DataError or ErrorGroup for rows, files and counts, ModelError for templates, CapacityError when a process dies.
    """
    labeler = Labeler(ChatFormat(tokenizer, chat), data)
    ingredients = list_ingredients(data, labeler.format)
    key = hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()
    target = folder / key[:16]
    if target.exists():
        try:
            return open_prepared(target)
        except ModelError:  # torn or damaged: made again
            remove_folder(target)
    with staged_folder(target) as stage:
        record = _write_store(stage, data, labeler, workers or available_workers())
        record |= {"key": key, "ingredients": ingredients, "stop_ids": labeler.format.stop_ids}
        write_file(stage / "prepared.json", json.dumps(record).encode())
    return open_prepared(target)


def open_prepared(folder: Path) -> Prepared:
    """Open what `prepare` committed to `folder`. Raises ModelError when it is damaged, or of another version."""
    verify_folder(folder)
    record = json.loads((folder / "prepared.json").read_bytes())
    if record["ingredients"]["schema"] != SCHEMA:
        raise ModelError("another version of lorasft prepared this data", where=str(folder))
    store = map_store(folder, record["names"])
    held_out = store.split(held_out=True)
    return Prepared(
        folder=folder,
        store=store,
        train=store.split(held_out=False),
        held_out=held_out if len(held_out) else None,
        report=Report(**record["report"]),
        key=record["key"],
        stop_ids=tuple(record["stop_ids"]),
        supervised_special=tuple(record["supervised_special"]),
    )


def read_ingredients(folder: Path, key: str) -> dict[str, Any]:
    """What the tokens in `folder/<key>` were made from; nothing when they are gone."""
    try:
        record = json.loads((folder / key[:16] / "prepared.json").read_bytes())
        return dict(record["ingredients"])
    except (OSError, ValueError, KeyError):
        return {}


def list_ingredients(data: DataSettings, chat_format: ChatFormat) -> dict[str, Any]:
    """Everything that the tokens are made from, as JSON values. Raises DataError when a source is missing."""
    tokenizer = chat_format.tokenizer
    files: dict[str, str] = {}
    for source, _ in _sources(data):
        found = source_files(source.path)
        files.update((str(file), sha256(file)) for file in found)
        if not found:
            files[" ".join(filter(None, (source.path, source.config, source.split)))] = str(
                load_hub(source)._fingerprint
            )
    return {
        "schema": SCHEMA,
        "versions": {name: importlib.metadata.version(name) for name in ("tokenizers", "jinja2", "transformers")},
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "template": tokenizer.chat_template,
        "special": [tokenizer.bos_token, tokenizer.eos_token],
        "probe": chat_format.style.text,  # holds today's date where the template writes it
        "chat": chat_format.chat.model_dump(mode="json"),
        "data": data.model_dump(mode="json"),
        "files": files,
    }


def _sources(data: DataSettings) -> list[tuple[DataSource, bool]]:
    """All sources of the recipe, and whether they are held out."""
    apart = data.eval if isinstance(data.eval, tuple) else ()
    return [*((source, False) for source in data.train), *((source, True) for source in apart)]


def encode_source(
    source: DataSource, data: DataSettings, chat: ChatSettings, *, tokenizer: PreTrainedTokenizerFast
) -> tuple[list[tuple[Example, tuple[Tokens, ...]]], Report]:
    """The examples of one source that is not trained on, with their sequences, and what became of its rows.

    The format and columns of `data` hold if `source` states its own columns or begins with a row that has them, else
    they are found. Raises DataError, or ErrorGroup, for what cannot be read or encoded.
    """
    blocks = read_blocks(source, data)
    first = next(blocks)
    if source.columns is None and first.error and not first.kind:
        data = data.model_copy(update={"format": "auto", "columns": None})
        blocks = read_blocks(source, data)
        first = next(blocks)
    labeler, report = Labeler(ChatFormat(tokenizer, chat), data), Report()
    encoded: list[tuple[Example, tuple[Tokens, ...]]] = []
    for block in chain([first], blocks):
        encoded += labeler.encode_all(list(shape_block(block, data, report=report)), report=report)
    report.raise_errors()
    return encoded, report


@dataclass(frozen=True)
class PreparedBlock:
    """What became of a block of rows, small enough to be sent from one process to another."""

    file: str
    apart: bool  # of a source that is held out
    report: Report
    error: LorasftError | None  # why the rows cannot be read or encoded further
    digests: Digests  # of all examples that could be read
    packed: Arrays | None  # None: nothing was encoded, because of rows that cannot be read, here or before
    packed_digests: Digests


def _prepare_block(work: tuple[RowBlock, bool, bool], data: DataSettings, labeler: Labeler) -> PreparedBlock:
    """A block of rows, whether it is held out, and whether to encode it: done by itself, with a report of its own."""
    block, apart, encode = work
    report, error = Report(), None
    examples: list[Example] = []
    encoded: list[tuple[Example, tuple[Tokens, ...]]] = []
    try:
        examples.extend(shape_block(block, data, report=report))
        encode = encode and not report.errors
        encoded = list(labeler.encode_all(examples, report=report)) if encode else []
    except LorasftError as raised:
        error = raised
    digests, packed_digests = (
        np.array([example.digest for example in some], dtype=np.uint64)
        for some in (examples, [example for example, _ in encoded])
    )
    whole = encode and not error
    packed = pack_examples([(example.place.line, tokens) for example, tokens in encoded]) if whole else None
    return PreparedBlock(block.file, apart, report, error, digests, packed, packed_digests)


def _write_store(stage: Path, data: DataSettings, labeler: Labeler, workers: int) -> dict[str, Any]:
    """Write all examples into the stage's store; what else to record of them, as JSON values."""
    report, encoding = Report(), True
    # `encoding` as it is when a block is read.
    blocks = ((block, apart, encoding) for source, apart in _sources(data) for block in read_blocks(source, data))
    work = partial(_prepare_block, data=data, labeler=labeler)
    found: dict[bool, list[Digests]] = {False: [NO_DIGESTS], True: [NO_DIGESTS]}
    packed: list[tuple[Digests, bool]] = [(NO_DIGESTS, False)]
    names: dict[str, int] = {}
    supervised: set[int] = set()  # ids
    with closing(map_blocks(work, blocks, workers=workers)) as results:
        for block in results:
            encoding = encoding and block.packed is not None
            if block.packed is not None and not encoding:
                continue  # was on its way when a row came that cannot be read
            report.join(block.report)
            if block.error:
                report.raise_errors(block.error)
            found[block.apart].append(block.digests)
            if block.packed is not None:
                files = np.full(len(block.packed["lines"]), names.setdefault(block.file, len(names)))
                append_arrays(stage, files=files, **block.packed)
                supervised.update(np.bincount(block.packed["ids"][block.packed["supervised"]]).nonzero()[0].tolist())
                packed.append((block.packed_digests, block.apart))
    report.raise_errors()
    below = _split(data, *(np.concatenate(found[apart]) for apart in (False, True)), report=report)
    held_out = np.concatenate([apart | (own < below) for own, apart in packed])
    append_arrays(stage, held_out=held_out)
    report.held_out_examples = int(held_out.sum())
    report.train_examples = len(held_out) - report.held_out_examples
    _refuse_losses(data, report)
    return {
        "report": report.as_dict(),
        "names": list(names),
        "supervised_special": sorted(supervised & labeler.format.tokenizer.added_tokens_decoder.keys()),
    }


def _split(data: DataSettings, train: Digests, apart: Digests, *, report: Report) -> int:
    """The digest below which an example is held out. `train`, `apart`: of all rows that could be read, also of those
    dropped later, so that no setting of lengths moves the split."""
    if not len(train):
        what = f"no rows to train on ({report.bad_rows} bad ones)"
        raise DataError(what, where=_paths(data), hint="are the files empty, or all their lines blank?")
    report.duplicate_rows = len(train) - len(np.unique(train))
    twice = np.intersect1d(train, apart).size
    if twice:
        hint = "take them out of one of the two: the held-out loss would measure memory"
        raise DataError(f"{twice} rows of data.eval are in data.train as well", where="data.eval", hint=hint)
    return held_out_below(train, data.eval) if isinstance(data.eval, float) else 0


def held_out_below(digests: Digests, share: float) -> int:
    """The digest below which an example is held out, so that about `share` of the distinct contents are, at least one
    and not all. Raises DataError when all rows are equal."""
    distinct = np.unique(digests)
    if len(distinct) < 2:
        what = f"{len(distinct)} different rows: none can be held out"
        raise DataError(what, where="data.eval", hint="data.eval=null")
    count = min(max(1, round(share * len(distinct))), len(distinct) - 1)
    return int(distinct[count])


def _refuse_losses(data: DataSettings, report: Report) -> None:
    """Raise DataError when more of the rows were dropped than the recipe allows, or nothing is left."""
    if report.parity_breaks:
        what = f"{report.parity_breaks} of {report.answers} answers do not follow what a server would feed"
        hint = "a bug in lorasft: please report the template and one row"
        raise DataError(what, where=_paths(data), hint=hint)
    dropped = report.dropped_examples()
    if dropped > data.max_dropped * report.rows or not report.train_examples:
        what = (
            f"{dropped} of {report.rows} rows dropped ({report.bad_rows} bad, {report.over_long_examples} over-long, "
            f"{report.examples_without_target} with nothing to supervise): {report.train_examples} to train on"
        )
        examples = "; ".join(report.dropped[:3])
        hint = f"{examples}; data.max_length is {data.max_length}, data.max_dropped {data.max_dropped}"
        raise DataError(what, where=_paths(data), hint=hint)


def _paths(data: DataSettings) -> str:
    return ", ".join(source.path for source in data.train)
