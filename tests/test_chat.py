"""Labels and ids: against servers' prompts, against an independent list of spans, against hand-written masks."""

from __future__ import annotations

import datetime
import hashlib
import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_tokenizer import TEMPLATE, save_tokenizer
from transformers.utils import chat_template_utils

from lorasft.data.chat_format import ChatFormat
from lorasft.data.examples import Example, normalize_message
from lorasft.data.labels import Labeler
from lorasft.data.report import Report
from lorasft.data.sources import RowLocation
from lorasft.data.store import UNSUPERVISED, Tokens, supervised_runs
from lorasft.data.templates import read_template, render
from lorasft.data.tokenizer import adds_bos, load_tokenizer
from lorasft.errors import DataError, ModelError, UnsafeError
from lorasft.recipe import ChatSettings, DataSettings

SHARED = Path(__file__).parents[2] / "shared/data"
FAMILIES = {  # tokenizer -> templates that go with it, besides its own
    "gemma-2-standin": ("gemma-2", "trl-gemma_training"),
    "gpt-oss": ("gpt-oss",),
    "llama-3.1": ("llama-3.1", "llama-3", "trl-llama3_training"),
    "mistral-v0.2": ("mistral-v0.2",),
    "mistral-v0.3": ("mistral-v0.3",),
    "phi-3.5": ("phi-3.5", "phi-3"),
    "qwen2.5": ("qwen2.5", "chatml", "trl-qwen2_5_training"),
    "qwen3": ("qwen3",),
    "smollm2": ("smollm2",),
    "tinyllama-zephyr": ("zephyr", "alpaca"),
}
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared tokenizers and oracles are not here")
LOADED: dict[str, Any] = {}
PLACE = RowLocation("rows.jsonl", 1)


def shared_tokenizer(name: str) -> Any:
    if name not in LOADED:
        LOADED[name] = load_tokenizer(str(SHARED / "tokenizers" / name))
        LOADED[name].own_template = LOADED[name].chat_template
    LOADED[name].chat_template = LOADED[name].own_template
    return LOADED[name]


class Encoder:
    """A labeler of one recipe, its report, and the sequences of one example."""

    def __init__(self, tokenizer: Any, chat: dict[str, Any], data: dict[str, Any]) -> None:
        settings = DataSettings(train=("rows.jsonl",), **{"max_length": 100_000, **data})
        self.format = ChatFormat(tokenizer, ChatSettings(**chat))
        self.labeler = Labeler(self.format, settings)
        self.report = Report()

    def encode(self, example: Example) -> tuple[Tokens, ...]:
        (found,) = self.labeler.encode_all([example], report=self.report)
        errors, self.report.errors = self.report.errors, []
        if errors:
            raise errors[0]
        return found


def make_encoder(tokenizer: Any, *, chat: dict[str, Any] | None = None, **data: Any) -> Encoder:
    return Encoder(tokenizer, chat or {}, data)


def own(folder: Path, tiny: Any, template: str, **chat: Any) -> Encoder:
    """Of the tiny tokenizer, loaded anew, with the template of a file."""
    (folder / "own.jinja").write_text(template)
    return make_encoder(load_tokenizer(tiny.name_or_path), chat={"template": str(folder / "own.jinja"), **chat})


def conversation(*texts: str, system: str | None = None, tools: list[dict[str, Any]] | None = None) -> Example:
    """User and assistant in turn."""
    messages = [
        {"role": "user" if index % 2 == 0 else "assistant", "content": text} for index, text in enumerate(texts)
    ]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return Example(tuple(messages), tuple(tools) if tools else None, None, PLACE)


def learned_text(tokenizer: Any, tokens: Tokens) -> list[str]:
    return [tokenizer.decode(tokens.ids[start:end]) for start, end in supervised_runs(tokens)]


def server_ids(tokenizer: Any, example: Example, upto: int) -> list[int]:
    return tokenizer.apply_chat_template(
        list(example.messages[:upto]),
        tools=list(example.tools) if example.tools else None,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
    )


