"""Example -> Tokens: which tokens of a conversation are supervised, and what becomes of over-long examples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np

from lorasft.data.chat_format import ChatFormat, MarkedText
from lorasft.data.encoding import Encoded
from lorasft.data.examples import Example, Message, reasoning_of, refuse_untrainable, without_reasoning
from lorasft.data.report import Report
from lorasft.data.store import UNSUPERVISED, Tokens, all_supervised, supervised_runs
from lorasft.data.templates import limits, read_template
from lorasft.data.tokenizer import adds_bos
from lorasft.errors import DataError
from lorasft.recipe import DataSettings


class Labeler:
    """Examples -> sequences in one chat format, under one recipe's settings. Counts in the report of its caller."""

    def __init__(self, chat_format: ChatFormat, data: DataSettings) -> None:
        self.format = chat_format
        self.chat = chat_format.chat
        self.data = data
        tokenizer = chat_format.tokenizer
        self._template = str(tokenizer.chat_template)
        self._merges_system = read_template("merge_system") in self._template
        self.bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []

    def encode_all(self, examples: Sequence[Example], *, report: Report) -> Iterator[tuple[Tokens, ...]]:
        """The sequences of each example: none of a dropped or bad one, which `report` counts."""
        marked: list[tuple[MarkedText, ...] | None] = []  # None: left out
        with limits():  # once, which is dearer than a rendering
            for example in examples:
                try:
                    marked.append(self._mark(example, report))
                except DataError as error:
                    report.add_error(error, example.place, policy=self.data.on_bad_row)
                    marked.append(None)
        encoded = self.format.encoder.encode(_texts_of(chain.from_iterable(filter(None, marked))))
        for example, texts in zip(examples, marked, strict=True):
            sequences: list[Tokens] | None = None
            try:
                if texts is not None:
                    sequences = self._fit(self._label(texts, encoded, report), example, report)
            except DataError as error:
                report.add_error(error, example.place, policy=self.data.on_bad_row)
            yield self._keep_supervised(sequences, example, report)

    def _mark(self, example: Example, report: Report) -> tuple[MarkedText, ...] | None:
        example = self.format.complete(example)
        if example.weight == 0:
            report.rows_of_weight_0 += 1
            return None
        if example.text is not None:
            return (MarkedText(example.text, (), add_eos=True),)
        answers = [message["content"] for message in example.messages if message["role"] == "assistant"]
        if "</think>" in self._template and any(text.count("<think>") != text.count("</think>") for text in answers):
            hint = "write <think>...</think>answer, or give reasoning_content"
            raise DataError("an answer with <think> or </think> alone, which the template would cut", hint=hint)
        if self.chat.thinking == "drop":
            report.dropped_reasoning += sum(len(reasoning_of(m)) for m in example.messages if m["role"] == "assistant")
            bare = tuple(without_reasoning(m) if m["role"] == "assistant" else m for m in example.messages)
            refuse_untrainable(bare)
            example = replace(example, messages=bare)
        if "documents" in example.variables and "documents" not in self._template:
            hint = "write their text into a message, or chat.template=FILE with a template that shows them"
            raise DataError("the chat template does not show the documents of this row", hint=hint)
        if self.chat.supervise == "everything":
            if unlike := [one for one in example.messages if one.get("train") is False or "weight" in one]:
                what = "has a weight of its own" if "weight" in unlike[0] else "is not to be learned"
                raise DataError(f"a message that {what}, under supervise: everything", hint="chat.supervise=all")
            text = self.format.render(example, len(example.messages))
            self.format.refuse_lost(example, [len(example.messages)], answered=True)
            self.format.refuse_markup(example, text)
            return (MarkedText(text, ()),)
        targets = self._targets(example)
        texts = self.format.mark(example, targets)
        found = ((marked, answer) for marked in texts for answer in marked.answers)
        for target, (marked, answer) in zip(targets, found, strict=True):
            self._count_losses(example.messages[target], target, marked.text[answer.prompt : answer.end], report)
        report.merged_systems += self._merges_system and example.messages[0]["role"] == "system"
        functions = [tool.get("function") for tool in example.tools or ()]
        names = [str(one["name"]) for one in functions if isinstance(one, dict) and "name" in one]
        report.tools_left_out += bool(names) and not any(name in marked.text for name in names for marked in texts)
        return texts

    def _targets(self, example: Example) -> list[int]:
        """The indices of the messages that are supervised: never one whose row says that it is not to be learned."""
        messages = example.messages
        first = 0 if example.completion is None else len(messages) - example.completion
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant" and index >= first]
        if self.chat.supervise == "last":
            answers = answers[-1:]
        some = self.chat.supervise == "flagged" and any(messages[index].get("train") for index in answers)
        return [index for index in answers if messages[index].get("train", not some)]

    def _count_losses(self, message: Message, target: int, rendered: str, report: Report) -> None:
        """Count what is not in the `rendered` answer. Raises DataError for reasoning that must not be lost."""
        reasoning = reasoning_of(message)
        if reasoning and reasoning not in rendered:
            if self.chat.thinking == "error":
                what = f"the template drops the reasoning of message {target + 1}"
                raise DataError(what, hint="chat.thinking=follow_template or drop")
            report.dropped_reasoning += len(reasoning)
        content = without_reasoning(message)["content"]
        if content not in rendered:
            kept = content.strip()
            report.dropped_characters += len(content) - len(kept) * (kept in rendered)

    def _label(self, texts: Sequence[MarkedText], encoded: Mapping[str, Encoded], report: Report) -> list[Tokens]:
        """Ids and labels; `encoded`: each text, and each prompt."""
        labelled: list[Tokens] = []
        broken = 0
        for marked in texts:
            whole, prompts = encoded[marked.text], [encoded[marked.text[: a.prompt]].ids for a in marked.answers]
            if not prompts:  # all is supervised: a raw text, or what the template makes of a conversation
                labelled.append(all_supervised(self.bos + whole.ids + self.format.eos if marked.add_eos else whole.ids))
                continue
            fits = all(whole.ids[: len(prompt)] == prompt for prompt in prompts)
            if not fits and len(prompts) > 1:
                # A token holds the end of a prompt and the start of its answer: no one sequence has every prompt right.
                alone = [MarkedText(marked.text[: answer.end], (answer,)) for answer in marked.answers[:-1]]
                alone.append(replace(marked, answers=marked.answers[-1:]))
                return self._label(alone, self.format.encoder.encode(_texts_of(alone)), report)
            if not fits:
                cut = marked.answers[0].prompt
                whole = self.format.encoder.encode_apart(marked.text[:cut], marked.text[cut:])
            tokens = self._supervise_answers(marked, whole, prompts)
            broken += parity_breaks(tokens, prompts)
            labelled.append(tokens)
        answers = sum(len(marked.answers) for marked in texts)
        report.parity_breaks += broken > 0
        if broken:
            what = f"{broken} of {answers} answers do not follow what a server would feed"
            raise DataError(what, hint="chat.template=FILE with another")
        report.answers += answers
        return labelled

    def _supervise_answers(self, marked: MarkedText, whole: Encoded, prompts: Sequence[list[int]]) -> Tokens:
        ids = np.array(whole.ids + (self.format.eos if marked.add_eos else []), dtype=np.int32)
        labels = np.full(len(ids), UNSUPERVISED, dtype=np.int32)
        weights = np.ones(len(ids), dtype=np.float32)
        for answer, prompt in zip(marked.answers, prompts, strict=True):
            if found := whole.tokens_between(answer.start, answer.end):
                (first, start, _), (last, _, stop) = found
                # A token that holds foreign text is not supervised, unless that is a blank, which SentencePiece makes
                # part of the word after it.
                before = bool(marked.text[start : answer.start].strip())
                after = bool(marked.text[answer.end : stop].strip())
                supervised = slice(max(first + before, len(prompt)), last + 1 - after)
                labels[supervised] = ids[supervised]
                weights[supervised] = answer.weight
        if marked.add_eos:
            labels[-1], weights[-1] = ids[-1], marked.answers[-1].weight
        labels[0] = UNSUPERVISED  # nothing comes before it that it could be predicted from
        return Tokens(ids, labels, weights if (weights != 1).any() else None)

    def _fit(self, sequences: list[Tokens], example: Example, report: Report) -> list[Tokens] | None:
        """The sequences of one example within `max_length`, by the over-long policy; None when it is dropped."""
        limit, policy, is_text = self.data.max_length, self.data.overlong, example.text is not None
        longest = max(map(len, sequences), default=0)
        if longest > limit:  # what the template writes after the last answer goes first
            sequences = [tokens[: _last_run(tokens)[1]] for tokens in sequences]
        if max(map(len, sequences), default=0) <= limit:
            return sequences
        too_long = f"{longest:,} tokens, over data.max_length ({limit:,})"
        if policy == "error":
            raise DataError(too_long, hint="raise data.max_length, or state data.overlong")
        if policy == "split" and is_text:
            report.windowed_texts += 1
            return [window for tokens in sequences for window in _windows(tokens, limit, self.bos)]
        if policy == "truncate":
            report.truncated_examples += 1
            fitted = [one[:limit] if is_text else _cut_context(one, limit, self.bos) for one in sequences]
            report.truncated_tokens += sum(_count_supervised(sequences)) - sum(_count_supervised(fitted))
            return fitted
        report.over_long_examples += 1
        report.dropped.append(f"{example.place}: {too_long}")
        return None

    def _keep_supervised(self, sequences: list[Tokens] | None, example: Example, report: Report) -> tuple[Tokens, ...]:
        """Those sequences in which anything is supervised, counted; none of an example that is left out."""
        counts = _count_supervised(sequences or [])
        kept = tuple(tokens for tokens, count in zip(sequences or [], counts, strict=True) if count)
        if sequences is not None and not kept:
            report.examples_without_target += 1
            report.dropped.append(f"{example.place}: nothing to supervise")
        weighted = example.weight != 1 or any(tokens.weights is not None for tokens in kept)
        report.weighted_examples += bool(kept) and weighted
        report.sequences += len(kept)
        report.tokens += sum(map(len, kept))
        report.supervised_tokens += sum(counts)
        return kept


