"""Rows of any known shape -> Example: messages, tools, where it came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lorasft.data.report import NAMED, BadRows
from lorasft.data.rows import Place, Raw, Row, holds_key, parse_row, parse_strict, read_file, read_hub, source_files
from lorasft.errors import DataError

if TYPE_CHECKING:
    from lorasft.recipe import DataSettings, DataSource

__all__ = ["Example", "Place", "RowBlock", "held_out_below", "read_blocks", "read_examples", "shape_block"]

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
CANONICAL = json.JSONEncoder(sort_keys=True, ensure_ascii=False)
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}


@dataclass(frozen=True)
class Example:
    """A row of the data: a conversation, or raw text (then `messages` is empty)."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] | None
    text: str | None
    place: Place

    def digest(self) -> int:
        """64 bits of a hash of the content: equal rows have equal digests, wherever they stand."""
        content = CANONICAL.encode([self.messages, self.tools, self.text])
        return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "big")


@dataclass
class RowBlock:
    """Rows of one file (or data set) as they were read, in order, each with its line.

    `kind`: their format, empty while no row of the file could be parsed; `fault`: why the file cannot be read on.
    """

    source: DataSource
    file: str
    kind: str
    rows: list[tuple[int, Raw]]
    fault: DataError | None = None


def read_blocks(sources: Iterable[DataSource], settings: DataSettings) -> Iterator[RowBlock]:
    """The rows of all sources in order, hardly looked at; raises nothing for what stands in a file."""
    for source in sources:
        files = [(str(file), read_file(file)) for file in source_files(source.path)]
        for name, rows in files or [(f"{source.path}/{source.split}", read_hub(source))]:
            yield from _cut_blocks(rows, name, source, settings)


def _cut_blocks(
    rows: Iterator[tuple[int, Raw]], file: str, source: DataSource, settings: DataSettings
) -> Iterator[RowBlock]:
    block, size = RowBlock(source, file, "", []), 0
    try:
        for line, raw in rows:
            block.kind = block.kind or _find_kind(raw, Place(file, line), source, settings)
            block.rows.append((line, raw))
            size += len(raw) if isinstance(raw, bytes) else 0
            if len(block.rows) == BLOCK or size > BLOCK_BYTES:
                yield block
                block, size = RowBlock(source, file, block.kind, []), 0
    except DataError as fault:
        block.fault = fault
    yield block


def _find_kind(raw: Raw, place: Place, source: DataSource, settings: DataSettings) -> str:
    """The format that the first row of a file shows, if it can be parsed. Raises DataError when it has none."""
    try:
        row = parse_row(raw, place)
    except DataError:
        return ""
    stated, columns = source.format or settings.format, source.columns or settings.columns or {}
    _refuse_missing_columns(row, columns, place)
    return stated if stated != "auto" else detect_format({**row, **columns}, place)


def read_examples(sources: Iterable[DataSource], settings: DataSettings, *, bad: BadRows) -> Iterator[Example]:
    """The examples of all sources in order, one at a time; nothing is kept.

    Bad rows go to `bad`, whose report counts them. Raises DataError when a file or a data set cannot be read.
    """
    for block in read_blocks(sources, settings):
        yield from shape_block(block, settings, bad=bad)


def shape_block(block: RowBlock, settings: DataSettings, *, bad: BadRows) -> Iterator[Example]:
    """The examples of a block, within their source's share. Raises DataError behind them when the file ends wrong."""
    columns, share = block.source.columns or settings.columns or {}, block.source.share
    if block.kind:
        bad.report.formats[block.file] = block.kind
    for line, raw in block.rows:
        place = Place(block.file, line)
        try:
            row = parse_row(raw, place)
            bad.report.rows += 1
            if len(bad.report.with_keys) < NAMED and holds_key(raw):
                bad.report.with_keys.append(str(place))
            mapped = row | {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}
            example = shape_row(mapped, block.kind, place)
        except DataError as fault:
            bad.add(fault)
            continue
        if share == 1 or example.digest() < share * 2**64:
            yield example
    if block.fault:
        raise block.fault


def held_out_below(digests: npt.NDArray[np.uint64], share: float) -> int:
    """The digest below which an example is held out, so that about `share` of the distinct contents are.

    At least one is held out and one is not; equal rows fall on the same side, in whatever order they stand.
    Raises DataError when all rows are equal.
    """
    distinct = np.unique(digests)
    if len(distinct) < 2:
        what = f"{len(distinct)} different rows: none can be held out"
        raise DataError(what, where="data.eval", hint="data.eval=null")
    count = min(max(1, round(share * len(distinct))), len(distinct) - 1)
    return int(distinct[count])


def detect_format(row: Row, place: Place) -> str:
    """The one format whose columns the row has. Raises DataError when none or two fit."""
    fits = [kind for kind, needed in NEEDED.items() if all(name in row for name in needed)]
    if len(fits) == 1:
        return fits[0]
    seen = f"columns seen: {', '.join(map(str, row))}"
    if fits:
        raise DataError(f"the columns fit {' and '.join(fits)}", where=str(place), hint="state data.format")
    known = "; ".join(f"{kind}: {', '.join(needed)}" for kind, needed in NEEDED.items())
    raise DataError(f"no known format: {seen}", where=str(place), hint=f"map them with data.columns ({known})")


