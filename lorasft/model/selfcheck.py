"""Verify, then use the fast path: probes on the loaded model that decide how its losses are computed.

No list of supported models is trusted. A model that leaks between the segments of a row (hybrid and state-space
ones do) is run one sequence at a time; a head that does more than is known here is run through the model itself.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from lorasft.data.packing import MicroBatch, cut
from lorasft.data.tokens import Tokens
from lorasft.model.attention import SEGMENTS, attention
from lorasft.model.loss import Network, pair_losses, read_head
from lorasft.model.scoring import Given, everything

# Lengths of the probe sequences. The longer one stands first in a row, so it is what the other must not see.
_EARLY, _LATE = 24, 17


def verify(causal: Any, *, segments: bool = True) -> Network:
    """Probe `causal` and leave it under the attention that its losses will be computed with.

    Without `segments`, sequences go alone from the start.
    """
    training = causal.training
    causal.eval()
    network = Network(causal, head=None, segments=False)
    with torch.no_grad():
        if segments:
            network = _try_segments(network)
        if network.segments:
            causal.set_attn_implementation(SEGMENTS)
        network = _try_head(network)
    causal.train(training)
    return network


def _try_segments(plain: Network) -> Network:
    """Packed equals alone, and another first sequence leaves the losses of the second untouched."""
    vocabulary = plain.causal.config.get_text_config().vocab_size
    early, other = (_probe(_EARLY, vocabulary, seed=seed) for seed in (1, 2))
    late = _probe(_LATE, vocabulary, seed=3)
    alone = torch.cat([pair_losses(plain, _row(early)), pair_losses(plain, _row(late))])
    packed = replace(plain, segments=True)
    try:
        with attention(plain.causal, SEGMENTS):
            company = pair_losses(packed, _row(early, late))
            elsewhere = pair_losses(packed, _row(other, late))
    except (TypeError, ValueError, RuntimeError) as fault:
        return replace(plain, notices=(f"sequences go one at a time: no segment attention ({fault})",))
    # The same shapes run the same kernels, so what does not look at the first sequence has the same bits.
    leak = float((company - elsewhere)[_EARLY - 1 :].abs().max())
    drift = float((company - alone).abs().mean())
    if leak > 1e-6 or not drift <= _tolerance(plain.causal, alone):
        reason = f"losses move by {leak:.1e} with another neighbour and by {drift:.1e} in company"
        return replace(plain, notices=(f"sequences go one at a time: {reason}",))
    return packed


def _try_head(network: Network) -> Network:
    """The chunked loss equals the loss from the model's own logits."""
    head = read_head(network.causal)
    if head is None:
        return network
    row = _row(_probe(_EARLY, network.causal.config.get_text_config().vocab_size, seed=1))
    own = pair_losses(network, row)
    drift = float((own - pair_losses(replace(network, head=head), row)).abs().mean())
    if not drift <= _tolerance(network.causal, own):
        notice = f"the head does more than is known here (losses differ by {drift:.1e}): its own logits are used"
        return replace(network, notices=(*network.notices, notice))
    return replace(network, head=head)


def _tolerance(causal: Any, losses: torch.Tensor) -> float:
    """How far mean losses may differ by rounding alone, in the model's own precision."""
    return (1e-4 if causal.dtype == torch.float32 else 3e-2) * max(1.0, float(losses.abs().mean()))


def _probe(length: int, vocabulary: int, *, seed: int) -> Tokens:
    return everything(np.random.default_rng(seed).integers(0, vocabulary, length).astype(np.int32))


def _row(*sequences: Tokens) -> MicroBatch:
    (batch,) = cut(Given(sequences), range(len(sequences)), capacity=_EARLY + _LATE)
    return batch
