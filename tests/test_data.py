"""Rows of every shape and every fault, the held-out split, the store, its cache, and the preview."""

from __future__ import annotations

import datetime
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_tokenizer import TEMPLATE, save_tokenizer

from lorasft.data import sources
from lorasft.data.chat_format import ChatFormat
from lorasft.data.examples import Example, read_blocks, shape_block
from lorasft.data.prepare import held_out_below, list_ingredients, open_prepared, prepare
from lorasft.data.report import Report
from lorasft.data.sources import RowLocation
from lorasft.data.store import UNSUPERVISED, Tokens, append_arrays, example_lengths, map_store, pack_examples
from lorasft.data.tokenizer import load_tokenizer
from lorasft.errors import DataError, ErrorGroup, LorasftError, ModelError
from lorasft.recipe import ChatSettings, DataSettings, DataSource

SHARED = Path(__file__).parents[2] / "shared/data"
CHAT_ROW = '{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}'


def shape(data: DataSettings, report: Report) -> list[Example]:
    blocks = (block for source in data.train for block in read_blocks(source, data))
    return [example for block in blocks for example in shape_block(block, data, report=report)]


def read(path: Path | str, **settings: Any) -> list[Example]:
    data = DataSettings(train=(str(path),), **settings)
    report = Report()
    examples = shape(data, report)
    report.raise_errors()
    return examples


def read_bytes(folder: Path, content: bytes, name: str = "rows.jsonl", **settings: Any) -> list[Example]:
    (folder / name).write_bytes(content)
    return read(folder / name, **settings)


def turns(example: Example) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in example.messages]


QA = [("user", "Q"), ("assistant", "A")]
SHAPES = [
    (CHAT_ROW, QA),
    ('{"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}', QA),
    ('{"conversations": [{"from": "user", "value": "Q"}, {"from": "assistant", "value": "A"}], "id": 3}', QA),
    ('{"instruction": "Q", "output": "A"}', QA),
    ('{"instruction": "Q", "input": "", "output": "A"}', QA),
    ('{"instruction": "Q", "input": "I", "output": "A"}', [("user", "Q\n\nI"), ("assistant", "A")]),
    ('{"instruction": "Q", "output": "A", "system": "S"}', [("system", "S"), *QA]),
    ('{"prompt": "Q", "completion": "A"}', QA),
    ('{"prompt": [{"role": "user", "content": "Q"}], "completion": [{"role": "assistant", "content": "A"}]}', QA),
    (
        CHAT_ROW.replace('"A"', '[{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]'),
        [QA[0], ("assistant", "AB")],
    ),
]


@pytest.mark.parametrize(("row", "expected"), SHAPES)
def test_row_shapes(tmp_path: Path, row: str, expected: list[tuple[str, str]]) -> None:
    (example,) = read_bytes(tmp_path, row.encode() + b"\n")
    assert turns(example) == expected
    assert example.place == RowLocation(str(tmp_path / "rows.jsonl"), 1) and example.text is None


def test_text_rows_and_columns(tmp_path: Path) -> None:
    (text,) = read_bytes(tmp_path, b'{"text": "once"}')
    assert (text.text, text.messages) == ("once", ())
    renamed = b'{"question": "Q", "answer": "A", "text": "noise"}'
    (example,) = read_bytes(
        tmp_path, renamed, columns={"prompt": "question", "completion": "answer"}, format="prompt-completion"
    )
    assert turns(example) == QA
    with pytest.raises(DataError, match="'answr', not in the data"):
        read_bytes(tmp_path, renamed, columns={"prompt": "question", "completion": "answr"})


