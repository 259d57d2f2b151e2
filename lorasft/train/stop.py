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
    """The signal that was received, 0 for none."""

    signal: int = 0
    previous: dict[int, Any] = field(default_factory=dict)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            self.restore()
            signal.raise_signal(number)
        self.signal = number

    def restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Take SIGINT, SIGTERM and SIGHUP as a request to stop; their handlers are put back after."""
    stop = StopRequest()
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            stop.previous[number] = signal.signal(number, stop)
    try:
        yield stop
    finally:
        stop.restore()
