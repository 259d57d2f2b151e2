"""What a run needs, predicted and measured: its heaviest micro-batch, forwards and backwards, before the first step.

It is run where the prediction does not see all, on GPUs and for models whose numbers decide what they compute, so that
what does not fit is met at once. Nothing is updated and no random number is used up: the losses keep their bits.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from lorasft.data.packing import Step
from lorasft.model.memory import Prediction, StaticBytes, StorageMeter
from lorasft.model.recompute import recomputed_layers
from lorasft.model.weightless import plan_network
from lorasft.terminal import size_text
from lorasft.train.distributed import ALONE
from lorasft.train.layout import Fit, find_heaviest, measure_fit
from lorasft.train.loop import add_gradients
from lorasft.train.oom import retry_on_oom
from lorasft.train.state import Run


def run_heaviest_batch(run: Run, weightless: Any, fit: Fit, static: StaticBytes) -> tuple[dict[str, Any], Run]:
    """Run the heaviest micro-batch where its memory is not known.

    Returns what `memory.json` holds (bytes; null where a number is not known), and the run with the layout under which
    it fitted. Raises CapacityError when it fits in no layout.
    """
    measured = None
    if sees_too_little(run, fit):
        measured, run = retry_on_oom(run, partial(_measure_heaviest, fit=fit, static=static))
    recomputed = recomputed_layers(run.network.causal)
    if (run.plan.micro_batch_tokens, recomputed) != (fit.plan.micro_batch_tokens, fit.recomputed):
        network = plan_network(run.network, weightless)
        fit = measure_fit(network, run.plan, run.rows, wanted=recomputed, spare=fit.spare)
    known = Prediction(static, fit.needs) if fit.needs else None
    early = 0 if run.learner.optimizer.state else static.optimizer  # not there yet when it is run
    record = {
        "device": str(run.network.device),
        "heaviest": {"tokens": len(fit.heaviest.ids), "sequences": len(fit.heaviest.segments)},
        "micro_batch_tokens": run.plan.micro_batch_tokens,
        "recomputed_layers": recomputed,
        "free": static.loaded + static.upcoming + fit.spare,
        "predicted": {**known.kinds(), "peak": known.total} if known else None,
        "rehearsal": {"predicted": known.total - early if known else None, "measured": measured},
    }
    return record, run


def describe_memory(record: dict[str, Any]) -> str:
    """A line on what `run_heaviest_batch` found."""
    predicted, measured = record["predicted"], record["rehearsal"]["measured"]
    seen = f"; the heaviest micro-batch took {size_text(measured)}" if measured else ""
    if predicted is None:
        return f"memory: not predicted, this model computes by numbers{seen}"
    return f"memory: {size_text(predicted['peak'])} at the peak of a step, of {size_text(record['free'])}{seen}"


def sees_too_little(run: Run, fit: Fit) -> bool:
    """Whether the prediction may miss something: the work space of a GPU's operations, or all of it."""
    return fit.needs is None or run.network.device.type == "cuda"


def _measure_heaviest(run: Run, *, fit: Fit, static: StaticBytes) -> int:
    """Bytes at the peak of the run's heaviest micro-batch, weights included, with the gradients of one before it.

    Leaves no gradients behind.
    """
    batch = fit.heaviest if run.plan == fit.plan else find_heaviest(run.plan, run.rows)
    step, device = Step(1, 0.0, batch.examples, (batch,)), run.network.device
    on_cuda = device.type == "cuda"
    run.network.causal.train()
    for parameter in run.learner.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    with torch.random.fork_rng([device] if on_cuda else []):
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(device)
            add_gradients(replace(run, ranks=ALONE), step)
            peak = torch.cuda.max_memory_allocated(device)
        else:
            held = static.loaded + static.gradients + (static.optimizer if run.learner.optimizer.state else 0)
            with StorageMeter() as meter:
                add_gradients(replace(run, ranks=ALONE), step)
            peak = held + meter.peak
    run.learner.optimizer.zero_grad(set_to_none=True)
    return peak