def test_tools(tmp_path: Path) -> None:
    call = {"name": "f", "arguments": {"x": 1}}
    tools = [{"name": "f", "parameters": {"x": None}}]
    row = {
        "conversations": [
            {"from": "human", "value": "Q"},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "7"},
            {"from": "gpt", "value": "A"},
        ],
        "tools": json.dumps(tools),
    }
    (example,) = read_bytes(tmp_path, json.dumps(row).encode())
    assert [message["role"] for message in example.messages] == ["user", "assistant", "tool", "assistant"]
    assert example.messages[1]["tool_calls"] == [{"type": "function", "function": call}]
    assert example.tools == ({"type": "function", "function": tools[0]},)  # the null is the row's own: kept

    openai = json.loads(CHAT_ROW)
    openai["messages"][1] |= {
        "content": None,
        "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"x": 1}'}}],
    }
    (example,) = read_bytes(tmp_path, json.dumps(openai | {"tools": []}).encode())
    assert example.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert example.messages[1]["content"] == "" and example.tools is None


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here")
def test_sharegpt_tool_calls_equal_an_independent_conversion() -> None:
    folder = SHARED / "datasets"
    ours = read(folder / "glaive_toolcall_en_300.sharegpt.json")
    theirs = read(folder / "glaive_toolcall_en_300.messages.jsonl")
    assert len(ours) == len(theirs) == 300
    for mine, other in zip(ours, theirs, strict=True):
        assert turns(mine) == turns(other)
        calls = [
            [call["function"] for m in example.messages for call in m.get("tool_calls", ())]
            for example in (mine, other)
        ]
        assert calls[0] == calls[1]
        assert [tool["function"] for tool in mine.tools or ()] == [tool["function"] for tool in other.tools or ()]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here")
@pytest.mark.parametrize(
    ("name", "count", "settings"),
    [
        ("gsm8k_train.jsonl", 7473, {"columns": {"prompt": "question", "completion": "answer"}}),
        ("alpaca_gpt4_en_1k.jsonl", 999, {}),
        ("roleplay_gpt4_1k.jsonl", 1000, {"columns": {"output": "response"}}),
        ("sharegpt_identity_500.jsonl", 500, {}),
        ("sharegpt_long_1.jsonl", 1, {}),
        ("oasst_multilingual_a.messages.jsonl", 207, {}),
        ("reasoning_tools_a.messages.jsonl", 25, {}),
        ("c4_300.text.jsonl", 300, {}),
    ],
)
def test_real_data_sets_are_read_whole(name: str, count: int, settings: dict[str, Any]) -> None:
    examples = read(SHARED / "datasets" / name, **settings)
    lines = (SHARED / "datasets" / name).read_bytes().split(b"\n")
    assert len(examples) == count == len([line for line in lines if line.strip()])
    assert [example.place.line for example in examples] == [n for n, line in enumerate(lines, 1) if line.strip()]


FAULTS = [  # beyond those of test_bad_inputs.py: content, what is said, where in rows.jsonl
    (b'{"prompt": "a", "completion": -Infinity}\n', "-Infinity is not JSON", ":1"),
    (b'{"prompt": "a\tb", "completion": "c"}\n', "Invalid control character", ":1"),
    (CHAT_ROW.replace('"A"', '[{"type": "text", "words": "A"}]').encode(), "'text' must be text", ":1"),
    (b'{"prompt": "a", "completion": "b"}\n[1, 2]\n', "must be an object, this is list", ":2"),
    (b'{"messages": [{"role": "bot", "content": "a"}]}\n', "unknown role 'bot'", ":1"),
    (b'{"messages": [{"role": ["user"], "content": "a"}]}\n', "unknown role", ":1"),
    (CHAT_ROW.replace('"A"', '"A", "train": "yes"').encode(), "'train' must be true or false", ":1"),
    (b'{"conversations": [{"from": "martian", "value": "a"}]}', "unknown role 'martian'", ":1"),
    (b'{"conversations": [{"by": "user", "content": "a"}]}', "has `from` and `value`", ":1"),
    (b'{"conversations": [{"role": "user", "content": "a"}]}', "no assistant turn", ":1"),
    (b"[" * 99_999, "nested too deeply", ":1"),
    (b'{"prompt": ' + b"[" * 99_999 + b"\n", "nested too deeply", ":1"),
]


@pytest.mark.parametrize(("content", "what", "where"), FAULTS, ids=[what for _, what, _ in FAULTS])
def test_bad_rows_say_what_and_where(tmp_path: Path, content: bytes, what: str, where: str) -> None:
    with pytest.raises(DataError, match=what) as fault:
        read_bytes(tmp_path, content)
    assert fault.value.where == str(tmp_path / "rows.jsonl") + where
    assert fault.value.exit_code == 3


