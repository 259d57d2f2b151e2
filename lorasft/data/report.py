"""What became of the rows: counts that a command prints, and the errors of bad rows, collected."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lorasft.errors import DataError, ErrorGroup, LorasftError

ERRORS = 19  # that are shown, and after which no further blocks of rows are looked at
NAMED = 1000  # dropped rows that are named; the rest is only counted
SHOWN = 30  # names of columns
FIX, LEAVE_OUT = "fix the row (fetch the file again if it is cut off)", "or leave such rows out: data.on_bad_row=drop"


@dataclass
class Report:
    """Counts of one preparation, in rows, examples, sequences, tokens or characters as named."""

    rows: int = 0
    bad_rows: int = 0
    over_long_examples: int = 0
    truncated_examples: int = 0
    truncated_tokens: int = 0  # supervised ones, that were cut off
    windowed_texts: int = 0
    examples_without_target: int = 0
    rows_of_weight_0: int = 0  # left out as they say: not dropped
    answers: int = 0  # supervised, before the over-long policy
    parity_breaks: int = 0  # bad rows: an answer does not follow the ids that a server feeds
    train_examples: int = 0
    held_out_examples: int = 0
    sequences: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    weighted_examples: int = 0  # that have a weight other than 1, or a message that has
    dropped_reasoning: int = 0  # characters: by the template, or by chat.thinking
    dropped_characters: int = 0  # of answers, or blanks around them, that the template leaves out
    merged_systems: int = 0  # examples whose system text is in their first user turn
    tools_left_out: int = 0  # examples none of whose tools the template shows
    dropped: list[str] = field(default_factory=list)  # of the first rows that are not trained on: "file:line: why"
    read_as: list[str] = field(default_factory=list)  # columns that were taken for those of a format, by their names
    unread: list[str] = field(default_factory=list)  # names of keys that no part of this program reads
    files_not_read: list[str] = field(default_factory=list)  # of other splits, beside those that were read
    epoch: dict[str, str] = field(default_factory=dict)  # source -> what an epoch takes of it, where that is to be said
    labels: dict[tuple[str, bool], str] = field(default_factory=dict)  # file, whether good -> the first such row
    errors: list[LorasftError] = field(default_factory=list, repr=False)  # of bad rows that are not to be dropped
    last: list[LorasftError] = field(default_factory=list, repr=False)  # after which nothing can be read or encoded

    def as_dict(self) -> dict[str, Any]:
        """The counts, the rows that were dropped and the keys that were not read, as JSON values."""
        return {name: value for name, value in vars(self).items() if name not in ("errors", "labels", "last")}

    def notices(self) -> Iterator[str]:
        """What a person should know of rows that were read, a line each."""
        for columns in self.read_as:
            yield f"columns {columns} (data.columns says otherwise)"
        if self.unread:
            yield f"columns not read: {', '.join(self.unread[:SHOWN])}{', ...' * (len(self.unread) > SHOWN)}"
        if self.rows_of_weight_0:
            yield f"left out, as their weight is 0: {self.rows_of_weight_0:,} of {self.rows:,} rows"
        if self.epoch:
            yield f"an epoch takes {', '.join(f'{taken} of {name}' for name, taken in self.epoch.items())}"
        if self.files_not_read:
            yield f"files of other splits (data.eval=FOLDER takes validation): {', '.join(self.files_not_read)}"

    def add_error(self, error: DataError, place: object, *, policy: str) -> None:
        """Take one bad row, of this place where the error does not name one itself. `policy`: `data.on_bad_row`."""
        where = error.where or place
        self.bad_rows += 1
        self.dropped.append(f"{where}: {error.what}")
        if policy == "error":
            self.errors.append(DataError(error.what, where=where, hint=f"{error.hint or FIX}; {LEAVE_OUT}"))

    def join(self, later: Report) -> None:
        """Take in what became of rows that come after. Raises what `raise_errors` does once there are many errors, or
        one after which nothing can be read."""
        for name, value in vars(later).items():
            own = getattr(self, name)
            setattr(self, name, value | own if isinstance(own, dict) else own + value)
        self.read_as = list(dict.fromkeys(self.read_as))
        self.unread = list(dict.fromkeys(self.unread))[:NAMED]
        del self.dropped[NAMED:]
        if self.last or len(self.errors) > ERRORS:
            self.raise_errors()

    def raise_errors(self) -> None:
        """Raise the errors, if any: the error itself when it is alone, ErrorGroup with the count otherwise."""
        errors = [*self.errors, *self.last]
        if len(errors) == 1:
            raise errors[0]
        if errors:
            raise ErrorGroup(errors[:ERRORS], beyond=len(errors) - ERRORS)

    def dropped_examples(self) -> int:
        return self.bad_rows + self.over_long_examples + self.examples_without_target

    def reasons(self) -> Iterator[str]:
        """Why rows were dropped, most frequent first: how many of those that are named, and the first of them."""
        alike: dict[str, list[str]] = {}
        for line in self.dropped:
            alike.setdefault(re.sub(r"\d[\d,.]*", "N", line.split(": ", 1)[1]), []).append(line)
        for lines in sorted(alike.values(), key=len, reverse=True)[:3]:
            yield f"{len(lines)} times as in {lines[0]}"
