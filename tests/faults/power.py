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

ROOT = 0  # the inode of the folder that everything is in


def record(root: Path, log: Path) -> Fault:
    """A fault that writes the effects of a run in `root` down in the new folder `log`, with what the file then held."""
    log.mkdir()

    @contextlib.contextmanager
    def fault(number: int, kind: str, paths: tuple[Path, ...]) -> Iterator[None]:
        yield
        content = ""
        if kind in ("write", "append", "fsync"):
            content = hashlib.sha256(data := paths[0].read_bytes()).hexdigest()
            (log / content).write_bytes(data)
        names = [path.relative_to(root).as_posix() for path in paths]
        with open(log / "effects.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps([kind, content, *names]) + "\n")

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

    changes: list[Change]
    commits: list[int]
    steps: list[int]

    def __len__(self) -> int:
        return len(self.commits)


class Reader:
    """Turns recorded effects on paths into changes of inodes."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.folders: dict[int, dict[str, int]] = {ROOT: {}}
        self.data: dict[int, str] = {}
        self.changes: list[Change] = []
        self.numbers = itertools.count(1)

    def read(self) -> History:
        """The history of the effects in the log."""
        history = History(self.changes, [], [])
        renamed: list[Change] = []
        steps = 0
        for at, line in enumerate((self.log / "effects.jsonl").read_text(encoding="utf-8").splitlines()):
            kind, content, *names = json.loads(line)
            self.apply(at, kind, content, names)
            if kind == "rename" and "/checkpoints/step-" in names[1] and ".trash-" not in names[1]:
                renamed.append(self.changes[-1])
            if kind == "append" and "metrics" in names[0]:
                lines = (self.log / content).read_text(encoding="utf-8").splitlines()
                steps = max((json.loads(line)["step"] for line in lines if '"loss"' in line), default=0)
            history.commits.append(sum(change.safe <= at for change in renamed))
            history.steps.append(steps)
        return history

    def apply(self, at: int, kind: str, content: str, names: list[str]) -> None:
        if kind == "make folder":
            self.folders[self.find(at, names[0], folder=True)] = {}
        elif kind == "create":
            self.find(at, names[0])
        elif kind == "rename":
            self.rename(at, *names)
        elif kind == "remove":
            self.unlink(at, names[0])
        elif kind == "fsync folder":
            self.sync(at, self.find(at, names[0], folder=True), names_too=True)
        else:
            inode = self.find(at, names[0])
            if self.data.get(inode) != content:  # at an fsync: what a library wrote
                self.changes.append(Change(at, inode, data=content))
                self.data[inode] = content
            if kind == "fsync":
                self.sync(at, inode, names_too=False)

    def find(self, at: int, name: str, *, folder: bool = False) -> int:
        """The inode of a path; what a library made unseen comes into being here."""
        inode = ROOT
        parts = [] if name == "." else name.split("/")
        for depth, part in enumerate(parts, start=1):
            here = self.folders[inode]
            if part not in here:
                here[part] = next(self.numbers)
                self.changes.append(Change(at, inode, names={part: here[part]}))
            inode = here[part]
            if depth < len(parts) or folder:
                self.folders.setdefault(inode, {})
        return inode

    def rename(self, at: int, source: str, target: str) -> None:
        folder, _, old = source.rpartition("/")
        new = target.rpartition("/")[2]
        inode = self.find(at, folder, folder=True)
        moved = self.find(at, source)
        del self.folders[inode][old]
        self.folders[inode][new] = moved
        self.changes.append(Change(at, inode, names={old: None, new: moved}))

    def unlink(self, at: int, name: str) -> None:
        folder, _, old = name.rpartition("/")
        inode = self.find(at, folder, folder=True)
        if self.folders[inode].pop(old, None) is not None:
            self.changes.append(Change(at, inode, names={old: None}))

    def sync(self, at: int, inode: int, *, names_too: bool) -> None:
        for change in self.changes:
            if change.inode == inode and bool(change.names) == names_too:
                change.safe = min(change.safe, at)


@dataclass(frozen=True)
class Loss:
    """A power loss after effect `at`: these changes (by number) are on the disk, with data as told in `how`."""

    at: int
    there: frozenset[int]
    how: str  # whole | zeros | half: the data of what was not synced


def power_losses(history: History, *, most: int, seed: int) -> list[Loss]:
    """Losses at every moment: nothing, all, each one alone, all but one, and pairs of what was not synced."""
    losses: set[Loss] = set()
    for at in range(len(history)):
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
