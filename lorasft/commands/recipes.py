"""`lorasft recipes`: those that are shipped, listed, shown, copied; configs of other tools as recipes; the schema."""

from __future__ import annotations

import json
import re
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from lorasft.commands.arguments import add_json, fill_in, parse_bytes, show
from lorasft.data.imports import import_config
from lorasft.files import make_folder, refuse_existing, write_file
from lorasft.recipe import Recipe, recipe_schema
from lorasft.recipe.load import complete_recipe, find_shipped, portable_text, shipped_recipes
from lorasft.recipe.yaml_reader import parse_yaml, read_yaml
from lorasft.terminal import quote, say

# A comment of each shipped recipe; `needs`: the least memory that plan finds enough for rows of its data.max_length.
_SIZES = re.compile(
    r"# (?P<count>[\d.]+)(?P<unit>[MB]) parameters, (?P<weights>[\d.]+) GiB in 4 bit, needs (?P<needs>[\d.]+) GiB: "
    r"planned for a card of (?P<card>\d+) GB"
)

SCHEMA = "lorasft-schema.json"  # beside a recipe that is written here, for editors


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("action", nargs="?", default="list", choices=["list", "show", "copy", "import", "schema"])
    parser.add_argument("name", nargs="?", help="of a shipped recipe; import: a config of Axolotl or LLaMA-Factory")
    parser.add_argument("to", nargs="?", help="file to write (default: ./NAME.yaml, import: ./NAME-lorasft.yaml)")
    parser.add_argument("--memory", type=parse_bytes, metavar="SIZE", help="list what fits into 8GiB, 24GB, ...")
    add_json(parser, "the list")


def run(action: str, name: str | None, to: str | None, memory: int | None, as_json: bool) -> None:
    """`action`: list | show | copy | import | schema. Raises RecipeError for an unknown name, for a target that exists,
    and for a config that is not to be imported."""
    if action == "list":
        rows = [row for row in read_sizes() if memory is None or row["needs"] <= memory]
        lines = fill_in("recipes.txt.jinja", {"rows": rows, "count": count_text}).splitlines()
        show(rows, lines, as_json=as_json)
    elif action == "schema":
        print(json.dumps(recipe_schema(), indent=2))
    elif action == "import":
        source = Path(name or "")
        target = Path(to or f"{source.stem}-lorasft.yaml")
        refuse_existing(target)
        found = import_config(source)
        write_recipe(target, "import.yaml.jinja", {**vars(found), "file": source.name})
        for what, why in found.left.items():
            say(f"not as in {source.name}: {what}: {why}")
        say(f"next: lorasft preview {quote(target)}, then lorasft train {quote(target)}")
        print(target)
    elif action == "show":
        path = find_shipped(name or "")
        show(read_yaml(path).value, [path.read_text(encoding="utf-8").rstrip()], as_json=as_json)
    else:
        source, target = find_shipped(name or ""), Path(to or ".")
        target = target / source.name if target.is_dir() else target
        make_folder(target.absolute().parent)
        write_file(target, portable_text(source))
        say(f"wrote {target}")


def write_recipe(target: Path, template: str, facts: dict[str, Any]) -> Recipe:
    """Fill in a template beside this file and write it, if it is a recipe, which is returned; and beside it the schema
    that its first line names, if none is there."""
    text = fill_in(template, {**facts, "schema": SCHEMA})
    recipe = complete_recipe(parse_yaml(text, str(target)), target)
    make_folder(target.absolute().parent)
    write_file(target, text)
    if not target.with_name(SCHEMA).exists():
        write_file(target.with_name(SCHEMA), json.dumps(recipe_schema(), indent=2))
    return recipe


def read_sizes() -> list[dict[str, Any]]:
    """The shipped recipes and what they say of their sizes, in bytes, of their `card` in GB; the smallest first."""
    rows = []
    for name, path in shipped_recipes().items():
        text = path.read_text(encoding="utf-8")
        (said,) = _SIZES.finditer(text)
        rows.append({
            "name": name,
            "base": read_yaml(path).value["model"]["base"],
            "about": text.partition("\n")[0].lstrip("# "),
            "parameters": round(float(said["count"]) * {"M": 1e6, "B": 1e9}[said["unit"]]),
            "weights": round(float(said["weights"]) * 2**30),
            "needs": round(float(said["needs"]) * 2**30),
            "card": int(said["card"]),
            "path": str(path),
        })  # fmt: skip
    return sorted(rows, key=lambda row: row["weights"])


def count_text(parameters: int) -> str:
    """A number of parameters for a reader."""
    return f"{parameters / 1e9:.3g}B" if parameters >= 999.5e6 else f"{parameters / 1e6:.3g}M"
