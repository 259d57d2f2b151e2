"""Recipe -> store, in one pass: read, encode, write, hold out; and reuse of what was made from the same ingredients."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lorasft.data.chat_format import ChatFormat
from lorasft.data.examples import RowBlock, read_blocks, shape_block
from lorasft.data.folders import find_files, held_out_source, kind_of, list_sources
from lorasft.data.keys import template_reads
from lorasft.data.labels import Labeler
from lorasft.data.packing import Portion
from lorasft.data.report import Report
from lorasft.data.sources import load_hub
from lorasft.data.store import TYPES, Arrays, TokenStore, append_arrays, map_store, pack_examples
from lorasft.data.tokenizer import FastTokenizer
from lorasft.data.workers import available_workers, map_blocks
from lorasft.errors import DataError, LorasftError, ModelError
from lorasft.files import remove_folder, sha256, staged_folder, verify_folder, write_file
from lorasft.recipe import PLACES, ChatSettings, DataSettings, DataSource

SCHEMA = 8  # raised whenever the same ingredients give other tokens, or the same tokens lie otherwise in the folder


@dataclass(frozen=True)
class Prepared:
    """The data of a run, tokenized."""

    folder: Path
    store: TokenStore  # all of it
    train: TokenStore
    held_out: TokenStore | None
    sources: tuple[str, ...]  # names of all sources of the recipe
    portions: tuple[Portion, ...]  # what an epoch takes of `train`, in its order
    report: Report
    key: str
    stop_ids: tuple[int, ...]  # that end an answer under this template, the usual one first
    supervised_special: tuple[int, ...]  # supervised added tokens

    def __reduce__(self) -> tuple[Any, ...]:
        """Between processes it travels as the folder that was committed, never as a copy of all tokens."""
        return open_prepared, (self.folder,)


def prepare(
    data: DataSettings, chat: ChatSettings, *, tokenizer: FastTokenizer, folder: Path, workers: int = 0
) -> Prepared:
    """The tokenized data of a recipe, from `folder/<key>` when it was made before and still verifies.

    Sets the recipe's template on `tokenizer`. `workers`: processes that share the work (0: as many as pay). Raises
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
        write_file(stage / "prepared.json", json.dumps(record))
    return open_prepared(target)


def open_prepared(folder: Path) -> Prepared:
    """Open what `prepare` committed to `folder`. Raises ModelError when it is damaged, or of another version."""
    verify_folder(folder)
    record = json.loads((folder / "prepared.json").read_bytes())
    if record["ingredients"]["schema"] != SCHEMA:
        raise ModelError("another version of lorasft prepared this data", where=folder)
    store = map_store(folder, record["names"])
    return Prepared(
        folder=folder,
        store=store,
        train=store.split(held_out=False),
        held_out=store.split(held_out=True) or None,
        sources=tuple(record["sources"]),
        portions=tuple(Portion(rows, share) for rows, share in record["portions"] if rows),
        report=Report(**record["report"]),
        key=record["key"],
        stop_ids=tuple(record["stop_ids"]),
        supervised_special=tuple(record["supervised_special"]),
    )


def list_ingredients(data: DataSettings, chat_format: ChatFormat) -> dict[str, Any]:
    """What the tokens are made from, wherever it lies, as JSON values. Raises DataError when a source is missing."""
    tokenizer = chat_format.tokenizer
    files = [
        [(kind_of(file), sha256(file)) for file in find_files(source)[0]] or str(load_hub(source)._fingerprint)
        for source in list_sources(data)
    ]
    return {
        "schema": SCHEMA,
        "versions": {name: importlib.metadata.version(name) for name in ("tokenizers", "jinja2", "transformers")},
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "template": tokenizer.chat_template,
        "special": [tokenizer.bos_token, tokenizer.eos_token],
        "probe": chat_format.style.text,  # holds today's date where the template writes it
        "chat": chat_format.chat.model_dump(mode="json", exclude=PLACES["chat"]),
        "data": data.model_dump(mode="json", exclude=PLACES["data"]),
        "files": files,
    }


def name_sources(sources: Sequence[DataSource]) -> list[str]:
    """A name for each source: of its file or folder, and its number in front where two would have the same."""
    names = [re.sub(r"[^\w.-]+", "-", Path(source.path).name) for source in sources]
    alike = len({*names}) < len(names)
    return [f"{number}-{name}" if alike else name for number, name in enumerate(names, start=1)]


def settings_for(source: DataSource, data: DataSettings) -> DataSettings:
    """Those of a run, for one source that is not trained on: all of it is taken, whatever is dropped.

    The format and columns of `data` hold if `source` has columns or begins with a row that fits, else they are found.
    """
    source = held_out_source(source)
    first = next(read_blocks(source, data))
    fits = source.columns is not None or first.kind or not first.error
    changes = {} if fits else {"format": "auto", "columns": None}
    return data.model_copy(update={"train": (source,), "eval": None, "max_dropped": 1.0, **changes})


