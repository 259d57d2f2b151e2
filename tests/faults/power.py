"""Power loss, simulated: a run's effects on the disk are recorded, and every state that a crash may leave is built.

A file system promises what was fsynced. What was not, may be there or not, in any order: names, data, and data as
zeros or by half. So for every moment of the run: the effects that were synced by then, and any choice of the others.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from faults.trial import Fault

ROOT = 0  # the number of the folder that everything is in


def record(folder: Path, log: Path) -> Fault:
    """A fault that writes down in the new folder `log` what is in `folder` after each effect of a run."""
    log.mkdir()

    @contextlib.contextmanager
    def fault(number: int, kind: str, paths: tuple[Path, ...]) -> Iterator[None]:
        yield
        tree: dict[str, tuple[int, str | None]] = {}  # inode, and hash of a file
        for path in (folder, *folder.rglob("*")):
            content = None
            if path.is_file():
                content = hashlib.sha256(data := path.read_bytes()).hexdigest()
                (log / content).write_bytes(data)
            tree[path.relative_to(folder.parent).as_posix()] = path.stat().st_ino, content
        with open(log / "effects.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps([kind, paths[-1].relative_to(folder.parent).as_posix(), tree]) + "\n")

    return fault


@dataclass
class Change:
    """One effect on an inode: names in a folder (None: gone), or the data of a file. Durable from effect `safe`."""

    at: int
    inode: int
    names: dict[str, int | None] = field(default_factory=dict)
    data: str | None = None
    safe: float = math.inf


@dataclass
class History:
    """All changes of a run, how many checkpoints were committed and steps logged after each effect."""

    changes: list[Change] = field(default_factory=list)
    commits: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)


def read_history(log: Path) -> History:
    """What each effect in the log has changed, also what a library did before it, and from when that is durable."""
    history, fresh, steps = History(), itertools.count(1), 0
    renamed: list[Change] = []
    numbers: dict[int, int] = {}  # of inodes, which a file system uses again
    names: dict[int, dict[str, int]] = {}
    data: dict[int, str] = {}
    for at, line in enumerate((log / "effects.jsonl").read_text(encoding="utf-8").splitlines()):
        kind, name, tree = json.loads(line)
        numbers = {inode: numbers.get(inode) or next(fresh) for inode, _ in tree.values()}
        paths = {path: numbers[inode] for path, (inode, _) in tree.items()} | {".": ROOT}
        names_before, data_before = names, data
        names = {paths[path]: {} for path in paths if path == "." or tree[path][1] is None}
        for path in tree:
            folder, _, own = path.rpartition("/")
            names[paths[folder or "."]][own] = paths[path]
        data = {paths[path]: content for path, (_, content) in tree.items() if content is not None}
        for inode, now in names.items():
            before = names_before.get(inode, {})
            changed = {own: now.get(own) for own in {**before, **now} if before.get(own) != now.get(own)}
            if changed:
                history.changes.append(Change(at, inode, changed))
        for inode, content in data.items():
            if data_before.get(inode) != content:
                history.changes.append(Change(at, inode, data=content))
        if kind in ("fsync", "fsync folder"):
            for change in history.changes:
                if change.inode == paths[name] and bool(change.names) == (kind == "fsync folder"):
                    change.safe = min(change.safe, at)
        own = Path(name).name
        if kind == "rename" and own.startswith("step-"):
            renamed += [change for change in history.changes if change.at == at and own in change.names]
        if kind == "append" and own == "metrics.jsonl":
            lines = (log / tree[name][1]).read_text(encoding="utf-8").splitlines()
            steps = max((json.loads(line)["step"] for line in lines if '"loss"' in line), default=0)
        history.commits.append(sum(change.safe <= at for change in renamed))
        history.steps.append(steps)
    return history


@dataclass(frozen=True)
class Loss:
    """A power loss after effect `at`: these changes (by number) are on the disk, with data as told in `how`."""

    at: int
    there: frozenset[int]
    how: str  # whole | zeros | half: the data of what was not synced


def power_losses(history: History, *, most: int, seed: int) -> list[Loss]:
    """Losses at every moment: nothing, all, each one alone, all but one, and pairs of what was not synced."""
    losses: set[Loss] = set()
    for at in range(len(history.commits)):
        open_ = [n for n, change in enumerate(history.changes) if change.at <= at < change.safe]
        safe = {n for n, change in enumerate(history.changes) if change.safe <= at}
        recent = open_[-6:]  # older ones are lines of the log, which are alike
        choices: list[Sequence[int]] = [[], open_, *([n] for n in recent), *itertools.combinations(recent, 2)]
        choices += [[n for n in open_ if n != left] for left in recent]
        for choice in choices:
            for how in ("whole", "zeros", "half"):
                losses.add(Loss(at, frozenset(safe | set(choice)), how))
    ordered = sorted(losses, key=lambda loss: (loss.at, sorted(loss.there), loss.how))
    return ordered if len(ordered) <= most else sorted(random.Random(seed).sample(ordered, most), key=lambda x: x.at)


def build(history: History, loss: Loss, *, log: Path, root: Path) -> None:
    """Make `root` what the disk would hold after `loss`."""
    names: dict[int, dict[str, int]] = {}
    data: dict[int, bytes] = {}
    synced: dict[int, bytes] = {}
    for number in sorted(loss.there):
        change = history.changes[number]
        for name, inode in change.names.items():
            folder = names.setdefault(change.inode, {})
            if inode is None:
                folder.pop(name, None)
            else:
                folder[name] = inode
        if change.data is not None:
            content = (log / change.data).read_bytes()
            if change.safe <= loss.at:
                synced[change.inode] = content
            elif loss.how != "whole":  # of a file that was appended to, what was synced stays
                before = synced.get(change.inode, b"")
                kept = len(before) if content.startswith(before) else 0
                tail = bytes(len(content) - kept) if loss.how == "zeros" else content[kept : (kept + len(content)) // 2]
                content = content[:kept] + tail
            data[change.inode] = content
    folders = {change.inode for change in history.changes if change.names}
    shutil.rmtree(root, ignore_errors=True)
    _write(root, ROOT, names, data, folders)


def _write(path: Path, inode: int, names: dict[int, dict[str, int]], data: dict[int, bytes], folders: set[int]) -> None:
    if inode not in folders:
        path.write_bytes(data.get(inode, b""))
        return
    path.mkdir()
    for name, below in names.get(inode, {}).items():
        _write(path / name, below, names, data, folders)
