"""Who of the processes that train together is gone, whatever this one is busy with: then it ends as well.

A collective over gloo fails when the other end is gone, but one over NCCL waits, one with a machine that lost its power
waits too, and a long computation asks nobody. So the processes of a machine and their launcher are watched through the
kernel, machines by beats in the store of the rendezvous, where a process that fails also has all others end.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

from lorasft.errors import DeviceError
from lorasft.terminal import say

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

BEAT = 1.0  # seconds from one look to the next
GRACE = 5.0  # in which a process may find out by itself that another is gone, and end in order
_SILENCE = 60.0  # after which a machine is lost
_END = "end"  # the key of the exit code with which all end, what is said, and on which machine it was

Place = tuple[str, int]  # a machine, and the number of a process there


def own_place() -> Place:
    """Where this process is. Launchers on one machine stand for as many machines."""
    group = os.environ.get("GROUP_RANK")
    return socket.gethostname() + (f" (node {group})" if group else ""), os.getpid()


def meet_store(index: int) -> Store:
    """A connection of process `index` to the store by which all met, as another thread may wait in torch's own."""
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    server = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=_SILENCE))
    attempt = [os.environ.get(f"TORCHELASTIC_{name}", "") for name in ("RUN_ID", "RESTART_COUNT")]
    store: Store = PrefixStore(f"lorasft {attempt}", server)
    store.set(f"beat {index}", "")
    return store


def tell_end(store: Store, code: int, words: str) -> bool:
    """Have all processes end with `code`, unless one has told that before. Returns whether this is the first."""
    with contextlib.suppress(RuntimeError):  # the store is gone
        if store.add(f"{_END}s", 1) > 1:
            return False
        store.set(_END, json.dumps([code, words, own_place()[0]]))
    return True


class Watch(threading.Thread):
    """The watch of process `index` of those in `places`, until the event `leaving` is set."""

    def __init__(self, places: Sequence[Place], index: int, store: Store, *, leaving: threading.Event) -> None:
        super().__init__(daemon=True)
        self.places, self.index, self.store, self.leaving = places, index, store, leaving
        self.failed = threading.Event()  # a collective did: who is silent now is lost
        self._machine = places[index][0]
        self._own = {rank for rank, (machine, _) in enumerate(places) if machine == self._machine}
        self._near: dict[int, int] = {}  # ranks of this machine by what the kernel tells their end by; -1: the launcher
        with contextlib.suppress(OSError, AttributeError):  # before Linux 5.3
            self._near = {os.pidfd_open(places[rank][1]): rank for rank in self._own - {index}}
            if "TORCHELASTIC_RUN_ID" in os.environ:  # without its launcher a worker would train on
                self._near[os.pidfd_open(os.getppid())] = -1

    def run(self) -> None:
        """Look until somebody is gone, then end this process."""
        code, words, machine = DeviceError.exit_code, f"the rendezvous on {os.environ['MASTER_ADDR']} was lost", None
        with contextlib.suppress(RuntimeError):  # the store is gone
            code, words, machine = self._wait()
        if self.leaving.wait(GRACE * (-1 not in self._lost())):
            return
        lost = self._lost()
        if lost and machine is None:
            ranks = [f"rank {rank} (process {self.places[rank][1]})" for rank in sorted(lost - {-1})]
            names = [*["the launcher"] * (-1 in lost), *(f"{name} of {len(self.places)}" for name in ranks)]
            words = f"{' and '.join(names)} was lost"
        if self.index == min(self._own - lost) and machine != self._machine:  # the first that is left speaks
            hint = "its own last words or the system's log (out of memory?) say why; continue with --resume"
            say(f"{machine}: {words}" if machine else DeviceError(words, hint=hint))
            tell_end(self.store, code, words)
        os._exit(code)  # safe at any time: what is on the disk is whole or not there

    def _lost(self) -> set[int]:
        return {self._near[one] for one in select.select(self._near, [], [], 0)[0]}

    def _wait(self) -> tuple[int, str, str | None]:
        """Until somebody is gone. Returns the exit code, what is to be said, and the machine that says it already."""
        far = {machine: rank for rank, (machine, _) in reversed([*enumerate(self.places)]) if machine != self._machine}
        heard = {machine: (b"", time.monotonic()) for machine in far}
        while not select.select(self._near, [], [], BEAT)[0]:
            self.store.set(f"beat {self.index}", str(time.monotonic()))
            if self.store.check([_END]):
                code, words, machine = json.loads(self.store.get(_END))
                return code, words, machine
            for machine, rank in far.items():
                now, last = time.monotonic(), self.store.get(f"beat {rank}")
                if last != heard[machine][0]:
                    heard[machine] = last, now
                elif now - heard[machine][1] > (GRACE if self.failed.is_set() else _SILENCE):
                    return DeviceError.exit_code, f"{machine} was lost", None
        return DeviceError.exit_code, "", None
