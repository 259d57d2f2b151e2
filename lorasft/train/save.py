"""When a run saves, and what happens when the disk does not take it: it goes on, once."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

from lorasft.errors import CapacityError, RecipeError
from lorasft.model.recompute import recomputed_layers
from lorasft.train.checkpoint import list_checkpoints, retain, save_checkpoint
from lorasft.train.oom import plain_oom_errors
from lorasft.train.state import Layout, Run, State


def save(run: Run, state: State) -> State:
    """Secure the metrics, commit a checkpoint, then let go of the ones that are no longer kept."""
    state = replace(state, metrics_bytes=run.logbook.secure(), layout=current_layout(run, state.layout))
    save_checkpoint(run.checkpoints, state, run.learner, base=run.recipe.model)
    best = state.best_step if run.recipe.run.keep_best else None
    retain(run.checkpoints, run=state.run, keep=run.recipe.run.keep, best_step=best)
    return state


def current_layout(run: Run, layout: Layout) -> Layout:
    """`layout` as a lack of memory may have changed it meanwhile."""
    recomputed = recomputed_layers(run.network.causal)
    return replace(layout, micro_batch_tokens=run.plan.micro_batch_tokens, recomputed_layers=recomputed)


class Saves:
    """The saves of a run: since when, and whether the last one failed."""

    def __init__(self, state: State, *, minutes: float | None) -> None:
        self.last = state
        self.minutes = minutes
        self.time = time.monotonic()
        self.failed = False

    def overdue(self) -> bool:
        return self.minutes is not None and time.monotonic() - self.time > 60 * self.minutes

    def attempt(self, run: Run, state: State, *, final: bool) -> State:
        """Save. When disk or memory does not allow it, say so and go on with what was saved before.

        Raises CapacityError when that happens twice in a row. `final`: no other save is to come, so it is tried twice.
        """
        self.time = time.monotonic()
        try:
            with plain_oom_errors(run.folder):
                self.last = save(run, state)
        except (OSError, CapacityError, RecipeError) as fault:
            reason = getattr(fault, "what", fault)
            words = f"the save after step {state.step} failed: {reason}; {describe_room(run.checkpoints)}"
            if self.failed:
                hint = f"mend the disk and go on with --resume from step {self.last.step}"
                raise CapacityError(f"{words}; the second in a row", where=str(run.checkpoints), hint=hint) from fault
            self.failed = True
            run.logbook.note(f"{words}; saved up to step {self.last.step}, {'once more' if final else 'going on'}")
            if final:
                return self.attempt(run, state, final=True)
            return replace(state, best_step=self.last.best_step, best_loss=self.last.best_loss)
        self.failed = False
        return self.last


def describe_room(folder: Path) -> str:
    """How much a save needs, by the newest one, and how much is free."""
    try:
        newest = list_checkpoints(folder)[-1]
        need = sum(path.stat().st_size for path in newest.iterdir())
        return f"it needs {need / 1e6:,.1f} MB, {shutil.disk_usage(folder).free / 1e6:,.1f} MB are free"
    except (OSError, IndexError):
        return "no checkpoint is there to tell what it needs"
