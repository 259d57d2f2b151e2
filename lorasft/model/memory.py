"""What a micro-batch needs, measured on the loaded model, and how many layers must recompute to make it fit.

Nothing is looked up in a list of architectures: one layer of each kind runs forwards and backwards once, on the
heaviest micro-batch that can come, and so do the head and the loss. The peak of a whole step with any number of
recomputed layers follows from these numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from lorasft.data.packing import MicroBatch, cut
from lorasft.model.base import ByteTable, count_bytes
from lorasft.model.linear import reserve_buffers
from lorasft.model.loss import Network, pair_losses
from lorasft.model.meter import CudaMeter, StorageMeter, make_meter
from lorasft.model.recompute import decoder_layers, recompute, recomputed_layers
from lorasft.model.scoring import Given, everything

# Share of the free memory that is planned with.
USABLE = 0.9


@dataclass(frozen=True)
class LayerBytes:
    """What one decoder layer needs for a micro-batch."""

    input: int  # all that it keeps when it is recomputed
    saved: int  # what it keeps for its backward when it is not
    work: int  # the most that lives while it goes forwards and backwards, its input and what it saves included


@dataclass(frozen=True)
class Footprint:
    """What one micro-batch needs beside the weights, the optimizer and the gradients."""

    layers: tuple[LayerBytes, ...]  # first to last
    around: int  # what lives through the whole step: ids, rotary tables, masks, memory that weights are read into
    tail: int  # the most that lives from the last layer's output through the loss and back to it

    def held(self, recomputed: int) -> int:
        """Bytes kept between forward and backward when the first `recomputed` layers recompute."""
        kept = [layer.input if index < recomputed else layer.saved for index, layer in enumerate(self.layers)]
        return self.around + sum(kept)

    def peak(self, recomputed: int) -> int:
        """The most bytes at a time: in a layer, under which all before it keep theirs, or in the loss."""
        held, stages = self.around, []
        for index, layer in enumerate(self.layers):
            stages.append(held + layer.work)
            held += layer.input if index < recomputed else layer.saved
        return max(*stages, held + self.tail)


@dataclass(frozen=True)
class Holdings:
    """What lives all through a run, in bytes by kind."""

    weights: ByteTable  # the adapter among them
    gradients: int
    optimizer: int

    @property
    def loaded(self) -> int:
        """Bytes of the weights."""
        return sum(vars(self.weights).values())

    @property
    def upcoming(self) -> int:
        """Bytes that the first step adds for good."""
        return self.gradients + self.optimizer


@dataclass(frozen=True)
class Prediction:
    """Bytes at the peak of a step by kind."""

    holdings: Holdings
    activations: int  # kept between forward and backward
    transient: int  # above them at the peak

    @property
    def total(self) -> int:
        return self.holdings.loaded + self.holdings.upcoming + self.activations + self.transient

    def kinds(self) -> dict[str, int]:
        """Every kind by its name."""
        weights = self.holdings.weights
        return {
            "4-bit weights": weights.four_bit,
            "16-bit weights": weights.sixteen_bit,
            "32-bit weights": weights.full,
            "adapter": weights.adapter,
            "gradients": self.holdings.gradients,
            "optimizer": self.holdings.optimizer,
            "activations": self.activations,
            "transient": self.transient,
        }


def predict(holdings: Holdings, footprint: Footprint, *, recomputed: int) -> Prediction:
    """The peak of a step when the first `recomputed` layers recompute."""
    held = footprint.held(recomputed)
    return Prediction(holdings, activations=held, transient=footprint.peak(recomputed) - held)


def count_holdings(parts: Sequence[nn.Module], optimizer: str) -> Holdings:
    """What a model, made of `parts`, holds under the recipe's `optimizer.name`."""
    tables = [count_bytes(part) for part in parts]
    weights = ByteTable(**{kind: sum(getattr(table, kind) for table in tables) for kind in vars(tables[0])})
    trained = [parameter for part in parts for parameter in _trained(part)]
    return Holdings(weights, gradients=sum(map(_size, trained)), optimizer=_optimizer_bytes(trained, optimizer))


