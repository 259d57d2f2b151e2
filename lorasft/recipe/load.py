"""How a YAML file with `section.key=value` overrides becomes a recipe: reading, paths, shipped recipes, and back."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lorasft.errors import ErrorGroup, RecipeError
from lorasft.recipe import DataSource, Recipe
from lorasft.recipe.explain import check_together, explain, nearest, value_at
from lorasft.recipe.yaml_reader import MOST_DEPTH, Document, dump_yaml, parse_yaml, read_yaml
from lorasft.terminal import shorten

_PATHS = (("model", "base"), ("adapter", "start"), ("chat", "template"), ("data", "train"), ("data", "eval"))


def load_recipe(source: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file or of a shipped name, with `section.key=value` overrides.

    Paths in the file are looked up beside it, then in the working directory; those of overrides in the working
    directory only. What exists becomes absolute. Raises RecipeError, UnsafeError, or ErrorGroup for several errors.
    """
    path = Path(source)
    if not path.is_file() and (source in shipped_recipes() or not path.exists()):
        path = find_shipped(source)
    document = read_yaml(path)
    if not isinstance(document.value, dict):
        what = "the recipe is empty" if document.value is None else "a recipe is a mapping of sections"
        hint = "model.base and data.train are needed; lorasft recipes show tiny"
        raise RecipeError(what, where=document.places.get((), str(path)), hint=hint)
    _absolute_paths(document, [path.parent, Path.cwd()])
    for override in overrides:
        _apply_override(override, document)
    _complete(document.value, path.stem)
    try:
        # As JSON: strict Python validation would refuse lists for tuples.
        recipe = Recipe.model_validate_json(json.dumps(document.value))
    except ValidationError as error:
        errors = sorted(explain(error, document), key=lambda error: -error.exit_code)  # what is unsafe decides
        raise errors[0] if len(errors) == 1 else ErrorGroup(errors) from None
    check_together(recipe, document)
    return recipe


def read_source(path: str, columns: str | None) -> DataSource:
    """A file of rows that the command line names, with its columns as `{ours: theirs}` if they are given.

    Raises RecipeError when `columns` is not such a mapping.
    """
    if columns is None:
        return DataSource(path=path)
    try:
        return DataSource(path=path, format="auto", columns=parse_yaml(columns, "--columns").value)
    except ValidationError:
        hint = "--columns '{prompt: question}'"
        raise RecipeError("not a mapping", where=f"--columns {columns}", hint=hint) from None


def dump_recipe(recipe: Recipe) -> str:
    """The whole recipe as YAML, defaults included; `load_recipe` reads an equal one back."""
    return dump_yaml(recipe.model_dump(mode="json"))


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of the recipes inside the installed package, or of the checkout that the package is in."""
    package = Path(__file__).parents[1]
    inside = package / "recipes"
    folder = inside if inside.is_dir() else package.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*/*.yaml"))}


def find_shipped(name: str) -> Path:
    """The file of the shipped recipe `name`. Raises RecipeError with the nearest name, or that of a file there."""
    shipped = shipped_recipes()
    if name not in shipped:
        close = nearest(name, [*shipped, *map(str, Path(name).parent.glob("*.y*ml"))])
        hint = f"did you mean {close}?" if close else "lorasft recipes list"
        raise RecipeError(f"no recipe {shorten(name)}: neither a file nor a shipped recipe", hint=hint)
    return shipped[name]


def portable_text(path: Path) -> str:
    """The YAML of a recipe file for another folder: with absolute paths where it names what is beside it."""
    text, document = path.read_text(encoding="utf-8"), read_yaml(path)
    _absolute_paths(document, [path.parent])
    title = text.partition("\n")[0]
    return text if document.value == read_yaml(path).value else f"{title}\n{dump_yaml(document.value)}"


def _absolute_paths(document: Document, folders: Sequence[Path]) -> None:
    """Make the paths in `document` absolute where they exist in one of `folders`."""
    for place in document.places:
        text = value_at(place, document.value)
        if place[:2] not in _PATHS or not (len(place) == 2 or place[-1] == "path" or isinstance(place[-1], int)):
            continue
        if not text or not isinstance(text, str) or (place[1] == "template" and not re.search("[./]", text)):
            continue
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # not a name that a file could have
            found = [path for path in (folder / Path(text).expanduser() for folder in folders) if path.exists()]
            value_at(place[:-1], document.value)[place[-1]] = str(found[0].absolute()) if found else text


def _apply_override(override: str, document: Document) -> None:
    """Put the value of `section.key=value` into the document; its place becomes the command line."""
    name, equals, text = override.partition("=")
    where, keys = f"command line: {shorten(name)}=...", tuple(name.split("."))
    if not equals or not all(keys) or len(keys) > MOST_DEPTH or name in Recipe.model_fields:
        hint = "for example train.batch_size=16"
        raise RecipeError("not of the form section.key=value", where=where, hint=hint)
    given = parse_yaml(text, where, keys)
    _absolute_paths(given, [Path.cwd()])
    tree = document.value
    for key in keys[:-1]:
        if not isinstance(tree.get(key), dict):
            tree[key] = {}
        tree = tree[key]
    tree[keys[-1]] = value_at(keys, given.value)
    document.places = {place: line for place, line in document.places.items() if place[: len(keys)] != keys}
    document.places |= dict.fromkeys(given.places, where)
    for end in range(1, len(keys) + 1):
        document.places.setdefault(keys[:end], where)


def _complete(raw: dict[str, Any], stem: str) -> None:
    """Fill in, in place, the two defaults that rest on another key, and take out a retired key that says nothing."""
    for section in Recipe.model_fields:
        if raw.get(section) is None:  # missing, or a heading with nothing under it
            raw[section] = {}
    run, data, machine = raw["run"], raw["data"], raw["machine"]
    if isinstance(machine, dict) and machine.get("kernels") == "torch":
        del machine["kernels"]
    if isinstance(run, dict):
        run.setdefault("output", f"runs/{stem}")
        if isinstance(data, dict) and "eval" in data and data["eval"] is None:
            run.setdefault("eval_every", None)
