"""`lorasft recipes`: the shipped recipes, listed, shown, copied; and the JSON schema of recipe files."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from pathlib import Path

from lorasft.commands.arguments import add_json, show
from lorasft.terminal import say


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("action", nargs="?", default="list", choices=["list", "show", "copy", "schema"])
    parser.add_argument("name", nargs="?", help="of a shipped recipe")
    parser.add_argument("to", nargs="?", help="file to copy to (default: ./NAME.yaml)")
    add_json(parser, "the list")


def run(action: str, name: str | None, to: str | None, as_json: bool) -> None:
    """`action`: list | show | copy | schema. Raises RecipeError for an unknown name and for a target that exists."""
    from lorasft.files import make_folder, write_file
    from lorasft.recipe import recipe_schema
    from lorasft.recipe.load import find_shipped, portable_text, shipped_recipes
    from lorasft.recipe.yaml_reader import read_yaml

    if action == "list":
        rows = []
        for shipped, path in shipped_recipes().items():
            base, about = read_yaml(path).value["model"]["base"], path.read_text(encoding="utf-8").partition("\n")[0]
            rows.append({"name": shipped, "base": base, "about": about.lstrip("# "), "path": str(path)})
        show(rows, [f"{row['name']:28}  {row['base']:42}  {row['about']}" for row in rows], as_json=as_json)
    elif action == "schema":
        print(json.dumps(recipe_schema(), indent=2))
    elif action == "show":
        path = find_shipped(name or "")
        show(read_yaml(path).value, [path.read_text(encoding="utf-8").rstrip()], as_json=as_json)
    else:
        source, target = find_shipped(name or ""), Path(to or ".")
        target = target / source.name if target.is_dir() else target
        make_folder(target.absolute().parent)
        write_file(target, portable_text(source).encode())
        say(f"wrote {target}")
