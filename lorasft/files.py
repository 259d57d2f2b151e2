"""Every effect on the disk that must be whole or not at all: stage, fsync, verify, rename, lock.

A folder is committed in this order: write and fsync its files in a stage beside the target, write a manifest
with their hashes, fsync the stage, rename it, fsync the parent. Whatever is killed when, a folder under its
final name is complete and verifies. `about_to` is called before each effect, so that a test can kill the
process at the n-th one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from lorasft.errors import CapacityError, ModelError, RecipeError

MANIFEST = "manifest.json"
STAGE = ".stage-"
TRASH = ".trash-"
_AGAIN = "take another copy of this folder, or an earlier one"
_WRONG_PLACE = {errno.EEXIST, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS}


def about_to(effect: str, path: Path) -> None:
    """Called before each effect on the disk. Does nothing here; the crash tests put a kill in its place."""


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Create `path`, yield it to be written, and fsync it. It must not exist: nothing is written in place."""
    about_to("create", path)
    with _disk(path), open(path, "xb") as file:
        yield file
        file.flush()
        about_to("fsync", path)
        os.fsync(file.fileno())


def write_file(path: Path, content: bytes) -> None:
    """Create `path` with `content` and fsync it."""
    with new_file(path) as file:
        about_to("write", path)
        file.write(content)


def replace_file(path: Path, content: bytes) -> None:
    """Put `content` under `path`, whole or not at all."""
    stage = path.with_name(f"{STAGE}{path.name}-{secrets.token_hex(4)}")
    write_file(stage, content)
    rename(stage, path)


def append_line(path: Path, line: str) -> None:
    """Append one line of text to a log. A kill may leave the last line short; readers drop it."""
    about_to("append", path)
    with _disk(path), open(path, "ab") as file:
        file.write(line.encode() + b"\n")


def truncate(path: Path, size: int) -> None:
    """Cut a log back to `size` bytes."""
    about_to("truncate", path)
    os.truncate(path, size)


def make_folder(path: Path) -> None:
    """Create a folder and its parents; an existing one is fine."""
    about_to("make folder", path)
    with _disk(path):
        path.mkdir(parents=True, exist_ok=True)


def rename(source: Path, target: Path) -> None:
    """Rename and fsync the folder that holds the name."""
    about_to("rename", target)
    with _disk(target):
        Path(source).replace(target)
        _sync_folder(target.parent)


@contextlib.contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """A name beside `target` to write under; what is there at the end becomes `target`, after an error nothing does.

    Raises RecipeError when `target` exists.
    """
    refuse_existing(target)
    make_folder(target.parent)
    stage = target.with_name(f"{STAGE}{target.name}-{secrets.token_hex(4)}")
    try:
        with _disk(target):
            about_to("write", stage)
            yield stage
            _sync_file(stage)
        refuse_existing(target)
        rename(stage, target)
    except BaseException:
        stage.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def staged_folder(target: Path, *, hashes: Mapping[str, str] | None = None) -> Iterator[Path]:
    """A new folder that appears under `target` complete, with a manifest of hashes, or not at all.

    Yields the stage to write into; what killed processes have left of theirs is removed. `hashes`: of files whose
    writer knows their SHA-256 at the end. Raises RecipeError when `target` exists.
    """
    refuse_existing(target)
    make_folder(target.parent)
    for left in target.parent.glob(f"{STAGE}{glob.escape(target.name)}-*"):
        with _held(left) as ours:
            if ours:
                shutil.rmtree(left)
    stage = target.with_name(f"{STAGE}{target.name}-{secrets.token_hex(4)}")
    make_folder(stage)
    try:
        with _held(stage):
            yield stage
            commit_folder(stage, target, hashes=hashes or {})
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise


def commit_folder(stage: Path, target: Path, *, hashes: Mapping[str, str]) -> None:
    """fsync every file of `stage`, write its manifest, and rename it to `target`."""
    entries = {}
    for path in sorted(path for path in stage.rglob("*") if path.is_file()):
        about_to("fsync", path)
        _sync_file(path)
        name = path.relative_to(stage).as_posix()
        entries[name] = {"bytes": path.stat().st_size, "sha256": hashes.get(name) or sha256(path)}
    write_file(stage / MANIFEST, json.dumps(entries, indent=1).encode())
    for folder in (p for p in stage.rglob("*") if p.is_dir()):
        _sync_folder(folder)
    _sync_folder(stage)
    refuse_existing(target)
    rename(stage, target)