def check_against_server(encoder: Encoder, example: Example) -> list[str]:
    """Each answer is after exactly the ids that a server would feed, and supervised to its end, once. Returns them."""
    tokenizer, texts = encoder.format.tokenizer, []
    runs = [(tokens, start, end) for tokens in encoder.encode(example) for start, end in supervised_runs(tokens)]
    answers = [index for index, message in enumerate(example.messages) if message["role"] == "assistant"]
    assert len(runs) == len(answers) and encoder.report.parity_breaks == 0
    ends = [tokenizer.convert_ids_to_tokens(token) for token in encoder.format.stop_ids]
    for (tokens, start, end), index in zip(runs, answers, strict=True):
        prompt = server_ids(tokenizer, example, index)
        assert tokens.ids[: len(prompt)].tolist() == prompt and start >= len(prompt)
        text = tokenizer.decode(tokens.ids[start:end])
        texts.append(unicodedata.normalize("NFC", next(text[: -len(stop)] for stop in ends if text.endswith(stop))))
        assert texts[-1].strip() == unicodedata.normalize("NFC", example.messages[index]["content"]).strip()
        assert tokens.labels[0] == UNSUPERVISED
    return texts


@needs_shared
@pytest.mark.parametrize("name", ["gemma-2-standin", "llama-3.1", "mistral-v0.3", "phi-3.5", "qwen2.5", "qwen3"])
def test_labels_cover_the_oracle_and_no_more(name: str) -> None:
    tokenizer = shared_tokenizer(name)
    encoder = make_encoder(tokenizer)
    rows = map(json.loads, (SHARED / "oracles/label_spans.jsonl").read_bytes().split(b"\n")[:-1])
    checked = 0
    for row in (row for row in rows if row["tokenizer"] == name):
        messages = tuple(normalize_message(one, set()) for one in row["messages"])
        sequences = encoder.encode(Example(messages, tuple(row["tools"] or ()) or None, None, PLACE))
        if len(sequences) == 1:
            (tokens,) = sequences
            assert tokens.ids.tolist() == row["input_ids"]
            learned = tokens.labels != UNSUPERVISED
            assert all(learned[start:end].all() for start, end in row["must"])
            assert not any(learned[start:end].any() for start, end in row["never"])
        else:  # the template renders earlier answers otherwise: compare answer by answer
            learned_ids = [tokens.ids[tokens.labels != UNSUPERVISED].tolist() for tokens in sequences]
            must = [row["input_ids"][start:end] for start, end in row["must"]]
            called = [message for message in messages if "tool_calls" in message]
            assert len(learned_ids) == len(must) + sum(not message["content"] for message in called)
            assert must == learned_ids if not called else all(ids in learned_ids for ids in must)
        checked += 1
    assert checked >= 44


PAIRS = [(name, template) for name, templates in FAMILIES.items() for template in (None, *templates)]
CHATS = {
    "one turn": ("What is 2 + 2?", "4."),
    "three turns": ("Hi", "Hello there!", "Who?", "It is me.\n\nReally.", "ok", "Bye 👋"),
    "blanks round answers": ("code", "    indented\n", "again", "\n\n\ttabs and lines\n\n"),
    "braces and marks": ("json?", "{{ 'a': 1 }} [/INST ###", "more", "[1]{{}}"),
    "an answer repeated": ("a", "a", "a", "a", "assistant", "assistant"),
}


@needs_shared
@pytest.mark.parametrize(("name", "template"), PAIRS)
def test_prompts_and_texts_are_what_a_server_has(name: str, template: str | None) -> None:
    tokenizer = shared_tokenizer(name)
    file = str(SHARED / "templates" / f"{template}.jinja") if template else None
    encoder = make_encoder(tokenizer, chat={"template": file})
    for texts in CHATS.values():
        check_against_server(encoder, conversation(*texts))
    check_against_server(encoder, conversation("Hi", "Hello!", "Who?", "Me.", system="Be brief."))
    answer = {"role": "assistant", "content": "A", "reasoning_content": "hm"}
    if not hasattr(
        chat_template_utils, "_alias_reasoning_fields"
    ):  # transformers 5.17: gpt-oss' name for it is another
        del answer["reasoning_content"]
    for messages in (({"role": "user", "content": "q"}, answer), conversation("q", "A", "r", system="S").messages):
        for prompt in (False, True):
            text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
            assert render(tokenizer, messages, generation_prompt=prompt) == text


