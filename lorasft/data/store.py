"""Tokens: what the model is fed and what it learns of it, one sequence at a time; and all those of a run on disk: flat
ids, weights, sizes; memory-mapped, committed whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lorasft.data.prefixes import count_common
from lorasft.data.sources import RowLocation

UNSUPERVISED = -100
Ints = npt.NDArray[np.int64]
Arrays = dict[str, npt.NDArray[Any]]
TYPES = {  # file name -> type on disk
    "ids": "<i4",  # (tokens,)
    "weights": "<f4",  # (tokens,) of messages, 0 where nothing is supervised
    "sequence_sizes": "<i8",  # (sequences,) in tokens
    "example_sizes": "<i8",  # (examples,) in sequences
    "files": "<i4",  # (examples,) index into the names of files
    "lines": "<i8",  # (examples,)
    "digests": "<u8",  # (examples,)
    "held_out": "|b1",  # (examples,)
    "sources": "<i4",  # (examples,) index into the sources of the recipe
    "row_weights": "<f4",  # (examples,)
}


@dataclass(frozen=True, eq=False)
class Tokens:
    """One sequence: `ids` int32 (tokens,), `labels` int32 (tokens,), the id where it is supervised, else -100."""

    ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32] | None = None  # (tokens,) of its messages, above 0 where supervised; None: all 1
    row_weight: float = 1.0  # of the example that it is of

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice | list[int]) -> Tokens:
        weights = None if self.weights is None else self.weights[part]
        return Tokens(self.ids[part], self.labels[part], weights, self.row_weight)


def all_supervised(ids: npt.ArrayLike, start: int = 1) -> Tokens:
    """Every token from `start` on a target; before the first is nothing that it could be predicted from."""
    array = np.array(ids, dtype=np.int32)
    labels = array.copy()
    labels[:start] = UNSUPERVISED
    return Tokens(array, labels)


def supervised_runs(tokens: Tokens) -> npt.NDArray[np.int32]:
    """Start and end of each run of labels that are supervised: (runs, 2)."""
    edges = np.diff(tokens.labels != UNSUPERVISED, prepend=False, append=False)
    return np.flatnonzero(edges).astype(np.int32).reshape(-1, 2)


@dataclass(frozen=True)
class TokenStore:
    """The sequences of the `chosen` examples of a folder, in the order they were read; len() counts EXAMPLES.

    The folder has an entry for each row that could be read, without sequences where the example was dropped.
    """

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
        row_weight, found = float(self.arrays["row_weights"][number]), []
        for start, end in pairwise(edges):
            ids, weights = (np.array(self.arrays[name][start:end]) for name in ("ids", "weights"))
            supervised = weights != 0
            labels = np.where(supervised, ids, np.int32(UNSUPERVISED))
            found.append(Tokens(ids, labels, None if (weights == supervised).all() else weights, row_weight))
        return tuple(found)

    def place(self, example: int) -> RowLocation:
        """The file and line that an example came from."""
        number = self.chosen[example]
        return RowLocation(self.names[self.arrays["files"][number]], int(self.arrays["lines"][number]))

    def sources(self) -> Ints:
        """The number of the source of each example: (examples,)."""
        return self.arrays["sources"][self.chosen].astype(np.int64)

    def count_tokens(self) -> int:
        """Tokens of all sequences."""
        return int(np.diff(self.sequence_starts[self.example_starts])[self.chosen].sum())

    def split(self, held_out: bool) -> TokenStore:
        """The examples that are held out, or the others."""
        return replace(self, chosen=self.chosen[self.arrays["held_out"][self.chosen] == held_out])


def changed_rows(old: TokenStore, new: TokenStore) -> Iterator[str]:
    """What differs between the rows of two stores, a line for each file; rows are told apart by their digests."""
    for number, name in enumerate(new.names):
        was, now = (store.arrays["digests"][store.arrays["files"] == number] for store in (old, new))
        lines, first = new.arrays["lines"][new.arrays["files"] == number], count_common(was, now)
        if not first == len(was) == len(now):
            place = f"{name}:{lines[first]}" if first < len(now) else f"{name}, after its last row"
            yield f"{place}: the first row that differs, of {len(was):,} before and {len(now):,} now"


def example_lengths(store: TokenStore) -> Ints:
    """Tokens of the longest sequence of each example."""
    sizes = np.append(np.diff(store.sequence_starts), 0)  # dropped ones at the end begin there
    lengths: Ints = np.maximum.reduceat(sizes, store.example_starts[:-1])
    return lengths[store.chosen]


def pack_examples(examples: Sequence[Sequence[Tokens]], **each: npt.ArrayLike) -> Arrays:
    """Lay out the sequences of examples as a store holds them. `each`: by name what else every one has, or all have."""
    sequences = [tokens for own in examples for tokens in own]
    given = [np.float32(1) if tokens.weights is None else tokens.weights for tokens in sequences]
    weights = [(one.labels != UNSUPERVISED) * weight for one, weight in zip(sequences, given, strict=True)]
    return {
        "ids": np.concatenate([np.zeros(0, np.int32), *(tokens.ids for tokens in sequences)]),
        "weights": np.concatenate([np.zeros(0, np.float32), *weights]),
        "sequence_sizes": np.array([len(tokens) for tokens in sequences], dtype=np.int64),
        "example_sizes": np.array([len(own) for own in examples], dtype=np.int64),
        **{name: np.broadcast_to(np.array(values, TYPES[name]), len(examples)) for name, values in each.items()},
    }


def append_arrays(folder: Path, **arrays: npt.NDArray[Any]) -> None:
    """Append to the flat files of these names, in a folder that somebody else commits."""
    for name, numbers in arrays.items():
        with open(folder / name, "ab") as file:
            file.write(numbers.astype(TYPES[name], copy=False).tobytes())


def map_store(folder: Path, names: Sequence[str]) -> TokenStore:
    """Map the flat files of a store, all examples with sequences chosen. `names`: what the numbers in `files` mean."""
    # As plain views, which slice five times faster.
    arrays = {name: np.asarray(np.memmap(folder / name, dtype=kind, mode="r")) for name, kind in TYPES.items()}
    sizes = (arrays[name] for name in ("sequence_sizes", "example_sizes"))
    sequence_starts, example_starts = (np.concatenate([[0], np.cumsum(each)]) for each in sizes)
    chosen = np.flatnonzero(arrays["example_sizes"])
    return TokenStore(chosen, arrays, sequence_starts, example_starts, tuple(names))
