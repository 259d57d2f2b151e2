"""What would make a recipe fit that does not: single changes, each of them computed, in the recipe's own keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby, islice
from typing import Any

from torch import nn

from lorasft.data.store import TokenStore, example_lengths
from lorasft.model.loss import Network
from lorasft.model.memory import USABLE, Footprint, count_holdings, fewest_recomputed, fits, heaviest_batch, measure
from lorasft.recipe import Recipe

_SHORTER = (3 / 4, 1 / 2, 3 / 8, 1 / 4, 1 / 8, 1 / 16)  # of the longest sequence
_LEAST_BASE = 0.05  # of the base's size: a smaller one would be another thing
_PACKED = 4.127 / 8  # bytes of a weight in NF4, constants included


@dataclass(frozen=True)
class Shortage:
    """What does not fit, and the layout that a change would have to keep to."""

    footprint: Footprint  # in the leanest layout that is allowed
    spare: int  # bytes for it
    tokens: int | None  # of a micro-batch; None: as few as the longest sequence has
    recomputed: int | None  # layers; None: as many as it takes


def find_remedies(
    recipe: Recipe, network: Network, parts: Sequence[Any], *, rows: TokenStore, short: Shortage, most: int = 3
) -> list[str]:
    """The first `most` changes that end a shortage, each alone; those first that change the result least.

    `parts`: the model, in as many parts as hold its weights. Raises what `measure` raises.
    """
    changes = [
        _free_layout(network, rows, short),
        _lighter_holdings(recipe, parts, short),
        _shorter_rows(recipe, network, rows, short),
        _smaller_base(parts, short),
    ]
    return list(islice(chain.from_iterable(changes), most))


def _ends(short: Shortage, footprint: Footprint, *, saved: int = 0) -> bool:
    """Whether `footprint` fits with `saved` bytes more to spare."""
    spare = short.spare + saved
    recomputed = fewest_recomputed(footprint, spare) if short.recomputed is None else short.recomputed
    return fits(footprint, recomputed, spare)


def _free_layout(network: Network, rows: TokenStore, short: Shortage) -> Iterator[str]:
    """What the recipe itself decided and could leave open: that changes no result."""
    if short.recomputed is not None and _ends(replace(short, recomputed=None), short.footprint):
        yield "machine.activation_checkpointing=auto"
    longest = int(example_lengths(rows).max())
    wider = short.tokens is not None and short.tokens > longest
    if wider and _ends(short, measure(network, heaviest_batch(network, longest=longest, capacity=longest))):
        yield "machine.micro_batch_tokens=auto"


def _lighter_holdings(recipe: Recipe, parts: Sequence[Any], short: Shortage) -> Iterator[str]:
    """Less that lives all through the run; of the ranks the first that suffices."""
    fitting = (
        (key, change) for key, change, saved in _savings(recipe, parts) if _ends(short, short.footprint, saved=saved)
    )
    for key, changes in groupby(fitting, key=lambda found: found[0]):
        yield f"{key}={next(changes)[1]}"


def _shorter_rows(recipe: Recipe, network: Network, rows: TokenStore, short: Shortage) -> Iterator[str]:
    """A length, and what else it takes where more rows would be dropped than the recipe allows."""
    lengths = example_lengths(rows)
    for length in (int(share * lengths.max()) // 8 * 8 for share in _SHORTER):
        capacity = max(length, short.tokens or 0)
        longer = int((lengths > length).sum())
        if longer > len(lengths) // 2:  # hardly a row would be what it was
            return
        if length >= 8 and _ends(short, measure(network, heaviest_batch(network, longest=length, capacity=capacity))):
            many = recipe.data.overlong == "drop" and longer > recipe.data.max_dropped * len(lengths)
            cut = " data.overlong=truncate" if many else ""
            yield f"data.max_length={length}{cut} ({longer:,} of {len(lengths):,} rows are longer)"
            return


def _smaller_base(parts: Sequence[Any], short: Shortage) -> Iterator[str]:
    """How large a base may be when all else stays as it is."""
    loaded = count_holdings(parts, "adamw").weights
    layers = len(short.footprint.layers)
    counts = range(layers + 1) if short.recomputed is None else [short.recomputed]
    lacking = min(short.footprint.peak(count) for count in counts) / USABLE - short.spare
    base = loaded.four_bit + loaded.sixteen_bit + loaded.full
    parameters = loaded.four_bit / _PACKED + loaded.sixteen_bit / 2 + loaded.full / 4
    if lacking < base:
        most = parameters * (1 - lacking / base)
        if most < _LEAST_BASE * parameters:
            return
        number = f"{most / 1e9:.1f} billion" if most >= 1e9 else f"{most / 1e6:,.1f} million"
        yield f"a model.base of at most {number} parameters"


def _savings(recipe: Recipe, parts: Sequence[Any]) -> Iterator[tuple[str, str | int, int]]:
    """Changes, by key and value, with the bytes that each saves."""
    if recipe.model.quantization == "none" and not recipe.adapter.dora:  # its norms could not be planned
        head = parts[0].get_output_embeddings()
        yield "model.quantization", "nf4", sum(_quantizable_bytes(part, head) for part in parts)
    if recipe.optimizer.name == "adamw":
        kept, lighter = (count_holdings(parts, name).optimizer for name in ("adamw", "adamw8bit"))
        yield "optimizer.name", "adamw8bit", kept - lighter
    if recipe.adapter.modules_to_save:
        moments = 8 if recipe.optimizer.name == "adamw" else 2
        named = [pair for part in parts for pair in part.named_parameters() if pair[1].requires_grad]
        whole = [one for name, one in named if "lora_" not in name]  # each with a gradient of its kind
        yield "adapter.modules_to_save", "[]", sum(one.numel() * (2 * one.element_size() + moments) for one in whole)
    if recipe.adapter.start is None:
        weights = [one for part in parts for name, one in part.named_parameters() if "lora_" in name]
        each = 16 if recipe.optimizer.name == "adamw" else 10  # fp32 weight, gradient and two moments
        size, rank = each * sum(weight.numel() for weight in weights), recipe.adapter.rank
        ranks = (1 << power for power in reversed(range(rank.bit_length())) if 1 << power < rank)
        yield from (("adapter.rank", less, int(size * (1 - less / rank))) for less in ranks)


def _quantizable_bytes(part: nn.Module, head: nn.Module | None) -> int:
    """Bytes that NF4 would save in the linears of `part` beside its head."""
    linears = [module for name, module in part.named_modules() if type(module) is nn.Linear and "lora_" not in name]
    weights = [linear.weight for linear in linears if linear is not head]
    return sum(int(weight.numel() * (weight.element_size() - _PACKED)) for weight in weights)
