"""How long a micro-batch takes: what a layer of each kind adds is timed, and what is around the layers, and summed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lorasft.data.packing import MicroBatch, cost
from lorasft.model.loss import Network, pair_losses
from lorasft.model.memory import heaviest_batch
from lorasft.model.recompute import decoder_layers, layer_kinds, only_first, recompute

_WORK = 2e10  # multiply-adds through what is timed
_TOKENS = (48, 256)  # of the smaller of two micro-batches, at least and at most; the larger has three times as many
_ROUNDS = 2  # of which the faster counts: in the first one a CPU compiles


def predict_seconds(
    network: Network, whole: Any, costs: Sequence[float], *, length: int, supervised: float
) -> NDArray[np.float64]:
    """Seconds of micro-batches of `costs` (see `packing.cost`) through the model `whole`, summed: forwards, both ways,
    and through all decoder layers forwards.

    Two are timed on the sample of `whole` that is in `network`, in rows of `length` tokens of which a share is
    supervised; others are on the line through both. What is around the layers takes as much longer as the vocabulary
    of `whole` is larger.
    """
    causal = network.causal
    causal.train()
    recompute(causal, 0)
    causal.enable_input_require_grads()  # a layer that is not the first gives its gradient on
    head = causal.get_output_embeddings()
    wider = len(whole.get_output_embeddings().weight) / len(head.weight)
    weights = sum(parameter.numel() for part in (*decoder_layers(causal), head) for parameter in part.parameters())
    tokens = int(np.clip(_WORK / 8 / weights, *_TOKENS))
    batches = [heaviest_batch(network, longest=min(length, size), capacity=size, supervised=supervised)
               for size in (tokens, 3 * tokens)]  # fmt: skip
    kinds = layer_kinds(whole)
    less, more = (_time_batch(network, kinds, batch, wider=wider) for batch in batches)
    small, large = map(cost, batches)
    slope = np.clip((more - less) / (large - small), 0, more / large)  # a disturbed clock: nothing costs less
    seconds: NDArray[np.float64] = len(costs) * more + slope * (sum(costs) - len(costs) * large)
    return seconds


def _time_batch(network: Network, kinds: Sequence[str], batch: MicroBatch, *, wider: float) -> NDArray[np.float64]:
    """Seconds forwards, both ways, and of all layers forwards."""
    around = _time_first(network, batch, 0)
    each: dict[str, NDArray[np.float64]] = {}
    for kind in dict.fromkeys(kinds):
        before = sum(each.values(), around)  # the sample skips all but the first of a kind
        each[kind] = np.maximum(0.0, _time_first(network, batch, kinds.index(kind) + 1) - before)
    layers = sum((each[kind] for kind in kinds), np.zeros(2))
    return np.append(wider * around + layers, layers[0])


def _time_first(network: Network, batch: MicroBatch, depth: int) -> NDArray[np.float64]:
    """Seconds forwards, and both ways, through the first `depth` layers alone, of the faster round."""
    rounds, synchronize = [], torch.get_device_module(network.device).synchronize
    with only_first(network.causal, depth):
        for _ in range(_ROUNDS):
            started = time.perf_counter()
            loss = pair_losses(network, batch).sum()
            synchronize(network.device)
            forward = time.perf_counter()
            loss.backward()  # type: ignore[no-untyped-call]
            synchronize(network.device)
            rounds.append((forward - started, time.perf_counter() - started))
    faster: NDArray[np.float64] = np.array(rounds).min(axis=0)
    return faster
