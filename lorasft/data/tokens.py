"""What the model is fed and what it learns of it, one sequence at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

UNSUPERVISED = -100


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