def _optimizer_bytes(trained: Iterable[Tensor], optimizer: str) -> int:
    """Two moments for each trained parameter; `adamw8bit` keeps those of small tensors in fp32."""
    counts = [parameter.numel() for parameter in trained]
    if optimizer == "adamw":
        return 8 * sum(counts)
    return sum(8 * count if count < 4096 else 2 * count + 8 * -(-count // 256) for count in counts)


def fits(footprint: Footprint, recomputed: int, free: int) -> bool:
    """Whether a step stays within 90 % of `free` bytes: the rest is for fragments and other programs."""
    return footprint.peak(recomputed) <= USABLE * free


def fewest_recomputed(footprint: Footprint, free: int) -> int:
    """The fewest layers to recompute for a peak within 90 % of `free` bytes; if none fits, those of the lowest peak."""
    counts = range(len(footprint.layers) + 1)
    fitting = (count for count in counts if fits(footprint, count, free))
    return next(fitting, min(counts, key=footprint.peak))


def heaviest_batch(network: Network, *, longest: int, capacity: int) -> MicroBatch:
    """A micro-batch that none of a run exceeds: full, of sequences as long as `longest` tokens, all of them learned."""
    capacity = max(longest, capacity if network.segments else 1)
    lengths = [longest] * (capacity // longest) + ([capacity % longest] if capacity % longest else [])
    vocabulary = network.causal.config.get_text_config().vocab_size
    draw = np.random.default_rng(0)  # the ids decide nothing but the experts that they are sent to
    rows = [everything(draw.integers(0, vocabulary, length + 1).astype(np.int32)) for length in lengths]
    (batch,) = cut(Given(rows), range(len(rows)), capacity=capacity)
    return batch


def measure(network: Network, batch: MicroBatch) -> Footprint:
    """Run one layer of each kind and the loss on `batch`, forwards and backwards. Leaves no gradients behind.

    Raises what running out of memory raises, see `out_of_memory`.
    """
    causal = network.causal
    layers = decoder_layers(causal)
    training, recomputed = causal.training, recomputed_layers(causal)
    recompute(causal, 0)
    causal.train()
    kept = reserve_buffers(causal)
    try:
        with make_meter(network.device) as meter:
            shell = Shell(layers, meter)
            around, tail = shell.measure(network, batch)
            measured: dict[str, LayerBytes] = {}
            kinds = list(map(layer_kind, layers))
            for kind, layer, (args, kwargs) in zip(kinds, layers, shell.calls, strict=True):
                if kind not in measured:
                    measured[kind] = _measure_layer(layer, args, kwargs, meter)
            return Footprint(tuple(measured[kind] for kind in kinds), kept + around, tail)
    finally:
        causal.train(training)
        recompute(causal, recomputed)


class Shell:
    """A step with its layers skipped: how the model calls them, and what all but them needs."""

    def __init__(self, layers: list[nn.Module], meter: StorageMeter | CudaMeter) -> None:
        self.layers = layers
        self.meter = meter
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.output: Any = None  # of the first layer, which stands for that of every other
        self.hidden = torch.empty(0)  # what the head reads
        self.begin = self.end = 0  # bytes that live where the first layer begins and where the last one ends

    def measure(self, network: Network, batch: MicroBatch) -> tuple[int, int]:
        """Bytes that live through the whole step, and the peak of head and loss."""
        before = self.meter.live
        forwards = [layer.forward for layer in self.layers]
        overridden = ["forward" in vars(layer) for layer in self.layers]
        for index, layer in enumerate(self.layers):
            layer.forward = partial(self._stand_in, index, forwards[index])
        try:
            loss = pair_losses(network, batch).sum()
        finally:
            for layer, forward, own in zip(self.layers, forwards, overridden, strict=True):
                layer.forward = forward
                if not own:
                    del layer.forward
        inside = {id(parameter) for layer in self.layers for parameter in layer.parameters()}
        others = [parameter for parameter in _trained(network.causal) if id(parameter) not in inside]
        torch.autograd.grad(loss, [self.hidden, *others], allow_unused=True)
        return self.begin - before, self.meter.peak - self.end

    def _stand_in(self, index: int, forward: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        if index == 0:
            self.begin = self.meter.live - _size(args[0])
            with torch.no_grad():
                self.output = forward(*args, **kwargs)
        if index < len(self.layers) - 1:
            return self.output
        self.end = self.meter.live
        self.meter.restart()
        self.hidden = _hidden(self.output).clone().requires_grad_()
        return self.hidden if isinstance(self.output, Tensor) else (self.hidden, *self.output[1:])


def _measure_layer(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], meter: StorageMeter | CudaMeter
) -> LayerBytes:
    """Only gradient edges are held between forward and backward, so that a tensor lives where the layer saves it."""
    before = meter.live
    meter.restart()
    size = _size(args[0])
    own = args[0].detach().requires_grad_().clone()
    wanted: list[Any] = [get_gradient_edge(own), *_trained(layer)]
    upstream = torch.ones_like(own)
    output = _hidden(layer(own, *args[1:], **kwargs))
    del own
    saved = meter.live - before - _size(output) - size  # without the output and the upstream gradient
    edge = get_gradient_edge(output)
    del output
    torch.autograd.grad([edge], wanted, [upstream], allow_unused=True)
    return LayerBytes(input=size, saved=saved, work=meter.peak - before)


def layer_kind(layer: nn.Module) -> str:
    """What decides the bytes and the time of a layer: its modules, their shapes and plain settings (windows, types)."""
    parts = []
    for name, module in layer.named_modules():
        settings = {key: value for key, value in vars(module).items() if isinstance(value, (int, float, str))}
        settings.pop("layer_idx", None)
        shapes = [(tuple(parameter.shape), parameter.requires_grad) for parameter in module.parameters(recurse=False)]
        parts.append(f"{name} {type(module).__name__} {settings} {shapes}")
    return "\n".join(parts)


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
