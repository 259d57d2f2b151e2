"""When a run saves, and what happens when the disk does not take it: it continues, once."""

from __future__ import annotations

import time
from dataclasses import replace

from lorasft.errors import CapacityError, RecipeError
from lorasft.model.recompute import recomputed_layers
from lorasft.train.checkpoint import prune_checkpoints, save_checkpoint
from lorasft.train.oom import plain_oom_errors
from lorasft.train.state import Layout, Run, State


def save(run: Run, state: State) -> State:
    """Secure the metrics, commit a checkpoint, then let go of the ones that are no longer kept."""
    state = replace(state, metrics_bytes=run.logbook.secure(), layout=current_layout(run, state.layout))
    save_checkpoint(run.checkpoints, state, run.learner, base=run.recipe.model)
    best = state.best_step if run.recipe.run.keep_best else None
    prune_checkpoints(run.checkpoints, run=state.run, keep=run.recipe.run.keep, best_step=best)
    return state


def current_layout(run: Run, layout: Layout) -> Layout:
    """`layout` as a lack of memory may have changed it meanwhile."""
    recomputed = recomputed_layers(run.network.causal)
    return replace(layout, micro_batch_tokens=run.plan.micro_batch_tokens, recomputed_layers=recomputed)


class CheckpointSaver:
    """The saves of a run: since when, and whether the last one failed."""

    def __init__(self, state: State, *, minutes: float | None) -> None:
        self.last = state
        self.minutes = minutes
        self.time = time.monotonic()
        self.failed = False

    def overdue(self) -> bool:
        """Whether `run.save_minutes` have passed since the last save."""
        return self.minutes is not None and time.monotonic() - self.time > 60 * self.minutes

    def attempt(self, run: Run, state: State, *, final: bool) -> State:
        """Save. When disk or memory does not allow it, say so and continue with what was saved before.

        Raises CapacityError when that happens twice in a row, or in the `final` save of a run.
        """
        self.time = time.monotonic()
        try:
            with plain_oom_errors(run.folder):
                self.last = save(run, state)
        except (OSError, CapacityError, RecipeError) as error:
            what = f"the save after step {state.step} failed: {getattr(error, 'what', error)}"
            if self.failed or final:
                hint = f"make room on the disk and continue with --resume from step {self.last.step}"
                raise CapacityError(what, where=str(run.checkpoints), hint=hint) from error
            self.failed = True
            run.logbook.note(f"{what}; saved up to step {self.last.step}, going on")
            return replace(state, best_step=self.last.best_step, best_loss=self.last.best_loss)
        self.failed = False
        return self.last
