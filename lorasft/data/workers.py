"""Work on blocks of data in processes of their own, in order. They are forked: whatever the work needs is there."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain, islice
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, TypeVar

from lorasft.errors import CapacityError

Block = TypeVar("Block")
Result = TypeVar("Result")
Process = tuple[Connection, Any]  # our end of its pipe, and the process
FEW = 4  # blocks, which are done before a process has started
MOST = 8  # processes: each needs memory, and reading and writing are left to one
AHEAD = 4  # blocks for each process that may be done before one that takes long
DEAF = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}  # what this process hears too, and then ends its children


def available_workers() -> int:
    """How many processes are worth starting here: one per core that this one may use, and 1 where none can fork."""
    # macOS, which cannot tell, forks, and its libraries break.
    if not hasattr(os, "sched_getaffinity") or multiprocessing.current_process().daemon:
        return 1
    return min(len(os.sched_getaffinity(0)), MOST)


def map_blocks(
    work: Callable[[Block], Result], blocks: Iterable[Block], *, workers: int
) -> Generator[Result, None, None]:
    """`work` of each block, in the order of the blocks; by `workers` processes if there are more than a few blocks.

    Close the iterator to end the processes. Raises CapacityError when one dies, as it does when `work` raises.
    """
    stream = iter(blocks)
    first = list(islice(stream, FEW + 1))
    stream = chain(first, stream)
    if workers == 1 or len(first) <= FEW:
        yield from map(work, stream)
        return
    pool = ThreadPoolExecutor(workers)  # a thread waits for each process
    with _forked(work, workers, pool) as processes:
        idle: SimpleQueue[Process] = SimpleQueue()
        for process in processes:
            idle.put(process)
        pending: deque[Future[Any]] = deque()
        for block in stream:
            pending.append(pool.submit(_ask, idle, block))
            if len(pending) == AHEAD * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _ask(idle: SimpleQueue[Process], block: Any) -> Any:
    """What an idle process makes of a block. Raises CapacityError when it is gone."""
    line, process = idle.get()
    try:
        line.send(block)
        return line.recv()
    except (EOFError, OSError):
        process.join(1)
        what = f"a process that prepares data died (exit code {process.exitcode})"
        raise CapacityError(what, hint="if it ran out of memory, the kernel's log says so") from None
    finally:
        idle.put((line, process))


@contextmanager
def _forked(work: Callable[[Any], Any], count: int, pool: ThreadPoolExecutor) -> Iterator[list[Process]]:
    """`count` processes that wait for blocks; they and `pool` end with the block, or with this process."""
    fork = multiprocessing.get_context("fork")
    processes: list[Process] = []
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one thread each; set before, or tokenizers warns
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, DEAF)  # as children inherit it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: other threads do not run in a child
            for _ in range(count):
                ours, theirs = fork.Pipe()
                others = [ours, *(line for line, _ in processes)]
                process = fork.Process(target=_serve, args=(work, theirs, others), daemon=True)
                process.start()
                theirs.close()  # else its end would not be seen here
                processes.append((ours, process))
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        yield processes
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        pool.shutdown(wait=False, cancel_futures=True)
        for _, process in processes:
            process.terminate()
        pool.shutdown()  # its threads see that: two that wait for one process at once lose its end
        for line, process in processes:
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
            line.send(work(line.recv()))
        except MemoryError:
            sys.exit(CapacityError.exit_code)
        except (EOFError, OSError):  # the parent is gone
            return
        gc.collect()
