"""Every effect on the disk that must be whole or not at all: stage, fsync, verify, rename, lock.

A folder is committed in this order: write and fsync its files in a stage beside the target, write a manifest with their
hashes, fsync the stage, rename it, fsync the parent. Whatever is killed when, a folder under its final name is complete
and verifies.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from lorasft.errors import CapacityError, LorasftError, RecipeError, reading
from lorasft.terminal import size_text

MANIFEST = "manifest.json"
STAGE = ".stage-"
TRASH = ".trash-"
LOCK = "run.lock"
HALF_DONE = re.compile(r"\.(stage|trash)-(?P<name>.+)-[0-9a-f]{8}")  # what this file calls its stages and trash
_AGAIN = "take another copy of this folder, or an earlier one"
_WRONG_PLACE = {errno.EEXIST, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS,
                errno.ELOOP, errno.ENAMETOOLONG}  # fmt: skip
# What is written into records, by name; "": under any other. A float may be whole. What is not here may be anything.
_SHAPES: dict[str, Any] = {
    "provenance.json": {"steps": int, "run": str, "base": {}, "layout": {}, "report": {}},
    "memory.json": {"predicted": {"": int}, "measured": int, "free": int},
    "metrics.jsonl": {"step": int},  # and numbers
    "events.jsonl": {"step": int, **dict.fromkeys(("event", "time", "why"), str)},
    "answers.jsonl": {"step": int, **dict.fromkeys(("place", "prompt", "expected", "answer"), str)},
    "rows.jsonl": {"place": str, "split": str, "tokens": int, "text": str, "losses": {"": [int, float]}},
    "merge.json": {"adapter": str, "table": {"": {"": float}}},
}


@contextlib.contextmanager
def effect(kind: str, *paths: Path) -> Iterator[None]:
    """Around each effect on the disk; does nothing. Fault campaigns put one in its place that kills, fails or cuts."""
    yield


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Create `path`, yield it to be written, and fsync it. It must not exist: nothing is written in place."""
    with _disk(path):
        with effect("create", path):
            file = open(path, "xb")  # noqa: SIM115
        with file:
            yield file
        _sync(path)


def write_file(path: Path, content: bytes | str) -> None:
    """Create `path`, text in UTF-8, fsync it and read it back. Raises CapacityError where the disk differs."""
    content = content.encode() if isinstance(content, str) else content
    with new_file(path) as file, effect("write", path):
        file.write(content)
        file.flush()
    with _disk(path):
        if sha256(path) != hashlib.sha256(content).hexdigest():
            raise CapacityError("the disk did not keep what was written", where=path)


@contextlib.contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """A name beside `target` to write under; what is there at the end becomes `target`, after an error nothing does."""
    stage = _beside(target, STAGE)
    try:
        with _disk(target):
            yield stage
            _sync(stage)
        rename(stage, target)
    except BaseException:
        _remove(stage)
        raise


def replace_file(path: Path, content: bytes | str) -> None:
    """Put `content` under `path`, whole or not at all."""
    with staged_file(path) as stage:
        write_file(stage, content)


def append(path: Path, content: bytes, *, at: int, sync: bool = False) -> None:
    """Write `content` at byte `at` of a log, and cut off what comes after, of a lost write; `sync`: fsync log and name.

    A kill may leave the last line short; readers drop it. No link is followed.
    """
    with _disk(path):
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        with effect("append", path), open(os.open(path, flags, 0o666), "ab") as file:
            file.truncate(at)
            file.write(content)
        for synced in (path, path.parent) if sync else ():
            _sync(synced)


def make_folder(path: Path) -> None:
    """Create a folder and its parents, with their names on the disk; an existing one is fine."""
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    with _disk(path):
        with effect("make folder", path):
            path.mkdir(parents=True, exist_ok=True)
        for folder in new:
            _sync(folder.parent)


def rename(source: Path, target: Path) -> None:
    """Rename and fsync the folder that holds the name."""
    with _disk(target):
        with effect("rename", source, target):
            source.replace(target)
        _sync(target.parent)


