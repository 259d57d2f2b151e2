"""Recipe -> stores: read, hold out, encode, write; and reuse of what was made from the same ingredients."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from array import array
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lorasft.data.chat import Encoder
from lorasft.data.examples import Example, RowBlock, held_out_below, read_blocks, shape_block
from lorasft.data.report import BadRows, Report
from lorasft.data.rows import Place, load_hub, source_files
from lorasft.data.store import Packed, StoreWriter, TokenStore, map_store, pack_examples
from lorasft.data.tokens import Tokens
from lorasft.data.workers import available_workers, map_blocks
from lorasft.errors import DataError, ModelError
from lorasft.files import remove_folder, sha256, staged_folder, verify_folder, write_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from lorasft.recipe import ChatSettings, DataSettings, DataSource

SCHEMA = 2  # raised whenever the same ingredients give other tokens
SAMPLES = 8  # held-out examples kept as messages, to show answers before and after


@dataclass(frozen=True)
class Prepared:
    """The data of a run, tokenized: `held_out` is None when nothing is.

    `stop_ids` end an answer under this template, the usual one first; `learned_special`: added tokens that are learned.
    """

    folder: Path
    train: TokenStore
    held_out: TokenStore | None
    report: Report
    samples: tuple[Example, ...]
    key: str
    stop_ids: tuple[int, ...]
    learned_special: tuple[int, ...]

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

    Sets the recipe's template on `tokenizer`. `workers`: processes that share the work (null: as many as pay); the
    result is the same. Raises DataError (or ErrorGroup) for rows, files and counts that the recipe does not allow,
    ModelError for a template that cannot be used, CapacityError when a process dies.
    """
    report = Report()
    encoder = Encoder(tokenizer, chat, data=data, report=report)
    ingredients = list_ingredients(data, chat, encoder=encoder)
    key = make_key(ingredients)
    target = folder / key[:16]
    if target.exists():
        try:
            return open_prepared(target)
        except ModelError:  # torn or damaged: made again
            remove_folder(target)
    before = _file_states(data)
    with staged_folder(target) as stage:
        samples, learned_special = _write(stage, data, encoder, workers or available_workers())
        if _file_states(data) != before:
            what = "the files of the data changed while they were read"
            raise DataError(what, where=_paths(data), hint="start again when they are complete")
        record = {
            "key": key,
            "ingredients": ingredients,
            "samples": [asdict(sample) for sample in samples],
            "report": vars(report) | {"lengths": list(report.lengths)},
            "stop_ids": encoder.stop_ids,
            "learned_special": sorted(learned_special),
        }
        write_file(stage / "prepared.json", json.dumps(record).encode())
    return _open(target)


def open_prepared(folder: Path) -> Prepared:
    """Open what `prepare` committed to `folder`. Raises ModelError when a file is missing or differs."""
    verify_folder(folder)
    return _open(folder)


def _open(folder: Path) -> Prepared:
    record = json.loads((folder / "prepared.json").read_bytes())
    report = Report(**record["report"] | {"lengths": array("q", record["report"]["lengths"])})
    held_out = map_store(folder / "held_out")
    samples = tuple(_read_sample(sample) for sample in record["samples"])
    return Prepared(
        folder=folder,
        train=map_store(folder / "train"),
        held_out=held_out if len(held_out) else None,
        report=report,
        samples=samples,
        key=record["key"],
        stop_ids=tuple(record["stop_ids"]),
        learned_special=tuple(record["learned_special"]),
    )


