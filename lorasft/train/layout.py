"""How a run is fitted to its machine: dtype, micro-batches, shared prefixes, recomputed layers. It changes no result.

What the recipe states under `machine` is taken; what it leaves to `auto` is kept from the checkpoint when a run goes
on, else chosen by what was verified on the model, by the lengths of the data and by the memory that is free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from lorasft.data.packing import MicroBatch, Plan, Sequences, cost, shuffle
from lorasft.data.prefixes import Sharing
from lorasft.data.store import TokenStore, example_lengths
from lorasft.errors import RecipeError
from lorasft.model.loss import Network
from lorasft.model.memory import USABLE, ActivationMemory, dry_run
from lorasft.model.recompute import decoder_layers, recompute
from lorasft.model.weightless import make_weightless, plan_network
from lorasft.recipe import AdapterSettings, Recipe
from lorasft.train.state import State

_TOKENS = {"cpu": 2048, "cuda": 4096}  # of a micro-batch: measured on CPU
_FIXED = 240  # a micro-batch takes the time of so many tokens on top of its own: dequantizing, launches
_STEPS_SEEN = 64  # whose micro-batches are weighed to find the heaviest
_MOST_TOKENS = 16_384  # that shared prefixes may widen it to
_WORTH = 0.9  # a wider micro-batch has to compute at most this share of the tokens


@dataclass(frozen=True)
class Fit:
    """How the steps of a run are fitted to a memory, and what the heaviest of its micro-batches then needs."""

    plan: Plan  # as it will be run
    recomputed: int  # layers that recompute their activations
    heaviest: MicroBatch
    needs: ActivationMemory | None  # None: this model cannot be run without numbers
    layers: int  # of the model
    spare: int  # bytes for it
    computed: int  # tokens of the first step

    @property
    def holds(self) -> bool:
        """Whether it fits; True where that is not known."""
        return self.needs is None or self.needs.fits(self.spare)

    @property
    def rank(self) -> tuple[float, float]:
        """What a fit is chosen by: how far it is from fitting, then how long a step takes."""
        if self.needs is None:
            return math.inf, 0.0
        share = self.recomputed / max(1, self.layers)
        price = self.computed * (1 + share / 3) * (1 + _FIXED / self.plan.micro_batch_tokens)
        return max(0.0, self.needs.peak - USABLE * self.spare), price


def choose_layout(
    recipe: Recipe, network: Network, weightless: Any, *, plan: Plan, rows: TokenStore, saved: State | None, spare: int
) -> tuple[Network, Fit]:
    """The network as it will be run, and how its steps fit into `spare` bytes beside weights, gradients and optimizer.
    `weightless`: its model without numbers. `plan` brings the tokens of a micro-batch.

    Raises RecipeError when the model cannot recompute and the recipe wants it.
    """
    network = choose_sharing(network, recipe.machine.share_prefixes, saved=saved)
    tokens = plan.micro_batch_tokens
    plan = replace(plan, share_prefixes=network.share, rope_switch_length=network.rope_switch_length)
    if recipe.machine.micro_batch_tokens == "auto" and not saved and network.share:
        tokens = widen(plan, rows)
    plan = replace(plan, micro_batch_tokens=tokens if network.segments else 1)  # 1: sequences go alone
    planned = plan_network(network, weightless)
    fit = choose_fit(recipe, planned, plan=plan, rows=rows, saved=saved, spare=spare)
    recompute(network.causal, fit.recomputed)
    return network, fit


def choose_tokens(wanted: int | Literal["auto"], device: torch.device, *, saved: State | None) -> int:
    """The most tokens of a micro-batch, before it is known whether sequences share their beginnings."""
    if wanted != "auto":
        return wanted
    return saved.layout.micro_batch_tokens if saved else _TOKENS.get(device.type, _TOKENS["cpu"])


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


def choose_sharing(network: Network, wanted: Sharing, *, saved: State | None) -> Network:
    """`network` as it shares prefixes: as recipe or checkpoint say, where that was verified and nothing drops out.

    With dropout, examples that share tokens would share what is dropped.
    """
    if wanted == "auto" and saved:
        wanted = saved.layout.share_prefixes
    if wanted is False or network.share is False:
        return replace(network, share=False)
    if not has_dropout(network.causal):
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


def choose_fit(
    recipe: Recipe, network: Network, *, plan: Plan, rows: TokenStore, saved: State | None, spare: int
) -> Fit:
    """The fastest fit: micro-batches are halved while that saves more time than recomputing layers costs."""
    wanted = recompute_wish(recipe, network, saved=saved)
    free = recipe.machine.micro_batch_tokens == "auto" and not saved and network.segments
    best: Fit | None = None
    tokens = plan.micro_batch_tokens
    longest = int(example_lengths(rows).max())
    while True:
        fit = measure_fit(network, replace(plan, micro_batch_tokens=tokens), rows, wanted=wanted, spare=spare)
        if best is not None and fit.rank >= best.rank:
            return best
        if not free or tokens <= longest or (fit.holds and not fit.recomputed):
            return fit
        best, tokens = fit, max(longest, min(tokens, len(fit.heaviest.ids)) // 2)


def recompute_wish(recipe: Recipe, network: Network, *, saved: State | None) -> int | None:
    """How many layers recompute their activations by recipe, checkpoint or model; None: as few as fit."""
    wish, layers = recipe.machine.activation_checkpointing, len(decoder_layers(network.causal))
    if wish is True and not layers:
        what = "this model cannot recompute its activations"
        raise RecipeError(what, where="machine.activation_checkpointing", hint="use auto or false")
    if isinstance(wish, bool) or not layers:
        return layers if wish is True else 0
    return saved.layout.recomputed_layers if saved else None


def measure_fit(network: Network, plan: Plan, rows: TokenStore, *, wanted: int | None, spare: int) -> Fit:
    """How the heaviest micro-batch of `plan` fits, with `wanted` recomputed layers or with as few as possible.

    `network` is without weights.
    """
    heaviest, layers = find_heaviest(plan, rows), len(decoder_layers(network.causal))
    needs: ActivationMemory | None
    try:
        if wanted is None:
            wanted, needs = fewest_recomputed(network, heaviest, free=spare)
        else:
            needs = dry_run(network, heaviest, recomputed=wanted)
    except (LookupError, TypeError, ValueError, RuntimeError):  # it reads numbers: the layout that needs least
        wanted, needs = layers if wanted is None else wanted, None
    return Fit(plan, wanted, heaviest, needs, layers, spare, computed=plan.step(1, rows).tokens)


def fewest_recomputed(network: Network, batch: MicroBatch, *, free: int) -> tuple[int, ActivationMemory]:
    """The fewest layers to recompute for a peak within 90 % of `free` bytes, else all; and what `batch` then needs."""
    layers = len(decoder_layers(network.causal))
    none = dry_run(network, batch, recomputed=0)
    if none.fits(free) or not layers:
        return 0, none
    most = dry_run(network, batch, recomputed=layers)
    each = max(1.0, (none.kept - most.kept) / layers)  # what a layer that recomputes does not keep
    for count in range(max(1, math.ceil((none.peak - USABLE * free) / each)), layers if most.fits(free) else 0):
        needs = dry_run(network, batch, recomputed=count)
        if needs.fits(free):
            return count, needs
    return layers, most


def without_weights(recipe: Recipe, config: Any, model: Any, device: torch.device) -> Any:
    """The PEFT `model` of `recipe` as its `config` makes it, on the meta device."""
    dtype = str(model.get_base_model().dtype).removeprefix("torch.")
    settings = recipe.model.model_copy(update={"dtype": dtype})
    return make_weightless(config, settings, run_adapter(recipe, model), device)


def run_adapter(recipe: Recipe, model: Any) -> AdapterSettings:
    """The settings of the adapter of the PEFT `model`, which may have been begun from another one."""
    config = vars(model.peft_config["default"])
    return started_adapter(recipe.adapter, config) if recipe.adapter.start else recipe.adapter


def started_adapter(settings: AdapterSettings, started: Mapping[str, Any]) -> AdapterSettings:
    """`settings` with the sizes of the adapter that they begin from."""
    targets, saved = started["target_modules"], started.get("modules_to_save") or ()
    update = {"rank": started["r"], "dropout": started.get("lora_dropout", 0.0), "dora": started.get("use_dora", False)}
    update |= {"targets": targets if isinstance(targets, str) else tuple(targets), "modules_to_save": tuple(saved)}
    return settings.model_copy(update=update)


def find_heaviest(plan: Plan, rows: TokenStore) -> MicroBatch:
    """The dearest micro-batch of a run: among those of its first steps, and of the step with the longest sequence."""
    order = shuffle(plan.examples, seed=plan.seed, epoch=0)[: plan.steps * plan.batch_size]
    longest = 1 + int(np.argmax(example_lengths(rows)[order])) // plan.batch_size
    numbers = {*range(1, min(plan.steps, _STEPS_SEEN) + 1), longest}
    return max((batch for number in sorted(numbers) for batch in plan.step(number, rows).micro_batches), key=cost)
