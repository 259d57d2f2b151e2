"""Log-probabilities of sequences: evaluation, the merge's check, the probes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from lorasft.data.packing import cut
from lorasft.data.tokens import UNSUPERVISED, Tokens
from lorasft.model.loss import Network, pair_losses


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


def log_probabilities(
    network: Network, sequences: Sequence[NDArray[np.int32]], *, capacity: int
) -> list[NDArray[np.float64]]:
    """log p(token | tokens before it), natural, for each sequence from its second token on: (length - 1,) each."""
    store = Given([everything(ids) for ids in sequences])
    scores = [np.zeros(max(0, len(ids) - 1)) for ids in sequences]
    scored = [index for index, ids in enumerate(sequences) if len(ids) > 1]
    network.causal.eval()
    with torch.no_grad():
        room = capacity if network.segments else 1
        for batch in cut(store, scored, capacity=room, share=network.share, horizon=network.horizon):
            losses = pair_losses(network, batch).double().cpu().numpy()
            for example in set(batch.examples.tolist()):
                scores[example][:] = -losses[batch.examples == example]
    return scores
