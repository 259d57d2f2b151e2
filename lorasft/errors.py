"""What can go wrong: each error says what, where, how to fix it, and the exit code that it ends with."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lorasft.terminal import harmless, redact, shorten


class LorasftError(Exception):
    """An error that the user can fix. Printed as `error: what`, `where:` and `hint:`, never as a traceback."""

    exit_code = 1
    labels = ("error: ", "where: ", "hint: ")

    def __init_subclass__(cls, *, exit_code: int | None = None) -> None:
        cls.exit_code = exit_code or cls.exit_code

    def __init__(self, what: str, *, where: object = None, hint: str | None = None) -> None:
        """`where`: a path, the place of a row, a key, or whatever else names it as text."""
        super().__init__(what)
        self.what = what
        self.where = None if where is None else str(where)
        self.hint = hint

    def __str__(self) -> str:
        """A line each. What came from files and rows neither moves the cursor nor begins a line nor shows a token."""
        parts = zip(self.labels, (self.what, self.where, self.hint), strict=True)
        # An indented line cannot be taken for one of ours.
        return "\n".join(f"{label}{redact(harmless(text))}".replace("\n", "\n  ") for label, text in parts if text)


class RecipeError(LorasftError, exit_code=2):
    """The command line, the recipe or the run folder."""


class DataError(LorasftError, exit_code=3):
    """A row, a file or a column of the data."""


class ModelError(LorasftError, exit_code=4):
    """The files of a model, tokenizer, template, adapter or checkpoint."""


class DeviceError(LorasftError, exit_code=5):
    """The device, a driver or a library of this machine."""


class CapacityError(LorasftError, exit_code=6):
    """Out of memory or disk."""


class DivergedError(LorasftError, exit_code=7):
    """A loss, gradient or log-probability that is not finite, or nothing trained."""


class UnsafeError(LorasftError, exit_code=8):
    """Refused for safety."""


class Stopped(LorasftError):
    """Not all was done; `command` continues it. A signal is no error: 130 for SIGINT, else 143; 0 for a used budget."""

    labels = ("", "where: ", "next: ")

    def __init__(self, exit_code: int, what: str, command: str) -> None:
        super().__init__(what, hint=command)
        self.exit_code = exit_code


class ErrorGroup(LorasftError):
    """Errors of one kind, found in one go, a line each. `beyond`: how many more there are at least."""

    def __init__(self, errors: Sequence[LorasftError], *, beyond: int = 0) -> None:
        super().__init__(f"{len(errors)} errors")
        self.errors = errors
        self.beyond = beyond
        self.exit_code = errors[0].exit_code

    def __str__(self) -> str:
        lines = [" | ".join(" ".join(line.split()) for line in str(error).splitlines()) for error in self.errors]
        return "\n".join([*lines, f"... and at least {self.beyond:,} more"] if self.beyond > 0 else lines)


def in_words(details: Sequence[Mapping[str, Any]]) -> str:
    """What pydantic found about one key, whose branches of a union may each say something: `key: this, or that`."""
    said = dict.fromkeys(detail["msg"].removeprefix("Value error, ") for detail in details)
    value = details[0]["input"]
    shown = f" (it is {shorten(json.dumps(value))})" if isinstance(value, (str, int, float)) else ""
    return f"{'.'.join(map(str, details[0]['loc']))}: {', or '.join(said)}{shown}"


def first_line(error: BaseException) -> str:
    """What `error` is and says, without what follows."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


# torch has a class for its own allocator on CUDA. What libraries take beside it, and the driver, they say in words: a
# library that cannot even start on a GPU has mostly found no memory for its work space. oneDNN has the last two.
_SIGNS = re.compile(
    r"out of memory|ALLOC_FAILED|ALLOCATION_FAILED|cudaErrorMemoryAllocation|DefaultCPUAllocator"
    r"|CU(BLAS|DNN|SOLVER|SPARSE)_STATUS_NOT_INITIALIZED|could not create a memory object"
    r"|^\s*could not (create|execute) a primitive\s*$"
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on a GPU or on a CPU."""
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's
    return known or (isinstance(error, RuntimeError) and _SIGNS.search(str(error)) is not None)


@contextmanager
def reading(what: str, *also: type[Exception], where: object = None, hint: str | None = None) -> Iterator[None]:
    """Raise ModelError, `what` and why, where a file is missing or is not as it is read: then Python raises a dozen
    kinds, and its reader those of `also`. A lack of memory says nothing of a file."""
    kinds: list[type[Exception]] = [OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, *also]
    try:
        yield
    except tuple(kinds) as error:
        if out_of_memory(error):
            raise
        raise ModelError(f"{what}: {' '.join(str(error).split())[:400]}", where=where, hint=hint) from None
