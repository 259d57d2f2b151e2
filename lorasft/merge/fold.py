"""W + scaling * B A: fp32 product and sum; rounded once, the same bits as PEFT's merge of a plain LoRA."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Update:
    """What an adapter adds to one weight."""

    module: str  # as the model names it
    down: Tensor  # A: (rank, in) fp32
    up: Tensor  # B: (out, rank) fp32
    scaling: float
    transposed: bool  # the weight is stored (in, out), as GPT-2's Conv1D does

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the weight that this fits, as it is stored."""
        out, into = self.up.shape[0], self.down.shape[1]
        return (into, out) if self.transposed else (out, into)

    def apply(self, rows: Tensor, start: int) -> None:
        """Add the update to rows `start`, `start + 1`, ... of the weight: (rows, columns) fp32, in place."""
        part = slice(start, start + len(rows))
        change = self.down[:, part].T @ self.up.T if self.transposed else self.up[part] @ self.down
        rows.add_(change.mul_(self.scaling))
