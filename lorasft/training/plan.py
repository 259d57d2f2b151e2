"""What a run will take before it is started: bytes by kind, a layout, and time. No weights are read for it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from numpy.typing import NDArray

from lorasft.data.packing import MicroBatch, cost
from lorasft.data.store import example_lengths
from lorasft.errors import ModelError
from lorasft.machine import free_memory
from lorasft.model.loss import Network, pair_losses
from lorasft.model.memory import heaviest_batch, static_bytes
from lorasft.model.recompute import decoder_layers, layer_kinds, only_first, recompute
from lorasft.model.tables import keep_on_host
from lorasft.model.weightless import make_sample, make_weightless
from lorasft.recipe import Recipe
from lorasft.recipe.load import change_recipe
from lorasft.terminal import quote
from lorasft.training.inputs import read_checked_config, read_inputs
from lorasft.training.layout import Fit, choose_layout, choose_shard, least_bytes
from lorasft.training.state import RunInputs

LIBRARIES = 1 << 29  # bytes of a card of a given size that its driver and the libraries take
_STEPS_TIMED = 16  # whose micro-batches stand for those of the run
_SHARES = (0.99, 0.95, 0.9, 0.75, 0.5)  # of the rows that a shorter data.max_length leaves as they are
_WORK = 2e10  # multiply-adds through what is timed
_TOKENS = (48, 256)  # of the smaller of two micro-batches, at least and at most; the larger has three times as many
_ROUNDS = 2  # of which the faster counts: in the first one a CPU compiles


def plan_run(recipe: Recipe, *, memory: int | None, cards: int = 1) -> dict[str, Any]:
    """How `recipe` fits `memory` bytes on each of `cards`, or what is free on the device at hand. Leaves nothing on the
    disk.

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
        inputs = replace(inputs, plan=replace(inputs.plan, processes=cards))
        shard = choose_shard(recipe, inputs, model, device, count=cards, local=cards, free=given - libraries)
        static = static_bytes(model, recipe.optimizer.name, shard=shard)
        sizes = {"spare": given - libraries - sum(static.values()), "moments": static["optimizer"] if shard > 1 else 0}
        network, fit = choose_layout(recipe, inputs, sample, weightless=model, **sizes)
        static["optimizer"] //= cards if fit.cut else 1
        if fit.needs is None:
            what = "this model cannot be planned: it computes by numbers, not only shapes"
            raise ModelError(what, where=recipe.model.base)
        kinds = {**static, **fit.needs.by_kind}
        suggestions = find_suggestions(recipe, inputs, network, memory=given - libraries, card=memory)
        return {
            "device": str(device),
            "cards": cards,
            "shard": shard,
            "spread": fit.plan.spread,
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
            "layers": len(decoder_layers(model.get_base_model())),
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
    # What several cards send to one another is not counted.
    steps = [plan.step(number, rows) for number in range(1, min(_STEPS_TIMED, plan.steps) + 1)]
    costs = [cost(batch) for step in steps for batch in step.micro_batches]
    length, share = max(1, rows.count_tokens() // len(rows)), steps[0].supervised_tokens / steps[0].tokens
    forward, both, layers = predict_seconds(network, whole, costs, length=length, supervised=share)
    seconds = (both + layers * fit.recomputed / max(1, len(decoder_layers(whole)))) / plan.processes
    evaluations = 2 + (plan.steps // every if every else 0)
    scored = evaluations * held_out.count_tokens() if held_out else 0
    return {
        "examples_per_second": sum(len(step.examples) for step in steps) / seconds,
        "supervised_tokens_per_second": sum(step.supervised_tokens for step in steps) / seconds,
        "training": plan.steps / len(steps) * seconds,
        "evaluation": scored / sum(costs) * forward / plan.processes,
    }


def predict_seconds(
    network: Network, whole: Any, costs: Sequence[float], *, length: int, supervised: float
) -> NDArray[np.float64]:
    """Seconds of micro-batches of `costs` (see `packing.cost`) through the model `whole`, summed: forwards, both ways,
    and through all decoder layers forwards.

    Two are timed on the sample of `whole` that is in `network`, in rows of `length` tokens of which a share is
    supervised; others are on the line through both. What is around the layers takes as much longer as the vocabulary
    of `whole` is larger.
    """
    causal = network.causal
    causal.train()
    recompute(causal, 0)
    causal.enable_input_require_grads()  # a layer that is not the first gives its gradient on
    head = causal.get_output_embeddings()
    wider = len(whole.get_output_embeddings().weight) / len(head.weight)
    weights = sum(parameter.numel() for part in (*decoder_layers(causal), head) for parameter in part.parameters())
    tokens = int(np.clip(_WORK / 8 / weights, *_TOKENS))
    batches = [heaviest_batch(network, longest=min(length, size), capacity=size, supervised=supervised)
               for size in (tokens, 3 * tokens)]  # fmt: skip
    kinds = layer_kinds(whole)
    less, more = (_time_batch(network, kinds, batch, wider=wider) for batch in batches)
    small, large = map(cost, batches)
    slope = np.clip((more - less) / (large - small), 0, more / large)  # a disturbed clock: nothing costs less
    seconds: NDArray[np.float64] = len(costs) * more + slope * (sum(costs) - len(costs) * large)
    return seconds


def _time_batch(network: Network, kinds: Sequence[str], batch: MicroBatch, *, wider: float) -> NDArray[np.float64]:
    """Seconds forwards, both ways, and of all layers forwards: around them, and what one of each kind adds."""
    around = _time_first(network, batch, 0)
    each: dict[str, NDArray[np.float64]] = {}
    for kind in dict.fromkeys(kinds):
        before = sum(each.values(), around)  # the sample skips all but the first of a kind
        each[kind] = np.maximum(0.0, _time_first(network, batch, kinds.index(kind) + 1) - before)
    layers = sum((each[kind] for kind in kinds), np.zeros(2))
    return np.append(wider * around + layers, layers[0])


def _time_first(network: Network, batch: MicroBatch, depth: int) -> NDArray[np.float64]:
    """Seconds forwards, and both ways, through the first `depth` layers alone, of the faster round."""
    rounds, synchronize = [], torch.get_device_module(network.device).synchronize
    with only_first(network.causal, depth):
        for _ in range(_ROUNDS):
            started = time.perf_counter()
            loss = pair_losses(network, batch).sum()
            synchronize(network.device)
            forward = time.perf_counter()
            loss.backward()  # type: ignore[no-untyped-call]
            synchronize(network.device)
            rounds.append((forward - started, time.perf_counter() - started))
    faster: NDArray[np.float64] = np.array(rounds).min(axis=0)
    return faster


def find_suggestions(
    recipe: Recipe, inputs: RunInputs, network: Network, *, memory: int, card: int | None
) -> Iterator[str]:
    """Changes with which `recipe` fits into `memory` bytes, of a `card` of so many, each alone, as they would be typed:
    those that change the result least first. One key changes, and the leanest layout that is then allowed is predicted.
    """
    lengths, start, rank = example_lengths(inputs.prepared.train), inputs.start, recipe.adapter.rank
    given = ("machine.keep_16bit", "machine.activation_checkpointing", "machine.micro_batch_tokens", "machine.shard")
    # The least change first, and of one key the least value.
    changes = [*([f"{key}=auto"] for key in given), ["model.quantization=nf4"], ["optimizer.name=adamw8bit"]]
    if not start:  # else its sizes are given
        changes.append(["adapter.modules_to_save=[]"])
        changes.append([f"adapter.rank={1 << power}" for power in reversed(range(rank.bit_length()))])
    changes.append([f"data.max_length={max(8, int(length))}" for length in np.quantile(lengths, _SHARES)])

    def fits(word: str, cards: int = inputs.plan.processes) -> bool:
        changed = change_recipe({name: getattr(recipe, name) for name in Recipe.model_fields}, [word] if word else [])
        if word and changed == recipe:
            return False
        adapter = inputs.adapter if start else changed.adapter
        model = make_weightless(inputs.config, changed.model, adapter, network.runs_on)
        keep_on_host(model.get_base_model(), network.runs_on, card=card)
        shard = choose_shard(changed, inputs, model, network.runs_on, count=cards, local=cards, free=memory)
        return least_bytes(changed, network, model, longest=int(lengths.max()), cards=cards, shard=shard) <= memory

    for word in filter(None, (next(filter(fits, words), None) for words in changes)):
        key, _, value = word.partition("=")
        text = quote(word)
        if key == "data.max_length":
            longer = int((lengths > int(value)).sum())
            many = recipe.data.overlong == "drop" and longer > recipe.data.max_dropped * len(lengths)
            text += f"{' data.overlong=truncate' * many} ({longer:,} of {len(lengths):,} rows are longer)"
        yield text
    more = [many * inputs.plan.processes for many in (2, 4, 8)] if inputs.plan.processes > 1 else []
    yield from islice((f"--cards {cards}" for cards in more if fits("", cards)), 1)
