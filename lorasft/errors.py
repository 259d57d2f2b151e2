"""What can go wrong: each error says what, where, how to mend it, and the exit code that it ends with."""

from __future__ import annotations


class LorasftError(Exception):
    """A fault that the user can mend. Printed as `error: what`, `where:` and `hint:`, never as a traceback."""

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        lines = [f"error: {self.what}"]
        if self.where:
            lines.append(f"where: {self.where}")
        if self.hint:
            lines.append(f"hint: {self.hint}")
        return "\n".join(lines)


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
    """Up to 20 faults of one kind, found in one go."""

    most = 20

    def __init__(self, faults: list[LorasftError]) -> None:
        super().__init__(f"{len(faults)} faults")
        self.faults = faults
        self.exit_code = faults[0].exit_code

    def __str__(self) -> str:
        shown = [str(fault) for fault in self.faults[: self.most]]
        if len(self.faults) > self.most:
            shown.append(f"... and {len(self.faults) - self.most} more")
        return "\n".join(shown)
