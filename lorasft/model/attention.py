"""Attention over segments: one entry for every backend, registered with transformers by name.

A flat row holds several sequences; each segment's queries see the segment's keys and nothing else. No mask of
size tokens x tokens is ever built. The segments reach `attend` as a keyword argument of the model's forward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, AttentionMaskInterface

from lorasft.data.packing import Segment
from lorasft.model.brief import BriefAttention, is_brief

SEGMENTS = "lorasft_segments"


def attend(
    module: nn.Module,
    query: Tensor,  # (1, heads, tokens, head size)
    key: Tensor,  # (1, key heads, tokens, head size)
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    segments: Sequence[Segment] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of each segment over its keys. Returns ((1, tokens, heads, head size), None).

    Raises RuntimeError without segments: falling back to dense attention would leak between sequences silently.
    """
    if segments is None:
        raise RuntimeError("segment attention was called without segments")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    outputs = []
    for segment in segments:
        q = query[:, :, segment.start : segment.end]
        keys = segment.keys if isinstance(segment.keys, slice) else torch.as_tensor(segment.keys, device=key.device)
        k, v = key[:, :, keys], value[:, :, keys]
        windowed = sliding_window is not None and k.shape[2] > sliding_window
        mask = _causal(q, k, window=sliding_window) if windowed or q.shape[2] != k.shape[2] else None
        if softcap is None and s_aux is None:
            grouped = q.shape[1] != k.shape[1]
            options: dict[str, Any] = {
                "attn_mask": mask,
                "is_causal": mask is None,
                "scale": scale,
                "enable_gqa": grouped,
            }
            if dropout == 0 and is_brief(q, k):
                outputs.append(BriefAttention.apply(q, k, v, options))  # type: ignore[no-untyped-call]
            else:
                outputs.append(F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, **options))
        else:
            mask = _causal(q, k, window=sliding_window) if mask is None else mask
            outputs.append(_attend_openly(q, k, v, mask, scale=scale, dropout=dropout, softcap=softcap, sinks=s_aux))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _causal(query: Tensor, key: Tensor, *, window: int | None) -> Tensor:
    """(queries, keys) bool, causal from the bottom right; a window counts along the keys, ancestors included."""
    ahead = torch.arange(key.shape[2], device=key.device) - torch.arange(
        key.shape[2] - query.shape[2], key.shape[2], device=key.device
    ).unsqueeze(1)
    return (ahead <= 0) if window is None else (ahead <= 0) & (ahead > -window)


def _attend_openly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    scale: float,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """The general path: scores in the open, for soft caps (Gemma 2) and sinks (gpt-oss)."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.transpose(2, 3)) * scale  # (1, heads, queries, keys)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:  # a learned score per head that takes weight and gives no value
        scores = torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights[..., : key.shape[2]], dropout)
    return weights @ value


def default_attention(config: Any) -> str:
    """The attention of transformers for generation and for sequences that go alone, named so that no config chooses.

    Models with soft caps or sinks (Gemma 2, gpt-oss) have no `sdpa`.
    """
    return "sdpa" if MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_sdpa else "eager"


@contextlib.contextmanager
def attention(model: Any, name: str) -> Iterator[None]:
    """Run `model` under the attention `name` and restore the one that it had."""
    before = model.config._attn_implementation
    if before == name:
        yield
        return
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


AttentionInterface.register(SEGMENTS, attend)
AttentionMaskInterface.register(SEGMENTS, lambda *args, **kwargs: None)
