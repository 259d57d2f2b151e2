"""The processes that train together: which one this is, what they add up, what the first tells the others.

torchrun or accelerate starts them, on one machine. Each holds the whole model and takes its share of a step's
micro-batches; one sum over the processes joins their gradients. The first process speaks and writes. An error is said
once and ends all with its exit code; a process that is gone without a word is named by the others.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from lorasft.errors import DeviceError, LorasftError
from lorasft.signals import StopRequest
from lorasft.terminal import say

if TYPE_CHECKING:  # torch is imported only where it is needed: what is wrong with a recipe is said at once
    from torch import Tensor

T = TypeVar("T")
_GRACE = 5.0  # seconds in which a process may find out by itself that another is gone, and end in order


def watch(pids: Sequence[int], *, unless: threading.Event) -> None:
    """End this process when another one of `pids` has ended, whatever this one is busy with, unless the event is set.

    A collective over gloo fails at once, but one over NCCL waits for ever, and a long computation asks nobody.
    Where the system has no pidfd (before Linux 5.3) nothing is watched and no lost process is named.
    """

    def end_with(others: dict[int, int]) -> None:
        select.select(others, [], [])
        if unless.wait(_GRACE):
            return
        lost = sorted(others[descriptor] for descriptor in select.select(others, [], [], 0)[0])
        if pids[min(set(range(len(pids))) - set(lost))] == os.getpid():  # the first that is left speaks
            names = " and ".join(f"rank {rank} (process {pids[rank]})" for rank in lost)
            hint = "its own last words or the system's log (out of memory?) say why; continue with --resume"
            say(DeviceError(f"{names} of {len(pids)} was lost", hint=hint))
        os._exit(DeviceError.exit_code)  # safe at any time: what is on the disk is whole or not there

    with contextlib.suppress(OSError, AttributeError):
        ranks = {os.pidfd_open(pid): rank for rank, pid in enumerate(pids) if pid != os.getpid()}
        threading.Thread(target=end_with, args=[ranks], daemon=True).start()


@dataclass(frozen=True)
class Ranks:
    """This process, number `index` of `count`."""

    index: int = 0
    count: int = 1
    leaving: threading.Event = field(default_factory=threading.Event)  # from then on this process ends by itself

    @property
    def is_main(self) -> bool:
        """Whether this process speaks and writes."""
        return self.index == 0

    def gather(self, value: T) -> list[T]:
        """The small `value` of every process, in their order."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        return list(gather_object([value]))

    def on_main(self, work: Callable[[], T]) -> T:
        """What `work` gives the first process, told to the others, which wait. Its error ends them all."""
        with self.sync_errors():
            told = [work()] if self.is_main else []
        return self.gather(told)[0][0]

    @contextlib.contextmanager
    def sync_errors(self) -> Iterator[None]:
        """Wait here for all processes. If one of them failed within, all end with the error of the first that did."""
        error: BaseException | None = None
        try:
            yield
        except BaseException as caught:
            if self.count == 1 or self.leaving.is_set():
                raise
            error = caught
        code = getattr(error, "exit_code", None) or getattr(error, "code", None) or int(error is not None)
        codes = self.gather(code)
        if not any(codes):
            return
        self.leave()
        first = next(index for index, code in enumerate(codes) if code)
        if error is not None and first == self.index:
            if not isinstance(error, LorasftError):
                raise error
            say(error)
        raise SystemExit(codes[first])

    def sum_step(self, work: Callable[[], Tensor], gradient: Tensor, *, stop: StopRequest) -> Tensor:
        """Do `work`, this process's share of a step; leave the sum of all in its `gradient`, return their loss.

        `stop` then holds what any of them was asked for: by which signal to stop, and to save. One process alone does
        not wait for its device.
        """
        with self.sync_errors():
            loss = work()
        wanted, stop.save_wanted = stop.save_wanted, False
        if self.count == 1:
            stop.save = wanted
            return loss
        told = self.gather((float(loss), stop.received, wanted))
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
    """Meet the other processes that the launcher started, if any; at the end they wait for each other."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    import torch
    from accelerate import PartialState

    cuda = torch.cuda.is_available()
    # Gradients go from card to card, small objects over gloo. The long limit is for the others while the first
    # prepares the data; who is gone is found out by the watch.
    backend = "cuda:nccl,cpu:gloo" if cuda else "gloo"
    try:
        state = PartialState(cpu=not cuda, backend=backend, timeout=timedelta(days=1))
    except RuntimeError as error:
        raise DeviceError(f"the processes cannot meet: {str(error).strip().splitlines()[0]}") from error
    ranks = Ranks(state.process_index, state.num_processes)
    watch(ranks.gather(os.getpid()), unless=ranks.leaving)
    try:
        if int(os.environ.get("LOCAL_WORLD_SIZE", ranks.count)) != ranks.count:
            raise DeviceError("the processes are on several machines", hint="start all of them on one")
        yield ranks
        ranks.gather(None)
        state.destroy_process_group()
    except LorasftError as error:  # all have met it
        if ranks.is_main:
            raise
        raise SystemExit(error.exit_code) from None
    except RuntimeError:  # of a collective, when another process is gone: the watch says so and ends this one
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(3 * _GRACE)
        raise
    finally:
        ranks.leave()