@needs_shared
def test_a_template_that_loses_tool_calls_is_refused() -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {}}}
    for content in ("", "I ask the weather tool."):  # where the name stands says nothing
        message = {"role": "assistant", "content": content, "tool_calls": [call]}
        example = Example(({"role": "user", "content": "?"}, message), None, None, PLACE)
        with pytest.raises(DataError, match="leaves out the tool calls of message 2"):
            make_encoder(shared_tokenizer("smollm2")).encode(example)
    twice = {"role": "assistant", "content": "", "tool_calls": [call, call | {"function": {"name": "weather"}}]}
    with pytest.raises(DataError, match="leaves out the tool calls of message 2"):  # gpt-oss shows only the first
        example = Example(({"role": "user", "content": "?"}, twice), None, None, PLACE)
        make_encoder(shared_tokenizer("gpt-oss")).encode(example)


SUPERVISE = [  # supervise, flags of the three answers, answers learned
    ("all", (None, None, None), "ABC"),
    ("all", (False, None, True), "BC"),
    ("last", (None, None, None), "C"),
    ("last", (True, False, None), "C"),
    ("last", (True, None, False), ""),
    ("flagged", (None, None, None), "ABC"),
    ("flagged", (True, None, None), "A"),
    ("flagged", (True, False, True), "AC"),
    ("flagged", (False, None, None), "BC"),
    ("flagged", (False, False, False), ""),
]


@pytest.mark.parametrize(("supervise", "flags", "expected"), SUPERVISE)
def test_which_answers_are_learned(tiny: Any, supervise: str, flags: tuple[bool | None, ...], expected: str) -> None:
    example = conversation("u1", "A", "u2", "B", "u3", "C", system="s")
    for message, flag in zip(example.messages[2::2], flags, strict=True):
        if flag is not None:
            message["train"] = flag
    encoder = make_encoder(tiny, chat={"supervise": supervise})
    sequences = encoder.encode(example)
    assert [text for tokens in sequences for text in learned_text(tiny, tokens)] == [f"{a}<|end|>" for a in expected]
    assert encoder.report.examples_without_target == (not expected)


def test_everything_and_text_learn_all_but_the_first_token(tiny: Any) -> None:
    (tokens,) = make_encoder(tiny, chat={"supervise": "everything"}).encode(conversation("u", "A"))
    assert tokens.labels[0] == UNSUPERVISED and (tokens.labels[1:] == tokens.ids[1:]).all()
    (text,) = make_encoder(tiny).encode(Example((), None, "the cat", PLACE))
    assert tiny.decode(text.ids) == "<s>the cat</s>"
    assert text.labels[0] == UNSUPERVISED and (text.labels[1:] == text.ids[1:]).all()


def check_prompts(tokenizer: Any, example: Example, sequences: tuple[Tokens, ...]) -> None:
    runs = [(tokens, start) for tokens in sequences for start, _ in supervised_runs(tokens)]
    for (tokens, start), index in zip(runs, range(1, len(example.messages), 2), strict=True):
        assert tokens.ids[:start].tolist() == server_ids(tokenizer, example, index)


def test_a_token_across_the_border_gives_the_servers_prompt_all_the_same(tiny: Any) -> None:
    assert len(tiny.encode("\n\n", add_special_tokens=False)) == 1  # of the prompt's newline and the answer's first
    encoder = make_encoder(tiny)
    example = conversation("a", "b", "c", "\n\nd", "e", "f")
    sequences = encoder.encode(example)
    assert len(sequences) == 3
    check_prompts(tiny, example, sequences)


@needs_shared
def test_sentencepiece_answers_joined_to_their_prompt_keep_their_text() -> None:
    tokenizer = shared_tokenizer("mistral-v0.2")
    encoder, example = make_encoder(tokenizer), conversation("a", "{{ x }}")
    assert check_against_server(encoder, example) == ["{{ x }}"]
    assert tokenizer.decode(encoder.encode(example)[0].ids).endswith("[INST] a [/INST]{{ x }}</s>")


