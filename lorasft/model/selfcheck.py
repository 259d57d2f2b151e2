"""Verify, then use the fast path: probes on the loaded model that decide how its losses are computed.

No list of supported models is trusted. A model that leaks between the segments of a row (hybrid and state-space
ones do) is run one sequence at a time; a head that does more than is known here is run through the model itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorasft.data.packing import MicroBatch, make_micro_batches
from lorasft.data.tokens import Tokens
from lorasft.model.attention import SEGMENTS, attention
from lorasft.model.loss import Network, pair_losses, read_head
from lorasft.model.scoring import Given, all_supervised

# Lengths of the probe sequences. The longer one is first in a row, so it is what the other must not see.
_EARLY, _LATE = 24, 17
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
    with torch.no_grad():
        if segments:
            network = _try_segments(network)
        if network.segments:
            causal.set_attn_implementation(SEGMENTS)
            network = _try_sharing(_try_varlen(network))
        network = _try_head(network)
    causal.train(training)
    return network


def _try_segments(plain: Network) -> Network:
    """Packed equals alone, and another first sequence leaves the losses of the second untouched."""
    early, other, late = (_random(length, plain, seed=seed) for length, seed in ((_EARLY, 1), (_EARLY, 2), (_LATE, 3)))
    packed = replace(plain, segments=True)
    try:
        with attention(plain.causal, SEGMENTS):
            losses = [pair_losses(packed, row) for row in (_row(early, late), _row(other, late))]
    except (TypeError, ValueError, RuntimeError) as error:
        return replace(plain, notices=(f"sequences go one at a time: no segment attention ({error})",))
    reason = _find_leak(plain, losses, _row(early, late), alone=(early, late))
    return replace(plain, notices=(f"sequences go one at a time: {reason}",)) if reason else packed


def _find_leak(plain: Network, losses: Sequence[Tensor], row: MicroBatch, *, alone: Sequence[Tokens]) -> str | None:
    """What is wrong with the `losses` of `row`, and of a row with another first sequence; None: nothing.

    The same shapes run the same kernels, so what does not look at the first sequence differs by rounding at most.
    """
    own = torch.cat([pair_losses(plain, _row(sequence)) for sequence in alone])
    leak = float((losses[0] - losses[1])[row.examples == 1].abs().max())
    drift = float((losses[0] - own).abs().mean())
    if leak <= _limit(_LEAK, plain.causal, own) and drift <= _limit(_DRIFT, plain.causal, own):
        return None
    return f"losses move by {leak:.1e} with another neighbour and by {drift:.1e} in company"


def _try_varlen(network: Network) -> Network:
    """One kernel for all segments gives what each segment alone gives. It is CUDA's, and not on every device."""
    if network.device.type != "cuda":
        return network
    row, at_once = _tree(_branches(1, network)), replace(network, varlen=True)
    own = pair_losses(network, row)
    try:
        drift = float((pair_losses(at_once, row) - own).abs().mean())
    except (ImportError, TypeError, ValueError, RuntimeError):
        return network
    return at_once if drift <= _limit(_DRIFT, network.causal, own) else network


def _try_sharing(network: Network) -> Network:
    """A stem computed once for two branches equals both alone, and another first branch leaves the second untouched."""
    rows = [_tree(_branches(first, network)) for first in (1, 2)]
    losses = [pair_losses(network, row) for row in rows]
    reason = _find_leak(network, losses, rows[0], alone=_branches(1, network))
    if reason:
        return replace(network, notices=(*network.notices, f"shared prefixes are computed for each example: {reason}"))
    return replace(network, share="auto")


def _try_head(network: Network) -> Network:
    """The chunked loss equals the loss from the model's own logits."""
    head = read_head(network.causal)
    if head is None:
        return network
    row = _row(_random(_EARLY, network, seed=1))
    own = pair_losses(network, row)
    drift = float((own - pair_losses(replace(network, head=head), row)).abs().mean())
    if not drift <= _limit(_DRIFT, network.causal, own):
        notice = f"the head does more than is known here (losses differ by {drift:.1e}): its own logits are used"
        return replace(network, notices=(*network.notices, notice))
    return replace(network, head=head)


def _limit(shares: tuple[float, float], causal: Any, losses: Tensor) -> float:
    """How far `losses` may move by rounding alone, in the model's own precision."""
    return shares[causal.dtype.itemsize == 2] * max(1.0, float(losses.abs().mean()))


def _random(length: int, network: Network, *, seed: int) -> Tokens:
    vocabulary = network.causal.config.get_text_config().vocab_size
    return all_supervised(np.random.default_rng(seed).integers(0, vocabulary, length).astype(np.int32))


def _branches(first: int, network: Network) -> tuple[Tokens, Tokens]:
    """Two sequences with a common stem; the first continues with the token `first`, below the second's."""
    stem, tail, other = (_random(_LATE, network, seed=seed).ids for seed in (4, 4 + first, 7))
    ids = [np.concatenate([stem, [first], tail]), np.concatenate([stem, [3], other[:9]])]
    return all_supervised(ids[0].astype(np.int32)), all_supervised(ids[1].astype(np.int32))


def _tree(sequences: tuple[Tokens, Tokens]) -> MicroBatch:
    (batch,) = make_micro_batches(Given(sequences), range(2), capacity=4 * _LATE, share=True)
    return batch


def _rope_switch_length(config: Any) -> int | None:
    """The length from which on a row's positions are computed otherwise, all of them (transformers' `longrope`)."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = rope.values() if all(isinstance(kind, dict) for kind in rope.values()) else [rope]
    for kind in kinds:
        if kind.get("rope_type") in ("longrope", "dynamic"):
            return int(kind.get("original_max_position_embeddings") or config.max_position_embeddings)
    return None


def _row(*sequences: Tokens) -> MicroBatch:
    (batch,) = make_micro_batches(Given(sequences), range(len(sequences)), capacity=_EARLY + _LATE)
    return batch
