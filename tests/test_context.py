"""What a template makes of messages: none of the context is lost, calls are what their rows say, and no date moves."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from test_chat import SHARED, Encoder, conversation, make_encoder, own, shared_tokenizer

from lorasft.data import chat_format
from lorasft.data.examples import Example, shape_row
from lorasft.data.sources import RowLocation
from lorasft.data.tokenizer import load_tokenizer
from lorasft.errors import DataError

TURN = "<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n"
END = "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
ALL = "{% for m in messages %}" + TURN + "{% endfor %}" + END
PARIS = {"city": "Paris & <b>"}


def chat(*turns: str | dict[str, Any], tools: Any = None) -> Example:
    """Messages written as `role: text`."""
    pairs = (turn.split(": ", 1) if isinstance(turn, str) else turn for turn in turns)
    messages = [one if isinstance(one, dict) else {"role": one[0], "content": one[1]} for one in pairs]
    row = {"messages": messages, "tools": tools}
    return shape_row(row, "chat", RowLocation("rows.jsonl", 1), unread=set(), mapped=set())


def call(arguments: Any = PARIS, name: str = "weather") -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "abcdefghi", "type": "function", "function": function}],
    }


def text_of(encoder: Encoder, example: Example) -> str:
    return "".join(encoder.format.tokenizer.decode(tokens.ids) for tokens in encoder.encode(example))


ONLY = "{% for m in messages %}{% if CONDITION %}" + TURN + "{% endif %}{% endfor %}" + END


def only(condition: str) -> str:
    return ONLY.replace("CONDITION", condition)


LOST = [  # a template, a conversation, what is lost of it
    (only("m.role != 'developer'"), ["developer: d", "user: q", "assistant: A"], r"message 1 \(developer\)"),
    (only("m.role != 'system' or loop.first"), ["system: s", "user: q", "assistant: A", "system: t", "assistant: B"],
     r"message 4 \(system\)"),
    (only("m.role != 'tool'"), ["user: q", call(), "tool: 20", "assistant: A"], r"the tool calls of message 2"),
    (only("loop.revindex < 3"), ["user: q", "assistant: A", "user: r", "assistant: B"], r"message 1 \(user\)"),
    (only("m.role in ['user', 'assistant']"), ["user: q", "tool: 20", "assistant: B"], r"message 2 \(tool\)"),
    # As Mistral Nemo's: the system text is before the last message, if that is a question.
    ("{% set s = messages[0].content if messages[0].role == 'system' else '' %}{% for m in messages %}"
     "{% if m.role != 'system' %}{{ s if loop.last and m.role == 'user' }}" + TURN + "{% endif %}{% endfor %}" + END,
     ["system: s", "user: q", "assistant: A", "tool: 20", "assistant: B"], r"message 1 \(system\)"),
]  # fmt: skip


@pytest.mark.parametrize(("template", "turns", "lost"), LOST)
def test_a_message_that_the_template_leaves_out_is_a_bad_row(
    tmp_path: Path, tiny: Any, template: str, turns: list[Any], lost: str
) -> None:
    with pytest.raises(DataError, match=f"leaves out {lost}") as error:
        own(tmp_path, tiny, template).encode(chat(*turns))
    assert error.value.where == "rows.jsonl:1" and error.value.hint
    assert own(tmp_path, tiny, template).encode(chat("user: q", "assistant: A"))


SHOWN = [  # templates that do something to texts, and rows that they take
    (ALL.replace("m.content", "m.content if m.role == 'assistant' else m.content | upper"),
     ["system: s", "user: q", "assistant: A"]),
    (ALL.replace("m.content", "m.content | trim | tojson"), ["system:  a\n b ", "user: q", "assistant: A"]),
    (ALL.replace("m.content", "m.content if m.role == 'assistant' else m.content[:40] | title"),
     ["user: " + "q" * 99, "assistant: A"]),
    (ALL.replace("m.content", "m.content.split('|')[-1]"), ["system: x|y", "user: q", "assistant: A"]),
    (only("m.content"), ["system: ", "user: q", "assistant: A", "user: r", "assistant: B"]),  # empty: nothing is lost
    (only("m.role != 'tool' or m.content | trim"), ["user: q", "tool:  ", "assistant: A"]),
    # Two messages of a role become one.
    ("{% for m in messages %}{{ '<|start|>' + m.role + '\n' if loop.first or loop.previtem.role != m.role else '\n' }}"
     "{{ m.content }}{% if loop.last or loop.nextitem.role != m.role %}<|end|>\n{% endif %}{% endfor %}" + END,
     ["user: q", "user: r", "assistant: A"]),
    ("{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}"
     "{% endif %}" + TURN + "{% endfor %}" + END, ["user: q", "assistant: A", "user: r", "assistant: B"]),
]  # fmt: skip


@pytest.mark.parametrize(("template", "turns"), SHOWN)
def test_texts_that_a_template_changes_are_not_lost(tmp_path: Path, tiny: Any, template: str, turns: list[str]) -> None:
    assert own(tmp_path, tiny, template).encode(chat(*turns))


def test_patterns_are_looked_at_once(tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, tried = own(tmp_path, tiny, ALL), []
    plain = chat_format._with_word
    monkeypatch.setattr(chat_format, "_with_word", lambda *a: tried.append(a) or plain(*a))
    for text in "abc":
        encoder.encode(conversation(text, "A" + text, "r", "B", system="s"))
    assert len(tried) == 4  # messages of the longest prompt


def test_everything_that_is_learned_is_all_of_the_row(tmp_path: Path, tiny: Any) -> None:
    encoder = own(tmp_path, tiny, only("m.role != 'system' or loop.first"), supervise="everything")
    assert encoder.encode(chat("system: s", "user: q", "assistant: A"))
    with pytest.raises(DataError, match=r"message 3 \(system\)"):
        encoder.encode(chat("user: q", "assistant: A", "system: s"))


def test_systems_that_a_template_leaves_out_are_merged_as_those_that_it_refuses(tmp_path: Path, tiny: Any) -> None:
    encoder = own(tmp_path, tiny, only("m.role != 'system'"))
    assert "user\ns\n\nq" in text_of(encoder, chat("system: s", "user: q", "assistant: A"))
    assert encoder.report.merged_systems == 1
    with pytest.raises(DataError, match=r"message 3 \(system\)"):
        encoder.encode(chat("user: q", "assistant: A", "system: s", "user: r", "assistant: B"))


def with_calls(how: str) -> str:
    """A template that writes calls in this way."""
    calls = "<|start|>assistant\n{% for c in m.tool_calls %}{{ c.function.name }} " + how + "{% endfor %}<|end|>\n"
    return (
        "{% for m in messages %}{% if m.tool_calls %}" + calls + f"{{% else %}}{TURN}{{% endif %}}{{% endfor %}}{END}"
    )


WRITTEN = '{"city":  "Paris & <b>"}'  # as the row has it
ARGUMENTS = [  # how a template writes arguments -> what becomes of those that are text, and of those that are an object
    ("{{ 'x ' + c.function.arguments }}", f"x {WRITTEN}", f"x {json.dumps(PARIS)}"),
    ("{{ c['function']['arguments'] }}", WRITTEN, json.dumps(PARIS)),  # an object would be written as Python's
    ("{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}",
     json.dumps(PARIS), json.dumps(PARIS)),
    ("{{ c.function.arguments | tojson }}", json.dumps(PARIS), json.dumps(PARIS)),
    ("{% for k, v in c.function.arguments.items() %}{{ k + '=' + v }}{% endfor %}", "city=Paris & <b>",
     "city=Paris & <b>"),
    ("{% for k in c.function.arguments %}{{ k }}={{ c.function.arguments[k] }}{% endfor %}",
     "city=Paris & <b>", "city=Paris & <b>"),
    ("{{ '{\"a\": ' + (c.function.arguments | tojson | safe) + '}' }}",
     f'{{"a": {json.dumps(PARIS)}}}', f'{{"a": {json.dumps(PARIS)}}}'),
]  # fmt: skip


def test_calls_beside_null_where_a_template_asks_for_that(tmp_path: Path, tiny: Any) -> None:
    """As DeepSeek's: `content is none` is what tells a call from an answer."""
    template = "{{ pad_token }}" + with_calls("{{ c.function.arguments + '.' }}").replace(
        "m.tool_calls", "m.content is none", 1
    )
    template = template.replace("m.content is none", "m.role == 'assistant' and m.content is none", 1)
    rendered = text_of(own(tmp_path, tiny, template), chat("user: q", call(WRITTEN), "tool: 20", "assistant: A"))
    assert f"weather {WRITTEN}.<|end|>" in rendered and "None" not in rendered


