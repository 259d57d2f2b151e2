"""All Tokens of a run on disk: flat ids, offsets, supervised runs; memory-mapped, committed whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from lorasft.data.rows import Place
from lorasft.data.tokens import UNSUPERVISED, Tokens
from lorasft.errors import ModelError

Ints = npt.NDArray[np.int64]
ARRAYS = {  # file name -> type on disk
    "ids": "<i4",  # (tokens,)
    "sequence_offsets": "<i8",  # (sequences + 1,) into ids
    "example_offsets": "<i8",  # (examples + 1,) into sequences
    "runs": "<i4",  # (runs, 2) start and end of supervised runs, within their sequence
    "run_offsets": "<i8",  # (sequences + 1,) into runs
    "places": "<i8",  # (examples, 2) index into files, line
}


@dataclass(frozen=True)
class TokenStore:
    """The sequences of all examples, in the order they were written; len() counts EXAMPLES."""

    ids: npt.NDArray[np.int32]
    sequence_offsets: Ints
    example_offsets: Ints
    runs: npt.NDArray[np.int32]
    run_offsets: Ints
    places: Ints
    files: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.example_offsets) - 1

    def sequences(self, example: int) -> tuple[Tokens, ...]:
        """The sequences of one example (one, or one per turn)."""
        first, last = self.example_offsets[example : example + 2]
        return tuple(self._sequence(int(index)) for index in range(first, last))

    def place(self, example: int) -> Place:
        """The file and line that an example came from."""
        file, line = self.places[example]
        return Place(self.files[file], int(line))

    def _sequence(self, index: int) -> Tokens:
        start, end = self.sequence_offsets[index : index + 2]
        ids = np.array(self.ids[start:end], dtype=np.int32)
        labels = np.full(len(ids), UNSUPERVISED, dtype=np.int32)
        for first, last in self.runs[self.run_offsets[index] : self.run_offsets[index + 1]]:
            labels[first:last] = ids[first:last]
        return Tokens(ids, labels)


def example_lengths(store: TokenStore) -> Ints:
    """Tokens of the longest sequence of each example."""
    lengths: Ints = np.maximum.reduceat(np.diff(store.sequence_offsets), store.example_offsets[:-1])
    return lengths


@dataclass(frozen=True)
class Packed:
    """Examples laid out as the store holds them, with sizes in the place of offsets."""

    ids: npt.NDArray[np.int32]  # (tokens,)
    runs: npt.NDArray[np.int32]  # (runs, 2)
    sequence_sizes: Ints  # (sequences,) in tokens
    run_counts: Ints  # (sequences,)
    example_sizes: Ints  # (examples,) in sequences
    files: tuple[str, ...]
    places: Ints  # (examples, 2) index into files, line


def pack_examples(examples: Sequence[tuple[Place, Sequence[Tokens]]]) -> Packed:
    """Lay out examples, each with its place. Raises ValueError when a sequence labels its first position."""
    sequences = [tokens for _, own in examples for tokens in own]
    files = {file: index for index, file in enumerate(dict.fromkeys(place.file for place, _ in examples))}
    sizes = np.fromiter(map(len, sequences), dtype=np.int64, count=len(sequences))
    starts = np.cumsum(sizes) - sizes
    nothing = np.zeros(0, dtype=np.int32)
    learned = np.concatenate([nothing, *(tokens.labels for tokens in sequences)]) != UNSUPERVISED
    if learned[starts[sizes > 0]].any():
        raise ValueError("a sequence's first position has no source to be learned from")
    # No run crosses into the next sequence, whose first position is not learned.
    edges = np.flatnonzero(np.diff(learned, prepend=False, append=False)).reshape(-1, 2)
    owners = np.searchsorted(starts, edges[:, 0], side="right") - 1
    return Packed(
        ids=np.concatenate([nothing, *(tokens.ids for tokens in sequences)]),
        runs=(edges - starts[owners, None]).astype(np.int32),
        sequence_sizes=sizes,
        run_counts=np.bincount(owners, minlength=len(sequences)),
        example_sizes=np.array([len(own) for _, own in examples], dtype=np.int64),
        files=tuple(files),
        places=np.array([(files[place.file], place.line) for place, _ in examples], dtype=np.int64).reshape(-1, 2),
    )


class StoreWriter:
    """Appends examples to the flat files of a store, in a new folder that somebody else commits.

    To be used in a `with` statement, at whose end the files are closed and can be mapped.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, int] = {}
        self._out: dict[str, BinaryIO] = {}
        self._ends = dict.fromkeys(("sequence_offsets", "example_offsets", "run_offsets"), 0)

    def __enter__(self) -> StoreWriter:
        self.folder.mkdir(parents=True)
        self._out = {name: open(self.folder / name, "xb") for name in ARRAYS}  # noqa: SIM115
        for name in self._ends:
            self._write(name, np.zeros(1, dtype=np.int64))
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._out.values():
            file.close()
        (self.folder / "files.json").write_text(json.dumps(list(self._files)), encoding="utf-8")

    def add(self, packed: Packed) -> None:
        """Append examples."""
        self._write("ids", packed.ids)
        self._write("runs", packed.runs)
        self._advance("sequence_offsets", packed.sequence_sizes)
        self._advance("run_offsets", packed.run_counts)
        self._advance("example_offsets", packed.example_sizes)
        files = np.array([self._files.setdefault(file, len(self._files)) for file in packed.files], dtype=np.int64)
        self._write("places", np.stack([files[packed.places[:, 0]], packed.places[:, 1]], axis=1))

    def _advance(self, name: str, sizes: Ints) -> None:
        ends = self._ends[name] + np.cumsum(sizes)
        self._ends[name] = int(ends[-1]) if len(ends) else self._ends[name]
        self._write(name, ends)

    def _write(self, name: str, numbers: npt.NDArray[Any]) -> None:
        self._out[name].write(numbers.astype(ARRAYS[name], copy=False).tobytes())


def map_store(folder: Path) -> TokenStore:
    """Map the flat files that a StoreWriter wrote; nothing is read yet but the names of the files."""
    try:
        files = tuple(json.loads((folder / "files.json").read_bytes()))
        arrays: dict[str, Any] = {name: _map(folder / name, kind) for name, kind in ARRAYS.items()}
    except (OSError, ValueError) as fault:
        raise ModelError(f"not a token store: {fault}", where=str(folder)) from None
    arrays["runs"] = arrays["runs"].reshape(-1, 2)
    arrays["places"] = arrays["places"].reshape(-1, 2)
    return TokenStore(**arrays, files=files)


def _map(path: Path, kind: str) -> npt.NDArray[Any]:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype=kind)
    return np.asarray(np.memmap(path, dtype=kind, mode="r"))  # a plain view slices five times faster
