"""Files and hub ids -> rows, one at a time, each with its line. Lines of JSON stay bytes, to be parsed elsewhere.

JSON is read here and not through Arrow, which would give every row the union of all keys, filled with nulls;
CSV is read with the csv module, because a type inferred from text ("NA", "007") is no longer the text.
"""

from __future__ import annotations

import csv
import glob
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasft.errors import DataError, UnsafeError
from lorasft.hub import find_hub, refuse_offline

if TYPE_CHECKING:
    from lorasft.recipe import DataSource

Row = dict[str, Any]
Raw = Any  # a row as it was read: bytes of JSON, a value, or the DataError that stands for it
LARGEST_FIELD = 8 << 20  # characters, of a CSV file
SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
BOM = b"\xef\xbb\xbf"
RECODE = "convert it to UTF-8, for example with iconv -f latin1 -t utf8"
REPAIR = "fix the file there, or fetch it again: nothing after this can be read"


@dataclass(frozen=True)
class RowLocation:
    """Where a row is: file and line, counted from 1 (arrays, Parquet and hub ids: the row's number)."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def source_files(path: str) -> tuple[Path, ...]:
    """The files that a source's path names, sorted; none when it is a hub id. Raises DataError."""
    here = Path(path)
    if here.is_dir():
        found = sorted(file for file in here.iterdir() if file.suffix.lower() in SUFFIXES)
    else:
        found = [here] if here.exists() else sorted(map(Path, glob.glob(path, recursive=True)))  # noqa: PTH207
        if not found and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) and here.suffix.lower() not in SUFFIXES:
            return ()
    if not found:
        what = f"there is no such file, or no {', '.join(SUFFIXES)} in this folder"
        raise DataError(what, where=path, hint=f"the folder that was looked in: {here.absolute().parent}")
    return tuple(found)


def read_file(path: Path) -> Iterator[tuple[int, Raw]]:
    """The rows of one file, each with its line. Raises DataError when the file cannot be read, or not further."""
    readers = {".json": _read_json, ".jsonl": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    kind = path.suffix.lower()
    if kind not in readers:
        hint = f"known: {', '.join(SUFFIXES)}"
        raise DataError(f"unknown kind of file: {path.suffix or path.name}", where=str(path), hint=hint)
    line = 0
    try:
        for line, raw in readers[kind](path):
            yield line, raw
    except (OSError, ValueError, NotImplementedError, csv.Error) as error:  # the ones of Parquet, too
        hint = RECODE if isinstance(error, UnicodeDecodeError) else REPAIR
        raise DataError(f"cannot read this as {kind}: {error}", where=f"{path}:{line + 1}", hint=hint) from None


def read_hub(source: DataSource) -> Iterator[tuple[int, Raw]]:
    """The rows of a data set on the hub, each with its number. Raises DataError when it cannot be had."""
    yield from enumerate(map(drop_nulls, load_hub(source)), start=1)


def parse_row(raw: Raw, place: RowLocation) -> Row:
    """A row of `read_file` or `read_hub` as an object. Raises DataError with the place."""
    if isinstance(raw, DataError):
        raise raw
    if isinstance(raw, bytes):
        try:
            raw = parse_strict(raw.decode())
        except ValueError as error:
            hint = RECODE if isinstance(error, UnicodeDecodeError) else None
            raise DataError(f"not JSON: {error}", where=str(place), hint=hint) from None
    if not isinstance(raw, dict):
        raise DataError(f"a row must be an object, this is {type(raw).__name__}", where=str(place))
    return raw


def load_hub(source: DataSource) -> Any:
    """The `datasets.Dataset` of a hub id; `datasets` is imported only here."""
    find_hub()
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(source.path, source.config, split=source.split)
    except Exception as error:  # whatever the network, the hub and the loader may raise
        refuse_offline(error, source.path)
        if "Dataset scripts" in str(error):
            what = "this data set is a program of its own, which lorasft does not run"
            raise UnsafeError(what, where=source.path, hint="take its files: JSON, CSV or Parquet") from None
        raise DataError(
            f"cannot load this data set: {type(error).__name__}: {error}",
            where=source.path,
            hint="data.train takes a file, a folder, a glob or the id of a data set on the hub",
        ) from None


def drop_nulls(value: Any) -> Any:
    """Arrow gives each struct the keys of all rows, null where a row had none: those go."""
    if isinstance(value, dict):
        return {key: drop_nulls(item) for key, item in value.items() if item is not None}
    return [drop_nulls(item) for item in value] if isinstance(value, list) else value


def parse_strict(text: str) -> Any:
    """JSON without what Python's parser forgives. Raises ValueError for doubled keys and NaN."""
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _read_json(path: Path) -> Iterator[tuple[int, Raw]]:
    with open(path, "rb") as file:
        is_array = file.read(4096).removeprefix(BOM).lstrip().startswith(b"[")
        file.seek(0)
        if is_array:
            yield from enumerate(parse_strict(file.read().decode("utf-8-sig")), start=1)
            return
        # Read as bytes: text mode, or splitlines, would break rows at U+2028, U+0085 and \v.
        for number, line in enumerate(file, start=1):
            if row := line.removeprefix(BOM).strip():
                yield number, row


def _read_csv(path: Path) -> Iterator[tuple[int, Raw]]:
    csv.field_size_limit(LARGEST_FIELD)
    with open(path, "rb") as file:
        reader = csv.reader((line.removeprefix(BOM).decode() for line in file), strict=True)
        names = next(reader, [])
        if len(set(names)) < len(names):
            raise ValueError(f"a column twice: {', '.join(names)}")
        line = reader.line_num + 1
        for fields in reader:
            if len(fields) == len(names):
                yield line, dict(zip(names, fields, strict=True))
            elif fields:
                what = f"{len(fields)} fields, the header has {len(names)}"
                yield line, DataError(what, where=f"{path}:{line}")
            line = reader.line_num + 1


def _read_parquet(path: Path) -> Iterator[tuple[int, Raw]]:
    from pyarrow.parquet import ParquetFile

    batches = ParquetFile(path).iter_batches(batch_size=1024)
    rows = (row for batch in batches for row in batch.to_pylist())
    yield from enumerate(map(drop_nulls, rows), start=1)


def _refuse_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_refuse_doubles, parse_constant=_refuse_constant)
