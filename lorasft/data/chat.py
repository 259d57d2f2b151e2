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
from lorasft.data.examples import BLOCK, Example, Message
from lorasft.data.reasoning import reasoning_of, without_reasoning
from lorasft.data.report import BadRows, Report
from lorasft.data.sources import Place
from lorasft.data.templates import merges_system, set_template, time_limit
from lorasft.data.tokenizer import adds_bos
from lorasft.data.tokens import UNSUPERVISED, Tokens, supervised_runs
from lorasft.data.turns import Answer, Draft, TurnFinder
from lorasft.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from lorasft.recipe import ChatSettings, DataSettings

Drafted = tuple[Example, tuple[Draft, ...]]


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
        self.turns = TurnFinder(tokenizer, report, thinking=chat.thinking)
        habits, prompt = self.turns.habits, self.turns.probe_prompt
        self.aligner = Aligner(tokenizer, self.turns.special, probe=prompt, lead=habits.lead, end=habits.end)
        self.bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
        self.eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ender = tokenizer.backend_tokenizer.encode(habits.end.strip(), add_special_tokens=False).ids[-1:]
        self.stop_ids = tuple(dict.fromkeys([*ender, *self.eos]))  # what ends an answer, under this template
        if not self.stop_ids:
            hint = "chat.template=FILE with one that ends answers, or an eos_token in the tokenizer's config"
            raise ModelError("neither the chat template nor the tokenizer has a token that ends an answer", hint=hint)
        self.special = np.array(sorted(tokenizer.added_tokens_decoder), dtype=np.int64)
        self._seen = np.zeros(max(len(tokenizer), *(self.special + 1), 1), dtype=bool)
        self.merges_system = merges_system(tokenizer)
        self.reads_thinking = "</think>" in str(tokenizer.chat_template)

    def encode(self, example: Example) -> tuple[Tokens, ...]:
        """The sequences of one example; none when it was dropped (the report counts it).

        Raises DataError with the example's place.
        """
        try:
            with time_limit():
                drafts = self._draft(example)
            return self._finish(example, drafts, self.aligner.encode(_texts_of(drafts)))
        except DataError as fault:
            raise DataError(fault.what, where=str(example.place), hint=fault.hint) from None

    def encode_all(self, examples: Iterable[Example], *, bad: BadRows) -> Iterator[tuple[Example, tuple[Tokens, ...]]]:
        """As `encode`, many at once; dropped examples are left out and bad ones go to `bad`."""
        stream = iter(examples)
        while block := list(islice(stream, BLOCK)):
            drafted = self._draft_block(block, bad)
            encodings = self.aligner.encode([text for _, drafts in drafted for text in _texts_of(drafts)])
            yield from self._finish_block(drafted, encodings, bad)

    def _finish_block(
        self, drafted: list[Drafted], encodings: list[Encoding], bad: BadRows
    ) -> Iterator[tuple[Example, tuple[Tokens, ...]]]:
        stream = iter(encodings)
        for example, drafts in drafted:
            own = list(islice(stream, sum(1 + len(draft.answers) for draft in drafts)))
            try:
                sequences = self._finish(example, drafts, own)
            except DataError as fault:
                bad.add(DataError(fault.what, where=str(example.place), hint=fault.hint))
                continue
            if sequences:
                yield example, sequences

    def count_in(self, report: Report) -> None:
        """Count in `report` from now on."""
        self.report = self.turns.report = report

    def learned_special(self) -> tuple[int, ...]:
        """The ids of the added tokens that were learned so far."""
        return tuple(self.special[self._seen[self.special]].tolist())

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None) -> list[int]:
        """What a server would feed the model for these messages, to be answered."""
        asked = self._with_system(Example(tuple(messages), tuple(tools) if tools else None, None, Place("prompt", 1)))
        text = self.turns.prompt(self._settle_control_tokens(asked), len(asked.messages))
        return list(self.aligner.encode([text])[0].ids)

    def _draft_block(self, block: list[Example], bad: BadRows) -> list[Drafted]:
        drafted = []
        with time_limit() as start_again:
            for example in block:
                start_again()
                try:
                    if drafts := self._draft(example):
                        drafted.append((example, drafts))
                except DataError as fault:
                    bad.add(DataError(fault.what, where=str(example.place), hint=fault.hint))
        return drafted

    def _draft(self, example: Example) -> tuple[Draft, ...]:
        example = self._settle_control_tokens(self._with_system(example))
        if example.text is not None:
            return (Draft(example.text, ()),)
        self._refuse_half_thoughts(example)
        if self.chat.thinking == "drop":
            example = self._drop_reasoning(example)
        self.report.merged_systems += self.merges_system and example.messages[0]["role"] == "system"
        if self.chat.supervise == "everything":
            return (Draft(self.turns.render_whole(example), ()),)
        targets = self._targets(example.messages)
        if not targets:
            self._drop_without_target(example)
        return self.turns.draft(example, targets)

    def _drop_reasoning(self, example: Example) -> Example:
        bare = tuple(without_reasoning(m) if m["role"] == "assistant" else m for m in example.messages)
        for before, after in zip(example.messages, bare, strict=True):
            if before["content"].strip() and not after["content"].strip() and "tool_calls" not in after:
                raise DataError("an answer that is nothing but reasoning", hint="chat.thinking=follow_template")
            self.report.dropped_reasoning += len(reasoning_of(before)) if after is not before else 0
        return replace(example, messages=bare)

    def _with_system(self, example: Example) -> Example:
        messages, system = example.messages, self.chat.system
        if system is None or not messages or any(message["role"] == "system" for message in messages):
            return example
        return replace(example, messages=({"role": "system", "content": system}, *messages))

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
        learned = []
        for tokens in fitting:
            targets = tokens.labels[tokens.labels != UNSUPERVISED]
            if len(targets):
                learned.append(tokens)
                self._seen[targets] = True
                self.report.tokens += len(tokens)
                self.report.supervised_tokens += len(targets)
        if fitting and not learned:
            self._drop_without_target(example)
        self.report.sequences += len(learned)
        return tuple(learned)

    def _drop_without_target(self, example: Example) -> None:
        self.report.examples_without_target += 1
        self.report.note_dropped(example.place, "nothing to learn")

    def _label_drafts(self, drafts: Sequence[Draft], encodings: Sequence[Encoding]) -> list[Tokens]:
        """Ids and labels of drafts; `encodings` are of each draft's text and then of its prompts, in turn."""
        stream = iter(encodings)
        labelled: list[Tokens] = []
        for draft in drafts:
            whole, prompts = next(stream), [next(stream).ids for _ in draft.answers]
            fits = all(whole.ids[: len(prompt)] == prompt for prompt in prompts)
            if not fits and len(draft.answers) > 1:
                # A token holds the end of a prompt and the start of its answer: no one sequence has every prompt right.
                self.report.split_conversations += 1
                alone = [Draft(draft.text[: answer.end], (answer,)) for answer in draft.answers[:-1]]
                alone.append(replace(draft, answers=draft.answers[-1:]))
                return self._label_drafts(alone, self.aligner.encode(_texts_of(alone)))
            tokens = self._learn(draft, whole, prompts) if fits else self._label_joined(draft)
            self.report.answers += len(prompts)
            self.report.parity_breaks += parity_breaks(tokens, prompts)
            labelled.append(tokens)
        return labelled

    def _label_joined(self, draft: Draft) -> Tokens:
        """The server's prompt, then the one answer encoded alone."""
        self.report.straddling_tokens += 1
        cut = draft.answers[0].prompt
        encoding, count = self.aligner.join(draft.text[:cut], draft.text[cut:])
        return self._learn(draft, encoding, [encoding.ids[:count]])

    def _learn(self, draft: Draft, encoding: Encoding, prompts: Sequence[list[int]]) -> Tokens:
        ids = np.array(encoding.ids + (self.eos if draft.add_eos else []), dtype=np.int32)
        labels = np.full(len(ids), UNSUPERVISED, dtype=np.int32)
        for answer, prompt in zip(draft.answers, prompts, strict=True):
            first, end = self._answer_tokens(draft.text, answer, encoding, prompt=len(prompt))
            start = max(first, len(prompt))
            labels[start:end] = ids[start:end]
        if draft.add_eos:
            labels[-1] = ids[-1]
        labels[0] = UNSUPERVISED  # nothing comes before it that it could be learned from
        return Tokens(ids, labels)

    def _answer_tokens(self, text: str, answer: Answer, encoding: Encoding, *, prompt: int) -> tuple[int, int]:
        """First token of an answer, and the one after its last; `prompt`: tokens before it. A token that holds foreign
        text is not learned, unless that is a blank, which SentencePiece makes part of the word behind it."""
        known = self.aligner.span_from_ids(encoding, answer.start, answer.end, prompt=(answer.prompt, prompt))
        if known:
            return known
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
        limit, report = self.data.max_length, self.report
        longest = max(map(len, sequences))
        report.lengths.append(longest)
        if longest <= limit:
            return sequences
        sequences = [_without_tail(tokens) for tokens in sequences]  # what the template writes behind the last answer
        if max(map(len, sequences)) <= limit:
            return sequences
        if self.data.overlong == "error":
            hint = "raise data.max_length, or state data.overlong"
            raise DataError(f"{longest:,} tokens, over data.max_length ({limit:,})", hint=hint)
        fitted = self._shorten(sequences, example)
        lost = sum(map(_count_learned, sequences)) - sum(map(_count_learned, fitted))
        report.over_long_lost_tokens += max(lost, 0)  # windows of text learn again what each begins with
        return fitted

    def _shorten(self, sequences: list[Tokens], example: Example) -> list[Tokens]:
        limit, policy, report = self.data.max_length, self.data.overlong, self.report
        is_text = example.text is not None
        if policy == "split" and is_text:
            report.windowed_texts += 1
            return [window for tokens in sequences for window in _windows(tokens, limit, self.bos)]
        if policy == "truncate":
            report.truncated_examples += 1
            if is_text:
                return [_slice(tokens, 0, limit) for tokens in sequences]
            cut = [_cut_context(tokens, limit, self.bos) for tokens in sequences]
            report.answers_cut += sum(_loses_end(old, new) for old, new in zip(sequences, cut, strict=True))
            return cut
        report.over_long_examples += 1
        report.note_dropped(example.place, f"{max(map(len, sequences)):,} tokens, over data.max_length ({limit:,})")
        return []