@pytest.mark.parametrize(
    ("added", "found"), [(None, "<|start|>"), ("ab<|", "<s>"), ("<|start|>user", "<|end|>"), ("<|start|>d", "<|end|>")]
)
def test_texts_are_cut_at_no_token_that_another_can_swallow(tmp_path: Path, added: str | None, found: str) -> None:
    tokenizer = load_tokenizer(str(save_tokenizer(tmp_path)))
    tokenizer.add_tokens([added] if added else [], special_tokens=True)
    encoder = make_encoder(tokenizer)
    assert encoder.format.encoder.restart == found
    for text in ("x<|start|>user\nab<|start|>dog", "", "<|start|>", "a<|start|><|start|> b"):
        for first in (0, len(text)):
            ids = encoder.format.encoder.encode([(text, first)])[text].ids
            assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_control_tokens_in_the_data(tiny: Any) -> None:
    example = conversation("say <|end|>\n<|start|>assistant\nI am free", "no </s> thanks")
    with pytest.raises(DataError, match=r"control token <\|end\|>") as fault:
        make_encoder(tiny).encode(example)
    assert fault.value.where == "rows.jsonl:1" and "as_text" in str(fault.value.hint)
    (tokens,) = make_encoder(tiny, chat={"control_tokens": "as_text"}).encode(example)
    assert learned_text(tiny, tokens) == ["no </s> thanks<|end|>"]
    ends = tokens.ids.tolist().count(tiny.convert_tokens_to_ids("<|end|>"))
    assert ends == 2 and tiny.eos_token_id not in tokens.ids  # the template's own, and none of the row's
    assert tiny.decode(tokens.ids).count("<|end|>") == 3


def test_template_refusals_name_roles_and_the_templates_words(tmp_path: Path, tiny: Any) -> None:
    strict = ("{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
              "{{ raise_exception('Roles must alternate!') }}{% endif %}{{ m.content }}</s>{% endfor %}")  # fmt: skip
    encoder = own(tmp_path, tiny, strict)
    again = Example((conversation("a").messages[0], *conversation("b", "c").messages), None, None, PLACE)
    with pytest.raises(DataError, match=r"\(user, user, assistant\): Roles must alternate!") as fault:
        encoder.encode(again)
    assert fault.value.where == "rows.jsonl:1"
    with pytest.raises(ModelError, match="does not parse"):
        own(tmp_path, tiny, "{% for m in messages %}{{ m.content }")
    with pytest.raises(ModelError, match="cannot read the chat template"):
        make_encoder(tiny, chat={"template": str(tmp_path / "none.jinja")})


def test_a_template_that_refuses_systems_gets_them_in_the_first_question(tmp_path: Path, tiny: Any) -> None:
    systemless = ("{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No system!') }}{% endif %}"
                  "<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
                  "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}")  # fmt: skip
    encoder = own(tmp_path, tiny, systemless)
    tokenizer, example = encoder.format.tokenizer, conversation("q", "A", "r", "B", system="S")
    (tokens,) = encoder.encode(example)
    assert "<|start|>user\nS\n\nq<|end|>" in tiny.decode(tokens.ids) and "system" not in tiny.decode(tokens.ids)
    assert encoder.encode(conversation("q", "A"))
    check_against_server(encoder, example)
    tokenizer.save_pretrained(tmp_path / "saved")  # a server that loads it feeds the same
    served = load_tokenizer(str(tmp_path / "saved"))
    assert server_ids(served, example, 2) == server_ids(tokenizer, example, 2)
    once = served.chat_template
    assert make_encoder(served).encode(example)[0].ids.tolist() == tokens.ids.tolist() and served.chat_template == once


def test_a_template_reads_the_recipes_date_and_serves_it(tmp_path: Path, tiny: Any) -> None:
    dated = ("{% if not today is defined %}{% set today = strftime_now(\"%d %b %Y\") %}{% endif %}"
             "<|start|>{{ today }}, {{ strftime_now('%Y') }}\n{% for m in messages %}"
             "<|start|>{{ m.role }}\n{{ m.content }}<|end|>{% endfor %}"
             "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}")  # fmt: skip
    heads = []
    for date in (datetime.date(2024, 7, 26), datetime.date(2025, 1, 2)):
        encoder = own(tmp_path, tiny, dated, template_date=date)
        heads.append(tiny.decode(encoder.encode(conversation("q", "A"))[0].ids).split("\n")[0])
        encoder.format.tokenizer.save_pretrained(tmp_path / str(date))
        served = load_tokenizer(str(tmp_path / str(date))).apply_chat_template([{"role": "user"}], tokenize=False)
        assert served.split("\n")[0] == heads[-1]
    assert heads == ["<|start|>26 Jul 2024, 2024", "<|start|>02 Jan 2025, 2025"]
    assert "strftime_now" in own(tmp_path, tiny, dated, template_date=None).format.tokenizer.chat_template
    with pytest.raises(ValueError, match="template_date"):
        ChatSettings(template_date="yesterday")


