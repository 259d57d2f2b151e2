"""Which base does the adapter belong on, and does the merge answer as what was trained? Both are measured.

The reference is what was trained: for a run in 4 bit the NF4 base with the adapter on it. The candidates are the base's
own weights and the weights that NF4 made of them. A model that does not fit in memory is streamed from its files, a
layer at a time.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from lorasft.artifact import Artifact, find_artifact
from lorasft.data.prepare import Prepared, open_prepared
from lorasft.data.store import UNSUPERVISED, Tokens, all_supervised
from lorasft.data.tokenizer import read_tokenizer
from lorasft.errors import DataError, ModelError
from lorasft.merge.sidecars import compare_prompts
from lorasft.merge.write import Onto
from lorasft.model.adapter import load_artifact
from lorasft.model.scoring import check_ids, read_answers
from lorasft.recipe import DataSource
from lorasft.terminal import say

_ROUNDING = 1e-2  # nats: more than bf16 ever does to an answer
_PAIRS, _BYTES = 512, 256 << 20  # supervised tokens that are compared, and what their log-probabilities may take
_LONGEST = 1024  # tokens of a row
_TEXT = "The quick brown fox jumps over the lazy dog. What is the answer to the question? It is 42, because"
_OWN_TEXT = "a text of lorasft's own"
_ORIGINAL = "onto original, before rounding"


class MergeCheck:
    """Compares candidates with what was trained, over the supervised tokens of the given rows.

    `table`, of each model: kl, the mean KL(trained || model) in nats a token; same_choice, the share of tokens at
    which the likeliest one is the same; nll, its own loss in nats a token.
    """

    def __init__(self, artifact: Artifact, data: DataSource | None) -> None:
        """Loads what was trained, asks it and lets it go: on the held-out rows of the run, those in `data`, or a text.
        Raises DataError without rows."""
        say("asking what was trained, to compare the merge with it (--no-check leaves this out)")
        self.artifact = artifact
        self.prepared = _open_tokens(artifact)
        self.rows, self.origin = _choose_rows(artifact, data, self.prepared)
        self.table: dict[str, dict[str, float]] = {}
        targets = [row.labels[row.labels != UNSUPERVISED] for row in self.rows]
        self.lengths = [len(part) for part in targets]
        self.targets = torch.from_numpy(np.concatenate(targets).astype("int64")).unsqueeze(1)  # (pairs, 1)
        model = _load(artifact)
        self.trained = log_probs(model, self.rows)
        self._compare("trained", self.trained)
        with model.disable_adapter():
            self._compare("without the adapter", log_probs(model, self.rows))

    @cached_property
    def original(self) -> Tensor:
        """What the base's own weights answer with the adapter on them; of a run in 16 bits that was trained."""
        if self.artifact.model.quantization == "none":
            return self.trained
        own = replace(self.artifact, model=self.artifact.model.model_copy(update={"quantization": "none"}))
        return self._compare(_ORIGINAL, log_probs(_load(own), self.rows))

    def choose(self) -> tuple[Onto, str]:
        """The base whose answers to held-out rows are likelier, of equals the one nearer to training; and why."""
        if self.artifact.model.quantization == "none":
            return "original", "nothing says that it was trained in 4 bit"
        parts = self.lengths if len(self.lengths) > 1 else [1] * self.lengths[0]  # of one row its tokens
        gains = self._nll(self.trained, parts) - self._nll(self.original, parts)
        gains /= len(self.trained) / len(gains)
        known = len(gains) > 1 and self.origin != _OWN_TEXT  # which says nothing of what was trained
        gain, error = float(gains.mean()), float(gains.std()) / math.sqrt(len(gains)) if known else math.inf
        if gain > 2 * error:
            return "original", f"its answers to held-out rows are likelier by {gain:.4f} ± {error:.4f} nats a token"
        kl = self.table[_ORIGINAL]["kl"]
        return "dequantized", f"the original is {kl:.1e} nats a token away from what was trained"

    def verify(self, merged: Path, onto: Onto) -> None:
        """Ask the merged weights. Raises ModelError when they differ from base and adapter by more than rounding, or
        their folder would ask or stop otherwise."""
        compare_prompts(self.artifact, merged, self.rows)
        wanted = self.original if onto == "original" else self.trained
        off, moved = mean_kl(wanted, self.ask(merged, "merged")), self.table["without the adapter"]["kl"]
        if not off <= max(moved, _ROUNDING):
            what = f"the merged model does not answer like its base with the adapter: {off:.1e} nats a token apart"
            raise ModelError(what, where=merged, hint=f"the adapter moves the base by {moved:.1e}")

    def ask(self, folder: Path, name: str) -> Tensor:
        """Ask the model in `folder` and put it into the table. Returns its log-probabilities."""
        return self._compare(name, log_probs(_load(find_artifact(str(folder))), self.rows))

    def record(self) -> dict[str, Any]:
        """What was found, on which rows, and how many tokens the longest row of training has, where that is known."""
        longest = int(np.diff(self.prepared.store.sequence_starts).max()) if self.prepared else None
        return {"longest_row": longest, "rows": self.origin, "table": self.table}

    def _compare(self, name: str, logs: Tensor) -> Tensor:
        same = float((self.trained.argmax(-1) == logs.argmax(-1)).double().mean())
        nll = float(self._nll(logs, self.lengths).sum()) / len(logs)
        self.table[name] = {"kl": mean_kl(self.trained, logs), "same_choice": same, "nll": nll}
        return logs

    def _nll(self, logs: Tensor, lengths: list[int]) -> Tensor:
        """Summed over parts of so many supervised tokens each: (parts,) fp64."""
        parts = torch.split(logs.gather(1, self.targets).double(), lengths)
        return torch.stack([-part.sum() for part in parts])


