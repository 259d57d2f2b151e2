"""Words to the person who watches: on stderr, and never the end of the work."""

from __future__ import annotations

import contextlib
import sys
import time


def say(text: str, *, end: str = "\n") -> None:
    """Print `text` on stderr. A reader that has gone away is no reason to stop."""
    with contextlib.suppress(OSError, ValueError):  # a closed pipe, a closed stream
        print(text, end=end, file=sys.stderr, flush=True)


class ByteProgress:
    """One line that is written over, for a terminal: bytes written so far, and the time left at this pace."""

    def __init__(self) -> None:
        self.started = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        left = (time.monotonic() - self.started) * (total - done) / max(done, 1)
        text = f"{done / 1e9:.2f} of {total / 1e9:.2f} GB, {left:.0f} s left"
        say(f"\r\x1b[K{text}", end="\n" if done == total else "")


def size_text(size: float) -> str:
    """Bytes for a reader, in the units that memory is sold in."""
    return f"{size / 2**30:,.2f} GiB" if abs(size) >= 2**29 else f"{size / 2**20:,.1f} MiB"


def time_text(seconds: float) -> str:
    """A duration for a reader."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
