"""How a run is fitted to its machine: dtype, micro-batches, shared prefixes, recomputed layers. It changes no result.

What the recipe states under `machine` is taken; what it leaves to `auto` is kept from the checkpoint when a run is
resumed, else chosen by what was verified on the model, by the lengths of the data and by the memory that is free. When
memory runs out all the same, the work is done again with less: first without 16-bit copies of weights; then with
experts one by one; then in micro-batches of half the tokens, down to the longest sequence; then all layers recompute
their activations; then the run ends with the rows that did not fit.
"""

from __future__ import annotations

import gc
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import nn

from lorasft.data.packing import MicroBatch, Plan, cost
from lorasft.data.prefixes import Sharing
from lorasft.data.store import TokenStore, example_lengths
from lorasft.errors import CapacityError, RecipeError, first_line, out_of_memory
from lorasft.model.attention import SEGMENTS
from lorasft.model.linear import copy_bytes
from lorasft.model.loss import Network, read_head
from lorasft.model.memory import USABLE, ActivationMemory, dry_run, heaviest_batch, run_layers, static_bytes
from lorasft.model.recompute import decoder_layers, layer_period, recompute, recomputed_layers
from lorasft.model.selfcheck import verify
from lorasft.model.weightless import plan_network
from lorasft.recipe import Auto, Recipe
from lorasft.terminal import say, shorten
from lorasft.training.state import Layout, Run, RunInputs

Result = TypeVar("Result")
_STEPS_SEEN = 64  # whose micro-batches are weighed to find the heaviest
_MOST_TOKENS = 16_384  # that a micro-batch is widened to
_LEAST_CUT = 1 << 14  # bytes of an optimizer's state for each process: smaller ones are not in 8 bit
_READS_NUMBERS = (LookupError, TypeError, ValueError, RuntimeError)  # what a model raises that asks for numbers
_WORTH = 0.9  # a wider micro-batch has to compute at most this share of the tokens


@dataclass(frozen=True)
class Fit:
    """How the steps of a run are fitted to a memory, and what the heaviest of its micro-batches then needs."""

    plan: Plan  # as it will be run
    recomputed: int  # layers that recompute their activations
    heaviest: MicroBatch
    needs: ActivationMemory | None  # None: this model cannot be run without numbers
    spare: int  # bytes for it
    keep: Literal["run", "layer"] | None = None  # 16-bit copies of 4-bit weights (see FrozenWeights)
    cut: bool = False  # each process has a part of the optimizer's state

    @property
    def holds(self) -> bool:
        """Whether it fits; True where that is not known."""
        return self.needs is None or self.needs.fits(self.spare)


