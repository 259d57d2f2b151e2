"""Rows of any known shape -> Example: messages, tools, where it came from."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from lorasft.data import keys
from lorasft.data.folders import find_files
from lorasft.data.report import Report
from lorasft.data.sources import Raw, Row, RowLocation, drop_nulls, load_hub, parse_row, parse_strict, read_file
from lorasft.errors import DataError
from lorasft.recipe import DataSettings, DataSource

Message = dict[str, Any]
BLOCK = 512  # rows that are prepared at once
BLOCK_BYTES = 4 << 20  # of lines, after which a block ends before
INLINE = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
CANONICAL = json.JSONEncoder(sort_keys=True, ensure_ascii=False)
JSON_TYPES: dict[type, str] = {str: "text", list: "a list", dict: "an object"}


class Arguments(dict[str, Any]):
    """The arguments of a call, whose row has them as text."""

    text = ""


@dataclass(frozen=True)
class Example:
    """A row of the data: a conversation, or raw text (then `messages` is empty)."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] | None
    text: str | None
    place: RowLocation
    variables: dict[str, Any] = field(default_factory=dict)  # of the template, in this row
    completion: int | None = None  # messages, at the end, that may be supervised; null: all
    weight: float = 1.0  # of all its losses

    @cached_property
    def digest(self) -> int:
        """64 bits of a hash of the content: equal rows have equal digests, wherever they are, whatever they weigh."""
        variables = [self.variables] if self.variables else []
        messages = [{key: value for key, value in one.items() if key != "weight"} for one in self.messages]
        content = CANONICAL.encode([messages, self.tools, self.text, *variables])
        return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "big")


@dataclass
class RowBlock:
    """Rows of one file (or data set) as they were read, in order, each with its line."""

    source: DataSource
    file: str
    kind: str  # their format, empty while no row of the file could be parsed
    rows: list[tuple[int, Raw]]
    error: DataError | None = None  # why the file cannot be read further
    guess: Mapping[str, str] = field(default_factory=dict)  # its columns where they were found by their names


def read_blocks(source: DataSource, settings: DataSettings) -> Iterator[RowBlock]:
    """The rows of a source in order, hardly looked at; raises nothing for what a file holds."""
    for path in find_files(source)[0] or (None,):  # None: it is on the hub
        file = str(path or f"{source.path}/{source.split}")
        block, size = RowBlock(source, file, "", []), 0
        try:
            for line, raw in read_file(path) if path else enumerate(map(drop_nulls, load_hub(source)), start=1):
                size += len(raw) if isinstance(raw, bytes) else 0
                if not block.kind:
                    raw, block.kind, error, block.guess = _find_format(raw, RowLocation(file, line), source, settings)
                    block.error = None if block.kind else block.error or error
                block.rows.append((line, raw))
                if len(block.rows) == BLOCK or size > BLOCK_BYTES:
                    if block.error:
                        break
                    yield block
                    block, size = replace(block, rows=[]), 0
        except DataError as error:
            block.error = error
        if not block.kind:  # rows that fit nothing are bad ones if a later row fits
            block.rows = [(line, raw) for line, raw in block.rows if isinstance(raw, DataError)]
        yield block