@pytest.mark.parametrize(("how", "of_text", "of_object"), ARGUMENTS)
def test_arguments_as_a_template_takes_them(tmp_path: Path, tiny: Any, how: str, of_text: str, of_object: str) -> None:
    for arguments, expected in ((WRITTEN, of_text), (PARIS, of_object)):
        encoder = own(tmp_path, tiny, with_calls(how))
        rendered = text_of(encoder, chat("user: q", call(arguments), "tool: 20", "assistant: A"))
        assert f"assistant\nweather {expected}<|end|>" in rendered and not encoder.report.bad_rows


def test_the_text_beside_a_call_that_a_template_leaves_out_is_counted(tmp_path: Path, tiny: Any) -> None:
    encoder = own(tmp_path, tiny, with_calls("{{ c.function.arguments | tojson }}"))
    encoder.encode(chat("user: q", call() | {"content": "I look."}))
    assert encoder.report.dropped_characters == len("I look.")


def test_what_python_wrote_into_a_row_stays(tmp_path: Path, tiny: Any) -> None:
    rendered = text_of(own(tmp_path, tiny, with_calls("{{ c.function.arguments | tojson }}")),
                       chat("user: q", call(WRITTEN), f"tool: {PARIS}", "assistant: A"))  # fmt: skip
    assert f"weather {json.dumps(PARIS)}<" in rendered and f"tool\n{PARIS}<" in rendered