def _count_supervised(sequences: Sequence[Tokens]) -> list[int]:
    return [int(np.count_nonzero(tokens.labels != UNSUPERVISED)) for tokens in sequences]


def parity_breaks(tokens: Tokens, prompts: Sequence[list[int]]) -> int:
    """How many of a sequence's prompts (the ids that a server feeds, in turn) are not those before its labels."""
    supervised = tokens.labels != UNSUPERVISED
    breaks, before = 0, 0
    for prompt in prompts:
        count = len(prompt)
        same = tokens.ids[:count].tolist() == prompt
        # The last token of a prompt is context, whoever answered before; of the first prompt, all are.
        context = supervised[count - 1 : count] if before else supervised[:count]
        breaks += not same or count <= before or bool(context.any())
        before = count
    return breaks


def _texts_of(texts: Iterable[MarkedText]) -> Iterator[tuple[str, int]]:
    """All that has to be encoded: each text, with where its first answer is, and its prompts, in which none is."""
    for marked in texts:
        yield marked.text, min((answer.start for answer in marked.answers), default=len(marked.text))
        yield from ((marked.text[: answer.prompt], answer.prompt) for answer in marked.answers)


def _last_run(tokens: Tokens) -> tuple[int, int]:
    """Start and end of the last run of supervised tokens; all of a sequence that has none."""
    runs = supervised_runs(tokens).tolist()
    return tuple(runs[-1]) if runs else (0, len(tokens))


def _windows(tokens: Tokens, limit: int, bos: list[int]) -> Iterator[Tokens]:
    """Text in windows that supervise each token once: each begins with BOS, or with the token before its first."""
    for start in range(1, len(tokens), limit - 1):
        head = bos or tokens.ids[start - 1 : start]
        yield all_supervised(np.concatenate([head, tokens.ids[start : start + limit - 1]]))


def _cut_context(tokens: Tokens, limit: int, bos: list[int]) -> Tokens:
    """Cut the context from the left, but for BOS; an answer that is itself too long loses its end, and its stop."""
    if len(tokens) <= limit:
        return tokens
    head = int(tokens.ids[:1].tolist() == bos)
    start, end = _last_run(tokens)
    first = min(start - 1, end - limit) + head  # one token, or BOS, stays before the answer
    cut = tokens[[*range(head), *range(first, min(end, first + limit - head))]]
    cut.labels[0] = UNSUPERVISED
    return cut