def read_ingredients(folder: Path, key: str) -> dict[str, Any]:
    """What the tokens in `folder/<key>` were made from; nothing when they are gone."""
    try:
        record = json.loads((folder / key[:16] / "prepared.json").read_bytes())
        return dict(record["ingredients"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def make_key(ingredients: dict[str, Any]) -> str:
    """SHA-256, in hex."""
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()


def list_ingredients(data: DataSettings, chat: ChatSettings, *, encoder: Encoder) -> dict[str, Any]:
    """Everything that the tokens are made from, as JSON values. Raises DataError when a source is missing."""
    tokenizer = encoder.turns.tokenizer
    return {
        "schema": SCHEMA,
        "versions": {name: importlib.metadata.version(name) for name in ("tokenizers", "jinja2", "transformers")},
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "template": tokenizer.chat_template,
        "special": [tokenizer.bos_token, tokenizer.eos_token],
        "probe": encoder.turns.probe_text,  # holds today's date where the template writes it
        "chat": chat.model_dump(mode="json"),
        "data": data.model_dump(mode="json"),
        "files": dict(entry for source in _sources(data) for entry in _source_hashes(source)),
    }


def _sources(data: DataSettings) -> tuple[DataSource, ...]:
    return (*data.train, *(data.eval if isinstance(data.eval, tuple) else ()))


def _file_states(data: DataSettings) -> list[tuple[str, int, int]]:
    files = [file for source in _sources(data) for file in source_files(source.path)]
    return [(str(file), (state := file.stat()).st_size, state.st_mtime_ns) for file in files]


def _source_hashes(source: DataSource) -> list[tuple[str, str]]:
    files = source_files(source.path)
    name = " ".join(filter(None, (source.path, source.config, source.split)))
    return [(str(file), sha256(file)) for file in files] or [(name, str(load_hub(source)._fingerprint))]


def encode_sources(data: DataSettings, *, encoder: Encoder) -> Iterator[tuple[Example, tuple[Tokens, ...], bool]]:
    """All examples of the recipe that can be trained on, with their sequences, and whether they are held out.

    The encoder's report counts. Raises DataError, or ErrorGroup, before the first example for rows that cannot be
    read, after the last for those that cannot be encoded or when too many were dropped.
    """
    held_out = _survey(data, encoder.report, available_workers())
    bad = BadRows(data.on_bad_row, encoder.report)
    for (block, _), lines in zip(_blocks(data), held_out, strict=True):
        yield from _encode_block(block, lines, data, encoder, bad=bad)
        bad.raise_many()
    bad.raise_all()
    _refuse_losses(data, encoder.report)


def _blocks(data: DataSettings) -> Iterator[tuple[RowBlock, bool]]:
    """All rows of the recipe, and whether they are of a source that is held out."""
    for sources, apart in ((data.train, False), (data.eval if isinstance(data.eval, tuple) else (), True)):
        for block in read_blocks(sources, data):
            yield block, apart


def _encode_block(
    block: RowBlock, held_out: set[int], data: DataSettings, encoder: Encoder, *, bad: BadRows
) -> Iterator[tuple[Example, tuple[Tokens, ...], bool]]:
    """The block's examples; `held_out`: lines."""
    for example, sequences in encoder.encode_all(shape_block(block, data, bad=bad), bad=bad):
        is_held_out = example.place.line in held_out
        bad.report.held_out_examples += is_held_out
        bad.report.train_examples += not is_held_out
        yield example, sequences, is_held_out


def _survey(data: DataSettings, report: Report, workers: int) -> list[set[int]]:
    """Read all rows once, so that every fault is found before the long work; the lines of each block to hold out."""
    bad = BadRows(data.on_bad_row, Report())
    found: list[Surveyed] = []
    with closing(map_blocks(partial(_survey_block, data=data), _blocks(data), workers=workers)) as blocks:
        for later, surveyed in blocks:
            bad.join(later)
            found.append(surveyed)
    bad.raise_all()
    train, apart = (
        np.concatenate([np.zeros(0, dtype=np.uint64), *(block.digests for block in found if block.apart == side)])
        for side in (False, True)
    )
    if not len(train):
        what = f"no rows to train on ({bad.report.bad_rows} bad ones)"
        raise DataError(what, where=_paths(data), hint="are the files empty, or all their lines blank?")
    report.duplicate_rows = len(train) - len(np.unique(train))
    twice = np.intersect1d(train, apart).size
    if twice:
        hint = "take them out of one of the two: the held-out loss would measure memory"
        raise DataError(f"{twice} rows of data.eval stand in data.train as well", where="data.eval", hint=hint)
    below = held_out_below(train, data.eval) if isinstance(data.eval, float) else 0
    return [set(block.lines[block.apart | (block.digests < below)].tolist()) for block in found]


@dataclass(frozen=True)
class Surveyed:
    """The examples of a block; `apart`: they are of a source that is held out."""

    digests: npt.NDArray[np.uint64]
    lines: npt.NDArray[np.int64]
    apart: bool


def _survey_block(work: tuple[RowBlock, bool], data: DataSettings) -> tuple[BadRows, Surveyed]:
    block, apart = work
    bad = BadRows(data.on_bad_row, Report())
    rows: list[tuple[int, int]] = []
    with bad.keeping():
        rows = [(example.digest(), example.place.line) for example in shape_block(block, data, bad=bad)]
    digests, lines = zip(*rows, strict=True) if rows else ((), ())
    return bad, Surveyed(np.array(digests, dtype=np.uint64), np.array(lines, dtype=np.int64), apart)


@dataclass(frozen=True)
class Encoded:
    """What became of a block of rows, small enough to be sent from one process to another."""

    bad: BadRows
    train: Packed
    held_out: Packed
    samples: list[Example]
    learned_special: tuple[int, ...]


def _write(stage: Path, data: DataSettings, encoder: Encoder, workers: int) -> tuple[list[Example], set[int]]:
    """Encode all examples into the stage's stores; the first few held-out conversations, the added tokens learned."""
    samples: list[Example] = []
    learned_special: set[int] = set()
    report = encoder.report
    bad = BadRows(data.on_bad_row, report)
    work = partial(_encode_apart, data=data, encoder=encoder)
    blocks = zip((block for block, _ in _blocks(data)), _survey(data, report, workers), strict=True)
    with (
        StoreWriter(stage / "train") as train,
        StoreWriter(stage / "held_out") as held_out,
        closing(map_blocks(work, blocks, workers=workers)) as results,
    ):
        for encoded in results:
            bad.join(encoded.bad)
            train.add(encoded.train)
            held_out.add(encoded.held_out)
            samples.extend(encoded.samples)
            del samples[SAMPLES:]
            learned_special.update(encoded.learned_special)
    bad.raise_all()
    _refuse_losses(data, report)
    return samples, learned_special


def _encode_apart(work: tuple[RowBlock, set[int]], data: DataSettings, encoder: Encoder) -> Encoded:
    """A block of rows, and the lines to hold out, encoded by itself, with a report of its own."""
    block, lines = work
    bad = BadRows(data.on_bad_row, Report())
    encoder.count_in(bad.report)
    rows: list[tuple[Example, tuple[Tokens, ...], bool]] = []
    with bad.keeping():
        rows = list(_encode_block(block, lines, data, encoder, bad=bad))
    train, held_out = (
        pack_examples([(example.place, sequences) for example, sequences, is_held_out in rows if is_held_out == side])
        for side in (False, True)
    )
    samples = [example for example, _, is_held_out in rows if is_held_out and example.messages]
    return Encoded(bad, train, held_out, samples[:SAMPLES], encoder.learned_special())


def _refuse_losses(data: DataSettings, report: Report) -> None:
    """Raise DataError when more of the rows were dropped than the recipe allows, or nothing is left."""
    dropped = report.dropped_examples()
    lengths = ", ".join(f"{name}: {length}" for name, length in report.length_quantiles().items())
    hint = f"lengths in tokens {lengths}; data.max_length is {data.max_length}, data.max_dropped {data.max_dropped}"
    if data.overlong == "split" and report.over_long_examples:
        hint += "; data.overlong=split cuts texts only, and drops conversations"
    if dropped > data.max_dropped * report.rows:
        what = (
            f"{dropped} of {report.rows} rows dropped ({report.bad_rows} bad, {report.over_long_examples} over-long, "
        )
        raise DataError(f"{what}{report.examples_without_target} with nothing to learn)", where=_paths(data), hint=hint)
    if report.parity_breaks:
        what = f"{report.parity_breaks} of {report.answers} answers do not stand behind what a server would feed"
        hint = "a fault of lorasft: please report the template and one row"
        raise DataError(what, where=_paths(data), hint=hint)
    if not report.train_examples:
        raise DataError(
            f"nothing to train on: {report.rows} rows read, {dropped} dropped", where=_paths(data), hint=hint
        )


def _paths(data: DataSettings) -> str:
    return ", ".join(source.path for source in data.train)


def _read_sample(sample: dict[str, Any]) -> Example:
    tools = tuple(sample["tools"]) if sample["tools"] else None
    return Example(tuple(sample["messages"]), tools, sample["text"], Place(**sample["place"]))
