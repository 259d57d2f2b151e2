"""What is changed in the fork of a run before it starts: a step, a loss, the memory, a tracker."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lorasft.model import scoring
from lorasft.training import checkpoint, loop, metrics


def before_step(number: int, act: Callable[[Any], object]) -> None:
    """Do `act` once, before step `number`, in this process."""
    plain, done = loop.take_step, []

    def take_step(run: Any, now: int, stop: Any) -> dict[str, Any]:
        if now == number and not done:
            done.append(act(run))
        return plain(run, now, stop)

    loop.take_step = take_step


def poison(number: int, where: str) -> None:
    plain_losses, plain_norm = loop.weighted_loss, loop.get_total_norm

    def put(run: Any) -> None:
        master = run.trained.master
        if where == "weight":
            master.data[0] = float("inf")
        elif where == "moment" and run.optimizer.state:
            run.optimizer.state[master]["exp_avg"].view(-1)[0] = float("nan")
        elif where == "loss":
            loop.weighted_loss = lambda *values: plain_losses(*values) * float("nan")
        elif where == "gradient":
            loop.get_total_norm = lambda gradients: plain_norm([tensor * float("inf") for tensor in gradients])

    before_step(number, put)


def starve(number: int, part: str) -> None:
    """Run out of memory once, at step `number` or at the first chance after it."""
    module, name = {
        "forward": (loop, "weighted_loss"),
        "backward": (torch.Tensor, "backward"),
        "evaluation": (scoring, "pair_losses"),
        "update": (torch.optim.AdamW, "step"),
        "save": (checkpoint, "save_checkpoint"),
    }[part]
    plain = getattr(module, name)

    def fail(*values: Any, **named: Any) -> Any:
        setattr(module, name, plain)
        raise torch.OutOfMemoryError("out of memory, as it is tried here")

    before_step(number, lambda run: setattr(module, name, fail))


def break_trackers(moment: str, way: str) -> None:
    def act(at: str) -> Any:
        if at == moment and way == "raise":
            raise RuntimeError("a tracker that raises")
        return object() if at == moment else None

    class Tracker:
        def log(self, values: dict[str, Any], step: int) -> Any:
            values.clear()
            return act("log")

        def finish(self) -> Any:
            return act("finish")

    def start(recipe: Any, folder: Path) -> list[Any]:
        act("start")
        return [Tracker()]

    metrics.start_trackers = start
    metrics.check_trackers = lambda names: None


def note_rows(ledger: Path) -> None:
    """Each step and the rows of it, as lines of JSON."""
    plain = loop.take_step

    def take_step(run: Any, number: int, stop: Any) -> dict[str, Any]:
        with open(ledger, "a", encoding="utf-8") as file:
            file.write(json.dumps([number, run.plan.step_examples(number).tolist()]) + "\n")
        return plain(run, number, stop)

    loop.take_step = take_step


def learn_nothing() -> None:
    plain = loop.weighted_loss
    loop.weighted_loss = lambda *values: plain(*values) * 0.0


def get_worse() -> None:
    """The held-out loss is best at step 3."""
    plain, losses = loop.score_batches, iter([5.0, 4.0, 3.0, 1.0, *map(float, range(2, 20))])

    def score(*values: Any, **named: Any) -> Any:
        loss = next(losses)
        return ((batch, torch.full_like(found, loss)) for batch, found in plain(*values, **named))

    loop.score_batches = score
