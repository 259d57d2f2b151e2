"""YAML 1.2 as plain values, with the line of every key; no tags, aliases or doubled keys; size and depth bounded.

PyYAML's parser gives the events; values are built from them here, because PyYAML's own loader follows YAML 1.1
(`2e-4` is text, `no` is false, `1:30` is 90), lets the last of two equal keys win, and forgets the lines.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml

from lorasft.errors import LorasftError, RecipeError, UnsafeError

KeyPath = tuple[str | int, ...]

MOST_BYTES = 1 << 20
MOST_DEPTH = 32

_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}
_INTEGER = re.compile(r"[-+]?[0-9]{1,80}")
_PREFIXED = re.compile(r"0o[0-7]{1,80}|0x[0-9a-fA-F]{1,80}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


@dataclass(frozen=True)
class Document:
    """What a YAML text says: `value` (plain Python), where each key path stands, and the faults met on the way."""

    value: Any
    places: dict[KeyPath, str]
    faults: list[LorasftError]


def read_yaml(path: Path) -> Document:
    """Read a YAML file of at most 1 MiB. Raises RecipeError (unreadable, no YAML) or UnsafeError (too large)."""
    if path.is_dir():
        raise RecipeError("this is a folder, not a recipe", where=str(path), hint="name a YAML file in it")
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as fault:
        what = f"cannot read the recipe: {fault.strerror}"
        raise RecipeError(what, where=str(path), hint="name a file that you may read") from None
    if len(content) > MOST_BYTES:
        what = f"larger than {MOST_BYTES} bytes, too large for a recipe"
        raise UnsafeError(what, where=str(path), hint="rows go into files of their own, named in data.train")
    try:
        text = content.decode()
    except UnicodeDecodeError as fault:
        what = f"not text (byte 0x{content[fault.start]:02x} at {fault.start})"
        raise RecipeError(what, where=str(path), hint="a recipe is a YAML file in UTF-8") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str) -> Document:
    """Parse one YAML document; `name` stands before the line in every place.

    Faults of single keys (doubled, tagged, an alias) are collected; RecipeError is raised for text that is no YAML,
    UnsafeError for text nested deeper than 32.
    """
    reader = _Reader(name)
    try:
        value = reader.read_document(yaml.parse(text, Loader=yaml.SafeLoader))
    except yaml.reader.ReaderError as fault:
        what = f"not text (character 0x{int(fault.character):02x} at {fault.position})"
        raise RecipeError(what, where=name, hint="a recipe is a YAML file in UTF-8") from None
    except yaml.MarkedYAMLError as fault:
        raise _syntax_fault(fault, name) from None
    return Document(value, reader.places, reader.faults)


def read_scalar(text: str) -> Any:
    """The value of an unquoted scalar by the core schema of YAML 1.2."""
    if text.lower() in _WORDS and text in (text.lower(), text.upper(), text.capitalize()):
        return _WORDS[text.lower()]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _PREFIXED.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", ""))
    return text


def dump_yaml(value: Any) -> str:
    """Plain values as YAML that `parse_yaml` reads back as the same values."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 20)


class _Dumper(yaml.SafeDumper):
    """PyYAML's, which quotes what YAML 1.1 would take for something else, and here what YAML 1.2 would."""

    def represent_data(self, data: Any) -> yaml.Node:
        if isinstance(data, str) and (read_scalar(data) is not data or not data.isprintable()):
            return self.represent_scalar("tag:yaml.org,2002:str", data, style='"')
        return super().represent_data(data)

    def ignore_aliases(self, data: Any) -> bool:
        return True


@dataclass
class _Reader:
    """Builds values from events; knows the line of every key path."""

    name: str
    places: dict[KeyPath, str] = field(default_factory=dict)
    faults: list[LorasftError] = field(default_factory=list)

    def read_document(self, events: Iterator[yaml.Event]) -> Any:
        next(events)  # the start of the stream
        if isinstance(next(events), yaml.StreamEndEvent):
            return None
        value = self._read(next(events), events, path=())
        next(events)  # the end of the document
        extra = next(events)
        if not isinstance(extra, yaml.StreamEndEvent):
            self._refuse("a second document", extra, hint="keep one document, without a second ---")
        return value

    def _read(self, event: yaml.Event, events: Iterator[yaml.Event], *, path: KeyPath) -> Any:
        self.places.setdefault(path, self._place(event))
        if len(path) > MOST_DEPTH:
            what = f"nested deeper than {MOST_DEPTH}"
            raise UnsafeError(what, where=self._place(event), hint="no recipe needs that: write it flat")
        if isinstance(event, yaml.AliasEvent):
            self._refuse("aliases (*name) are not allowed", event, hint="write the value out", unsafe=True)
            return None
        value = self._read_value(event, events, path)
        if getattr(event, "tag", None) is not None:
            self._refuse("tags (!name) are not allowed", event, hint="remove the tag", unsafe=True)
            return None
        return value

    def _read_value(self, event: yaml.Event, events: Iterator[yaml.Event], path: KeyPath) -> Any:
        if isinstance(event, yaml.MappingStartEvent):
            return self._read_mapping(events, path)
        if isinstance(event, yaml.SequenceStartEvent):
            return self._read_sequence(events, path)
        return self._read_text(cast("yaml.ScalarEvent", event))

    def _read_mapping(self, events: Iterator[yaml.Event], path: KeyPath) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        lines: dict[str, int] = {}
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            line = _line(event)
            key = self._read(event, events, path=(*path, ""))  # a level: keys may nest too
            if not isinstance(key, str):
                self._refuse("a key that is not text", event, hint="put the key into quotes")
            elif key in mapping:
                where = f"{self.name}:{lines[key]} and {self.name}:{line}"
                self.faults.append(RecipeError(f"the key {key!r} stands twice", where=where, hint="remove one"))
            if not isinstance(key, str) or key in mapping:
                self._read(next(events), events, path=(*path, ""))
                continue
            lines[key] = line
            self.places[(*path, key)] = self._place(event)
            mapping[key] = self._read(next(events), events, path=(*path, key))
        return mapping

    def _read_sequence(self, events: Iterator[yaml.Event], path: KeyPath) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            items.append(self._read(event, events, path=(*path, len(items))))
        return items

    def _read_text(self, event: yaml.ScalarEvent) -> Any:
        try:  # JSON writes characters outside the basic plane as a pair of escapes
            text = event.value.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
        except UnicodeDecodeError:
            self._refuse("half a surrogate pair in a text", event, hint="write the character itself")
            return None
        return read_scalar(text) if event.style is None else text

    def _refuse(self, what: str, event: yaml.Event, *, hint: str, unsafe: bool = False) -> None:
        kind = UnsafeError if unsafe else RecipeError
        self.faults.append(kind(what, where=self._place(event), hint=hint))

    def _place(self, event: yaml.Event) -> str:
        return f"{self.name}:{_line(event)}"


def _line(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark else 1


def _syntax_fault(fault: yaml.MarkedYAMLError, name: str) -> RecipeError:
    mark = fault.problem_mark or fault.context_mark
    where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
    if fault.problem and r"'\t'" in fault.problem:
        return RecipeError("a tab where YAML wants spaces", where=where, hint="replace the tab by spaces")
    return RecipeError(
        f"this is not YAML: {fault.problem or fault.context}",
        where=where,
        hint="text with : # or brackets goes into quotes",
    )
