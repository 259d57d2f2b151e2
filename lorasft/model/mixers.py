"""Recurrences and convolutions over tokens, through which one sequence of a row would reach the next.

Such modules are called for each segment of a row, for those of about one length as a right-padded batch, as a causal
module does not look ahead; all else of a model stays flat.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import tree_map

from lorasft.model.attention import Paths

_BATCHES = 6  # for each doubling of the length: at most 11 % of a batch are padding


def call_by_segment(causal: Any, kind: type[nn.Module] | None) -> None:
    """Have the modules of this `kind`, and no others, called for each segment of the row that `causal` computes."""
    for module in causal.modules():
        if type(module) is kind:
            module.forward = partial(_call, causal, module)
        elif getattr(module.forward, "func", None) is _call:
            del module.forward


def _call(causal: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
    """What `module` gives for all segments, as one row; beside it are states, of the last ones."""
    module.training = False  # else a fused kernel may read weights of linears past their adapters and 4-bit codes
    forward, lengths = type(module).forward, list(getattr(causal, "row", ()))
    if len(lengths) < 2:
        return forward(module, *args, **kwargs)
    rows: dict[int, Tensor] = {}
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for _, group in groupby(order, lambda number: int(_BATCHES * math.log2(lengths[number]))):
        numbers = list(group)
        given, named = tree_map(partial(_take, lengths, numbers), (args, kwargs))
        output = forward(module, *given, **named)
        rows |= zip(numbers, output[0] if isinstance(output, tuple) else output, strict=True)
    row = torch.cat([rows[number][:length] for number, length in enumerate(lengths)]).unsqueeze(0)
    return (row, *output[1:]) if isinstance(output, tuple) else row


def _take(lengths: list[int], numbers: Sequence[int], one: Any) -> Any:
    """Of a tensor (1, tokens, ...) the segments with these numbers: (segments, tokens of the longest, ...)."""
    if not isinstance(one, Tensor) or one.shape[:2] != (1, sum(lengths)):
        return None if isinstance(one, Paths) else one  # attention by segment would be another's
    parts = torch.split(one.squeeze(0), lengths)
    return pad_sequence([parts[number] for number in numbers], batch_first=True)