def refuse_existing(target: Path) -> None:
    """Nothing is overwritten: `rename` onto an empty folder would succeed silently."""
    if target.exists() or target.is_symlink():
        raise RecipeError("this exists already", where=str(target), hint="name one that does not exist yet")


def refuse_overlap(out: Path, *inputs: Path) -> None:
    """Raise RecipeError when `out` is the root or the home folder, lies in an input, or holds one."""
    place = out.resolve()
    if place in (Path(place.anchor), Path.home().resolve()):
        raise RecipeError("nothing is written there", where=str(out), hint="name a new folder")
    for given in (path.resolve() for path in inputs):
        if place == given or place in given.parents or given in place.parents:
            raise RecipeError(f"what is written and {given} lie in each other", where=str(out), hint="name another")


def verify_folder(folder: Path) -> None:
    """Compare a committed folder with its manifest. Raises ModelError naming the first file that differs."""
    try:
        entries = json.loads((folder / MANIFEST).read_bytes())
        entries = {name: (entry["bytes"], entry["sha256"]) for name, entry in entries.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as fault:
        raise ModelError(f"no readable {MANIFEST}: {fault}", where=str(folder), hint=_AGAIN) from None
    for name, (size, digest) in entries.items():
        path = folder / name
        if not path.is_file():
            raise ModelError(f"{name} is missing", where=str(folder), hint=_AGAIN)
        if path.stat().st_size != size:
            raise ModelError(f"{name} has {path.stat().st_size} bytes, not {size}", where=str(folder), hint=_AGAIN)
        if sha256(path) != digest:
            raise ModelError(f"{name} does not match its hash", where=str(folder), hint=_AGAIN)


def remove_folder(folder: Path) -> None:
    """Delete a folder: out of sight by one rename first, so that a kill leaves no half of it. Never follows a link."""
    trash = folder.with_name(f"{TRASH}{folder.name}-{secrets.token_hex(4)}")
    rename(folder, trash)
    about_to("remove", trash)
    shutil.rmtree(trash)


def sweep(folder: Path) -> None:
    """Remove what a killed process left half done in `folder`: stages and trash, by their names."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.name.startswith((STAGE, TRASH)) and not path.is_symlink():
            about_to("remove", path)
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One writer per run folder. The system releases the lock when its holder dies, also by SIGKILL."""
    path = folder / "run.lock"
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip()
            raise RecipeError(
                f"another process is writing this run folder (process {holder})",
                where=str(folder),
                hint="wait for it, or give another run.output=FOLDER",
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(model: Path) -> str:
    """What tells model folders apart, in hex: SHA-256 over the config, and of the weights the names, sizes and headers
    and the first 4 KiB of each tensor. A fine-tune of the same model differs in these; a whole read would take minutes.
    """
    digest = hashlib.sha256()
    config = model / "config.json"
    if config.is_file():
        digest.update(config.read_bytes())
    for path in sorted(model.glob("model*.safetensors")) or sorted(model.glob("*.safetensors")):
        with open(path, "rb") as file:
            digest.update(f"{path.name}\n{path.stat().st_size}\n".encode())
            header = file.read(min(int.from_bytes(file.read(8), "little"), 100 << 20))
            digest.update(header)
            for start in _tensor_starts(header):
                digest.update(os.pread(file.fileno(), 4096, 8 + len(header) + start))
    return digest.hexdigest()


def _tensor_starts(header: bytes) -> list[int]:
    try:
        return sorted(entry["data_offsets"][0] for name, entry in json.loads(header).items() if name != "__metadata__")
    except (ValueError, AttributeError, KeyError, TypeError, IndexError):
        return [0]  # no weights that anything could load, which is said where they are


def need_space(folder: Path, size: int) -> None:
    """Raise CapacityError unless `folder`'s file system has `size` bytes and 2 % free."""
    present = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(present).free
    if free < size * 1.02:
        raise CapacityError(
            f"needs {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free", where=str(folder), hint="free some space"
        )


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write into an error that names the place."""
    try:
        yield
    except OSError as fault:
        if fault.errno in _WRONG_PLACE:
            raise RecipeError(f"cannot write: {fault.strerror}", where=str(path), hint="name another place") from fault
        raise CapacityError(f"cannot write: {fault.strerror}", where=str(path)) from fault


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Hold a folder as its writer; false when another process does. The system lets go when a process dies."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    about_to("fsync folder", path)
    _sync_file(path)
