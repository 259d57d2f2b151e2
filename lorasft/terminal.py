"""Words to the person who watches: on stderr, and never the end of the work."""

from __future__ import annotations

import contextlib
import sys


def say(text: str, *, end: str = "\n") -> None:
    """Print `text` on stderr. A reader that has gone away is no reason to stop."""
    with contextlib.suppress(OSError, ValueError):  # a closed pipe, a closed stream
        print(text, end=end, file=sys.stderr, flush=True)


def show_bytes(done: int, total: int) -> None:
    """Bytes written so far, on one line that is written over; for a terminal only."""
    say(f"\r\x1b[K{done / 1e9:.2f} of {total / 1e9:.2f} GB", end="\n" if done == total else "")
