"""Verify, then use the fast path: probes on the loaded model that decide how its losses are computed.

No list of supported models is trusted. Where a model leaks between the segments of a row (hybrid and state-space ones
do), the smallest kind of module that is called for each of them without a leak is, else sequences go one at a time; a
head that does more than is known here is run through the model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lorasft.data.packing import MicroBatch, make_micro_batches
from lorasft.data.store import Tokens, all_supervised
from lorasft.errors import first_line, out_of_memory
from lorasft.model.attention import SEGMENTS, Paths, Shape, attend, default_attention, evaluating
from lorasft.model.lean import use_lean_layers
from lorasft.model.loss import Network, pair_losses, read_head, send
from lorasft.model.mixers import call_by_segment
from lorasft.model.recompute import decoder_layers

_STEM, _TAIL, _OTHER = 17, 17, 15  # tokens that two sequences begin with, and with which each continues
# What rounding may move, as shares of the losses, in 32 bits and in 16: the losses of a sequence beside another first
# one (an expert's product has other rows then), and their mean by other kernels.
_LEAK, _DRIFT = (2e-6, 1.6e-2), (1e-4, 3e-2)
_KERNEL = 2e-2  # and, as a share of their norm, outputs and gradients of attention in 16 bits


def verify(causal: Any, *, segments: bool = True) -> Network:
    """Probe `causal` and leave it under the attention that its losses will be computed with; without `segments`,
    sequences go alone from the start."""
    own = default_attention(causal.config)
    switch = _rope_switch_length(causal.config.get_text_config())
    network = Network(causal, head=None, segments=False, rope_switch_length=switch)
    with evaluating(causal, own), torch.no_grad():
        alone = torch.cat([pair_losses(network, _row(sequence)) for sequence in _branches(1, network)])
        for way in _ways(network) if segments else ():
            reason = _reason(partial(_find_leak, way, alone))
            if reason is None:
                causal.set_attn_implementation(SEGMENTS)
                network = replace(way, notices=() if way.mixer or way.told else network.notices)
                break
            lost = "shared prefixes are computed for each example" if way.share else "sequences go one at a time"
            network = replace(network, notices=network.notices if way.mixer or way.told else (f"{lost}: {reason}",))
        if network.segments and network.device.type == "cuda":
            network = _try_kernels(network, alone)
        if head := read_head(causal):
            what = "the head does more than is known here: its own logits are used"
            network = _choose(replace(network, head=head), network, alone, what)
        found = use_lean_layers(causal)
        what = "norms and MLPs keep more, as they are transformers' own: lean ones are wrong"
        network = _choose(replace(network, lean=bool(found)), network, alone, what)
        for module in () if network.lean else found:
            del module.forward
    causal.set_attn_implementation(SEGMENTS if network.segments else own)
    return network


def _ways(network: Network) -> Iterator[Network]:
    """How a row may hold several sequences, the faster first; each stands until the next is asked for."""
    call_by_segment(network.causal, None)
    shared = replace(network, segments=True, share="auto")
    yield from (shared, alone := replace(shared, share=False), replace(alone, told=True))
    parts = {type(one): len(list(one.modules())) for one in decoder_layers(network.causal).modules()
             if "forward" not in vars(one) and type(one).forward != nn.Module.forward}  # fmt: skip
    for kind in sorted((kind for kind in parts if parts[kind] > 1), key=parts.__getitem__):
        call_by_segment(network.causal, kind)
        yield replace(alone, mixer=kind)
    call_by_segment(network.causal, None)


def _find_leak(network: Network, alone: Tensor) -> str | None:
    """What is wrong with two sequences in a row under segment attention, as `network` computes it; None: nothing.

    Both have the losses that they have `alone`. Another first one leaves the second's as they are: the same shapes run
    the same kernels, so what does not look at it differs by rounding at most.
    """
    rows = [_row(*_branches(first, network), share=bool(network.share)) for first in (1, 2)]
    with evaluating(network.causal, SEGMENTS):
        losses = [pair_losses(network, row) for row in rows]
    leak = float((losses[0] - losses[1])[rows[0].examples == 1].abs().max())
    drift = float((losses[0] - alone).abs().mean())
    if leak <= _limit(_LEAK, network.causal, alone) and drift <= _limit(_DRIFT, network.causal, alone):
        return None
    return f"losses move by {leak:.1e} with another neighbour and by {drift:.1e} in company"


def _reason(find: Callable[[], str | None]) -> str | None:
    """What is wrong: as `find` says, or the first line of the error that it ends in."""
    try:
        return find()
    except Exception as error:  # a model, or a kernel, may raise anything
        if out_of_memory(error):  # by which nothing is known of them
            raise
        return first_line(error)


def _find_kernel_error(shape: Shape, device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with the one kernel: its output and gradients beside those on a CPU in float64."""
    if shape.open_scores:
        return "torch has no kernel with soft caps, or for sinks that are trained"
    paths = Paths([150, 70, 5, 90], [(), (0,), (0, 1), ()], cascade=False)  # longer and shorter than a kernel's blocks
    paths = replace(paths, places=send(paths.numbers, device))
    draw, window = torch.Generator().manual_seed(0), 40 if shape.windowed else None
    each = [(sum(paths.lengths), *one) for one in zip(shape.heads, shape.sizes, strict=True)]
    rows = [torch.randn(1, *one, generator=draw).to(dtype).transpose(1, 2) for one in each]
    sinks = torch.linspace(-2, 4, shape.heads[0]) if shape.sinks else None
    found = []
    reference = Paths(paths.lengths, paths.ancestors), torch.device("cpu"), torch.float64
    for segments, place, precision in ((replace(paths, kernel=lambda _: True), device, dtype), reference):
        q, k, v = (row.to(place, precision).requires_grad_() for row in rows)
        options: Any = {"scaling": 0.1, "sliding_window": window, "s_aux": None if sinks is None else sinks.to(place)}
        with torch.enable_grad():
            output, _ = attend(nn.Module(), q, k, v, None, **options, segments=segments)
            gradients = torch.autograd.grad(output, (q, k, v), output.detach().sin())
        found.append([one.double().cpu() for one in (output.detach(), *gradients)])
    drift = float(torch.stack([(one - exact).norm() / exact.norm() for one, exact in zip(*found, strict=True)]).max())
    return None if drift <= _KERNEL else f"torch's FlashAttention is {drift:.1e} from float64"


