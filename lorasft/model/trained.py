"""The trained tensors of a model as one: their fp32 masters, their gradients, and the copies that it computes with."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor, nn

from lorasft.model.adapter import trainable

_BLOCK = 256  # numbers that share a scale in bitsandbytes' 8-bit optimizers


class Trained:
    """The trained parameters of `model` as views of one fp32 tensor, `master`, and their gradients as views of its own.

    What is used together lies together: all A of a block, then its B; with `rates_apart` what learns at one rate, too.
    Where the model computes in 16 bits, A and B have copies in its `dtype`: whoever changes a master calls `refresh`.
    `process`: of several, its number and theirs, each of which updates a part of the masters.
    """

    def __init__(
        self, model: nn.Module, dtype: torch.dtype, *, rates_apart: bool = False, process: tuple[int, int] = (0, 1)
    ) -> None:
        self.process, self._groups = process, list[Tensor]()
        found = trainable(model)
        names = sorted(found, key=_place)
        if rates_apart:  # those of LoRA stay the first
            names.sort(key=lambda name: (".lora_" not in name, learns_as_b(name, found[name])))
        self.parameters = {name: found[name] for name in names}  # in the order of their numbers
        self.master = nn.Parameter(torch.cat([one.detach().flatten() for one in self.parameters.values()]))
        for name, part in self.split(self.master.detach()).items():
            self.parameters[name].data = part
        self.master.grad = self.gradient = torch.zeros_like(self.master).detach()
        lora = sum(one.numel() for name, one in self.parameters.items() if ".lora_" in name)
        self._copy = self.master.detach()[:lora].to(dtype)
        self._gradients, copies = self.split(self.gradient), self.split(self._copy)
        for name, one in self.parameters.items():
            one.grad, one.copy = self._gradients[name], copies.get(name)  # type: ignore[attr-defined]
        self.refresh()

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """`flat`, numbers of all parameters or of the first, as a view for each of these."""
        ends = accumulate(one.numel() for one in self.parameters.values())
        parts = zip(self.parameters.items(), ends, strict=True)
        return {name: flat[end - one.numel() : end].view_as(one) for (name, one), end in parts if end <= len(flat)}

    def by_rate(self) -> Iterator[tuple[bool, nn.Parameter]]:
        """Views of the masters with their gradients, and whether each learns as B does: few with `rates_apart`."""
        end = 0
        for as_b, run in groupby(self.parameters.items(), key=lambda item: learns_as_b(*item)):
            start, end = end, end + sum(one.numel() for _, one in run)
            part = nn.Parameter(self.master.detach()[start:end])
            part.grad = self.gradient[start:end]
            yield as_b, part

    def part(self, group: nn.Parameter) -> nn.Parameter:
        """What this process updates of a `group` of masters: with its gradient, where it begins, and their number. A
        part is of whole blocks of the numbers that share a scale in 8 bit."""
        start, end = self._bounds(len(group), self.process[0])
        own: Any = nn.Parameter(group.detach()[start:end])
        own.grad, own.start, own.of = group.grad[start:end], start, len(group)  # type: ignore[index]
        self._groups.append(group.detach())
        return own  # type: ignore[no-any-return]

    def _bounds(self, count: int, number: int) -> tuple[int, int]:
        blocks, processes = -(-count // _BLOCK), self.process[1]
        first, last = (blocks * one // processes * _BLOCK for one in (number, number + 1))
        return first, min(last, count)

    def collect(self) -> None:
        """Have from the other processes the parts that they updated, and make the copies anew."""
        for group in self._groups if self.process[1] > 1 else ():
            for number in range(self.process[1]):
                start, end = self._bounds(len(group), number)
                torch.distributed.broadcast(group[start:end], number)
        self.refresh()

    def refresh(self) -> None:
        """Make the copies those of the masters."""
        if self._copy.dtype != self.master.dtype:
            self._copy.copy_(self.master.detach()[: len(self._copy)])
        self._writes = self._count_writes()

    def check(self) -> None:
        """Raise RuntimeError where a master was changed after the copies were made, or a gradient is not ours."""
        if any(one.grad is not self._gradients[name] for name, one in self.parameters.items()):
            raise RuntimeError("gradients would be lost: zero_grad needs set_to_none=False")
        if self._copy.dtype != self.master.dtype and self._writes != self._count_writes():
            raise RuntimeError("A or B changed after their copies were made: Trained.refresh is missing")

    def _count_writes(self) -> int:
        return sum(one._version for one in (self.master, *self.parameters.values()))


def learns_as_b(name: str, parameter: Tensor) -> bool:
    """Whether LoRA+ gives it the rate of B, as PEFT does: B, magnitudes of DoRA, vectors of modules trained in full."""
    return ".lora_B." in name or parameter.ndim == 1


def _place(name: str) -> tuple[bool, str, str]:
    """A and B before other modules, by their blocks; in a block A, B, and what else is LoRA's."""
    path, _, kind = name.partition(".lora_")
    return not kind, path.rpartition(".")[0], kind
