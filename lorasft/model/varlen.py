"""Attention of all segments in one kernel: torch's own FlashAttention over sequences of unequal lengths (CUDA)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Varlen:
    """Where each segment's queries and keys begin, and the longest of them."""

    queries: Tensor  # (segments + 1,) int32
    keys: Tensor  # (segments + 1,) int32, into the gathered keys
    most_queries: int
    most_keys: int


def measure_paths(lengths: Sequence[int], ancestors: Sequence[Sequence[int]], *, device: torch.device) -> Varlen:
    """The metadata of segments of `lengths` tokens that see their `ancestors`, then themselves."""
    keys = [sum(lengths[number] for number in before) + own for before, own in zip(ancestors, lengths, strict=True)]
    starts = [torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=device) for sizes in (lengths, keys)]
    return Varlen(starts[0], starts[1], max(lengths), max(keys))


def attend_at_once(query: Tensor, key: Tensor, value: Tensor, varlen: Varlen, scale: float) -> Tensor:
    """query (1, heads, tokens, size), key and value (1, key heads, gathered, size) -> (1, tokens, heads, size).

    Causal from the bottom right; `verify` compares it with attention segment by segment before it is used. Raises
    RuntimeError or ValueError where torch or the device cannot do it.
    """
    from torch.nn.attention.varlen import varlen_attn

    output = varlen_attn(
        query[0].transpose(0, 1),  # (tokens, heads, size)
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        varlen.queries,
        varlen.keys,
        varlen.most_queries,
        varlen.most_keys,
        scale=scale,
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)
    return output.unsqueeze(0)
