"""What a run needs, predicted and measured: its heaviest micro-batch, forwards and backwards, before the first step.

It is run where the prediction does not see all, on GPUs and for models whose numbers decide what they compute, so that
what does not fit is met at once. Nothing is updated and no random number is used up: the losses keep their bits.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from lorasft.data.packing import Step
from lorasft.files import replace_file
from lorasft.model.memory import Prediction, StaticBytes, StorageMeter
from lorasft.model.recompute import recomputed_layers
from lorasft.model.weightless import plan_network
from lorasft.terminal import size_text
from lorasft.train.distributed import ALONE
from lorasft.train.layout import Fit, find_heaviest, measure_fit
from lorasft.train.loop import add_gradients
from lorasft.train.oom import retry_on_oom
from lorasft.train.state import Run


@dataclass(frozen=True)
class MemoryRecord:
    """What a step was predicted to need and what the heaviest one was seen to take; `memory.json` of a run."""

    fit: Fit
    prediction: Prediction | None  # None: this model cannot be run without numbers
    measured: int | None  # bytes at the peak of the heaviest micro-batch; None: it was not run
    early: int  # bytes that are not there yet when it is run

    def __str__(self) -> str:
        seen = f"; the heaviest micro-batch took {size_text(self.measured)}" if self.measured else ""
        if self.prediction is None:
            return f"memory: not predicted, this model computes by numbers{seen}"
        free = self.prediction.total - self.prediction.activations.peak + self.fit.spare
        return f"memory: {size_text(self.prediction.total)} at the peak of a step, of {size_text(free)}{seen}"

    def write(self, run: Run) -> None:
        """Put the record into the run's folder."""
        known = self.prediction
        record = {
            "device": str(run.network.device),
            "heaviest": {"tokens": len(self.fit.heaviest.ids), "sequences": len(self.fit.heaviest.segments)},
            "micro_batch_tokens": run.plan.micro_batch_tokens,
            "recomputed_layers": self.fit.recomputed,
            "predicted": {**known.kinds(), "peak": known.total} if known else None,
            "rehearsal": {"predicted": known.total - self.early if known else None, "measured": self.measured},
        }
        replace_file(run.folder / "memory.json", json.dumps(record, indent=1).encode())


def run_heaviest_batch(run: Run, weightless: Any, fit: Fit, static: StaticBytes) -> tuple[MemoryRecord, Run]:
    """Run the heaviest micro-batch where its memory is not known; the run with the layout under which it fitted.

    Raises CapacityError when it fits in no layout.
    """
    measured = None
    if sees_too_little(run, fit):
        measured, run = retry_on_oom(run, partial(_measure_heaviest, fit=fit, static=static))
    recomputed = recomputed_layers(run.network.causal)
    if (run.plan.micro_batch_tokens, recomputed) != (fit.plan.micro_batch_tokens, fit.recomputed):
        network = plan_network(run.network, weightless)
        fit = measure_fit(network, run.plan, run.rows, wanted=recomputed, spare=fit.spare)
    prediction = Prediction(static, fit.needs) if fit.needs else None
    return MemoryRecord(fit, prediction, measured, early=0 if run.learner.optimizer.state else static.optimizer), run


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
