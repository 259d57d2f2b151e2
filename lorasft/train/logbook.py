"""What a run says: progress with time left, metrics.jsonl, trackers."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from lorasft.errors import LorasftError
from lorasft.files import append, sync_log
from lorasft.terminal import say
from lorasft.train.trackers import Trackers


class Logbook:
    """Writes a run's metrics and shows its progress on stderr: a line that moves, or plain lines without a terminal.

    `metrics_bytes`: how much of metrics.jsonl stands; what lies behind is of steps that are done again. Lines that the
    disk does not take wait for the next try, and no checkpoint is saved without them.
    """

    def __init__(
        self,
        folder: Path,
        *,
        log_every: int,
        steps: int,
        first_step: int,
        metrics_bytes: int,
        trackers: Trackers | None,
    ) -> None:
        self.path = folder / "metrics.jsonl"
        self.written = min(metrics_bytes, self.path.stat().st_size if self.path.exists() else 0)
        self.waiting = b""
        self.steps = steps
        self.log_every = log_every
        self.first_step = first_step
        self.trackers = trackers
        self.started = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def note(self, text: str) -> None:
        """One line for the reader."""
        say(("\r\x1b[K" if self.terminal else "") + text)

    def step(self, values: dict[str, Any]) -> None:
        """The metrics of one optimizer step."""
        self._record(values)
        number = values["step"]
        if number % self.log_every and number != self.steps:
            return
        line = (
            f"step {number}/{self.steps}  loss {values['loss']:.4f}  lr {values['learning_rate']:.2e}  "
            f"{values['tokens_per_second']:,.0f} tokens/s  {self._time_left(number)} left"
        )
        if self.terminal:
            say(f"\r\x1b[K{line}", end="" if number < self.steps else "\n")
        else:
            self.note(line)

    def evaluation(self, *, step: int, loss: float, tokens: int) -> None:
        """A held-out loss."""
        self._record({"step": step, "eval_loss": loss, "eval_tokens": tokens})
        self.note(f"step {step}/{self.steps}  held-out loss {loss:.4f} over {tokens:,} tokens")

    def secure(self) -> int:
        """Put all lines on the disk, for sure; their bytes. Raises CapacityError where the disk does not take them."""
        self._flush()
        if self.path.exists():
            sync_log(self.path)
        return self.written

    def close(self) -> None:
        """Let the trackers finish."""
        if self.trackers is not None:
            self.trackers.close()

    def _record(self, values: dict[str, Any]) -> None:
        said = bool(self.waiting)
        self.waiting += json.dumps(values).encode() + b"\n"
        try:
            self._flush()
        except LorasftError as fault:
            if not said:
                self.note(f"metrics.jsonl: {fault.what}; its lines wait in memory")
        if self.trackers is not None:
            self.trackers.log(values)

    def _flush(self) -> None:
        if self.waiting:
            append(self.path, self.waiting, at=self.written)
            self.written += len(self.waiting)
            self.waiting = b""

    def _time_left(self, number: int) -> str:
        done = number - self.first_step + 1
        seconds = int((time.monotonic() - self.started) / done * (self.steps - number))
        hours, minutes = seconds // 3600, seconds % 3600 // 60
        return f"{hours} h {minutes:02d} min" if hours else f"{minutes}:{seconds % 60:02d} min"
