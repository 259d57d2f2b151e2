"""`lorasft init`: a first recipe for a file of rows, with a model that fits; init.yaml.jinja has its lines and why."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from lorasft import machine
from lorasft.commands.arguments import add_columns, find_device, parse_bytes
from lorasft.commands.recipes import count_text, read_sizes, write_recipe
from lorasft.data.folders import find_files
from lorasft.data.survey import survey_rows
from lorasft.errors import CapacityError, LorasftError, ModelError
from lorasft.files import read_objects, refuse_existing
from lorasft.hub import find_local, is_hub_id
from lorasft.recipe import DataSettings
from lorasft.recipe.load import find_path, portable_text, read_source
from lorasft.recipe.yaml_reader import parse_yaml
from lorasft.terminal import quote, say, size_text

ON_CPU = 4 << 30  # bytes that a model proposed for a CPU needs at most: larger ones take weeks


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", help="a file, a folder, or the hub id of a data set")
    parser.add_argument("--model", metavar="MODEL", help="a shipped recipe's name, a hub id or a folder")
    sized: Any = lambda text: (text, parse_bytes(text))  # noqa: E731  as it was typed, for what is printed
    parser.add_argument("--memory", type=sized, metavar="SIZE", help="of the card: 12GiB (default: what is free)")
    parser.add_argument("--out", default="recipe.yaml", metavar="FILE", help="the recipe (default: recipe.yaml)")
    parser.add_argument("--yes", action="store_true", help="ask nothing, take what is proposed")
    add_columns(parser)


def run(data: str, out: str, columns: str | None, model: str | None, memory: tuple[str, int] | None, yes: bool) -> None:
    """Write a recipe for the rows in `data`; its path on stdout. `memory`: a size as typed, and its bytes. Raises
    RecipeError for a file that exists, DataError for rows, and what `_choose_model` does for models."""
    target, source = Path(out), read_source(data, columns)
    refuse_existing(target)
    survey = survey_rows(DataSettings(train=(source,)))
    rows, kinds, roles = len(survey.sizes), " and ".join(survey.kinds), ", ".join(survey.roles)
    say(f"{data}: {rows:,} row{'s' * (rows > 1)} of format {kinds}{f', of {roles}' * bool(roles)}")
    for notice in survey.report.notices():
        say(notice)
    ask, given = sys.stdin.isatty() and not yes, memory[1] if memory else None
    chosen = _choose_model(model, given)
    while ask and model is None and (typed := _answer(f"model, this or another [{chosen['row']['name']}]")):
        try:
            chosen, model = _choose_model(typed, given), typed
        except LorasftError as error:  # mistyped: asked again
            say(error)
    asked = ask and roles and "system" not in survey.roles
    facts = {
        **chosen,
        **vars(survey),
        "data": data,
        "source": source,
        "lengths": survey.lengths(chosen["base"]),
        "config": next(read_objects(find_local(chosen["base"], "config.json")), {}),
        "base": find_path(chosen["base"], [Path.cwd()]),
        "path": Path(find_path(data, [Path.cwd()])),
        "validation": bool(find_files(source)[1]),
        "system": asked and _answer("system message for all conversations [none]"),
    }
    limits = write_recipe(target, "init.yaml.jinja", facts).data
    if longer := sum(length > limits.max_length for length in facts["lengths"]):
        say(f"about {longer:,} of {rows:,} rows have over {limits.max_length} tokens: data.overlong={limits.overlong}")
    size = f" --memory {quote(memory[0])}" if memory else ""
    for command in ("preview", "plan", "train"):
        say(f"next: lorasft {command} {quote(target)}{size * (command == 'plan')}")
    print(target)


def _choose_model(model: str | None, memory: int | None) -> dict[str, Any]:
    """The base, what a shipped recipe says for it, and about it: of `model`, or else of the largest that fits `memory`
    bytes or what is free. Raises ModelError where it is not there, CapacityError where none fits, or not `memory`."""
    rows = sorted(read_sizes(), key=lambda row: int(row["parameters"]))
    row = next((row for row in rows if model in (row["name"], row["base"])), None)
    if model is not None and (row is None or Path(model).exists()):
        if (Path(model).exists() or not is_hub_id(model)) and not Path(model, "config.json").is_file():
            hint = "name a model folder, a hub id as OWNER/NAME, or a shipped recipe: lorasft recipes list"
            raise ModelError("there is no such folder, or no config.json in it", where=repr(model), hint=hint)
        return {"base": model, "shipped": {}, "row": None}
    free, whose = (memory, "--memory") if memory else _free_memory()
    fits = [row for row in rows if row["needs"] <= free]
    row = row or [rows[0], *fits][-1]
    needs, room = f"{row['name']} needs {size_text(row['needs'])}", f"{size_text(free)} ({whose})"
    if row not in fits and (memory or model is None):
        hint = ", or ".join([*(f"--model {one['name']}" for one in fits[-1:]), f"--memory {row['card']}GB"])
        raise CapacityError(f"{needs}, more than {room}{'; no shipped one fits' * (not fits)}", hint=hint)
    if row not in fits:
        say(f"warning: {needs}, more than {room}; where another machine trains, --memory has its size")
    elif model is None:
        say(f"the largest that fits into {room}: {needs}; --model takes others")
    shipped = parse_yaml(portable_text(Path(row["path"])), row["path"]).value
    return {"base": shipped["model"]["base"], "shipped": shipped, "row": row, "count": count_text(row["parameters"])}


def _free_memory() -> tuple[int, str]:
    """Bytes for a model, and whose they are."""
    device = find_device()
    if device.type == "cuda":
        return machine.free_memory(device), "free on the card"
    return min(machine.free_memory(device), ON_CPU), "no card: as much as a CPU can train"


def _answer(question: str) -> str:
    """What the person at the terminal types, empty for the proposal; stdout is left alone."""
    say(f"{question}: ", end="")
    return sys.stdin.readline().strip()
