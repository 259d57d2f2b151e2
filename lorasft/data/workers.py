"""Work on blocks of data in processes of their own, in order. They are forked: whatever the work needs is there."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, TypeVar

from lorasft.errors import CapacityError

Block = TypeVar("Block")
Result = TypeVar("Result")
FEW = 4  # blocks, which are done before a process has started
MOST = 8  # processes: each needs memory, and reading and writing are left to one
AHEAD = 4  # blocks for each process that may be done before one that takes long
DEAF = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}  # what this process hears too, and then ends its children
PR_SET_PDEATHSIG = 1  # of Linux's prctl.h: the signal that a process gets when its parent is gone


def available_workers() -> int:
    """How many processes are worth starting here: one per core that this one may use, and 1 where none can fork."""
    # macOS forks, and its libraries break.
    if sys.platform != "linux" or multiprocessing.current_process().daemon:
        return 1
    return min(len(os.sched_getaffinity(0)), MOST)


def map_blocks(work: Callable[[Block], Result], blocks: Iterable[Block], *, workers: int) -> Generator[Result]:
    """`work` of each block, in the order of the blocks; by `workers` processes if there are more than a few blocks.

    Close the iterator to end the processes. Raises CapacityError when one dies, and what `work` raises.
    """
    stream = iter(blocks)
    first = list(islice(stream, FEW + 1))
    stream = chain(first, stream)
    if workers == 1 or len(first) <= FEW:
        yield from map(work, stream)
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one thread each; set before, or tokenizers warns
    fork, idle = multiprocessing.get_context("fork"), SimpleQueue[Connection]()
    pending: deque[Future[Any]] = deque()
    pool, children = ThreadPoolExecutor(workers), []
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, DEAF)  # as children inherit it
    try:
        for _ in range(workers):
            ours, theirs = fork.Pipe()
            process = fork.Process(target=_serve, args=(work, theirs), daemon=True)
            process.start()
            children.append(process)
            theirs.close()
            idle.put(ours)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for block in stream:
            pending.append(pool.submit(_ask, idle, block))
            if len(pending) == AHEAD * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for process in children:
            process.terminate()
            process.join()
        pool.shutdown(cancel_futures=True)


def _ask(idle: SimpleQueue[Connection], block: Any) -> Any:
    """What an idle process makes of the block. Each has its own pipe: none waits for what a dead one did not say."""
    pipe = idle.get()
    try:
        pipe.send(block)
        error, result = pipe.recv()
    except (EOFError, OSError):
        what = "a process that prepares data died"
        raise CapacityError(what, hint="if it ran out of memory, the kernel's log says so") from None
    finally:
        idle.put(pipe)
    if error:
        raise error
    return result


def _serve(work: Callable[[Any], Any], pipe: Connection) -> None:
    """What a child does: `work`, which is never sent, on one block after the other, until its parent is gone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    gc.disable()  # a tenth of the time; after each block there is little to go through
    gc.freeze()  # what the parent holds, such as memory of a device, is not for a child to collect
    while True:
        block = pipe.recv()
        gc.collect()
        try:
            pipe.send((None, work(block)))
        except Exception as error:
            error.add_note(traceback.format_exc())  # which is lost on the way
            pipe.send((error, None))