def _try_kernels(network: Network, alone: Tensor) -> Network:
    """`network` with one kernel for all segments of the layers that it computes rightly."""
    reasons: dict[Shape, str | None] = {}  # why not, of each shape of a layer when it is first met

    def holds(shape: Shape) -> bool:
        if shape not in reasons:
            reasons[shape] = _reason(partial(_find_kernel_error, shape, network.device, network.causal.dtype))
        return not reasons[shape]

    leak = _reason(partial(_find_leak, replace(network, kernel=holds), alone))
    slower = "attention goes segment by segment, which is slower, where one kernel cannot do it"
    notices = [f"{slower}: {reason}" for reason in sorted(filter(None, {*reasons.values(), leak}))]
    return replace(network, kernel=None if leak else holds, notices=(*network.notices, *notices))


def _choose(faster: Network, network: Network, alone: Tensor, notice: str) -> Network:
    """`faster`, where its losses of the first sequence are those that it has `alone`; else `network`, with a notice."""
    row = _row(_branches(1, network)[0])
    drift = float((alone[: len(row.sources)] - pair_losses(faster, row)).abs().mean())
    if drift <= _limit(_DRIFT, network.causal, alone):
        return faster
    return replace(network, notices=(*network.notices, f"{notice} (losses differ by {drift:.1e})"))


def _limit(shares: tuple[float, float], causal: Any, losses: Tensor) -> float:
    """How far `losses` may move by rounding alone, in the model's own precision."""
    return shares[causal.dtype.itemsize == 2] * max(1.0, float(losses.abs().mean()))


def _branches(first: int, network: Network) -> tuple[Tokens, Tokens]:
    """Two sequences with a common stem; the first continues with the token `first`, below the second's."""
    vocabulary = network.causal.config.get_text_config().vocab_size
    stem, other = np.split(np.random.default_rng(0).integers(0, vocabulary, _STEM + _OTHER), [_STEM])
    tail = np.random.default_rng(first).integers(0, vocabulary, _TAIL)
    return all_supervised(np.concatenate([stem, [first], tail])), all_supervised(np.concatenate([stem, [3], other]))


def _rope_switch_length(config: Any) -> int | None:
    """The length from which on a row's positions are computed otherwise, all of them (transformers' `longrope`)."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = rope.values() if all(isinstance(kind, dict) for kind in rope.values()) else [rope]
    for kind in kinds:
        if kind.get("rope_type") in ("longrope", "dynamic"):
            return int(kind.get("original_max_position_embeddings") or config.max_position_embeddings)
    return None


def _row(*sequences: Tokens, share: bool = False) -> MicroBatch:
    size = sum(len(sequence.ids) for sequence in sequences)
    (batch,) = make_micro_batches(lambda index: (sequences[index],), range(len(sequences)), capacity=size, share=share)
    return batch
