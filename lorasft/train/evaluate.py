"""Held-out loss during a run."""

from __future__ import annotations

from functools import partial

import torch

from lorasft.data.packing import cut, share
from lorasft.data.store import TokenStore
from lorasft.model.loss import Network, pair_losses
from lorasft.signals import StopRequest
from lorasft.train.distributed import Ranks
from lorasft.train.oom import oom_context

_GROUP = 64  # examples cut together: enough to fill micro-batches well, few enough to bound what is held


def evaluate(
    network: Network, rows: TokenStore, *, capacity: int, ranks: Ranks, stop: StopRequest
) -> tuple[float, int] | None:
    """The mean loss per supervised token of held-out `rows`, in nats, and how many tokens; None after a signal.

    Each process scores its share. The model is put back into the mode that it was in. Raises MicroBatchTooLarge when
    memory runs out.
    """
    training = network.causal.training
    network.causal.eval()
    total, tokens = 0.0, 0
    cut_all = partial(cut, rows, capacity=capacity, processes=ranks.count, share=network.share, horizon=network.horizon)
    try:
        with ranks.sync_errors(), torch.no_grad():
            for start in range(0, len(rows), _GROUP):
                batches = tuple(cut_all(range(start, min(start + _GROUP, len(rows)))))
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
    return sum(totals) / sum(counts), sum(counts)
