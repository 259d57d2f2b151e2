"""What a run will take before it is started: bytes by kind, a layout, and time. No weights are read for it."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

from lorasft.data.packing import cost
from lorasft.data.store import example_lengths
from lorasft.errors import ModelError
from lorasft.machine import free_memory
from lorasft.model.linear import copy_bytes
from lorasft.model.loss import Network
from lorasft.model.memory import USABLE, dry_run, heaviest_batch, static_bytes
from lorasft.model.recompute import decoder_layers
from lorasft.model.tables import keep_on_host
from lorasft.model.timing import predict_seconds
from lorasft.model.weightless import make_sample, make_weightless, plan_network
from lorasft.recipe import Recipe
from lorasft.recipe.load import change_recipe
from lorasft.terminal import quote
from lorasft.training.inputs import read_checked_config, read_inputs
from lorasft.training.layout import Fit, choose_layout
from lorasft.training.state import RunInputs

LIBRARIES = 1 << 29  # bytes of a card of a given size that its driver and the libraries take
_STEPS_TIMED = 16  # whose micro-batches stand for those of the run
_SHARES = (0.99, 0.95, 0.9, 0.75, 0.5)  # of the rows that a shorter data.max_length leaves as they are


def plan_run(recipe: Recipe, *, memory: int | None) -> dict[str, Any]:
    """How `recipe` fits `memory` bytes, or what is free on the device at hand. Leaves nothing on the disk.

    Sizes are in bytes, times in seconds; `suggestions`: single changes with which it would fit, where it does not.
    Raises what a start of the run would raise before its weights are read, and ModelError for a model that cannot be
    run without them.
    """
    with tempfile.TemporaryDirectory() as folder:
        inputs = read_inputs(recipe, read_checked_config(recipe), Path(folder))
        device, config = PartialState().device, inputs.config
        libraries = 0 if memory is None else LIBRARIES
        given = free_memory(device) if memory is None else memory
        model = make_weightless(config, recipe.model, inputs.adapter, device)
        keep_on_host(model.get_base_model(), device, card=memory)
        sample = make_sample(model, config, recipe.model, inputs.adapter, device)
        sample.get_base_model().frozen_weights.forget("run")  # the probes read each weight many times
        static = static_bytes(model, recipe.optimizer.name)
        spare = given - libraries - sum(static.values())
        network, fit = choose_layout(recipe, inputs, sample, weightless=model, spare=spare)
        if fit.needs is None:
            what = "this model cannot be planned: it computes by numbers, not only shapes"
            raise ModelError(what, where=recipe.model.base)
        kinds = {**static, **fit.needs.by_kind}
        suggestions = find_suggestions(recipe, inputs, network, memory=given - libraries, card=memory)
        return {
            "device": str(device),
            "dtype": str(network.causal.dtype).removeprefix("torch."),
            "memory": given,  # that it is fitted to: what was given, or what is free
            "given": memory is not None,
            "libraries": libraries,  # of the memory, not ours
            "bytes": kinds,
            "host": sum(one.nbytes for one in model.parameters() if hasattr(one, "on_host")),
            "peak": sum(kinds.values()) + libraries,
            "holds": fit.holds,
            "suggestions": list(islice(suggestions, 0 if fit.holds else 3)),
            "saved_by_8bit": static["optimizer"] - static_bytes(model, "adamw8bit")["optimizer"],
            "micro_batch_tokens": fit.plan.micro_batch_tokens,
            "heaviest": {"tokens": len(fit.heaviest.ids), "sequences": len(fit.heaviest.segments)},
            "layers": fit.layers,
            "recomputed_layers": fit.recomputed,
            "keep_16bit": fit.keep is not None,
            "steps": fit.plan.steps,
            "examples": fit.plan.examples,
            "duration": predict_duration(recipe, network, model.get_base_model(), fit, inputs),
            "notices": network.notices,
        }


def predict_duration(recipe: Recipe, network: Network, whole: Any, fit: Fit, inputs: RunInputs) -> dict[str, float]:
    """Speed, and seconds of training and evaluation, by the micro-batches of the first steps."""
    plan, rows, held_out, every = fit.plan, inputs.prepared.train, inputs.prepared.held_out, recipe.run.eval_every
    steps = [plan.step(number, rows) for number in range(1, min(_STEPS_TIMED, plan.steps) + 1)]
    costs = [cost(batch) for step in steps for batch in step.micro_batches]
    length, share = max(1, rows.count_tokens() // len(rows)), steps[0].supervised_tokens / steps[0].tokens
    forward, both, layers = predict_seconds(network, whole, costs, length=length, supervised=share)
    seconds = both + layers * fit.recomputed / max(1, fit.layers)
    evaluations = 2 + (plan.steps // every if every else 0)
    scored = evaluations * held_out.count_tokens() if held_out else 0
    return {
        "examples_per_second": sum(len(step.examples) for step in steps) / seconds,
        "supervised_tokens_per_second": sum(step.supervised_tokens for step in steps) / seconds,
        "training": plan.steps / len(steps) * seconds,
        "evaluation": scored / sum(costs) * forward,
    }


def find_suggestions(
    recipe: Recipe, inputs: RunInputs, network: Network, *, memory: int, card: int | None
) -> Iterator[str]:
    """Changes with which `recipe` fits into `memory` bytes, of a `card` of so many, each alone, as they would be typed:
    those that change the result least first. One key changes, and the leanest layout that is then allowed is predicted.
    """
    lengths, start, rank = example_lengths(inputs.prepared.train), inputs.start, recipe.adapter.rank
    given = ("machine.keep_16bit", "machine.activation_checkpointing", "machine.micro_batch_tokens")
    # The least change first, and of one key the least value.
    changes = [*([f"{key}=auto"] for key in given), ["model.quantization=nf4"], ["optimizer.name=adamw8bit"]]
    if not start:  # else its sizes are given
        changes.append(["adapter.modules_to_save=[]"])
        changes.append([f"adapter.rank={1 << power}" for power in reversed(range(rank.bit_length()))])
    changes.append([f"data.max_length={max(8, int(length))}" for length in np.quantile(lengths, _SHARES)])

    def fits(word: str) -> bool:
        changed = change_recipe(dict(recipe), [word])
        if changed == recipe:
            return False
        adapter = inputs.adapter if start else changed.adapter
        model = make_weightless(inputs.config, changed.model, adapter, network.runs_on)
        keep_on_host(model.get_base_model(), network.runs_on, card=card)
        return least_bytes(changed, network, model, longest=int(lengths.max())) <= memory

    for word in filter(None, (next(filter(fits, words), None) for words in changes)):
        key, _, value = word.partition("=")
        text = quote(word)
        if key == "data.max_length":
            longer = int((lengths > int(value)).sum())
            many = recipe.data.overlong == "drop" and longer > recipe.data.max_dropped * len(lengths)
            text += f"{' data.overlong=truncate' * many} ({longer:,} of {len(lengths):,} rows are longer)"
        yield text


def least_bytes(recipe: Recipe, network: Network, model: Any, *, longest: int) -> int:
    """The memory beside driver and libraries that `recipe` needs on rows of at most `longest` tokens, in the leanest
    layout that it allows. `model`: its PEFT model without numbers, of the kind that `network` was verified on."""
    static, planned, machine = static_bytes(model, recipe.optimizer.name), plan_network(network, model), recipe.machine
    longest = min(longest, recipe.data.max_length)
    tokens = longest if machine.micro_batch_tokens == "auto" else machine.micro_batch_tokens
    batch = heaviest_batch(planned, longest=longest, capacity=tokens)
    layers = 0 if machine.activation_checkpointing is False else len(decoder_layers(planned.causal))
    copies = copy_bytes(planned.causal) if machine.keep_16bit is True else 0
    return sum(static.values()) + copies + math.ceil(dry_run(planned, batch, recomputed=layers).peak / USABLE)
