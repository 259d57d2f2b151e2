"""What a run will take before it is started: bytes by kind, a layout, and time. No weights are read for it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

from lorasft.artifact import find_artifact
from lorasft.data.packing import cost
from lorasft.data.prepare import Prepared
from lorasft.data.store import example_lengths
from lorasft.errors import ModelError
from lorasft.model.free_memory import free_memory
from lorasft.model.memory import Prediction, static_bytes
from lorasft.model.timing import Timing, time_sample
from lorasft.model.weightless import Sample, make_weightless
from lorasft.recipe import Recipe
from lorasft.train.layout import Fit, choose_layout, recompute_wish, started_adapter
from lorasft.train.run import make_plan, probe, read_checked_config, read_data
from lorasft.train.suggestions import Case, find_suggestions

_LIBRARIES = 1 << 29  # bytes of a card of a given size that its driver and the libraries take
_STEPS_TIMED = 16  # whose micro-batches stand for those of the run


@dataclass(frozen=True)
class Duration:
    """How long a run will take, by the time that one layer of each kind takes on few tokens."""

    examples_per_second: float
    supervised_tokens_per_second: float
    training: float  # seconds
    evaluation: float  # seconds


@dataclass(frozen=True)
class RunPlan:
    """How a recipe fits a machine."""

    device: str
    dtype: str
    memory: int  # bytes that it is fitted to: those given, or those that are free
    given: bool
    libraries: int  # bytes of it that are not ours
    prediction: Prediction
    fit: Fit
    remedies: tuple[str, ...]  # single changes with which it would fit
    saved_by_8bit: int  # bytes
    steps: int
    examples: int
    duration: Duration
    notices: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """What a program may want to read."""
        values = {name: value for name, value in vars(self).items() if name not in ("prediction", "fit")}
        heaviest = self.fit.heaviest
        return values | {
            "micro_batch_tokens": self.fit.plan.micro_batch_tokens,
            "layers": self.fit.layers,
            "recomputed_layers": self.fit.recomputed,
            "holds": self.fit.holds,
            "bytes": self.prediction.kinds(),
            "peak": self.prediction.total + self.libraries,
            "heaviest": {"tokens": len(heaviest.ids), "sequences": len(heaviest.segments)},
            "duration": vars(self.duration),
        }


def plan_run(recipe: Recipe, *, memory: int | None) -> RunPlan:
    """Fit `recipe` to `memory` bytes, or to what is free on the device at hand. Leaves nothing on the disk.

    Raises what a start of the run would raise before its weights are read, and ModelError for a model that cannot be
    run without them.
    """
    config = read_checked_config(recipe)
    with tempfile.TemporaryDirectory() as folder:
        _, prepared = read_data(recipe, config, Path(folder))
        return _plan_prepared(recipe, config, prepared, memory=memory)


def _plan_prepared(recipe: Recipe, config: Any, prepared: Prepared, *, memory: int | None) -> RunPlan:
    device, rows = PartialState().device, prepared.train
    libraries = 0 if memory is None else _LIBRARIES
    given = free_memory(device) if memory is None else memory
    plan = make_plan(recipe, examples=len(rows), device=device, saved=None)
    adapter = recipe.adapter
    if adapter.start:
        artifact = find_artifact(adapter.start, base="-")  # its base is the recipe's
        artifact.require_adapter()
        adapter = started_adapter(adapter, artifact.adapter_config)
    model = make_weightless(config, recipe.model, adapter, device)
    sample = Sample(model, config, recipe.model, adapter, device)
    network = probe(recipe, sample.model, saved=None)
    static = static_bytes(model, recipe.optimizer.name)
    spare = given - libraries - static.loaded - static.upcoming
    network, fit = choose_layout(recipe, network, model, plan=plan, rows=rows, saved=None, spare=spare)
    if fit.needs is None:
        raise ModelError(
            "this model cannot be planned: it computes by numbers, not only shapes", where=recipe.model.base
        )
    pinned, longest = recipe.machine.micro_batch_tokens, int(example_lengths(rows).max())
    case = Case(
        recipe,
        adapter,
        config,
        network,
        memory=given - libraries,
        longest=longest,
        tokens=None if pinned == "auto" else pinned,
        recomputed=recompute_wish(recipe, replace(network, causal=model.get_base_model()), saved=None),
    )
    supervised = fit.plan.step(1, rows).supervised_tokens / fit.computed
    timing = time_sample(
        network,
        sample,
        length=max(1, rows.count_tokens() // len(rows)),
        supervised=supervised,
        vocabulary=config.get_text_config().vocab_size,
    )
    return RunPlan(
        device=str(device),
        dtype=str(network.causal.dtype).removeprefix("torch."),
        memory=given,
        given=memory is not None,
        libraries=libraries,
        prediction=Prediction(static, fit.needs),
        fit=fit,
        remedies=() if fit.holds else tuple(find_suggestions(case, rows)),
        saved_by_8bit=static.optimizer - static_bytes(model, "adamw8bit").optimizer,
        steps=plan.steps,
        examples=len(rows),
        duration=predict_duration(recipe, timing, fit, prepared),
        notices=network.notices,
    )


def predict_duration(recipe: Recipe, timing: Timing, fit: Fit, prepared: Prepared) -> Duration:
    """How long the run takes, by the micro-batches of its first steps."""
    steps = [fit.plan.step(number, prepared.train) for number in range(1, min(_STEPS_TIMED, fit.plan.steps) + 1)]
    costs = [cost(batch) for step in steps for batch in step.micro_batches]
    forward, both, layers = timing.predict(costs)
    per_step = (both + layers * fit.recomputed / max(1, fit.layers)) / len(steps)
    held_out = 0 if prepared.held_out is None else prepared.held_out.count_tokens()
    every = recipe.run.eval_every
    evaluations = 2 + (fit.plan.steps // every if every else 0)
    return Duration(
        examples_per_second=float(np.mean([len(step.examples) for step in steps])) / per_step,
        supervised_tokens_per_second=float(np.mean([step.supervised_tokens for step in steps])) / per_step,
        training=fit.plan.steps * per_step,
        evaluation=evaluations * held_out / sum(costs) * forward,
    )
