"""Arguments that several commands take, and how they print what they found."""

from __future__ import annotations

import json
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Iterable
from typing import Any


def add_recipe(parser: ArgumentParser) -> None:
    """RECIPE and its overrides, as `recipe` and `overrides`."""
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="as train.epochs=3")


def add_saved(parser: ArgumentParser, kinds: str = "RUN|ADAPTER|MODEL") -> None:
    """A path of one of `kinds` as `saved`, and where the base of an adapter is, as `base`."""
    about = f"a folder of one of these kinds{'; of a model, also its hub id' * ('MODEL' in kinds)}"
    parser.add_argument("saved", metavar=kinds, help=about)
    parser.add_argument("--base", metavar="MODEL", help="the adapter's base, if it is not where it was trained")


def add_columns(parser: ArgumentParser) -> None:
    """The names of the columns in `--data`."""
    parser.add_argument("--columns", metavar="MAPPING", help="of --data: '{prompt: question, completion: answer}'")


def add_json(parser: ArgumentParser, about: str) -> None:
    """`--json`, as `as_json`."""
    parser.add_argument("--json", action="store_true", dest="as_json", help=f"{about} as JSON")


def whole_number(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def show(value: Any, lines: Iterable[str], *, as_json: bool) -> None:
    """What a command found, on stdout: as JSON, or in `lines` for a reader."""
    print(json.dumps(value) if as_json else "\n".join(lines))
