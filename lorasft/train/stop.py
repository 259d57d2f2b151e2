"""Signals to a run. SIGINT, SIGTERM, SIGHUP: the first stops it after the step, saved; the second at once.

SIGUSR1 saves after the step, and the run goes on; before the first step and after the last it changes nothing.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any


@dataclass
class StopRequest:
    """What is asked of a run: to stop, by which signal (0: not), and to save. Several processes agree on both."""

    received: int = 0
    agreed: int | None = None  # None: this process is alone
    save: bool = False  # after this step; agreed on
    save_wanted: bool = False  # by this process, and not told yet
    previous: dict[int, Any] = field(default_factory=dict)

    @property
    def signal(self) -> int:
        return self.received if self.agreed is None else self.agreed

    def want_save(self, number: int = 0, frame: FrameType | None = None) -> None:
        self.save_wanted = True

    def tell_save(self) -> bool:
        """Whether this process wants a save: asked once, done once."""
        wanted, self.save_wanted = self.save_wanted, False
        return wanted

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            self.restore()
            signal.raise_signal(number)
        self.received = number

    def restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


@contextmanager
def stop_signals(*, alone: bool) -> Iterator[StopRequest]:
    """Take SIGINT, SIGTERM and SIGHUP as a request to stop, SIGUSR1 to save; their handlers are put back after."""
    stop = StopRequest(agreed=None if alone else 0)
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            stop.previous[number] = signal.signal(number, stop)
        stop.previous[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, stop.want_save)
    try:
        yield stop
    finally:
        stop.restore()


@contextmanager
def save_signal_ignored() -> Iterator[None]:
    """SIGUSR1, which ends a process by default, ends nothing where there is nothing to save."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)