def _find_format(
    raw: Raw, place: RowLocation, source: DataSource, settings: DataSettings
) -> tuple[Raw, str, DataError | None, dict[str, str]]:
    """A row, parsed, the format that it shows, or why it shows none, and its columns where they were found by other
    names. Raises DataError when it fits two, or when the recipe names columns that its format does not read."""
    try:
        row = parse_row(raw)
    except DataError as error:
        return error, "", None, {}
    stated, columns = source.format or settings.format, source.columns or settings.columns or {}
    seen = f"columns seen: {', '.join(map(str, row))}"
    if absent := [theirs for theirs in columns.values() if theirs not in row]:
        what = f"data.columns (--columns) names {', '.join(map(repr, absent))}, not in the data"
        return row, "", DataError(what, where=place, hint=seen), {}
    fits = [stated] if stated != "auto" else keys.formats_of(row.keys() | columns.keys())
    guess, several = ({}, "") if fits or columns else keys.guess_columns(row)
    fits = fits or keys.formats_of(guess.keys())
    if len(fits) > 1:
        raise DataError(f"the columns fit {' and '.join(fits)}", where=place, hint="state data.format")
    if not fits:
        known = "; ".join(f"{kind}: {', '.join(needed)}" for kind, needed in keys.NEEDED.items())
        hint = f"map them with data.columns or --columns '{{prompt: foo, completion: bar}}' ({known})"
        hint += f"; here {several}" * bool(several)
        hint = keys.PAIRS if row.keys() >= {"chosen", "rejected"} else hint
        return row, "", DataError(f"no known format: {seen}", where=place, hint=hint), {}
    if idle := sorted(columns.keys() - keys.READ[fits[0]]):
        what = f"data.columns (--columns) maps {', '.join(map(repr, idle))}, which format {fits[0]} does not read"
        raise DataError(what, where=place, hint=f"it reads {', '.join(sorted(keys.READ[fits[0]]))}")
    return row, fits[0], None, guess


def shape_block(block: RowBlock, settings: DataSettings, *, report: Report) -> Iterator[Example]:
    """The examples of a block; `report` gets what was wrong with the others, and after them why the file ends."""
    columns = block.guess or block.source.columns or settings.columns or {}
    read = (keys.READ.get(block.kind, set()) - columns.keys()) | set(columns.values())
    if block.guess:
        report.read_as.append(f"{', '.join(columns.values())} are read as {', '.join(columns)}")
    for line, raw in block.rows:
        place = RowLocation(block.file, line)
        report.rows += 1
        try:
            row = parse_row(raw)
            unread = keys.check_row(row, block.kind, read)
            row = row | {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}
            example = shape_row(row, block.kind, place, unread=unread, mapped=columns.keys())
            if unread:
                report.unread.extend(sorted(unread.difference(report.unread)))
                if (label := keys.label_of(row, block.kind)) is not None:
                    report.labels.setdefault((block.file, label), str(place))
            example.digest  # noqa: B018  of text that is none
            yield example
        except (DataError, UnicodeEncodeError) as error:  # half a character: "\\ud83d" alone
            bad = error if isinstance(error, DataError) else DataError(f"not text: {error}")
            report.add_error(bad, place, policy=settings.on_bad_row)
    if block.error:
        report.last.append(block.error)


def shape_row(row: Row, kind: str, place: RowLocation, *, unread: set[str], mapped: Set[str]) -> Example:
    """One row of a known format as an Example. Raises DataError. `unread`: gets the names of keys that nothing reads;
    `mapped`: the fields that the recipe names columns for."""
    missing = [name for name in keys.NEEDED[kind] if row.get(name) is None]
    if missing:
        what = f"no {' and no '.join(map(repr, missing))} in this row of format {kind}"
        raise DataError(what, hint=f"columns seen: {', '.join(map(str, row))}")
    weight = keys.read_weight(row.get("weight"))
    if kind == "text":
        return Example((), None, _expect(row["text"], str, "text"), place, weight=weight)
    listed, completion = _list_messages(row, kind, unread)
    messages = tuple(normalize_message(message, unread) for message in listed)
    if row.get("system"):  # once; where they have another of their own, only if it is asked for
        system, first = normalize_message({"role": "system", "content": row["system"]}, unread), messages[:1]
        own = bool(first) and first[0]["role"] in ("system", "developer")
        if not own or ((kind == "sharegpt" or "system" in mapped) and first != (system,)):
            messages = (system, *messages)
        elif first != (system,):
            unread.add("system")
    refuse_untrainable(messages)
    tools = normalize_tools(row.get("tools") or row.get("functions"))
    return Example(messages, tools, None, place, _template_variables(row, unread), completion, weight)


