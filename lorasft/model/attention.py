"""Attention over segments: one entry for every backend, registered with transformers by name.

A flat row holds several sequences; each segment's queries see the segment's keys and nothing else. No mask of
size tokens x tokens is ever built. The segments reach `attend` as a keyword argument of the model's forward.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface

from lorasft.data.packing import Spread
from lorasft.model.towers import model_class

SEGMENTS = "lorasft_segments"
_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash = torch.ops.aten._flash_attention_forward
_attend_back = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_flash_back = torch.ops.aten._flash_attention_backward
_BLOCK = 512  # queries that look through a window at a time on a CPU: few enough for a small mask


class Stretch(NamedTuple):
    """Queries of a row and keys that all of them see; a segment's own keys only up to each query."""

    queries: slice
    keys: slice
    causal: bool
    window: int | None = None  # the last keys that a query sees, its own among them; None: as many as there are


class Shape(NamedTuple):
    """What decides whether a kernel can compute a call of attention."""

    heads: tuple[int, ...]  # of queries, keys and values
    sizes: tuple[int, ...]  # of a head of each
    windowed: bool
    open_scores: bool  # soft caps, or sinks that are trained
    sinks: bool = False


@dataclass(frozen=True)
class Paths:
    """The segments of a row as attention reads them, made once for a micro-batch and all layers."""

    lengths: list[int]  # tokens of each segment
    ancestors: list[tuple[int, ...]]  # numbers of segments, or of pieces
    cascade: bool = True  # on a CPU: by CascadeAttention where it can
    kernel: Callable[[Shape], bool] | None = None  # whether one computes all segments of a layer
    places: Sequence[Tensor] = ()  # `numbers`, on the device of the row
    spread: Spread | None = None  # the row is computed by several processes

    @cached_property
    def keys(self) -> list[slice]:
        """Where the keys of each segment, or of each piece of all processes, are in a row of `collect`."""
        if self.spread:
            starts, lengths = self.spread.starts, self.spread.lengths
            return [slice(start, start + length) for start, length in zip(starts, lengths, strict=True)]
        return [slice(start, end) for start, end in pairwise(accumulate(self.lengths, initial=0))]

    @property
    def seen(self) -> Iterator[tuple[tuple[int, ...], int]]:
        """The numbers of what each segment sees, and its own."""
        return zip(self.ancestors, self.spread.own if self.spread else range(len(self.lengths)), strict=True)

    @cached_property
    def stretches(self) -> list[Stretch]:
        """What each segment sees: its own tokens, then its ancestors', which their readers share."""
        queries = [slice(start, end) for start, end in pairwise(accumulate(self.lengths, initial=0))]
        own = [Stretch(part, self.keys[number], True) for part, (_, number) in zip(queries, self.seen, strict=True)]
        shared: dict[int, list[slice]] = {}
        for part, before in zip(queries, self.ancestors, strict=True):
            for number in before:
                readers = shared.setdefault(number, [])
                if readers and readers[-1].stop == part.start:
                    readers[-1] = slice(readers[-1].start, part.stop)
                else:
                    readers.append(part)
        below = [Stretch(part, self.keys[number], False) for number, readers in shared.items() for part in readers]
        return [*own, *below]

    def windows(self, window: int) -> list[Stretch]:
        """What each segment sees through a window, a block of its queries at a time; keys are those of `gather`."""
        step, begin, first, found = min(window, _BLOCK), 0, 0, []
        for length, seen in zip(self.lengths, self.key_counts, strict=True):
            own = first + seen - length  # where its own keys begin
            for start in range(0, length, step):
                stop = min(start + step, length)
                keys = slice(max(first, own + start - window + 1), own + stop)
                found.append(Stretch(slice(begin + start, begin + stop), keys, True, window))
            begin, first = begin + length, first + seen
        return found

    @cached_property
    def key_counts(self) -> list[int]:
        """How many keys each segment sees: its ancestors' and its own."""
        return [sum(self.keys[one].stop - self.keys[one].start for one in (*before, own)) for before, own in self.seen]

    @cached_property
    def numbers(self) -> list[NDArray[np.int32]]:
        """Where each segment's queries, and the keys it sees, begin: (segments + 1,) each; the keys' places (keys,)."""
        starts = [np.cumsum([0, *sizes], dtype=np.int32) for sizes in (self.lengths, self.key_counts)]
        seen = [self.keys[one] for before, number in self.seen for one in (*before, number)]
        return [*starts, np.concatenate([np.arange(one.start, one.stop, dtype=np.int32) for one in seen])]

    def gather(self, row: Tensor) -> Tensor:
        """What each segment sees of `row` (1, heads, tokens, size), in turn: `row` itself where none has ancestors.

        On a GPU gradients of what many see are added up in fp32: in 16 bits, of 500 answers, they were a tenth off.
        """
        row = self.collect(row)
        if not any(self.ancestors) and not self.spread:
            return row
        index = self.places[2] if self.places else torch.from_numpy(self.numbers[2])
        kept = row.dtype if self.cascade else torch.promote_types(row.dtype, torch.float32)
        return row.transpose(1, 2).to(kept).index_select(1, index).to(row.dtype).transpose(1, 2)

    def collect(self, row: Tensor) -> Tensor:
        """`row` (1, heads, tokens, size) with those of the other processes, where it is spread over several."""
        if not self.spread:
            return row
        row = F.pad(row, (0, 0, 0, self.spread.size - row.shape[2]))
        return Collected.apply(row, self.spread.processes)  # type: ignore[no-any-return, no-untyped-call]