def choose_layout(
    recipe: Recipe, inputs: RunInputs, model: Any, *, weightless: Any, spare: int, moments: int = 0
) -> tuple[Network, Fit]:
    """The verified network of the PEFT `model`, and how its steps fit into `spare` bytes beside weights, gradients and
    optimizer. `weightless`: the model without numbers; `moments`: bytes of the optimizer's state, of which each process
    may have a part where all does not fit.
    """
    machine, rows, kept = recipe.machine, inputs.prepared.train, inputs.saved.layout if inputs.saved else None
    own = machine.attention in ("eager", "sdpa")
    network = verify(model.get_base_model(), segments=kept.segments if kept else not own)
    if own:
        network.causal.set_attn_implementation(machine.attention)
    network = choose_sharing(network, machine.share_prefixes, kept=kept)
    plan = replace(inputs.plan, share_prefixes=network.share, rope_switch_length=network.rope_switch_length)
    most = None  # tokens to begin with, where no one states them
    if not network.segments:
        plan = replace(plan, micro_batch_tokens=1)  # sequences go alone
    elif machine.micro_batch_tokens == "auto":
        plan = replace(plan, micro_batch_tokens=kept.micro_batch_tokens if kept else widen(plan, rows))
        if not kept:  # a CPU gains nothing by more
            most = _MOST_TOKENS if network.runs_on.type == "cuda" else plan.micro_batch_tokens
    if (network.mixer or network.told) and machine.share_prefixes:
        least, all_of_them = (replace(plan, share_prefixes=way).step(1, rows).tokens for way in ("auto", False))
        if least < _WORTH * all_of_them:
            notice = "shared prefixes are computed for each example: recurrent layers cannot branch"
            network = replace(network, notices=(*network.notices, notice))
    if machine.activation_checkpointing == "auto":
        wanted = kept.recomputed_layers if kept else None
    else:
        wanted = machine.activation_checkpointing * len(decoder_layers(weightless.get_base_model()))
    planned, whole = plan_network(network, weightless), network.causal.frozen_weights.whole
    for at_once in (kept.whole_experts and whole,) if kept else (whole, False) if whole else (False,):
        planned.causal.frozen_weights.whole = network.causal.frozen_weights.whole = at_once
        fit = choose_fit(planned, plan, rows, wanted=wanted, most=most, spare=spare)
        if fit.holds:
            break
    if not fit.holds and moments >= _LEAST_CUT * plan.processes:
        spare += moments - moments // plan.processes
        fit = replace(choose_fit(planned, plan, rows, wanted=wanted, most=most, spare=spare), cut=True)
    apart = network.mixer or network.told or network.rope_switch_length or not network.segments
    wanted_spread = not fit.holds if machine.spread_rows == "auto" else machine.spread_rows
    if wanted_spread and plan.processes > 1 and not apart:
        longest = int(example_lengths(rows).max())
        tokens = plan.micro_batch_tokens if machine.spread_rows is True else math.ceil(longest / plan.processes)
        plan = replace(fit.plan, micro_batch_tokens=tokens, spread=True)
        fit = replace(choose_fit(planned, plan, rows, wanted=wanted, most=None, spare=spare), cut=fit.cut)
    fit = choose_copies(planned, fit, kept.keep_16bit if kept and machine.keep_16bit == "auto" else machine.keep_16bit)
    recompute(network.causal, fit.recomputed)
    network.causal.frozen_weights.forget(fit.keep)
    return network, fit


def choose_shard(
    recipe: Recipe, inputs: RunInputs, model: Any, device: torch.device, *, count: int, local: int, free: int
) -> int:
    """Over how many of `count` processes, `local` of them on a machine, one copy of the base lies: as the recipe says;
    `auto`: the fewest of 1, those of a machine and all with which the longest sequence fits into `free` bytes.

    `model`: without numbers. Raises RecipeError for what only a whole base can do, and copies that are not whole.
    """
    wanted: Any = {"all": count}.get(str(recipe.machine.shard), recipe.machine.shard)
    unfit = {
        "model.quantization=none": recipe.model.quantization == "none",
        "a base that comes in 4 bit": hasattr(inputs.config, "quantization_config"),
        "adapter.dora": recipe.adapter.dora,
        f"{count} processes": wanted != "auto" and count % wanted > 0,
    }
    for what in (what for what, found in unfit.items() if found):
        if wanted in (1, "auto"):
            return 1
        what = f"one base over {wanted} processes is not possible with {what}"
        raise RecipeError(what, where="machine.shard", hint="machine.shard=1")
    if wanted != "auto" or count == 1:
        return 1 if count == 1 else int(wanted)
    base = model.get_base_model()
    base.set_attn_implementation(SEGMENTS)
    network = Network(base, read_head(base, device), segments=True, planned=device)
    needs = partial(least_bytes, recipe, network, model, longest=int(example_lengths(inputs.prepared.train).max()))
    *fewer, most = (parts for parts in sorted({1, local, count}) if count % parts == 0)
    try:
        return next((parts for parts in fewer if needs(shard=parts) <= free), most)
    except _READS_NUMBERS:
        return most


