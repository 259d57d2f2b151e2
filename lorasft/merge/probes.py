"""Rows that a merge is measured on: held out in the run, given as a file, or a text of our own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lorasft.artifact import Artifact
from lorasft.data.chat import Encoder
from lorasft.data.examples import read_examples
from lorasft.data.prepare import open_prepared
from lorasft.data.report import BadRows, Report
from lorasft.data.tokens import UNSUPERVISED, Tokens
from lorasft.errors import DataError
from lorasft.model.answers import settle_format
from lorasft.model.saved import read_tokenizer
from lorasft.model.scoring import everything
from lorasft.recipe import DataSettings, DataSource

_PAIRS, _BYTES = 512, 256 << 20  # learned tokens that are compared, and what their log-probabilities may take
_LONGEST = 1024  # tokens of a row
_TEXT = "The quick brown fox jumps over the lazy dog. What is the answer to the question? It is 42, because"


def read_probes(artifact: Artifact, *, data: DataSource | None, vocabulary: int) -> tuple[list[Tokens], str]:
    """Rows with something learned in them, and where they come from. Raises DataError when `data` has none."""
    if data is not None:
        rows, origin = list(_rows_of_file(artifact, data)), data.path
    elif artifact.run is not None:
        rows, origin = _rows_of_run(artifact.run)
    else:
        tokenizer = read_tokenizer(artifact)
        return [everything(np.array(tokenizer(_TEXT)["input_ids"], dtype=np.int32))], "a text of lorasft's own"
    most = max(1, min(_PAIRS, _BYTES // (4 * vocabulary)))
    kept: list[Tokens] = []
    pairs = 0
    for row in (Tokens(row.ids[:_LONGEST], row.labels[:_LONGEST]) for row in rows):
        learned = int((row.labels != UNSUPERVISED).sum())
        if learned and (not kept or pairs + learned <= most):
            kept.append(row)
            pairs += learned
    if not kept:
        raise DataError("no row has anything to compare answers on", where=origin)
    return kept, origin


def _rows_of_run(run: Path) -> tuple[list[Tokens], str]:
    for folder in sorted((run / "tokens").glob("*/prepared.json")):
        prepared = open_prepared(folder.parent)
        store = prepared.held_out if prepared.held_out else prepared.train
        rows = [tokens for example in range(min(len(store), _PAIRS)) for tokens in store.sequences(example)]
        return rows, "held-out rows" if prepared.held_out else "rows of the training set: none were held out"
    raise DataError("the tokens of this run are gone", where=str(run / "tokens"), hint="--data FILE")


def _rows_of_file(artifact: Artifact, data: DataSource) -> Iterator[Tokens]:
    settings = artifact.recipe.data if artifact.recipe else DataSettings(train=(data,))
    settings = settle_format(data, settings)
    bad = BadRows(settings.on_bad_row, Report())
    tokenizer = read_tokenizer(artifact)
    encoder = Encoder(tokenizer, artifact.chat, data=settings, report=bad.report)
    for _, sequences in encoder.encode_all(read_examples((data,), settings, bad=bad), bad=bad):
        yield from sequences
    bad.raise_all()
