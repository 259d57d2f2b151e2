"""What a run works with, and where it is: what the loop, its saves and its evaluations share."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import NonNegativeInt, PositiveInt, StringConstraints
from torch import Tensor

from lorasft.artifact import Artifact
from lorasft.data.packing import Plan, Share
from lorasft.data.prefixes import Sharing
from lorasft.data.prepare import Prepared
from lorasft.data.store import TokenStore
from lorasft.model.loss import Network
from lorasft.model.recompute import recomputed_layers
from lorasft.model.trained import Trained
from lorasft.recipe import AdapterSettings, Recipe
from lorasft.training.distributed import Ranks
from lorasft.training.metrics import Metrics


@dataclass(frozen=True)
class Layout:
    """What was chosen for the machine. It changes no result but the last bits, so a resumed run keeps it."""

    dtype: Annotated[str, StringConstraints(pattern="^(float32|bfloat16)$")]
    micro_batch_tokens: PositiveInt
    recomputed_layers: NonNegativeInt  # the first ones of the model recompute their activations going backwards
    segments: bool
    share_prefixes: Sharing = False
    processes: PositiveInt = 1
    shard: PositiveInt = 1  # processes over which a copy of the base lies
    keep_16bit: bool = False  # copies of 4-bit weights
    whole_experts: bool = False  # those of a layer dequantized at once


@dataclass(frozen=True)
class State:
    """Where a run is after a step. Order, learning rate and dropout follow from the step, so this is all."""

    step: NonNegativeInt
    data: str  # the key of the tokens that are trained on
    metrics_bytes: NonNegativeInt  # length of metrics.jsonl: what a resumed run cuts it back to
    layout: Layout
    run: str = ""  # which run this is: another one's checkpoints are neither resumed from nor deleted
    evaluation_due: bool = False  # a signal came first: a resumed run begins with it
    best_step: int | None = None
    best_loss: float | None = None


@dataclass(frozen=True)
class RunInputs:
    """What is known of a run before any weight is read."""

    config: Any  # of the base
    tokenizer: Any
    new_rows: dict[int, list[int]]  # of new tokens: see `add_rows`
    prepared: Prepared
    plan: Plan
    adapter: AdapterSettings  # with the sizes of the adapter that it begins from
    start: Artifact | None  # that adapter
    saved: State | None = None  # what is resumed: with its layout, where the recipe leaves it open


@dataclass
class Run:
    """All that a run works with. What changes: parameters, optimizer, and the plan where memory ends."""

    recipe: Recipe
    inputs: RunInputs
    plan: Plan
    network: Network
    model: Any  # the PEFT model
    trained: Trained
    optimizer: Any  # of it
    metrics: Metrics
    ranks: Ranks
    signal: int = 0  # that came in its last step, which it ended
    moments: dict[str, Tensor] | None = None  # of the whole optimizer for a save, where each process has a part of it
    of_base: dict[Any, Any] = field(default_factory=dict)  # what `evaluate` found of the base, by what decides its bits

    @property
    def folder(self) -> Path:
        return Path(self.recipe.run.output)

    @property
    def share(self) -> Share:
        """Which part of a step's work is this process's."""
        above = self.plan.micro_batch_tokens if self.plan.spread else math.inf
        return Share(self.ranks.index, self.ranks.count, self.ranks.in_step, above)

    @property
    def early_end(self) -> str:
        """Why the run ends before its last planned step; empty where it does not."""
        early, many = self.plan.steps < self.inputs.plan.steps, self.recipe.run.patience or 0
        return f"no better held-out loss in {many} evaluation{'s' * (many > 1)}" if early else ""

    @property
    def rows(self) -> TokenStore:
        """What is trained on."""
        return self.inputs.prepared.train

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """Where the state after a step is saved."""
        return self.checkpoints / f"step-{step:06d}"

    @property
    def layout(self) -> Layout:
        """How the run is laid out now, which a lack of memory may have changed."""
        return Layout(
            dtype=str(self.network.causal.dtype).removeprefix("torch."),
            micro_batch_tokens=self.plan.micro_batch_tokens,
            recomputed_layers=recomputed_layers(self.network.causal),
            segments=self.network.segments,
            share_prefixes=self.network.share,
            processes=self.ranks.count,
            shard=self.ranks.shard,
            keep_16bit=self.network.causal.frozen_weights.keep is not None,
            whole_experts=self.network.causal.frozen_weights.whole,
        )
