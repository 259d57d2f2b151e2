"""What a run tells: metrics.jsonl, which is the record, trackers beside it, and what a person sees."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from shutil import get_terminal_size
from statistics import fmean, median
from typing import Any

from lorasft.errors import DeviceError, LorasftError
from lorasft.files import append
from lorasft.recipe import Recipe, RunSettings
from lorasft.recipe.load import flatten
from lorasft.report import refresh_report
from lorasft.terminal import is_live, say

_RECENT = 50  # steps, whose median time stands for that of those to come


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
    told = flatten(recipe.model_dump(mode="json")).items()
    settings = {key: value if isinstance(value, (str, int, float)) else json.dumps(value) for key, value in told}
    accelerator.init_trackers("lorasft", config=settings, init_kwargs=own_names)
    return list(accelerator.trackers)


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise DeviceError when one of the trackers is not installed."""
    if missing := " ".join(name for name in names if find_spec(name) is None):
        raise DeviceError(f"not installed: {missing}", where="run.trackers", hint=f"pip install {missing}")


class Progress:
    """Shows the steps after `done` up to `steps` on stderr, in plain lines; `live`: on a terminal, as a table of
    evaluations over a bar that moves."""

    def __init__(self, settings: RunSettings, *, steps: int, done: int, live: bool) -> None:
        self.settings, self.steps, self.number, self.live = settings, steps, done, live
        self.losses: list[float] = []
        self.shown = -1  # losses that are in the table; -1: before its first line
        self.seconds: list[float] = []  # that each step took
        self.speeds: list[float] = []  # of each, in tokens a second
        self.clock = 0.0  # when the last step, evaluation or save ended
        self.interludes: dict[str, float] = {}  # seconds of the last evaluation, of its answers, and of the last save

    def step(self, values: Mapping[str, Any]) -> None:
        """The metrics of one optimizer step."""
        now = time.monotonic()
        self.seconds.append(now - self.clock if self.clock else values["seconds"])
        self.clock, self.number = now, values["step"]
        self.losses.append(values["loss"])
        self.speeds.append(values["tokens_per_second"])
        loss, speed = f"loss {self.losses[-1]:.4f}", f"{self.speeds[-1]:,.0f} tokens/s  {self.time_left()} left"
        if self.live:
            self._draw(f"{loss} {sparkline(self.losses[-_RECENT:], width=6):6}  {speed}")
        elif self.number % self.settings.log_every == 0 or self.number == self.steps:
            say(f"step {self.number}/{self.steps}  {loss}  lr {values['learning_rate']:.2e}  {speed}")

    def evaluation(self, *, step: int, loss: float, tokens: int, by_source: Mapping[str, float]) -> None:
        """A held-out loss: on a terminal a line of the table, with the mean loss since the line before; and one of its
        sources."""
        parts = ", ".join(f"{name} {own:.4f}" for name, own in by_source.items())
        if not self.live:
            said = f"step {step}/{self.steps}  held-out loss {loss:.4f} over {tokens:,} tokens"
            say(f"{said}: {parts}" if parts else said)
            return
        if self.shown < 0:
            say(f"{'step':>7} {'loss':>9} {'held out':>9} {'tokens/s':>9}  loss so far", bold=True)
            self.shown = 0
        since, recent = self.losses[self.shown :] if step else [], self.speeds[-_RECENT:]  # the base has not learned
        mean, speed = f"{fmean(since):.4f}" if since else "", f"{median(recent):,.0f}" if recent else ""
        curve = sparkline(self.losses, width=min(40, get_terminal_size().columns - 41))
        say(f"{step:7,} {mean:>9} {loss:9.4f} {speed:>9}  {curve}")
        if parts:
            say(f"held out  {parts}")
        self.shown = len(self.losses) if step else 0

    @contextmanager
    def interlude(self, what: str) -> Iterator[None]:
        """What is done between two steps, named by a verb: it is shown, and its time counted into what is left."""
        started = time.monotonic()
        if self.live:
            self._draw(what)
        yield
        self.clock = time.monotonic()
        self.interludes[what] = self.clock - started

    def time_left(self) -> timedelta:
        """By the median of recent steps, and as many evaluations and saves as are still to come, each like the last."""
        left = (self.steps - self.number) * median(self.seconds[-_RECENT:])
        evaluated, saved = (every or self.steps for every in (self.settings.eval_every, self.settings.save_every))
        sampled = evaluated * (self.settings.sample_every or 1)
        for what, every in (("evaluating", evaluated), ("answering", sampled), ("saving", saved)):
            times = self.steps // every - (self.number - 1) // every + (self.steps % every > 0)
            left += times * self.interludes.get(what, 0.0)
        return timedelta(seconds=round(left))

    def _draw(self, text: str) -> None:
        """The bar and `text`, on a line that is written over."""
        share, columns = self.number / self.steps, get_terminal_size().columns
        width = max(8, min(40, columns - 72))  # always the same, however long the text
        bar = "█" * round(share * width)
        say(f"{share:4.0%} {bar:░<{width}}  {self.number:,}/{self.steps:,}  {text}"[: columns - 1], end="")


def sparkline(values: Sequence[float], *, width: int) -> str:
    """`values` in at most `width` columns, each the mean of its part of them, from their lowest to their highest."""
    columns = min(len(values), width)
    if columns < 1:
        return ""
    edges = [len(values) * column // columns for column in range(columns + 1)]
    means = [fmean(values[start:end]) for start, end in pairwise(edges)]
    lowest, span = min(means), max(means) - min(means)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (mean - lowest) / (span or 1))] for mean in means)
