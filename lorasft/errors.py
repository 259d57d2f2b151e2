"""What can go wrong: each error says what, where, how to mend it, and the exit code that it ends with."""

from __future__ import annotations

from lorasft.terminal import harmless, redact


class LorasftError(Exception):
    """A fault that the user can mend. Printed as `error: what`, `where:` and `hint:`, never as a traceback."""

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        """A line each. What came from files and rows neither moves the cursor nor begins a line nor shows a token."""
        parts = {"error": self.what, "where": self.where, "hint": self.hint}
        return "\n".join(f"{name}: {_tame(text)}" for name, text in parts.items() if text)


class RecipeError(LorasftError):
    """The command line, the recipe or the run folder."""

    exit_code = 2


class DataError(LorasftError):
    """A row, a file or a column of the data."""

    exit_code = 3


class ModelError(LorasftError):
    """The files of a model, tokenizer, template, adapter or checkpoint."""

    exit_code = 4


class DeviceError(LorasftError):
    """The device, a driver or a library of this machine."""

    exit_code = 5


class CapacityError(LorasftError):
    """Out of memory or disk."""

    exit_code = 6


class DivergedError(LorasftError):
    """The training went wrong: a loss or gradient that is not finite, or nothing trained."""

    exit_code = 7


class UnsafeError(LorasftError):
    """Refused for safety."""

    exit_code = 8


class Stopped(LorasftError):
    """Stopped by a signal, with a checkpoint saved. Exits with 130 for SIGINT, 143 for SIGTERM and SIGHUP."""

    def __init__(self, signal: int, what: str) -> None:
        super().__init__(what, hint="go on with --resume")
        self.exit_code = 130 if signal == 2 else 143


class Several(LorasftError):
    """Up to 20 faults of one kind, found in one go. `more`: in words, what was found and is not among them."""

    most = 20

    def __init__(self, faults: list[LorasftError], *, more: str | None = None) -> None:
        super().__init__(f"{len(faults)} faults")
        self.faults = faults
        self.more = more or (f"{len(faults) - self.most} more" if len(faults) > self.most else None)
        self.exit_code = faults[0].exit_code

    def __str__(self) -> str:
        """A hint that several have stands once, behind the last of them."""
        shown = self.faults[: self.most]
        last = {fault.hint: fault for fault in shown}
        lines = [
            str(fault if last[fault.hint] is fault else LorasftError(fault.what, where=fault.where)) for fault in shown
        ]
        return "\n".join([*lines, f"... and {self.more}"] if self.more else lines)


def _tame(text: str) -> str:
    """Lines after the first are indented: none of them can be taken for a line of ours."""
    return redact(harmless(text)).replace("\n", "\n  ")
