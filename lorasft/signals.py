"""Signals. SIGINT, SIGTERM, SIGHUP: the first stops a training run after the step, saved; the second at once.

Everywhere else the first one stops at once: it unwinds like Ctrl-C, and what was begun is cleared away. SIGHUP changes
nothing under nohup. SIGUSR1 saves after the step, and the run goes on; before and after the steps it changes nothing.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP, where there is no step to finish."""


def exit_code(stopped: KeyboardInterrupt) -> int:
    """130 after Ctrl-C, 143 after SIGTERM and SIGHUP."""
    return 143 if isinstance(stopped, Terminated) else 130


@dataclass
class StopRequest:
    """What is asked of a run: to stop, by which signal (0: not), and to save. Several processes agree on both."""

    received: int = 0
    agreed: int | None = None  # None: this process is alone
    save: bool = False  # after this step; agreed on
    save_wanted: bool = False  # by this process, and not told yet

    @property
    def signal(self) -> int:
        return self.received if self.agreed is None else self.agreed

    @property
    def exit_code(self) -> int:
        return 130 if self.signal == signal.SIGINT else 143

    def want_save(self, number: int = 0, frame: FrameType | None = None) -> None:
        self.save_wanted = True

    def tell_save(self) -> bool:
        """Whether this process wants a save: asked once, done once."""
        wanted, self.save_wanted = self.save_wanted, False
        return wanted

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            _unwind(number, frame)
        self.received = number


def exit_signals() -> list[signal.Signals]:
    """What asks a run to end: SIGINT, SIGTERM, and SIGHUP unless nohup has it ignored."""
    hangup = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, signal.SIGTERM, *hangup]


@contextmanager
def stop_signals(*, alone: bool) -> Iterator[StopRequest]:
    """Take SIGINT, SIGTERM and SIGHUP as a request to stop, SIGUSR1 to save."""
    stop = StopRequest(agreed=None if alone else 0)
    with _answered({**dict.fromkeys(exit_signals(), stop), signal.SIGUSR1: stop.want_save}):
        yield stop


@contextmanager
def ended_in_order() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, SIGTERM and SIGHUP Terminated; another one meanwhile ends at once."""
    heard = [number for number in exit_signals() if signal.getsignal(number) != signal.SIG_IGN]
    with _answered(dict.fromkeys(heard, _unwind)):
        yield


@contextmanager
def save_signal_ignored() -> Iterator[None]:
    """SIGUSR1, which ends a process by default, ends nothing where there is nothing to save."""
    with _answered({signal.SIGUSR1: signal.SIG_IGN}):
        yield


@contextmanager
def _answered(handlers: Mapping[signal.Signals, Any]) -> Iterator[None]:
    """Take signals so, and put the handlers before back after. Only a main thread hears any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _unwind(number: int, frame: FrameType | None) -> NoReturn:
    for each in exit_signals():
        signal.signal(each, _end)
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated


def _end(number: int, frame: FrameType | None) -> NoReturn:
    os._exit(130 if number == signal.SIGINT else 143)
