"""All Tokens of a run on disk: flat ids, sizes, what is supervised; memory-mapped, committed whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from lorasft.data.sources import RowLocation
from lorasft.data.tokens import UNSUPERVISED, Tokens
from lorasft.errors import ModelError

Ints = npt.NDArray[np.int64]
Arrays = dict[str, npt.NDArray[Any]]
TYPES = {  # file name -> type on disk
    "ids": "<i4",  # (tokens,)
    "supervised": "|b1",  # (tokens,)
    "sequence_sizes": "<i8",  # (sequences,) in tokens
    "example_sizes": "<i8",  # (examples,) in sequences
    "files": "<i4",  # (examples,) index into the names of files
    "lines": "<i8",  # (examples,)
    "held_out": "|b1",  # (examples,)
}


@dataclass(frozen=True)
class TokenStore:
    """The sequences of the `chosen` examples of a folder, in the order they were read; len() counts EXAMPLES."""

    chosen: Ints  # indices into what is there
    arrays: Arrays
    sequence_starts: Ints  # (sequences + 1,) index into ids
    example_starts: Ints  # (examples + 1,) index into sequences
    names: tuple[str, ...]  # of files

    def __len__(self) -> int:
        return len(self.chosen)

    def sequences(self, example: int) -> tuple[Tokens, ...]:
        """The sequences of one example (one, or one per turn)."""
        number = self.chosen[example]
        edges = self.sequence_starts[self.example_starts[number] : self.example_starts[number + 1] + 1].tolist()
        return tuple(self._read(start, end) for start, end in pairwise(edges))

    def place(self, example: int) -> RowLocation:
        """The file and line that an example came from."""
        number = self.chosen[example]
        return RowLocation(self.names[self.arrays["files"][number]], int(self.arrays["lines"][number]))

    def count_tokens(self) -> int:
        """Tokens of all sequences."""
        return int(np.diff(self.sequence_starts[self.example_starts])[self.chosen].sum())

    def split(self, held_out: bool) -> TokenStore:
        """The examples that are held out, or the others."""
        return replace(self, chosen=np.flatnonzero(self.arrays["held_out"] == held_out))

    def _read(self, start: int, end: int) -> Tokens:
        ids = np.array(self.arrays["ids"][start:end], dtype=np.int32)
        return Tokens(ids, np.where(self.arrays["supervised"][start:end], ids, np.int32(UNSUPERVISED)))


def example_lengths(store: TokenStore) -> Ints:
    """Tokens of the longest sequence of each example."""
    lengths: Ints = np.maximum.reduceat(np.diff(store.sequence_starts), store.example_starts[:-1])
    return lengths[store.chosen]


def pack_examples(examples: Sequence[tuple[int, Sequence[Tokens]]]) -> Arrays:
    """Lay out examples of one file, each with its line, as a store holds them.

    Raises ValueError when a sequence labels its first position.
    """
    sequences = [tokens for _, own in examples for tokens in own]
    if any((tokens.labels[:1] != UNSUPERVISED).any() for tokens in sequences):
        raise ValueError("a sequence's first position has no source to be predicted from")
    nothing = np.zeros(0, dtype=np.int32)
    return {
        "ids": np.concatenate([nothing, *(tokens.ids for tokens in sequences)]),
        "supervised": np.concatenate([nothing, *(tokens.labels for tokens in sequences)]) != UNSUPERVISED,
        "sequence_sizes": np.array([len(tokens) for tokens in sequences], dtype=np.int64),
        "example_sizes": np.array([len(own) for _, own in examples], dtype=np.int64),
        "lines": np.array([line for line, _ in examples], dtype=np.int64),
    }


class StoreWriter:
    """Appends examples to the flat files of a store, in a folder that somebody else commits.

    To be used in a `with` statement, at whose end the files are closed and can be mapped.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._names: dict[str, int] = {}
        self._out: dict[str, BinaryIO] = {}

    def __enter__(self) -> StoreWriter:
        self._out = {name: open(self.folder / name, "xb") for name in TYPES}  # noqa: SIM115
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._out.values():
            file.close()
        (self.folder / "files.json").write_text(json.dumps(list(self._names)), encoding="utf-8")

    def add(self, file: str, packed: Arrays) -> None:
        """Append examples of one file."""
        number = self._names.setdefault(file, len(self._names))
        self.append(files=np.full(len(packed["lines"]), number), **packed)

    def append(self, **arrays: npt.NDArray[Any]) -> None:
        """Append to the files of these names; `held_out` comes last, for all examples."""
        for name, numbers in arrays.items():
            self._out[name].write(numbers.astype(TYPES[name], copy=False).tobytes())


def map_store(folder: Path) -> TokenStore:
    """Map the flat files that a StoreWriter wrote, all examples chosen. Raises ModelError."""
    try:
        names = tuple(json.loads((folder / "files.json").read_bytes()))
        arrays = {name: _map(folder / name, kind) for name, kind in TYPES.items()}
    except (OSError, ValueError) as error:
        raise ModelError(f"not a token store: {error}", where=str(folder)) from None
    sequence_starts, example_starts = (
        np.concatenate([[0], np.cumsum(arrays[name])]) for name in ("sequence_sizes", "example_sizes")
    )
    return TokenStore(np.arange(len(arrays["lines"])), arrays, sequence_starts, example_starts, names)


def _map(path: Path, kind: str) -> npt.NDArray[Any]:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype=kind)
    return np.asarray(np.memmap(path, dtype=kind, mode="r"))  # a plain view slices five times faster
