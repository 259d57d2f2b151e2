"""`lorasft train`: run a recipe, show it while it goes, and say what to type next."""

from __future__ import annotations

import json
import math
import os
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasft.commands.arguments import add_recipe, fill_in, read_recipe
from lorasft.errors import Stopped
from lorasft.signals import Ended, exit_code
from lorasft.terminal import say, train_command

if TYPE_CHECKING:
    from lorasft.recipe import Recipe
    from lorasft.report import History
    from lorasft.training.distributed import Ranks
    from lorasft.training.run import Shared


def add_arguments(parser: ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--resume", action="store_true", help="continue what was begun, from its newest checkpoint")
    said = parser.add_mutually_exclusive_group()
    said.add_argument("--quiet", action="store_true", help="say nothing but errors, and the run folder at the end")
    said.add_argument("--verbose", action="store_true", help="plain lines on a terminal, too")


def run(recipe: str, overrides: Sequence[str], resume: bool, quiet: bool, verbose: bool) -> Path:
    """Train `recipe`; progress on stderr, the run folder on stdout, and returned."""
    from lorasft.training.distributed import join

    os.environ["LORASFT_QUIET"] = "1" if quiet else ""  # other processes of it inherit that
    with join() as ranks:
        settings = ranks.on_main(lambda: read_recipe(recipe, overrides, resume=resume))
        train_one(settings, ranks, again=train_command(recipe, *overrides), resume=resume, verbose=verbose)
        if ranks.is_main:
            print(settings.run.output)
    return Path(settings.run.output)


def train_one(
    settings: Recipe, ranks: Ranks, *, again: str, resume: bool, verbose: bool, shared: Shared | None = None
) -> int:
    """Train what was read, and say how it goes; `again`: the command that began it; `shared`: with runs before it.
    Returns the signal that came in its last step, or 0."""
    from lorasft.model.recompute import decoder_layers
    from lorasft.report import next_commands
    from lorasft.training.checkpoint import list_checkpoints
    from lorasft.training.loop import run_steps
    from lorasft.training.run import export_adapter, open_run
    from lorasft.training.samples import keep_samples

    started, folder = time.monotonic(), Path(settings.run.output)
    try:
        with open_run(settings, resume=resume, ranks=ranks, shared=shared) as (ready, state):
            ready.metrics.progress.live &= not verbose
            if ranks.is_main:
                facts: dict[str, Any] = {"run": ready, "layers": len(decoder_layers(ready.network.causal))}
                facts["memory"] = json.loads((folder / "memory.json").read_bytes())
                say(fill_in("train.txt.jinja", facts).rstrip())
            state = run_steps(ready, state, deadline=shared.deadline if shared else math.inf)
            adapter = ranks.on_main(lambda: export_adapter(ready, state))
        if ranks.is_main:
            facts = {"seconds": time.monotonic() - started, "commands": next_commands(folder, settings)}
            facts |= {"run": ready, "adapter": adapter, "samples": keep_samples(folder, until=state.step)}
            facts["result"] = state.best_step if settings.run.keep_best else state.step
            say(fill_in("trained.txt.jinja", facts).rstrip())
    except Ended as signalled:  # ends the run at once: before the first step, after the last, or twice
        what, command = "stopped before the first step", again
        if (folder / "adapter").is_dir():
            what, command = f"stopped; the adapter is whole: {folder / 'adapter'}", ""
        elif saved := list_checkpoints(folder / "checkpoints"):
            what = f"stopped at once, not saved since step {int(saved[-1].name.removeprefix('step-'))}"
            command = f"{train_command(folder)} --resume"
        raise Stopped(exit_code(signalled.args[0]), what, command) from None
    return ready.signal


def train(recipe: str | Path, *, resume: bool = False, **overrides: Any) -> History:
    """What `lorasft train` does, with `train={"epochs": 3}` or `**{"train.epochs": 3}`. Raises LorasftError."""
    from lorasft.recipe.load import flatten
    from lorasft.report import History

    words = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in flatten(overrides).items()]
    return History(run(str(recipe), words, resume=resume, quiet=False, verbose=False))
