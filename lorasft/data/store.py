"""All Tokens of a run on disk: flat ids, offsets, supervised runs; memory-mapped, committed whole or not at all."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from lorasft.data.rows import Place
from lorasft.data.tokens import UNSUPERVISED, Tokens, supervised_runs
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
FLUSH = 1 << 14  # numbers kept back before they are written


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


class StoreWriter:
    """Appends examples to the flat files of a store, in a new folder that somebody else commits.

    To be used in a `with` statement, at whose end the files are closed and can be mapped.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, int] = {}
        self._out: dict[str, BinaryIO] = {}
        self._small = {name: array("q", [0]) for name in ("sequence_offsets", "example_offsets", "run_offsets")}
        self._small["places"] = array("q")
        self._ends = dict.fromkeys(self._small, 0)

    def __enter__(self) -> StoreWriter:
        self.folder.mkdir(parents=True)
        self._out = {name: open(self.folder / name, "xb") for name in ARRAYS}  # noqa: SIM115
        return self

    def __exit__(self, *_: object) -> None:
        self._flush(0)
        for file in self._out.values():
            file.close()
        (self.folder / "files.json").write_text(json.dumps(list(self._files)), encoding="utf-8")

    def add(self, place: Place, sequences: Iterable[Tokens]) -> None:
        """Append one example. Raises ValueError when a sequence labels its first position."""
        count = 0
        for tokens in sequences:
            runs = supervised_runs(tokens)
            if len(runs) and runs[0, 0] == 0:
                raise ValueError("a sequence's first position has no source to be learned from")
            self._out["ids"].write(tokens.ids.astype("<i4", copy=False).tobytes())
            self._out["runs"].write(runs.astype("<i4", copy=False).tobytes())
            self._advance("sequence_offsets", len(tokens))
            self._advance("run_offsets", len(runs))
            count += 1
        self._advance("example_offsets", count)
        self._small["places"].extend((self._files.setdefault(place.file, len(self._files)), place.line))
        self._flush(FLUSH)

    def _advance(self, name: str, by: int) -> None:
        self._ends[name] += by
        self._small[name].append(self._ends[name])

    def _flush(self, most: int) -> None:
        """Write the numbers that were kept back, where they are more than `most`."""
        for name, values in self._small.items():
            if len(values) > most:
                self._out[name].write(np.asarray(values, dtype=ARRAYS[name]).tobytes())
                del values[:]


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
