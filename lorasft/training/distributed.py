"""The processes that train together: which one this is, what they add up, what the first tells the others.

torchrun, accelerate or a cluster's own launcher starts them, on one machine or several. Each takes its share of a
step's micro-batches; one sum over the processes joins their gradients. The first process speaks and writes. An error is
said once and ends all with its exit code; who is gone without a word is named by the others (see watch.py).
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lorasft.errors import CapacityError, DeviceError, LorasftError, first_line, out_of_memory
from lorasft.files import LOCK
from lorasft.signals import StopRequest
from lorasft.terminal import say
from lorasft.training import watch

if TYPE_CHECKING:  # torch is imported only where it is needed: what is wrong with a recipe is said at once
    from torch import Tensor

T = TypeVar("T")
_STEP_LIMIT = timedelta(minutes=10)  # for what all do
_WORK_LIMIT = timedelta(days=1)  # for the others while one prepares data, saves or answers


@dataclass(eq=False)
class Ranks:
    """This process, number `index` of `count`."""

    index: int = 0
    count: int = 1
    patient: Any = None  # torch's group in which all wait for the work of one
    leaving: threading.Event = field(default_factory=threading.Event)  # from then on this process ends by itself
    shard: int = 1  # processes over which one copy of the base lies
    spread: bool = False  # long rows are computed by all together

    @property
    def in_step(self) -> bool:
        """Whether each pass is one of all processes."""
        return self.shard > 1 or self.spread

    @property
    def is_main(self) -> bool:
        """Whether this process speaks and writes."""
        return self.index == 0

    def gather(self, value: T, *, passes: bool = False) -> list[T]:
        """The small `value` of every process, in their order. `passes`: see `sync_errors`."""
        if self.count == 1:
            return [value]
        import torch

        found: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(found, value, group=None if passes else self.patient)
        return found

    def on_main(self, work: Callable[[], T]) -> T:
        """What `work` gives the first process, told to the others, which wait. Its error ends them all."""
        with self.sync_errors():
            told = [work()] if self.is_main else []
        return self.gather(told)[0][0]

    @contextlib.contextmanager
    def sync_errors(self, *, passes: bool = False) -> Iterator[None]:
        """Wait here for all processes. If one of them failed within, all end with the error of the first that did.

        `passes`: what is within are passes through the model, for which all take about as long. An error in one that is
        of all processes is raised at once: the others wait in it, and are told to end (see `join`).
        """
        error: BaseException | None = None
        try:
            yield
        except BaseException as caught:
            if self.count == 1 or self.leaving.is_set() or (passes and self.in_step):
                raise
            error = caught
        codes = self.gather(_exit_code(error), passes=passes)
        if not any(codes):
            return
        self.leave()
        first = next(index for index, code in enumerate(codes) if code)
        if error is not None and first == self.index:
            if not isinstance(error, LorasftError):
                raise error
            say(error)
        raise SystemExit(codes[first])

    def check_folder(self, folder: Path) -> None:
        """Raise DeviceError unless all processes see the run folder that the first one holds: by its lock."""

        def read() -> str:
            lock = folder / LOCK
            return lock.read_text("ascii", "replace") if lock.is_file() else ""

        token = self.on_main(read)
        blind = {machine for (machine, _), seen in self.gather((watch.own_place(), read())) if seen != token}
        if blind:
            what = f"{' and '.join(sorted(blind))} does not see the run folder of the first process"
            hint = "give all machines one run.output, on a file system that they share"
            raise DeviceError(what, where=folder.absolute(), hint=hint)

    def sum_step(self, work: Callable[[], Tensor], gradient: Tensor, *, stop: StopRequest) -> Tensor:
        """Do `work`, this process's share of a step; leave the sum of all in its `gradient`, return their loss.

        `stop` then holds what any of them was asked for: by which signal to stop, and to save. One process alone does
        not wait for its device.
        """
        with self.sync_errors(passes=True):
            loss = work()
        wanted, stop.save_wanted = stop.save_wanted, False
        if self.count == 1:
            stop.save = wanted
            return loss
        told = self.gather((float(loss), stop.received, wanted), passes=True)
        stop.save = any(save for _, _, save in told)
        stop.signal = max(number for _, number, _ in told)
        import torch

        torch.distributed.all_reduce(gradient)
        return loss.new_tensor(sum(one for one, _, _ in told))

    def leave(self) -> None:
        """From here on this process ends by itself, also where a launcher wants to end it with the others."""
        self.leaving.set()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


ALONE = Ranks()


@contextlib.contextmanager
def join() -> Iterator[Ranks]:
    """Meet the other processes that the launcher started, if any; at the end they wait for each other.

    An error that they have not agreed on ends the others too, which may wait for this one: with its exit code.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE
        return
    import torch
    from accelerate import PartialState

    cuda, local = torch.cuda.is_available(), int(os.environ.get("LOCAL_WORLD_SIZE", count))
    if cuda:
        _check_cards(torch.cuda.device_count(), local)
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":  # torchrun's choice for more than one
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // local))
        os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    # Gradients go from card to card, small objects over gloo.
    backend = "cuda:nccl,cpu:gloo" if cuda else "gloo"
    try:
        state = PartialState(cpu=not cuda, backend=backend, timeout=_STEP_LIMIT)
        ranks = Ranks(state.process_index, count, torch.distributed.new_group(backend="gloo", timeout=_WORK_LIMIT))
        store = watch.meet_store(ranks.index)
    except RuntimeError as error:
        raise DeviceError(f"the processes cannot meet: {str(error).strip().splitlines()[0]}") from error
    watcher = watch.Watch(ranks.gather(watch.own_place()), ranks.index, store, leaving=ranks.leaving)
    watcher.start()
    try:
        yield ranks
        ranks.gather(None)
        state.destroy_process_group()
    except Exception as error:
        if ranks.leaving.is_set():
            raise
        code = _exit_code(error)
        if code == 1:  # of a collective, where another process is gone: the watch says so and ends this one
            watcher.failed.set()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(3 * watch.GRACE)
        first = watch.tell_end(store, code, getattr(error, "what", first_line(error)))
        ranks.leave()
        time.sleep(3 * watch.BEAT)  # the store may be this process's own
        if first or code == 1:
            raise
        raise SystemExit(code) from None
    finally:
        ranks.leave()


def _exit_code(error: BaseException | None) -> int:
    """That with which `error` ends a process; 0: there is none."""
    if isinstance(error, Exception) and out_of_memory(error):
        return CapacityError.exit_code
    return getattr(error, "exit_code", None) or getattr(error, "code", None) or int(error is not None)


def _check_cards(cards: int, local: int) -> None:
    """Raise DeviceError, in the first process that has no card, where a machine has fewer than processes."""
    number = int(os.environ.get("LOCAL_RANK", "0"))
    if number == cards:
        what = f"{local} processes on {watch.own_place()[0]}, which has {cards} cards"
        raise DeviceError(what, hint=f"torchrun --nproc-per-node {cards}, as many as CUDA_VISIBLE_DEVICES names")
    if number > cards:
        raise SystemExit(DeviceError.exit_code)
