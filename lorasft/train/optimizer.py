"""The optimizer of the recipe, its state as named tensors, and its learning rate, a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from bitsandbytes.optim import AdamW8bit
from torch import Tensor, nn

from lorasft.errors import RecipeError
from lorasft.recipe import OptimizerSettings, ScheduleSettings


def make_optimizer(settings: OptimizerSettings, parameters: Mapping[str, nn.Parameter]) -> Any:
    """AdamW over exactly `parameters`; `adamw8bit` keeps its moments in 8 bit (bitsandbytes)."""
    kind: Any = torch.optim.AdamW if settings.name == "adamw" else AdamW8bit
    rate, decay = settings.learning_rate, settings.weight_decay
    return kind(list(parameters.values()), lr=rate, betas=settings.betas, weight_decay=decay)


def optimizer_state(optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The state by `parameter/key`, bit for bit; a number becomes a tensor of no dimension."""
    return {
        # A copy each: 8-bit states share their code tables, and a file may not hold a tensor twice.
        f"{name}/{key}": torch.as_tensor(value).detach().cpu().clone().contiguous()
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }


def restore_optimizer(optimizer: Any, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    """Put a saved state back, bit for bit. Raises LookupError or ValueError when it belongs to other parameters."""
    for key, value in tensors.items():
        name, _, field = key.rpartition("/")
        parameter = parameters[name]
        if value.shape != parameter.shape and field in ("exp_avg", "exp_avg_sq", "state1", "state2"):
            raise ValueError(f"{key} {list(value.shape)} is not of this model")
        if field == "step":  # torch counts in a tensor that stays on the CPU, bitsandbytes in a number
            optimizer.state[parameter][field] = value if value.is_floating_point() else int(value)
        else:
            optimizer.state[parameter][field] = value.to(parameter.device)


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
