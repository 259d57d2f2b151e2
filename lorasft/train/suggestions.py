"""What would make a recipe fit that does not: change one thing, predict again; in the recipe's own keys."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

from lorasft.data.store import TokenStore, example_lengths
from lorasft.model.loss import Network
from lorasft.model.memory import Prediction, dry_run, heaviest_batch, static_bytes
from lorasft.model.recompute import decoder_layers
from lorasft.model.weightless import make_weightless, plan_network
from lorasft.recipe import AdapterSettings, Recipe

_SHORTER = (3 / 4, 1 / 2, 3 / 8, 1 / 4, 1 / 8, 1 / 16)  # of the longest sequence


@dataclass(frozen=True)
class Case:
    """A recipe in the leanest layout that it allows, and the memory that it is to fit into."""

    recipe: Recipe
    adapter: AdapterSettings  # with the sizes of the adapter that it begins from
    config: Any  # of the base
    network: Network  # as it was verified
    memory: int  # bytes for weights, gradients, optimizer and activations
    longest: int  # tokens of a sequence
    tokens: int | None  # of a micro-batch by the recipe; None: as few as it takes
    recomputed: int | None  # layers by the recipe; None: as many as it takes

    @cached_property
    def prediction(self) -> Prediction:
        """What the heaviest micro-batch that can come needs. Raises what `dry_run` raises."""
        model = make_weightless(self.config, self.recipe.model, self.adapter, self.network.runs_on)
        network = plan_network(self.network, model)
        batch = heaviest_batch(network, longest=self.longest, capacity=self.tokens or self.longest)
        layers = len(decoder_layers(network.causal)) if self.recomputed is None else self.recomputed
        needs = dry_run(network, batch, recomputed=layers)
        return Prediction(static_bytes(model, self.recipe.optimizer.name), needs)

    @property
    def spare(self) -> int:
        """Bytes beside what lives all through the run."""
        return self.memory - self.prediction.static.loaded - self.prediction.static.upcoming

    def fits(self) -> bool:
        """Whether it fits."""
        return self.prediction.activations.fits(self.spare)

    def change(self, section: str, **values: Any) -> Case:
        """The same with other settings in a section of the recipe."""
        recipe = self.recipe.model_copy(update={section: getattr(self.recipe, section).model_copy(update=values)})
        adapter = self.adapter.model_copy(update=values) if section == "adapter" else self.adapter
        return replace(self, recipe=recipe, adapter=adapter)


def find_suggestions(case: Case, rows: TokenStore, *, most: int = 3) -> list[str]:
    """The first `most` changes with which `case` fits, each alone; those first that change the result least.

    Raises what `dry_run` raises.
    """
    return list(islice(_suggest(case, rows), most))


def _suggest(case: Case, rows: TokenStore) -> Iterator[str]:
    for changes in (*_layouts(case), *_settings(case), _lengths(case, rows)):  # of one key, the least change first
        first = bisect_left(changes, True, key=lambda change: change[1].fits())
        if first < len(changes):
            yield changes[first][0]


def _layouts(case: Case) -> Iterator[list[tuple[str, Case]]]:
    """What the recipe itself decided and could leave open: that changes no result."""
    if case.recomputed is not None:
        yield [("machine.activation_checkpointing=auto", replace(case, recomputed=None))]
    if case.tokens is not None and case.tokens > case.longest:
        yield [("machine.micro_batch_tokens=auto", replace(case, tokens=None))]


def _settings(case: Case) -> Iterator[list[tuple[str, Case]]]:
    """What lives all through the run, and could be less."""
    adapter = case.adapter
    if case.recipe.model.quantization == "none":
        yield [("model.quantization=nf4", case.change("model", quantization="nf4"))]
    if case.recipe.optimizer.name == "adamw":
        yield [("optimizer.name=adamw8bit", case.change("optimizer", name="adamw8bit"))]
    if adapter.start is None:  # else its sizes are given
        if adapter.modules_to_save:
            yield [("adapter.modules_to_save=[]", case.change("adapter", modules_to_save=()))]
        ranks = [1 << power for power in reversed(range(adapter.rank.bit_length())) if 1 << power < adapter.rank]
        yield [(f"adapter.rank={rank}", case.change("adapter", rank=rank)) for rank in ranks]


def _lengths(case: Case, rows: TokenStore) -> list[tuple[str, Case]]:
    """Shorter sequences, and what else it takes where more rows would be dropped than the recipe allows."""
    lengths, changes = example_lengths(rows), []
    for length in (int(share * lengths.max()) // 8 * 8 for share in _SHORTER):
        if length >= case.longest:
            continue
        longer = int((lengths > length).sum())
        if length < 8 or longer > len(lengths) // 2:  # hardly a row would be what it was
            break
        many = case.recipe.data.overlong == "drop" and longer > case.recipe.data.max_dropped * len(lengths)
        keys = f"data.max_length={length}" + (" data.overlong=truncate" if many else "")
        changes.append((f"{keys} ({longer:,} of {len(lengths):,} rows are longer)", replace(case, longest=length)))
    return changes
