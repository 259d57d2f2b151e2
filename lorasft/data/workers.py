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
from typing import Any, TypeVar, cast

from lorasft.errors import CapacityError

Block = TypeVar("Block")
Result = TypeVar("Result")
FEW = 4  # blocks, which are done before a process has started
MOST = 8  # processes: each needs memory, and reading and writing are left to one
AHEAD = 4  # blocks for each process that may be done before one that takes long
DEAF = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}  # what this process hears too, and then ends its children


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
            with _alive(processes[line]):
                line.send(block)
            busy[line] = number
        if turn in done:
            yield done.pop(turn)
            turn += 1
        elif busy:
            for ready in wait(list(busy)):
                line = cast(Connection, ready)
                with _alive(processes[line]):
                    done[busy.pop(line)], error = line.recv()
                if error:
                    raise RuntimeError(f"in a process that prepares data:\n{error}")
                idle.append(line)
        else:
            return


@contextmanager
def _alive(process: Any) -> Iterator[None]:
    """Raises CapacityError when the process at the other end of a pipe is gone."""
    try:
        yield
    except (EOFError, OSError):
        process.join(1)
        what = f"a process that prepares data died (exit code {process.exitcode})"
        raise CapacityError(what, hint="if it ran out of memory, the kernel's log says so") from None


@contextmanager
def _forked(work: Callable[[Any], Any], count: int) -> Iterator[Processes]:
    """`count` processes that wait for blocks; they end with the block of code, and when this process does."""
    fork = multiprocessing.get_context("fork")
    processes: Processes = {}
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one thread each; set before, or tokenizers warns
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, DEAF)  # as children inherit it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: other threads do not run in a child
            for _ in range(count):
                ours, theirs = fork.Pipe()
                process = fork.Process(target=_serve, args=(work, theirs, [*processes, ours]), daemon=True)
                process.start()
                theirs.close()  # else its end would not be seen here
                processes[ours] = process
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        yield processes
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for process in processes.values():
            process.terminate()
        for line, process in processes.items():
            process.join()
            line.close()


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
            try:
                answer: tuple[Any, str | None] = work(block), None
            except MemoryError:
                sys.exit(CapacityError.exit_code)
            except Exception:
                answer = None, traceback.format_exc()
            line.send(answer)
        except (EOFError, OSError):  # the parent is gone
            return
        del block, answer
        gc.collect()