def _prepare_block(
    work: tuple[RowBlock, int, int, bool], data: DataSettings, labeler: Labeler
) -> tuple[Report, Arrays | None]:
    """What became of a block of rows, and what the store gets of them: None where a row cannot be read, here or before.
    `work`: the block, the numbers of its file and of its source, and whether to encode it. Done by itself, with a
    report of its own."""
    block, file, source, encode = work
    report, packed = Report(), None
    try:
        examples = list(shape_block(block, data, report=report))
        if encode and not (report.errors or report.last):
            encoded = list(labeler.encode_all(examples, report=report))
            each = {"lines": [one.place.line for one in examples], "digests": [one.digest for one in examples]}
            weights = [one.weight for one in examples]
            packed = pack_examples(encoded, files=file, sources=source, row_weights=weights, **each)
    except LorasftError as error:
        report.last.append(error)
    return report, packed


def _write_store(stage: Path, data: DataSettings, labeler: Labeler, workers: int) -> dict[str, Any]:
    """Write all examples into the stage's store; what else to record of them, as JSON values."""
    report, encoding = Report(), True
    names: dict[str, int] = {}  # of files
    blocks = (
        (block, names.setdefault(block.file, len(names)), number, encoding)  # as it is when the block is read
        for number, source in enumerate(list_sources(data))
        for block in read_blocks(source, data)
    )
    work = partial(_prepare_block, data=data, labeler=labeler)
    supervised: set[int] = set()  # ids
    with closing(map_blocks(work, blocks, workers=workers)) as results:
        for own, packed in results:
            encoding = encoding and packed is not None
            if packed is not None and not encoding:
                continue  # was on its way when a row came that cannot be read
            report.join(own)
            if packed is not None:
                append_arrays(stage, **packed)
                supervised.update(np.bincount(packed["ids"][packed["weights"] > 0]).nonzero()[0].tolist())
    report.raise_errors()
    for (file, good), place in report.labels.items():
        if not good and (file, True) in report.labels:
            what = "a preference set: the answer of this row is labelled false, that of others true"
            raise DataError(what, where=place, hint="keep the rows labelled true, in a file of their own")
    template = str(labeler.format.tokenizer.chat_template)
    report.unread = [name for name in report.unread if not template_reads(template, name)]
    names_read = ("digests", "example_sizes", "sources")
    digests, sizes, numbers = (np.fromfile(stage / name, TYPES[name]) for name in names_read)
    apart = numbers >= len(data.train)  # of data.eval
    # Also of rows that were dropped, so that no setting of lengths moves the split.
    if twice := np.intersect1d(digests[~apart], digests[apart]).size:
        hint = "take them out of one of the two: the held-out loss would measure memory"
        raise DataError(f"{twice} rows of data.eval are in data.train as well", where="data.eval", hint=hint)
    below = held_out_below(digests, data.eval) if isinstance(data.eval, float) and sizes.any() else 0
    held_out = apart | (digests < below)
    append_arrays(stage, held_out=held_out)
    report.held_out_examples = int(np.count_nonzero(sizes[held_out]))
    report.train_examples = int(np.count_nonzero(sizes[~held_out]))
    _refuse_losses(data, report)
    called = [name for part in (data.train, data.eval) if isinstance(part, tuple) for name in name_sources(part)]
    counts = np.bincount(numbers[(sizes > 0) & ~held_out], minlength=len(data.train)).tolist()
    portions = [(count, source.share) for count, source in zip(counts, data.train, strict=True)]
    if len(portions) > 1 or portions[0][1] != 1:
        report.epoch = dict(zip(called, (str(Portion(*one)) for one in portions), strict=False))
    others = {str(file) for source in list_sources(data) for file in find_files(source)[1]}
    report.files_not_read = sorted(others.difference(names))
    return {
        "report": report.as_dict(),
        "names": list(names),
        "sources": called,
        "portions": portions,
        "supervised_special": sorted(supervised & labeler.format.tokenizer.added_tokens_decoder.keys()),
    }


def held_out_below(digests: npt.NDArray[np.uint64], share: float) -> int:
    """The digest below which an example is held out, so that about `share` of the distinct contents are, at least one
    and not all. Raises DataError when all rows are equal."""
    distinct = np.unique(digests)
    if len(distinct) < 2:
        what = f"{len(distinct)} different rows: none can be held out"
        raise DataError(what, where="data.eval", hint="data.eval=null")
    count = min(max(1, round(share * len(distinct))), len(distinct) - 1)
    return int(distinct[count])


def _refuse_losses(data: DataSettings, report: Report) -> None:
    """Raise ModelError when more rows than may be dropped break parity; DataError when more of them were dropped, or
    nothing is left."""
    where = ", ".join(source.path for source in data.train)
    dropped, most = report.dropped_examples(), data.max_dropped * report.rows
    reasons = [*report.reasons(), f"data.max_length is {data.max_length}, data.max_dropped {data.max_dropped}"]
    hint = "; ".join(reasons) if dropped else "are the files empty, or all their rows blank or of weight 0?"
    if report.parity_breaks > most:
        what = f"the chat template gives {report.parity_breaks} of {report.rows} rows otherwise than a server would"
        raise ModelError(what, where=where, hint=f"chat.template=FILE with another; {hint}")
    if dropped > most or not report.train_examples:
        apart = {"of weight 0": report.rows_of_weight_0, "held out": report.held_out_examples}
        others = "".join(f", {count} {name}" for name, count in apart.items() if count)
        what = (
            f"{report.rows or 'no'} rows read, {dropped} dropped ({report.bad_rows} bad, {report.over_long_examples} "
            f"over-long, {report.examples_without_target} with nothing to supervise){others}: "
            f"{report.train_examples or 'none'} left"
        )
        raise DataError(what, where=where, hint=hint)
