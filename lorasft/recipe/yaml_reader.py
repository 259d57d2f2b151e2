"""YAML 1.2 as plain values, with the line of every key; no tags, aliases or doubled keys; size and depth bounded.

PyYAML by itself follows YAML 1.1 (`2e-4` is text, `no` is false, `1:30` is 90), lets the last of two equal keys win,
and forgets the lines.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lorasft.errors import RecipeError, UnsafeError

KeyPath = tuple[str | int, ...]

MOST_BYTES = 1 << 20
MOST_DEPTH = 32

_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}
_INTEGER = re.compile(r"[-+]?[0-9]{1,80}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


@dataclass
class Document:
    """What a YAML text says."""

    value: Any  # plain Python
    places: dict[KeyPath, str]  # file and line of each key


def read_yaml(path: Path) -> Document:
    """The YAML file `path`, of at most 1 MiB. Raises RecipeError (unreadable, not YAML) or UnsafeError (see below)."""
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        what = "this folder is not that of a run" if path.is_dir() else f"cannot read the recipe: {error.strerror}"
        raise RecipeError(what, where=path, hint="name a YAML file that you may read, or a run's folder") from None
    if len(content) > MOST_BYTES:
        raise UnsafeError("too large for a recipe", where=path, hint="rows go into files, named in data.train")
    return parse_yaml(content, str(path))


def parse_yaml(text: str | bytes, name: str, above: Sequence[str] = ()) -> Document:
    """Parse one YAML document; `name` precedes the line in every place. `above`: the keys that it is the value of.

    Raises RecipeError for text that is not YAML, doubled keys and keys that are not text, UnsafeError for tags,
    aliases, and text nested deeper than 32.
    """
    try:
        loader = _Loader(text)
        loader.name, loader.path = name, tuple(above)
        value = loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        reason = getattr(error, "problem", None) or getattr(error, "reason", None)
        hint = "UTF-8, spaces instead of tabs, and text with : # or brackets in quotes"
        raise RecipeError(f"this is not YAML: {reason}", where=where, hint=hint) from None
    return Document(value, loader.places)


def read_scalar(text: str) -> Any:
    """The value of an unquoted scalar by the core schema of YAML 1.2, but for 0o17, 0x1f, .inf and .nan: text here."""
    if text.lower() in _WORDS and text in (text.lower(), text.upper(), text.capitalize()):
        return _WORDS[text.lower()]
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def dump_yaml(value: Any) -> str:
    """Plain values as YAML that `parse_yaml` reads back as the same values."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 20)


class _Dumper(yaml.SafeDumper):
    """PyYAML's, which quotes what YAML 1.1 would take for something else, and here what YAML 1.2 would."""

    def represent_data(self, data: Any) -> yaml.Node:
        if isinstance(data, str) and (read_scalar(data) is not data or not data.isprintable()):
            return self.represent_scalar("tag:yaml.org,2002:str", data, style='"')
        return super().represent_data(data)


class _Loader(yaml.SafeLoader):
    """PyYAML's, which refuses tags, aliases, doubled keys and depth before it composes a node, and notes places."""

    path: KeyPath = ()  # of the node that is composed

    def __init__(self, text: str | bytes) -> None:
        super().__init__(text)
        self.yaml_implicit_resolvers = {}  # those of YAML 1.1: see read_scalar
        self.places: dict[KeyPath, str] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """`index`: of the node in a list, or its key as a node; None for the document and for a key itself."""
        event, above = self.peek_event(), self.path  # type: ignore[no-untyped-call]
        where = _place(event)
        if isinstance(event, yaml.AliasEvent):
            raise UnsafeError("aliases (*name) are not allowed", where=where, hint="write the value out")
        if event.tag is not None:
            raise UnsafeError("tags (!name) are not allowed", where=where, hint="remove the tag")
        if len(above) >= MOST_DEPTH:
            raise UnsafeError(f"nested deeper than {MOST_DEPTH}", where=where, hint="write it flat")
        if isinstance(index, yaml.Node):
            where, index = _place(index), self.construct_object(index)
            if not isinstance(index, str):
                raise RecipeError("a key that is not text", where=where, hint="put the key into quotes")
        self.path = above if parent is None else (*above, index)
        if parent is None or index is not None:
            if self.path in self.places:
                both = f"{self.places[self.path]} and {where}"
                raise RecipeError(f"the key {index!r} appears twice", where=both, hint="remove one")
            self.places[self.path] = where
        node = super().compose_node(parent, index)
        self.path = above
        return node

    def construct_scalar(self, node: Any) -> Any:
        """The text of a quoted scalar, or what an unquoted one says."""
        try:  # JSON writes characters outside the basic plane as a pair of escapes
            text = node.value.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
        except UnicodeDecodeError:
            hint = "write the character itself"
            raise RecipeError("half a surrogate pair in a text", where=_place(node), hint=hint) from None
        return read_scalar(text) if node.style is None else text


def _place(marked: Any) -> str:
    return f"{marked.start_mark.name}:{marked.start_mark.line + 1}"
