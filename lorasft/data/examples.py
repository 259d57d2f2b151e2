"""Rows of any known shape -> Example: messages, tools, where it came from."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lorasft.data.folders import find_files
from lorasft.data.report import Report
from lorasft.data.sources import (
    Raw,
    Row,
    RowLocation,
    parse_row,
    parse_strict,
    read_file,
    read_hub,
)
from lorasft.errors import DataError

if TYPE_CHECKING:
    from lorasft.recipe import DataSettings, DataSource

Message = dict[str, Any]
BLOCK = 512  # rows that are prepared at once
BLOCK_BYTES = 4 << 20  # of lines, after which a block ends before
NEEDED = {  # format -> the columns that make it
    "chat": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "text": ("text",),
}
REASONING = ("reasoning_content", "thinking", "reasoning")  # the names that transformers reads, in its order
INLINE = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
CANONICAL = json.JSONEncoder(sort_keys=True, ensure_ascii=False)
JSON_TYPES = {str: "text", list: "a list", dict: "an object", bool: "true or false"}
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
}


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

    @cached_property
    def digest(self) -> int:
        """64 bits of a hash of the content: equal rows have equal digests, wherever they are."""
        content = CANONICAL.encode([self.messages, self.tools, self.text])
        return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "big")


@dataclass
class RowBlock:
    """Rows of one file (or data set) as they were read, in order, each with its line."""

    source: DataSource
    file: str
    kind: str  # their format, empty while no row of the file could be parsed
    rows: list[tuple[int, Raw]]
    error: DataError | None = None  # why the file cannot be read further


def read_blocks(source: DataSource, settings: DataSettings) -> Iterator[RowBlock]:
    """The rows of a source in order, hardly looked at; raises nothing for what a file holds."""
    files = [(str(file), read_file(file)) for file in find_files(source)[0]]
    for file, rows in files or [(f"{source.path}/{source.split}", read_hub(source))]:
        block, size = RowBlock(source, file, "", []), 0
        try:
            for line, raw in rows:
                size += len(raw) if isinstance(raw, bytes) else 0
                if not block.kind:
                    raw, block.kind = _find_format(raw, RowLocation(file, line), source, settings)
                block.rows.append((line, raw))
                if len(block.rows) == BLOCK or size > BLOCK_BYTES:
                    yield block
                    block, size = RowBlock(source, file, block.kind, []), 0
        except DataError as error:
            block.error = error
        yield block


def _find_format(raw: Raw, place: RowLocation, source: DataSource, settings: DataSettings) -> tuple[Raw, str]:
    """The first row of a file, parsed, and the format that it shows; empty if it cannot be parsed. Raises DataError
    when it has no format or fits two, or has not the columns that the recipe names."""
    try:
        row = parse_row(raw, place)
    except DataError as error:
        return error, ""
    stated, columns = source.format or settings.format, source.columns or settings.columns or {}
    seen = f"columns seen: {', '.join(map(str, row))}"
    absent = [theirs for theirs in columns.values() if theirs not in row]
    if absent:
        what = f"data.columns names {', '.join(map(repr, absent))}, not in the data"
        raise DataError(what, where=str(place), hint=seen)
    names = row.keys() | columns.keys()
    fits = [stated] if stated != "auto" else [kind for kind, needed in NEEDED.items() if names >= set(needed)]
    if len(fits) > 1:
        raise DataError(f"the columns fit {' and '.join(fits)}", where=str(place), hint="state data.format")
    if not fits:
        known = "; ".join(f"{kind}: {', '.join(needed)}" for kind, needed in NEEDED.items())
        raise DataError(f"no known format: {seen}", where=str(place), hint=f"map them with data.columns ({known})")
    return row, fits[0]


def shape_block(block: RowBlock, settings: DataSettings, *, report: Report) -> Iterator[Example]:
    """The examples of a block, within their source's share. Raises DataError after them when the file ends wrong."""
    columns, share = block.source.columns or settings.columns or {}, block.source.share
    for line, raw in block.rows:
        place = RowLocation(block.file, line)
        report.rows += 1
        try:
            row = parse_row(raw, place)
            mapped = row | {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}
            example = shape_row(mapped, block.kind, place)
            if example.digest < share * 2**64:
                yield example
        except (DataError, UnicodeEncodeError) as error:  # half a character: "\\ud83d" alone
            bad = error if isinstance(error, DataError) else DataError(f"not text: {error}")
            report.add_error(bad, place, policy=settings.on_bad_row)
    if block.error:
        raise block.error


def shape_row(row: Row, kind: str, place: RowLocation) -> Example:
    """One row of a known format as an Example. Raises DataError."""
    missing = [name for name in NEEDED[kind] if row.get(name) is None]
    if missing:
        what = f"no {' and no '.join(map(repr, missing))} in this row of format {kind}"
        raise DataError(what, hint=f"columns seen: {', '.join(map(str, row))}")
    if kind == "text":
        return Example((), None, _expect(row["text"], str, "text"), place)
    messages = tuple(normalize_message(message) for message in _list_messages(row, kind))
    refuse_untrainable(messages)
    return Example(messages, normalize_tools(row.get("tools")), None, place)


