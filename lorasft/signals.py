"""Signals. SIGINT, SIGTERM, SIGHUP: the first stops a training run after the step, saved; the second at once.

Everywhere else the first one unwinds, and what was begun is cleared away. SIGHUP changes nothing under nohup; SIGINT is
heard in background jobs too, where shells ignore it. SIGUSR1 saves after a step, and the run continues.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn


class Ended(KeyboardInterrupt):
    """A signal, whose number is the argument, where there is no step to finish."""


def exit_code(number: int) -> int:
    """130 after SIGINT, 143 after SIGTERM and SIGHUP; 0 after SIGALRM, which stands for a time that is over."""
    return {signal.SIGINT: 130, signal.SIGALRM: 0}.get(signal.Signals(number), 143)


@dataclass
class StopRequest:
    """What is asked of a run: to stop, by `signal` (0: not), and to `save` after this step. Processes agree on both."""

    alone: bool = True
    notice: bytes = b"stopping after this step, which is saved; a second signal stops at once\n"
    received: int = 0  # the signal that this process got
    signal: int = 0
    save: bool = False
    save_wanted: bool = False  # by this process, and not told yet

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.save_wanted = True
        elif self.received:
            _unwind(number, frame)
        else:
            self.received, self.signal = number, number if self.alone else 0
            if self.alone and self.notice:
                os.write(2, b"\n" * os.isatty(2) + self.notice)


def exit_signals() -> list[signal.Signals]:
    """What asks a run to end: SIGINT, SIGTERM, and SIGHUP unless nohup has it ignored."""
    hangup = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, signal.SIGTERM, *hangup]


@contextmanager
def stop_signals(*, alone: bool, notice: bytes = StopRequest.notice) -> Iterator[StopRequest]:
    """Take SIGINT, SIGTERM and SIGHUP as a request to stop, which `notice` answers, SIGUSR1 to save."""
    stop = StopRequest(alone, notice)
    with _answered(dict.fromkeys([*exit_signals(), signal.SIGUSR1], stop)):
        yield stop


def ended_in_order() -> AbstractContextManager[None]:
    """Signals that ask to end raise Ended; a second one, or one in an import, ends at once. SIGUSR1 ends nothing."""
    return _answered({**dict.fromkeys(exit_signals(), _unwind), signal.SIGUSR1: signal.SIG_IGN})


def end_at_once() -> None:
    """From here on signals that ask to end do so at once, with their exit code: there is nothing to put in order."""
    for number in exit_signals():
        signal.signal(number, _end)


@contextmanager
def _answered(handlers: Mapping[signal.Signals, Any]) -> Iterator[None]:
    """Take signals so, and put the handlers before back after. Only a main thread hears any."""
    with ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                stack.callback(signal.signal, number, signal.signal(number, handler))
        yield


def _unwind(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _end(number, frame)  # half a library is left, and whoever catches what is raised continues with that
        frame = frame.f_back
    end_at_once()
    raise Ended(number)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    os.write(2, b"\nstopped\n" if os.isatty(2) else b"stopped\n")  # a line of progress may be open
    os._exit(exit_code(number))