def shape_row(row: Row, kind: str, place: Place) -> Example:
    """One row of a known format as an Example. Raises DataError with the place."""
    missing = [name for name in NEEDED[kind] if row.get(name) is None]
    if missing:
        what = f"no {' and no '.join(map(repr, missing))} in this row of format {kind}"
        raise DataError(what, where=str(place), hint=f"columns seen: {', '.join(map(str, row))}")
    try:
        if kind == "text":
            return Example((), None, _text(row["text"], "text"), place)
        messages = tuple(normalize_message(message) for message in SHAPES[kind](row))
        _refuse_untrainable(messages)
        return Example(messages, normalize_tools(row.get("tools")), None, place)
    except DataError as fault:
        raise DataError(fault.what, where=str(place), hint=fault.hint) from None


def normalize_message(message: Any) -> Message:
    """A message as templates want it: content a string, tool arguments objects, no nulls. Raises DataError."""
    if not isinstance(message, dict):
        raise DataError(f"a message must be an object, this is {type(message).__name__}")
    clean = {key: value for key, value in message.items() if value is not None}
    role = clean.get("role")
    if not isinstance(role, str) or role not in ROLES:
        hint = (
            "format: sharegpt has other names"
            if isinstance(role, str) and role in SHAREGPT_ROLES
            else f"known: {', '.join(ROLES)}"
        )
        raise DataError(f"unknown role {role!r}", hint=hint)
    if not isinstance(clean.get("train", True), bool):
        raise DataError(f"`train` of a message is true or false, not {clean['train']!r}")
    if clean.get("tool_calls"):
        clean["tool_calls"] = [_normalize_call(call) for call in _list(clean["tool_calls"], "tool_calls")]
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
    wrapped = []
    for tool in _list(tools, "tools"):
        if not isinstance(tool, dict):
            raise DataError("a tool must be an object")
        wrapped.append(tool if "function" in tool or "name" not in tool else {"type": "function", "function": tool})
    return tuple(wrapped)


def _chat(row: Row) -> list[Any]:
    return _list(row["messages"], "messages")


def _sharegpt(row: Row) -> list[Any]:
    messages = [_from_sharegpt(turn) for turn in _list(row["conversations"], "conversations")]
    return [{"role": "system", "content": row["system"]}, *messages] if row.get("system") else messages


def _from_sharegpt(turn: Any) -> Message:
    if not isinstance(turn, dict) or not isinstance(turn.get("from"), str) or "value" not in turn:
        raise DataError("a turn of a sharegpt conversation has `from` and `value`")
    if turn["from"] not in SHAREGPT_ROLES:
        raise DataError(f"unknown role {turn['from']!r}", hint=f"known: {', '.join(SHAREGPT_ROLES)}")
    message: Message = {"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]}
    if "train" in turn:
        message["train"] = turn["train"]
    if turn["from"] in ("function_call", "tool_call"):
        calls = _parse(turn["value"], "a tool call") if isinstance(turn["value"], str) else turn["value"]
        calls = calls if isinstance(calls, list) else [calls]
        message |= {"content": "", "tool_calls": [{"type": "function", "function": call} for call in calls]}
    return message


def _alpaca(row: Row) -> list[Any]:
    question = _text(row["instruction"], "instruction")
    if row.get("input"):
        question += "\n\n" + _text(row["input"], "input")
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": _text(row["output"], "output")}]
    return [{"role": "system", "content": row["system"]}, *messages] if row.get("system") else messages


def _prompt_completion(row: Row) -> list[Any]:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return prompt + completion
    user, answer = _text(prompt, "prompt"), _text(completion, "completion")
    return [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]


SHAPES: dict[str, Callable[[Row], list[Any]]] = {
    "chat": _chat,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt-completion": _prompt_completion,
}


def _normalize_call(call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError("a tool call has a `function` with a `name`")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):  # as OpenAI sends them; templates would quote them twice
        arguments = _parse(arguments, "the arguments of a tool call") if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise DataError(f"the arguments of a tool call must be an object, not {type(arguments).__name__}")
    return {**call, "function": {**function, "arguments": arguments}}


def _join_parts(content: Any) -> str:
    if isinstance(content, str):
        return content
    texts = []
    if not isinstance(content, list):
        raise DataError(f"'content' must be text or a list of parts, this is {type(content).__name__}")
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind != "text":
            raise DataError(f"a content part of type {kind}", hint="only text can be trained on")
        if not isinstance(part.get("text"), str):
            raise DataError("a content part of type text has its words under `text`")
        texts.append(part["text"])
    return "".join(texts)


def _refuse_untrainable(messages: tuple[Message, ...]) -> None:
    roles = ", ".join(message["role"] for message in messages)
    if not messages:
        raise DataError("a conversation without messages")
    if "assistant" not in roles:
        raise DataError(f"no assistant turn (roles: {roles})")
    for message in messages:
        if message["role"] == "assistant" and not message["content"].strip() and "tool_calls" not in message:
            hint = "data.on_bad_row=drop leaves it out"
            raise DataError(f"an assistant turn without text (roles: {roles})", hint=hint)


def _refuse_missing_columns(row: Row, columns: dict[str, str], place: Place) -> None:
    absent = [theirs for theirs in columns.values() if theirs not in row]
    if absent:
        what = f"data.columns names {', '.join(map(repr, absent))}, not in the data"
        raise DataError(what, where=str(place), hint=f"columns seen: {', '.join(map(str, row))}")


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name!r} must be text, this is {type(value).__name__}")
    return value


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"{name!r} must be a list, this is {type(value).__name__}")
    return value


def _parse(text: str, name: str) -> Any:
    try:
        return parse_strict(text)
    except ValueError as fault:
        raise DataError(f"{name}: not JSON: {fault}") from None