def normalize_message(message: Any) -> Message:
    """A message as templates want it: content a string, tool arguments objects, no nulls. Raises DataError."""
    clean = {key: value for key, value in _expect(message, dict, "a message").items() if value is not None}
    role = clean.get("role")
    if role not in ROLES:
        raise DataError(f"unknown role {role!r}", hint=f"known: {', '.join(ROLES)}; format: sharegpt has other names")
    _expect(clean.get("train", True), bool, "train")
    if clean.get("tool_calls"):
        clean["tool_calls"] = [_normalize_call(call) for call in _expect(clean["tool_calls"], list, "tool_calls")]
    else:
        clean.pop("tool_calls", None)
    if "content" not in clean and "tool_calls" not in clean:
        raise DataError(f"a message of role {role} without content")
    clean["content"] = _join_parts(clean.get("content", ""))
    return clean


def normalize_tools(tools: Any) -> tuple[dict[str, Any], ...] | None:
    """Tool schemas as OpenAI writes them, from a list or from a string of JSON; None when empty. Raises DataError."""
    tools = _parse(tools, "tools") if isinstance(tools, str) and tools.strip() else tools
    if not tools:
        return None
    return tuple(
        tool if "function" in _expect(tool, dict, "a tool") or "name" not in tool else _wrap_function(tool)
        for tool in _expect(tools, list, "tools")
    )


def reasoning_of(message: Message) -> str:
    """The reasoning of a message, without tags; empty when there is none."""
    field = next((str(message[name]) for name in REASONING if message.get(name)), "")
    inline = INLINE.match(message["content"])
    return (field or (inline.group(1) if inline else "")).strip()


def without_reasoning(message: Message) -> Message:
    """The message as it would be had there been no reasoning."""
    kept = {name: value for name, value in message.items() if name not in REASONING}
    inline = INLINE.match(message["content"])
    return {**kept, "content": message["content"][inline.end() :]} if inline else kept


def _list_messages(row: Row, kind: str) -> list[Any]:
    """The messages of a row of any format but text, not looked at yet."""
    if kind == "chat":
        return list(_expect(row["messages"], list, "messages"))
    if kind == "sharegpt":
        messages = [_from_sharegpt(turn) for turn in _expect(row["conversations"], list, "conversations")]
    elif kind == "prompt-completion" and isinstance(row["prompt"], list) and isinstance(row["completion"], list):
        return [*row["prompt"], *row["completion"]]
    else:
        question, answer = (_expect(row[name], str, name) for name in NEEDED[kind])
        if kind == "alpaca" and row.get("input"):
            question += "\n\n" + _expect(row["input"], str, "input")
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    has_system = kind != "prompt-completion" and row.get("system")
    return [{"role": "system", "content": row["system"]}, *messages] if has_system else messages


def _from_sharegpt(turn: Any) -> Message:
    if not isinstance(turn, dict) or not isinstance(turn.get("from"), str) or "value" not in turn:
        raise DataError("a turn of a sharegpt conversation has `from` and `value`")
    message: Message = {"role": SHAREGPT_ROLES.get(turn["from"], turn["from"]), "content": turn["value"]}
    if "train" in turn:
        message["train"] = turn["train"]
    if turn["from"] in ("function_call", "tool_call"):
        calls = _parse(turn["value"], "a tool call") if isinstance(turn["value"], str) else turn["value"]
        calls = calls if isinstance(calls, list) else [calls]
        message |= {"content": "", "tool_calls": [_wrap_function(call) for call in calls]}
    return message


def _wrap_function(function: Any) -> dict[str, Any]:
    return {"type": "function", "function": function}


def _normalize_call(call: Any) -> dict[str, Any]:
    function = _expect(_expect(call, dict, "a tool call").get("function"), dict, "function")
    _expect(function.get("name"), str, "name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):  # as OpenAI sends them; templates would quote them twice
        text, parsed = arguments, _parse(arguments, "arguments") if arguments.strip() else {}
        arguments = Arguments(_expect(parsed, dict, "arguments"))
        arguments.text = text
    return {**call, "function": {**function, "arguments": _expect(arguments, dict, "arguments")}}


def _join_parts(content: Any) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for part in _expect(content, list, "content"):
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind != "text":
            raise DataError(f"a content part of type {kind}", hint="only text can be trained on")
        texts.append(_expect(part.get("text"), str, "text"))
    return "".join(texts)


def refuse_untrainable(messages: tuple[Message, ...]) -> None:
    """Raise DataError for a conversation without an answer, or with an empty one."""
    roles = ", ".join(message["role"] for message in messages)
    if "assistant" not in roles:
        raise DataError(f"no assistant turn (roles: {roles})")
    for message in messages:
        if message["role"] == "assistant" and not message["content"].strip() and "tool_calls" not in message:
            hint = "data.on_bad_row=drop leaves it out"
            raise DataError(f"an assistant turn without text (roles: {roles})", hint=hint)


def _expect(value: Any, kind: type, name: str) -> Any:
    if not isinstance(value, kind):
        raise DataError(f"{name!r} must be {JSON_TYPES[kind]}, this is {type(value).__name__}")
    return value


def _parse(text: str, name: str) -> Any:
    try:
        return parse_strict(text)
    except ValueError as error:
        raise DataError(f"{name}: not JSON: {error}") from None
