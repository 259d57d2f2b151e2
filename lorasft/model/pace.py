"""How long a micro-batch takes: one layer of each kind and all that is around the layers are timed, and added up."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorasft.data.packing import MicroBatch
from lorasft.model.loss import Network
from lorasft.model.memory import Shell, layer_kind
from lorasft.model.meter import StorageMeter
from lorasft.model.recompute import decoder_layers, recompute

_ROUNDS = 2  # of which the faster counts


@dataclass(frozen=True)
class Pace:
    """Seconds of a micro-batch."""

    forward: tuple[float, ...]  # of each layer, first to last
    backward: tuple[float, ...]
    around: float  # embedding, head and loss, both ways

    def step(self, recomputed: int) -> float:
        """Forwards and backwards, when the first `recomputed` layers recompute."""
        return sum(self.forward) + sum(self.backward) + sum(self.forward[:recomputed]) + self.around

    @property
    def scoring(self) -> float:
        """Forwards alone, as in an evaluation."""
        return sum(self.forward) + self.around


def time_layers(network: Network, batch: MicroBatch) -> Pace:
    """Time `network` on `batch`. Leaves the model training, without recomputed layers and without gradients."""
    layers = decoder_layers(network.causal)
    network.causal.train()
    recompute(network.causal, 0)
    shell = Shell(layers, StorageMeter())  # never entered: it counts nothing and costs nothing
    around = _clock(lambda: shell.measure(network, batch), network.device)
    kinds = list(map(layer_kind, layers))
    timed: dict[str, tuple[float, float]] = {}
    for kind, layer, (args, kwargs) in zip(kinds, layers, shell.calls, strict=True):
        if kind not in timed:
            # A CPU compiles for new sizes: other features, so that an expert gets as many rows as never before.
            inputs = [torch.roll(args[0].detach(), turn, dims=-1) for turn in range(1, _ROUNDS + 1)]
            rounds = [_time_layer(layer, (one, *args[1:]), kwargs, network.device) for one in inputs]
            timed[kind] = (min(forward for forward, _ in rounds), min(backward for _, backward in rounds))
    forward, backward = zip(*(timed[kind] for kind in kinds), strict=True)
    return Pace(forward, backward, max(0.0, around - forward[0]))  # around them the first layer went forwards once


def _time_layer(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device
) -> tuple[float, float]:
    own = args[0].detach().requires_grad_()
    outputs: list[Any] = []
    forward = _clock(lambda: outputs.append(layer(own, *args[1:], **kwargs)), device)
    output = outputs[0] if isinstance(outputs[0], torch.Tensor) else outputs[0][0]
    wanted = [own, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    slope = torch.ones_like(output)
    return forward, _clock(lambda: torch.autograd.grad(output, wanted, slope, allow_unused=True), device)


def _clock(work: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
