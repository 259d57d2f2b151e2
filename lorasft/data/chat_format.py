"""How a tokenizer with its chat template writes a conversation: prompts, what ends an answer, and where answers are.

The prompt of an answer is what a server would render; the answer is the text of the row and what ends the turn. Nothing
is known of any template: its style is read off a rendering of a probe, and each conversation is checked against it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from lorasft.data.encoding import FIRST, MARK, TextEncoder
from lorasft.data.examples import Example, Message, reasoning_of, without_reasoning
from lorasft.data.sources import RowLocation
from lorasft.data.templates import WORD, render, set_template
from lorasft.data.tokenizer import FastTokenizer
from lorasft.errors import DataError, ModelError
from lorasft.recipe import ChatSettings

PLAIN_KEYS = {"role", "content", "name", "train", "weight"}
ENTITY = re.compile(r"&(?:#\w+|quot|amp|lt|gt|apos);")
QUESTION, ANSWER = "Which word comes first?", "lorasftProbeAnswer"  # nothing a template would trim or rewrite


@dataclass(frozen=True)
class TemplateStyle:
    """What a template does with the last answer, read off the rendering of one question and its answer."""

    prompt: str  # of the probe's question
    text: str  # of the question and its answer
    answer_prefix: str  # between prompt and answer
    end_of_turn: str  # after an answer, up to and with the first token that can end a turn
    prompt_only: str  # in the generation prompt, and not before a rendered answer


@dataclass(frozen=True)
class AnswerSpan:
    """Characters of a text: the prompt ends at `prompt`; `start` to `end` is supervised."""

    prompt: int
    start: int
    end: int
    weight: float = 1.0


@dataclass(frozen=True)
class MarkedText:
    """The text of one sequence, and its answers; `add_eos`: nothing in it ends the last one."""

    text: str
    answers: tuple[AnswerSpan, ...]
    add_eos: bool = False


class ChatFormat:
    """A tokenizer and the template of a recipe: what a server feeds, what ends an answer, and where answers are."""

    def __init__(self, tokenizer: FastTokenizer, chat: ChatSettings) -> None:
        """Sets the recipe's template on `tokenizer`. Raises ModelError when they do not go together."""
        set_template(tokenizer, chat)
        self.tokenizer = tokenizer
        self.chat = chat
        self.style = read_style(tokenizer)
        self.encoder = TextEncoder(tokenizer, prompt=self.style.prompt)
        self._lost: dict[Any, int | None] = {}  # for each pattern of messages
        self._end = self.style.end_of_turn.strip()
        self._ends = (*self.encoder.control, *([self._end] if self._end else ()))
        self._control = re.compile("|".join(map(re.escape, (*self.encoder.control, MARK))))
        end = tokenizer.backend_tokenizer.encode(self._end, add_special_tokens=False).ids[-1:]
        self.eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.stop_ids = tuple(dict.fromkeys([*end, *self.eos]))  # what ends an answer, the usual one first
        if not self.stop_ids:
            hint = "chat.template=FILE with one that ends answers, or an eos_token in the tokenizer's config"
            raise ModelError("neither the chat template nor the tokenizer has a token that ends an answer", hint=hint)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """What a server would feed the model for these messages, to be answered."""
        asked = self.complete(Example(tuple(messages), None, None, RowLocation("prompt", 1)))
        text = self.render(asked, len(asked.messages), answered=False)
        return self.encoder.encode([(text, len(text))])[text].ids

    def complete(self, example: Example) -> Example:
        """The example with the recipe's system text, and placeholders for control tokens that are meant as text.
        Raises DataError for those that are not allowed."""
        messages, system = example.messages, self.chat.system
        if system is not None and messages and all(message["role"] != "system" for message in messages):
            messages = ({"role": "system", "content": system}, *messages)
        content = json.dumps([example.text, messages, example.tools or (), example.variables], ensure_ascii=False)
        if not self._control.search(content):
            return replace(example, messages=messages)
        text, settled, tools, variables = json.loads(self._control.sub(self._replace_control, content))
        return replace(example, text=text, messages=tuple(settled), tools=tuple(tools) or None, variables=variables)

    def _replace_control(self, found: re.Match[str]) -> str:
        token = found.group()
        if self.chat.control_tokens == "error" or token == MARK:
            hint = "a row that is templated already: give its messages; plain text: chat.control_tokens=as_text"
            raise DataError(f"the content holds the control token {token}", hint=hint)
        return MARK + chr(FIRST + self.encoder.control.index(token))

    def mark(self, example: Example, targets: Sequence[int]) -> tuple[MarkedText, ...]:
        """One text that holds all answers (`targets`: message indices), or one per answer where that is not exact."""
        if not targets:
            return ()
        last, answers = self.mark_last(example, targets[-1]), []
        self.refuse_lost(example, targets)
        for target in targets[:-1]:
            answer = self._locate_earlier(last.text, example, target)
            if answer is None:
                return tuple(self.mark_last(example, target) for target in targets)
            answers.append(answer)
        return (replace(last, answers=(*answers, *last.answers)),)

    def mark_last(self, example: Example, target: int) -> MarkedText:
        """The conversation up to one answer, exactly as it is when that answer is the last."""
        message = example.messages[target]
        text, prompt = self.render(example, target + 1), self.render(example, target, answered=False)
        base = prompt.removesuffix(self.style.prompt_only)
        if not text.startswith(base) and reasoning_of(message):
            bare = replace(example, messages=(*example.messages[:target], without_reasoning(message)))
            if self.render(bare, target + 1).startswith(base):
                # A prompt that closes the thought, such as enable_thinking=false, leaves reasoning no place.
                return self.mark_last(bare, target)
        region = next((text[len(head) :] for head in (prompt, base) if text.startswith(head)), None)
        if region is None:
            # The answer changes what is before it: take the answer, and keep the server's prompt.
            said = self._find_said(text, message["content"])
            if said is None:
                raise DataError(f"the chat template does not show the answer of message {target + 1}")
            region = text[said[0] :]
        if message.get("tool_calls"):
            self.refuse_lost(example, [target + 1], first=target, answered=True)
        start, end, add_eos = self._locate(region, message)
        if self._masks(message):
            start += self._count_reasoning(region[start:end], example, target)
        self.refuse_markup(example, text)
        answer = AnswerSpan(len(prompt), len(prompt) + start, len(prompt) + end, message.get("weight", 1.0))
        return MarkedText(prompt + (region[:end] if add_eos else region), (answer,), add_eos)

    def _locate_earlier(self, text: str, example: Example, target: int) -> AnswerSpan | None:
        """An earlier answer within the whole conversation, if it is there as it would be as the last."""
        message, style, prompt = example.messages[target], self.style, self.render(example, target, answered=False)
        usual = prompt + style.answer_prefix + message["content"] + style.end_of_turn
        if style.end_of_turn and text.startswith(usual) and not (message.get("tool_calls") or self._masks(message)):
            weight = message.get("weight", 1.0)
            return AnswerSpan(len(prompt), len(prompt + style.answer_prefix), len(usual), weight)
        alone = self.mark_last(example, target)
        end = alone.answers[0].end
        return alone.answers[0] if not alone.add_eos and text.startswith(alone.text[:end]) else None

    def _locate(self, region: str, message: Message) -> tuple[int, int, bool]:
        """Start and end of what is supervised in the text after the prompt, and whether an EOS has to be added."""
        end = self._end_of_turn(region)
        prefix = len(self.style.answer_prefix) if region.startswith(self.style.answer_prefix) else 0
        # Whatever is before a row's own text is the template's. Rewritten content, reasoning, tool calls: all of it
        # comes from the row, but for the template's usual prefix.
        said = self._find_said(region, message["content"]) if message.keys() <= PLAIN_KEYS else None
        start, content_end = said or (prefix, 0)
        return start, max(content_end, len(region.rstrip())) if end is None else end, end is None

    def _find_said(self, text: str, content: str) -> tuple[int, int] | None:
        """Where `content`, with those of the blanks around it that the template keeps, is the last time before the end
        of the turn."""
        said = content.strip()
        start = text[: self._end_of_turn(text)].removesuffix(self._end).rfind(said) if said else -1
        if start < 0:
            return None
        before, _, after = content.partition(said)
        end = start + len(said)
        kept = after if text.startswith(after, end) else ""
        return len(text[:start].removesuffix(before)), end + len(kept)

    def _end_of_turn(self, region: str) -> int | None:
        """Where the run of special tokens at the region's end ends the turn: at the usual one, else after the last."""
        text, after_last = region.rstrip(), None
        while text.endswith(self._ends):
            after_last = after_last or len(text)
            if self._end and text.endswith(self._end):
                return len(text)
            text = text.removesuffix(next(token for token in self._ends if text.endswith(token))).rstrip()
        return after_last

    def _masks(self, message: Message) -> bool:
        return self.chat.thinking == "mask" and bool(reasoning_of(message))

    def _count_reasoning(self, said: str, example: Example, target: int) -> int:
        """How many characters of an answer are its reasoning: it ends as it would had there been none."""
        bare = (*example.messages[:target], without_reasoning(example.messages[target]))
        alone = self.mark_last(replace(example, messages=bare), target)
        rest = alone.text[alone.answers[0].start : alone.answers[0].end]
        if not said.endswith(rest):
            hint = "chat.thinking=follow_template or drop"
            raise DataError(f"the reasoning of message {target + 1} cannot be told from its answer", hint=hint)
        return len(said) - len(rest)

    def refuse_lost(self, example: Example, prompts: Sequence[int], *, first: int = 0, answered: bool = False) -> None:
        """Raise DataError for a message from `first` on that is not shown, or not all its calls, where those before one
        of `prompts` are rendered. `answered`: no answer is to follow. Looked at once for messages of the same shape."""
        messages = example.messages[: max(prompts)]
        shapes = [(m["role"], (m["content"] or " ").isspace(), len(m.get("tool_calls", ())), *m) for m in messages]
        key = (tuple(shapes), bool(example.tools), *example.variables, *prompts, first, answered)
        if key not in self._lost:
            marked = tuple(_with_word(message, f"{WORD}{index}x") for index, message in enumerate(messages))
            words = [re.findall(rf"{WORD}\w+", str(message)) for message in marked]
            missing = set()
            for upto in prompts:
                with suppress(DataError):  # a template that refuses the words has not refused the row
                    text = self.render(replace(example, messages=marked), upto, answered).lower()
                    missing |= {n for n in range(first, upto) if any(word not in text for word in words[n])}
            self._lost[key] = min(missing, default=None)
        if (index := self._lost[key]) is not None:
            number, role, calls = index + 1, messages[index]["role"], "tool_calls" in messages[index]
            lost = f"the tool calls of message {number}" if calls else f"message {number} ({role})"
            hint = "chat.template=FILE with one that shows it, or write it into another message"
            raise DataError(f"the chat template leaves out {lost}", hint=hint)

    def refuse_markup(self, example: Example, text: str) -> None:
        """Raise DataError where a rendered text has characters of its row as HTML writes them."""
        found = set(ENTITY.findall(text)) if "&" in text else ()
        own = json.dumps([example.messages, example.tools, self.tokenizer.chat_template]) if found else ""
        if escaped := [entity for entity in found if entity not in own]:
            what = f"the chat template writes {', '.join(sorted(escaped))} for characters of the row"
            raise DataError(what, hint="chat.template=FILE with one that does not escape HTML")

    def render(self, example: Example, upto: int, answered: bool = True) -> str:
        """The conversation up to a message: with nothing to be answered, or else as a server's prompt for an answer."""
        messages = example.messages[:upto]
        return render(self.tokenizer, messages, example.tools, example.variables, generation_prompt=not answered)


