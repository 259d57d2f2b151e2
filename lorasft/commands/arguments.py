"""Arguments that several commands take, and how they print what they found."""

from __future__ import annotations

import json
import re
from argparse import Action, ArgumentParser, ArgumentTypeError
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasft.errors import CapacityError, LorasftError, out_of_memory
from lorasft.terminal import quote, say, shorten, size_text

if TYPE_CHECKING:
    from lorasft.artifact import Artifact
    from lorasft.recipe import Recipe


def add_recipe(parser: ArgumentParser) -> None:
    """RECIPE and its overrides, as `recipe` and `overrides`."""
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, the name of a shipped recipe, or a run's folder")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="as train.epochs=3")


def read_recipe(recipe: str, overrides: Sequence[str], *, resume: bool | None = None) -> Recipe:
    """The recipe, after all that can be refused without torch, whose import takes a second; `resume`: None to plan."""
    from lorasft.artifact import check_run_folder
    from lorasft.data.folders import find_files, list_sources
    from lorasft.hub import is_folder
    from lorasft.recipe.load import load_recipe
    from lorasft.training.metrics import check_trackers

    settings = load_recipe(recipe, overrides)
    if resume is not None:
        check_run_folder(settings, resume=resume)
    check_trackers(settings.run.trackers)
    is_folder(settings.model.base)
    for source in list_sources(settings.data):
        find_files(source)
    return settings


def suggest(action: Action, **_: Any) -> Iterable[str]:
    """What a shell may complete an argument with, beside files: names of recipes, or keys."""
    from lorasft.recipe.load import KEYS, shipped_recipes

    recipes = dict.fromkeys(("recipe", "saved", "name"), shipped_recipes())
    return (recipes | {"overrides": [f"{key}=" for key in KEYS]}).get(action.dest, ())


_OPTIONS = {  # the key of a recipe that each sets, and what it is for
    "--quantization": ("model.quantization", "nf4 or none: how the base is loaded (default: as in training)"),
    "--dtype": ("model.dtype", "auto, bfloat16, float16 or float32: what is computed in"),
    "--on-bad-row": ("data.on_bad_row", "error or drop: rows of --data that cannot be read"),
    "--system": ("chat.system", "for conversations without a system message (default: as in training)"),
}


def add_saved(parser: ArgumentParser, kinds: str = "RUN|ADAPTER|MODEL", *, options: Sequence[str] = ()) -> None:
    """A path of one of `kinds`, where the base of an adapter is, and keys that are set otherwise than in training: some
    by `options` beside those for the base, all as `section.key=value`."""
    about = f"a folder of one of these kinds{'; of a model, also its hub id' * ('MODEL' in kinds)}"
    parser.add_argument("saved", metavar=kinds, help=about)
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="of model, data or chat")
    parser.add_argument("--base", metavar="MODEL", help="the adapter's base, if it is not where it was trained")
    for name in ("--quantization", "--dtype", *options):
        key, about = _OPTIONS[name]
        write: Any = lambda text, key=key: f"{key}={json.dumps(text, ensure_ascii=False)}"  # noqa: E731
        parser.add_argument(name, action="append", dest="given", default=[], metavar="X", type=write, help=about)


def open_saved(saved: str, base: str | None, given: Sequence[str], overrides: Sequence[str]) -> Artifact:
    """What `saved` names, with `section.key=value` overrides; its base is at hand. Raises LorasftError."""
    from lorasft.artifact import find_artifact
    from lorasft.recipe.load import change_recipe

    found = find_artifact(saved, base=base)
    sections = {"model": found.model, "data": found.data, "chat": found.chat}
    changed = change_recipe(sections, [*given, *overrides])
    found = replace(found, model=changed.model, data=changed.data, chat=changed.chat)
    found.base_config  # noqa: B018  refused before torch is imported
    return found


def find_device() -> Any:
    """The device that a model is put on."""
    from accelerate import PartialState

    return PartialState().device


def load_saved(found: Artifact) -> tuple[Any, Any, Any]:
    """The tokenizer and the model of what was found, and of a PEFT model the one of transformers in it."""
    from lorasft.data.tokenizer import read_tokenizer
    from lorasft.model.adapter import load_artifact

    model = load_artifact(found, find_device())
    return read_tokenizer(found), model, model.get_base_model() if found.adapter else model


def add_columns(parser: ArgumentParser) -> None:
    parser.add_argument("--columns", metavar="MAPPING", help="of the rows: '{prompt: question, completion: answer}'")


def say_error(error: Exception) -> int:
    """Say an error that the user can fix, as is a lack of memory. Returns its exit code; raises what is a bug."""
    if not isinstance(error, LorasftError):
        if not out_of_memory(error):
            raise error
        hint = "free memory and try again (a run that had begun: with --resume), or take a smaller model"
        error = CapacityError(f"out of memory: {error}", hint=hint)
    say(error)
    return error.exit_code


def parse_seconds(text: str) -> float:
    """The seconds that `45s`, `30min` or `2h` says."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]*)?) *(s|min|h)", text)
    if not match or not float(match[1]):
        raise ArgumentTypeError(f"{text[:80]} is not a time like 45s, 30min or 2h")
    return float(match[1]) * {"s": 1, "min": 60, "h": 3600}[match[2]]


def parse_bytes(text: str) -> int:
    """The bytes that `8GiB` or `24GB` says."""
    match = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]*)?) *([KMGT])(i?)B?", text, re.IGNORECASE)
    if not match or not float(match[1]):
        raise ArgumentTypeError(f"{text[:80]} is not a size like 8GiB or 24GB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** ("KMGT".index(match[2].upper()) + 1))


def add_json(parser: ArgumentParser, about: str) -> None:
    parser.add_argument("--json", action="store_true", dest="as_json", help=f"{about} as JSON")


def whole_number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def fill_in(template: str, facts: Mapping[str, Any], *, html: bool = False) -> str:
    """The template beside this file, filled in with `facts`, which `html` escapes."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    how: Any = {"trim_blocks": True, "keep_trailing_newline": True, "undefined": StrictUndefined, "autoescape": html}
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), **how)
    environment.filters["yaml"] = partial(json.dumps, ensure_ascii=False)  # JSON is YAML, on one line
    environment.filters["line"] = shorten  # of a comment
    environment.filters["size"] = size_text
    environment.filters["quote"] = quote  # a word of a command
    environment.filters["time"] = lambda seconds: timedelta(seconds=round(seconds))
    return environment.get_template(template).render(facts)


def show(value: Any, lines: Iterable[str], *, as_json: bool) -> None:
    """What a command found, on stdout: as JSON, or in `lines` for a reader."""
    print(json.dumps(value) if as_json else "\n".join(lines))
