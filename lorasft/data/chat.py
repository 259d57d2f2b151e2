"""Example -> Tokens: ids and labels, as a server that uses the same chat template would feed them.

turns.py       conversation -> text, with its answers marked
alignment.py   text -> ids, and which tokens an answer's characters are
here           what is supervised, what becomes of over-long examples
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lorasft.data.alignment import Aligner, Encoding
from lorasft.data.examples import Example, Message
from lorasft.data.report import BadRows, Report
from lorasft.data.rows import Place
from lorasft.data.templates import set_template
from lorasft.data.tokenizer import adds_bos, control_tokens
from lorasft.data.tokens import UNSUPERVISED, Tokens, supervised_runs
from lorasft.data.turns import Answer, Draft, TurnFinder
from lorasft.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from lorasft.recipe import ChatSettings, DataSettings

BLOCK = 512  # examples that are tokenized at once, in parallel


class Encoder:
    """Encodes examples with one tokenizer, under one recipe's chat and length settings."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, chat: ChatSettings, *, data: DataSettings, report: Report
    ) -> None:
        """Sets the recipe's template on `tokenizer`. Raises ModelError when they do not go together."""
        set_template(tokenizer, chat)
        self.chat = chat
        self.data = data
        self.report = report
        self.turns = TurnFinder(tokenizer, report)
        self.aligner = Aligner(tokenizer, control_tokens(tokenizer))
        self.bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
        self.eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ender = tokenizer.backend_tokenizer.encode(self.turns.habits.end.strip(), add_special_tokens=False).ids[-1:]
        self.stop_ids = tuple(dict.fromkeys([*ender, *self.eos]))  # what ends an answer, under this template
        if not self.stop_ids:
            hint = "chat.template=FILE with one that ends answers, or an eos_token in the tokenizer's config"
            raise ModelError("neither the chat template nor the tokenizer has a token that ends an answer", hint=hint)
        self.reads_thinking = "</think>" in str(tokenizer.chat_template)

    def encode(self, example: Example) -> tuple[Tokens, ...]:
        """The sequences of one example; none when it was dropped (the report counts it).

        Raises DataError with the example's place.
        """
        try:
            drafts = self._draft(example)
            return self._finish(example, drafts, self.aligner.encode([draft.text for draft in drafts]))
        except DataError as fault:
            raise DataError(fault.what, where=str(example.place), hint=fault.hint) from None

    def encode_all(self, examples: Iterable[Example], *, bad: BadRows) -> Iterator[tuple[Example, tuple[Tokens, ...]]]:
        """As `encode`, many at once; dropped examples are left out and bad ones go to `bad`."""
        stream = iter(examples)
        while block := list(islice(stream, BLOCK)):
            drafted = [(example, drafts) for example in block if (drafts := self._draft_or_note(example, bad))]
            encodings = iter(self.aligner.encode([draft.text for _, drafts in drafted for draft in drafts]))
            for example, drafts in drafted:
                own = list(islice(encodings, len(drafts)))
                try:
                    sequences = self._finish(example, drafts, own)
                except DataError as fault:
                    bad.add(DataError(fault.what, where=str(example.place), hint=fault.hint))
                    continue
                if sequences:
                    yield example, sequences

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None) -> list[int]:
        """What a server would feed the model for these messages, to be answered."""
        asked = Example(self._with_system(tuple(messages)), tuple(tools) if tools else None, None, Place("prompt", 1))
        text = self.turns.prompt(self._settle_control_tokens(asked), len(asked.messages))
        return list(self.aligner.encode([text])[0].ids)

    def _draft_or_note(self, example: Example, bad: BadRows) -> tuple[Draft, ...]:
        try:
            return self._draft(example)
        except DataError as fault:
            bad.add(DataError(fault.what, where=str(example.place), hint=fault.hint))
            return ()

    def _draft(self, example: Example) -> tuple[Draft, ...]:
        example = self._settle_control_tokens(replace(example, messages=self._with_system(example.messages)))
        if example.text is not None:
            return (Draft(example.text, ()),)
        self._refuse_half_thoughts(example)
        if self.chat.supervise == "everything":
            return (Draft(self.turns.render_whole(example), ()),)
        targets = self._targets(example.messages)
        if not targets:
            self.report.examples_without_target += 1
        return self.turns.draft(example, targets)

    def _with_system(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        if self.chat.system is None or not messages or any(message["role"] == "system" for message in messages):
            return messages
        return ({"role": "system", "content": self.chat.system}, *messages)

    def _targets(self, messages: tuple[Message, ...]) -> list[int]:
        """The indices of the messages that are learned."""
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if self.chat.supervise == "last":
            return answers[-1:]
        if self.chat.supervise == "flagged":
            some = any(messages[index].get("train") for index in answers)
            return [index for index in answers if messages[index].get("train", not some)]
        return answers

    def _settle_control_tokens(self, example: Example) -> Example:
        content = [example.text, list(example.messages), list(example.tools or ())]
        found = next((token for text in _texts(content) if (token := self.aligner.find_control(text))), None)
        if found is None:
            return example
        if self.chat.control_tokens == "error":
            hint = "if it is meant as plain text: chat.control_tokens=as_text"
            raise DataError(f"the content holds the control token {found}", hint=hint)
        text, messages, tools = _map_texts(content, self.aligner.hide_control)
        return replace(example, text=text, messages=tuple(messages), tools=tuple(tools) or None)

    def _refuse_half_thoughts(self, example: Example) -> None:
        for message in example.messages if self.reads_thinking else ():
            content = message["content"]
            if message["role"] == "assistant" and content.count("<think>") != content.count("</think>"):
                hint = "write <think>...</think>answer, or give reasoning_content"
                raise DataError("an answer with <think> or </think> alone, which the template would cut", hint=hint)

    def _finish(self, example: Example, drafts: Sequence[Draft], encodings: Sequence[Encoding]) -> tuple[Tokens, ...]:
        if example.text is not None:
            sequences = [_learn_all(self.bos + encodings[0].ids + self.eos)]
        elif self.chat.supervise == "everything":
            sequences = [_learn_all(encodings[0].ids)]
        else:
            sequences = self._label_drafts(drafts, encodings)
        fitting = self._fit(sequences, example) if sequences else []
        learned = [tokens for tokens in fitting if (tokens.labels != UNSUPERVISED).any()]
        if fitting and not learned:
            self.report.examples_without_target += 1
        self.report.sequences += len(learned)
        self.report.tokens += sum(map(len, learned))
        self.report.supervised_tokens += sum(int((tokens.labels != UNSUPERVISED).sum()) for tokens in learned)
        return tuple(learned)

    def _label_drafts(self, drafts: Sequence[Draft], encodings: Sequence[Encoding]) -> list[Tokens]:
        found = [self._label(draft, encoding) for draft, encoding in zip(drafts, encodings, strict=True)]
        if found == [None] and len(drafts[0].answers) > 1:
            # A token holds the end of a prompt and the start of its answer: no one sequence has every prompt right.
            self.report.split_conversations += 1
            whole = drafts[0]
            drafts = [Draft(whole.text[: answer.end], (answer,)) for answer in whole.answers[:-1]]
            drafts.append(replace(whole, answers=whole.answers[-1:]))
            encodings = self.aligner.encode([draft.text for draft in drafts])
            found = [self._label(draft, encoding) for draft, encoding in zip(drafts, encodings, strict=True)]
        return [self._label_joined(draft) if one is None else one for draft, one in zip(drafts, found, strict=True)]

    def _label(self, draft: Draft, encoding: Encoding) -> Tokens | None:
        """Ids and labels of a draft, or None when a prompt's ids are not those that a server would feed."""
        counts = [self.aligner.prompt_tokens(draft.text, answer.prompt, encoding) for answer in draft.answers]
        if None in counts:
            return None
        return self._learn(draft, encoding, [count for count in counts if count is not None])

    def _label_joined(self, draft: Draft) -> Tokens:
        """The server's prompt, then the one answer encoded alone."""
        self.report.straddling_tokens += 1
        cut = draft.answers[0].prompt
        encoding, count = self.aligner.join(draft.text[:cut], draft.text[cut:])
        return self._learn(draft, encoding, [count])

    def _learn(self, draft: Draft, encoding: Encoding, counts: Sequence[int]) -> Tokens:
        ids = np.array(encoding.ids + (self.eos if draft.add_eos else []), dtype=np.int32)
        labels = np.full(len(ids), UNSUPERVISED, dtype=np.int32)
        for answer, count in zip(draft.answers, counts, strict=True):
            first, end = self._answer_tokens(draft.text, answer, encoding)
            labels[max(first, count) : end] = ids[max(first, count) : end]
        if draft.add_eos:
            labels[-1] = ids[-1]
        labels[0] = UNSUPERVISED  # nothing comes before it that it could be learned from
        return Tokens(ids, labels)

    def _answer_tokens(self, text: str, answer: Answer, encoding: Encoding) -> tuple[int, int]:
        """First token of an answer, and the one after its last. A token that holds foreign text is not learned,
        unless that is a blank, which SentencePiece makes part of the word behind it."""
        first = self.aligner.first_token(encoding, answer.start, answer.end)
        if first is None:
            return 0, 0
        last = self.aligner.last_token(encoding, answer.start, answer.end)
        start, end = encoding.token_to_chars(first), encoding.token_to_chars(last)
        before = bool(start and text[start[0] : answer.start].strip())
        behind = bool(end and text[answer.end : end[1]].strip())
        self.report.straddling_tokens += before + behind
        return first + before, last + 1 - behind

    def _fit(self, sequences: list[Tokens], example: Example) -> list[Tokens]:
        """The sequences of one example within `max_length`, by the over-long policy; none when it is dropped."""
        limit, policy = self.data.max_length, self.data.overlong
        longest = max(map(len, sequences))
        self.report.lengths.append(longest)
        if longest > limit:  # what the template writes behind the last answer may go first
            sequences = [_without_tail(tokens) for tokens in sequences]
        if max(map(len, sequences)) <= limit:
            return sequences
        if policy == "error":
            hint = "raise data.max_length, or state data.overlong"
            raise DataError(f"{longest:,} tokens, over data.max_length ({limit:,})", hint=hint)
        if policy == "split" and example.text is not None:
            return [window for tokens in sequences for window in _windows(tokens, limit, self.bos)]
        if policy == "truncate":
            self.report.truncated_examples += 1
            if example.text is not None:
                return [_slice(tokens, 0, limit) for tokens in sequences]
            return [_cut_context(tokens, limit, self.bos) for tokens in sequences]
        self.report.over_long_examples += 1
        return []


def _learn_all(ids: npt.ArrayLike) -> Tokens:
    """Every token but the first."""
    array = np.array(ids, dtype=np.int32)
    return _slice(Tokens(array, array), 0, len(array))


def _slice(tokens: Tokens, start: int, end: int) -> Tokens:
    labels = tokens.labels[start:end].copy()
    labels[:1] = UNSUPERVISED
    return Tokens(tokens.ids[start:end], labels)


def _without_tail(tokens: Tokens) -> Tokens:
    runs = supervised_runs(tokens)
    return _slice(tokens, 0, int(runs[-1, 1])) if len(runs) else tokens


def _windows(tokens: Tokens, limit: int, bos: list[int]) -> Iterator[Tokens]:
    """Text in windows that learn each token once: each begins with BOS, or with the token before its first."""
    for start in range(1, len(tokens), limit - 1):
        head = bos or tokens.ids[start - 1 : start]
        yield _learn_all(np.concatenate([head, tokens.ids[start : start + limit - 1]]))


def _cut_context(tokens: Tokens, limit: int, bos: list[int]) -> Tokens:
    """Cut the context from the left, but for BOS; an answer that is itself too long loses its end, and its stop."""
    if len(tokens) <= limit:
        return tokens
    head = int(tokens.ids[:1].tolist() == bos)
    start, end = (int(at) for at in supervised_runs(tokens)[-1])
    first = min(start - 1, end - limit) + head  # one token, or BOS, stays before the answer
    stop = min(end, first + limit - head)
    ids = np.concatenate([tokens.ids[:head], tokens.ids[first:stop]])
    labels = np.concatenate([tokens.labels[:head], tokens.labels[first:stop]])
    labels[0] = UNSUPERVISED
    return Tokens(ids, labels)


def _texts(value: Any) -> Iterator[str]:
    """All strings in a value of JSON, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of a value of JSON with all its strings changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _map_texts(item, change) for key, item in value.items()}
    return [_map_texts(item, change) for item in value] if isinstance(value, list) else value