def least_bytes(recipe: Recipe, network: Network, model: Any, *, longest: int, cards: int = 1, shard: int = 1) -> int:
    """The memory beside driver and libraries that `recipe` needs on rows of at most `longest` tokens, in the leanest
    layout that it allows on each of `cards`, `shard` of which hold one base. `model`: its PEFT model without numbers,
    of the kind that `network` was verified on."""
    static, machine = static_bytes(model, recipe.optimizer.name, shard=shard), recipe.machine
    planned = plan_network(network, model)
    static["optimizer"] //= cards if shard > 1 else 1
    longest = math.ceil(min(longest, recipe.data.max_length) / (cards if machine.spread_rows is not False else 1))
    tokens = longest if machine.micro_batch_tokens == "auto" else machine.micro_batch_tokens
    batch = heaviest_batch(planned, longest=longest, capacity=tokens)
    layers = 0 if machine.activation_checkpointing is False else len(decoder_layers(planned.causal))
    copies = copy_bytes(planned.causal) if machine.keep_16bit is True else 0
    return sum(static.values()) + copies + math.ceil(dry_run(planned, batch, recomputed=layers).peak / USABLE)


def choose_copies(network: Network, fit: Fit, wanted: Auto | bool) -> Fit:
    """`fit` with 16-bit copies of the 4-bit weights of the planned `network`; `auto`: on a GPU, where they fit too.

    They are kept for the run or, where layers recompute, from there until the layer's backward pass has used them.
    """
    size, needs = copy_bytes(network.causal), fit.needs
    if not wanted or not size or (wanted == "auto" and (needs is None or network.runs_on.type != "cuda")):
        return fit
    if needs and fit.recomputed:
        network.causal.frozen_weights.forget("layer")
        needs = dry_run(network, fit.heaviest, recomputed=fit.recomputed)
    elif needs:
        needs = replace(needs, copies=size, peak=needs.peak + size)
    more = replace(fit, needs=needs, keep="layer" if fit.recomputed else "run")
    return more if wanted is True or more.holds else fit


def widen(plan: Plan, rows: TokenStore) -> int:
    """The tokens of a micro-batch, doubled as long as the first step then repeats clearly fewer shared prefixes."""
    computed = plan.step(1, rows).tokens
    while plan.micro_batch_tokens < _MOST_TOKENS:
        wider = replace(plan, micro_batch_tokens=2 * plan.micro_batch_tokens)
        fewer = wider.step(1, rows).tokens
        if fewer > _WORTH * computed:
            break
        plan, computed = wider, fewer
    return plan.micro_batch_tokens


def choose_sharing(network: Network, wanted: Sharing, *, kept: Layout | None) -> Network:
    """`network` as it shares prefixes: as recipe or checkpoint say, where that was verified and nothing drops out."""
    if wanted == "auto" and kept:
        wanted = kept.share_prefixes
    # Where something drops out, examples that share tokens would share what is dropped: modules do, or attention by a
    # number that it is given.
    dropout = any(
        "drop" in name and isinstance(value, float) and value > 0
        for module in network.causal.modules()
        for name, value in ({"dropout": module.p} if isinstance(module, nn.Dropout) else vars(module)).items()
    )
    return replace(network, share=network.share and not dropout and wanted)