def test_bad_rows_are_dropped_and_counted_or_reported_together(tmp_path: Path) -> None:
    rows = b"\n".join([CHAT_ROW.encode(), b"{", CHAT_ROW.encode(), b'{"messages": 3}', CHAT_ROW.encode()])
    (tmp_path / "rows.jsonl").write_bytes(rows)
    data = DataSettings(train=(str(tmp_path / "rows.jsonl"),), on_bad_row="drop")
    report = Report()
    assert [example.place.line for example in shape(data, report)] == [1, 3, 5]
    assert (report.rows, report.bad_rows) == (5, 2)  # what is no JSON is a row too
    with pytest.raises(ErrorGroup) as several:
        read(tmp_path / "rows.jsonl")
    assert [fault.where for fault in several.value.errors] == [f"{tmp_path}/rows.jsonl:{n}" for n in ("2", "4")]
    with pytest.raises(ErrorGroup) as many:
        read_bytes(tmp_path, CHAT_ROW.encode() + b"\n" + b"{\n" * 99)
    assert str(many.value).endswith("... and at least 80 more")
    assert len(str(many.value).splitlines()) == 20


def test_what_text_files_get_wrong(tmp_path: Path) -> None:
    odd = "a\u2028b\u2029c\u0085d\x0be\x0cf\x00g\u200d👩‍👩‍👧"
    rows = [json.dumps({"prompt": odd, "completion": str(n)}, ensure_ascii=False) for n in range(3)]
    content = b"\xef\xbb\xbf" + "\r\n".join(rows[:2]).encode() + b"\n\n  \n" + rows[2].encode()
    examples = read_bytes(tmp_path, content)
    assert [example.messages[0]["content"] for example in examples] == [odd] * 3
    assert [example.place.line for example in examples] == [1, 2, 5]
    paired = read_bytes(tmp_path, b'{"prompt": "\\ud83d\\ude00", "completion": "b"}')
    assert paired[0].messages[0]["content"] == "😀"


def test_arrays_of_rows(tmp_path: Path) -> None:
    rows = [json.loads(CHAT_ROW) for _ in range(3)]
    examples = read_bytes(tmp_path, json.dumps(rows, indent=1).encode(), "rows.json")
    assert [turns(example) for example in examples] == [QA] * 3
    assert [example.place.line for example in examples] == [1, 2, 3]  # elements
    assert len(read_bytes(tmp_path, json.dumps(rows).encode(), "array.jsonl")) == 3
    assert read_bytes(tmp_path, b" [ ] ", "empty.json") == []
    with pytest.raises(DataError, match=r"cannot read this as \.json") as fault:
        read_bytes(tmp_path, json.dumps(rows, indent=1).encode()[:-2], "cut.json")
    assert fault.value.where is not None and fault.value.where.startswith(f"{tmp_path}/cut.json:")


def test_csv_keeps_text_as_text(tmp_path: Path) -> None:
    content = '\ufeffprompt,completion\n007,NA\n"two\nlines, ""quoted""",1.50\n,x\n'.encode()
    examples = read_bytes(tmp_path, content, "rows.csv")
    assert [turns(example) for example in examples] == [
        [("user", "007"), ("assistant", "NA")],
        [("user", 'two\nlines, "quoted"'), ("assistant", "1.50")],
        [("user", ""), ("assistant", "x")],
    ]
    assert [example.place.line for example in examples] == [2, 3, 5]
    with pytest.raises(DataError, match="3 fields, the header has 2") as fault:
        read_bytes(tmp_path, b"prompt,completion\na,b\na,b,c\n", "rows.csv")
    assert fault.value.where == f"{tmp_path}/rows.csv:3"
    with pytest.raises(DataError, match="utf-8") as fault:
        read_bytes(tmp_path, b"prompt,completion\na,b\na,\xe9\n", "rows.csv")
    assert fault.value.where == f"{tmp_path}/rows.csv:3"


