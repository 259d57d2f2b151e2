"""`lorasft sweep`: a recipe with each combination of several values, one run after the other on one loaded base."""

from __future__ import annotations

import gc
import json
import math
import os
import re
import time
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from lorasft.commands import report, train
from lorasft.commands.arguments import fill_in, parse_seconds, read_recipe, say_error
from lorasft.errors import LorasftError, RecipeError, Stopped
from lorasft.recipe import Recipe, load_recipe
from lorasft.report import History
from lorasft.signals import exit_code
from lorasft.terminal import quote, redact, say

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
    deadline, failed = time.monotonic() + budget, dict[Path, tuple[int, str]]()
    runs = _read_runs(recipe, overrides, out, resume=resume)
    folder = next(iter(runs)).parent
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
            number = train.train_one(settings, ALONE, again=again, resume=begun, verbose=verbose, shared=shared)
            if number and not all((one / "adapter").is_dir() for one in runs):
                raise Stopped(exit_code(number), "it is done", again)
        except Stopped as stopped:
            if stopped.exit_code:
                raise Stopped(stopped.exit_code, f"{path.name}: {stopped.what}", again) from None
            say(stopped.what)
        except (LorasftError, RuntimeError, MemoryError) as error:
            failed[path] = say_error(error), str(error).removeprefix("error: ").partition("\n")[0]
        gc.collect()  # what it held, the next one may need
    print(_table([*runs], failed))
    if pages := [str(path) for path in runs if (path / "recipe.yaml").is_file()]:
        report.run(pages, str(folder / "report.html"), show=False)
    if failed or not all((path / "adapter").is_dir() for path in runs):
        what = f"{len(failed)} of {len(runs)} runs failed" if failed else "the budget is used up"
        raise Stopped(next((code for code, _ in failed.values()), 0), what, again)


def _read_runs(recipe: str, overrides: Sequence[str], out: str | None, *, resume: bool) -> dict[Path, Recipe]:
    """The recipes by their run folders, which lie in one, after all that can be refused without torch."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise RecipeError("a sweep is one process", hint="leave out torchrun, or start each run with lorasft train")
    choices = []
    for word in overrides:
        key, _, text = word.partition("=")
        values = [f"{key}={value}" for value in _VALUE.findall(text)]
        choices.append(values if len(values) > 1 else [word])
        if len(values) > 1 and key.startswith("model."):
            raise RecipeError(f"{key} has several values", hint="a sweep has one base: make one for each")
    if not any(len(values) > 1 for values in choices):
        raise RecipeError("no key has several values", hint="optimizer.learning_rate=1e-4,2e-4, or lorasft train")
    runs: dict[Path, Recipe] = {}
    folder = Path(out or f"{load_recipe(recipe, [values[0] for values in choices]).run.output}-sweep")
    for words in product(*choices):
        differs = (word for word, values in zip(words, choices, strict=True) if len(values) > 1)
        name = ",".join(re.sub(r"^[^=]*\.", "", word) for word in differs)
        path = folder / re.sub(r"[^\w.,+=-]+", "_", name, flags=re.ASCII)[:200]
        begun = (path / "recipe.yaml").is_file()
        if begun and not resume:
            raise RecipeError("this sweep has begun", where=path, hint="--resume continues it; or --out NEW_FOLDER")
        if path in runs:
            raise RecipeError(f"two runs would be called {path.name}", where=folder, hint="name each value once")
        output = f"run.output={json.dumps(str(path), ensure_ascii=False)}"
        runs[path] = read_recipe(recipe, [*words, output], resume=begun)
    if others := sorted({path.parent for path in folder.glob("[!.]*/recipe.yaml")} - runs.keys()):
        what = f"there are runs in it that this sweep does not name: {', '.join(path.name for path in others[:3])}"
        raise RecipeError(what, where=folder, hint="another --out, or the keys and values that it began with")
    report.refuse_stranger(folder / "report.html")
    return runs


def _table(runs: Sequence[Path], failed: Mapping[Path, tuple[int, str]]) -> str:
    """A line for each run, that with the lowest held-out loss after a step first; at its end why it failed or ended."""
    rows: list[dict[str, Any]] = []
    for path in runs:
        run = History(path) if (path / "recipe.yaml").is_file() else None
        losses = [loss for step, loss in run.series["eval_loss"] if step] if run else []
        rows.append({"name": path.name, "run": run, "losses": losses, "failed": failed.get(path)})
    rows.sort(key=lambda row: min(row["losses"], default=math.inf))
    return redact(fill_in("sweep.txt.jinja", {"rows": rows}).rstrip())
