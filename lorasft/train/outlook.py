"""What a run will take before it is started: bytes by kind, a layout, and time. No weights are read for it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

from lorasft.artifact import find_artifact
from lorasft.data.packing import MicroBatch, cost
from lorasft.data.prepare import Prepared
from lorasft.errors import ModelError, RecipeError
from lorasft.model.memory import Prediction, count_holdings, predict
from lorasft.model.pace import time_layers
from lorasft.model.recompute import decoder_layers
from lorasft.model.room import free_memory
from lorasft.model.sample import make_sample
from lorasft.recipe import AdapterSettings, Recipe
from lorasft.train.layout import Fit, choose_layout, recompute_wish
from lorasft.train.remedies import Shortage, find_remedies
from lorasft.train.run import make_plan, probe, read_checked_config, read_data

_LIBRARIES = 1 << 29  # bytes of a card of a given size that its driver and the libraries take
_STEPS_TIMED = 16  # whose micro-batches stand for those of the run


@dataclass(frozen=True)
class Duration:
    """How long a run will take, extrapolated from one layer of each kind."""

    examples_per_second: float
    supervised_tokens_per_second: float
    training: float  # seconds
    evaluation: float  # seconds


@dataclass(frozen=True)
class Outlook:
    """How a recipe fits a machine."""

    device: str
    dtype: str
    memory: int  # bytes that it is fitted to: those given, or those that are free
    given: bool
    libraries: int  # bytes of it that are not ours
    prediction: Prediction
    micro_batch_tokens: int
    layers: int
    recomputed_layers: int
    heaviest: MicroBatch
    holds: bool
    remedies: tuple[str, ...]  # single changes with which it would fit
    saved_by_8bit: int  # bytes
    steps: int
    examples: int
    duration: Duration
    notices: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """What a program may want to read."""
        values = {name: value for name, value in vars(self).items() if name not in ("prediction", "heaviest")}
        return values | {
            "bytes": self.prediction.kinds(),
            "peak": self.prediction.total + self.libraries,
            "heaviest": {"tokens": len(self.heaviest.ids), "sequences": len(self.heaviest.segments)},
            "duration": vars(self.duration),
        }


def foresee(recipe: Recipe, *, memory: int | None) -> Outlook:
    """Fit `recipe` to `memory` bytes, or to what is free on the device at hand. Leaves nothing on the disk.

    Raises what a start of the run would raise before its weights are read, and ModelError for a model whose layers
    cannot be measured.
    """
    config = read_checked_config(recipe)
    with tempfile.TemporaryDirectory() as folder:
        _, prepared = read_data(recipe, config, Path(folder))
        return _foresee(recipe, config, prepared, memory=memory)


def _foresee(recipe: Recipe, config: Any, prepared: Prepared, *, memory: int | None) -> Outlook:
    device = PartialState().device
    libraries = 0 if memory is None else _LIBRARIES
    room = (free_memory(device) if memory is None else memory) - libraries
    plan = make_plan(recipe, examples=len(prepared.train), device=device, saved=None)
    adapter = started_adapter(recipe.adapter)
    if adapter.dora and recipe.model.quantization == "nf4":
        what, hint = (
            "DoRA on a 4-bit base starts from its weights, and a plan reads none",
            "plan with adapter.dora=false",
        )
        raise RecipeError(what, where="adapter.dora", hint=f"{hint}: it keeps a little more")
    sample = make_sample(config, recipe.model, adapter, device)
    network = probe(recipe, sample.model, saved=None)
    parts = [sample.model, *sample.copies]
    holdings = count_holdings(parts, recipe.optimizer.name)
    spare = room - holdings.loaded - holdings.upcoming
    network, layout, fit = choose_layout(recipe, network, plan=plan, rows=prepared.train, saved=None, spare=spare)
    if fit.footprint is None:
        raise ModelError("the layers of this model cannot be measured", where=recipe.model.base)
    rows, pinned = prepared.train, recipe.machine.micro_batch_tokens
    short = Shortage(
        fit.footprint,
        spare,
        tokens=None if pinned == "auto" else pinned,
        recomputed=recompute_wish(recipe, network, saved=None),
    )
    return Outlook(
        device=str(device),
        dtype=layout.dtype,
        memory=room + libraries,
        given=memory is not None,
        libraries=libraries,
        prediction=predict(holdings, fit.footprint, recomputed=fit.recomputed),
        micro_batch_tokens=layout.micro_batch_tokens,
        layers=len(decoder_layers(network.causal)),
        recomputed_layers=fit.recomputed,
        heaviest=fit.heaviest,
        holds=fit.holds,
        remedies=() if fit.holds else tuple(find_remedies(recipe, network, parts, rows=rows, short=short)),
        saved_by_8bit=holdings.optimizer - count_holdings(parts, "adamw8bit").optimizer,
        steps=plan.steps,
        examples=len(rows),
        duration=foresee_duration(recipe, network, fit, prepared),
        notices=network.notices,
    )


def started_adapter(settings: AdapterSettings) -> AdapterSettings:
    """`settings` with the sizes of the adapter that they begin from, where there is one."""
    if settings.start is None:
        return settings
    artifact = find_artifact(settings.start, base="-")  # its base is the recipe's
    artifact.require_adapter()
    fields = artifact.adapter_config
    targets, saved = fields["target_modules"], fields.get("modules_to_save") or ()
    update = {"rank": fields["r"], "dropout": fields.get("lora_dropout", 0.0), "dora": fields.get("use_dora", False)}
    update |= {"targets": targets if isinstance(targets, str) else tuple(targets), "modules_to_save": tuple(saved)}
    return settings.model_copy(update=update)


def foresee_duration(recipe: Recipe, network: Any, fit: Fit, prepared: Prepared) -> Duration:
    """How long the run takes: a typical micro-batch and a heavy one are timed, the others lie between by their cost."""
    steps = [fit.plan.step(number, prepared.train) for number in range(1, min(_STEPS_TIMED, fit.plan.steps) + 1)]
    batches = sorted((batch for step in steps for batch in step.micro_batches), key=cost)
    typical, heavy = batches[len(batches) // 2], batches[-1]
    pace = time_layers(network, typical)
    seconds = [0.0, *(one.step(fit.recomputed) for one in (pace, time_layers(network, heavy)))]
    per_step = float(np.interp([*map(cost, batches)], [0.0, cost(typical), cost(heavy)], seconds).sum()) / len(steps)
    held_out = 0 if prepared.held_out is None else prepared.held_out.count_tokens()
    every = recipe.run.eval_every
    evaluations = 2 + (fit.plan.steps // every if every else 0)
    return Duration(
        examples_per_second=float(np.mean([len(step.examples) for step in steps])) / per_step,
        supervised_tokens_per_second=float(np.mean([step.supervised_tokens for step in steps])) / per_step,
        training=fit.plan.steps * per_step,
        evaluation=evaluations * held_out / cost(typical) * pace.scoring,
    )
