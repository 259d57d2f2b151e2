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
from lorasft.model.free_memory import free_memory, out_of_memory
from lorasft.model.recompute import decoder_layers, recompute, recomputed_layers
from lorasft.train.layout import run_adapter
from lorasft.train.state import Run
from lorasft.train.suggestions import Case, find_suggestions

Result = TypeVar("Result")


class MicroBatchTooLarge(CapacityError):
    """A micro-batch did not fit: its tokens, and those of its longest sequence, below which it cannot be cut."""

    tokens = longest = 0


@contextmanager
def oom_context(rows: TokenStore, batch: MicroBatch) -> Iterator[None]:
    """Turn the device's out-of-memory error into a MicroBatchTooLarge that names the rows and what would help."""
    try:
        yield
    except (RuntimeError, MemoryError) as fault:
        if not out_of_memory(fault):
            raise
        examples = sorted(set(batch.examples.tolist()))
        lengths = [max(len(tokens) for tokens in rows.sequences(example)) for example in examples[:5]]
        places = [
            f"{rows.place(example)} ({length} tokens)" for example, length in zip(examples, lengths, strict=False)
        ]
        error = MicroBatchTooLarge(
            f"out of memory with {len(batch.ids)} tokens in a micro-batch of {len(examples)} rows",
            where=", ".join(places),
            hint="free memory and go on with --resume; or start anew with a smaller data.max_length, adapter.rank "
            "or model.base",
        )
        error.tokens, error.longest = len(batch.ids), int(batch.positions.max()) + 1
        raise error from fault


@contextmanager
def plain_oom_errors(folder: Path) -> Iterator[None]:
    """Turn an out-of-memory error that nothing is tried against, as in an update of the run in `folder`, into ours."""
    try:
        yield
    except (RuntimeError, MemoryError) as fault:
        if not out_of_memory(fault):
            raise
        reason = str(fault).strip().splitlines()[0] if str(fault) else "no memory is left"
        again = (
            "go on with --resume" if (folder / "recipe.yaml").is_file() else "start again, or with a smaller model.base"
        )
        raise CapacityError(f"out of memory: {reason}", hint=f"free memory and {again}") from fault


def retry_on_oom(run: Run, work: Callable[[Run], Result]) -> tuple[Result, Run]:
    """What `work` gives, and the run with the layout under which it fitted.

    `work` must change nothing before the last micro-batch is done. Raises CapacityError when nothing is left to try,
    and at once where several processes would have to try together.
    """
    if run.ranks.count > 1:
        return work(run), run
    while True:
        try:
            return work(run), run
        except MicroBatchTooLarge as caught:
            fault = caught.with_traceback(None)
            fault.__cause__ = fault.__context__ = None
        gc.collect()  # here the frames are gone that held the tensors of the failed pass
        if run.network.device.type == "cuda":
            torch.cuda.empty_cache()
        run = reduce_memory(run, fault)


def suggest(run: Run, fault: MicroBatchTooLarge) -> str:
    """A hint with changes under which a run would fit that did not in its leanest layout, where they are computable."""
    network, again = run.network, "go on with --resume" if (run.folder / "recipe.yaml").is_file() else "start again"
    case = Case(
        run.recipe,
        run_adapter(run.recipe, run.learner.model),
        network.causal.config,
        network,
        memory=0,
        longest=fault.longest,
        tokens=None,
        recomputed=None,
    )
    try:
        free = free_memory(network.device)
        if not run.learner.optimizer.state:
            free -= case.prediction.static.upcoming
        free = min(free, case.prediction.activations.peak)  # whatever is said to be free: it was not enough
        found = find_suggestions(replace(case, memory=free - case.spare), run.rows)
    except (LookupError, TypeError, ValueError, RuntimeError, MemoryError):
        return str(fault.hint)
    return f"free memory and {again}; or start anew with one of: {'; '.join(found)}" if found else str(fault.hint)


def reduce_memory(run: Run, fault: MicroBatchTooLarge) -> Run:
    """The run in a layout that needs less, without the gradients of the pass that failed. Raises `fault` at the end."""
    run.learner.optimizer.zero_grad(set_to_none=True)
    layers = len(decoder_layers(run.network.causal))
    plan = run.plan
    if fault.tokens > fault.longest:
        plan = replace(plan, micro_batch_tokens=max(fault.longest, min(fault.tokens, plan.micro_batch_tokens) // 2))
        run.logbook.note(f"{fault.what}: from here on micro-batches of {plan.micro_batch_tokens} tokens")
    elif recomputed_layers(run.network.causal) < layers:
        recompute(run.network.causal, layers)
        run.logbook.note(f"{fault.what}: from here on all {layers} layers recomputed")
    else:
        fault.hint = suggest(run, fault)
        raise fault
    return replace(run, plan=plan)
