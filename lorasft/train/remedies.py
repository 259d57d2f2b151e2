"""What would make a recipe fit that does not: single changes, each of them computed, in the recipe's own keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from torch import nn

from lorasft.data.store import TokenStore
from lorasft.model.loss import Network
from lorasft.model.memory import Footprint, Holdings, count_holdings, fewest_recomputed, fits, heaviest_batch, measure
from lorasft.recipe import Recipe

_SHORTER = (3 / 4, 1 / 2, 3 / 8, 1 / 4, 1 / 8, 1 / 16)  # of the longest sequence
_PACKED = 4.127 / 8  # bytes of a weight in NF4, constants included


def find_remedies(
    recipe: Recipe, network: Network, parts: Sequence[nn.Module], *, rows: TokenStore, spare: int, most: int = 3
) -> list[str]:
    """The first `most` changes with which a step stays within `spare` bytes beside what `parts` hold for good.

    Those come first that change the result least. Raises what `measure` raises.
    """
    return list(islice(_remedies(recipe, network, parts, rows=rows, spare=spare), most))


def _remedies(
    recipe: Recipe, network: Network, parts: Sequence[nn.Module], *, rows: TokenStore, spare: int
) -> Iterator[str]:
    lengths = np.maximum.reduceat(np.diff(rows.sequence_offsets), rows.example_offsets[:-1])
    longest = int(lengths.max())
    leanest = _leanest(network, longest)
    if _lies_within(leanest, spare):
        yield from _machine_remedies(recipe)
    holdings = count_holdings(parts, recipe.optimizer.name)
    for change, saved in _savings(recipe, parts, holdings):
        if _lies_within(leanest, spare + saved):
            yield change
    for length in (int(share * longest) // 8 * 8 for share in _SHORTER):
        if length >= 8 and _lies_within(_leanest(network, length), spare):
            longer = int((lengths > length).sum())
            yield f"data.max_length={length} ({longer:,} of {len(lengths):,} rows are longer)"
            break
    needed = min(leanest.peak(count) for count in range(len(leanest.layers) + 1)) / 0.9 - spare
    share = 1 - needed / holdings.loaded
    if share > 0:
        yield f"a model.base of at most {_count(share * _parameters(holdings))} parameters"


def _leanest(network: Network, longest: int) -> Footprint:
    """What a micro-batch needs that holds one sequence."""
    return measure(network, heaviest_batch(network, longest=longest, capacity=longest))


def _lies_within(footprint: Footprint, spare: int) -> bool:
    return fits(footprint, fewest_recomputed(footprint, spare), spare)


def _machine_remedies(recipe: Recipe) -> Iterator[str]:
    """What the recipe itself decided, and could leave open: that alone changes no result."""
    if recipe.machine.micro_batch_tokens != "auto":
        yield "machine.micro_batch_tokens=auto"
    if recipe.machine.activation_checkpointing is False:
        yield "machine.activation_checkpointing=auto"


def _savings(recipe: Recipe, parts: Sequence[Any], holdings: Holdings) -> Iterator[tuple[str, int]]:
    """Changes of what lives all through a run, with the bytes that each saves."""
    if recipe.model.quantization == "none":
        head = parts[0].get_output_embeddings()
        yield "model.quantization=nf4", sum(_quantizable_bytes(part, head) for part in parts)
    if recipe.optimizer.name == "adamw":
        yield "optimizer.name=adamw8bit", holdings.optimizer - count_holdings(parts, "adamw8bit").optimizer
    if recipe.adapter.start is None:
        weights = [one for part in parts for name, one in part.named_parameters() if "lora_" in name]
        cost = 16 if recipe.optimizer.name == "adamw" else 10  # fp32 weight, gradient and two moments
        size = cost * sum(weight.numel() for weight in weights)
        rank = recipe.adapter.rank
        ranks = (1 << power for power in reversed(range(rank.bit_length())) if 1 << power < rank)
        yield from ((f"adapter.rank={less}", int(size * (1 - less / rank))) for less in ranks)


def _quantizable_bytes(part: nn.Module, head: nn.Module | None) -> int:
    """Bytes that NF4 would save in the linears of `part` beside its head."""
    linears = [module for name, module in part.named_modules() if type(module) is nn.Linear and "lora_" not in name]
    weights = [linear.weight for linear in linears if linear is not head]
    return sum(int(weight.numel() * (weight.element_size() - _PACKED)) for weight in weights)


def _parameters(holdings: Holdings) -> float:
    weights = holdings.weights
    return weights.four_bit / _PACKED + weights.sixteen_bit / 2 + weights.full / 4


def _count(number: float) -> str:
    return f"{number / 1e9:.1f} billion" if number >= 1e9 else f"{number / 1e6:,.1f} million"
