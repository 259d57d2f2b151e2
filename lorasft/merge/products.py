"""Where updates are computed: on the GPU that the check has used, if a block is done there sooner, transfers included.

Not yet run on a GPU. A CUDA context takes seconds and more host memory than a whole merge: none is made for this.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lorasft.merge.fold import Change, Update

CPU = torch.device("cpu")
_ROUNDS = 5


def choose_device(changes: Iterable[Change], *, numbers: int) -> torch.device:
    """The device that applies the largest update to a block of `numbers` fp32 sooner."""
    updates = [change for change in changes if isinstance(change, Update) and not change.transposed]
    if not updates or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return CPU
    largest = max(updates, key=lambda update: update.down.numel() + update.up.numel())
    width = largest.shape[1]
    block = torch.zeros(min(largest.shape[0], max(1, numbers // width)), width)
    return min((CPU, torch.device("cuda")), key=lambda device: time_update(largest, block, device))


def time_update(change: Change, block: Tensor, device: torch.device) -> float:
    """Seconds for `block`, (rows, columns) fp32 on the CPU, at best: there, changed, and back."""
    change, seconds = bring(change, device), []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        apply(change, block, 0, device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def apply(change: Change, rows: Tensor, start: int, device: torch.device) -> None:
    """`change.apply` to rows on the CPU, computed on `device`, where the tensors of `change` are."""
    there = rows.to(device)
    change.apply(there, start)
    if there is not rows:
        rows.copy_(there)


def bring(value: Any, device: torch.device) -> Any:
    """A change, or what it consists of, with its tensors on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: bring(part, device) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(bring(part, device) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: bring(getattr(value, field.name), device) for field in fields(value)})
    return value
