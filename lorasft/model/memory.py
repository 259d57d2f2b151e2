"""What a step needs, before it is taken: the step itself, run on the meta device, where tensors have no numbers.

Nothing is looked up in a list of architectures: every operation of the model, of the loss and of their backward pass
is run on shapes alone, and the storages that live at a time are added up.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lorasft.data.packing import MicroBatch, make_micro_batches
from lorasft.data.store import all_supervised
from lorasft.model.adapter import trainable
from lorasft.model.base import count_bytes
from lorasft.model.loss import Network, pair_losses
from lorasft.model.recompute import decoder_layers, layer_period, only_first, recompute
from lorasft.model.tables import vocabulary_tables
from lorasft.model.trained import Trained

# Share of the free memory that is planned with: the rest is for fragments and other programs.
USABLE = 0.9


class StorageMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that operations allocate while the meter is entered, each once, until it is freed; not what
    an operation allocates inside itself."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What is given was there before the meter: a view of it is no new memory.
        self._add([args, *(kwargs or {}).values()], counted=False)
        made = func(*args, **(kwargs or {}))
        self._add(made, counted=True)
        return made

    def _add(self, value: Any, *, counted: bool) -> None:
        if isinstance(value, (list, tuple)):  # torch's trees would do the same in twice the time
            for one in value:
                self._add(one, counted=counted)
        if not isinstance(value, Tensor) or value.untyped_storage()._cdata in self._known:
            return
        storage = value.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if counted else 0

        def forget(_: Any) -> None:
            del self._known[key]
            self.live -= size

        self._known[key] = weakref.ref(storage, forget)
        self.live += size
        self.peak = max(self.peak, self.live)


@dataclass(frozen=True)
class ActivationMemory:
    """Bytes that a micro-batch needs beside the weights, the optimizer and the gradients."""

    kept: int  # between forward and backward
    peak: int
    copies: int = 0  # of weights, all the time; in the peak

    def fits(self, free: int) -> bool:
        """Whether the peak stays within 90 % of `free` bytes."""
        return self.peak <= USABLE * free

    @property
    def by_kind(self) -> dict[str, int]:
        """The bytes of the peak."""
        transient = self.peak - self.kept - self.copies
        return {"weight copies": self.copies, "activations": self.kept, "transient": transient}


def static_bytes(model: Any, optimizer: str, *, shard: int = 1) -> dict[str, int]:
    """What lives all through a run of a PEFT `model`, in bytes by kind, under the recipe's `optimizer.name`.

    An optimizer has two moments for each trained number; `adamw8bit` keeps those of few in fp32. Of a base over several
    processes (`shard`) two layers are gathered at a time, or embedding or head.
    """
    trained = trainable(model)
    count = sum(one.numel() for one in trained.values())
    moments = 8 * count if optimizer == "adamw" or count < 4096 else 2 * count + 8 * -(-count // 256)
    lora = sum(one.numel() for name, one in trained.items() if ".lora_" in name)
    copies = 2 * lora if model.get_base_model().dtype.itemsize == 2 else 0
    base = model.get_base_model()
    units = [2 * count_bytes(layer)["4-bit weights"] for layer in decoder_layers(base)] if shard > 1 else [0]
    units += [one.weight.nbytes for one in vocabulary_tables(base)] if shard > 1 else []
    sizes = {"gradients": 4 * count, "optimizer": moments, "16-bit copies": copies, "gathered": max(units)}
    return {**count_bytes(model, shard=shard), **sizes}


def dry_run(
    network: Network, batch: MicroBatch, *, recomputed: int, run: Callable[[int, int], ActivationMemory] | None = None
) -> ActivationMemory:
    """Run `batch` forwards and backwards on a `network` without weights, whose first `recomputed` layers recompute.

    Where the kinds of layers repeat, and those that do not recompute are whole periods, few layers are run, and what
    more of them add is added. `run`: `run_layers` on these two, which may remember what it found for an earlier call.
    Raises RuntimeError, NotImplementedError among them, where the model reads numbers to decide what it computes.
    """
    run = run or partial(run_layers, network, batch)
    count, period = len(decoder_layers(network.causal)), layer_period(network.causal)
    fewer, left = max(2, period + count % (period or 1)), count - recomputed
    if not period or fewer + period >= count or (recomputed and left % period):
        return run(count, recomputed)
    short, long = (run(depth, min(recomputed, 1) * depth) for depth in (fewer, fewer + period))
    each, times = long.kept - short.kept, (count - fewer) // period
    if each != long.peak - short.peak:  # the peak is not where it is in a deep model
        return run(count, recomputed)
    kept, peak = short.kept + times * each, short.peak + times * each
    if recomputed and left:  # the last keep more, and going back through them takes what it does where none recomputes
        plain, mixed = (run(fewer, number) for number in (0, fewer - period))
        kept += left // period * (mixed.kept - short.kept)
        peak = max(peak - left // period * each, kept + plain.peak - plain.kept)
    return ActivationMemory(kept, peak)


def run_layers(network: Network, batch: MicroBatch, depth: int, recomputed: int) -> ActivationMemory:
    """What `batch` needs on the first `depth` layers of `network`, of which the first `recomputed` recompute."""
    with only_first(network.causal, depth):
        recompute(network.causal, recomputed)
        network.causal.train()
        network.causal.frozen_weights.forget(network.causal.frozen_weights.keep)
        Trained(network.causal, network.causal.dtype)  # with gradients and copies, which `static_bytes` counts
        with _shapes_alone(), StorageMeter() as meter:
            loss = pair_losses(network, batch).sum()
            kept = meter.live
            loss.backward()  # type: ignore[no-untyped-call]
            return ActivationMemory(kept, meter.peak)


@contextlib.contextmanager
def _shapes_alone() -> Iterator[None]:
    """Let no one read numbers, and attention allocate what it does on a device."""
    general = F.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
               is_causal: bool = False, **options: Any) -> Tensor:  # fmt: skip
        """torch's fused attention, which it does not choose by itself on the meta device."""
        if dropout_p or query.shape[-1] != value.shape[-1]:
            return general(query, key, value, attn_mask, dropout_p, is_causal, **options)
        mask = torch.empty_like(attn_mask, dtype=query.dtype) if attn_mask is not None else None
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return fused(query, key, value, attn_mask=mask)[0]  # type: ignore[no-any-return]

    with (
        patch("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None),
        patch("transformers.integrations.hub_kernels.is_torchdynamo_exporting", lambda: True),  # fla reads numbers
        patch("transformers.integrations.moe._grouped_mm", lambda rows, experts, offs: rows @ experts[0]),
        patch("torch.nn.functional.scaled_dot_product_attention", attend),
    ):
        yield


def heaviest_batch(network: Network, *, longest: int, capacity: int, supervised: float = 1.0) -> MicroBatch:
    """A micro-batch that none of a run exceeds: full, of sequences as long as `longest` tokens, the end of each
    supervised, or all."""
    capacity = max(longest, capacity if network.segments else 1)
    lengths = [*[longest] * (capacity // longest), capacity % longest]
    vocabulary = network.causal.config.get_text_config().vocab_size
    draw = np.random.default_rng(0)
    given = [draw.integers(0, vocabulary, length + 1).astype(np.int32) for length in lengths if length]
    rows = [all_supervised(ids, start=1 + int((1 - supervised) * (len(ids) - 1))) for ids in given]
    (batch,) = make_micro_batches(lambda index: (rows[index],), range(len(rows)), capacity=capacity)
    return batch
