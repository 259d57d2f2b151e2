"""Held-out loss during a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lorasft.data.packing import cut, share
from lorasft.data.store import TokenStore
from lorasft.model.loss import Network, pair_losses
from lorasft.signals import StopRequest
from lorasft.train.oom import oom_context
from lorasft.train.ranks import Ranks

_GROUP = 64  # examples cut together: enough to fill micro-batches well, few enough to bound what is held


@dataclass(frozen=True)
class HeldOut:
    """The mean loss of held-out rows per supervised token, in nats."""

    loss: float
    tokens: int


def evaluate(network: Network, rows: TokenStore, *, capacity: int, ranks: Ranks, stop: StopRequest) -> HeldOut | None:
    """The held-out loss over all `rows`, of which each process scores its share; None where a signal cuts it short.

    The model is put back into the mode that it was in. Raises MicroBatchTooLarge when memory runs out.
    """
    training = network.causal.training
    network.causal.eval()
    total, tokens = 0.0, 0
    try:
        with ranks.agreed(), torch.no_grad():
            for start in range(0, len(rows), _GROUP):
                group = range(start, min(start + _GROUP, len(rows)))
                batches = tuple(
                    cut(
                        rows,
                        group,
                        capacity=capacity,
                        processes=ranks.count,
                        share=network.share,
                        horizon=network.horizon,
                    )
                )
                for batch in share(batches, ranks.index, ranks.count):
                    if stop.signal:  # of several processes none, before they agree on it in a step
                        return None
                    with oom_context(rows, batch):
                        losses = pair_losses(network, batch)
                    total += float(losses.double().sum())
                    tokens += len(batch.targets)
    finally:
        network.causal.train(training)
    totals, counts = zip(*ranks.gather((total, tokens)), strict=True)
    return HeldOut(sum(totals) / sum(counts), sum(counts))
