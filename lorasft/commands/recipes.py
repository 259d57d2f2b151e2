"""`lorasft recipes`: the shipped recipes, listed, shown, copied; and the JSON schema of recipe files."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from pathlib import Path

from lorasft.commands.arguments import add_json
from lorasft.errors import RecipeError
from lorasft.terminal import say, shorten


def add_arguments(parser: ArgumentParser) -> None:
    """What `lorasft recipes` takes."""
    parser.add_argument("action", nargs="?", default="list", choices=["list", "show", "copy", "schema"])
    parser.add_argument("name", nargs="?", help="of a shipped recipe")
    parser.add_argument("to", nargs="?", help="file to copy to (default: ./NAME.yaml)")
    add_json(parser, "the list")


def run(action: str, name: str | None, to: str | None, as_json: bool) -> None:
    """`action`: list | show | copy | schema. Raises RecipeError for an unknown name and for a target that exists."""
    from lorasft.recipe import recipe_schema
    from lorasft.recipe.load import find_shipped
    from lorasft.recipe.yaml_reader import read_yaml

    surplus = [word for word in (name, to) if word is not None][{"show": 1, "copy": 2}.get(action, 0) :]
    if surplus:
        what = f"recipes {action} does not take {', '.join(map(shorten, surplus))}"
        raise RecipeError(what, hint=f"lorasft recipes {action}")
    if action == "list":
        _print_list(as_json)
    elif action == "show":
        path = find_shipped(name or "")
        print(json.dumps(read_yaml(path).value, indent=2) if as_json else path.read_text(encoding="utf-8").rstrip())
    elif action == "copy":
        _copy(find_shipped(name or ""), Path(to or "."))
    else:
        print(json.dumps(recipe_schema(), indent=2))


def _print_list(as_json: bool) -> None:
    from lorasft.recipe.load import shipped_recipes
    from lorasft.recipe.yaml_reader import read_yaml

    rows = [
        {
            "name": name,
            "base": read_yaml(path).value["model"]["base"],
            "about": path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# "),
            "path": str(path),
        }
        for name, path in shipped_recipes().items()
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    widths = [max(len(row[key]) for row in rows) for key in ("name", "base")]
    for row in rows:
        print(f"{row['name']:{widths[0]}}  {row['base']:{widths[1]}}  {row['about']}")


def _copy(source: Path, target: Path) -> None:
    from lorasft import files
    from lorasft.recipe.load import portable_text

    if target.is_dir():
        target = target / source.name
    files.refuse_existing(target)
    if not target.parent.is_dir():
        raise RecipeError(f"there is no folder {target.parent}", hint=f"mkdir -p {target.parent}")
    files.write_file(target, portable_text(source).encode())
    say(f"wrote {target}")
