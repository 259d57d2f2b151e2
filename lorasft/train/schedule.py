"""Step -> learning rate, a pure function: nothing to restore, the same for every layout and number of processes."""

from __future__ import annotations

import math

from lorasft.errors import RecipeError
from lorasft.recipe import ScheduleSettings


def learning_rate(step: int, *, steps: int, peak: float, schedule: ScheduleSettings) -> float:
    """The learning rate of optimizer step `step` (from 1) of `steps`.

    Rises in a line over the warm-up, then falls from `peak` to `min_ratio` x `peak`, which the last step has.
    """
    warmup = warmup_steps(steps, schedule)
    if step <= warmup:
        return peak * step / warmup
    if schedule.name == "constant":
        return peak
    done = (step - warmup) / max(1, steps - warmup)
    left = 0.5 * (1 + math.cos(math.pi * done)) if schedule.name == "cosine" else 1 - done
    return peak * (schedule.min_ratio + (1 - schedule.min_ratio) * left)


def warmup_steps(steps: int, schedule: ScheduleSettings) -> int:
    """Steps of the warm-up: a whole number as it is, a share of `steps` rounded. Raises RecipeError if too long."""
    warmup = schedule.warmup if isinstance(schedule.warmup, int) else round(schedule.warmup * steps)
    if warmup >= steps and warmup > 0:
        what = f"the warm-up of {warmup} steps leaves nothing of a run of {steps} steps"
        hint = "use a smaller schedule.warmup, more train.epochs or a smaller train.batch_size"
        raise RecipeError(what, where="schedule.warmup", hint=hint)
    return warmup
