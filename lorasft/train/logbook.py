"""What a run says: progress with time left, metrics.jsonl, trackers."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from lorasft.errors import DeviceError
from lorasft.files import append_line
from lorasft.recipe import Recipe, mathematics
from lorasft.terminal import say


class Logbook:
    """Writes a run's metrics and shows its progress on stderr: a line that moves, or plain lines without a terminal."""

    def __init__(self, folder: Path, recipe: Recipe, *, steps: int, first_step: int) -> None:
        self.path = folder / "metrics.jsonl"
        self.steps = steps
        self.log_every = recipe.run.log_every
        self.first_step = first_step
        self.trackers = _start_trackers(recipe, folder)
        self.started = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def note(self, text: str) -> None:
        """One line for the reader."""
        say(text, over=self.terminal)

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
            say(line, end="" if number < self.steps else "\n", over=True)
        else:
            self.note(line)

    def evaluation(self, *, step: int, loss: float, tokens: int) -> None:
        """A held-out loss."""
        self._record({"step": step, "eval_loss": loss, "eval_tokens": tokens})
        self.note(f"step {step}/{self.steps}  held-out loss {loss:.4f} over {tokens:,} tokens")

    def size(self) -> int:
        """Bytes of metrics.jsonl so far."""
        return self.path.stat().st_size if self.path.exists() else 0

    def close(self) -> None:
        """Let the trackers finish: one by one, for accelerate's end_training parts the processes as well."""
        for tracker in [] if self.trackers is None else self.trackers.trackers:
            self._guard(tracker.finish)

    def _record(self, values: dict[str, Any]) -> None:
        append_line(self.path, json.dumps(values))
        if self.trackers is not None:
            self._guard(lambda: self.trackers.log(values, step=values["step"]))

    def _guard(self, call: Any) -> None:
        """A tracker may not hurt the run: the first fault ends its use. metrics.jsonl is the record."""
        try:
            call()
        except Exception as fault:
            self.trackers = None
            self.note(f"trackers are off: {type(fault).__name__}: {fault}")

    def _time_left(self, number: int) -> str:
        done = number - self.first_step + 1
        seconds = int((time.monotonic() - self.started) / done * (self.steps - number))
        hours, minutes = seconds // 3600, seconds % 3600 // 60
        return f"{hours} h {minutes:02d} min" if hours else f"{minutes}:{seconds % 60:02d} min"


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise DeviceError when one of the trackers is not installed."""
    from accelerate.tracking import get_available_trackers

    installed = {str(getattr(name, "value", name)) for name in get_available_trackers()}
    missing = " ".join(name for name in names if name not in installed)
    if missing:
        raise DeviceError(f"not installed: {missing}", where="run.trackers", hint=f"pip install {missing}")


def _start_trackers(recipe: Recipe, folder: Path) -> Any | None:
    """The recipe's trackers through accelerate, or None when it asks for none."""
    if not recipe.run.trackers:
        return None
    from accelerate import Accelerator

    accelerator = Accelerator(log_with=list(recipe.run.trackers), project_dir=folder)
    accelerator.init_trackers("lorasft", config={key: str(value) for key, value in mathematics(recipe).items()})
    return accelerator
