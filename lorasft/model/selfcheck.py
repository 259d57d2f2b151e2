"""Verify, then use the fast path: probes on the loaded model that decide how its losses are computed.

No list of supported models is trusted. A model that leaks between the segments of a row (hybrid and state-space
ones do) is run one sequence at a time; a head that does more than is known here is run through the model itself.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorasft.data.packing import MicroBatch, make_micro_batches
from lorasft.data.tokens import Tokens, all_supervised
from lorasft.model.attention import SEGMENTS, evaluating
from lorasft.model.loss import Network, pair_losses, read_head

_STEM, _TAIL, _OTHER = 17, 17, 9  # tokens that two sequences begin with, and with which each continues
# What rounding may move, as shares of the losses, in 32 bits and in 16: the losses of a sequence beside another first
# one (an expert's product has other rows then), and their mean by other kernels.
_LEAK, _DRIFT = (2e-6, 1.6e-2), (1e-4, 3e-2)


def verify(causal: Any, *, segments: bool = True) -> Network:
    """Probe `causal` and leave it under the attention that its losses will be computed with.

    Without `segments`, sequences go alone from the start.
    """
    training = causal.training
    causal.eval()
    network = Network(
        causal, head=None, segments=False, rope_switch_length=_rope_switch_length(causal.config.get_text_config())
    )
    shared = replace(network, segments=True, share="auto")
    ways = [shared, replace(shared, share=False)]  # the fastest first
    if network.device.type == "cuda":
        ways.insert(0, replace(shared, varlen=True))
    notice = None
    with torch.no_grad():
        alone = torch.cat([pair_losses(network, _row(sequence)) for sequence in _branches(1, network)])
        for way in ways if segments else ():
            reason = _find_leak(way, alone)
            if reason is None:
                causal.set_attn_implementation(SEGMENTS)
                network = way
                break
            lost = "shared prefixes are computed for each example" if way.share else "sequences go one at a time"
            notice = f"{lost}: {reason}"
        if notice and not network.share:
            network = replace(network, notices=(notice,))
        network = _try_head(network)
    causal.train(training)
    return network


def _find_leak(network: Network, alone: Tensor) -> str | None:
    """What is wrong with two sequences in a row under segment attention, as `network` computes it; None: nothing.

    Both have the losses that they have `alone`. Another first one leaves the second's as they are: the same shapes run
    the same kernels, so what does not look at it differs by rounding at most.
    """
    rows = [_row(*_branches(first, network), share=bool(network.share)) for first in (1, 2)]
    try:
        with evaluating(network.causal, SEGMENTS):
            losses = [pair_losses(network, row) for row in rows]
    except (ImportError, TypeError, ValueError, RuntimeError) as error:
        return f"no segment attention ({error})"
    leak = float((losses[0] - losses[1])[rows[0].examples == 1].abs().max())
    drift = float((losses[0] - alone).abs().mean())
    if leak <= _limit(_LEAK, network.causal, alone) and drift <= _limit(_DRIFT, network.causal, alone):
        return None
    return f"losses move by {leak:.1e} with another neighbour and by {drift:.1e} in company"


def _try_head(network: Network) -> Network:
    """The chunked loss equals the loss from the model's own logits."""
    head = read_head(network.causal)
    if head is None:
        return network
    row = _row(_branches(1, network)[0])
    own = pair_losses(network, row)
    drift = float((own - pair_losses(replace(network, head=head), row)).abs().mean())
    if drift <= _limit(_DRIFT, network.causal, own):
        return replace(network, head=head)
    notice = f"the head does more than is known here (losses differ by {drift:.1e}): its own logits are used"
    return replace(network, notices=(*network.notices, notice))


def _limit(shares: tuple[float, float], causal: Any, losses: Tensor) -> float:
    """How far `losses` may move by rounding alone, in the model's own precision."""
    return shares[causal.dtype.itemsize == 2] * max(1.0, float(losses.abs().mean()))


def _branches(first: int, network: Network) -> tuple[Tokens, Tokens]:
    """Two sequences with a common stem; the first continues with the token `first`, below the second's."""
    vocabulary = network.causal.config.get_text_config().vocab_size
    stem, other = np.split(np.random.default_rng(0).integers(0, vocabulary, _STEM + _OTHER), [_STEM])
    tail = np.random.default_rng(first).integers(0, vocabulary, _TAIL)
    ids = np.concatenate([stem, [first], tail]), np.concatenate([stem, [3], other])
    return all_supervised(ids[0].astype(np.int32)), all_supervised(ids[1].astype(np.int32))


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
