"""`lorasft sweep`: a recipe with each combination of several values, one run after the other on one loaded base."""

from __future__ import annotations

import gc
import json
import math
import os
import re
import time
from argparse import ArgumentParser
from collections.abc import Collection, Iterator, Sequence
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from lorasft.commands import report, train
from lorasft.commands.arguments import parse_seconds, read_recipe, say_error
from lorasft.errors import LorasftError, RecipeError, Stopped
from lorasft.terminal import quote, say

if TYPE_CHECKING:
    from lorasft.recipe import Recipe

_VALUE = re.compile(r"""(?:\[[^]]*\]|\{[^}]*\}|"[^"]*"|'[^']*'|[^,])+""")  # one of several, between commas


def add_arguments(parser: ArgumentParser) -> None:
    train.add_arguments(parser)
    parser.add_argument("--out", metavar="FOLDER", help="for the run folders (default: run.output and -sweep)")
    about = "as 30min or 2h: then no run begins, and one that goes is stopped after the step, saved"
    parser.add_argument("--budget", type=parse_seconds, default=math.inf, metavar="TIME", help=about)


def run(
    recipe: str, overrides: Sequence[str], out: str | None, budget: float, resume: bool, quiet: bool, verbose: bool
) -> None:
    """Train each combination; on stdout a table, and the page of all. What fails ends its own run: the exit code is
    that of the first, at the end. Raises Stopped after a signal."""
    os.environ["LORASFT_QUIET"] = "1" if quiet else ""
    deadline, codes = time.monotonic() + budget, dict[Path, int]()
    runs, folder = _read_runs(recipe, overrides, out, resume=resume)
    again = f"lorasft sweep {' '.join(map(quote, (recipe, *overrides)))} --out {quote(folder)} --resume"
    from lorasft.training.distributed import ALONE
    from lorasft.training.run import Shared

    shared = Shared(folder / "tokens", deadline)
    for path, settings in runs.items():
        if (path / "adapter").is_dir() or time.monotonic() > deadline:
            continue
        say(f"run {path.name}", bold=True)
        begun = (path / "recipe.yaml").is_file()
        try:
            train.train_one(settings, ALONE, again=again, resume=begun, verbose=verbose, shared=shared)
        except Stopped as stopped:
            if stopped.exit_code:
                raise Stopped(stopped.exit_code, f"{path.name}: {stopped.what}", again) from None
            say(stopped.what)
        except (LorasftError, RuntimeError, MemoryError) as error:
            codes[path] = say_error(error)
        gc.collect()  # what it held, the next one may need
    print("\n".join(_table([*runs], codes)))
    if begun_ones := [str(path) for path in runs if (path / "recipe.yaml").is_file()]:
        report.run(begun_ones, str(folder / "report.html"), show=False)
    if codes:
        ended = LorasftError(f"{len(codes)} of {len(runs)} runs failed", where=folder, hint=again)
        ended.exit_code = next(iter(codes.values()))
        raise ended
    if not all((path / "adapter").is_dir() for path in runs):
        say(f"the budget is used up; next: {again}")


def _read_runs(
    recipe: str, overrides: Sequence[str], out: str | None, *, resume: bool
) -> tuple[dict[Path, Recipe], Path]:
    """The recipes by their run folders, after all that can be refused without torch; and the folder of these."""
    from lorasft.recipe.load import load_recipe

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise RecipeError("a sweep is one process", hint="leave out torchrun, or start each run with lorasft train")
    choices = []
    for word in overrides:
        key, _, text = word.partition("=")
        values = _VALUE.findall(text)
        choices.append([f"{key}={value}" for value in values] if len(values) > 1 else [word])
        if len(values) > 1 and key.startswith("model."):
            raise RecipeError(
                f"several values of {key}", where="command line", hint="a sweep for each: it has one base"
            )
    if not any(len(words) > 1 for words in choices):
        hint = "optimizer.learning_rate=1e-4,2e-4, or lorasft train"
        raise RecipeError("no key has several values", where="command line", hint=hint)
    runs: dict[Path, Recipe] = {}
    folder = Path(out or f"{load_recipe(recipe, [words[0] for words in choices]).run.output}-sweep")
    for words in product(*choices):
        differs = (word for word, values in zip(words, choices, strict=True) if len(values) > 1)
        name = ",".join(re.sub(r"^[^=]*\.", "", word) for word in differs)
        path = folder / re.sub(r"[^\w.,+=-]+", "_", name, flags=re.ASCII)[:200]
        begun = (path / "recipe.yaml").is_file()
        if path in runs:
            raise RecipeError(f"two runs would be called {path.name}", where=folder, hint="name each value once")
        if begun and not resume:
            hint = "continue it with --resume, or --out NEW_FOLDER"
            raise RecipeError("this sweep has begun", where=path, hint=hint)
        output = f"run.output={json.dumps(str(path), ensure_ascii=False)}"
        runs[path] = read_recipe(recipe, [*words, output], resume=begun)
    return runs, folder


def _table(runs: Sequence[Path], failed: Collection[Path]) -> Iterator[str]:
    """A line for each run, and which of them has the lowest held-out loss after a step."""
    from lorasft.report import History

    rows, best = [["run", "state", "step", "best held out", "last", "time in steps"]], dict[Path, float]()
    for path in runs:
        row = [path.name, "failed" if path in failed else "not begun", "", "", "", ""]
        if (path / "recipe.yaml").is_file():
            history = History(path)
            losses = [loss for step, loss in history.series["eval_loss"] if step]
            spent = timedelta(seconds=round(sum(seconds for _, seconds in history.series["seconds"])))
            best |= {path: min(losses)} if losses else {}
            shown = [f"{loss:.4f}" for loss in (best[path], losses[-1])] if losses else ["", ""]
            row = [path.name, history.state, str(history.step), *shown, str(spent)]
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *cells in rows:
        yield "  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])])
    if best:
        yield f"lowest held-out loss: {min(best, key=lambda path: best[path])}"
