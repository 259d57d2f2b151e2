"""What a person sees of a run: on a terminal a table of evaluations over a bar that moves, else plain lines."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from shutil import get_terminal_size
from statistics import fmean, median
from typing import Any

from lorasft.recipe import RunSettings
from lorasft.terminal import say

_RECENT = 50  # steps, whose median time stands for that of those to come


class Progress:
    """Shows the steps after `done` up to `steps` on stderr. `live`: with a bar, where it can be written over."""

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
