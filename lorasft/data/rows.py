"""Files and hub ids -> rows, one at a time, each with its line. Lines of JSON stay bytes, to be parsed elsewhere.

JSON is read here and not through Arrow, which would give every row the union of all keys, filled with nulls;
CSV is read with the csv module, because a type inferred from text ("NA", "007") is no longer the text.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasft.errors import DataError, UnsafeError
from lorasft.hub import find_hub, refuse_offline

if TYPE_CHECKING:
    from lorasft.recipe import DataSource

Row = dict[str, Any]
Raw = Any  # a row as it was read: bytes of JSON, a value, or the DataError that stands for it
LARGEST_ROW = 8 << 20  # bytes
LARGEST_ARRAY = 256 << 20  # bytes: a JSON array is held in memory whole
READ_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
RECODE = "convert it, for example with iconv -f latin1 -t utf8"
MEND = "mend the file there: what follows cannot be read"
KEY_SIGNS = (b"hf_", b"sk-", b"AKIA", b"ghp_", b"PRIVATE KEY")  # looked for first, which costs next to nothing
KEY = re.compile(rb"(hf_|ghp_)[A-Za-z0-9]{30}|sk-[A-Za-z0-9_-]{20}|AKIA[A-Z0-9]{16}|-BEGIN [A-Z ]*PRIVATE KEY-")
LONE_SURROGATE = re.compile(r"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")


@dataclass(frozen=True)
class Place:
    """Where a row stands: file and line, counted from 1 (Parquet and hub ids: the row's number)."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def source_files(path: str) -> tuple[Path, ...]:
    """The files that a source's path names, sorted; none when it is a hub id. Raises DataError."""
    here = Path(path)
    if here.is_dir():
        found = sorted(file for file in here.iterdir() if file.suffix.lower() in READ_SUFFIXES)
        return _some(found, f"no {', '.join(READ_SUFFIXES)} file in this folder", path, folder=here)
    if here.exists():
        return (here,)
    if glob.has_magic(path):
        try:
            found = sorted(Path(here.anchor).glob(str(here.relative_to(here.anchor))))
        except ValueError as fault:
            raise DataError(
                f"no pattern for files: {fault}", where=path, hint="** stands alone between two /"
            ) from None
        return _some(found, "no file matches", path, folder=here.absolute().parent)
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) and here.suffix.lower() not in READ_SUFFIXES:
        return ()
    there = f"the folder it would be in: {here.absolute().parent}"
    hint = "nothing is fetched from an address: download the file and name it" if "://" in path else there
    raise DataError("there is no such file", where=path, hint=hint)


