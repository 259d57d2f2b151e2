"""Out of memory: the work is cut smaller and done again, which changes nothing in the mathematics.

First micro-batches of half the tokens, down to the longest sequence; then all layers recompute their activations;
then nothing is left, and the run ends with the rows that did not fit.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from lorasft.data.packing import MicroBatch
from lorasft.data.store import TokenStore
from lorasft.errors import CapacityError
from lorasft.model.free_memory import out_of_memory
from lorasft.model.recompute import decoder_layers, recompute, recomputed_layers
from lorasft.terminal import say
from lorasft.train.state import Run

Result = TypeVar("Result")


class MicroBatchTooLarge(CapacityError):
    """A micro-batch did not fit: its tokens, and those of its longest sequence, below which it cannot be cut."""

    tokens = longest = 0


@contextmanager
def oom_context(rows: TokenStore, batch: MicroBatch) -> Iterator[None]:
    """Turn the device's out-of-memory error into a MicroBatchTooLarge that names the rows and what would help."""
    try:
        yield
    except (RuntimeError, MemoryError) as raised:
        if not out_of_memory(raised):
            raise
        examples = sorted(set(batch.examples.tolist()))
        places = (f"{rows.place(one)} ({max(map(len, rows.sequences(one)))} tokens)" for one in examples[:5])
        error = MicroBatchTooLarge(
            f"out of memory with {len(batch.ids)} tokens in a micro-batch of {len(examples)} rows",
            where=", ".join(places),
            hint="free memory and try again, with --resume if the run had begun; or start anew with a smaller "
            "data.max_length, adapter.rank or model.base: lorasft plan RECIPE --memory SIZE finds what fits",
        )
        error.tokens, error.longest = len(batch.ids), int(batch.positions.max()) + 1
        raise error from raised


@contextmanager
def plain_oom_errors(folder: Path) -> Iterator[None]:
    """Turn an out-of-memory error that cutting the work does not help, as in an update, into a CapacityError."""
    try:
        yield
    except (RuntimeError, MemoryError) as raised:
        if not out_of_memory(raised):
            raise
        begun = (folder / "recipe.yaml").is_file()
        again = "continue with --resume" if begun else "start again, or with a smaller model.base"
        reason, _, _ = str(raised).strip().partition("\n")
        raise CapacityError(f"out of memory: {reason}", hint=f"free memory and {again}") from raised


def retry_on_oom(run: Run, work: Callable[[], Result]) -> Result:
    """What `work` gives, done again with less memory until it fits.

    `work` must change nothing before the last micro-batch is done. Raises CapacityError when nothing is left to try,
    and at once where several processes would have to try together.
    """
    while True:
        try:
            return work()
        except MicroBatchTooLarge as caught:
            if run.ranks.count > 1:
                raise
            error = caught.with_traceback(None)
            error.__cause__ = error.__context__ = None
        gc.collect()  # here the frames are gone that held the tensors of the failed pass
        if run.network.device.type == "cuda":
            torch.cuda.empty_cache()
        reduce_memory(run, error)


def reduce_memory(run: Run, error: MicroBatchTooLarge) -> None:
    """Give `run` a layout that needs less, without the gradients of the pass that failed. Raises `error` at the end."""
    run.optimizer.zero_grad(set_to_none=True)
    layers, tokens = len(decoder_layers(run.network.causal)), run.plan.micro_batch_tokens
    if error.tokens > error.longest:
        run.plan = replace(run.plan, micro_batch_tokens=max(error.longest, min(error.tokens, tokens) // 2))
        say(f"{error.what}: from here on micro-batches of {run.plan.micro_batch_tokens} tokens")
    elif recomputed_layers(run.network.causal) < layers:
        recompute(run.network.causal, layers)
        say(f"{error.what}: from here on all {layers} layers recomputed")
    else:
        raise error
