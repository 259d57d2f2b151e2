"""The processes that train together: which one this is, what they add up, what the first tells the others.

torchrun or accelerate starts them, on one machine; a process alone meets nothing of what follows. Each holds the whole
model and takes its share of a step's micro-batches; one sum over the processes joins their gradients. The first
process speaks and writes. A fault that all of them meet, or that one of them can still tell, is said once and ends all
with its exit code; a process that is gone without a word is named by the others.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from lorasft.errors import DeviceError, LorasftError
from lorasft.signals import StopRequest
from lorasft.terminal import say

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")
_GRACE = 10.0  # seconds in which a process may find out by itself that another is gone, and end in order


class Watch:
    """Notices that another process of this machine has ended, whatever this one is busy with.

    A collective over gloo fails at once, but one over NCCL waits for ever, and a long computation asks nobody.
    Where the system has no pidfd (before Linux 5.3) nothing is watched and no lost process is named.
    """

    def __init__(self, pids: Sequence[int]) -> None:
        self.pids = pids
        self.leaving = False
        self._ranks: dict[int, int] = {}
        with contextlib.suppress(OSError, AttributeError):
            self._ranks = {os.pidfd_open(pid): rank for rank, pid in enumerate(pids) if pid != os.getpid()}
        if self._ranks:
            threading.Thread(target=self._end_with_them, daemon=True).start()

    def ended(self, seconds: float | None, ranks: Sequence[int] | None = None) -> list[int]:
        """Which processes (of `ranks`) have ended; waits up to `seconds` for the first, None: for ever."""
        poll = select.poll()
        for descriptor, rank in self._ranks.items():
            if ranks is None or rank in ranks:
                poll.register(descriptor, select.POLLIN)
        found = poll.poll(None if seconds is None else int(1000 * seconds)) if self._ranks else []
        return sorted(self._ranks[descriptor] for descriptor, _ in found)

    def speaker(self, lost: Sequence[int]) -> int:
        """The first of the processes that are left: it says what happened."""
        return min(set(range(len(self.pids))) - set(lost))

    def lost(self, ranks: Sequence[int]) -> DeviceError:
        """What to say about processes that have ended."""
        names = " and ".join(f"rank {rank} (process {self.pids[rank]})" for rank in ranks) or "another process"
        return DeviceError(
            f"{names} of {len(self.pids)} was lost",
            hint="its own last words or the system's log (out of memory?) say why; go on with --resume",
        )

    def _end_with_them(self) -> None:
        ranks = self.ended(None)
        time.sleep(_GRACE)
        if not self.leaving:
            if self.pids[self.speaker(ranks)] == os.getpid():
                say(str(self.lost(ranks)))
            os._exit(DeviceError.exit_code)  # safe at any time: what is on the disk is whole or not there


@dataclass(frozen=True)
class Ranks:
    """This process, number `index` of `count`."""

    index: int = 0
    count: int = 1
    watch: Watch | None = None  # of the others, where there are any

    @property
    def is_main(self) -> bool:
        """Whether this process speaks and writes."""
        return self.index == 0

    def gather(self, value: T) -> list[T]:
        """The small `value` of every process, in their order."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.count
        with self._collective():
            dist.all_gather_object(values, value)
        return values

    def lead(self, work: Callable[[], T]) -> T:
        """What `work` gives the first process, told to the others, which wait. Its fault ends them all."""
        if self.count == 1:
            return work()
        import torch
        import torch.distributed as dist

        told: list[Any] = [None]
        with self.agreed():
            try:
                if self.is_main:
                    told[0] = work()
            finally:
                with self._collective():
                    dist.broadcast_object_list(told, src=0, device=torch.device("cpu"))
        result: T = told[0]
        return result

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """A stretch that every process passes, or none: the first that failed says why. All wait here for all."""
        if self.count == 1:
            yield
            return
        fault: BaseException | None = None
        try:
            yield
        except BaseException as caught:
            if self.watch is not None and self.watch.leaving:
                raise  # another process is gone, and that has been said
            fault = caught
        self._end_on(self.gather(_exit_code(fault)), fault)

    def copy_first(self, tensors: Sequence[Tensor]) -> None:
        """Make `tensors` those of the first process: unlike devices draw unlike random numbers."""
        if self.count > 1:
            import torch.distributed as dist

            with self._collective():
                for tensor in tensors:
                    dist.broadcast(tensor.detach(), src=0)

    def sum_step(self, work: Callable[[], float], parameters: Sequence[nn.Parameter], *, stop: StopRequest) -> float:
        """Do `work`, this process's share of a step; leave the gradients of all in `parameters`, return their loss.

        One sum over the processes carries gradients, loss, how many want a save, and for each process the signal that
        it received and the fault that it met. A parameter that no process reached keeps no gradient.
        """
        if self.count == 1:
            loss = work()
            stop.save = stop.tell_save()
            return loss
        loss, fault = 0.0, None
        try:
            loss = work()
        except LorasftError as caught:
            fault = caught
        own = [0.0] * (2 * self.count)
        own[self.index], own[self.count + self.index] = float(stop.received), float(_exit_code(fault))
        loss, saves, *told = self._sum_gradients(parameters, [loss, float(stop.tell_save()), *own])
        self._end_on([int(code) for code in told[self.count :]], fault)
        stop.agreed, stop.save = int(max(told[: self.count])), saves > 0
        return loss

    def _sum_gradients(self, parameters: Sequence[nn.Parameter], tail: list[float]) -> list[float]:
        """Add up gradients and `tail` over the processes, in one flat fp32 buffer; returns the summed tail."""
        import torch
        import torch.distributed as dist

        gradients = [parameter.grad for parameter in parameters]
        sizes = [parameter.numel() for parameter in parameters]
        device = parameters[0].device
        flat = torch.cat(
            [torch.zeros(size, device=device) if gradient is None else gradient.reshape(-1).float()
             for gradient, size in zip(gradients, sizes, strict=True)]
            + [torch.tensor([*(float(gradient is not None) for gradient in gradients), *tail], device=device)]
        )  # fmt: skip
        with self._collective():
            dist.all_reduce(flat)
            *sums, rest = torch.split(flat, [*sizes, len(sizes) + len(tail)])
            numbers: list[float] = rest.tolist()
        for parameter, total, reached in zip(parameters, sums, numbers, strict=False):
            parameter.grad = total.view_as(parameter).to(parameter.dtype) if reached else None
        return numbers[len(sizes) :]

    def _end_on(self, codes: Sequence[int], fault: BaseException | None) -> None:
        """End when one of `codes` by process is no 0: the first such process raises its `fault`."""
        speaker = next((index for index, code in enumerate(codes) if code), None)
        if speaker is None:
            return
        if fault is not None and speaker == self.index and (self.is_main or not isinstance(fault, LorasftError)):
            raise fault
        if fault is not None and speaker == self.index:
            say(str(fault))
        self.end_after(speaker, code=codes[speaker])

    def end_after(self, speaker: int, *, code: int) -> None:
        """Exit with `code` and without a word, once the process that speaks has ended."""
        self.leave()
        if self.watch is not None and speaker != self.index:
            self.watch.ended(_GRACE, [speaker])
        raise SystemExit(code) from None

    def leave(self) -> None:
        """From here on this process ends by itself: a launcher ends all of them as soon as one has ended."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if self.watch is not None:
            self.watch.leaving = True

    @contextlib.contextmanager
    def _collective(self) -> Iterator[None]:
        """What torch says when another process is gone, in plain words, by the first that is left."""
        try:
            yield
        except RuntimeError as caught:
            if self.watch is None:
                raise
            self.leave()
            lost = self.watch.ended(5.0)
            speaker = self.watch.speaker(lost)
            codes = [DeviceError.exit_code if index == speaker else 0 for index in range(self.count)]
            self._end_on(codes, self.watch.lost(lost) if self.index == speaker else caught)


ALONE = Ranks()


@contextlib.contextmanager
def join() -> Iterator[Ranks]:
    """Meet the other processes that the launcher started, if any; at the end they wait for each other.

    Raises DeviceError where they cannot work together.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    ranks = _connect()
    try:
        with ranks.agreed():
            _check_machine(ranks)
        yield ranks
        ranks.gather(None)
        _disconnect()
    except LorasftError as fault:  # all have met it, or the first has told it
        if ranks.is_main:
            raise
        ranks.end_after(0, code=fault.exit_code)
    finally:
        ranks.leave()


