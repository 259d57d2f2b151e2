"""The heaviest micro-batch of a run, forwards and backwards, before the first step: what does not fit is met at once.

Nothing is updated and no random number is used up, so the losses of the run have the same bits with and without it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial

import torch

from lorasft.data.packing import Step
from lorasft.files import replace_file
from lorasft.model.linear import reserve_buffers
from lorasft.model.memory import Holdings, Prediction, predict
from lorasft.model.meter import make_meter
from lorasft.model.recompute import recomputed_layers
from lorasft.terminal import size_text
from lorasft.train.distributed import ALONE
from lorasft.train.layout import Fit, find_heaviest, measure_fit
from lorasft.train.loop import add_gradients
from lorasft.train.redo import within_memory
from lorasft.train.state import Run

_SHARE = 50  # micro-batches that a run must have for one of them to be run twice, unless memory is near
_NEAR = 0.5  # of what is free


@dataclass(frozen=True)
class MemoryRecord:
    """What a step was predicted to need and what the heaviest one was seen to take; `memory.json` of a run."""

    fit: Fit
    prediction: Prediction | None  # None: this model could not be measured
    measured: int | None  # bytes at the peak of the rehearsal; None: there was none
    early: int  # bytes that are not there yet when it is rehearsed

    def __str__(self) -> str:
        if self.prediction is None:
            return "memory: not predicted, this model calls its layers in a way not known here"
        free = self.prediction.total - self.prediction.activations - self.prediction.transient + self.fit.spare
        text = f"memory: {size_text(self.prediction.total)} at the peak of a step, of {size_text(free)}"
        if self.measured is None:
            return text
        expected, tokens = self.prediction.total - self.early, len(self.fit.heaviest.ids)
        seen = f"{size_text(self.measured)} with {size_text(expected)} predicted"
        return f"{text}; heaviest micro-batch ({tokens:,} tokens) rehearsed: {seen}"

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


def rehearse(run: Run, fit: Fit, holdings: Holdings) -> tuple[MemoryRecord, Run]:
    """Run the heaviest micro-batch where that is in proportion; the run with the layout under which it fitted.

    Raises CapacityError when it fits in no layout.
    """
    measured = None
    if is_worth_it(run, fit):
        measured, run = within_memory(run, partial(measure_rehearsal, fit=fit, holdings=holdings))
    recomputed = recomputed_layers(run.network.causal)
    if (run.plan.micro_batch_tokens, recomputed) != (fit.plan.micro_batch_tokens, fit.recomputed):
        fit = measure_fit(run.network, run.plan, run.rows, wanted=recomputed, spare=fit.spare)
    prediction = predict(holdings, fit.footprint, recomputed=fit.recomputed) if fit.footprint else None
    return MemoryRecord(fit, prediction, measured, early=0 if run.learner.optimizer.state else holdings.optimizer), run


def is_worth_it(run: Run, fit: Fit) -> bool:
    """Whether the rehearsal takes a small share of the run, or memory is near or not known."""
    known = fit.footprint is not None and fit.footprint.peak(fit.recomputed) < _NEAR * fit.spare
    return not known or run.plan.steps * len(run.plan.step(1, run.rows).micro_batches) >= _SHARE


def measure_rehearsal(run: Run, *, fit: Fit, holdings: Holdings) -> int:
    """Bytes at the peak of the run's heaviest micro-batch, weights included, with the gradients of one before it.

    Leaves no gradients behind.
    """
    batch = fit.heaviest if run.plan == fit.plan else find_heaviest(run.plan, run.rows)
    step, device = Step(1, 0.0, batch.examples, (batch,)), run.network.device
    run.network.causal.train()
    held = holdings.loaded + reserve_buffers(run.learner.model)
    held += holdings.optimizer if run.learner.optimizer.state else 0
    with torch.random.fork_rng([device] if device.type == "cuda" else []), make_meter(device) as meter:
        meter.restart()
        for parameter in run.learner.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        add_gradients(replace(run, ranks=ALONE), step)
        peak = meter.peak if device.type == "cuda" else held + meter.peak
    run.learner.optimizer.zero_grad(set_to_none=True)
    return peak
