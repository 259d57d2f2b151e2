"""Files and hub ids -> rows, one at a time, each with its line. Lines of JSON stay bytes, to be parsed elsewhere.

JSON is read here and not through Arrow, which would give every row the union of all keys, filled with nulls;
CSV is read with the csv module, because a type inferred from text ("NA", "007") is no longer the text.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from lorasft.data.folders import COMPRESSED, KINDS, SPLITS, kind_of
from lorasft.errors import DataError
from lorasft.hub import find_hub, loading
from lorasft.recipe import DataSource

Row = dict[str, Any]
Raw = Any  # a row as it was read: bytes of JSON, a value, or the DataError that stands for it
LARGEST_ROW = 8 << 20  # bytes of JSON; characters of a field of CSV
_POINTER = b"version https://git-lfs."
RECODE = "Western European text becomes UTF-8 with iconv -f cp1252 -t utf-8 FILE; in other UTF-8 fix these bytes"
REPAIR = "fix the file there, or fetch it again: nothing after this can be read"
SHAPES = "rows are an array, or one object per line, as jq -c . FILE writes them (from a list: jq -c '.NAME[]' FILE)"
LISTS = ("data", "rows", "examples", "items", "records", "samples", "instances")  # where one object keeps all rows
OF_ROWS = {"messages", "conversations", "prompt", "instruction", "text"}  # a column of each format


@dataclass(frozen=True)
class RowLocation:
    """Where a row is: file and line, counted from 1 (arrays, Parquet and hub ids: the row's number)."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def read_file(path: Path) -> Iterator[tuple[int, Raw]]:
    """The rows of one file, each with its line. Raises DataError when the file cannot be read, or not further."""
    kind, line = kind_of(path), 0
    if kind not in KINDS:
        hint = f"known: {', '.join(KINDS)}, and text compressed as {', '.join(COMPRESSED)}"
        raise DataError(f"unknown kind of file: {kind or path.name}", where=path, hint=hint)
    with open(path, "rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise DataError("this is a pointer of git-lfs, not the file itself", where=path, hint="git lfs pull")
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_arrow, ".arrow": _read_arrow}
    try:
        for line, raw in readers.get(kind, _read_json)(path):
            yield line, raw
    except (OSError, ValueError, NotImplementedError, RecursionError, csv.Error) as error:  # the ones of Parquet, too
        hint = {UnicodeDecodeError: RECODE, json.JSONDecodeError: SHAPES}.get(type(error), REPAIR)
        raise DataError(f"cannot read this as {kind}: {error}", where=f"{path}:{line + 1}", hint=hint) from None


def parse_row(raw: Raw) -> Row:
    """A row as it was read, as an object. Raises DataError."""
    if isinstance(raw, DataError):
        raise raw
    if isinstance(raw, bytes):
        if len(raw) > LARGEST_ROW:
            raise _too_large(len(raw))
        try:
            raw = parse_strict(raw.decode())
        except ValueError as error:
            hint = RECODE if isinstance(error, UnicodeDecodeError) else None
            raise DataError(f"not JSON: {error}", hint=hint) from None
    if not isinstance(raw, dict):
        raise DataError(f"a row must be an object, this is {type(raw).__name__}")
    return raw


def load_hub(source: DataSource) -> Any:
    """The `datasets.Dataset` of a hub id, whose rows have nulls. Raises DataError when it cannot be had."""
    find_hub()
    import datasets  # only here

    datasets.disable_progress_bars()
    hint = "data.train takes a file, a folder, a glob or the id of a data set on the hub"
    safe = "take its files: JSON, CSV or Parquet"
    with loading("the data set", source.path, hint=hint, safe=safe, kind=DataError):
        return datasets.load_dataset(source.path, source.config, split=source.split)


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


def _open(path: Path) -> IO[bytes]:
    """The bytes of a file, unpacked, without a mark at its beginning, and in UTF-8 where they begin as UTF-16."""
    if path.suffix.lower() in COMPRESSED:
        import pyarrow

        file = io.BufferedReader(pyarrow.input_stream(str(path)))
    else:
        file = open(path, "rb")  # noqa: SIM115
    mark = file.peek(3)[:3]
    if mark[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or mark[1:2] == b"\0":
        with file:
            return io.BytesIO(file.read().decode("utf-16").encode())
    file.read(3 if mark == codecs.BOM_UTF8 else 0)
    return file


def _read_json(path: Path) -> Iterator[tuple[int, Raw]]:
    with _open(path) as file:
        # Read as bytes: text mode, or splitlines, would break rows at U+2028, U+0085 and \v.
        rows = (line.removeprefix(codecs.BOM_UTF8).strip() for line in file)
        lines = ((number, row) for number, row in enumerate(rows, 1) if row)
        head = list(islice(lines, 2))
        begins = head[0][1][:1] if head else b""
        if begins not in (b"[", b"{") or any(row[:1] + row[-1:] == b"{}" for _, row in head[len(head) == 1 :]):
            yield from chain(head, lines)
            return
    try:
        with _open(path) as file:
            values = list(_find_values(file.read().decode()))
    except (ValueError, RecursionError):
        if len(head) > 1:
            raise
        values = head  # one line, a bad row
    yield from values if len(values) > 1 else enumerate(_rows_of(values[0][1], path), start=1)


def _find_values(text: str) -> Iterator[tuple[int, Any]]:
    """The values of JSON that follow one another in a text, each with its line."""
    start, end, line = 0, 0, 1
    while found := re.compile(r"\S").search(text, end):
        line += text.count("\n", start, found.start())
        start = found.start()
        value, end = _DECODER.raw_decode(text, start)
        yield line, value


def _rows_of(value: Any, path: Path) -> list[Any]:
    """The rows of a file that is one value: of an array, of a list in an object, of an object with each, of columns, or
    the value itself. Raises DataError for lists of several splits."""
    if not isinstance(value, dict):
        return value if isinstance(value, list) else [value]
    lists = [name for name in (*LISTS, *SPLITS) if isinstance(value.get(name), list) and not value.keys() & OF_ROWS]
    if len(lists) == 1 and lists[0] in LISTS and all(isinstance(row, dict) for row in value[lists[0]]):
        return list(value[lists[0]])
    if lists:
        hint = f"write each list into a file of its own; {SHAPES}"
        raise DataError(f"one object with lists under {', '.join(lists)}", where=path, hint=hint)
    parts = list(value.values())
    if len(parts) == 1 and value.keys() <= set(LISTS) and isinstance(parts[0], dict):
        return _rows_of(parts[0], path)
    objects = [part for part in parts if isinstance(part, dict)]
    if len(objects) == len(value) and (all(map(str.isdecimal, value)) or all(one.keys() & OF_ROWS for one in objects)):
        return objects  # rows by their numbers or names
    columns = [list(part.values()) if isinstance(part, dict) else part for part in parts]  # as pandas writes them
    if any(not isinstance(part, list) or not part or len(part) != len(columns[0]) for part in columns) or not columns:
        return [value]
    rows = [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]
    return [value] if any(isinstance(cell, dict) for row in rows for cell in row.values()) else rows


def _read_csv(path: Path) -> Iterator[tuple[int, Raw]]:
    csv.field_size_limit(LARGEST_ROW)
    with _open(path) as file:
        lines = (line.decode() for line in file)
        head = next(lines, "")
        marks = "\t,;|" if kind_of(path) == ".tsv" else ",;\t|"
        delimiter = next((mark for mark in marks if mark in head), ",")
        reader = csv.reader(chain([head], lines), delimiter=delimiter, strict=True)
        names = next(reader, [])
        if len(set(names)) < len(names):
            raise ValueError(f"a column twice: {', '.join(names)}")
        line = reader.line_num + 1
        for fields in reader:
            if len(fields) == len(names):
                yield line, dict(zip(names, fields, strict=True))
            elif fields:
                yield line, DataError(f"{len(fields)} fields, the header has {len(names)}")
            line = reader.line_num + 1


def _read_arrow(path: Path) -> Iterator[tuple[int, Raw]]:
    from pyarrow import ipc, memory_map
    from pyarrow.parquet import ParquetFile

    if kind_of(path) == ".parquet":
        batches = ParquetFile(path).iter_batches(batch_size=1024)
    else:
        batches = ipc.open_stream(memory_map(str(path)))  # as `save_to_disk` writes it
    line = 1
    for batch in batches:
        large = batch.nbytes > LARGEST_ROW  # then a row at a time, and none that is too large
        for part in (batch.slice(number, 1) for number in range(len(batch))) if large else [batch]:
            too_large = [_too_large(part.nbytes)] if part.nbytes > LARGEST_ROW else None
            yield from enumerate(too_large or map(drop_nulls, part.to_pylist()), start=line)
            line += len(part)


def _too_large(size: int) -> DataError:
    return DataError(f"a row of {size:,} bytes, over {LARGEST_ROW:,}", hint="cut its text into several rows")


def _refuse_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_refuse_doubles, parse_constant=_refuse_constant)
