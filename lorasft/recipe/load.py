"""How a YAML file with `section.key=value` overrides becomes a recipe, or errors with places and hints; and back."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatch
from functools import cache, reduce
from operator import getitem
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from lorasft.errors import ErrorGroup, LorasftError, RecipeError, UnsafeError, in_words
from lorasft.recipe import DataSource, Recipe
from lorasft.recipe.yaml_reader import MOST_DEPTH, Document, KeyPath, dump_yaml, parse_yaml, read_yaml
from lorasft.terminal import quote, shorten

_SECTIONS: dict[str, Any] = {name: field.annotation for name, field in Recipe.model_fields.items()}
KEYS = {f"{name}.{key}": key for name, section in _SECTIONS.items() for key in section.model_fields}
_NAMES = {name: name for name in _SECTIONS} | KEYS  # each key -> its last part
_NAMES |= {f"data.train.{key}": key for key in DataSource.model_fields}
_SCHEMA = "lorasft recipes schema has each key and its values"
_PATHS = ("model.base", "model.new_tokens", "adapter.start", "chat.template", "data.train", "data.eval")


def load_recipe(source: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, of a shipped name or of a run's folder, with `section.key=value` overrides.

    Paths become absolute where they exist: beside the file, or else here, where those of overrides are looked up too.
    Raises RecipeError, UnsafeError, or ErrorGroup for several errors.
    """
    path = Path(source)
    if not path.is_file() and (source in shipped_recipes() or not path.exists()):
        path = find_shipped(source)
    elif (path / "recipe.yaml").is_file() and (path / "checkpoints").is_dir():
        path = path / "recipe.yaml"
        overrides = [f"run.output={json.dumps(source)}", *overrides]  # it may have been moved
    return complete_recipe(read_yaml(path), path, overrides)