def normalize_message(message: Any, unread: set[str]) -> Message:
    """A message as templates want it: content a string, tool arguments objects, no nulls, of all flags `train` alone.
    Raises DataError. `unread`: gets the names of its keys that nothing reads."""
    clean = {
        key: value
        for key, value in _expect(message, dict, "a message").items()
        if not keys.is_absent(value) or (key == "content" and value is not None)
    }
    role = clean.get("role")
    if role == "function":
        role = clean["role"] = "tool"
    if role not in keys.ROLES:
        others = "data.format=sharegpt 'data.columns={conversations: messages}' has other names"
        raise DataError(f"unknown role {role!r}", hint=f"known: {', '.join(keys.ROLES)}; {others}")
    if len(clean) > 2 or "content" not in clean:
        unread.update(f"messages.{key}" for key in clean.keys() - keys.KNOWN)
        keys.refuse_media(clean, clean.keys())
        keys.read_flags(clean)
        if call := clean.pop("function_call", None):
            unread.update(["messages.function_call"] if "tool_calls" in clean else [])
            clean.setdefault("tool_calls", [call])
    if "tool_calls" in clean:
        clean["tool_calls"] = [_normalize_call(call) for call in _as_list(clean["tool_calls"], "tool_calls")]
    if "content" not in clean and "tool_calls" not in clean:
        raise DataError(f"a message of role {role} without content")
    clean["content"] = _join_parts(clean.get("content", ""), unread)
    return clean


def normalize_tools(tools: Any) -> tuple[dict[str, Any], ...] | None:
    """Tool schemas as OpenAI writes them, from a list or from a string of JSON; None when empty. Raises DataError."""
    listed = _as_list(tools, "tools") if tools else ()
    wrapped = tuple(
        {"type": "function", "function": tool} if "name" in tool and "function" not in tool else tool
        for tool in (_expect(_parse(tool, "a tool"), dict, "a tool") for tool in listed)
    )
    return wrapped or None


def reasoning_of(message: Message) -> str:
    """The reasoning of a message, without tags; empty when there is none."""
    field = next((str(message[name]) for name in keys.REASONING if message.get(name)), "")
    inline = INLINE.match(message["content"])
    return (field or (inline.group(1) if inline else "")).strip()


def without_reasoning(message: Message) -> Message:
    """The message as it would be had there been no reasoning."""
    kept = {name: value for name, value in message.items() if name not in keys.REASONING}
    inline = INLINE.match(message["content"])
    return {**kept, "content": message["content"][inline.end() :]} if inline else kept