@pytest.mark.parametrize("how", ["| e", "| escape", "| forceescape", "| tojson | forceescape"])
def test_calls_are_not_learned_as_html(tmp_path: Path, tiny: Any, how: str) -> None:
    encoder = own(tmp_path, tiny, with_calls("{{ c.function.arguments.city " + how + " }}"))
    with pytest.raises(DataError, match=r"&amp;.*&lt;") as error:
        encoder.encode(chat("user: q", call()))
    assert "chat.template" in str(error.value.hint)
    assert encoder.encode(chat("user: &lt;b&gt; &amp; &#34;", call({"city": "Paris"})))  # the row's own
    assert own(tmp_path, tiny, "&lt;" + ALL).encode(chat("user: q", "assistant: A"))  # the template's own


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here")
def test_mistrals_calls_are_json() -> None:
    encoder = make_encoder(shared_tokenizer("mistral-v0.3"))
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    result = {"role": "tool", "content": "20", "tool_call_id": "abcdefghi"}
    rendered = text_of(encoder, chat("user: q", call(), result, "assistant: A", tools=tools))
    assert f'[{{"name": "weather", "arguments": {json.dumps(PARIS)}, "id": "abcdefghi"}}]' in rendered


DATED = [  # what reads a date, of a server or of the template -> what is trained
    (
        "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}{{ date_string }}",
        "26 Jul 2024",
    ),
    ("{%- set date_string = date_string if date_string is defined else strftime_now('%Y') %}{{ date_string }}", "2025"),
    ("{% if datetime is defined %}{{ 'now: ' + datetime }}{% endif %}x", "x"),
    ("{{ 'datetime date_string' }} {{ {'datetime': 1}.datetime }} date_string", "datetime date_string 1 date_string"),
]  # fmt: skip


@pytest.mark.parametrize(("head", "expected"), DATED)
def test_no_server_names_another_date(tmp_path: Path, tiny: Any, head: str, expected: str) -> None:
    encoder = own(tmp_path, tiny, head + ALL, template_date=datetime.date(2025, 1, 2))
    encoder.format.tokenizer.save_pretrained(tmp_path / "saved")
    served = load_tokenizer(str(tmp_path / "saved"))
    today: Any = {"date_string": "1 Jan 2031", "datetime": "1 Jan 2031 12:00", "tokenize": False}
    assert served.apply_chat_template([{"role": "user", "content": "q"}], **today).split("<|start|>")[0] == expected
    once = served.chat_template
    assert make_encoder(served, chat={"template_date": datetime.date(2025, 1, 2)}) and served.chat_template == once
    free = own(tmp_path, tiny, head + ALL, template_date=None)
    assert free.format.tokenizer.chat_template == head + ALL


def test_a_date_that_the_recipe_gives_is_served(tmp_path: Path, tiny: Any) -> None:
    options = {"date_string": "3 Mar 2026"}
    encoder = own(tmp_path, tiny, DATED[0][0] + ALL, template_options=options)
    template = encoder.format.tokenizer.chat_template
    assert text_of(encoder, chat("user: q", "assistant: A")).startswith("3 Mar 2026")
    assert (
        make_encoder(encoder.format.tokenizer, chat={"template_options": options}).format.tokenizer.chat_template
        == template
    )
