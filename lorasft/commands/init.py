"""`lorasft init`: a first recipe for a file of rows, with a model that fits; init.yaml.jinja has its lines and why."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from contextlib import suppress
from pathlib import Path
from typing import Any

from lorasft.commands.arguments import add_columns, parse_bytes
from lorasft.commands.recipes import count_text, read_sizes, write_recipe
from lorasft.errors import CapacityError
from lorasft.files import refuse_existing
from lorasft.terminal import quote, say, size_text

ON_CPU = 4 << 30  # bytes that a model proposed for a CPU needs at most: larger ones take weeks
LONGEST = 4096  # tokens, where neither a shipped recipe nor the model's config says otherwise


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", help="a file, a folder, or the hub id of a data set")
    parser.add_argument("--model", metavar="MODEL", help="a shipped recipe's name, a hub id or a folder")
    parser.add_argument("--memory", type=parse_bytes, metavar="SIZE", help="of the card: 12GiB (default: what is free)")
    parser.add_argument("--out", default="recipe.yaml", metavar="FILE", help="the recipe (default: recipe.yaml)")
    parser.add_argument("--yes", action="store_true", help="ask nothing, take what is proposed")
    add_columns(parser)


def run(data: str, out: str, columns: str | None, model: str | None, memory: int | None, yes: bool) -> None:
    """Write a recipe for the rows in `data`; its path on stdout. Raises RecipeError for a file that exists, DataError
    for rows, ModelError for a model that is not there, CapacityError where none fits."""
    from lorasft.data.folders import find_files
    from lorasft.data.survey import survey_rows
    from lorasft.hub import is_folder, is_hub_id
    from lorasft.recipe import DataSettings
    from lorasft.recipe.load import find_path, read_source

    target, source = Path(out), read_source(data, columns)
    refuse_existing(target)
    survey = survey_rows(DataSettings(train=(source,)))
    rows, kinds, roles = len(survey.sizes), " and ".join(survey.kinds), ", ".join(survey.roles)
    say(f"{data}: {rows:,} rows of format {kinds}{f', of {roles}' * bool(roles)}")
    for notice in survey.report.notices():
        say(notice)
    ask = sys.stdin.isatty() and not yes
    chosen = _choose_model(model, memory, ask=ask)
    if not is_hub_id(chosen["base"]):
        is_folder(chosen["base"])
    asked = ask and roles and "system" not in survey.roles
    facts = chosen | {
        "data": data,
        "rows": rows,
        "kinds": kinds,
        "columns": source.columns,
        "base": find_path(chosen["base"], [Path.cwd()]),
        "system": asked and _answer("system message for all conversations [none]"),
        "path": find_path(data, [Path.cwd()]),
        "validation": bool(find_files(source)[1]),
        "usual": survey.lengths(chosen["base"])[int(0.99 * (rows - 1))],
        "most": chosen["shipped"].get("data", {}).get("max_length") or _positions(chosen["base"]),
        "read_as": "; columns ".join(["", *survey.report.read_as]),
        "run": Path(data).stem,
    }
    write_recipe(target, "init.yaml.jinja", facts)
    given = f" --memory {memory >> 20}MiB" if memory else ""
    for command in ("preview", "plan", "train"):
        say(f"next: lorasft {command} {quote(target)}{given * (command == 'plan')}")
    print(target)


def _choose_model(model: str | None, memory: int | None, *, ask: bool) -> dict[str, Any]:
    """The base, what a shipped recipe says for it, and about it: of `model`, or else of the largest that fits `memory`
    bytes or what is free. Raises CapacityError where it does not fit."""
    from lorasft.recipe.load import portable_text
    from lorasft.recipe.yaml_reader import parse_yaml

    rows = sorted(read_sizes(), key=lambda row: int(row["parameters"]))
    needs = {row["name"]: f"{row['name']} needs {size_text(row['needs'])}" for row in rows}
    free, whose = (memory, "--memory") if memory else (0, "") if model else _free_memory()
    room, fits = f"{size_text(free)} ({whose})", [row for row in rows if row["needs"] <= free]
    if not model and not fits:
        raise CapacityError(f"no shipped recipe fits into {room}", hint=needs[rows[0]["name"]])
    if not model:
        model = fits[-1]["name"]
        say(f"the largest that fits into {room}: {needs[model]}; --model takes others")
        model = (ask and len(fits) > 1 and _answer(f"model, this or another [{model}]")) or model
    row = next((row for row in rows if model in (row["name"], row["base"]) and not Path(model).exists()), None)
    if row is None:
        return {"base": model, "shipped": {}, "about": "no shipped recipe: lorasft plan says whether it fits"}
    if memory and row["needs"] > memory:
        hint = ", or ".join([*(f"--model {one['name']}" for one in fits[-1:]), f"--memory {row['card']}GB"])
        raise CapacityError(f"{needs[row['name']]}, more than is given", where="--memory", hint=hint)
    shipped = parse_yaml(portable_text(Path(row["path"])), row["path"]).value
    about = f"{count_text(row['parameters'])} parameters; {needs[row['name']]}{f' of {room}' * bool(free)}"
    return {"base": shipped["model"]["base"], "shipped": shipped, "about": about}


def _free_memory() -> tuple[int, str]:
    """Bytes for a model, and whose they are."""
    from accelerate import PartialState

    from lorasft.machine import free_memory

    device = PartialState().device
    if device.type == "cuda":
        return free_memory(device), "free on the card"
    return min(free_memory(device), ON_CPU), "no card: as much as a CPU can train"


def _positions(base: str) -> int:
    """The longest sequence for a model, by its config where that is at hand."""
    from lorasft.hub import find_local

    with suppress(OSError, ValueError, KeyError, TypeError):
        config = json.loads(find_local(base, "config.json").read_bytes())
        return min(LONGEST, int((config.get("text_config") or config)["max_position_embeddings"]))
    return LONGEST


def _answer(question: str) -> str:
    """What the person at the terminal types, empty for the proposal; stdout is left alone."""
    say(f"{question}: ", end="")
    with suppress(EOFError):
        return input().strip()
    return ""
