"""`{% generation %}` markers, where a template has them: what they mark, compared with what is learned."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lorasft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
Span = tuple[int, int]
HINT = "mend the {% generation %} blocks of the template, or chat.template=FILE with another"


def has_markers(template: str) -> bool:
    return GENERATION.search(template) is not None


def marked_spans(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None
) -> list[Span]:
    """The characters that the markers mark. transformers' token mask is not asked for: it may run on to the end of
    the sequence (huggingface/transformers issue 47325)."""
    from transformers.utils.chat_template_utils import render_jinja_template

    given = list(tools) if tools else None
    _, spans = render_jinja_template(
        conversations=[list(messages)],
        tools=given,
        chat_template=tokenizer.get_chat_template(None, given),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return [(start, end) for start, end in spans[0] if start < end]


def differs(text: str, answers: Sequence[Span], marked: Sequence[Span], *, around: str, since: int) -> bool:
    """Whether the markers and the learned spans of `text` differ, from character `since` on.

    `around` is what the template writes before and behind an answer: markers may take some of it in. Raises DataError
    when they leave an answer out or mark what somebody else said.
    """
    inside = bytearray(len(text))
    for start, end in marked:
        inside[start:end] = b"\1" * (end - start)
    for start, end in answers:
        missed = "".join(text[at] for at in range(start, end) if not inside[at])
        if not any(inside[start:end]) or (missed.strip() and missed.strip() not in around):
            raise DataError(f"the template's markers leave out an answer: {missed[:80]!r}", hint=HINT)
    different = any(not all(inside[start:end]) for start, end in answers)
    for start, end in answers:
        inside[start:end] = bytes(end - start)
    for found in re.finditer(rb"\x01+", bytes(inside[since:])):
        foreign = text[found.start() + since : found.end() + since]
        if foreign.strip() and foreign.strip() not in around:
            raise DataError(f"the template's markers mark what is no answer: {foreign[:80]!r}", hint=HINT)
        different = True
    return different