def read_style(tokenizer: FastTokenizer) -> TemplateStyle:
    """The style of the tokenizer's template. Raises ModelError when it is broken."""
    asked = [{"role": "user", "content": QUESTION}]
    try:
        prompt = render(tokenizer, asked, generation_prompt=True)
        text = render(tokenizer, [*asked, {"role": "assistant", "content": ANSWER}])
    except DataError as error:
        hint = "chat.template_options sets its variables; chat.template=plain does without it"
        raise ModelError(error.what, where=tokenizer.name_or_path, hint=hint) from None
    at = text.rfind(ANSWER)
    if at < 0:
        what = "the chat template does not show an assistant's answer"
        raise ModelError(what, where=tokenizer.name_or_path, hint="chat.template=plain")
    tail = text[at + len(ANSWER) :]
    tokens = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    # Gemma has newlines among them.
    ends = [(tail.find(token), -len(token), token) for token in tokens if token.strip() and token in tail]
    end = tail[: min(ends)[0]] + min(ends)[2] if ends else ""
    shared = next(size for size in range(len(prompt), -1, -1) if text[:at].startswith(prompt[:size]))
    return TemplateStyle(prompt, text, answer_prefix=text[shared:at], end_of_turn=end, prompt_only=prompt[shared:])


def _with_word(message: Message, word: str) -> Message:
    """The message with a word to be looked for as its text, unless that is empty, or in the names of its calls."""
    calls = message.get("tool_calls", ())
    names = [call | {"function": call["function"] | {"name": f"{word}{n}x"}} for n, call in enumerate(calls)]
    if names:
        return message | {"tool_calls": names}
    return message | {"content": word} if message["content"].strip() else message
