"""The answers in a file and their log-probabilities: log Pr(y|x), log Pr(x) and log Pr([x, y])."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorasft.data.prepare import encode_source
from lorasft.data.report import Report
from lorasft.data.sources import Place
from lorasft.data.tokens import supervised_runs
from lorasft.errors import DataError
from lorasft.model.loss import Network
from lorasft.model.scoring import log_probabilities
from lorasft.recipe import ChatSettings, DataSettings, DataSource

_CAPACITY = 2048  # tokens scored at once


@dataclass(frozen=True)
class Answer:
    """One answer: ids[:start] is x, ids[start:] is y. An example has as many as it has learned turns."""

    ids: NDArray[np.int32]
    start: int
    place: Place

    @property
    def length(self) -> int:
        """|y| in tokens."""
        return len(self.ids) - self.start


@dataclass(frozen=True)
class Score:
    """Log-probabilities of one answer, natural, summed over tokens. The first token of all has no source."""

    log_prob_y_given_x: float  # read off the pass over [x, y]
    log_prob_x: float  # from a pass of its own
    log_prob_xy: float


def read_answers(
    source: DataSource, data: DataSettings, chat: ChatSettings, *, tokenizer: Any
) -> tuple[list[Answer], Report]:
    """The answers in the rows of `source`, tokenized as training would, and what became of the rows.

    Raises DataError when there are no answers.
    """
    examples, report = encode_source(source, data, chat, tokenizer=tokenizer)
    answers = [
        Answer(tokens.ids[:end], max(1, int(start)), example.place)
        for example, sequences in examples
        for tokens in sequences
        for start, end in supervised_runs(tokens)
    ]
    if not answers:
        raise DataError("no answers to score", where=source.path)
    return answers, report


def score_answers(network: Network, answers: Sequence[Answer]) -> list[Score]:
    """Score every answer. x and [x, y] go through separate passes, so that the identity
    log Pr(y|x) = log Pr([x,y]) - log Pr(x) is a real test."""
    wholes = log_probabilities(network, [answer.ids for answer in answers], capacity=_CAPACITY)
    prompts = log_probabilities(network, [answer.ids[: answer.start] for answer in answers], capacity=_CAPACITY)
    return [
        Score(float(whole[answer.start - 1 :].sum()), float(prompt.sum()), float(whole.sum()))
        for answer, whole, prompt in zip(answers, wholes, prompts, strict=True)
    ]


def summarize(answers: Sequence[Answer], scores: Sequence[Score]) -> dict[str, float]:
    """The mean negative log-likelihood per token of the answers, in nats, its perplexity, and the counts."""
    tokens = sum(answer.length for answer in answers)
    loss = -sum(score.log_prob_y_given_x for score in scores) / tokens
    return {"loss": loss, "perplexity": math.exp(loss), "tokens": tokens, "answers": len(scores)}
