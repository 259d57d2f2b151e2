"""Words to the person who watches: on stderr, and never the end of the work."""

from __future__ import annotations

import contextlib
import sys


def say(text: str, *, end: str = "\n") -> None:
    """Print `text` on stderr. A reader that has gone away is no reason to stop."""
    with contextlib.suppress(OSError, ValueError):  # a closed pipe, a closed stream
        print(text, end=end, file=sys.stderr, flush=True)
