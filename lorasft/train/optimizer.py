"""The optimizer of the recipe, and its state as named tensors."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.optim import AdamW8bit
from torch import Tensor, nn

from lorasft.recipe import OptimizerSettings


def make_optimizer(settings: OptimizerSettings, parameters: dict[str, nn.Parameter]) -> Any:
    """AdamW over exactly `parameters`; `adamw8bit` keeps its moments in 8 bit (bitsandbytes)."""
    kind = {"adamw": torch.optim.AdamW, "adamw8bit": AdamW8bit}[settings.name]
    return kind(
        list(parameters.values()),
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
    )


def optimizer_state(optimizer: Any, parameters: dict[str, nn.Parameter]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state by `parameter/key`: tensors as they are, bit for bit, and numbers beside them."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor):
                # A copy each: 8-bit states share their code tables, and a file may not hold a tensor twice.
                tensors[f"{name}/{key}"] = value.detach().cpu().clone().contiguous()
            else:
                numbers[f"{name}/{key}"] = value
    return tensors, numbers


def restore_optimizer(
    optimizer: Any, parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor], numbers: dict[str, Any]
) -> None:
    """Put a saved state back, bit for bit. Raises ValueError when it belongs to other parameters."""
    owners = {key.rpartition("/")[0] for key in (*tensors, *numbers)}
    if owners and owners != parameters.keys():
        raise ValueError(f"{sorted(owners ^ parameters.keys())[0]} is in one of model and checkpoint only")
    for name, parameter in parameters.items():
        state: dict[str, Any] = {}
        for key, value in {**tensors, **numbers}.items():
            owner, _, field = key.rpartition("/")
            if owner == name:
                # The step count of torch's AdamW stays on the CPU.
                move = isinstance(value, Tensor) and field != "step"
                if field in ("exp_avg", "exp_avg_sq", "state1", "state2") and value.shape != parameter.shape:
                    raise ValueError(f"{key} is {list(value.shape)}, not {list(parameter.shape)}")
                state[field] = value.to(parameter.device) if move else value
        optimizer.state[parameter] = state
