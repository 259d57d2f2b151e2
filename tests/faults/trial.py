"""One run in a fork of this process, with a fault in its effects on the disk; and what it told before it died."""

from __future__ import annotations

import contextlib
import ctypes
import enum
import errno
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from multiprocessing.sharedctypes import RawValue
from pathlib import Path
from typing import Any

import torch

from faults.judge import Result, judge_result, read_result
from faults.subject import make_subject
from lorasft import files
from lorasft.errors import LorasftError
from lorasft.recipe import Recipe
from lorasft.signals import Ended, end_at_once, ended_in_order, exit_code, exit_signals
from lorasft.training.checkpoint import list_checkpoints
from lorasft.training.loop import run_steps
from lorasft.training.run import export_adapter, open_run

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

    _fields_ = tuple((name, ctypes.c_long) for name in ("phase", "effects", "commits", "over"))


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

    def wait_until(self, reached: Callable[[Any], bool]) -> None:
        """Wait until the run's trace has `reached` something, or the run its end, for a minute at most."""
        end = time.monotonic() + 60
        while not (reached(self.trace) or self.trace.over or time.monotonic() > end):
            time.sleep(0.0005)

    def kill(self, number: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def said(self) -> str:
        return self.words.read_text(encoding="utf-8") if self.words.exists() else ""


@dataclass(frozen=True)
class Bench:
    """Where runs of one recipe are tried, in `trials` of a campaign, and what a run that is left alone gives.

    `setup` comes before each run, in its fork; `act` is what a fork does.
    """

    recipe: Recipe
    trials: int = 20
    seed: int = 0
    setup: tuple[Callable[[], object], ...] = ()
    act: Callable[[Recipe, Any], None] = field(default_factory=lambda: train_to_the_end)
    result: Result | None = None
    seconds: float = 0.0
    effects: int = 0

    @property
    def folder(self) -> Path:
        return Path(self.recipe.run.output)

    def checkpoints(self) -> list[Path]:
        return list_checkpoints(self.folder / "checkpoints")

    def changed(self, section: str, **values: Any) -> Bench:
        """The same run with other settings."""
        settings = getattr(self.recipe, section).model_copy(update=values)
        return replace(self, recipe=self.recipe.model_copy(update={section: settings}))

    def patched(self, *patches: Callable[[], object]) -> Bench:
        """The same run after `patches` in its fork."""
        return replace(self, setup=(*self.setup, *patches))

    def dice(self, *names: object) -> random.Random:
        return random.Random("-".join(map(str, (self.seed, *names))))

    def some(self, cases: Iterable[Any]) -> list[Any]:
        """All cases, or `trials` of them, evenly spread, in a random order."""
        cases = list(cases)
        step = max(1.0, len(cases) / self.trials)
        some = [cases[int(index * step)] for index in range(min(len(cases), self.trials))]
        return self.dice().sample(some, len(some))

    def clear(self) -> None:
        """Make room for the next trial."""
        if self.folder.is_symlink():
            self.folder.unlink()
        shutil.rmtree(self.folder, ignore_errors=True)
        for words in self.folder.parent.glob("words-*.txt"):
            words.unlink()

    def half_way(self) -> None:
        """Leave a run that was killed a while after its second save."""
        self.clear()
        self.start(kill_at(self.effects * 2 // 3, moment="before")).wait()

    def run(self, fault: Fault | None = None) -> tuple[int, str]:
        """Exit code and words of a run, or of its resumption."""
        child = self.start(fault)
        return child.wait(), child.said()

    def judge(self) -> list[str]:
        """What is wrong with a run that has come to its end."""
        return judge_result(self.folder, self.result)

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
            except Ended as second:  # while the first one was answered
                code = exit_code(second.args[0])
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
            except (LorasftError, torch.OutOfMemoryError) as error:
                print(error)
                return getattr(error, "exit_code", 6)  # as the command line answers a lack of memory
            except Ended as signalled:
                return exit_code(signalled.args[0])
            except BaseException:
                traceback.print_exc()
                return 1


def open_bench(folder: Path, *, trials: int = 20, seed: int = 0) -> Bench:
    """Make the subject of the campaigns in `folder`, and run it untouched. Raises RuntimeError when that fails."""
    bench = Bench(make_subject(folder), trials, seed)
    for _ in range(2):  # the first run reads files that the system then knows
        bench.clear()
        started = time.monotonic()
        child = bench.start()
        if child.wait() != 0:
            raise RuntimeError(child.said())
    seconds = time.monotonic() - started
    return replace(bench, result=read_result(bench.folder), seconds=seconds, effects=child.trace.effects)


def train_to_the_end(recipe: Recipe, trace: Any) -> None:
    """What `lorasft train` does, with `--resume` where there is something to resume."""
    resume = (Path(recipe.run.output) / "recipe.yaml").is_file()
    trace.phase = Phase.RESUME if resume else Phase.START
    with open_run(recipe, resume=resume) as (run, state):
        trace.phase = Phase.TRAIN
        state = run_steps(run, state)
        trace.phase = Phase.FINISH
        export_adapter(run, state)


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
def with_fault(fault: Fault) -> Iterator[Trace]:
    """Effects in this process meet `fault`; they are counted."""
    plain, trace = files.effect, Trace()
    files.effect = observe(trace, fault)
    try:
        yield trace
    finally:
        files.effect = plain


def in_fork(act: Callable[[], object]) -> int:
    """The exit code of `act` in a fork, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            act()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# ---- faults ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_fault(number: int, kind: str, paths: tuple[Path, ...]) -> Iterator[None]:
    yield


@contextlib.contextmanager
def slow(number: int, kind: str, paths: tuple[Path, ...]) -> Iterator[None]:
    """5 ms for each effect, 20 in the short retention: half before, half after; a kill then hits saves more often."""
    pause = 0.01 if paths[-1].name.startswith(files.TRASH) else 0.0025
    time.sleep(pause)
    yield
    time.sleep(pause)


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


def fail_at(number: int, *, reason: int = errno.ENOSPC, for_good: bool = False) -> Fault:
    """An OSError in effect `number` (and all later ones `for_good`), with half of its content written.

    Reason 0: no error, the half is all that the disk keeps.
    """

    @contextlib.contextmanager
    def fault(here: int, kind: str, paths: tuple[Path, ...]) -> Iterator[None]:
        hit = (here >= number if for_good else here == number) and kind != "remove"
        if hit and reason and kind not in ("write", "append"):
            raise OSError(reason, os.strerror(reason))
        cut = hit and (kind == "write" or (kind == "append" and reason))
        with halved(paths[0]) if cut else contextlib.nullcontext():
            yield
        if cut and reason:
            raise OSError(reason, os.strerror(reason))

    return fault


def full_in(*names: str, times: int = 1000) -> Fault:
    """A disk that is full whenever something is written to a path with one of `names` in it."""
    hits = iter(range(times))

    @contextlib.contextmanager
    def fault(number: int, kind: str, paths: tuple[Path, ...]) -> Iterator[None]:
        here = kind in ("write", "append") and any(name in str(paths[-1]) for name in names)
        if here and next(hits, None) is not None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield

    return fault


@contextlib.contextmanager
def halved(path: Path) -> Iterator[None]:
    """Of what is written to the end of `path` meanwhile, only half arrives."""
    before = path.stat().st_size if path.is_file() else 0
    yield
    if path.is_file():
        os.truncate(path, before + (path.stat().st_size - before) // 2)
