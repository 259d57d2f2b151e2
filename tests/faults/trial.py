"""One run in a fork of this process, with a fault in its effects on the disk; and what it told before it died."""

from __future__ import annotations

import contextlib
import ctypes
import enum
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from multiprocessing.sharedctypes import RawValue
from pathlib import Path
from typing import Any

import torch

from lorasft import files
from lorasft.errors import LorasftError
from lorasft.recipe import Recipe
from lorasft.signals import Ended, end_at_once, ended_in_order, exit_signals
from lorasft.train.loop import train
from lorasft.train.run import export_adapter, open_run

Fault = Callable[[int, str, tuple[Path, ...]], AbstractContextManager[None]]  # around effect number n of a process


class Phase(enum.IntEnum):
    """What a run is in."""

    START = 0
    RESUME = 1
    TRAIN = 2
    SAVE = 3
    RETAIN = 4
    FINISH = 5


class Trace(ctypes.Structure):
    """What a run tells of itself, in memory that it shares with its parent and that survives its death."""

    _fields_ = (
        ("phase", ctypes.c_long),
        ("effects", ctypes.c_long),
        ("commits", ctypes.c_long),
        ("over", ctypes.c_long),
    )


@dataclass(frozen=True)
class Child:
    """A run in a fork."""

    pid: int
    trace: Any  # Trace, shared
    words: Path  # what it says

    def wait(self, seconds: float = 60.0) -> int:
        """Its exit code, negative for a signal. Raises TimeoutError, and kills it, when it does not end."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        self.kill()
        os.waitpid(self.pid, 0)
        raise TimeoutError(f"process {self.pid} did not end in {seconds} s")

    def await_effect(self, number: int) -> None:
        """Wait until the run comes to its effect `number` on the disk, or to its end."""
        while self.trace.effects < number and not self.trace.over:
            time.sleep(0.0005)

    def await_phase(self, phase: Phase) -> None:
        """Wait until the run is in `phase`, or at its end."""
        while self.trace.phase != phase and not self.trace.over:
            time.sleep(0.0005)

    def kill(self, number: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def said(self) -> str:
        return self.words.read_text(encoding="utf-8") if self.words.exists() else ""


@dataclass(frozen=True)
class Bench:
    """Where runs of one recipe are tried. `setup` comes before each, in its fork; `act` is what a fork does."""

    recipe: Recipe
    setup: tuple[Callable[[], object], ...] = ()
    act: Callable[[Recipe, Any], None] = field(default_factory=lambda: train_to_the_end)

    @property
    def folder(self) -> Path:
        return Path(self.recipe.run.output)

    def clear(self) -> None:
        """Make room for the next trial."""
        if self.folder.is_symlink():
            self.folder.unlink()
        shutil.rmtree(self.folder, ignore_errors=True)
        for words in self.folder.parent.glob("words-*.txt"):
            words.unlink()

    def start(self, fault: Fault | None = None, *, commits: int = 0) -> Child:
        """Begin the run, or resume it where there is something to resume, in a fork. `commits`: of it so far."""
        trace = RawValue(Trace)
        trace.commits = commits
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, exit_signals())  # until the child answers them
        pid = os.fork()
        if pid == 0:
            code = 1
            end_at_once()
            try:
                code = self._run(Child(os.getpid(), trace, self._words(os.getpid())), fault or no_fault)
            finally:
                trace.over = 1
                os._exit(code)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return Child(pid, trace, self._words(pid))

    def _words(self, pid: int) -> Path:
        return self.folder.with_name(f"words-{pid}.txt")

    def _run(self, child: Child, fault: Fault) -> int:
        with open(child.words, "w", encoding="utf-8", buffering=1) as words, ended_in_order():
            sys.stdout = sys.stderr = words
            os.dup2(words.fileno(), 2)
            try:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, exit_signals())
                torch.set_num_threads(1)
                files.effect = observe(child.trace, fault)
                for change in self.setup:
                    change()
                self.act(self.recipe, child.trace)
                return 0
            except LorasftError as fault_said:
                print(fault_said)
                return fault_said.exit_code
            except Ended as signalled:
                return signalled.exit_code
            except BaseException:
                traceback.print_exc()
                return 1


def train_to_the_end(recipe: Recipe, trace: Any) -> None:
    """What `lorasft train` does, with `--resume` where there is something to resume."""
    resume = (Path(recipe.run.output) / "recipe.yaml").is_file()
    trace.phase = Phase.RESUME if resume else Phase.START
    with open_run(recipe, resume=resume) as opened:
        print(*opened.notes, sep="\n")
        trace.phase = Phase.TRAIN
        state = train(opened.run, opened.state)
        trace.phase = Phase.FINISH
        export_adapter(opened, state)


def observe(trace: Any, fault: Fault) -> Callable[..., Any]:
    """A stand-in for `files.effect` that counts, tells the phase by the names, and puts `fault` around each effect."""
    outer = Phase.START  # what a save or a retention is in

    @contextlib.contextmanager
    def effect(kind: str, *paths: Path) -> Iterator[None]:
        nonlocal outer
        trace.effects += 1
        within, name = trace.phase in (Phase.SAVE, Phase.RETAIN), paths[-1].name
        outer = outer if within else trace.phase
        if name.startswith(f"{files.STAGE}step-"):
            trace.phase = Phase.SAVE
        elif name.startswith(f"{files.TRASH}step-"):
            trace.phase = Phase.RETAIN
        with fault(trace.effects, kind, paths):
            yield
        committed = kind == "rename" and name.startswith("step-")
        trace.commits += committed
        if committed or (kind == "remove" and name.startswith(f"{files.TRASH}step-")):
            trace.phase = outer

    return effect


@contextlib.contextmanager
def no_fault(number: int, kind: str, paths: tuple[Path, ...]) -> Iterator[None]:
    yield


def kill_at(number: int, *, moment: str) -> Fault:
    """SIGKILL `before` effect `number` or `after` it, or when `half` of what it writes is on the disk."""

    @contextlib.contextmanager
    def fault(here: int, kind: str, paths: tuple[Path, ...]) -> Iterator[None]:
        if here == number and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        with halved(paths[0]) if here == number and moment == "half" else contextlib.nullcontext():
            yield
        if here == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return fault


@contextlib.contextmanager
def halved(path: Path) -> Iterator[None]:
    """Of what is written to the end of `path` meanwhile, only half arrives."""
    before = path.stat().st_size if path.is_file() else 0
    yield
    if path.is_file():
        os.truncate(path, before + (path.stat().st_size - before) // 2)


@contextlib.contextmanager
def slow(number: int, kind: str, paths: tuple[Path, ...]) -> Iterator[None]:
    """5 ms for each effect, 20 in the short retention: half before, half after; a kill then hits saves more often."""
    pause = 0.01 if paths[-1].name.startswith(files.TRASH) else 0.0025
    time.sleep(pause)
    yield
    time.sleep(pause)
