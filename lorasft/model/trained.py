"""The trained tensors of a model as one: their fp32 masters, their gradients, and the copies that it computes with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorasft.model.adapter import trainable


class Trained:
    """The trained parameters of `model` as views of one fp32 tensor, `master`, and their gradients as views of its own.

    What is used together lies together: all A of a block, then its B. Where the model computes in 16 bits, A and B have
    copies in its `dtype`: whoever changes a master calls `refresh`.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        found = trainable(model)
        self.parameters = {name: found[name] for name in sorted(found, key=_place)}  # in the order of their numbers
        self.master = nn.Parameter(torch.cat([one.detach().flatten() for one in self.parameters.values()]))
        for name, part in self.split(self.master.detach()).items():
            self.parameters[name].data = part
        self.master.grad = self.gradient = torch.zeros_like(self.master).detach()
        self._copy = self.master.detach()
        if dtype != self.master.dtype:
            last = sum(one.numel() for name, one in self.parameters.items() if _place(name)[0] == 0)
            self._copy = torch.empty_like(self._copy[:last], dtype=dtype)
        self._gradients, copies = self.split(self.gradient), self.split(self._copy)
        for name, one in self.parameters.items():
            one.grad, one.copy = self._gradients[name], copies.get(name)  # type: ignore[attr-defined]
        self.refresh()

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """`flat`, of a number for each of the master or of the first ones, as a view for each parameter."""
        views, start = {}, 0
        for name, one in self.parameters.items():
            if start + one.numel() <= len(flat):
                views[name] = flat[start : start + one.numel()].view_as(one)
            start += one.numel()
        return views

    def refresh(self) -> None:
        """Make the copies those of the masters."""
        if self._copy.dtype != self.master.dtype:
            self._copy.copy_(self.master.detach()[: len(self._copy)])
        self._seen = self._changes()

    def check(self) -> None:
        """Raise RuntimeError where a master was changed after the copies were made, or a gradient is not ours."""
        if any(one.grad is not self._gradients[name] for name, one in self.parameters.items()):
            raise RuntimeError("gradients would be lost: zero_grad needs set_to_none=False")
        if self._copy.dtype != self.master.dtype and self._seen != self._changes():
            raise RuntimeError(
                "the model would compute with copies of A and B as they were: Trained.refresh is missing"
            )

    def _changes(self) -> int:
        """How often something was written into the masters."""
        return sum(one._version for one in (self.master, *self.parameters.values()))


def _place(name: str) -> tuple[int, str, str]:
    """What comes first: A and B, by their blocks; in a block A, B, and what else is LoRA's."""
    path, _, kind = name.partition(".lora_")
    return (0 if kind else 1), path.rpartition(".")[0], kind
