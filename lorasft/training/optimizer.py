"""The optimizer of the recipe, its state as tensors, and its learning rate, a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from bitsandbytes.optim import AdamW8bit
from torch import Tensor

from lorasft.errors import RecipeError
from lorasft.model.trained import Trained
from lorasft.recipe import OptimizerSettings, ScheduleSettings


class _AdamW8bit(AdamW8bit):  # type: ignore[misc]
    """bitsandbytes' AdamW of groups of one tensor, without its wait for the GPU after each update."""

    @torch.no_grad()
    def step(self) -> None:
        for number, group in enumerate(self.param_groups):
            (tensor,) = group["params"]
            if not self.state[tensor]:
                self.init_state(group, tensor, number, 0)
            self.update_step(group, tensor, number, 0)


def make_optimizer(settings: OptimizerSettings, trained: Trained) -> Any:
    """AdamW over all that is trained, as one tensor; `adamw8bit` keeps its moments in 8 bit (bitsandbytes).

    With `lora_plus` (Hayou, Ghosh, Yu 2024, arXiv:2402.12354) as one for each rate; `ratio` of a group: of its learning
    rate to that of A.
    """
    kind: Any = partial(torch.optim.AdamW, fused=True) if settings.name == "adamw" else _AdamW8bit
    if settings.name == "adamw8bit" and trained.master.numel() >= 1 << 31:
        what = "adamw8bit counts the trained numbers in 32 bits, and there are more"
        raise RecipeError(what, where="optimizer.name", hint="use adamw, or a smaller adapter")
    rate, decay, ratio = settings.learning_rate, settings.weight_decay, settings.lora_plus
    parts = [(False, trained.master)] if ratio is None else trained.by_rate()
    ratios = [(trained.part(part), ratio if ratio and as_b else 1.0) for as_b, part in parts]
    groups = [{"params": [part], "ratio": own, "lr": rate * own} for part, own in ratios]
    optimizer = kind(groups, lr=rate, betas=settings.betas, weight_decay=decay)
    # Neither kernel says that it writes into what it is given.
    optimizer.register_step_pre_hook(lambda *_: torch.autograd.graph.increment_version(trained.master))
    optimizer.register_step_post_hook(lambda *_: trained.collect())
    return optimizer


def optimizer_state(optimizer: Any) -> dict[str, Tensor]:
    """The state of all that is trained by its fields, bit for bit; a number becomes a tensor of no dimension. Fields of
    groups after the first end in `.` and the number of the group."""
    # A copy each: 8-bit states share their code tables, and a file may not hold a tensor twice.
    return {
        f"{field}{end}": torch.as_tensor(value).cpu().clone()
        for end, tensor in _tensors(optimizer)
        for field, value in optimizer.state[tensor].items()
    }


def join_states(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The state of all that is trained from those of parts of it, in their order."""
    first = states[0]
    parts = [name for name, value in first.items() if _is_cut(name, value)]
    return first | {name: torch.cat([one[name] for one in states]) for name in parts}


def _is_cut(name: str, value: Tensor) -> bool:
    """Whether of a part there is only a part: tables of 8-bit states and counts are whole."""
    return value.dim() > 0 and not name.startswith("qmap")


def restore_optimizer(optimizer: Any, tensors: Mapping[str, Tensor]) -> None:
    """Put a saved state back, bit for bit. Raises ValueError when it belongs to other parameters."""
    parts = dict(_tensors(optimizer))
    optimizer.state.clear()  # there is none before the first step
    for name, value in tensors.items():
        field, dot, number = name.partition(".")
        part: Any = parts.get(dot + number, torch.empty(0))
        count = getattr(part, "of", 0)
        if field in ("exp_avg", "state1") and value.numel() != count:  # as torch and bitsandbytes call it
            raise ValueError(f"moments of {value.numel()} numbers for {count} that are trained")
        if _is_cut(name, value):
            each = -(-part.of // len(value))  # numbers that share one of these
            value = value[part.start // each : -(-(part.start + len(part)) // each)]
        # torch counts steps in a tensor, bitsandbytes in a number.
        counted = field == "step" and not value.is_floating_point()
        optimizer.state[part][field] = int(value) if counted else value.to(part.device)


def _tensors(optimizer: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensor of each group, and what the names of its state end in."""
    for number, group in enumerate(optimizer.param_groups):
        yield f".{number}" if number else "", group["params"][0]


def learning_rate(step: int, *, steps: int, peak: float, schedule: ScheduleSettings) -> float:
    """The learning rate of optimizer step `step` (from 1) of `steps`.

    Rises in a line over the warm-up, then falls from `peak` to `min_ratio` x `peak`, which the last step has. A `delay`
    of 1 gives that of the step before, as in transformers, whose schedules begin at 0 and stop short of their end.
    """
    step -= schedule.delay
    warmup = warmup_steps(steps, schedule)
    if step < warmup:
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
