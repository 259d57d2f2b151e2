"""Losses and log-probabilities of rows: held-out rows of a run, and answers in a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorasft.data.packing import MicroBatch, Sequences, cut, share
from lorasft.data.tokens import UNSUPERVISED, Tokens
from lorasft.model.loss import Network, pair_losses

_GROUP = 64  # examples cut together: enough to fill micro-batches well, few enough to bound what is held


class Given:
    """Sequences in memory, one to an example: what `cut` reads, without a store."""

    def __init__(self, given: Sequence[Tokens]) -> None:
        self.given = given

    def __len__(self) -> int:
        return len(self.given)

    def sequences(self, example: int) -> tuple[Tokens, ...]:
        return (self.given[example],)


def everything(ids: NDArray[np.int32]) -> Tokens:
    """`ids` with every token a target but the first, which no source predicts."""
    labels = ids.copy()
    labels[:1] = UNSUPERVISED
    return Tokens(ids=ids, labels=labels)


def score_batches(
    network: Network,
    rows: Sequences,
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
    training = network.causal.training
    network.causal.eval()
    room = capacity if network.segments else 1
    try:
        for start in range(0, len(examples), _GROUP):
            group = examples[start : start + _GROUP]
            batches = cut(rows, group, capacity=room, processes=processes, share=network.share, horizon=network.horizon)
            for batch in share(tuple(batches), index, processes):
                with torch.no_grad(), explain(batch):
                    losses = pair_losses(network, batch)
                yield batch, losses
    finally:
        network.causal.train(training)


def log_probabilities(
    network: Network, sequences: Sequence[NDArray[np.int32]], *, capacity: int
) -> list[NDArray[np.float64]]:
    """log p(token | tokens before it), natural, for each sequence from its second token on: (length - 1,) each."""
    store = Given([everything(ids) for ids in sequences])
    scores = [np.zeros(max(0, len(ids) - 1)) for ids in sequences]
    scored = [index for index, ids in enumerate(sequences) if len(ids) > 1]
    for batch, losses in score_batches(network, store, scored, capacity=capacity):
        for example in set(batch.examples.tolist()):
            scores[example][:] = -losses.double().cpu().numpy()[batch.examples == example]
    return scores