@contextlib.contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` to work in, gone at the end; what a killed process left of one goes first."""
    make_folder(target.parent)
    sweep(target.parent, target.name)
    scratch = _beside(target, STAGE)
    try:
        make_folder(scratch)
        with _held(scratch):
            yield scratch
    finally:
        if scratch.exists():
            _remove(scratch)


@contextlib.contextmanager
def staged_folder(target: Path, *, hashes: Mapping[str, str] | None = None) -> Iterator[Path]:
    """A new folder that appears under `target` complete, with a manifest of hashes, or not at all.

    Yields the stage to write into. `hashes`: SHA-256 of files, if known. Raises RecipeError when `target` exists.
    """
    refuse_existing(target)
    with scratch_folder(target) as stage:
        yield stage
        with _disk(target):
            commit_folder(stage, target, hashes=hashes or {})


def commit_folder(stage: Path, target: Path, *, hashes: Mapping[str, str]) -> None:
    """fsync every file of `stage`, write its manifest, and rename it to `target`."""
    entries = {}
    for path in sorted(stage.rglob("*")):
        _sync(path)
        if path.is_file():
            name = path.relative_to(stage).as_posix()
            entries[name] = {"bytes": path.stat().st_size, "sha256": hashes.get(name) or sha256(path)}
    write_file(stage / MANIFEST, json.dumps(entries, indent=1))
    _sync(stage)
    rename(stage, target)


def refuse_existing(target: Path) -> None:
    """Nothing is overwritten: `rename` onto an empty folder would succeed silently."""
    if target.exists() or target.is_symlink():
        raise RecipeError("this exists already", where=target, hint="name one that does not exist yet")


def refuse_overlap(out: Path, *inputs: Path) -> None:
    """Raise RecipeError when `out` is the root or the home folder, lies in an input, or holds one."""
    place = out.resolve()
    if place in (Path(place.anchor), Path.home().resolve()):
        raise RecipeError("nothing is written there", where=out, hint="name a new folder")
    for given in (path.resolve() for path in inputs):
        if place == given or place in given.parents or given in place.parents:
            raise RecipeError(f"what is written and {given} lie in each other", where=out, hint="name another")


def verify_folder(folder: Path) -> None:
    """Compare a committed folder with its manifest. Raises ModelError naming the first file that differs."""
    with reading(f"this is not the folder of its {MANIFEST}", where=folder, hint=_AGAIN):
        entries = json.loads((folder / MANIFEST).read_bytes())
        if not entries:
            raise ValueError("it names no file")
        for name, entry in entries.items():
            path = folder / name
            # A manifest may come with a stranger's adapter: neither other places nor devices are read.
            own = len(name) < 200 and path.is_relative_to(folder) and ".." not in Path(name).parts
            if not (own and path.is_file()) or path.stat().st_size != entry["bytes"] or sha256(path) != entry["sha256"]:
                raise ValueError(f"{name[:80]} is missing or was changed")


def remove_folder(folder: Path) -> None:
    """Delete a folder: out of sight by one rename first, so that a kill leaves no half of it. Never follows a link."""
    trash = _beside(folder, TRASH)
    rename(folder, trash)
    _remove(trash)


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left half done in `folder` (for the target `name`): stages and trash."""
    for path in folder.iterdir() if folder.is_dir() else ():
        found = HALF_DONE.fullmatch(path.name)
        if found and name in (None, found["name"]):
            with contextlib.suppress(OSError, LorasftError), _held(path) as ours:
                if ours:
                    _remove(path)


def remove_new(folder: Path, present: Collection[Path], absent: Iterable[Path]) -> None:
    """Delete what is in `folder` beside `present`; then those of `absent`, its parents or itself, that are empty.

    Ended midway, it leaves no half of a folder under its name, and the lock, by which the next start knows of the rest.
    """
    for path in sorted(set(folder.glob("*")).difference(present), key=lambda path: path.name == LOCK):
        if path.is_dir():
            with contextlib.suppress(LorasftError):  # a disk that is full may take no other name
                remove_folder(path)
        _remove(path)
    with contextlib.suppress(OSError):
        for one in absent:
            one.rmdir()


def _remove(path: Path) -> None:
    """Delete a stage or trash. What cannot be deleted now is swept at the next start."""
    with contextlib.suppress(OSError), effect("remove", path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[str]:
    """One writer per run folder. Yields the process that held it before and was killed, else nothing."""
    path = folder / LOCK
    with _held(path, os.O_CREAT | os.O_NOFOLLOW) as ours:
        with _disk(path):
            holder = path.read_text("ascii", "replace").partition(" ")[0][:20]
        if not ours:
            what = f"another process is writing this run folder (process {holder})"
            raise RecipeError(what, where=folder, hint="wait for it, or give another run.output=FOLDER")
        append(path, f"{os.getpid()} {secrets.token_hex(8)}".encode(), at=0)  # what no other file system has there
        try:
            yield holder
        finally:
            with contextlib.suppress(LorasftError):
                if path.exists():
                    append(path, b"", at=0)


def read_objects(path: Path) -> Iterator[dict[str, Any]]:
    """The object of a JSON file, of a JSONL file those of its lines. What is lost, cut off, damaged, null or of another
    type than is written there (_SHAPES) is left out."""
    with contextlib.suppress(OSError):
        whole = path.read_text("utf-8", "replace")
        texts = [text for text in whole.split("\n") if text] if path.suffix == ".jsonl" else [whole]
        for found in _parse_all(texts):
            if isinstance(found, dict):
                yield _fitting(found, _SHAPES.get(path.name, {}))


def _parse_all(texts: Sequence[str]) -> list[Any]:
    """The values of texts of JSON, but for those that are none: at once where all are, in two thirds of the time."""
    with contextlib.suppress(ValueError, RecursionError):
        values: list[Any] = json.loads(f"[{','.join(texts)}]")
        if len(values) == len(texts):
            return values
    return [value for text in texts for value in _parse_all([text])] if len(texts) > 1 else []


def _fitting(value: Any, shape: Any) -> Any:
    """What of `value` is of a shape, or None, which a whole number is that counts nothing in this world."""
    kind = type(value)
    if isinstance(shape, dict):
        given = value if kind is dict else {}
        for name in list(given) if "" in shape else given.keys() & shape:
            given[name] = _fitting(given[name], shape.get(name, shape.get("")))
            if given[name] is None:
                del given[name]
        return given
    if isinstance(shape, list):
        parts = list(map(_fitting, value, shape)) if kind is list and len(value) == len(shape) else [None]
        return None if None in parts else parts
    fits = kind is shape or (kind is int and shape is float)
    return value if fits and (kind is not int or abs(value) < 2**53) else None


def is_locked(folder: Path) -> bool:
    """Whether a process is writing this run folder. A start in that very moment would be refused."""
    with contextlib.suppress(LorasftError), _held(folder / LOCK) as ours:
        return not ours
    return False


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def need_space(folder: Path, size: int) -> None:
    """Raise CapacityError unless `folder`'s file system has `size` bytes and 2 % free."""
    present = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(present).free
    if free < size * 1.02:
        raise CapacityError(
            f"needs {size_text(size)}, {size_text(free)} are free", where=folder, hint="free some space"
        )


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write into an error that names the place."""
    try:
        yield
    except OSError as error:
        placed = error.errno in _WRONG_PLACE
        kind, hint = RecipeError if placed else CapacityError, "free some space, or " * (not placed)
        raise kind(f"cannot write: {error.strerror}", where=path, hint=f"{hint}name another place") from error


@contextlib.contextmanager
def _held(path: Path, flags: int = os.O_RDONLY) -> Iterator[bool]:
    """Hold a file or folder as its writer; false when another process does. The system lets go when one dies."""
    with _disk(path):
        descriptor = os.open(path, flags, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)


def _beside(path: Path, prefix: str) -> Path:
    return path.with_name(f"{prefix}{path.name}-{secrets.token_hex(4)}")


def _sync(path: Path) -> None:
    """fsync a file, or the names in a folder, as far as its file system can."""
    folder = path.is_dir()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with effect("fsync folder" if folder else "fsync", path):
            os.fsync(descriptor)
    except OSError as error:
        if not folder or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
