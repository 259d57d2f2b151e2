"""`{% generation %}` markers, where a template has them: what they mark, compared with what is supervised."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorasft.data.chat_format import ANSWER, QUESTION, MarkedText, TemplateStyle
from lorasft.data.examples import Example
from lorasft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
HINT = "fix the {% generation %} blocks of the template, or chat.template=FILE with another"


def has_markers(template: str) -> bool:
    return GENERATION.search(template) is not None


def compare_markers(
    tokenizer: PreTrainedTokenizerFast,
    style: TemplateStyle,
    example: Example,
    *,
    targets: Sequence[int],
    texts: Sequence[MarkedText],
) -> bool:
    """Whether the markers differ from the answers (`targets`: message indices) in the template's own text.

    Raises DataError when they leave an answer out or mark what somebody else said.
    """
    messages = example.messages[: targets[-1] + 1]
    last = texts[-1]
    whole = len(texts) == 1 and len(targets) == sum(message["role"] == "assistant" for message in messages)
    answers = last.answers if whole else last.answers[-1:]
    since = 0 if whole else answers[0].prompt
    before, after = style.text[style.text.find(QUESTION) + len(QUESTION) :].split(ANSWER)
    around = f"{before}\0{after}\0{after}{before}"  # what the template writes around an answer: markers may take it in
    inside = bytearray(len(last.text))
    for start, end in _marked_spans(tokenizer, example, len(messages)):
        inside[start:end] = b"\1" * (end - start)
    different = False
    for answer in answers:
        missed = "".join(last.text[at] for at in range(answer.start, answer.end) if not inside[at])
        if not any(inside[answer.start : answer.end]) or (missed.strip() and missed.strip() not in around):
            raise DataError(f"the template's markers leave out an answer: {missed[:80]!r}", hint=HINT)
        different |= bool(missed)
    for answer in answers:
        inside[answer.start : answer.end] = bytes(answer.end - answer.start)
    for found in re.finditer(rb"\x01+", bytes(inside[since:])):
        foreign = last.text[found.start() + since : found.end() + since].strip()
        if foreign and foreign not in around:
            raise DataError(f"the template's markers mark what is not an answer: {foreign[:80]!r}", hint=HINT)
        different = True
    return different


def _marked_spans(tokenizer: PreTrainedTokenizerFast, example: Example, upto: int) -> list[tuple[int, int]]:
    """The characters that the markers mark. transformers' token mask is not asked for: it may run on to the end of
    the sequence (huggingface/transformers issue 47325)."""
    from transformers.utils.chat_template_utils import render_jinja_template

    tools = list(example.tools) if example.tools else None
    _, spans = render_jinja_template(
        conversations=[list(example.messages[:upto])],
        tools=tools,
        chat_template=tokenizer.get_chat_template(None, tools),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return [(start, end) for start, end in spans[0] if start < end]
