"""What the keys of rows, messages and turns say: which are read, what the others would change, and which are named.

The formats of OpenAI, Mistral, Anthropic, Bedrock, TRL, Axolotl, LLaMA-Factory and ms-swift: keys.yaml has the names,
docs/data.md what becomes of each.
"""

from __future__ import annotations

import re
from collections.abc import Set
from pathlib import Path
from typing import Any

from lorasft.data.sources import Row
from lorasft.errors import DataError
from lorasft.recipe.yaml_reader import read_yaml

_NAMES: dict[str, Any] = read_yaml(Path(__file__).with_name("keys.yaml")).value
NEEDED: dict[str, list[str]] = _NAMES["formats"]  # format -> the columns that make it
OPTIONS = "chat_template_kwargs"  # of a row: variables of its template
VARIABLES: list[str] = _NAMES["variables"]  # and those that have a column of their own
READ = {kind: {*needed, *_NAMES["beside"][kind]} for kind, needed in NEEDED.items()}  # all columns that are read
ROLES: list[str] = _NAMES["roles"]
OTHER_ROLES: dict[str, str] = _NAMES["other_roles"]
REASONING: list[str] = _NAMES["reasoning"]
FLAGS: dict[str, bool] = _NAMES["flags"]
UNCLEAR, MEDIA = set(_NAMES["unclear"]), set(_NAMES["media"])
KNOWN = {"role", "content", "tool_calls", "function_call", "weight", *REASONING, *FLAGS, *UNCLEAR, *MEDIA}
KEPT = KNOWN | {"name", "tool_call_id"}  # of a turn; these two say something to some templates
_WEIGHTS_TO = (1e-9, 1e9)  # products and sums of them are numbers of fp32
_A_WEIGHT = f"0, or a number from {_WEIGHTS_TO[0]:g} to {_WEIGHTS_TO[1]:g}"
PAIRS: str = _NAMES["pairs"]  # what to do with preference pairs


def is_absent(value: Any) -> bool:
    """Whether a value says no more than a key that is not there; Parquet gives every row the keys of all."""
    if isinstance(value, (list, dict)):
        return all(map(is_absent, value.values() if isinstance(value, dict) else value))
    return value is None or value == ""


def formats_of(columns: Set[str]) -> list[str]:
    """The formats that these columns make."""
    return [kind for kind, needed in NEEDED.items() if columns >= set(needed)]


def guess_columns(row: Row) -> tuple[dict[str, str], str]:
    """The columns of a format, each with the one of `row`, which fits none, that is another name for it (in any case,
    with blanks around). Nothing where another reading would be as good, with what could be what."""
    named: dict[str, list[str]] = {}
    for name in row:
        named.setdefault(str(name).strip().lower(), []).append(name)
    if any(len(names) > 1 for names in named.values()) or named.keys() >= {"chosen", "rejected"}:
        return {}, ""
    kinds, dialogues = ("questions", "answers", "systems"), _NAMES["dialogues"]
    asked, answered, systems = ([key for key in _NAMES[kind] if key in named] for kind in kinds)
    turns = re.compile(r"\s*\[\s*\{")  # of a list of them, or of one as JSON
    lists = [key for key in dialogues if key in named and turns.match(str(row[named[key][0]]))]
    extra = "context" if "context" in named else "input" if {"instruction", "input"} <= named.keys() else ""
    extra = "" if extra and isinstance(row[named[extra][0]], (list, dict)) else extra
    asked = [key for key in asked if key != extra]
    if len(lists) == 1 and not answered:
        found = {dialogues[lists[0]]: lists[0]}
    elif not lists and len(asked) == len(answered) == 1:
        pair = ("instruction", "output") if extra else ("prompt", "completion")
        found = dict(zip(pair, (asked[0], answered[0]), strict=True)) | ({"input": extra} if extra else {})
    else:
        parts = {"the question": asked, "the answer": answered, "the conversation": lists}
        several = (f"{' or '.join(names)} could be {what}" for what, names in parts.items() if names)
        return {}, ", ".join(several)
    if len(systems) == 1 and "system" not in row:
        found["system"] = systems[0]
    return {ours: named[theirs][0] for ours, theirs in found.items()}, ""


def check_row(row: Row, kind: str, read: Set[str]) -> set[str]:
    """The keys of a row that are not `read` and say something. Raises DataError for those without which the answer
    cannot be learned, and for a pair of answers of which one is the worse."""
    unread = {key for key in row.keys() - read if not is_absent(row[key])}
    if kind != "text":
        refuse_media(row, unread)
    if {"chosen", "rejected"} <= unread and row["chosen"] != row.get("messages"):
        raise DataError("a preference pair: its `chosen` and `rejected` are not learned", hint=PAIRS)
    return unread


def refuse_media(values: Row, keys: Set[str]) -> None:
    """Raise DataError where one of these `keys` holds an image, sound or film."""
    if found := sorted(key for key in keys & MEDIA if values[key]):
        raise DataError(f"{found[0]!r} beside the text", hint="only text can be trained on")


def label_of(row: Row, kind: str) -> bool | None:
    """Whether the answer of a row is a good one, where the row says so as KTO's rows do."""
    labels = ("label", "kto_tag") if kind == "prompt-completion" else ("kto_tag",)
    said = next((str(row[key]).lower() for key in labels if key in row), "")
    return {"true": True, "false": False}.get(said)


def template_reads(template: str, name: str) -> bool:
    """Whether a template may read what a row gives it: a key of its messages, or a variable."""
    where, _, key = name.rpartition(".")
    pattern = rf"""[.'"]{re.escape(key)}\b""" if where == "messages" else rf"\b{re.escape(key)}\b"
    return (where in ("messages", OPTIONS) or key in VARIABLES) and bool(re.search(pattern, template))


def read_flags(message: Row) -> None:
    """Leave one flag in a message, `train`: false where one of its flags or weights says that it is not to be learned,
    true where one chooses it; and its `weight` as a number, where that is neither 0 nor 1. Raises DataError."""
    if message.get("role") == "assistant" and (unclear := sorted(UNCLEAR & message.keys())):
        hint = '"train": true or false marks a whole answer'
        raise DataError(f"{unclear[0]!r} says what is learned in a way that is not read", hint=hint)
    weight = read_weight(message.pop("weight", None))
    flags: dict[str, float] = {}
    for key in [key for key in FLAGS if key in message]:
        flags[key] = _number(key, message.pop(key), "true or false")
        if flags[key] not in (0, 1):  # a weight that tools apply otherwise
            hint = "make it 0 or 1; 'weight' may be any number from 0"
            raise DataError(f"{key!r} is {flags[key]:g}, a weight other than 0 and 1", hint=hint)
    if weight == 0 or any(number != FLAGS[key] for key, number in flags.items()):
        message["train"] = False
        return
    if any(key in _NAMES["choosing"] for key in flags):
        message["train"] = True
    if weight != 1:
        message["weight"] = weight


def read_weight(value: Any) -> float:
    """What the losses of a row or a message are multiplied by: 1 where nothing is said. Raises DataError."""
    number = 1.0 if is_absent(value) else _number("weight", value, _A_WEIGHT)
    if number != 0 and not _WEIGHTS_TO[0] <= number <= _WEIGHTS_TO[1]:
        raise DataError(f"'weight' is {number:g}", hint=_A_WEIGHT)
    return number


def _number(key: str, value: Any, wanted: str) -> float:
    text = str(value).lower()
    try:
        return float({"true": "1", "false": "0"}.get(text, text))
    except ValueError:
        raise DataError(f"{key!r} must be {wanted}, this is {type(value).__name__}", hint="write that") from None