def test_parquet_gives_no_row_the_keys_of_another(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    def row(name: str, argument: str) -> dict[str, Any]:
        tool = {"type": "function", "function": {"name": name, "parameters": {argument: {"type": "string"}}}}
        call = {"function": {"name": name, "arguments": {argument: "x"}}}
        messages = [
            {"role": "user", "content": "Q", "tool_calls": None},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ]
        return {"messages": messages, "tools": [tool]}

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row("f", "a"), row("g", "b")]), tmp_path / "rows.parquet")
    first, second = read(tmp_path / "rows.parquet")
    assert first.tools is not None and list(first.tools[0]["function"]["parameters"]) == ["a"]
    assert second.messages[1]["tool_calls"] == [{"function": {"name": "g", "arguments": {"b": "x"}}}]
    assert "tool_calls" not in first.messages[0] and second.place.line == 2
    with pytest.raises(DataError, match=r"as \.parquet"):
        read_bytes(tmp_path, b"PAR1 nothing", "torn.parquet")


def test_sources(tmp_path: Path) -> None:
    for name, answer in (("b.jsonl", "2"), ("a.json", "1"), ("c.csv", "3")):
        row = {"prompt": "Q", "completion": answer}
        content = json.dumps(row) if name[-1] != "v" else f"prompt,completion\nQ,{answer}\n"
        (tmp_path / name).write_text(content)
    (tmp_path / "notes.md").write_text("no rows")
    assert [example.messages[1]["content"] for example in read(tmp_path)] == ["1", "2", "3"]
    assert [example.messages[1]["content"] for example in read(tmp_path / "*.js*")] == ["1", "2"]
    for path, what in (
        ("missing.jsonl", "no such file"),
        ("*.txt", "no such file"),
        ("notes.md", "unknown kind of file"),
    ):
        with pytest.raises(DataError, match=what):
            read(tmp_path / path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="in this folder"):
        read(tmp_path / "empty")


def numbered(count: int, *, start: int = 0) -> bytes:
    rows = ({"prompt": f"What is {n} + 1?", "completion": str(n + 1)} for n in range(start, start + count))
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def test_held_out_rows_are_chosen_by_content() -> None:
    random = np.random.default_rng(0)
    digests = random.integers(0, 2**64, size=500, dtype=np.uint64)
    repeated = np.concatenate([digests, digests[:100]])
    below = held_out_below(repeated, 0.1)
    assert len(np.unique(repeated[repeated < below])) == 50
    assert held_out_below(random.permutation(repeated), 0.1) == below
    assert (digests < held_out_below(digests, 0.0001)).sum() == 1  # never none
    assert (digests[:2] < held_out_below(digests[:2], 0.5)).sum() == 1
    with pytest.raises(DataError, match="none can be held out"):
        held_out_below(digests[:1], 0.5)


def as_tokens(*pairs: tuple[int, bool]) -> Tokens:
    ids = np.array([token for token, _ in pairs], dtype=np.int32)
    return Tokens(ids, np.where([learned for _, learned in pairs], ids, UNSUPERVISED).astype(np.int32))


