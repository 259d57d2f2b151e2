"""Keys of rows, messages and turns: honoured, refused by row, or named as not read; never dropped without a word."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Command
from test_chat import SHARED, learned_text, make_encoder, needs_shared, own
from test_data import read, turns

from lorasft.data import keys
from lorasft.data.examples import Example
from lorasft.data.prepare import Prepared, prepare
from lorasft.data.tokenizer import load_tokenizer
from lorasft.errors import DataError, ModelError
from lorasft.model.scoring import read_answers
from lorasft.recipe import ChatSettings, DataSettings, DataSource

Q, A = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
CHAT: dict[str, Any] = {"messages": [Q, A]}
TURNS: dict[str, Any] = {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
ALPACA = {"instruction": "Q", "output": "A"}
PAIR = {"prompt": "Q", "completion": "A"}
LISTS: dict[str, Any] = {"prompt": [Q], "completion": [A]}
FORMATS = [CHAT, TURNS, ALPACA, PAIR, LISTS]
TOOL = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}


def read_row(folder: Path, row: dict[str, Any], **settings: Any) -> Example:
    (example,) = read(write(folder, [row]), **settings)
    return example


def write(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> Path:
    """The rows as JSONL, as CSV with JSON in its cells, or as Parquet, in which every row has all keys."""
    path = folder / name
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        import csv

        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(
                {key: cell if isinstance(cell, str) else json.dumps(cell) for key, cell in row.items()} for row in rows
            )
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make(folder: Path, tokenizer: Any, rows: list[dict[str, Any]], name: str = "rows.jsonl", **data: Any) -> Prepared:
    chat = ChatSettings(**data.pop("chat", {}))
    settings = DataSettings(**{"train": (str(write(folder, rows, name)),), "eval": None, **data})
    return prepare(settings, chat, tokenizer=tokenizer, folder=folder / "cache", workers=1)


def learned(folder: Path, tokenizer: Any, row: dict[str, Any], **data: Any) -> list[str]:
    """What is learned of one row, without ends of turns."""
    (sequences,) = [made.sequences(0) for made in [make(folder, tokenizer, [row], **data).train]]
    return [text.removesuffix("<|end|>") for tokens in sequences for text in learned_text(tokenizer, tokens)]


# --- flags of turns

NOT_LEARNED = [
    ("weight", 0), ("weight", 0.0), ("weight", "0"), ("loss", False), ("loss_weight", 0), ("loss_scale", 0.0),
    ("loss_mask", 0), ("training", False), ("trainable", False), ("train_on_turn", "False"), ("masked", True),
    ("train", False), ("train", "false"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), NOT_LEARNED)
@pytest.mark.parametrize("supervise", ["all", "flagged"])
def test_a_turn_that_is_not_to_be_learned_is_context(
    tmp_path: Path, tiny: Any, key: str, value: Any, supervise: str
) -> None:
    chat = {"supervise": supervise}
    row = {"messages": [Q, A | {"content": "BAD", key: value}, Q, A | {"content": "GOOD"}]}
    assert learned(tmp_path, tiny, row, chat=chat) == ["GOOD"]
    said = [{"from": "gpt" if one["role"] != "user" else "human", "value": one["content"]} for one in row["messages"]]
    said[1][key] = value
    assert learned(tmp_path, tiny, {"conversations": said}, chat=chat) == ["GOOD"]
    with pytest.raises(DataError, match="not to be learned, under supervise: everything"):
        learned(tmp_path, tiny, row, chat={"supervise": "everything"})
    with pytest.raises(DataError, match="1 with nothing to supervise"):
        learned(tmp_path, tiny, {"messages": row["messages"][:2]}, chat=chat)


def test_flags_that_choose_a_turn(tmp_path: Path, tiny: Any) -> None:
    for key, expected in (("train", ["X"]), ("training", ["X"]), ("weight", ["A", "X"]), ("loss", ["A", "X"])):
        row = {"messages": [Q, A, Q, A | {"content": "X", key: True}]}
        assert learned(tmp_path, tiny, row, chat={"supervise": "flagged"}) == expected
        assert learned(tmp_path, tiny, row) == ["A", "X"]


@pytest.mark.parametrize(
    ("message", "what"),
    [
        ({"weight": -0.5}, "'weight' is -0.5"),
        ({"weight": "nan"}, "'weight' is nan"),
        ({"weight": "heavy"}, r"'weight' must be 0, or a number from 1e-09 to 1e\+09, this is str"),
        ({"weight": [1]}, r"'weight' must be 0, or a number from 1e-09 to 1e\+09, this is list"),
        ({"loss_scale": 0.5}, "'loss_scale' is 0.5, a weight other than 0 and 1"),
        ({"loss_weight": -1}, "'loss_weight' is -1"),
        ({"loss_mask": [0, 1]}, "'loss_mask' must be true or false, this is list"),
        ({"loss": "yes"}, "'loss' must be true or false"),
        ({"mask": 0}, "'mask' says what is learned in a way that is not read"),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}, "'train_detail' says"),
        ({"content": [{"type": "text", "text": "A", "weight": 0}]}, "part that is not to be learned"),
        ({"content": [{"type": "text", "text": "A", "weight": 2}]}, "part that has a weight of its own"),
        ({"images": ["a.png"]}, "'images' beside the text"),
        ({"audio": {"id": "x"}}, "'audio' beside the text"),
    ],
)
def test_what_a_turn_says_and_cannot_be_honoured_is_refused_by_row(
    tmp_path: Path, message: dict[str, Any], what: str
) -> None:
    with pytest.raises(DataError, match=what) as refused:
        read_row(tmp_path, {"messages": [Q, A | message]})
    assert refused.value.hint and refused.value.where == f"{tmp_path}/rows.jsonl:1"


# --- what says nothing

ROW_KEYS: dict[str, Any] = {
    "system": "", "tools": [], "functions": None, "history": [], "images": [], "image": None, "audio": "",
    "videos": [None], "chosen": None, "rejected": "", "documents": [], "label": None,
    "chat_template_kwargs": {"enable_thinking": None},
    "enable_thinking": None, "kto_tag": None, "function_call": None, "objects": {"ref": [], "bbox": []},
}  # fmt: skip
MESSAGE_KEYS: dict[str, Any] = {
    "weight": 1, "loss": True, "loss_weight": 1.0, "loss_mask": "1", "masked": False, "mask": None, "name": None,
    "tool_calls": [], "function_call": None, "refusal": None, "audio": None, "annotations": [], "images": [],
    "tool_call_id": "", "train_detail": [], "reasoning_content": "", "thinking": None, "train": None,
}  # fmt: skip


def with_nothing(row: dict[str, Any]) -> dict[str, Any]:
    """The row with every optional key of the field, none of which says anything."""
    lists = {key: [MESSAGE_KEYS | one for one in value] for key, value in row.items() if is_talk(value)}
    return ROW_KEYS | row | lists


def is_talk(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, dict) and one.keys() & {"role", "from"} for one in value)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("row", FORMATS, ids=lambda row: "-".join(row))
def test_keys_that_say_nothing_change_nothing(tmp_path: Path, tiny: Any, row: dict[str, Any], kind: str) -> None:
    plain, full = (make(tmp_path, tiny, [one, one], f"{n}.{kind}") for n, one in enumerate((row, with_nothing(row))))
    check_equal(plain, full)
    assert not full.report.unread and full.report.answers == 2


def check_equal(one: Prepared, other: Prepared) -> None:
    for name in ("ids", "weights", "digests", "held_out", "example_sizes"):
        assert one.store.arrays[name].tolist() == other.store.arrays[name].tolist(), name


SETS = ["oasst_en_a.messages.jsonl", "sharegpt_identity_500.jsonl", "alpaca_2k.jsonl"]
CALLS = "reasoning_inline_think_a.messages.jsonl"  # whose objects Parquet would give the keys of all


@needs_shared
@pytest.mark.parametrize(
    ("name", "kind"), [*((name, kind) for name in SETS for kind in ("jsonl", "parquet")), (CALLS, "jsonl")]
)
def test_real_rows_with_keys_that_say_nothing_are_the_same(tmp_path: Path, name: str, kind: str) -> None:
    lines = (SHARED / "datasets" / name).read_bytes().split(b"\n")[:40]
    rows = [json.loads(line) for line in lines if line]
    tokenizer = load_tokenizer(str(SHARED / "tokenizers/qwen3"))
    settings: dict[str, Any] = {"eval": 0.1, "max_length": 9999, "on_bad_row": "drop", "max_dropped": 0.2}
    plain = make(tmp_path, tokenizer, rows, "plain.jsonl", **settings)
    full = make(tmp_path, tokenizer, list(map(with_nothing, rows)), f"full.{kind}", **settings)
    check_equal(plain, full)


# --- what is read, and what is named


def test_what_nothing_reads_is_named_once(tmp_path: Path, tiny: Any, cli: Command) -> None:
    rows = [
        {"messages": [Q | {"speaker": "x"}, A | {"id": 3, "weight": 1}], "score": 0.5, "weight": 0.3, "label": False},
        {"messages": [Q, {"role": "assistant", "content": [{"type": "text", "text": "B", "cache_control": {"a": 1}}]}],
         "score": 2, "loss": 1.5, "source": "\x1b[31m"},
        {"messages": [Q, A | {"content": "C"}], "source": "\ud83d"},
    ]  # fmt: skip
    named = "label, messages.id, messages.speaker, score, content.cache_control, loss, source"
    made = make(tmp_path, tiny, rows)
    assert list(made.report.notices()) == [f"columns not read: {named}"] and made.report.answers == 3
    assert json.loads((made.folder / "prepared.json").read_bytes())["report"]["unread"] == named.split(", ")
    words = (f"model.base={tiny.name_or_path}", f"data.train={tmp_path}/rows.jsonl", "data.eval=null")
    (tmp_path / "r.yaml").write_text("model: {base: x}\n")
    assert f"columns not read: {named}\n" in cli("preview", tmp_path / "r.yaml", *words).out
    summary = json.loads(cli("preview", tmp_path / "r.yaml", "--json", *words).out.splitlines()[-1])
    assert summary["summary"]["unread"] == named.split(", ")


def test_a_key_of_messages_that_the_template_reads_is_not_named(tmp_path: Path, tiny: Any) -> None:
    tiny.chat_template = tiny.chat_template.replace("m.content", "m.content ~ m.mood")
    made = make(tmp_path, tiny, [{"messages": [Q | {"mood": "!", "name": "Bo"}, A | {"mode": 1}]}])
    assert made.report.unread == ["messages.mode", "messages.name"] and "Q!" in tiny.decode(made.store.arrays["ids"])


@pytest.mark.parametrize("row", FORMATS, ids=lambda row: "-".join(row))
def test_a_system_column_is_the_system_message(tmp_path: Path, row: dict[str, Any]) -> None:
    expected = [("system", "S"), ("user", "Q"), ("assistant", "A")]
    assert turns(read_row(tmp_path, row | {"system": "S"})) == expected
    assert turns(read_row(tmp_path, row | {"system": [{"text": "S"}]})) == expected  # Bedrock
    mapped = {name: name for name in row} | {"system": "about"}
    assert turns(read_row(tmp_path, row | {"about": "S"}, columns=mapped)) == expected


def test_a_system_column_beside_a_system_message(tmp_path: Path, tiny: Any) -> None:
    row = {"messages": [{"role": "system", "content": "S"}, Q, A], "system": "S"}
    assert turns(read_row(tmp_path, row)) == [("system", "S"), ("user", "Q"), ("assistant", "A")]
    row["system"] = "T"
    made = make(tmp_path, tiny, [row])
    assert made.report.unread == ["system"] and "T" not in tiny.decode(made.store.arrays["ids"])
    mapped = read_row(tmp_path, row, columns={"messages": "messages", "system": "system"})
    assert turns(mapped)[:2] == [("system", "T"), ("system", "S")]  # the recipe asks for it


def test_a_mapping_that_no_format_reads_is_refused(tmp_path: Path) -> None:
    for columns, row in (
        ({"text": "t", "system": "s"}, {"t": "x", "s": "y"}),
        ({"prompt": "prompt", "image": "i"}, PAIR | {"i": 1}),
    ):
        with pytest.raises(DataError, match=r"which format .* does not read"):
            read_row(tmp_path, row, columns=columns)


READINGS: list[tuple[dict[str, Any], dict[str, str]]] = [  # rows that fit no format -> what data.columns would say
    ({"question": "Q", "answer": "A", "id": 3}, {"prompt": "question", "completion": "answer"}),
    ({"query": "Q", "response": "A"}, {"prompt": "query", "completion": "response"}),
    ({"instruction": "Q", "response": "A"}, {"prompt": "instruction", "completion": "response"}),
    ({"input": "Q", "output": "A"}, {"prompt": "input", "completion": "output"}),
    ({"prompt": "Q", "response": "A"}, {"prompt": "prompt", "completion": "response"}),
    ({"user": "Q", "assistant": "A"}, {"prompt": "user", "completion": "assistant"}),
    ({"human": "Q", "bot": "A"}, {"prompt": "human", "completion": "bot"}),
    ({" Question ": "Q", "ANSWER": "A"}, {"prompt": " Question ", "completion": "ANSWER"}),
    (
        {"question": "Q", "answer": "A", "System_Prompt": "S"},
        {"prompt": "question", "completion": "answer", "system": "System_Prompt"},
    ),
    ({"question": "Q", "answer": "A", "system": "S"}, {"prompt": "question", "completion": "answer"}),
    (
        {"instruction": "Q", "input": "I", "response": "A"},
        {"instruction": "instruction", "output": "response", "input": "input"},
    ),
    (
        {"instruction": "Q", "context": "I", "response": "A", "category": "x"},
        {"instruction": "instruction", "output": "response", "input": "context"},
    ),
    ({"question": "Q", "answer": "A", "context": {"title": ["t"]}}, {"prompt": "question", "completion": "answer"}),
    ({"dialogue": TURNS["conversations"]}, {"conversations": "dialogue"}),
    ({"Dialog": json.dumps(CHAT["messages"])}, {"conversations": "Dialog"}),
    ({"conversation": [{"role": "human", "content": "Q"}, {"role": "bot", "content": "A"}], "answer_id": 1},
     {"conversations": "conversation"}),
    ({"Messages": CHAT["messages"]}, {"messages": "Messages"}),
]  # fmt: skip


@pytest.mark.parametrize(("row", "columns"), READINGS, ids=lambda value: "-".join(map(str.strip, value)))
def test_columns_of_other_names_are_read_as_if_the_recipe_named_them(
    tmp_path: Path, tiny: Any, row: dict[str, Any], columns: dict[str, str]
) -> None:
    rows = [json.loads(re.sub(r'Q(?=\\?")', f"Q{n}", json.dumps(row))) for n in range(3)]
    guessed, stated = make(tmp_path, tiny, rows), make(tmp_path, tiny, rows, columns=columns)
    for name in ("ids", "weights", "digests", "held_out"):
        left, right = (prepared.store.arrays[name].tolist() for prepared in (guessed, stated))
        assert left == right and left, name
    words = f"columns {', '.join(columns.values())} are read as {', '.join(columns)} (data.columns says otherwise)"
    assert next(guessed.report.notices()) == words and not stated.report.read_as
    assert guessed.report.unread == stated.report.unread
    record = json.loads((guessed.folder / "prepared.json").read_bytes())
    assert record["report"]["read_as"] == guessed.report.read_as


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "Q", "input": "I", "answer": "A"}, "here question or input could be the question"),
        ({"question": "Q", "answer": "A", "response": "B"}, "answer or response could be the answer"),
        ({"question": "Q", "Question": "P", "answer": "A"}, "map them with data.columns"),
        ({"dialogue": TURNS["conversations"], "answer": "A"}, "dialogue could be the conversation"),
        ({"dialog": ["Q", "A"]}, "map them with data.columns"),
        ({"question": "Q", "solution": "A"}, "question could be the question"),
        ({"question": "Q", "answer": "A", "chosen": "A", "rejected": "B"}, "learns the better answers"),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused_with_both(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match="no known format") as refused:
        read_row(tmp_path, row)
    assert said in str(refused.value.hint)


def test_each_file_is_read_by_its_own_names_and_a_format_before_them(tmp_path: Path, tiny: Any, cli: Command) -> None:
    write(tmp_path, [{"question": f"Q{n}", "answer": "A"} for n in range(3)], "a.csv")
    write(tmp_path, [{"Query": f"P{n}", "Reply": "x", "response": "A"} for n in range(3)], "b.jsonl")
    write(tmp_path, [PAIR | {"question": "?", "answer": "!"}], "c.jsonl")
    prepared = prepare(
        DataSettings(train=(str(tmp_path),), eval=None), ChatSettings(), tokenizer=tiny, folder=tmp_path / "cache"
    )
    said = ["question, answer are read as prompt, completion", "Query, response are read as prompt, completion"]
    assert prepared.report.read_as == said and prepared.report.unread == ["Reply", "answer", "question"]
    assert prepared.report.rows == 7
    source = DataSource(path=str(tmp_path / "a.csv"))  # evaluated by a run whose rows had other names
    learned = DataSettings(train=(source,), columns={"prompt": "q", "completion": "a"})
    answers, scored = read_answers(source, learned, ChatSettings(), tokenizer=tiny)
    assert len(answers) == 3 and scored.report.read_as == said[:1]


def test_two_texts_of_a_turn_and_a_call_without_its_wrapper(tmp_path: Path, tiny: Any) -> None:
    turn = {"from": "human", "value": "Q", "content": "other"}
    made = make(tmp_path, tiny, [{"conversations": [turn, {"from": "gpt", "value": "A"}]}])
    assert made.report.unread == ["conversations.content"]
    example = read_row(tmp_path, {"conversations": [{"from": None, "role": "user", "value": None, "content": "Q"}, A]})
    assert turns(example) == [("user", "Q"), ("assistant", "A")]
    call = {"name": "f", "arguments": {"x": 1}}
    example = read_row(tmp_path, {"messages": [Q, {"role": "assistant", "tool_calls": [call]}]})
    assert example.messages[1]["tool_calls"] == [{"type": "function", "function": call}]


def test_history_is_before_the_question(tmp_path: Path) -> None:
    history = [["q1", "a1"], ["q2", "a2"]]
    expected = [
        ("user", "q1"),
        ("assistant", "a1"),
        ("user", "q2"),
        ("assistant", "a2"),
        ("user", "Q"),
        ("assistant", "A"),
    ]
    for row in (ALPACA, PAIR):
        assert turns(read_row(tmp_path, row | {"history": history})) == expected
        assert turns(read_row(tmp_path, row | {"history": json.dumps(history), "system": "S"}))[1:] == expected
        with pytest.raises(DataError, match="list of pairs"):
            read_row(tmp_path, row | {"history": [["q1"]]})


def test_calls_and_schemas_as_openai_first_had_them(tmp_path: Path) -> None:
    call = {"name": "f", "arguments": '{"x": 1}'}
    messages = [Q, {"role": "assistant", "content": None, "function_call": call},
                {"role": "function", "name": "f", "content": "7"}, A]  # fmt: skip
    example = read_row(tmp_path, {"messages": messages, "functions": [TOOL]})
    (found,) = example.messages[1]["tool_calls"]
    assert found == {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert example.messages[2] == {"role": "tool", "name": "f", "content": "7"}
    assert example.tools == ({"type": "function", "function": TOOL},)
    assert "function_call" not in example.messages[1]


@pytest.mark.parametrize("row", FORMATS, ids=lambda row: "-".join(row))
@pytest.mark.parametrize("key", ["images", "image", "audio", "videos"])
def test_rows_with_media_are_refused(tmp_path: Path, row: dict[str, Any], key: str) -> None:
    for value in (["a.png"], "a.png", {"bytes": "x"}):
        with pytest.raises(DataError, match=f"'{key}' beside the text") as refused:
            read_row(tmp_path, row | {key: value})
        assert "only text" in str(refused.value.hint)
    assert read_row(tmp_path, {"text": "a page", key: "a.png"}).text == "a page"  # all that is learned is there


def test_only_the_completion_is_learned(tmp_path: Path, tiny: Any) -> None:
    prompt = [Q, A | {"content": "CONTEXT"}, Q]
    row = {"prompt": prompt, "completion": [A, Q, A | {"content": "B"}], "system": "S"}
    for supervise, expected in (("all", ["A", "B"]), ("last", ["B"]), ("flagged", ["A", "B"])):
        assert learned(tmp_path, tiny, row, chat={"supervise": supervise, "system": "T"}) == expected
    assert "CONTEXT" in learned(tmp_path, tiny, row, chat={"supervise": "everything"})[0]
    with pytest.raises(DataError, match="1 with nothing to supervise"):
        make(tmp_path, tiny, [{"prompt": [Q, A], "completion": [Q]}])


# --- preference sets

PREFERENCES = [
    {"prompt": "Q", "chosen": "A", "rejected": "B"},
    {"chosen": [Q, A], "rejected": [Q, A]},
    {"conversations": TURNS["conversations"] + TURNS["conversations"][:1], "chosen": {"from": "gpt", "value": "A"},
     "rejected": {"from": "gpt", "value": "B"}},
    {"messages": [Q, A, Q], "chosen": A, "rejected": A | {"content": "B"}},
    ALPACA | {"chosen": "A", "rejected": "B"},
]  # fmt: skip


@pytest.mark.parametrize("row", PREFERENCES, ids=lambda row: "-".join(row))
def test_pairs_of_a_better_and_a_worse_answer_are_refused(tmp_path: Path, row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"preference pair|no known format") as refused:
        read_row(tmp_path, row)
    assert "'data.columns={completion: chosen}'" in str(refused.value.hint)


def test_the_better_answers_are_learned_where_the_recipe_or_the_set_says_so(tmp_path: Path, tiny: Any) -> None:
    made = make(tmp_path, tiny, PREFERENCES[:1], columns={"completion": "chosen"})
    assert made.report.unread == ["rejected"] and made.report.answers == 1
    made = make(tmp_path, tiny, [PAIR | PREFERENCES[0]], columns={"completion": "chosen"})
    assert made.report.unread == ["completion", "rejected"]  # the row's own, which the mapping replaces
    made = make(tmp_path, tiny, PREFERENCES[1:2], columns={"messages": "chosen"})
    assert made.report.unread == ["rejected"] and made.report.answers == 1
    both = {"messages": [Q, A], "chosen": [Q, A], "rejected": [Q, A | {"content": "B"}], "score_chosen": 9}
    assert make(tmp_path, tiny, [both]).report.unread == ["chosen", "rejected", "score_chosen"]


@pytest.mark.parametrize(
    ("key", "row", "labels", "name"),
    [
        ("label", PAIR, (True, False), "rows.jsonl"),
        ("label", LISTS, (False, True), "rows.parquet"),
        ("label", PAIR, ("True", "False"), "rows.csv"),
        ("kto_tag", ALPACA, (True, False), "rows.jsonl"),
        ("kto_tag", TURNS, (False, True), "rows.jsonl"),
    ],
)
def test_answers_labelled_good_and_bad(
    tmp_path: Path, tiny: Any, key: str, row: dict[str, Any], labels: tuple[Any, Any], name: str
) -> None:
    place = f"{tmp_path}/{name}:{[str(label).lower() for label in labels].index('false') + 1 + (name[-3:] == 'csv')}"
    with pytest.raises(DataError, match="labelled false") as refused:
        make(tmp_path, tiny, [row | {key: label} for label in labels], name)
    assert refused.value.where == place
    one_sided = make(tmp_path, tiny, [row | {key: labels[0]}] * 2, name)
    assert one_sided.report.unread == [key] and one_sided.report.answers == 2


def test_the_hint_for_pairs_can_be_followed(tmp_path: Path) -> None:
    better = [("user", "Q"), ("assistant", "A")]
    pair = {"chosen": "A", "rejected": "B"}
    assert turns(read_row(tmp_path, {"prompt": "Q"} | pair, columns={"completion": "chosen"})) == better
    assert turns(read_row(tmp_path, {"instruction": "Q"} | pair, columns={"output": "chosen"})) == better
    talk = {"prompt": "Q", "chosen": [Q, A], "rejected": [Q, A]}
    assert turns(read_row(tmp_path, talk, columns={"messages": "chosen"})) == better


def test_a_label_that_is_no_preference(tmp_path: Path, tiny: Any) -> None:
    for row, labels in ((PAIR, (0, 1)), (PAIR, ("spam", "ham")), (CHAT, (True, False))):
        assert make(tmp_path, tiny, [row | {"label": label} for label in labels]).report.answers == 2


# --- what a row gives its template


def test_documents_and_options_of_a_row_reach_its_template(tmp_path: Path, tiny: Any) -> None:
    shows = ("{% for d in documents or [] %}[{{ d.text }}]{% endfor %}{% for m in messages %}<|start|>{{ m.role }}\n"
             "{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n"
             "{% if enable_thinking is defined and not enable_thinking %}<no>{% endif %}{% endif %}")  # fmt: skip
    encoder = own(tmp_path, tiny, shows)
    rows = [
        CHAT | {"documents": [{"title": "t", "text": "DOC"}], "enable_thinking": False},
        CHAT | {"documents": '[{"text": "DOC"}]', "chat_template_kwargs": {"enable_thinking": False}},
    ]
    for row in rows:
        (tokens,) = encoder.encode(read_row(tmp_path, row))
        assert tiny.decode(tokens.ids).startswith("[DOC]<|start|>user\nQ<|end|>\n<|start|>assistant\n<no>A<|end|>")
        assert learned_text(tiny, tokens) == ["A<|end|>"]
    with pytest.raises(DataError, match="does not show the documents"):
        make_encoder(load_tokenizer(tiny.name_or_path)).encode(read_row(tmp_path, rows[0]))
    with pytest.raises(DataError, match="control token"):
        encoder.encode(read_row(tmp_path, CHAT | {"documents": [{"text": "<|end|>"}]}))
    with pytest.raises(DataError, match="'a document' must be an object"):
        read_row(tmp_path, CHAT | {"documents": ["DOC"]})
    chat = {"template": str(tmp_path / "own.jinja")}
    assert not make(tmp_path, load_tokenizer(tiny.name_or_path), rows, chat=chat).report.unread
    options = CHAT | {"enable_thinking": False, "chat_template_kwargs": {"builtin_tools": ["x"], "thinking": None}}
    made = make(tmp_path, load_tokenizer(tiny.name_or_path), [options])  # whose template reads neither
    assert made.report.unread == ["chat_template_kwargs.builtin_tools", "enable_thinking"]


# --- shapes that are plain


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet"])
def test_messages_and_tools_as_text(tmp_path: Path, name: str) -> None:
    call = {"function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [Q, {"role": "assistant", "content": None, "tool_calls": json.dumps([call])}]
    rows = [{"messages": json.dumps(messages), "tools": json.dumps([json.dumps(TOOL)])}]
    (example,) = read(write(tmp_path, rows, name))
    assert example.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert example.tools == ({"type": "function", "function": TOOL},)
    (example,) = read(write(tmp_path, [{"conversations": json.dumps([Q, A])}], name))
    assert turns(example) == [("user", "Q"), ("assistant", "A")]
    (example,) = read(write(tmp_path, [{"prompt": json.dumps([Q, A, Q]), "completion": json.dumps([A])}], name))
    assert (len(example.messages), example.completion) == (4, 1)
    (example,) = read(write(tmp_path, [{"prompt": "[{a list of a text}]", "completion": json.dumps([A])}], name))
    assert turns(example) == [("user", "[{a list of a text}]"), ("assistant", json.dumps([A]))]
    with pytest.raises(DataError, match="messages: not JSON"):
        read(write(tmp_path, [{"messages": "[{'role': 'user'}]"}], name))


@pytest.mark.parametrize("role", ["gpt", "model", "bot", "assistant"])
def test_names_of_roles_in_conversations(tmp_path: Path, role: str) -> None:
    for names in (("from", "value"), ("role", "content"), ("from", "content"), ("role", "value")):
        said = [
            dict(zip(names, one, strict=True)) for one in (("human", "Q"), (role, "A"), ("ipython", "7"), (role, "B"))
        ]
        expected = [("user", "Q"), ("assistant", "A"), ("tool", "7"), ("assistant", "B")]
        assert turns(read_row(tmp_path, {"conversations": said})) == expected
    with pytest.raises(DataError, match="unknown role 'Assistant'"):
        read_row(tmp_path, {"conversations": [{"from": "Assistant", "value": "A"}]})
    said = [{"role": "human", "content": "Q"}, {"role": "model", "content": "A"}]
    with pytest.raises(DataError, match="unknown role 'human'"):
        read_row(tmp_path, {"messages": said})
    follows = read_row(tmp_path, {"messages": said}, format="sharegpt", columns={"conversations": "messages"})
    assert turns(follows) == [("user", "Q"), ("assistant", "A")]  # as the hint says


@pytest.mark.parametrize("content", [7, 1.5, True])
def test_content_that_is_no_text_is_refused(tmp_path: Path, content: Any) -> None:
    with pytest.raises(DataError, match="'content' must be text"):
        read_row(tmp_path, {"messages": [Q, A | {"content": content}]})
    with pytest.raises(DataError, match="'completion' must be text"):
        read_row(tmp_path, PAIR | {"completion": content})


def test_text_is_kept_as_it_was_written(tmp_path: Path, tiny: Any) -> None:
    for text in ("caf\u00e9", "cafe\u0301", "\ufeffA", "a\ufeffb", "\\n", "007", "NA"):
        assert turns(read_row(tmp_path, PAIR | {"completion": text})) == [("user", "Q"), ("assistant", text)]
        assert learned(tmp_path, tiny, PAIR | {"completion": text}) == [text]
    with pytest.raises(DataError, match=r"control token <s>"):  # templated already: it would begin twice
        make(tmp_path, tiny, [{"text": "<s><|start|>user\nQ<|end|>"}])


# --- rows that are bad


def test_a_first_row_without_a_mapped_column_is_a_bad_row_like_others(tmp_path: Path, tiny: Any) -> None:
    rows = [{"question": "Q"}, {"foo": 1}, *({"question": f"Q{n}", "answer": "A"} for n in range(40))]
    columns = {"prompt": "question", "completion": "answer"}
    made = make(tmp_path, tiny, rows, columns=columns, on_bad_row="drop")
    assert (made.report.train_examples, made.report.bad_rows) == (40, 2)
    assert made.report.dropped[0].endswith("rows.jsonl:1: no 'completion' in this row of format prompt-completion")
    with pytest.raises(DataError, match="'anser', not in the data") as refused:  # once, not for each row
        make(tmp_path, tiny, rows, columns=columns | {"completion": "anser"}, on_bad_row="drop")
    assert refused.value.where == f"{tmp_path}/rows.jsonl:1"
    without = [{"foo": 1}, *(PAIR | {"prompt": f"Q{n}"} for n in range(40))]
    assert make(tmp_path, tiny, without, on_bad_row="drop").report.bad_rows == 1


def test_nothing_to_train_on_gives_reasons_with_counts_and_an_example(tmp_path: Path, tiny: Any) -> None:
    rows = [*({"messages": [Q]} for _ in range(57)), *({"messages": [Q, A], "images": ["a"]} for _ in range(3))]
    with pytest.raises(DataError, match=r"60 rows read, 60 dropped \(60 bad, .*: none left") as refused:
        make(tmp_path, tiny, rows, on_bad_row="drop")
    said = str(refused.value.hint)
    assert f"57 times as in {tmp_path}/rows.jsonl:1: no assistant turn (roles: user)" in said
    assert f"3 times as in {tmp_path}/rows.jsonl:58: 'images' beside the text" in said


def test_the_page_names_every_key_that_is_read_honoured_or_refused() -> None:
    page = (Path(__file__).parents[1] / "docs/data.md").read_text(encoding="utf-8")
    named = set().union(*keys.READ.values(), keys.KEPT, keys.OTHER_ROLES, keys.ROLES, {"chosen", "rejected", "kto_tag"})
    assert not {key for key in named if f"`{key}`" not in page}


def test_a_run_and_an_evaluation_say_what_is_not_read(
    tmp_path: Path, tiny: Any, recipe: Callable[..., str], cli: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write(tmp_path, [PAIR | {"prompt": f"Q{n}", "score": n} for n in range(20)])
    done = cli("train", recipe(data={"train": str(rows), "eval": None}, train={"steps": 3}, run={"eval_every": None}))
    assert done.code == 0 and "columns not read: score\n" in done.err
    record = json.loads((tmp_path / "run/provenance.json").read_bytes())
    assert record["report"]["unread"] == ["score"]
    source = DataSource(path=str(rows))
    read_answers(source, DataSettings(train=(source,)), ChatSettings(), tokenizer=tiny)
    assert capsys.readouterr().err == "columns not read: score\n"


@needs_shared
def test_two_answers_in_a_row_are_a_bad_row_where_the_template_cannot_hold_them(tmp_path: Path) -> None:
    rows = [{"messages": [Q | {"content": f"Q{n}"}, A, *[A] * (n == 7)]} for n in range(40)]
    for name, breaks in (("mistral-v0.3", 1), ("mistral-v0.2", 0), ("qwen3", 0)):
        tokenizer = load_tokenizer(str(SHARED / "tokenizers" / name))
        report = make(tmp_path, tokenizer, rows, on_bad_row="drop").report
        assert (report.parity_breaks, report.bad_rows) == (breaks, name != "qwen3"), name
        if breaks:
            with pytest.raises(ModelError, match="1 of 40 rows otherwise than a server"):
                make(tmp_path, load_tokenizer(tokenizer.name_or_path), rows, on_bad_row="drop", max_dropped=0.02)


@needs_shared
def test_a_real_set_with_weights_is_read_whole() -> None:
    examples = read(SHARED / "datasets/loss_weight_v1_sft_demo.jsonl")
    assert len(examples) == 500
    assert all(message["train"] is False for one in examples for message in one.messages if message["role"] == "user")
    assert not any("train" in message for one in examples for message in one.messages if message["role"] != "user")
