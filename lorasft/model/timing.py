"""How long a micro-batch takes: one layer of each kind and all that is around the layers are timed, and added up."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from lorasft.data.packing import MicroBatch, cost
from lorasft.model.loss import Network, pair_losses
from lorasft.model.memory import heaviest_batch
from lorasft.model.recompute import recompute
from lorasft.model.weightless import Sample

_WORK = 2e10  # multiply-adds through what is timed
_TOKENS = (48, 256)  # of the smaller of two micro-batches, at least and at most; the larger has three times as many
_ROUNDS = 2  # of which the faster counts: in the first one a CPU compiles


@dataclass(frozen=True)
class Timing:
    """Seconds of a small and of a larger micro-batch; others are on the line through both."""

    costs: tuple[float, ...]  # see `packing.cost`
    seconds: tuple[NDArray[np.float64], ...]  # of each: forwards, both ways, and through all decoder layers forwards

    def predict(self, costs: list[float]) -> NDArray[np.float64]:
        """The same seconds for micro-batches of `costs`, summed."""
        (small, large), (less, more) = self.costs, self.seconds
        slope = np.clip((more - less) / (large - small), 0, more / large)  # a disturbed clock: nothing costs less
        return len(costs) * more + slope * (sum(costs) - len(costs) * large)


def time_sample(network: Network, sample: Sample, *, length: int, supervised: float, vocabulary: int) -> Timing:
    """Time `sample`, which `network` computes, on rows of `length` tokens of which a share is supervised.

    `vocabulary`: of the whole model; what is around the layers takes as much longer as it is larger.
    """
    causal = network.causal
    causal.train()
    recompute(causal, 0)
    causal.enable_input_require_grads()  # a layer that is not the first gives its gradient on
    weights = sum(parameter.numel() for layer in sample.live.values() for parameter in layer.parameters())
    head = causal.get_output_embeddings().weight
    wider = vocabulary / len(head)
    weights += head.numel()
    tokens = int(min(max(_WORK / 8 / weights, _TOKENS[0]), _TOKENS[1]))
    batches = [_thin(heaviest_batch(network, longest=min(length, size), capacity=size), supervised)
               for size in (tokens, 3 * tokens)]  # fmt: skip
    seconds = tuple(_time_batch(network, sample, batch, wider=wider) for batch in batches)
    return Timing(tuple(map(cost, batches)), seconds)


def _thin(batch: MicroBatch, share: float) -> MicroBatch:
    """`batch` with only a share of its pairs."""
    kept = slice(max(1, round(share * len(batch.sources))))
    names = ("sources", "targets", "weights", "examples")
    return replace(batch, **{name: getattr(batch, name)[kept] for name in names})


def _time_batch(network: Network, sample: Sample, batch: MicroBatch, *, wider: float) -> NDArray[np.float64]:
    """Seconds forwards, both ways, and of all layers forwards."""
    sample.run_only()
    around = _time_rounds(network, batch)
    layers = np.zeros(2)
    for kind, count in Counter(sample.kinds).items():
        sample.run_only(kind)
        layers += count * np.maximum(0.0, _time_rounds(network, batch) - around)
    return np.append(wider * around + layers, layers[0])


def _time_rounds(network: Network, batch: MicroBatch) -> NDArray[np.float64]:
    """Seconds forwards, and both ways, of the faster round."""
    rounds = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        loss = pair_losses(network, batch).sum()
        forward = _seconds_since(started, network.device)
        loss.backward()  # type: ignore[no-untyped-call]
        rounds.append((forward, _seconds_since(started, network.device)))
    faster: NDArray[np.float64] = np.array(rounds).min(axis=0)
    return faster


def _seconds_since(started: float, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