def _choose_rows(artifact: Artifact, data: DataSource | None, prepared: Prepared | None) -> tuple[list[Tokens], str]:
    """As many rows as are compared, and where they come from."""
    if data is not None:
        answers, _ = read_answers(data, artifact.data, artifact.chat, tokenizer=read_tokenizer(artifact))
        rows, origin = [all_supervised(answer.ids, answer.start) for answer in answers], data.path
    elif prepared:
        store = prepared.held_out or prepared.train
        rows = [tokens for example in range(min(len(store), _PAIRS)) for tokens in store.sequences(example)]
        origin = "held-out rows" if prepared.held_out else "rows of the training set: none were held out"
    else:
        rows, origin = [all_supervised(read_tokenizer(artifact)(_TEXT)["input_ids"])], _OWN_TEXT
    left = min(_PAIRS, _BYTES // (4 * (artifact.vocabulary or 1)))
    kept: list[Tokens] = []
    for row in rows:
        row = row[:_LONGEST]
        supervised = int((row.labels != UNSUPERVISED).sum())
        if supervised and (not kept or supervised <= left):
            kept.append(row)
            left -= supervised
    if not kept:
        raise DataError("no row has anything to compare answers on", where=origin)
    return kept, origin


def log_probs(model: Any, rows: Sequence[Tokens]) -> Tensor:
    """The log-probabilities of all tokens wherever `rows` have a supervised one, from the model's own logits: (pairs,
    vocabulary) fp32 on the CPU, row after row."""
    device, logs = PartialState().device, []
    check_ids([row.ids for row in rows], len(model.get_input_embeddings().weight))
    with torch.no_grad():
        for row in rows:
            sources = torch.from_numpy((row.labels != UNSUPERVISED).nonzero()[0] - 1)
            ids = torch.from_numpy(row.ids.astype("int64")).unsqueeze(0)
            given = {"input_ids": ids.to(device), "logits_to_keep": sources.to(device), "use_cache": False}
            logs.append(model(**given).logits[0].float().log_softmax(-1).cpu())
    return torch.cat(logs)


def mean_kl(a: Tensor, b: Tensor) -> float:
    """The mean of KL(a || b) over pairs, in nats. a, b: log-probabilities (pairs, vocabulary)."""
    return float((a.exp() * (a - b)).sum(dim=-1).double().mean())


def _open_tokens(artifact: Artifact) -> Prepared | None:
    """What the run was trained on, where that is still there."""
    for folder in sorted((artifact.run / "tokens").glob("*/prepared.json")) if artifact.run else ():
        with contextlib.suppress(ModelError):  # damaged, or of another version
            return open_prepared(folder.parent)
    return None


def _load(artifact: Artifact) -> Any:
    """The model on the device, or streamed from its files where it does not fit."""
    gc.collect()
    return load_artifact(artifact, PartialState().device, streamed="auto")
