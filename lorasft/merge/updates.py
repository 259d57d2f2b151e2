"""What an adapter does to one tensor: fp32 all the way, rounded once. Where PEFT multiplies matrices, the same product.

A product is computed for all rows at once, because its last bit depends on the shape; what is done with it goes by
rows, which changes no bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class LoraProduct:
    """scaling * B A; of every expert where the matrices of a layer's experts are stored as one tensor."""

    up: Tensor  # B: (out, rank) or (experts, out, rank), fp32
    down: Tensor  # A: (rank, in) or (experts, rank, in), fp32
    scaling: float
    transposed: bool = False  # the weight is stored (in, out), as GPT-2's Conv1D and embeddings are; not of experts

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight, as it is stored."""
        out, into = self.up.shape[-2], self.down.shape[-1]
        return *self.up.shape[:-2], *((into, out) if self.transposed else (out, into))

    @property
    def unit(self) -> int:
        """A weight that is too large for one product is cut into slices of a multiple of so many rows."""
        return self.shape[1] if len(self.shape) == 3 else 64

    def compute(self, first: int, count: int, buffer: Tensor) -> Tensor:
        """B A for rows `first` to `first + count` of the weight: (count, columns) fp32, in the memory of `buffer`."""
        buffer = buffer[: count * self.shape[-1]]
        if self.up.dim() == 3:
            part = slice(first // self.unit, (first + count) // self.unit)
            torch.bmm(self.up[part], self.down[part], out=buffer.view(-1, *self.shape[1:]))
            return buffer.view(count, -1)
        part = slice(first, first + count)
        if self.transposed:
            return torch.mm(self.up, self.down[:, part], out=buffer.view(-1, count)).T
        return torch.mm(self.up[part], self.down, out=buffer.view(count, -1))


@dataclass(frozen=True)
class Change:
    """What becomes of one tensor, as a matrix: what follows, one after the other. All tensors are in fp32."""

    shape: tuple[int, ...]  # of what comes out; the same goes in, unless it is replaced
    replacement: Tensor | None = None  # was trained as a whole
    product: LoraProduct | None = None  # is added
    magnitude: Tensor | None = None  # (out,): of the rows or columns that come of it (DoRA, arXiv:2402.09353)
    bias: Tensor | None = None  # is added
    token_rows: Mapping[int, Tensor] = field(default_factory=dict)  # token -> (hidden,): trained rows of an embedding

    @property
    def needs_all_rows(self) -> bool:
        """Whether a norm runs along the columns."""
        return self.magnitude is not None and self.product is not None and self.product.transposed

    @property
    def parts(self) -> list[Tensor]:
        """What is replaced or added by, whichever way it is stored."""
        if self.product is None:
            return [] if self.replacement is None else [self.replacement]
        up, down = self.product.up, self.product.down
        return [*((down.T, up.T) if self.product.transposed else (up, down)), torch.tensor(self.product.scaling)]

    def apply(self, rows: Tensor, start: int, product: Tensor | None) -> None:
        """Change rows `start`, `start + 1`, ... in place: (rows, columns) fp32. `product`: their B A, used up."""
        if self.replacement is not None:
            rows.copy_(self.replacement.reshape(-1, rows.shape[1])[start : start + len(rows)])
        if self.product and product is not None:
            rows.add_(product.mul_(self.product.scaling))
        if self.needs_all_rows:
            rows.mul_(self.magnitude / torch.linalg.norm(rows, dim=0))
        elif self.magnitude is not None:
            factor = self.magnitude[start : start + len(rows)] / torch.linalg.norm(rows, dim=1)
            rows.mul_(factor.unsqueeze(1))
        if self.bias is not None:  # a vector is one row
            rows.add_(self.bias)
        for token, row in self.token_rows.items():
            if start <= token < start + len(rows):
                rows[token - start] = row