class Collected(torch.autograd.Function):
    """row (1, heads, tokens, size) of each process -> (1, heads, processes x tokens, size), one after the other."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, processes: int) -> Tensor:
        rows = [torch.empty_like(row, memory_format=torch.contiguous_format) for _ in range(processes)]
        if not row.is_meta:
            torch.distributed.all_gather(rows, row.contiguous())
        ctx.processes = processes
        return torch.cat(rows, dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        parts = [one.contiguous() for one in upstream.chunk(ctx.processes, dim=2)]
        own = torch.empty_like(parts[0])
        if not own.is_meta:
            torch.distributed.reduce_scatter(own, parts)
        return own, None


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
    segments: Paths | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of each segment over its keys. Returns ((1, tokens, heads, head size), None).

    Raises RuntimeError without segments: falling back to dense attention would leak between sequences silently.
    """
    if segments is None:
        raise RuntimeError("segment attention was called without segments")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    open_scores = softcap is not None or (s_aux is not None and s_aux.requires_grad)
    if not (open_scores or dropout) and segments.cascade and query.shape[-1] == value.shape[-1]:
        stretches, seen = segments.stretches, (segments.collect(key), segments.collect(value))
        if sliding_window is not None and max(segments.key_counts) > sliding_window:
            stretches, seen = segments.windows(sliding_window), (segments.gather(key), segments.gather(value))
        output: Tensor = CascadeAttention.apply(query, *seen, s_aux, stretches, scale)  # type: ignore[no-untyped-call]
        return output, None
    keys, values = segments.gather(key), segments.gather(value)
    heads, sizes = zip(*(row.shape[1::2] for row in (query, key, value)), strict=True)
    shape = Shape(heads, sizes, sliding_window is not None, open_scores, sinks=s_aux is not None)
    if segments.kernel and segments.kernel(shape):
        # torch's FlashAttention, causal from the bottom right: a window counts along the keys. `varlen_attn` around it
        # takes other arguments in each of torch 2.10, 2.11 and 2.12.
        q, k, v = (row.squeeze(0).transpose(0, 1) for row in (query, keys, values))  # (tokens, heads, size)
        begun, longest = segments.places[:2], (max(segments.lengths), max(segments.key_counts))
        given = (*begun, *longest, dropout, not sliding_window)
        how = {"scale": scale, "window_size_left": (sliding_window or 0) - 1, "window_size_right": 0}  # -1: no window
        if s_aux is not None:
            return SinkAttention.apply(q, k, v, s_aux, given, how).unsqueeze(0), None  # type: ignore[no-untyped-call]
        return _flash(q, k, v, *given, False, **how)[0].unsqueeze(0), None
    outputs = []
    parts = [torch.split(row, segments.key_counts, dim=2) for row in (keys, values)]
    for q, k, v in zip(torch.split(query, segments.lengths, dim=2), *parts, strict=True):
        if softcap is not None or s_aux is not None:  # Gemma 2, gpt-oss: the model's own function
            own, mask = sys.modules[type(module).__module__].eager_attention_forward, _causal(q, k, sliding_window)
            rows = own(module, q, k, v, mask, scaling=scale, dropout=dropout, softcap=softcap)[0].transpose(1, 2)
        else:
            limits, grouped = _limits(q, k, True, sliding_window), q.shape[1] != k.shape[1]
            rows = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale, enable_gqa=grouped, **limits)
        outputs.append(rows)
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


