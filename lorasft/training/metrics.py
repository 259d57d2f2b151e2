"""What a run tells: metrics.jsonl, which is the record, trackers beside it, and what a person sees."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lorasft.errors import DeviceError, LorasftError
from lorasft.files import append
from lorasft.recipe import Recipe
from lorasft.report import refresh_report
from lorasft.terminal import is_live, say
from lorasft.training.progress import Progress


class Metrics:
    """Writes a run's metrics, and shows them as its progress.

    `metrics_bytes`: how much of metrics.jsonl is kept; what follows is of steps that are done again. Lines that the
    disk does not take wait for the next try, and no checkpoint is saved without them. `quiet`: no trackers, no bar.
    """

    def __init__(self, recipe: Recipe, *, steps: int, done: int, metrics_bytes: int, quiet: bool) -> None:
        self.path = Path(recipe.run.output) / "metrics.jsonl"
        self.written = min(metrics_bytes, self.path.stat().st_size if self.path.exists() else 0)
        self.waiting = b""
        self.progress = Progress(recipe.run, steps=steps, done=done, live=is_live() and not quiet)
        self.trackers: list[Any] = []
        self.report_due = 0.0
        if recipe.run.trackers and not quiet:
            self._try_trackers(lambda: self.trackers.extend(start_trackers(recipe)))

    def step(self, values: dict[str, Any]) -> None:
        """The metrics of one optimizer step."""
        self._record(values)
        self.progress.step(values)

    def evaluation(self, *, step: int, loss: float, tokens: int, by_source: Mapping[str, float]) -> None:
        """A held-out loss, and that of each source if there are several."""
        parts = {f"eval_loss/{name}": own for name, own in by_source.items()}
        self._record({"step": step, "eval_loss": loss, "eval_tokens": tokens, **parts})
        self.progress.evaluation(step=step, loss=loss, tokens=tokens, by_source=by_source)

    def secure(self) -> int:
        """Put all lines on the disk, for sure; their bytes. Raises CapacityError where the disk does not take them."""
        if self.written or self.waiting:
            self._write(sync=True)
        return self.written

    def close(self) -> None:
        """Let the trackers finish, one by one: accelerate's end_training parts the processes as well."""
        self._try_trackers(lambda: [tracker.finish() for tracker in self.trackers])

    def _record(self, values: dict[str, Any]) -> None:
        said = bool(self.waiting)
        self.waiting += json.dumps(values).encode() + b"\n"
        try:
            self._write()
        except LorasftError as error:
            if not said:
                say(f"metrics.jsonl: {error.what}; its lines wait in memory")
        self._try_trackers(lambda: [tracker.log(dict(values), step=values["step"]) for tracker in self.trackers])
        self.report_due = refresh_report(self.path.parent, self.report_due)

    def _write(self, *, sync: bool = False) -> None:
        append(self.path, self.waiting, at=self.written, sync=sync)
        self.written += len(self.waiting)
        self.waiting = b""

    def _try_trackers(self, work: Callable[[], object]) -> None:
        """What a tracker raises never reaches the run: trackers are off from then on."""
        try:
            work()
        except Exception as error:
            say(f"trackers are off: {type(error).__name__}: {error}")
            self.trackers = []


def start_trackers(recipe: Recipe) -> list[Any]:
    """The recipe's trackers, as accelerate starts them: a run of the run folder's name, a parameter for each key."""
    from accelerate import Accelerator

    accelerator = Accelerator(log_with=list(recipe.run.trackers), project_dir=recipe.run.output)
    name = Path(recipe.run.output).resolve().name
    own_names = {"mlflow": {"run_name": name}, "wandb": {"name": name}, "trackio": {"name": name}}
    settings = {
        f"{section}.{key}": value if isinstance(value, (str, int, float)) else json.dumps(value)
        for section, keys in recipe.model_dump(mode="json").items()
        for key, value in keys.items()
    }
    accelerator.init_trackers("lorasft", config=settings, init_kwargs=own_names)
    return list(accelerator.trackers)


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise DeviceError when one of the trackers is not installed."""
    missing = " ".join(name for name in names if find_spec(name) is None)
    if missing:
        raise DeviceError(f"not installed: {missing}", where="run.trackers", hint=f"pip install {missing}")