def choose_fit(
    network: Network, plan: Plan, rows: TokenStore, *, wanted: int | None, most: int | None, spare: int
) -> Fit:
    """The first fit. Micro-batches begin with `most` tokens, unless `plan` states them, and are halved before any layer
    recomputes, down to half of the plan's; and again where all layers do.
    """
    longest, layers = int(example_lengths(rows).max()), len(decoder_layers(network.causal))
    usual, tokens = plan.micro_batch_tokens, most or plan.micro_batch_tokens
    while True:
        tried, last = replace(plan, micro_batch_tokens=tokens), most is None or tokens <= longest
        heaviest = tried.first_part(find_heaviest(tried, rows))
        if usual < tokens >= 2 * len(heaviest.ids):  # no step fills half of it
            tokens //= 2
            continue
        least = 0 if wanted is None and tokens >= usual and not last else wanted
        recomputed, needs = fewest_recomputed(network, heaviest, wanted=least, free=spare)
        if needs is None:  # the model reads numbers: the usual tokens, and as many layers as need least
            return Fit(plan, layers if wanted is None else wanted, find_heaviest(plan, rows), None, spare)
        fit = Fit(tried, recomputed, heaviest, needs, spare)
        if fit.holds or last:
            return fit
        tokens = max(longest, (tokens if tokens > usual else min(tokens, len(heaviest.ids))) // 2)


def fewest_recomputed(
    network: Network, batch: MicroBatch, *, free: int, wanted: int | None = None
) -> tuple[int, ActivationMemory | None]:
    """The fewest layers to recompute for a peak within 90 % of `free` bytes, else all, or those `wanted`; and what
    `batch` then needs, found without weights: None where the model reads numbers. Where the kinds of layers repeat,
    whole periods are chosen.
    """
    layers = len(decoder_layers(network.causal))
    needs = partial(dry_run, network, batch, run=cache(partial(run_layers, network, batch)))
    try:
        if wanted is None:
            wanted = 0
            if layers and not needs(recomputed=0).fits(free):
                counts = range(layers, 0, -(layer_period(network.causal) or 1))[::-1]
                wanted = counts[bisect_left(counts[:-1], True, key=lambda one: needs(recomputed=one).fits(free))]
        return wanted, needs(recomputed=wanted)
    except _READS_NUMBERS as error:  # what needs least
        say(f"the memory of a step is not known beforehand: {first_line(error)}")
        return layers if wanted is None else wanted, None


def find_heaviest(plan: Plan, rows: TokenStore) -> MicroBatch:
    """The dearest micro-batch of a run: among those of its first steps, and of the step with the longest sequence."""
    lengths, longest, per_epoch = example_lengths(rows), (0, 1), plan.steps_per_epoch
    for epoch in range(min(plan.epochs_for_all, math.ceil(plan.steps / per_epoch))):
        own = lengths[plan.order(epoch)]
        found = int(own.max()), 1 + epoch * per_epoch + int(np.argmax(own)) // plan.batch_size
        longest = max(longest, found, key=lambda one: one[0])
    numbers = {*range(1, min(plan.steps, _STEPS_SEEN) + 1), longest[1]}
    batches = (batch for number in sorted(numbers) for batch in plan.step(number, rows).micro_batches)
    return max(batches, key=lambda batch: cost(plan.first_part(batch)))


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
        plain = isinstance(raised, (torch.OutOfMemoryError, MemoryError))
        why = "" if plain else f" ({shorten(first_line(raised))})"  # where it is something else
        error = MicroBatchTooLarge(
            f"out of memory with {len(batch.ids)} tokens in a micro-batch of {len(examples)} rows{why}",
            where=", ".join(places),
            hint="free memory and try again, with --resume if the run had begun; or start anew with a smaller "
            "data.max_length, adapter.rank or model.base: lorasft plan RECIPE --memory SIZE finds what fits",
        )
        error.tokens, error.longest = len(batch.ids), int(batch.positions.max()) + 1
        raise error from raised


def retry_on_oom(run: Run, work: Callable[[], Result]) -> Result:
    """What `work`, which must change nothing before its last micro-batch is done, gives: done again with less memory
    until it fits. Raises CapacityError when nothing is left to try, and at once where processes would try together."""
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
        run.trained.gradient.zero_()
        layers, tokens = len(decoder_layers(run.network.causal)), run.plan.micro_batch_tokens
        weights = run.network.causal.frozen_weights
        if weights.keep:
            weights.forget()
            say(f"{error.what}: from here on no weights are kept in 16 bit")
        elif weights.whole:
            weights.whole = False
            say(f"{error.what}: from here on experts are dequantized one by one")
        elif error.tokens > error.longest:
            run.plan = replace(run.plan, micro_batch_tokens=max(error.longest, min(error.tokens, tokens) // 2))
            say(f"{error.what}: from here on micro-batches of {run.plan.micro_batch_tokens} tokens")
        elif recomputed_layers(run.network.causal) < layers:
            recompute(run.network.causal, layers)
            say(f"{error.what}: from here on all {layers} layers recomputed")
        else:
            raise error
