"""Words to the person who watches: on stderr, and never the end of the work."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys

# What a terminal obeys, or shows in another order than it is; half characters, which no terminal takes.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_SECRETS = re.compile(
    r"\b(?P<kind>hf_|gh[opsu]_|AKIA)[A-Za-z0-9]{16,}|\b(?P<long>sk-|github_pat_|glpat-|xox[bp]-)[A-Za-z0-9_-]{20,}"
    r"|(?P<url>:/{1,2})[^/\s@]+@"  # a path has one of the slashes
    r"|(?P<query>[?&](?:access_|auth_)?token=)[^\s&'\"]+"
    r"|(?P<header>authorization['\"]?\s*[:=]\s*['\"]?)(?:(?:bearer|basic)\s+)?[^\s'\"]+"
    r"|(?P<key>api[_-]?key['\"]?\s*[:=]\s*['\"]?)[^\s'\",}]+",
    re.IGNORECASE,
)


def say(text: object, *, end: str = "\n", bold: bool = False) -> None:
    """Print `text` on stderr, on a terminal over a line that has not ended. A reader that went away stops nothing."""
    if os.environ.get("LORASFT_QUIET") and not isinstance(text, Exception):  # of `lorasft train --quiet`
        return
    words = redact(harmless(str(text)))
    with contextlib.suppress(OSError, ValueError):  # a closed pipe, a closed stream
        if is_live():
            words = f"\x1b[1m{words}\x1b[0m" if bold and "NO_COLOR" not in os.environ else words
            words = f"\r\x1b[K{words}"
        print(words, end=end, file=sys.stderr, flush=True)


def is_live() -> bool:
    """Whether stderr is a terminal on which a line can be written over."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def harmless(text: str) -> str:
    """`text` with nothing in it that a terminal would obey: control characters, but for newline and tab, as escapes."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def shorten(text: str, *, most: int = 80) -> str:
    """`text` on one line of at most so many characters, with nothing in it that a terminal would obey."""
    return harmless(text if len(text) <= most else f"{text[: most - 3]}...").replace("\n", "\\n")


def redact(text: str) -> str:
    """`text` without what looks like a token, a password in a URL, or a key."""
    return _SECRETS.sub(lambda found: (found[found.lastgroup or 0]) + "..." + "@" * (found["url"] is not None), text)


def quote(word: object) -> str:
    """A path or `key=value` as a word of a command that is printed to be copied: for a shell, and not an option."""
    text = str(word)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def train_command(*words: object) -> str:
    """`lorasft train` with `words`, to be copied: by as many processes as there are now."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    nodes = f"--nnodes {processes // local} " if processes > local else ""
    launcher = f"torchrun {nodes}--nproc-per-node {local} -m " if processes > 1 else ""
    return f"{launcher}lorasft train {' '.join(map(quote, words))}"


def size_text(size: float) -> str:
    """Bytes for a reader, in the units that memory is sold in."""
    return f"{size / 2**30:,.2f} GiB" if abs(size) >= 2**29 else f"{size / 2**20:,.1f} MiB"
