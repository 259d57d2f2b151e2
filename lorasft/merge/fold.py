"""What an adapter does to one tensor: fp32 all the way, rounded once; the same bits as PEFT for a plain LoRA."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Change(Protocol):
    """What an adapter does to one tensor of the base."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor that comes out, as it is stored; it goes in with the same, unless it is replaced."""

    @property
    def whole(self) -> bool:
        """Whether all rows are needed at once."""

    @property
    def replaces(self) -> bool:
        """Whether nothing of what was there remains."""

    def apply(self, rows: Tensor, start: int) -> None:
        """Change rows `start`, `start + 1`, ... in place: (rows, columns) fp32."""


@dataclass(frozen=True)
class Update:
    """W + scaling * B A."""

    down: Tensor  # A: (rank, in) fp32
    up: Tensor  # B: (out, rank) fp32
    scaling: float
    transposed: bool  # the weight is stored (in, out), as GPT-2's Conv1D and embeddings are
    whole = False
    replaces = False

    @property
    def shape(self) -> tuple[int, int]:
        out, into = self.up.shape[0], self.down.shape[1]
        return (into, out) if self.transposed else (out, into)

    def apply(self, rows: Tensor, start: int) -> None:
        part = slice(start, start + len(rows))
        change = self.down[:, part].T @ self.up.T if self.transposed else self.up[part] @ self.down
        rows.add_(change.mul_(self.scaling))


@dataclass(frozen=True)
class Dora:
    """magnitude * (W + scaling * B A) / its norm over the inputs (arXiv:2402.09353)."""

    update: Update
    magnitude: Tensor  # (out,) fp32
    replaces = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.update.shape

    @property
    def whole(self) -> bool:
        return self.update.transposed  # a norm runs along a column then

    def apply(self, rows: Tensor, start: int) -> None:
        self.update.apply(rows, start)
        if self.update.transposed:
            rows.mul_(self.magnitude / torch.linalg.norm(rows, dim=0))
        else:
            magnitude = self.magnitude[start : start + len(rows)]
            rows.mul_((magnitude / torch.linalg.norm(rows, dim=1)).unsqueeze(1))


@dataclass(frozen=True)
class Shift:
    """b + scaling * the bias of B."""

    bias: Tensor  # (out,) fp32
    scaling: float
    whole = False
    replaces = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.bias.shape)

    def apply(self, rows: Tensor, start: int) -> None:  # a vector is one row
        rows.add_(self.bias * self.scaling)


@dataclass(frozen=True)
class Replacement:
    """A tensor that was trained as a whole."""

    tensor: Tensor
    whole = False
    replaces = True

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def apply(self, rows: Tensor, start: int) -> None:
        rows.copy_(self.tensor.reshape(-1, rows.shape[1])[start : start + len(rows)])


@dataclass(frozen=True)
class Tokens:
    """Rows of an embedding that were trained."""

    rows: dict[int, Tensor]  # token -> (hidden,)
    shape: tuple[int, ...]  # of the embedding
    whole = False
    replaces = False

    def apply(self, rows: Tensor, start: int) -> None:
        for token, row in self.rows.items():
            if start <= token < start + len(rows):
                rows[token - start] = row


@dataclass(frozen=True)
class Stack:
    """Updates of matrices that are stored as one tensor: the experts of a layer."""

    updates: Sequence[Update]
    whole = False
    replaces = False

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.updates), *self.updates[0].shape)

    def apply(self, rows: Tensor, start: int) -> None:
        height = self.updates[0].shape[0]
        done = 0
        while done < len(rows):
            expert, first = divmod(start + done, height)
            count = min(height - first, len(rows) - done)
            self.updates[expert].apply(rows[done : done + count], first)
            done += count


@dataclass(frozen=True)
class Series:
    """Several changes of one tensor, one after the other."""

    changes: Sequence[Change]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.changes[0].shape

    @property
    def whole(self) -> bool:
        return any(change.whole for change in self.changes)

    @property
    def replaces(self) -> bool:
        return self.changes[0].replaces

    def apply(self, rows: Tensor, start: int) -> None:
        for change in self.changes:
            change.apply(rows, start)


def split_experts(down: Tensor, up: Tensor, *, experts: int, scaling: float, transposed: bool) -> list[Update]:
    """The updates of each expert from what PEFT keeps of all of them (peft.tuners.lora.layer.ParamWrapper).

    `down`: (experts * rank, in), expert by expert; `up`: (out, rank * experts), rank by rank.
    """
    downs = down.view(experts, -1, down.shape[1])
    ups = up.view(len(up), -1, experts)
    return [Update(downs[e], ups[:, :, e].contiguous(), scaling, transposed) for e in range(experts)]


def scale(alpha: float, rank: int, *, rslora: bool) -> float:
    """What B A is multiplied by."""
    return alpha / (math.sqrt(rank) if rslora else rank)