def _connect() -> Ranks:
    import torch
    from accelerate import PartialState

    cuda = torch.cuda.is_available()
    # Gradients go from card to card, small objects over gloo. The long limit is for the others while the first
    # prepares the data; who is gone is found out by the watch.
    backend = "cuda:nccl,cpu:gloo" if cuda else "gloo"
    try:
        state = PartialState(cpu=not cuda, backend=backend, timeout=timedelta(days=1))
    except RuntimeError as fault:
        raise DeviceError(f"the processes cannot meet: {str(fault).strip().splitlines()[0]}") from fault
    if not cuda and os.environ.get("OMP_NUM_THREADS", "1") == "1":  # torchrun's own choice, whatever the machine
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // state.num_processes))
    alone = Ranks(state.process_index, state.num_processes)
    return Ranks(alone.index, alone.count, Watch(alone.gather(os.getpid())))


def _check_machine(ranks: Ranks) -> None:
    import torch

    if int(os.environ.get("LOCAL_WORLD_SIZE", ranks.count)) != ranks.count:
        raise DeviceError("the processes stand on several machines", hint="start all of them on one")
    cards = torch.cuda.device_count()
    if 0 < cards < ranks.count:
        raise DeviceError(f"{ranks.count} processes for {cards} GPUs", hint=f"torchrun --nproc-per-node {cards}")


def _disconnect() -> None:
    from accelerate import PartialState

    PartialState().destroy_process_group()


def _exit_code(fault: BaseException | None) -> int:
    if fault is None:
        return 0
    return int(getattr(fault, "exit_code", None) or getattr(fault, "code", None) or 1)