class CascadeAttention(torch.autograd.Function):
    """query (1, heads, tokens, size), key and value (1, key heads, tokens, size), sinks (heads,), frozen, or None ->
    (1, tokens, heads, size), on a CPU.

    A shared prefix is read once for all that follow it: torch's kernel attends to one stretch of keys and tells the log
    of its softmax's denominator, by which the stretches of a segment are merged (Ye et al. 2024, cascade inference); a
    sink is one without keys.
    With the merged output and denominator the kernel's own backward pass gives each stretch its exact share of the
    gradients (Liu et al. 2023, ring attention). It runs in fp32 also where the rest has 16 bits: torch 2.13 compiles a
    kernel of 16 bits for each shape anew, 2 to 9 times as slow, and the gradients are nearer to the truth.

    Kept for it: the three inputs, the output, which the next projection keeps as well, a number a token and head.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, given: list[Stretch], scale: float
    ) -> Tensor:
        output = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
        rows = output.transpose(1, 2)
        logs = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
        for queries, keys, causal, window in given:
            q, k, v = query[:, :, queries], key[:, :, keys], value[:, :, keys]
            part, log = _attend(q, k, v, 0.0, **_limits(q, k, causal, window), scale=scale)
            if causal:  # the first that these queries see
                rows[:, :, queries], logs[:, :, queries] = part, log
                continue
            both = torch.logaddexp(logs[:, :, queries], log)
            before = rows[:, :, queries] * (logs[:, :, queries] - both).exp().unsqueeze(-1)
            rows[:, :, queries] = torch.addcmul(before, part, (log - both).exp().unsqueeze(-1))
            logs[:, :, queries] = both
        if sinks is not None:
            both = torch.logaddexp(logs, sinks.to(logs.dtype).unsqueeze(1))
            rows *= (logs - both).exp().unsqueeze(-1)
            logs = both
        ctx.save_for_backward(query, key, value, output, logs)
        ctx.stretches, ctx.scale = given, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, logs = ctx.saved_tensors
        gradients = [torch.zeros_like(tensor) for tensor in (query, key, value)]
        for queries, keys, causal, window in ctx.stretches:
            places = (queries, queries, keys, keys, queries)
            rows = (upstream.transpose(1, 2), query, key, value, output.transpose(1, 2))
            exact = [row[:, :, place].to(logs.dtype) for row, place in zip(rows, places, strict=True)]
            limits = _limits(exact[1], exact[2], causal, window)
            parts = _attend_back(*exact, logs[:, :, queries], 0.0, **limits, scale=ctx.scale)
            for gradient, place, part in zip(gradients, (queries, keys, keys), parts, strict=True):
                gradient[:, :, place] += part
        return *gradients, None, None, None


class SinkAttention(torch.autograd.Function):
    """query (queries, heads, size), key and value (keys, key heads, size), sinks (heads,) -> (queries, heads, size), on
    CUDA: as in CascadeAttention sinks are frozen, and merged by the logs."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, given: Any, how: Any) -> Tensor:
        output: Tensor
        output, log, *state = _flash(query, key, value, *given, False, **how)  # log: (heads, queries) fp32
        both = torch.logaddexp(log, sinks.to(log.dtype).unsqueeze(1))
        output *= (log - both).exp().t().unsqueeze(-1)
        ctx.save_for_backward(query, key, value, output, both, *state[:2])
        ctx.given, ctx.how = given, how
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        *rows, log, state, unused = ctx.saved_tensors
        gradients = _flash_back(upstream.contiguous(), *rows, log, *ctx.given, state, unused, **ctx.how)
        return *gradients, None, None, None


def _limits(query: Tensor, key: Tensor, causal: bool, window: int | None) -> dict[str, Any]:
    """What a kernel is told of the keys that a query does not see; where all see all (not `causal`), nothing."""
    square = query.shape[2] == key.shape[2] and (window is None or key.shape[2] <= window)
    mask = _causal(query, key, window) if causal and not square else None
    return {"is_causal": causal and square, "attn_mask": mask}


def _causal(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """What is added to the scores, (1, 1, queries, keys): causal from the bottom right; a window counts along the keys,
    ancestors included.
    """
    keys = torch.arange(key.shape[2], device=key.device)
    ahead = keys - keys[key.shape[2] - query.shape[2] :].unsqueeze(1)
    seen = (ahead <= 0) if window is None else (ahead <= 0) & (ahead > -window)
    return torch.zeros_like(seen, dtype=query.dtype).masked_fill_(~seen, -torch.inf)[None, None]


def default_attention(config: Any) -> str:
    """The attention of transformers for generation and for sequences that go alone, named so that no config chooses.

    Models with soft caps or sinks (Gemma 2, gpt-oss) have no `sdpa`; before 5.23 it left out the soft caps.
    """
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return "sdpa" if getattr(model_class(config), "_supports_sdpa", False) and not capped else "eager"


@contextlib.contextmanager
def evaluating(model: Any, attention: str | None = None) -> Iterator[None]:
    """Let `model` evaluate, under an `attention` if one is named; then it is as it was before."""
    before, training = model.config._attn_implementation, model.training
    model.set_attn_implementation(attention or before)
    model.eval()
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        model.train(training)


# With no mask function of that name, transformers makes no mask (and looks for no packing, which would read numbers).
AttentionInterface.register(SEGMENTS, attend)
