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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lorasft.errors import DataError, UnsafeError
from lorasft.hub import find_hub, refuse_offline

if TYPE_CHECKING:
    from lorasft.recipe import DataSource

Row = dict[str, Any]
Raw = Any  # a row as it was read: bytes of JSON, a value, or the DataError that stands for it
LARGEST_ROW = 8 << 20  # bytes
LARGEST_ARRAY = 256 << 20  # bytes: a JSON array is held in memory whole
SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
BOM = b"\xef\xbb\xbf"
RECODE = "convert it to UTF-8, for example with iconv -f latin1 -t utf8"
REPAIR = "fix the file there, or fetch it again: nothing after this can be read"
KEY_SIGNS = (b"hf_", b"sk-", b"AKIA", b"ghp_", b"PRIVATE KEY")  # looked for first, which costs next to nothing
KEY = re.compile(rb"(hf_|ghp_)[A-Za-z0-9]{30}|sk-[A-Za-z0-9_-]{20}|AKIA[A-Z0-9]{16}|-BEGIN [A-Z ]*PRIVATE KEY-")
HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")


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
    elif here.exists():
        found = [here]
    elif glob.has_magic(path):
        found = sorted(map(Path, glob.glob(path, recursive=True)))  # noqa: PTH207 (Path has no glob for whole paths)
    elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) and here.suffix.lower() not in SUFFIXES:
        return ()
    else:
        found = []
    if not found:
        what = f"no {', '.join(SUFFIXES)} file in this folder" if here.is_dir() else "there is no such file"
        hint = f"the folder that was looked in: {here.absolute() if here.is_dir() else here.absolute().parent}"
        if "://" in path:
            hint = "nothing is fetched from an address: download the file and name it"
        raise DataError(what, where=path, hint=hint)
    return tuple(found)


def read_file(path: Path) -> Iterator[tuple[int, Raw]]:
    """The rows of one file, each with its line. Raises DataError when the file cannot be read, or not further."""
    readers = {".json": _read_json, ".jsonl": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    kind = path.suffix.lower()
    if kind not in readers:
        hint = f"known: {', '.join(SUFFIXES)}"
        raise DataError(f"unknown kind of file: {path.suffix or path.name}", where=str(path), hint=hint)
    try:
        yield from readers[kind](path)
    except OSError as error:
        hint = "name a file that you may read"
        raise DataError(f"cannot read: {error.strerror or error}", where=str(path), hint=hint) from None


def read_hub(source: DataSource) -> Iterator[tuple[int, Raw]]:
    """The rows of a data set on the hub, each with its number. Raises DataError when it cannot be had."""
    for number, row in enumerate(load_hub(source), start=1):
        yield number, drop_nulls(row)


def parse_row(raw: Raw, place: RowLocation) -> Row:
    """A row of `read_file` or `read_hub` as an object. Raises DataError with the place."""
    if isinstance(raw, DataError):
        raise raw
    if isinstance(raw, bytes):
        try:
            raw = parse_strict(raw.decode().rstrip("\r\n"))
        except UnicodeDecodeError as error:
            what = f"not UTF-8 at byte {error.start + 1} (0x{error.object[error.start]:02X})"
            raise DataError(what, where=str(place), hint=RECODE) from None
        except json.JSONDecodeError as error:
            near = error.doc[max(0, error.pos - 40) : error.pos + 40]
            raise DataError(f"not JSON: {error.msg}, near {near!r}", where=f"{place}:{error.pos + 1}") from None
        except ValueError as error:
            raise DataError(f"not JSON: {error}", where=str(place)) from None
    if not isinstance(raw, dict):
        raise DataError(f"a row must be an object, this is {type(raw).__name__}", where=str(place))
    return raw


def holds_key(raw: Raw) -> bool:
    """Whether a row seems to hold a token or a private key, which a model would learn."""
    content = raw if isinstance(raw, bytes) else repr(raw).encode(errors="replace")
    return any(sign in content for sign in KEY_SIGNS) and KEY.search(content) is not None


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
            f"cannot load this data set: {type(error).__name__}: {str(error).partition(chr(10))[0]}",
            where=source.path,
            hint="data.train takes a file, a folder, a glob or the id of a data set on the hub",
        ) from None


