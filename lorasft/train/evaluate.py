"""Held-out loss during a run."""

from __future__ import annotations

from functools import partial

from lorasft.data.store import TokenStore
from lorasft.model.loss import Network
from lorasft.model.scoring import score_batches
from lorasft.signals import StopRequest
from lorasft.train.distributed import Ranks
from lorasft.train.redo import naming_rows


def evaluate(
    network: Network, rows: TokenStore, *, capacity: int, ranks: Ranks, stop: StopRequest
) -> tuple[float, int] | None:
    """The mean loss per supervised token of held-out `rows`, in nats, and how many tokens; None after a signal.

    Each process scores its share. Raises MicroBatchTooLarge when memory runs out.
    """
    total, tokens = 0.0, 0
    score = partial(score_batches, network, rows, range(len(rows)), capacity=capacity)
    with ranks.sync_errors():
        for batch, losses in score(processes=ranks.count, index=ranks.index, explain=partial(naming_rows, rows)):
            if stop.signal:  # of several processes none, before they agree on it in a step
                return None
            total += float(losses.double().sum())
            tokens += len(batch.targets)
    totals, counts = zip(*ranks.gather((total, tokens)), strict=True)
    return sum(totals) / sum(counts), sum(counts)
