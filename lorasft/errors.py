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
    """A run was stopped by a signal. Exits with 130 for SIGINT, 143 for SIGTERM and SIGHUP."""

    def __init__(self, exit_code: int, what: str, *, hint: str | None = "go on with --resume") -> None:
        super().__init__(what, hint=hint)
        self.exit_code = exit_code


class Several(LorasftError):
    """Faults of one kind, found in one go: a line each, at most 20. `beyond`: how many more there are at least."""

    most = 20

    def __init__(self, faults: list[LorasftError], *, beyond: int = 0) -> None:
        super().__init__(f"{len(faults)} faults")
        self.faults = faults
        self.beyond = beyond
        self.exit_code = faults[0].exit_code

    def __str__(self) -> str:
        """A hint that several have stands once, behind the last of them."""
        all_fit = len(self.faults) + (self.beyond > 0) <= self.most
        shown = self.faults if all_fit else self.faults[: self.most - 1]
        left = len(self.faults) - len(shown) + self.beyond
        last = {fault.hint: fault for fault in shown}
        lines = [
            _line(LorasftError(fault.what, where=fault.where, hint=fault.hint if last[fault.hint] is fault else None))
            for fault in shown
        ]
        return "\n".join([*lines, f"... and {'at least ' if self.beyond else ''}{left:,} more"] if left else lines)


def _line(fault: LorasftError) -> str:
    return " | ".join(" ".join(line.split()) for line in str(fault).splitlines())


def _tame(text: str) -> str:
    """Lines after the first are indented: none of them can be taken for a line of ours."""
    return redact(harmless(text)).replace("\n", "\n  ")
