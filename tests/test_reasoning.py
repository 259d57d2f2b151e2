"""Reasoning supervised, masked, dropped or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_chat import PLACE, check_prompts, conversation, learned_text, make_encoder, needs_shared, shared_tokenizer
from tiny_tokenizer import save_tokenizer

from lorasft.data.examples import Example
from lorasft.data.tokenizer import load_tokenizer
from lorasft.errors import DataError

THINKING = (  # as Qwen3: earlier thoughts are cut, a field or an inline thought of the last turn is shown
    "{% for m in messages %}<|start|>{{ m.role }}\n"
    "{% set thought = m.reasoning_content or (m.content.split('</think>')[0].split('<think>')[-1] "
    "if '</think>' in m.content else '') %}"
    "{% if thought and loop.last %}<think>\n{{ thought | trim }}\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}\n"
    "{% else %}{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
TWICE = conversation("q", "<think>first</think>A", "r", "<think>second</think>\n\nB")
FIELD = Example(
    ({"role": "user", "content": "q"}, {"role": "assistant", "content": "A", "reasoning_content": "hm"}),
    None,
    None,
    PLACE,
)


def tiny(tmp_path: Path, template: str) -> Any:
    return load_tokenizer(str(save_tokenizer(tmp_path / "tokenizer", template=template)))


@pytest.mark.parametrize(
    ("thinking", "learned", "dropped"),
    [
        ("follow_template", ["<think>\nfirst\n</think>\n\nA<|end|>", "<think>\nsecond\n</think>\n\nB<|end|>"], 0),
        ("mask", ["A<|end|>", "B<|end|>"], 0),
        ("drop", ["A<|end|>", "B<|end|>"], len("firstsecond")),
        ("error", ["<think>\nfirst\n</think>\n\nA<|end|>", "<think>\nsecond\n</think>\n\nB<|end|>"], 0),
    ],
)
def test_what_becomes_of_reasoning(tmp_path: Path, thinking: str, learned: list[str], dropped: int) -> None:
    tokenizer = tiny(tmp_path, THINKING)
    encoder = make_encoder(tokenizer, chat={"thinking": thinking})
    sequences = encoder.encode(TWICE)
    assert [text for tokens in sequences for text in learned_text(tokenizer, tokens)] == learned
    shown = tokenizer.decode(sequences[-1].ids)
    assert ("second" in shown) == (thinking != "drop") and "first" not in shown  # as a server shows earlier turns
    report = encoder.report
    assert (report.dropped_reasoning, report.parity_breaks, report.answers) == (dropped, 0, 2)
    (told,) = encoder.encode(FIELD)
    assert learned_text(tokenizer, told) == [
        "<think>\nhm\n</think>\n\nA<|end|>" if "<think>" in learned[0] else "A<|end|>"
    ]
    if thinking in ("follow_template", "error"):
        check_prompts(tokenizer, TWICE, sequences)


def test_reasoning_that_the_template_drops_is_counted_or_refused(tmp_path: Path) -> None:
    tokenizer = tiny(tmp_path, MARKED)  # reads no reasoning_content
    encoder = make_encoder(tokenizer)
    encoder.encode(FIELD)
    assert encoder.report.dropped_reasoning == 2
    with pytest.raises(DataError, match="drops the reasoning of message 2"):
        make_encoder(tokenizer, chat={"thinking": "error"}).encode(FIELD)
    with pytest.raises(DataError, match="alone"):
        make_encoder(tiny(tmp_path, THINKING)).encode(conversation("q", "hm</think>A"))
    only = conversation("q", "<think>hm</think>")
    with pytest.raises(DataError, match="without text"):
        make_encoder(tokenizer, chat={"thinking": "drop"}).encode(only)


@needs_shared
@pytest.mark.parametrize("name", ["gpt-oss", "qwen3"])
def test_masked_reasoning_of_real_templates(name: str) -> None:
    tokenizer = shared_tokenizer(name)
    (learned,) = make_encoder(tokenizer).encode(FIELD)
    (masked,) = make_encoder(tokenizer, chat={"thinking": "mask"}).encode(FIELD)
    assert learned.ids.tolist() == masked.ids.tolist()
    assert "hm" in learned_text(tokenizer, learned)[0] and "hm" not in learned_text(tokenizer, masked)[0]
    assert "A" in learned_text(tokenizer, masked)[0] and "hm" in tokenizer.decode(masked.ids)


def test_a_prompt_that_closes_the_thought_leaves_reasoning_no_place(tmp_path: Path) -> None:
    closed = "{% if add_generation_prompt %}<|start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
    template = THINKING.replace("{% if add_generation_prompt %}<|start|>assistant\n{% endif %}", closed).replace(
        "{% if thought and loop.last %}", "{% if loop.last and m.role == 'assistant' %}"
    )
    encoder = make_encoder(tiny(tmp_path, template))
    (tokens,) = encoder.encode(FIELD)
    assert learned_text(encoder.format.tokenizer, tokens) == ["A<|end|>"]
    assert encoder.report.dropped_reasoning == 2
    check_prompts(encoder.format.tokenizer, FIELD, (tokens,))


def test_what_else_the_template_leaves_out_is_counted(tmp_path: Path) -> None:
    cut = MARKED.replace("{{ m.content }}<|end|>{% endgen", "{{ (m.content | trim).split('#')[0] }}<|end|>{% endgen")
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
    encoder = make_encoder(tiny(tmp_path, cut))
    encoder.encode(conversation("q", "  blanks\n", "r", "whole", "s", "before#after", tools=tools))
    report = encoder.report
    assert (report.dropped_characters, report.tools_left_out) == (3 + len("before#after"), 1)
