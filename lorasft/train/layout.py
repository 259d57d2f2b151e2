"""How a run is fitted to its machine: dtype, micro-batches, shared prefixes, recomputed layers. It changes no result.

What the recipe states under `machine` is taken; what it leaves to `auto` is kept from the checkpoint when a run is
resumed, else chosen by what was verified on the model, by the lengths of the data and by the memory that is free. What
would make a recipe fit that does not: one of its keys is changed, and the memory predicted again.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from lorasft.data.packing import MicroBatch, Plan, Sequences, cost, shuffle
from lorasft.data.prefixes import Sharing
from lorasft.data.store import TokenStore, example_lengths
from lorasft.errors import RecipeError
from lorasft.model.loss import Network
from lorasft.model.memory import USABLE, ActivationMemory, Prediction, dry_run, heaviest_batch, static_bytes
from lorasft.model.recompute import decoder_layers, recompute
from lorasft.model.selfcheck import verify
from lorasft.model.weightless import make_weightless, plan_network
from lorasft.recipe import Recipe
from lorasft.train.state import Layout

_FIXED = 240  # a micro-batch takes the time of so many tokens on top of its own: dequantizing, launches
_STEPS_SEEN = 64  # whose micro-batches are weighed to find the heaviest
_MOST_TOKENS = 16_384  # that shared prefixes may widen it to
_WORTH = 0.9  # a wider micro-batch has to compute at most this share of the tokens
_SHORTER = (3 / 4, 1 / 2, 3 / 8, 1 / 4, 1 / 8, 1 / 16)  # of the longest sequence


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

    Raises RecipeError when the model cannot recompute and the recipe wants it.
    """
    machine = recipe.machine
    own = machine.attention if machine.attention in ("eager", "sdpa") else None
    network = verify(model.get_base_model(), segments=kept.segments if kept else own is None)
    if own:
        network.causal.set_attn_implementation(own)
    network = choose_sharing(network, machine.share_prefixes, kept=kept)
    plan = replace(plan, share_prefixes=network.share, rope_switch_length=network.rope_switch_length)
    free = machine.micro_batch_tokens == "auto" and kept is None and network.segments
    if not network.segments:
        plan = replace(plan, micro_batch_tokens=1)  # sequences go alone
    elif kept and machine.micro_batch_tokens == "auto":
        plan = replace(plan, micro_batch_tokens=kept.micro_batch_tokens)
    elif free and network.share:
        plan = replace(plan, micro_batch_tokens=widen(plan, rows))
    wanted = _wanted_layers(recipe, network, kept=kept)
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
    """`network` as it shares prefixes: as recipe or checkpoint say, where that was verified and nothing drops out.

    With dropout, examples that share tokens would share what is dropped.
    """
    if wanted == "auto" and kept:
        wanted = kept.share_prefixes
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


def _wanted_layers(recipe: Recipe, network: Network, *, kept: Layout | None) -> int | None:
    """How many layers recompute their activations by recipe, checkpoint or model; None: as few as fit."""
    wanted, layers = recipe.machine.activation_checkpointing, len(decoder_layers(network.causal))
    if wanted is True and not layers:
        what = "this model cannot recompute its activations"
        raise RecipeError(what, where="machine.activation_checkpointing", hint="use auto or false")
    if isinstance(wanted, bool) or not layers:
        return layers if wanted is True else 0
    return kept.recomputed_layers if kept else None


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
    return Fit(plan, wanted, layers, heaviest, needs, spare, computed=plan.step(1, rows).tokens)


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


def predict_leanest(recipe: Recipe, config: Any, network: Network, *, longest: int) -> Prediction:
    """What a step needs in the leanest layout that `recipe` allows, with sequences of up to `longest` tokens.

    `config`: of the base. `network`: as it was verified. Raises what `dry_run` raises.
    """
    machine = recipe.machine
    model = make_weightless(config, recipe.model, recipe.adapter, network.runs_on)
    network = plan_network(network, model)
    tokens = longest if machine.micro_batch_tokens == "auto" else machine.micro_batch_tokens
    batch = heaviest_batch(network, longest=longest, capacity=tokens)
    layers = 0 if machine.activation_checkpointing is False else len(decoder_layers(network.causal))
    return Prediction(static_bytes(model, recipe.optimizer.name), dry_run(network, batch, recomputed=layers))


def find_suggestions(recipe: Recipe, config: Any, network: Network, rows: TokenStore, *, memory: int) -> Iterator[str]:
    """Changes with which `recipe` fits into `memory` bytes, each alone, as they would be typed: those first that change
    the result least. Raises what `dry_run` raises.
    """
    lengths = example_lengths(rows)

    def fits(changed: Recipe) -> bool:
        longest = min(int(lengths.max()), changed.data.max_length)
        static, needs = (found := predict_leanest(changed, config, network, longest=longest)).static, found.activations
        return needs.fits(memory - static.loaded - static.upcoming)

    for key, values in _alternatives(recipe, lengths).items():
        section, name = key.split(".")
        settings = getattr(recipe, section)
        values = [value for value in values if value != getattr(settings, name)]
        changed = [recipe.model_copy(update={section: settings.model_copy(update={name: one})}) for one in values]
        first = bisect_left(changed, True, key=fits)
        if first == len(changed):
            continue
        text = f"{key}={values[first]}".replace("()", "[]")
        if key == "data.max_length":
            longer = int((lengths > values[first]).sum())
            many = recipe.data.overlong == "drop" and longer > recipe.data.max_dropped * len(lengths)
            text += f"{' data.overlong=truncate' * many} ({longer:,} of {len(lengths):,} rows are longer)"
        yield text


def _alternatives(recipe: Recipe, lengths: NDArray[Any]) -> dict[str, Sequence[Any]]:
    """By key what it may be instead: the least change first, and first the keys that change the result least."""
    adapter, longest = recipe.adapter, int(lengths.max())
    shorter = [int(share * longest) // 8 * 8 for share in _SHORTER]
    found: dict[str, Sequence[Any]] = {
        "machine.activation_checkpointing": ["auto"],
        "machine.micro_batch_tokens": ["auto"],
        "model.quantization": ["nf4"],
        "optimizer.name": ["adamw8bit"],
    }
    if adapter.start is None:  # else its sizes are given
        found["adapter.modules_to_save"] = [()]
        found["adapter.rank"] = [1 << power for power in reversed(range(adapter.rank.bit_length()))]
    # With shorter ones hardly a row would be what it was.
    found["data.max_length"] = [one for one in shorter if one >= 8 and (lengths > one).sum() <= len(lengths) // 2]
    return found
