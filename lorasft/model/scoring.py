"""Losses and log-probabilities of rows: held-out rows of a run, and answers in a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorasft.data.packing import MicroBatch, Sequences, assign_to_rank, make_micro_batches
from lorasft.data.prepare import prepare, settings_for
from lorasft.data.report import Report
from lorasft.data.sources import RowLocation
from lorasft.data.tokens import all_supervised, supervised_runs
from lorasft.errors import DivergedError, ModelError
from lorasft.model.attention import evaluating
from lorasft.model.loss import Network, pair_losses
from lorasft.recipe import ChatSettings, DataSettings, DataSource
from lorasft.terminal import say

_CAPACITY = 2048  # tokens of answers that are scored at once
_GROUP = 64  # examples cut together: enough to fill micro-batches well, few enough to bound what is held


def score_batches(
    network: Network,
    sequences: Sequences,
    examples: Sequence[int],
    *,
    capacity: int,
    processes: int = 1,
    index: int = 0,
    explain: Callable[[MicroBatch], AbstractContextManager[Any]] = nullcontext,
) -> Iterator[tuple[MicroBatch, Tensor]]:
    """Micro-batches of `examples` and the losses of their pairs, (pairs,) each, with the model in evaluation mode.

    Of several `processes` the share of the one with this `index`. `explain`: a context round each computation, which
    says what an error means. The model is put back into the mode that it was in.
    """
    room = capacity if network.segments else 1
    with evaluating(network.causal):
        for start in range(0, len(examples), _GROUP):
            group = examples[start : start + _GROUP]
            batches = make_micro_batches(
                sequences,
                group,
                capacity=room,
                processes=processes,
                share=network.share,
                rope_switch_length=network.rope_switch_length,
            )
            for batch in assign_to_rank(batches, index, processes):
                with torch.no_grad(), explain(batch):
                    losses = pair_losses(network, batch)
                yield batch, losses


def log_probabilities(
    network: Network, sequences: Sequence[NDArray[np.int32]], *, capacity: int
) -> list[NDArray[np.float64]]:
    """log p(token | tokens before it), natural, for each sequence from its second token on: (length - 1,) each."""
    scores = [np.zeros(max(0, len(ids) - 1)) for ids in sequences]
    scored = [index for index, ids in enumerate(sequences) if len(ids) > 1]
    rows = [(all_supervised(ids),) for ids in sequences]
    for batch, losses in score_batches(network, rows.__getitem__, scored, capacity=capacity):
        found = -losses.double().cpu().numpy()
        for example in np.unique(batch.examples):
            scores[example][:] = found[batch.examples == example]
    return scores


def check_ids(sequences: Iterable[NDArray[np.int32]], rows: int, *, where: str | None = None) -> None:
    """Raise ModelError for ids that an embedding of so many `rows` has no row for, at which a GPU would only assert."""
    if (most := max(int(ids.max()) for ids in sequences)) >= rows:
        what = f"the tokenizer gives id {most}, the model has {rows} embedding rows"
        raise ModelError(what, where=where, hint="use the tokenizer that belongs to the model")


@dataclass(frozen=True)
class Answer:
    """One answer: ids[:start] is x, ids[start:] is y. An example has as many as it has learned turns."""

    ids: NDArray[np.int32]
    start: int
    place: RowLocation


def read_answers(
    source: DataSource, data: DataSettings, chat: ChatSettings, *, tokenizer: Any
) -> tuple[list[Answer], Report]:
    """The answers in the rows of `source`, tokenized as training would, and what became of the rows. Raises DataError
    when there are no answers."""
    with TemporaryDirectory(prefix="lorasft-") as folder:
        prepared = prepare(settings_for(source, data), chat, tokenizer=tokenizer, folder=Path(folder), workers=1)
        for notice in prepared.report.notices():
            say(notice)
        answers = [
            Answer(tokens.ids[:end], max(1, int(start)), prepared.store.place(example))
            for example in range(len(prepared.store))
            for tokens in prepared.store.sequences(example)
            for start, end in supervised_runs(tokens)
        ]
    return answers, prepared.report


def score_answers(network: Network, answers: Sequence[Answer]) -> list[dict[str, float]]:
    """The log-probabilities of every answer, natural, summed over tokens; the first token of all has no source.

    x and [x, y] go through separate passes, so that log Pr(y|x) = log Pr([x,y]) - log Pr(x) is a real test. Raises
    DivergedError for one that is not finite.
    """
    check_ids([answer.ids for answer in answers], network.causal.config.get_text_config().vocab_size)
    wholes = log_probabilities(network, [answer.ids for answer in answers], capacity=_CAPACITY)
    prompts = log_probabilities(network, [answer.ids[: answer.start] for answer in answers], capacity=_CAPACITY)
    scores = []
    for answer, whole, prompt in zip(answers, wholes, prompts, strict=True):
        sums = {"log_prob_y_given_x": whole[answer.start - 1 :], "log_prob_x": prompt, "log_prob_xy": whole}
        scores.append({name: float(numbers.sum()) for name, numbers in sums.items()})
        if not all(map(math.isfinite, scores[-1].values())):
            what = f"the log-probabilities of an answer are not finite, in {network.causal.dtype}"
            raise DivergedError(what, where=answer.place, hint="another --dtype; else the weights are broken")
    return scores


def summarize(answers: Sequence[Answer], scores: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean negative log-likelihood per token of the answers, in nats, its perplexity, and the counts."""
    tokens = sum(len(answer.ids) - answer.start for answer in answers)
    loss = -sum(score["log_prob_y_given_x"] for score in scores) / tokens
    perplexity = math.exp(min(loss, 700.0))  # beyond that fp64 ends
    return {"loss": loss, "perplexity": perplexity, "tokens": tokens, "answers": len(scores)}