def drop_nulls(value: Any) -> Any:
    """Arrow gives each struct the keys of all rows, null where a row had none: those go."""
    if isinstance(value, dict):
        return {key: drop_nulls(item) for key, item in value.items() if item is not None}
    return [drop_nulls(item) for item in value] if isinstance(value, list) else value


def parse_strict(text: str) -> Any:
    """JSON without what Python's parser forgives. Raises ValueError for doubled keys, NaN and lone surrogates."""
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if HALF_CHARACTER.search(text):
        json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError, a ValueError, without the other
    return value


def _read_json(path: Path) -> Iterator[tuple[int, Raw]]:
    with open(path, "rb") as file:
        is_array = file.read(4096).removeprefix(BOM).lstrip().startswith(b"[")
        file.seek(0)
        yield from (_read_array if is_array else _read_lines)(path, file)


def _read_lines(path: Path, file: BinaryIO) -> Iterator[tuple[int, Raw]]:
    # Read as bytes: text mode, or splitlines, would break rows at U+2028, U+0085 and \v.
    for number, line in enumerate(iter(partial(file.readline, LARGEST_ROW + 1), b""), start=1):
        if len(line) > LARGEST_ROW:
            raise DataError(f"a row of over {LARGEST_ROW:,} bytes", where=f"{path}:{number}", hint=REPAIR)
        if number == 1:
            line = line.removeprefix(BOM)
        if line.strip():
            yield number, line


def _read_array(path: Path, file: BinaryIO) -> Iterator[tuple[int, Raw]]:
    if path.stat().st_size > LARGEST_ARRAY:
        raise DataError("a JSON array of over 256 MiB", where=str(path), hint="write one object per line (.jsonl)")
    try:
        rows = parse_strict(file.read().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 at byte {error.start + 1}", where=str(path), hint=RECODE) from None
    except ValueError as error:
        where = f"{path}:{getattr(error, 'lineno', 1)}"
        raise DataError(f"not one JSON array: {error}", where=where, hint=REPAIR) from None
    yield from enumerate(rows, start=1)


def _read_csv(path: Path) -> Iterator[tuple[int, Raw]]:
    csv.field_size_limit(LARGEST_ROW)
    with open(path, "rb") as file:
        reader = csv.reader((line.removeprefix(BOM).decode() for line in file), strict=True)
        line = 1
        try:
            names = next(reader, [])
            if len(set(names)) < len(names):
                what = f"a column twice: {', '.join(names)}"
                raise DataError(what, where=f"{path}:1", hint="rename one of them in the first line")
            line = reader.line_num + 1
            for fields in reader:
                if len(fields) == len(names):
                    yield line, dict(zip(names, fields, strict=True))
                elif fields:
                    what = f"{len(fields)} fields, the header has {len(names)}"
                    yield line, DataError(what, where=f"{path}:{line}")
                line = reader.line_num + 1
        except UnicodeDecodeError as error:
            raise DataError(f"not UTF-8: {error}", where=f"{path}:{line}", hint=RECODE) from None
        except csv.Error as error:
            raise DataError(f"not CSV: {error}", where=f"{path}:{line}", hint=REPAIR) from None


def _read_parquet(path: Path) -> Iterator[tuple[int, Raw]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        for batch in ParquetFile(path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield number, drop_nulls(row)
    except pyarrow.ArrowException as error:
        reason = str(error).partition(". ")[0]
        raise DataError(f"not Parquet: {reason}", where=f"{path}:{number + 1}", hint=REPAIR) from None


def _refuse_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_refuse_doubles, parse_constant=_refuse_constant)
