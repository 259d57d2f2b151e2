"""Work on blocks of data in processes of their own, in order. They are forked: whatever the work needs is there."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from lorasft.errors import CapacityError

Block = TypeVar("Block")
Result = TypeVar("Result")
FEW = 4  # blocks, which are done before a process has started
MOST = 8  # processes: each needs memory, and reading and writing are left to one
AHEAD = 4  # blocks for each process that may be done before one that takes long


def available_workers() -> int:
    """How many processes are worth starting here: one per core that this one may use, and 1 where none can fork."""
    can_fork = hasattr(os, "fork") and not multiprocessing.current_process().daemon
    if not can_fork or not hasattr(os, "sched_getaffinity"):  # macOS forks, and its libraries break
        return 1
    return min(len(os.sched_getaffinity(0)), MOST)


def map_blocks(
    work: Callable[[Block], Result], blocks: Iterable[Block], *, workers: int
) -> Generator[Result, None, None]:
    """`work` of each block, in the order of the blocks; by `workers` processes if there are more than a few blocks.

    What a process gives back is pickled. Close the iterator to end the processes. Raises CapacityError when one of
    them dies, RuntimeError with its traceback when `work` raises.
    """
    stream = iter(blocks)
    first = list(islice(stream, FEW + 1))
    stream = chain(first, stream)
    if workers == 1 or len(first) <= FEW:
        yield from map(work, stream)
        return
    with _forked(work, workers) as processes:
        yield from _in_order(stream, processes)


Processes = dict[Connection, Any]  # our end of a process's pipe -> the process


def _in_order(blocks: Iterator[Block], processes: Processes) -> Iterator[Any]:
    numbered = enumerate(blocks)
    idle, busy = list(processes), dict[Connection, int]()
    done: dict[int, Any] = {}
    turn = 0
    while True:
        room = AHEAD * len(processes) - len(busy) - len(done)
        for number, block in islice(numbered, min(room, len(idle))):
            line = idle.pop()
            _send(line, block, processes[line])
            busy[line] = number
        if turn in done:
            yield done.pop(turn)
            turn += 1
        elif busy:
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                done[busy.pop(ready)] = _receive(ready, processes[ready])
                idle.append(ready)
        else:
            return


def _send(line: Connection, block: object, process: Any) -> None:
    try:
        line.send(block)
    except OSError:
        raise _death(process) from None


def _receive(line: Connection, process: Any) -> Any:
    try:
        result, fault = line.recv()
    except (EOFError, OSError):
        raise _death(process) from None
    if fault:
        raise RuntimeError(f"in a process that prepares data:\n{fault}")
    return result


def _death(process: Any) -> CapacityError:
    process.join(1)
    hint = "if it was killed for want of memory, the kernel's log says so"
    return CapacityError(f"a process that prepares data died (exit code {process.exitcode})", hint=hint)


@contextmanager
def _forked(work: Callable[[Any], Any], count: int) -> Iterator[Processes]:
    """`count` processes that wait for blocks; they end with the block, and when this process does."""
    fork = multiprocessing.get_context("fork")
    processes: Processes = {}
    try:
        with _ready_to_fork():
            for _ in range(count):
                ours, theirs = fork.Pipe()
                process = fork.Process(target=_serve, args=(work, theirs, [*processes, ours]), daemon=True)
                process.start()
                theirs.close()  # else its end would not be seen here
                processes[ours] = process
        yield processes
    finally:
        for process in processes.values():
            process.terminate()
        for line, process in processes.items():
            process.join()
            line.close()


@contextmanager
def _ready_to_fork() -> Iterator[None]:
    """Children are deaf to Ctrl-C and to SIGHUP, which this process hears too, and their tokenizers use one thread."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # set before, or tokenizers warns of the fork
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: other threads stand still in a child
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        del os.environ["TOKENIZERS_PARALLELISM"]
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _serve(work: Callable[[Any], Any], line: Connection, others: list[Connection]) -> None:
    """What a child does: blocks in, results out, until the other end closes."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    gc.disable()  # a tenth of the time; after each block there is little to go through
    gc.freeze()  # what the parent holds, such as memory of a device, is not for a child to collect
    for other in others:
        other.close()  # a parent that is gone must be seen
    while True:
        try:
            block = line.recv()
        except (EOFError, OSError):
            return
        answer: tuple[Any, str | None]
        try:
            answer = work(block), None
        except MemoryError:
            sys.exit(CapacityError.exit_code)
        except Exception:
            answer = None, traceback.format_exc()
        try:
            line.send(answer)
        except OSError:
            return
        del block, answer
        gc.collect()