def _list_messages(row: Row, kind: str, unread: set[str]) -> tuple[list[Any], int | None]:
    """The messages of a row of any format but text, not looked at yet; of a prompt and its completion in messages, how
    many are the completion."""
    if kind in ("chat", "sharegpt"):
        listed = _as_list(row[keys.NEEDED[kind][0]], keys.NEEDED[kind][0])
        turns = kind == "sharegpt" or any(isinstance(one, dict) and "role" not in one for one in listed)
        return [_from_turn(turn, unread) for turn in listed] if turns else listed, None
    prompt, completion = (_as_messages(row[name]) for name in keys.NEEDED[kind])
    if kind == "prompt-completion" and prompt and completion:
        unread.update(["history"] if row.get("history") else [])
        return [*prompt, *completion], len(completion)
    question, answer = (_expect(row[name], str, name) for name in keys.NEEDED[kind])
    if kind == "alpaca" and row.get("input"):
        question += "\n\n" + _expect(row["input"], str, "input")
    texts = [question, answer]
    for pair in _as_list(row["history"], "history") if row.get("history") else ():
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError("'history' is a list of pairs, a question and its answer")
        texts[-2:-2] = pair
    roles = ("user", "assistant") * (len(texts) // 2)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)], None


def _as_messages(value: Any) -> list[Any]:
    """The messages of a prompt or completion, also where a column has them as JSON; none of a text of its own."""
    if isinstance(value, str) and value.startswith("[{"):
        with suppress(ValueError):
            value = parse_strict(value)
    return value if isinstance(value, list) and all(isinstance(one, dict) and "role" in one for one in value) else []


def _template_variables(row: Row, unread: set[str]) -> dict[str, Any]:
    """What a row gives the template besides messages and tools; named as not read until the template is known."""
    found = {key: row[key] for key in keys.VARIABLES if not keys.is_absent(row.get(key))}
    unread.update(found)
    if "documents" in found:
        found["documents"] = [_expect(one, dict, "a document") for one in _as_list(found["documents"], "documents")]
    options = _expect(_parse(row.get(keys.OPTIONS) or {}, keys.OPTIONS), dict, keys.OPTIONS)
    stated = {name: value for name, value in options.items() if value is not None}
    unread.update(f"{keys.OPTIONS}.{name}" for name in stated)
    return found | stated


def _from_turn(turn: Any, unread: set[str]) -> Message:
    """A turn with `from` and `value`, or with the names of a message."""
    role = turn.get("from") or turn.get("role") if isinstance(turn, dict) else None
    if not isinstance(role, str):
        raise DataError("a turn of a sharegpt conversation has `from` and `value`, or `role` and `content`")
    message: Message = {key: value for key, value in turn.items() if key in keys.KEPT}
    others = turn.keys() - keys.KEPT - {"from", "value"} | ({"content"} & turn.keys() if turn.get("value") else set())
    unread.update(f"conversations.{key}" for key in others if not keys.is_absent(turn[key]))
    message["role"] = keys.OTHER_ROLES.get(role, role)
    message["content"] = turn.get("value") or turn.get("content", turn.get("value"))
    if role in ("function_call", "tool_call") and not message.get("tool_calls"):
        calls = _parse(message["content"], "a tool call")
        message |= {"content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}
    return message


def _normalize_call(call: Any) -> dict[str, Any]:
    """A call as OpenAI writes it, also of a function alone; its arguments an object. Raises DataError."""
    if "function" not in _expect(call, dict, "a tool call"):
        call = {"type": "function", "function": call}
    function = _expect(call.get("function"), dict, "function")
    _expect(function.get("name"), str, "name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):  # as OpenAI sends them; templates would quote them twice
        text, parsed = arguments, _parse(arguments, "arguments") if arguments.strip() else {}
        arguments = Arguments(_expect(parsed, dict, "arguments"))
        arguments.text = text
    return {**call, "function": {**function, "arguments": _expect(arguments, dict, "arguments")}}


def _join_parts(content: Any, unread: set[str]) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DataError(f"'content' must be text, or a list of texts, this is {type(content).__name__}")
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind != "text":
            raise DataError(f"a content part of type {kind}", hint="only text can be trained on")
        texts.append(_expect(part.get("text", part.get("value")), str, "text"))
        extra = {key: value for key, value in part.items() if key not in ("type", "text", "value")}
        keys.read_flags(extra)
        if extra.pop("train", True) is False or "weight" in extra:
            what = "has a weight of its own" if "weight" in extra else "is not to be learned"
            raise DataError(f"a content part that {what}", hint="mark the whole message")
        unread.update(f"content.{key}" for key, value in extra.items() if not keys.is_absent(value))
    return "".join(texts)


def refuse_untrainable(messages: tuple[Message, ...]) -> None:
    """Raise DataError for a conversation without an answer, or with an empty one."""
    roles = ", ".join(message["role"] for message in messages)
    if "assistant" not in roles:
        raise DataError(f"no assistant turn (roles: {roles})")
    for message in messages:
        if message["role"] == "assistant" and not message["content"].strip() and "tool_calls" not in message:
            raise DataError(f"an assistant turn without text (roles: {roles})")


def _expect(value: Any, kind: type, name: str) -> Any:
    if not isinstance(value, kind):
        raise DataError(f"{name!r} must be {JSON_TYPES[kind]}, this is {type(value).__name__}")
    return value


def _as_list(value: Any, name: str) -> list[Any]:
    """A list, also where it is in a column of text as JSON. Raises DataError."""
    return list(_expect(_parse(value, name), list, name))


def _parse(value: Any, name: str) -> Any:
    """What a text of JSON says; what is no text is left as it is. Raises DataError."""
    try:
        return parse_strict(value) if isinstance(value, str) else value
    except ValueError as error:
        raise DataError(f"{name}: not JSON: {error}") from None
