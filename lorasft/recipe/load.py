"""How a YAML file with `section.key=value` overrides becomes a recipe: reading, paths, shipped recipes, and back."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from lorasft.errors import ErrorGroup, LorasftError, RecipeError
from lorasft.recipe.explain import check_together, explain, nearest, value_at
from lorasft.recipe.schema import DataSource, Recipe
from lorasft.recipe.yaml_reader import MOST_DEPTH, Document, dump_yaml, parse_yaml, read_yaml
from lorasft.terminal import shorten

_PATHS = (("model", "base"), ("adapter", "start"), ("chat", "template"), ("data", "train"), ("data", "eval"))
_RETIRED = {("machine", "kernels"): "torch"}  # keys of earlier versions -> their default, which says nothing


def load_recipe(source: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file or of a shipped name, with `section.key=value` overrides.

    Paths in the file are looked up beside it, then in the working directory; those of overrides in the working
    directory only. What exists becomes absolute. Raises RecipeError, UnsafeError, or ErrorGroup for several errors.
    """
    path = Path(source)
    if not path.is_file() and (source in shipped_recipes() or not path.exists()):
        beside = [str(other) for other in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        path = find_shipped(source, others=beside)
    document = read_yaml(path)
    raw = document.value
    if not isinstance(raw, dict):
        what = "the recipe is empty" if raw is None else "a recipe is a mapping of sections (model, data, ...)"
        hint = "model.base and data.train are needed; lorasft recipes show tiny"
        raise RecipeError(what, where=document.places.get((), str(path)), hint=hint)
    _absolute_paths(raw, [path.parent, Path.cwd()])
    for override in overrides:
        _apply_override(override, document)
    _complete(raw, path.stem)
    try:
        # As JSON: strict Python validation would refuse lists for tuples.
        recipe = Recipe.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        _raise(document.errors + explain(error, document))
    if errors := document.errors + check_together(recipe, document):
        _raise(errors)
    return recipe


def read_source(path: str, columns: str | None) -> DataSource:
    """A file of rows that the command line names, with its columns as `{ours: theirs}` if they are given.

    Raises RecipeError when `columns` is not such a mapping.
    """
    if columns is None:
        return DataSource(path=path)
    document = parse_yaml(columns, "--columns")
    with contextlib.suppress(ValidationError):
        if not document.errors and isinstance(document.value, dict):
            return DataSource(path=path, format="auto", columns=document.value)
    raise RecipeError("not a mapping", where=f"--columns {columns}", hint="--columns '{prompt: question}'")


def dump_recipe(recipe: Recipe) -> str:
    """The whole recipe as YAML, defaults included; `load_recipe` reads an equal one back."""
    return dump_yaml(recipe.model_dump(mode="json"))


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of the recipes inside the installed package, or of the checkout that the package is in."""
    package = Path(__file__).parents[1]
    inside = package / "recipes"
    folder = inside if inside.is_dir() else package.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*/*.yaml"))}


def find_shipped(name: str, *, others: Sequence[str] = ()) -> Path:
    """The file of the shipped recipe `name`. Raises RecipeError with the nearest name, which may be one of `others`."""
    shipped = shipped_recipes()
    if name not in shipped:
        close = nearest(name, [*shipped, *others])
        hint = f"did you mean {close}?" if close else "lorasft recipes list"
        raise RecipeError(f"no recipe {shorten(name)}: neither a file nor a shipped recipe", hint=hint)
    return shipped[name]


def portable_text(path: Path) -> str:
    """The YAML of a recipe file for another folder: where it names paths beside itself, these become absolute."""
    text = path.read_text(encoding="utf-8")
    document, absolute = read_yaml(path), read_yaml(path).value
    _absolute_paths(absolute, [path.parent])
    for place, (start, end) in reversed(document.spans.items()):
        new = value_at(place, absolute)
        if new != value_at(place, document.value):
            text = text[:start] + json.dumps(new) + text[end:]
    return text


def _raise(errors: list[LorasftError]) -> NoReturn:
    errors = sorted(errors, key=lambda error: -error.exit_code)  # what is unsafe decides the exit code
    raise errors[0] if len(errors) == 1 else ErrorGroup(errors)


def _absolute_paths(raw: dict[str, Any], folders: list[Path]) -> None:
    """Make the paths of `raw` absolute, in place, where they exist in one of `folders`."""
    for section, key in _PATHS:
        settings = raw.get(section)
        if isinstance(settings, dict) and key in settings:
            text = str(settings[key])
            built_in = key == "template" and not ("/" in text or Path(text).suffix)
            settings[key] = settings[key] if built_in else _absolute(settings[key], folders)


def _absolute(value: Any, folders: list[Path]) -> Any:
    """`value`: a path, a source with a path, or a list of these."""
    if isinstance(value, list):
        return [_absolute(item, folders) for item in value]
    if isinstance(value, dict) and "path" in value:
        return {**value, "path": _absolute(value["path"], folders)}
    if not isinstance(value, str) or not value:
        return value
    try:
        found = [path for path in (folder / Path(value).expanduser() for folder in folders) if path.exists()]
    except (OSError, ValueError, RuntimeError):  # not a name that a file could have
        return value
    return str(found[0].absolute()) if found else value


def _apply_override(override: str, document: Document) -> None:
    """Put the value of `section.key=value` into the document; its place becomes the command line."""
    name, equals, text = override.partition("=")
    secret = re.search(r"(token|secret|password|api_key)\b", override, re.IGNORECASE)
    place = f"command line: {name}=..." if secret else f"command line: {shorten(override)}"
    keys = tuple(name.split("."))
    if not equals or not all(keys) or len(keys) > MOST_DEPTH or name in Recipe.model_fields:
        hint = "for example train.batch_size=16"
        document.errors.append(RecipeError("not of the form section.key=value", where=place, hint=hint))
        return
    try:
        given = parse_yaml(text, "command line")
    except LorasftError as error:
        document.errors.append(type(error)(error.what, where=place, hint=error.hint))
        return
    document.errors.extend(type(error)(error.what, where=place, hint=error.hint) for error in given.errors)
    fresh: dict[str, Any] = {}
    _put(fresh, keys, given.value)
    _absolute_paths(fresh, [Path.cwd()])
    _put(document.value, keys, value_at(keys, fresh))
    for path in [path for path in document.places if path[: len(keys)] == keys]:
        del document.places[path]
    for end in range(1, len(keys) + 1):
        document.places.setdefault(keys[:end], place)


def _put(mapping: dict[str, Any], keys: tuple[str, ...], value: Any) -> None:
    for key in keys[:-1]:
        if not isinstance(mapping.get(key), dict):
            mapping[key] = {}
        mapping = mapping[key]
    mapping[keys[-1]] = value


def _complete(raw: dict[str, Any], stem: str) -> None:
    """Fill in, in place, the two defaults that rest on another key, and take out retired keys that say nothing."""
    for section in Recipe.model_fields:
        if raw.get(section) is None:  # missing, or a heading with nothing under it
            raw[section] = {}
    for (section, key), default in _RETIRED.items():
        if value_at((section, key), raw) == default:
            del raw[section][key]
    run, data = raw["run"], raw["data"]
    if isinstance(run, dict):
        run.setdefault("output", f"runs/{stem}")
        if isinstance(run["output"], str) and run["output"].startswith("~/"):
            run["output"] = str(Path(run["output"]).expanduser())
        if isinstance(data, dict) and "eval" in data and data["eval"] is None:
            run.setdefault("eval_every", None)
