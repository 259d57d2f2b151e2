"""Conversation -> text with its answers marked: where the prompt ends, and which characters are learned.

The prompt of an answer is what a server would render (`add_generation_prompt=True`). What the template puts between
that prompt and the answer, such as an empty think block, is context; the answer is the text of the row and what ends
the turn. Nothing is known of any template: its habits are read off a rendering of a probe, and each conversation
is checked against them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from lorasft.data.examples import Example, Message
from lorasft.data.markers import differs, has_markers, marked_spans
from lorasft.data.reasoning import FIELDS, reasoning_of, without_reasoning
from lorasft.data.report import Report
from lorasft.data.templates import render, time_limit
from lorasft.data.tokenizer import control_tokens
from lorasft.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Thinking = Literal["follow_template", "mask", "drop", "error"]
PLAIN_KEYS = {"role", "content", "name", "train"}
QUESTION, ANSWER = "Which word comes first?", "lorasftProbeAnswer"  # nothing a template would trim or rewrite


@dataclass(frozen=True)
class Answer:
    """Characters of a draft: the prompt ends at `prompt`; `start` to `end` is learned.

    `masked`: characters of reasoning before `start`, which are context.
    """

    prompt: int
    start: int
    end: int
    masked: int = 0


@dataclass(frozen=True)
class Draft:
    """The text of one sequence, and its answers; `add_eos`: the template ends the last one with no token of its own."""

    text: str
    answers: tuple[Answer, ...]
    add_eos: bool = False


@dataclass(frozen=True)
class Habits:
    """What a template does with the last answer: text before it, text that ends it, and what only a prompt has."""

    lead: str
    end: str
    prompt_only: str  # in the generation prompt, and not in a rendered answer


class TurnFinder:
    """Drafts conversations with one tokenizer's template."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, report: Report, *, thinking: Thinking) -> None:
        """Raises ModelError when the template is broken."""
        self.tokenizer = tokenizer
        self.thinking = thinking
        self.report = report
        self.special = control_tokens(tokenizer)
        added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
        self.ends = tuple(token for token in added.union(self.special) if token.strip())  # Gemma adds runs of newlines
        self._only_ends = re.compile("|".join([r"\s", *map(re.escape, self.ends)]).join(("(?:", ")*")))
        self.probe_prompt, self.probe_text, self.habits = self._probe()
        before, behind = self.probe_text[self.probe_text.find(QUESTION) + len(QUESTION) :].split(ANSWER)
        self.around_answer = f"{before}\0{behind}\0{behind}{before}"  # what the template writes about an answer
        self.has_markers = has_markers(str(tokenizer.chat_template))

    def draft(self, example: Example, targets: Sequence[int]) -> tuple[Draft, ...]:
        """One draft that holds all answers (`targets`: message indices), or one per answer where that is not exact."""
        together = self._draft_together(example, targets) if len(targets) > 1 else None
        drafts = (together,) if together else tuple(self.draft_turn(example, target) for target in targets)
        self.report.split_conversations += len(drafts) > 1
        answers = ((draft, answer) for draft in drafts for answer in draft.answers)
        for target, (draft, answer) in zip(targets, answers, strict=True):
            self._count_losses(example.messages[target], target, draft.text, answer)
        if self.has_markers and targets:
            self._compare_markers(example, targets, drafts)
        if example.tools and not any(_name(tool) in draft.text for tool in example.tools for draft in drafts):
            self.report.tools_left_out += 1
        return drafts

    def draft_turn(self, example: Example, target: int) -> Draft:
        """The conversation up to one answer, exactly as it stands when that answer is the last."""
        message = example.messages[target]
        text = self._render(example, target + 1)
        prompt = self.prompt(example, target)
        base = prompt.removesuffix(self.habits.prompt_only)
        if not text.startswith(base) and reasoning_of(message):
            bare = replace(example, messages=(*example.messages[:target], without_reasoning(message)))
            if self._render(bare, target + 1).startswith(base):
                # A prompt that closes the thought, such as enable_thinking=false, leaves reasoning no place.
                return self.draft_turn(bare, target)
        region = self._behind_prompt(text, prompt, message)
        if region is None:
            raise DataError(f"the chat template does not show the answer of message {target + 1}")
        if message.get("tool_calls"):
            self._refuse_lost_calls(example, target, text, region)
        start, end, add_eos = self._locate(region, message)
        masked = self._reasoning_before(region[start:end], example, target) if self._masks(message) else 0
        answer = Answer(len(prompt), len(prompt) + start + masked, len(prompt) + end, masked)
        return Draft(prompt + (region[:end] if add_eos else region), (answer,), add_eos)

    def _masks(self, message: Message) -> bool:
        return self.thinking == "mask" and bool(reasoning_of(message))

    def _reasoning_before(self, said: str, example: Example, target: int) -> int:
        """How many characters of an answer are its reasoning: it ends as it would had there been none."""
        bare = without_reasoning(example.messages[target])
        alone = self.draft_turn(replace(example, messages=(*example.messages[:target], bare)), target)
        rest = alone.text[alone.answers[0].start : alone.answers[0].end]
        if not said.endswith(rest):
            hint = "chat.thinking=follow_template or drop"
            raise DataError(f"the reasoning of message {target + 1} cannot be told from its answer", hint=hint)
        return len(said) - len(rest)

    def _behind_prompt(self, text: str, prompt: str, message: Message) -> str | None:
        base = prompt.removesuffix(self.habits.prompt_only)
        if text.startswith(prompt):
            return text[len(prompt) :]
        if text.startswith(base):
            return text[len(base) :]
        # The answer changes what stands before it: take the answer, and keep the server's prompt.
        at = self._find_said(text, message["content"], len(text))
        return text[at:] if at >= 0 else None

    def prompt(self, example: Example, target: int) -> str:
        """What a server would render before the message `target`."""
        return render(self.tokenizer, example.messages[:target], example.tools, generation_prompt=True)

    def render_whole(self, example: Example) -> str:
        """The whole conversation, nothing to be answered."""
        return self._render(example, len(example.messages))

    def _draft_together(self, example: Example, targets: Sequence[int]) -> Draft | None:
        last = self.draft_turn(example, targets[-1])
        answers = []
        for target in targets[:-1]:
            prompt = self.prompt(example, target)
            if not last.text.startswith(prompt):
                return None
            answer = self._locate_inside(last.text, len(prompt), example, target)
            if answer is None:
                return None
            answers.append(answer)
        return Draft(last.text, (*answers, *last.answers), last.add_eos)

    def _locate_inside(self, text: str, prompt: int, example: Example, target: int) -> Answer | None:
        """An earlier answer within the whole conversation, if it stands there as it would as the last."""
        message = example.messages[target]
        simple = not message.get("tool_calls") and not self._masks(message)
        if simple and text.startswith(self.habits.lead + message["content"], prompt):
            start = prompt + len(self.habits.lead)
            end = start + len(message["content"])
            if self.habits.end and text.startswith(self.habits.end, end):
                return Answer(prompt, start, end + len(self.habits.end))
        alone = self.draft_turn(example, target)
        end = alone.answers[0].end
        return alone.answers[0] if not alone.add_eos and text.startswith(alone.text[:end]) else None

    def _locate(self, region: str, message: Message) -> tuple[int, int, bool]:
        """Start and end of what is learned in the text after the prompt, and whether an EOS has to be added."""
        found = None if message.get("tool_calls") else self._locate_content(region, message["content"])
        if found:
            return found[0], found[1] + len(self.habits.end), not self.habits.end
        end = self._end_of_turn(region)
        add_eos = end is None
        end = len(region.rstrip()) if end is None else end
        if message.keys() <= PLAIN_KEYS:  # whatever stands before the row's own text is the template's
            start = self._find_said(region, message["content"], end)
            if start >= 0:
                return start, end, add_eos
        # Rewritten content, reasoning, tool calls: all of it comes from the row, but for the template's usual lead.
        return len(self.habits.lead) if region.startswith(self.habits.lead) else 0, end, add_eos

    def _locate_content(self, region: str, content: str) -> tuple[int, int] | None:
        for lead in dict.fromkeys((self.habits.lead, "")):
            if region.startswith(lead):
                for text in dict.fromkeys((content, content.rstrip(), content.lstrip(), content.strip())):
                    end = len(lead) + len(text)
                    if text and region.startswith(text, len(lead)) and self._ends_turn(region, end):
                        return len(lead), end
        return None

    def _find_said(self, text: str, content: str, end: int) -> int:
        """Where `content` (or without the blanks round it) last stands before `end`, best with nothing but ends behind;
        a word of the template, such as `n` in <|end|>, is not taken for it."""
        for said in dict.fromkeys((content, content.strip())):
            at = text.rfind(said, 0, end) if said.strip() else -1
            while at >= 0:
                if self._only_ends.fullmatch(text, at + len(said), end):
                    return at
                at = text.rfind(said, 0, at + len(said) - 1)
        return text.rfind(content.strip(), 0, end) if content.strip() else -1

    def _ends_turn(self, region: str, at: int) -> bool:
        return region.startswith(self.habits.end, at) if self.habits.end else not region[at:].strip()

    def _end_of_turn(self, region: str) -> int | None:
        """Where the run of special tokens at the region's end ends the turn: at the usual one, else after the last."""
        text, after_last, usual = region.rstrip(), None, self.habits.end.strip()
        ends = self.special + ((usual,) if usual else ())
        while text.endswith(ends):
            after_last = after_last or len(text)
            token = next(token for token in ends if text.endswith(token))
            if usual and text.endswith(usual):
                return len(text)
            text = text[: -len(token)].rstrip()
        return after_last

    def _count_losses(self, message: Message, target: int, text: str, answer: Answer) -> None:
        reasoning = reasoning_of(message)
        if reasoning and reasoning not in text[answer.start - answer.masked : answer.end]:
            if self.thinking == "error":
                what = f"the template drops the reasoning of message {target + 1}"
                raise DataError(what, hint="chat.thinking=follow_template or drop")
            self.report.dropped_reasoning += len(reasoning)
            self.report.dropped_characters += len(reasoning) if message.get("tool_calls") else 0
        self.report.masked_reasoning += answer.masked
        self.report.led_answers += bool(text[answer.prompt : answer.start - answer.masked].strip())
        if message.get("tool_calls"):  # their content is rewritten altogether; _refuse_lost_calls looks after them
            return
        shown = answer.end - answer.start + answer.masked - len(self.habits.end)
        content, field = message["content"], reasoning if any(message.get(name) for name in FIELDS) else ""
        kept = len(content.strip()) + len(field)
        self.report.dropped_characters += max(0, kept - shown)
        if kept <= shown < len(content):
            self.report.trimmed_characters += len(content) - shown

    def _compare_markers(self, example: Example, targets: Sequence[int], drafts: Sequence[Draft]) -> None:
        """Count the conversations whose markers differ from what is learned; raises DataError for wrong ones."""
        answers = [
            at for at, message in enumerate(example.messages[: targets[-1] + 1]) if message["role"] == "assistant"
        ]
        last = drafts[-1]
        whole = len(drafts) == 1 and list(targets) == answers
        marked = marked_spans(self.tokenizer, example.messages[: targets[-1] + 1], example.tools)
        ours = last.answers if whole else last.answers[-1:]
        since = 0 if whole else ours[0].prompt
        spans = [(answer.start, answer.end) for answer in ours]
        different = differs(last.text, spans, marked, around=self.around_answer, since=since)
        self.report.marker_differences += different

    def _refuse_lost_calls(self, example: Example, target: int, text: str, region: str) -> None:
        """Raise DataError when the template renders a message's tool calls not at all, or only some of them."""
        message = example.messages[target]
        calls = message["tool_calls"]
        fewer = [[], *([*calls[:at], *calls[at + 1 :]] for at in range(len(calls) if len(calls) > 1 else 0))]
        if not all(_name(call) in region for call in calls) or any(
            self._same_without(example, target, text, kept) for kept in fewer
        ):
            what = f"the chat template leaves out the tool calls of message {target + 1}"
            raise DataError(what, hint="chat.template=FILE with a template that renders them")

    def _same_without(self, example: Example, target: int, text: str, calls: list[dict[str, Any]]) -> bool:
        """Whether the template renders the same text when the message has no more than `calls`."""
        message = {**example.messages[target], "tool_calls": calls}
        if not calls:
            del message["tool_calls"]
        try:
            return self._render(replace(example, messages=(*example.messages[:target], message)), target + 1) == text
        except DataError:  # it looks for the calls, then
            return False

    def _render(self, example: Example, upto: int) -> str:
        return render(self.tokenizer, example.messages[:upto], example.tools)

    def _probe(self) -> tuple[str, str, Habits]:
        asked = [{"role": "user", "content": QUESTION}]
        answered = [*asked, {"role": "assistant", "content": ANSWER}]
        try:
            with time_limit():
                prompt, text = self._render_probe(asked, True), self._render_probe(answered, False)
        except DataError as fault:
            hint = "chat.template_options sets its variables; chat.template=plain does without it"
            raise ModelError(fault.what, where="a probe", hint=hint) from None
        at = text.rfind(ANSWER)
        if at < 0:
            raise ModelError("the chat template does not show an assistant's answer", hint="chat.template=plain")
        end = self._first_end(text[at + len(ANSWER) :])
        shared = next(size for size in range(len(prompt), -1, -1) if text[:at].startswith(prompt[:size]))
        return prompt, text, Habits(text[shared:at], end, prompt[shared:])

    def _first_end(self, tail: str) -> str:
        """What follows an answer, up to and with the first token that can end a turn."""
        found = [(tail.find(token), -len(token), token) for token in self.ends if token in tail]
        if not found:
            return ""
        position, _, token = min(found)
        return tail[:position] + token

    def _render_probe(self, messages: list[Message], generation_prompt: bool) -> str:
        return render(self.tokenizer, messages, generation_prompt=generation_prompt)


def _name(tool: dict[str, Any]) -> str:
    """The name of a tool or of a tool call."""
    return str(tool.get("function", tool).get("name", ""))
