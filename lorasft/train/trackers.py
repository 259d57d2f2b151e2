"""Trackers beside metrics.jsonl, which is the record: what they raise, return or wait for never reaches the run."""

from __future__ import annotations

import contextlib
import queue
import threading
from pathlib import Path
from typing import Any

from lorasft.errors import DeviceError
from lorasft.recipe import Recipe, mathematics
from lorasft.terminal import say

_MOST_WAITING = 10_000  # lines that a tracker may be behind
_PATIENCE = 20.0  # seconds that a finished run waits for the last of them


class Trackers:
    """The recipe's trackers through accelerate, on a thread of their own: a run hands lines over and goes on."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe = recipe
        self.folder = folder
        self.lines: queue.Queue[dict[str, Any] | None] = queue.Queue(_MOST_WAITING)
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def log(self, values: dict[str, Any]) -> None:
        """Hand over the metrics of a step."""
        self._put(values)

    def close(self) -> None:
        """Let them finish, within limits."""
        self._put(None)
        self.thread.join(_PATIENCE)
        if self.thread.is_alive():
            say("the trackers hang, and are left behind; metrics.jsonl is complete")

    def _put(self, values: dict[str, Any] | None) -> None:
        if self.thread.is_alive():
            with contextlib.suppress(queue.Full):  # it hangs, which is said at the end
                self.lines.put_nowait(values)

    def _work(self) -> None:
        try:
            started = start_trackers(self.recipe, self.folder)
            while (values := self.lines.get()) is not None:
                for tracker in started:
                    tracker.log(values, step=values["step"])
            for tracker in started:  # one by one: accelerate's end_training parts the processes as well
                tracker.finish()
        except Exception as fault:
            say(f"trackers are off: {type(fault).__name__}: {fault}")


def start_trackers(recipe: Recipe, folder: Path) -> list[Any]:
    """The recipe's trackers, as accelerate starts them."""
    from accelerate import Accelerator

    accelerator = Accelerator(log_with=list(recipe.run.trackers), project_dir=folder)
    accelerator.init_trackers("lorasft", config={key: str(value) for key, value in mathematics(recipe).items()})
    return list(accelerator.trackers)


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise DeviceError when one of the trackers is not installed."""
    from accelerate.tracking import get_available_trackers

    installed = {str(getattr(name, "value", name)) for name in get_available_trackers()}
    missing = " ".join(name for name in names if name not in installed)
    if missing:
        raise DeviceError(f"not installed: {missing}", where="run.trackers", hint=f"pip install {missing}")