def complete_recipe(document: Document, path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a document of the file `path`, which need not be there yet. Raises what `load_recipe` does."""
    if not isinstance(document.value, dict):
        what = "the recipe is empty" if document.value is None else "a recipe is a mapping of sections"
        hint = "model.base and data.train are needed; lorasft recipes show tiny"
        raise RecipeError(what, where=document.places.get((), str(path)), hint=hint)
    _absolute_paths(document, [path.parent, Path.cwd()])
    if "data.eval=null" in overrides:  # turns off what the file says of evaluation, and what is typed holds
        overrides = ["run.eval_every=null", "run.keep_best=false", "run.patience=null", *overrides]
    for override in overrides:
        _apply_override(override, document)
    _complete(document, path.stem)
    try:
        # As JSON: strict Python validation would refuse lists for tuples.
        recipe = Recipe.model_validate_json(json.dumps(document.value))
    except ValidationError as error:
        errors = sorted(_explain(error, document), key=lambda error: -error.exit_code)  # what is unsafe decides
        raise errors[0] if len(errors) == 1 else ErrorGroup(errors) from None
    _check_together(recipe, document)
    return recipe


def change_recipe(sections: Mapping[str, BaseModel], overrides: Sequence[str]) -> Recipe:
    """Some `sections` of a recipe with `section.key=value` overrides of them. Raises what `load_recipe` does."""
    for override in overrides:
        if override.partition(".")[0] not in sections:
            hint = f"what can be set here: keys of {', '.join(sections)}"
            raise RecipeError(f"{shorten(override)} has no effect here", where="command line", hint=hint)
    said = {name: section.model_dump(mode="json") for name, section in sections.items()}
    return complete_recipe(Document(said, {(): "command line"}), Path("recipe"), overrides)


def read_source(path: str, columns: str | None) -> DataSource:
    """The rows that the command line names. Raises RecipeError when `columns` are not written as `{ours: theirs}`."""
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


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of mappings as `section.key` -> value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def compare(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """What differs, a line each: `key: old -> new`, of long texts from shortly before they part."""
    old, new = flatten(before), flatten(now)
    for key in sorted(old.keys() | new.keys()):
        pair = [repr(values.get(key)) for values in (old, new)]
        if pair[0] != pair[1]:
            same = next((at for at, (a, b) in enumerate(zip(*pair, strict=False)) if a != b), 0)
            start = max(0, same - 40) if max(map(len, pair)) > 200 else 0
            yield f"{key}: {pair[0][start:]:.200} -> {pair[1][start:]:.200}"


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
        close = get_close_matches(name, [*shipped, *map(str, Path(name).parent.glob("*.y*ml"))], n=1)
        hint = f"did you mean {quote(close[0])}?" if close else "lorasft recipes list"
        raise RecipeError(f"no recipe {shorten(name)}: neither a file nor a shipped recipe", hint=hint)
    return shipped[name]


def portable_text(path: Path) -> str:
    """The YAML of a recipe file for another folder: with absolute paths where it names what is beside it."""
    text, document = path.read_text(encoding="utf-8"), read_yaml(path)
    _absolute_paths(document, [path.parent])
    title = text.partition("\n")[0]
    return text if document.value == read_yaml(path).value else f"{title}\n{dump_yaml(document.value)}"


def find_path(text: str, folders: Sequence[Path]) -> str:
    """A path, absolute where it exists in one of `folders`, else as it is: it may be a hub id."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # not a name that a file could have
        for path in (folder / Path(text).expanduser() for folder in folders):
            if path.exists():  # `..` after a link is not what stands before the link
                return str(path.resolve() if ".." in path.parts else path.absolute())
    return text


def _absolute_paths(document: Document, folders: Sequence[Path]) -> None:
    """Make the paths in `document` absolute where they exist in one of `folders`."""
    for place in document.places:
        text = _value_at(place, document.value)
        source = place[:1] == ("data",) and (place[-1] == "path" or isinstance(place[-1], int))
        if ".".join(map(str, place[:2])) not in _PATHS or not (len(place) == 2 or source):
            continue
        if not text or not isinstance(text, str) or (place[1] == "template" and not re.search("[./]", text)):
            continue
        _value_at(place[:-1], document.value)[place[-1]] = find_path(text, folders)


def _apply_override(override: str, document: Document) -> None:
    """Put the value of `section.key=value` into the document; its place becomes the command line."""
    name, equals, text = override.partition("=")
    where, keys = f"command line: {shorten(name)}=...", tuple(name.split("."))
    if not equals or not all(keys) or len(keys) > MOST_DEPTH or name in Recipe.model_fields:
        raise RecipeError("not of the form section.key=value", where=where, hint="for example train.batch_size=16")
    given = parse_yaml(text, where, keys)
    tree = document.value
    for key in keys[:-1]:
        if not isinstance(tree.get(key), dict):
            tree[key] = {}
        tree = tree[key]
    tree[keys[-1]] = given.value
    _absolute_paths(Document(document.value, given.places), [Path.cwd()])
    new_keys = dict.fromkeys((keys[:end] for end in range(1, len(keys) + 1)), where)
    document.places = new_keys | document.places | dict.fromkeys(given.places, where)


def _complete(document: Document, stem: str) -> None:
    """Fill in, in place, the defaults that rest on another key, and take out a retired key that says nothing."""
    raw = document.value
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


def _explain(error: ValidationError, document: Document) -> list[LorasftError]:
    """One error for each key that pydantic refused, with the place where it was written."""
    found: dict[KeyPath, list[Any]] = {}
    for detail in error.errors(include_url=False):
        path = _written_path(document.value, detail["loc"], missing=detail["type"] == "missing")
        found.setdefault(path, []).append({**detail, "loc": path})
    # A union reports every branch: the branch that got deepest is the one that was meant.
    above = {path[:end] for path in found for end in range(len(path))}
    return [_explain_key(path, details, document) for path, details in found.items() if path not in above]


def _check_together(recipe: Recipe, document: Document) -> None:
    """Raise RecipeError for keys that are each fine, but not together."""
    held_out, every = recipe.data.eval is not None, recipe.run.eval_every is not None
    asked = [key for key in ("eval_every", "keep_best", "patience") if getattr(recipe.run, key)]
    if asked and not (every and held_out):
        needed, example = ("run.eval_every", 100) if held_out else ("data.eval", 0.02)
        without = "run.eval_every=null and run.keep_best=false" + " and run.patience=null" * ("patience" in asked)
        where, hint = _place_of(("run", asked[0]), document), f"{needed}={example}, or {without}"
        raise RecipeError(f"run.{asked[0]} needs {needed}", where=where, hint=hint)
    for number, source in enumerate(recipe.data.eval if isinstance(recipe.data.eval, tuple) else ()):
        if source.share != 1:
            where, what = _place_of(("data", "eval", number, "share"), document), "share is of data.train alone"
            raise RecipeError(f"data.eval takes all rows of a source: {what}", where=where, hint="make a file of some")


def _value_at(path: KeyPath, value: Any) -> Any:
    """What is at `path` in a tree of mappings and lists, or None."""
    with contextlib.suppress(LookupError, TypeError):
        return reduce(getitem, path, value)
    return None


def _place_of(path: KeyPath, document: Document) -> str:
    """Where `path` was written, or else what contains it."""
    return next(document.places[path[:end]] for end in range(len(path), -1, -1) if path[:end] in document.places)


def _written_path(value: Any, loc: tuple[int | str, ...], *, missing: bool) -> KeyPath:
    """The part of pydantic's location that is in the recipe: without the names of union branches."""
    path: list[int | str] = []
    for part in loc:
        keys: Any = range(len(value)) if isinstance(value, list) else value if isinstance(value, dict) else ()
        if part in keys:
            value = value[part]
            path.append(part)
    return (*path, loc[-1]) if missing else tuple(path)


def _explain_key(path: KeyPath, details: list[Any], document: Document) -> LorasftError:
    where, name = _place_of(path, document), shorten(".".join(map(str, path)))
    key, value = str(path[-1]), _value_at(path, document.value)
    kernel = isinstance(value, str) and "/" in value and re.search("attn|attention|experts_impl", key, re.IGNORECASE)
    if kernel or key == "trust_remote_code":
        return UnsafeError(f"{name}: lorasft runs no code from repositories", where=where, hint="remove the key")
    if details[0]["type"] == "extra_forbidden":
        return RecipeError(f"unknown key {name}", where=where, hint=_hint_for_name(key, str(path[0])))
    own = _SECTIONS[key].model_fields if len(path) == 1 and key in _SECTIONS else ()
    hint = f"this is a section: {', '.join(f'{key}.{name}' for name in own)}" if own else _SCHEMA
    return RecipeError(in_words(details), where=where, hint=hint)


@cache
def read_peers() -> dict[str, str]:
    """What other tools call what is here, by our keys: names with `*` for any letters."""
    return dict(read_yaml(Path(__file__).with_name("peers.yaml")).value)


def find_peers(key: str) -> list[str]:
    """What is here for a key of another tool, or why there is nothing."""
    return [ours for ours, names in read_peers().items() if any(fnmatch(key.lower(), name) for name in names.split())]


def _hint_for_name(key: str, section: str) -> str:
    ours = find_peers(key)
    names = [[own for name, own in _NAMES.items() if name.startswith(begin)] for begin in (section, "")]
    ends = [own for own in names[1] if f"_{key}".endswith(f"_{own}")]  # as lora_alpha does with alpha
    near = ends[:1] or get_close_matches(key, names[0], n=1) or get_close_matches(key, names[1], n=1, cutoff=0.8)
    ours = ours or [name for name, own in _NAMES.items() if own in near]
    return f"here it is {' or '.join(ours)}" if ours else _SCHEMA