@pytest.mark.parametrize("weighted", [(), (9, 10, 17)])
@pytest.mark.parametrize("at_once", [1, 7, 30])
def test_the_store_gives_back_what_was_written(tmp_path: Path, at_once: int, weighted: tuple[int, ...]) -> None:
    random = np.random.default_rng(1)
    examples = []
    for line in range(30):
        sequences = []
        for _ in range(line % 4):  # those without any were dropped
            learned = random.random(int(random.integers(1, 20))) < 0.5
            learned[0] = False
            made = as_tokens(*((int(random.integers(2**31 - 1)), bool(flag)) for flag in learned))
            weights = random.random(len(made)).astype(np.float32) if line in weighted else None
            sequences.append(replace(made, weights=weights))
        examples.append((line, tuple(sequences)))
    for first in range(0, 30, at_once):
        lines, sequences = zip(*examples[first : first + at_once], strict=True)
        each = {"lines": lines, "digests": 7, "sources": 1, "row_weights": [line / 4 for line in lines]}
        append_arrays(tmp_path, **pack_examples(sequences, files=first % 3, **each))
    append_arrays(tmp_path, **pack_examples([], files=0, lines=[], digests=7, sources=1, row_weights=[]))
    append_arrays(tmp_path, held_out=np.arange(30) % 5 == 0)
    store = map_store(tmp_path, ["file0", "file1", "file2"])
    train, held_out = store.split(held_out=False), store.split(held_out=True)
    assert (len(store), len(train), len(held_out)) == (22, 18, 4)
    assert train.count_tokens() + held_out.count_tokens() == len(store.arrays["ids"]) == store.count_tokens()
    for some, chosen in ((store, range(30)), (held_out, range(0, 30, 5))):
        for index, (line, sequences) in enumerate(examples[n] for n in chosen if examples[n][1]):
            assert some.place(index) == RowLocation(f"file{line // at_once * at_once % 3}", line)
            assert example_lengths(some)[index] == max(map(len, sequences))
            for mine, written in zip(some.sequences(index), sequences, strict=True):
                assert mine.ids.dtype == mine.labels.dtype == np.int32
                assert (mine.ids == written.ids).all() and (mine.labels == written.labels).all()
                weights, learned = written.weights, written.labels != UNSUPERVISED
                plain = weights is None or not learned.any()
                assert mine.row_weight == line / 4 and (mine.weights is None) == plain
                assert plain or (mine.weights.dtype == np.float32 and (mine.weights == learned * weights).all())


def test_prepare_splits_counts_and_reuses(tmp_path: Path, tiny: Any) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(numbered(50) + numbered(5))
    data = DataSettings(train=(str(rows),), eval=0.1)
    first = prepare(data, ChatSettings(), tokenizer=tiny, folder=tmp_path / "cache")
    report, held_out = first.report, first.held_out
    assert held_out is not None
    assert (report.rows, report.train_examples + report.held_out_examples) == (55, 55)
    assert (len(first.train), len(held_out)) == (report.train_examples, report.held_out_examples)
    decoded = [{tiny.decode(store.sequences(n)[0].ids) for n in range(len(store))} for store in (first.train, held_out)]
    assert len(decoded[0]) == 45 and len(decoded[1]) == 5 and not decoded[0] & decoded[1]
    for index in range(len(held_out)):
        line = rows.read_text().split("\n")[held_out.place(index).line - 1]
        assert json.loads(line)["prompt"] in tiny.decode(held_out.sequences(index)[0].ids)

    (folder,) = (tmp_path / "cache").iterdir()
    before = (folder / "manifest.json").stat().st_ino
    again = prepare(data, ChatSettings(), tokenizer=tiny, folder=tmp_path / "cache")
    assert (again.key, again.report) == (first.key, report)
    assert (folder / "manifest.json").stat().st_ino == before  # opened, not made again
    written = first.store.arrays["ids"].copy()
    ids = folder / "ids"
    ids.write_bytes(ids.read_bytes()[:-4])
    with pytest.raises(ModelError):
        open_prepared(folder)
    mended = prepare(data, ChatSettings(), tokenizer=tiny, folder=tmp_path / "cache")
    assert (mended.store.arrays["ids"] == written).all()