def parity_breaks(tokens: Tokens, prompts: Sequence[list[int]]) -> int:
    """How many of a sequence's prompts (the ids that a server feeds, in turn) are not what its labels stand behind.

    Looks at nothing but the finished ids and labels, whatever made them.
    """
    learned = tokens.labels != UNSUPERVISED
    breaks, before = 0, 0
    for prompt in prompts:
        count = len(prompt)
        same = tokens.ids[:count].tolist() == prompt
        # The last token of a prompt is context, whoever answered before; of the first prompt, all are.
        context = learned[count - 1 : count] if before else learned[:count]
        breaks += not same or count <= before or bool(context.any())
        before = count
    return breaks


def _texts_of(drafts: Sequence[Draft]) -> list[str]:
    """The texts to encode for drafts: each one's own, then its prompts."""
    return [text for draft in drafts for text in (draft.text, *(draft.text[: a.prompt] for a in draft.answers))]


def _learn_all(ids: npt.ArrayLike) -> Tokens:
    """Every token but the first."""
    array = np.array(ids, dtype=np.int32)
    return _slice(Tokens(array, array), 0, len(array))


def _count_learned(tokens: Tokens) -> int:
    return int(np.count_nonzero(tokens.labels != UNSUPERVISED))


def _loses_end(before: Tokens, after: Tokens) -> bool:
    """Whether the last answer lost the token that ends it, and so teaches no stop."""
    return bool(after.labels[-1] != before.labels[supervised_runs(before)[-1, 1] - 1])


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
