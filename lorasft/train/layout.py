"""How a run is fitted to its machine: dtype, micro-batches, shared prefixes, recomputed layers. It changes no result.

What the recipe states under `machine` is taken; what it leaves to `auto` is kept from the checkpoint when a run goes
on, else chosen by what was verified on the model, by the lengths of the data and by the memory that is free.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import nn

from lorasft.data.packing import Plan, Sequences
from lorasft.data.prefixes import Sharing
from lorasft.data.store import TokenStore
from lorasft.errors import RecipeError
from lorasft.model.loss import Network
from lorasft.model.memory import (
    fewest_recomputed,
    free_memory,
    gradient_bytes,
    heaviest_batch,
    measure,
    optimizer_bytes,
)
from lorasft.model.recompute import decoder_layers, recompute
from lorasft.recipe import Recipe
from lorasft.train.checkpoint import Layout, State

_TOKENS = {"cpu": 2048, "cuda": 4096}  # of a micro-batch: measured on CPU
_MOST_TOKENS = 16_384  # that shared prefixes may widen it to
_WORTH = 0.9  # a wider micro-batch has to compute at most this share of the tokens


def choose_layout(
    recipe: Recipe, network: Network, *, plan: Plan, rows: TokenStore, saved: State | None
) -> tuple[Network, Layout]:
    """The network as it will be run, and the layout of the run; `plan` brings the tokens of a micro-batch."""
    network = choose_sharing(network, recipe.machine.share_prefixes, saved=saved)
    tokens = plan.micro_batch_tokens
    if recipe.machine.micro_batch_tokens == "auto" and not saved and network.share:
        tokens = widen(replace(plan, share_prefixes=network.share, horizon=network.horizon), rows)
    recomputed = choose_recomputed(recipe, network, tokens=tokens, rows=rows, saved=saved)
    recompute(network.causal, recomputed)
    layout = Layout(
        dtype=str(network.causal.dtype).removeprefix("torch."),
        micro_batch_tokens=tokens if network.segments else 1,  # 1: sequences go alone
        recomputed_layers=recomputed,
        segments=network.segments,
        share_prefixes=network.share,
    )
    return network, layout


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
    if not drops_out(network.causal):
        return replace(network, share=wanted)
    notice = "shared prefixes are computed for each example: dropout is active"
    return replace(network, share=False, notices=(*network.notices, notice))


def drops_out(model: nn.Module) -> bool:
    """Whether anything in `model` drops out while it trains: modules, or attention by a number that it is given."""
    return any(
        "drop" in name and isinstance(value, float) and value > 0
        for module in model.modules()
        for name, value in ({"dropout": module.p} if isinstance(module, nn.Dropout) else vars(module)).items()
    )


def choose_recomputed(recipe: Recipe, network: Network, *, tokens: int, rows: TokenStore, saved: State | None) -> int:
    """How many layers recompute their activations: as the recipe or the checkpoint says, else as few as fit.

    Raises RecipeError when the model cannot recompute and the recipe wants it.
    """
    wanted, layers = recipe.machine.activation_checkpointing, len(decoder_layers(network.causal))
    if wanted is True and not layers:
        what = "this model cannot recompute its activations"
        raise RecipeError(what, where="machine.activation_checkpointing", hint="use auto or false")
    if isinstance(wanted, bool) or not layers:
        return layers if wanted is True else 0
    if saved:
        return saved.layout.recomputed_layers
    longest = int(np.diff(rows.sequence_offsets).max())
    batch = heaviest_batch(network, longest=longest, capacity=tokens)
    try:
        footprint = measure(network, batch)
    except (LookupError, TypeError, ValueError, RuntimeError, MemoryError):
        return layers  # no room to measure in, or layers that are called in a way not known here: what needs least
    # The gradients and the optimizer take their share later, and keep it.
    upcoming = gradient_bytes(network.causal) + optimizer_bytes(network.causal, recipe.optimizer.name)
    return fewest_recomputed(footprint, free_memory(network.device) - upcoming)