def read_file(path: Path) -> Iterator[tuple[int, Raw]]:
    """The rows of one file, each with its line. Raises DataError when the file as a whole cannot be read."""
    readers = {".json": _read_json, ".jsonl": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    kind = path.suffix.lower()
    if kind not in readers:
        hint = f"known: {', '.join(READ_SUFFIXES)}"
        raise DataError(f"unknown kind of file: {path.suffix or path.name}", where=str(path), hint=hint)
    try:
        yield from readers[kind](path)
    except OSError as fault:
        hint = "name a file that you may read"
        raise DataError(f"cannot read: {fault.strerror or fault}", where=str(path), hint=hint) from None


def read_hub(source: DataSource) -> Iterator[tuple[int, Raw]]:
    """The rows of a data set on the hub, each with its number. Raises DataError when it cannot be had."""
    for number, row in enumerate(load_hub(source), start=1):
        yield number, drop_nulls(row)


def parse_row(raw: Raw, place: Place) -> Row:
    """A row of `read_file` or `read_hub` as an object. Raises DataError with the place."""
    if isinstance(raw, DataError):
        raise raw
    row = _parse_line(raw, place) if isinstance(raw, bytes) else raw
    if not isinstance(row, dict):
        raise DataError(f"a row must be an object, this is {type(row).__name__}", where=str(place))
    return row


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
    except Exception as fault:  # whatever the network, the hub and the loader may raise
        refuse_offline(fault, source.path)
        if "Dataset scripts" in str(fault):
            what = "this data set is a program of its own, which lorasft does not run"
            raise UnsafeError(what, where=source.path, hint="take its files: JSON, CSV or Parquet") from None
        raise DataError(
            f"cannot load this data set: {type(fault).__name__}: {str(fault).partition(chr(10))[0]}",
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
    with _bounded_depth():
        value = _DECODER.decode(text)
    refuse_surrogates(text, value)
    return value


def refuse_surrogates(text: str, value: Any) -> None:
    """Raise ValueError when an escape in `text` left half a character in `value`."""
    escape = LONE_SURROGATE.search(text)
    if escape:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise json.JSONDecodeError("half a character (lone surrogate)", text, escape.start()) from None


def _read_json(path: Path) -> Iterator[tuple[int, Raw]]:
    with open(path, "rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        file.seek(0)
        if start.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise DataError("this is UTF-16, not UTF-8", where=f"{path}:1", hint="iconv -f utf-16 -t utf-8")
        if start.startswith(b"["):
            yield from _read_array(path)
        else:
            yield from _read_lines(path, file)


def _read_lines(path: Path, file: io.BufferedReader) -> Iterator[tuple[int, Raw]]:
    # Read as bytes: text mode, or splitlines, would break rows at U+2028, U+0085 and \v.
    number = 0
    while line := file.readline(LARGEST_ROW + 1):
        number += 1
        if len(line) > LARGEST_ROW:
            size = len(line) + _skip_line(file, line)
            yield number, DataError(f"a row of {size:,} bytes, over {LARGEST_ROW:,}", where=f"{path}:{number}")
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield number, line


def _skip_line(file: io.BufferedReader, line: bytes) -> int:
    size = 0
    while line and not line.endswith(b"\n"):
        line = file.readline(1 << 20)
        size += len(line)
    return size


def _parse_line(line: bytes, place: Place) -> Any:
    try:
        text = line.decode().rstrip("\r\n")
    except UnicodeDecodeError as fault:
        what = f"not UTF-8 at byte {fault.start + 1} (0x{line[fault.start]:02X})"
        raise DataError(what, where=str(place), hint=RECODE) from None
    try:
        return parse_strict(text)
    except json.JSONDecodeError as fault:
        cut = not line.endswith(b"\n") and fault.pos >= len(text) - 1
        if cut or fault.msg.startswith("Unterminated"):
            what = f"the row is cut off ({fault.msg})"
            raise DataError(what, where=str(place), hint="fetch the file again") from None
        what = f"not JSON: {fault.msg}, {_around(text, fault.pos)}"
        raise DataError(what, where=f"{place}:{fault.pos + 1}") from None
    except ValueError as fault:
        raise DataError(f"not JSON: {fault}", where=str(place)) from None


def _read_array(path: Path) -> Iterator[tuple[int, Raw]]:
    if path.stat().st_size > LARGEST_ARRAY:
        raise DataError("a JSON array of over 256 MiB", where=str(path), hint="write one object per line (.jsonl)")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        raise DataError(f"not UTF-8 at byte {fault.start + 1}", where=str(path), hint=RECODE) from None
    at, line = text.index("[") + 1, 1
    counted = 0
    while True:
        at = _skip_blanks(text, at)
        line, counted = line + text.count("\n", counted, at), at
        if text[at : at + 1] == "]":
            if _skip_blanks(text, at + 1) < len(text):
                what = "something stands behind the end of the array"
                raise DataError(what, where=f"{path}:{line}", hint="one array a file, or one object a line (.jsonl)")
            return
        try:
            with _bounded_depth():
                row, end = _DECODER.raw_decode(text, at)
            refuse_surrogates(text[at:end], row)
        except ValueError as fault:  # where one element ends wrong, the next cannot be found
            what = f"not JSON: {fault}, {_around(text, getattr(fault, 'pos', at))}"
            raise DataError(what, where=f"{path}:{line}", hint=MEND) from None
        yield line, row
        at = _skip_blanks(text, end)
        if text[at : at + 1] not in (",", "]"):
            what = "the array is cut off, or a comma is missing"
            raise DataError(what, where=f"{path}:{line}", hint="fetch the file again, or mend it")
        at += text[at] == ","


def _skip_blanks(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\n", "\r", "\t"):
        at += 1
    return at


def _read_csv(path: Path) -> Iterator[tuple[int, Raw]]:
    csv.field_size_limit(LARGEST_ROW)
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        line = 1
        try:
            names = next(reader, [])
            if not _is_text(names):
                raise DataError("not UTF-8", where=f"{path}:1", hint=RECODE)
            if len(set(names)) < len(names):
                what = f"a column twice: {', '.join(names)}"
                raise DataError(what, where=f"{path}:1", hint="rename one of them in the first line")
            line = reader.line_num + 1
            for fields in reader:
                start, line = line, reader.line_num + 1
                if not _is_text(fields):
                    yield start, DataError("not UTF-8", where=f"{path}:{start}", hint=RECODE)
                elif len(fields) == len(names):
                    yield start, dict(zip(names, fields, strict=True))
                elif fields:
                    what = f"{len(fields)} fields, the header has {len(names)}"
                    yield start, DataError(what, where=f"{path}:{start}")
        except csv.Error as fault:
            raise DataError(f"not CSV: {fault}", where=f"{path}:{line}", hint=MEND) from None


def _is_text(fields: list[str]) -> bool:
    """Whether no byte had to be smuggled in as half a character."""
    return all(field.isascii() or not any("\udc80" <= letter <= "\udcff" for letter in field) for field in fields)


def _read_parquet(path: Path) -> Iterator[tuple[int, Raw]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        for batch in ParquetFile(path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield number, drop_nulls(row)
    except pyarrow.ArrowException as fault:
        reason = str(fault).partition(". ")[0]
        raise DataError(f"not Parquet: {reason}", where=f"{path}:{number + 1}", hint="fetch the file again") from None


def _some(files: list[Path], what: str, path: str, *, folder: Path) -> tuple[Path, ...]:
    if not files:
        raise DataError(what, where=path, hint=f"the folder that was looked into: {folder}")
    return tuple(files)


def _around(text: str, at: int) -> str:
    return f"near {text[max(0, at - 40) : at + 40]!r}"


@contextmanager
def _bounded_depth() -> Iterator[None]:
    """What Python's parser raises for brackets without end, as one more thing that is not JSON."""
    try:
        yield
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_no_doubles, parse_constant=_no_constant)
