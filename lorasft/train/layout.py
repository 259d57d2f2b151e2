"""How a run is fitted to its machine: dtype, micro-batches, shared prefixes, recomputed layers. It changes no result.

What the recipe states under `machine` is taken; what it leaves to `auto` is kept from the checkpoint when a run is
resumed, else chosen by what was verified on the model, by the lengths of the data and by the memory that is free.
"""

from __future__ import annotations

from bisect import bisect_left
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from torch import nn

from lorasft.data.packing import MicroBatch, Plan, Sequences, cost, shuffle
from lorasft.data.prefixes import Sharing
from lorasft.data.store import TokenStore, example_lengths
from lorasft.model.loss import Network
from lorasft.model.memory import USABLE, ActivationMemory, dry_run
from lorasft.model.recompute import decoder_layers, recompute
from lorasft.model.selfcheck import verify
from lorasft.model.weightless import plan_network
from lorasft.recipe import Recipe
from lorasft.train.state import Layout

_FIXED = 240  # a micro-batch takes the time of so many tokens on top of its own: dequantizing, launches
_STEPS_SEEN = 64  # whose micro-batches are weighed to find the heaviest
_MOST_TOKENS = 16_384  # that shared prefixes may widen it to
_WORTH = 0.9  # a wider micro-batch has to compute at most this share of the tokens


@dataclass(frozen=True)
class Fit:
    """How the steps of a run are fitted to a memory, and what the heaviest of its micro-batches then needs."""

    plan: Plan  # as it will be run
    recomputed: int  # layers that recompute their activations
    layers: int  # of the model
    heaviest: MicroBatch
    needs: ActivationMemory | None  # None: this model cannot be run without numbers
    spare: int  # bytes for it
    computed: int  # tokens of the first step

    @property
    def holds(self) -> bool:
        """Whether it fits; True where that is not known."""
        return self.needs is None or self.needs.fits(self.spare)

    @property
    def price(self) -> tuple[float, float]:
        """What a fit is chosen by: how far it is from fitting, then how long a step takes."""
        missing = self.needs.peak - USABLE * self.spare if self.needs else 0.0
        slower = (1 + self.recomputed / max(1, self.layers) / 3) * (1 + _FIXED / self.plan.micro_batch_tokens)
        return max(0.0, missing), self.computed * slower


def choose_layout(
    recipe: Recipe, model: Any, weightless: Any, *, plan: Plan, rows: TokenStore, kept: Layout | None, spare: int
) -> tuple[Network, Fit]:
    """The verified network of the PEFT `model`, and how its steps fit into `spare` bytes beside weights, gradients and
    optimizer. `weightless`: the model without numbers. `kept`: the layout of the checkpoint that is resumed from.
    """
    machine = recipe.machine
    own = machine.attention in ("eager", "sdpa")
    network = verify(model.get_base_model(), segments=kept.segments if kept else not own)
    if own:
        network.causal.set_attn_implementation(machine.attention)
    network = choose_sharing(network, machine.share_prefixes, kept=kept)
    plan = replace(plan, share_prefixes=network.share, rope_switch_length=network.rope_switch_length)
    free = machine.micro_batch_tokens == "auto" and kept is None and network.segments
    if not network.segments:
        plan = replace(plan, micro_batch_tokens=1)  # sequences go alone
    elif kept and machine.micro_batch_tokens == "auto":
        plan = replace(plan, micro_batch_tokens=kept.micro_batch_tokens)
    elif free and network.share:
        plan = replace(plan, micro_batch_tokens=widen(plan, rows))
    if machine.activation_checkpointing == "auto":
        wanted = kept.recomputed_layers if kept else None
    else:
        wanted = machine.activation_checkpointing * len(decoder_layers(network.causal))
    fit = choose_fit(plan_network(network, weightless), plan, rows, wanted=wanted, free=free, spare=spare)
    recompute(network.causal, fit.recomputed)
    return network, fit


def widen(plan: Plan, rows: Sequences) -> int:
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
    if wanted is False or network.share is False:
        return replace(network, share=False)
    if not has_dropout(network.causal):  # else examples that share tokens would share what is dropped
        return replace(network, share=wanted)
    notice = "shared prefixes are computed for each example: dropout is active"
    return replace(network, share=False, notices=(*network.notices, notice))


def has_dropout(model: nn.Module) -> bool:
    """Whether anything in `model` drops out while it trains: modules, or attention by a number that it is given."""
    return any(
        "drop" in name and isinstance(value, float) and value > 0
        for module in model.modules()
        for name, value in ({"dropout": module.p} if isinstance(module, nn.Dropout) else vars(module)).items()
    )


def choose_fit(network: Network, plan: Plan, rows: TokenStore, *, wanted: int | None, free: bool, spare: int) -> Fit:
    """The fastest fit: `free` micro-batches are halved while that saves more time than recomputing layers costs."""
    best: Fit | None = None
    longest = int(example_lengths(rows).max())
    while True:
        fit = measure_fit(network, plan, rows, wanted=wanted, spare=spare)
        if best and fit.price >= best.price:
            return best
        tokens = plan.micro_batch_tokens
        if not free or tokens <= longest or fit.needs is None or (fit.holds and not fit.recomputed):
            return fit
        best, plan = fit, replace(plan, micro_batch_tokens=max(longest, min(tokens, len(fit.heaviest.ids)) // 2))


def measure_fit(network: Network, plan: Plan, rows: TokenStore, *, wanted: int | None, spare: int) -> Fit:
    """How the heaviest micro-batch fits, with `wanted` recomputed layers or as few as possible; without weights."""
    heaviest, layers = find_heaviest(plan, rows), len(decoder_layers(network.causal))
    recomputed, needs = layers if wanted is None else wanted, None
    with suppress(LookupError, TypeError, ValueError, RuntimeError):  # it reads numbers: the layout that needs least
        if wanted is None:
            recomputed, needs = fewest_recomputed(network, heaviest, free=spare)
        else:
            needs = dry_run(network, heaviest, recomputed=wanted)
    return Fit(plan, recomputed, layers, heaviest, needs, spare, computed=plan.step(1, rows).tokens)


def fewest_recomputed(network: Network, batch: MicroBatch, *, free: int) -> tuple[int, ActivationMemory]:
    """The fewest layers to recompute for a peak within 90 % of `free` bytes, else all; and what `batch` then needs."""
    layers = len(decoder_layers(network.causal))
    needs = cache(lambda count: dry_run(network, batch, recomputed=count))
    count = 0
    if layers and not needs(0).fits(free):
        count = bisect_left(range(layers), True, lo=1, key=lambda count: needs(count).fits(free))
    return count, needs(count)


def find_heaviest(plan: Plan, rows: TokenStore) -> MicroBatch:
    """The dearest micro-batch of a run: among those of its first steps, and of the step with the longest sequence."""
    order = shuffle(plan.examples, seed=plan.seed, epoch=0)[: plan.steps * plan.batch_size]
    longest = 1 + int(np.argmax(example_lengths(rows)[order])) // plan.batch_size
    numbers = {*range(1, min(plan.steps, _STEPS_SEEN) + 1), longest}
    return max((batch for number in sorted(numbers) for batch in plan.step(number, rows).micro_batches), key=cost)
