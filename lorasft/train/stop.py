"""Signals that ask a run to stop: the first after the step, saved; the second at once."""

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
    """The signal to stop, 0 for none: received by this process, and what several have agreed on in a step."""

    received: int = 0
    agreed: int | None = None  # None: this process is alone
    previous: dict[int, Any] = field(default_factory=dict)

    @property
    def signal(self) -> int:
        return self.received if self.agreed is None else self.agreed

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
    """Take SIGINT, SIGTERM and SIGHUP as a request to stop; their handlers are put back after."""
    stop = StopRequest(agreed=None if alone else 0)
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            stop.previous[number] = signal.signal(number, stop)
    try:
        yield stop
    finally:
        stop.restore()
