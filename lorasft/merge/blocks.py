"""The base's weights as they are stored, a block of rows at a time."""

from __future__ import annotations

import os
from typing import BinaryIO, Protocol

import torch
from torch import Tensor

from lorasft.merge.shards import DTYPES, Entry


class Rows(Protocol):
    """A weight seen as a matrix."""

    def read(self, first: int, count: int) -> Tensor:
        """Rows `first` to `first + count`: (count, width)."""


class Weight(Rows, Protocol):
    """A tensor of the base that is to be written."""

    entry: Entry  # as it is to be written
    dtype: torch.dtype


class Blank:
    """Nothing yet: what is there before a tensor of another shape takes the place of the base's."""

    def __init__(self, entry: Entry) -> None:
        self.entry, self.dtype = entry, DTYPES[entry.dtype]

    def read(self, first: int, count: int) -> Tensor:  # all rows are alike
        """Zeros: (count, width)."""
        return torch.zeros(count, self.entry.width, dtype=self.dtype)


class Stored:
    """A tensor in a file, seen as a matrix."""

    def __init__(self, file: BinaryIO, entry: Entry, *, start: int) -> None:
        """`start`: where the tensor's bytes begin in the file."""
        self.file, self.entry, self.start = file, entry, start
        self.dtype = DTYPES[entry.dtype]

    def read(self, first: int, count: int) -> Tensor:
        """Rows `first` to `first + count`: (count, width)."""
        width = self.entry.width
        return self.numbers(first * width, count * width).view(count, width)

    def numbers(self, first: int, count: int) -> Tensor:
        """Numbers of the tensor in the order of its bytes: (count,)."""
        numbers = torch.empty(count, dtype=self.dtype)
        place = self.start + first * self.dtype.itemsize
        os.preadv(self.file.fileno(), [numbers.view(torch.uint8).numpy().data], place)
        return numbers