def test_rows_are_parsed_once_and_split_by_their_content_alone(
    tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the kind of file, nor lines, nor what is dropped for its length moves a row to the other side."""
    lines = numbered(40).decode().splitlines()
    lines += [json.dumps({"prompt": "long" * 50, "completion": str(n)}) for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    (tmp_path / "rows.json").write_text(json.dumps([json.loads(line) for line in lines]))  # on one line
    plain, parsed = sources.parse_strict, []
    monkeypatch.setattr(sources, "parse_strict", lambda text: parsed.append(text) or plain(text))

    def held_out(name: str, **settings: Any) -> set[int]:
        data = DataSettings(train=(str(tmp_path / name),), eval=0.3, max_dropped=1.0, **settings)
        store = prepare(data, ChatSettings(), tokenizer=tiny, folder=tmp_path / "cache").held_out
        assert store is not None
        return {store.place(example).line for example in range(len(store))}

    whole = held_out("rows.jsonl")
    assert len(parsed) == 60 and len(whole) == 18 and whole & set(range(41, 61))
    assert held_out("rows.json") == whole and len(parsed) == 60
    assert held_out("rows.jsonl", max_length=100) == {line for line in whole if line <= 40}


def test_every_ingredient_changes_the_key(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, template = tmp_path / "rows.jsonl", tmp_path / "own.jinja"
    bare = save_tokenizer(tmp_path / "other", bos=False)

    def key(content: bytes = numbered(3), text: str = TEMPLATE, folder: Path = tokenizer_folder, **more: Any) -> str:
        rows.write_bytes(content)
        template.write_text(text)
        data = {name: more.pop(name) for name in ("max_length", "overlong") if name in more}
        chat = ChatFormat(load_tokenizer(str(folder)), ChatSettings(template=str(template), **more))
        return json.dumps(list_ingredients(DataSettings(train=(str(rows),), **data), chat))

    keys = [key(), key(max_length=77), key(overlong="truncate"), key(system="S"), key(supervise="last")]
    keys += [key(template_date=datetime.date(2025, 1, 1)), key(template_options={"a": 1}), key(folder=bare)]
    keys += [key(text=TEMPLATE + "{% if tools %}{{ tools }}{% endif %}"), key(numbered(3, start=1))]
    with monkeypatch.context() as patch:
        patch.setattr("lorasft.data.prepare.SCHEMA", 0)
        keys.append(key())
    assert key() == keys[0] and len(set(keys)) == len(keys)


def test_counts_that_a_recipe_does_not_allow(tmp_path: Path, tiny: Any) -> None:
    rows, copy = tmp_path / "rows.jsonl", tmp_path / "copy.jsonl"
    rows.write_bytes(numbered(20))
    copy.write_bytes(numbered(4, start=18))

    def made(**settings: Any) -> Any:
        data = DataSettings(train=(str(rows),), **settings)
        return prepare(data, ChatSettings(), tokenizer=tiny, folder=tmp_path / "cache")

    with pytest.raises(DataError, match=r"20 rows read, 20 dropped \(0 bad, 20 over-long") as fault:
        made(max_length=8)
    assert "tokens, over data.max_length (8)" in str(fault.value.hint) and "data.max_dropped 0.05" in str(
        fault.value.hint
    )
    with pytest.raises(DataError, match="none left"):
        made(max_length=8, max_dropped=1.0)
    with pytest.raises(DataError, match=r"2 rows of data\.eval are in data\.train"):
        made(eval=(str(copy),))
    assert made(eval=None).held_out is None
    rows.write_bytes(b"\n \n")
    with pytest.raises(DataError, match=r"no rows read, 0 dropped \(.*\): none left") as fault:
        made()
    assert fault.value.hint == "are the files empty, or all their rows blank or of weight 0?"
    with pytest.raises(DataError, match=r"4 rows read, 0 dropped \(.*\), 4 held out: none left") as fault:
        made(eval=(str(copy),))
    assert (
        fault.value.where == str(rows)
        and fault.value.hint == "are the files empty, or all their rows blank or of weight 0?"
    )
    assert not list((tmp_path / "cache").glob(".stage-*"))
    rows.write_bytes(numbered(20) + b'{"prompt": "a <|end|>", "completion": "b"}\n')
    with pytest.raises(LorasftError, match="control token"):
        made()
    dropped = made(on_bad_row="drop", eval=None)
    assert (dropped.report.bad_rows, len(dropped.train)) == (1, 20)


def test_data_sets_of_the_hub_go_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is out of reach here; its library reads a folder the same way. Nulls of Arrow are dropped."""
    import datasets

    monkeypatch.setattr("lorasft.data.examples.find_files", lambda _: ((), ()))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "org" / "set"
    folder.mkdir(parents=True)
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "extra": {"x": 1}},
        {"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}], "extra": {"y": 2}},
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = DataSource(path=str(folder))
    (block,) = read_blocks(source, DataSettings(train=(source,)))
    assert block.rows == list(enumerate(rows, start=1)) and block.kind == "chat" and not block.error