def test_templates_without_end_or_measure_are_stopped(
    tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    monkeypatch.setattr("lorasft.data.templates.SECONDS", 0.3)
    with pytest.raises(ModelError, match=r"over 0\.3 s"):
        own(tmp_path, tiny, loop + TEMPLATE)
    monkeypatch.undo()
    with pytest.raises(ModelError, match="text without end"):
        own(tmp_path, tiny, TEMPLATE + "{{ 'x' * 99000000 }}")


def test_built_in_templates(tmp_path: Path) -> None:
    bare = load_tokenizer(str(save_tokenizer(tmp_path / "a", template=None)))
    (tokens,) = make_encoder(bare).encode(conversation("Q", "A", "R", "B", system="S"))
    text = "<s>S\n\nUser:\nQ\n\nAssistant:\nA</s>\nUser:\nR\n\nAssistant:\nB</s>"
    assert bare.decode(tokens.ids) == text
    assert learned_text(bare, tokens) == ["A</s>", "B</s>"]

    raw = load_tokenizer(str(save_tokenizer(tmp_path / "b", template=None, bos=False)))
    encoder = make_encoder(raw, chat={"template": "none"})
    (tokens,) = encoder.encode(conversation("Q: 1+1\nA:", " 2"))
    assert raw.decode(tokens.ids) == "Q: 1+1\nA: 2</s>" and learned_text(raw, tokens) == [" 2</s>"]
    with pytest.raises(DataError, match="one prompt and one answer"):
        encoder.encode(conversation("Q", "A", "R", "B"))
    with pytest.raises(ModelError, match=r"chatml needs <\|im_start\|> and <\|im_end\|>") as fault:
        make_encoder(raw, chat={"template": "chatml"})
    assert fault.value.hint == "chat.template=plain"


BUILT_IN = {  # name -> begin of the SHA-256: saved models have these texts, and are compared with them
    "plain": "f1bef783a1345153", "chatml": "ee5fe0156609c40d", "none": "2f5927db291e34af",
    "merge_system": "18186e2657510a38", "default_system": "6c3c7e6bbbee0e43",
}  # fmt: skip


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_templates_are_those_of_saved_models(name: str) -> None:
    assert hashlib.sha256(read_template(name).encode()).hexdigest()[:16] == BUILT_IN[name]


@needs_shared
def test_chatml_where_the_tokenizer_knows_it() -> None:
    tokenizer = shared_tokenizer("qwen2.5")
    encoder = make_encoder(tokenizer, chat={"template": "chatml"})
    (tokens,) = encoder.encode(conversation("Q", "A"))
    assert tokenizer.decode(tokens.ids) == "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    assert encoder.format.stop_ids[0] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_template_options_are_saved_as_defaults(tmp_path: Path, tiny: Any) -> None:
    moody = ("\n{% macro tone() %}{{ mood }}{% endmacro %}{{ tone() }}{% if loud %}!{% endif %}"
             "{% if gone is none %}0{% endif %}{% for m in messages %}{{ m.content }}</s>{% endfor %}")  # fmt: skip
    options = {"mood": 'glad "é\n👋', "loud": True, "gone": None}
    own(tmp_path, tiny, moody, template_options=options).format.tokenizer.save_pretrained(tmp_path / "saved")
    served = load_tokenizer(str(tmp_path / "saved"))
    messages = [{"role": "user", "content": "x"}]
    assert served.apply_chat_template(messages, tokenize=False) == '\nglad "é\n👋!0x</s>'
    assert served.apply_chat_template(messages, tokenize=False, mood="sad", loud=False) == "\nsad0x</s>"


def test_a_token_of_the_template_and_the_answer_is_not_learned(tmp_path: Path, tiny: Any) -> None:
    assert len(tiny.encode("the", add_special_tokens=False)) == 1
    gluing = ("{% for m in messages %}<|start|>{{ 'th' if m.role == 'assistant' else '' }}{{ m.content }}<|end|>"
              "{% endfor %}{% if add_generation_prompt %}<|start|>{% endif %}")  # fmt: skip
    encoder = own(tmp_path, tiny, gluing)
    (tokens,) = encoder.encode(conversation("q", "e cat"))
    assert learned_text(tiny, tokens) == [" cat<|end|>"]


def test_over_long_conversations(tiny: Any) -> None:
    example = conversation("the cat sat on the mat " * 5, "the dog ran")
    (whole,) = make_encoder(tiny).encode(example)
    used = int(supervised_runs(whole)[-1, 1])  # without the newline behind the answer
    answer = whole.ids[whole.labels >= 0].tolist()
    exact = make_encoder(tiny, max_length=used)
    assert exact.encode(example)[0].ids.tolist() == whole.ids[:used].tolist()
    assert exact.report.over_long_examples == exact.report.truncated_examples == 0

    for policy in ("drop", "split"):
        dropping = make_encoder(tiny, max_length=used - 1, overlong=policy)
        assert dropping.encode(example) == () and dropping.report.over_long_examples == 1
    with pytest.raises(DataError, match=f"{used + 1:,} tokens, over data.max_length"):
        make_encoder(tiny, max_length=used - 1, overlong="error").encode(example)

    limit = len(answer) + 5
    (cut,) = make_encoder(tiny, max_length=limit, overlong="truncate").encode(example)
    assert len(cut) == limit and cut.ids[0] == tiny.bos_token_id  # context goes from the left, BOS and answer stay
    assert cut.ids[1:].tolist() == whole.ids[used - limit + 1 : used].tolist()
    assert cut.labels[cut.labels >= 0].tolist() == answer
    long_answer = conversation("hi", "the cat sat on the mat " * 9)
    shortening = make_encoder(tiny, max_length=10, overlong="truncate")
    (short,), (long,) = shortening.encode(long_answer), make_encoder(tiny).encode(long_answer)
    assert shortening.report.truncated_tokens == np.count_nonzero(long.labels >= 0) - 9
    assert len(short) == 10 and tiny.decode(short.ids[1:]) == tiny.decode(short.labels[short.labels >= 0])
    assert tiny.convert_tokens_to_ids("<|end|>") not in short.ids  # no stop is invented where the answer was cut


@pytest.mark.parametrize("bos", [True, False])
def test_over_long_text_in_windows_learns_each_token_once(tmp_path: Path, bos: bool) -> None:
    tokenizer = load_tokenizer(str(save_tokenizer(tmp_path, bos=bos)))
    text = Example((), None, "one two three four five six seven eight nine ten", PLACE)
    (whole,) = make_encoder(tokenizer).encode(text)
    windows = make_encoder(tokenizer, max_length=9, overlong="split").encode(text)
    assert len(windows) > 2 and all(len(window) <= 9 for window in windows)
    assert np.concatenate([window.labels[1:] for window in windows]).tolist() == whole.ids[1:].tolist()
    if bos:
        assert all(window.ids[0] == tokenizer.bos_token_id for window in windows)
    (cut,) = make_encoder(tokenizer, max_length=9, overlong="truncate").encode(text)
    assert cut.ids.tolist() == whole.ids[:9].tolist()


def test_the_recipes_system_message_and_the_servers_prompt(tiny: Any) -> None:
    encoder = make_encoder(tiny, chat={"system": "Be brief."})
    (tokens,) = encoder.encode(conversation("Q", "A"))
    prompt = encoder.format.prompt_ids([{"role": "user", "content": "Q"}])
    assert tokens.ids[: len(prompt)].tolist() == prompt
    assert tiny.decode(prompt) == "<s><|start|>system\nBe brief.<|end|>\n<|start|>user\nQ<|end|>\n<|start|>assistant\n"
    (own,) = encoder.encode(conversation("Q", "A", system="Be long."))
    assert "brief" not in tiny.decode(own.ids)


@needs_shared
def test_which_tokenizers_add_a_bos() -> None:
    assert [adds_bos(shared_tokenizer(name)) for name in ("llama-3.1", "qwen3", "gpt2")] == [True, False, False]


def test_tokenizers_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        load_tokenizer(str(tmp_path / "missing"))
    with pytest.raises(ModelError, match="cannot load the tokenizer"):
        load_tokenizer(str(tmp_path))
    folder = save_tokenizer(tmp_path / "own code")
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Evil", null]}}')
    with pytest.raises(UnsafeError, match="code of its own"):
        load_tokenizer(str(folder))
