"""Text -> token ids, and which characters each token holds; a stretch that many texts share is encoded once."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from lorasft.data.tokenizer import control_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# A control token's text that is meant as text: a code point that Unicode keeps for no character, then its index.
MARK, FIRST = "\U000ffffe", 0xF0000
_PLACEHOLDER = re.compile(f"({MARK}.)")
Span = tuple[int, int]


class Stretch(NamedTuple):
    """A part of a text; `read_offsets` gives the characters of each token, which is asked of few."""

    ids: list[int]
    length: int  # characters
    read_offsets: Callable[[], list[Span]]


class Encoded:
    """The ids of a text, and where they stand in it."""

    def __init__(self, stretches: Sequence[Stretch]) -> None:
        self.ids = list(chain.from_iterable([stretch.ids for stretch in stretches]))
        self._stretches = stretches

    def tokens_between(self, start: int, end: int) -> tuple[Span, Span] | None:
        """The first token that holds a character of `start` to `end`, and the one after the last such token; and the
        characters that those tokens hold. None where there is no such token."""
        found: list[tuple[Span, Span]] = []
        at = token = 0
        for stretch in self._stretches:
            if at < end and start < at + stretch.length:
                offsets = stretch.read_offsets()
                first = bisect_right(offsets, start - at, key=itemgetter(1))
                stop = bisect_left(offsets, end - at, key=itemgetter(0))
                if first < stop:
                    found.append(((token + first, token + stop), (at + offsets[first][0], at + offsets[stop - 1][1])))
            at += stretch.length
            token += len(stretch.ids)
        if not found:
            return None
        (first, _), (before, _) = found[0]
        (_, stop), (_, after) = found[-1]
        return (first, stop), (before, after)


class TextEncoder:
    """Encodes rendered text with one tokenizer; special tokens are never added."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, prompt: str) -> None:
        """`prompt`: one as the template renders it, whose tokens show where texts can be cut."""
        self.control = control_tokens(tokenizer)
        self._backend: Any = tokenizer.backend_tokenizer
        # SentencePiece puts a space before a text; after a newline it does not.
        self._anchor = "" if list(self._backend.encode("x", add_special_tokens=False).tokens) == ["x"] else "\n"
        self.restart = find_restart(tokenizer, prompt)

    def encode(self, texts: Mapping[str, Sequence[Span]]) -> dict[str, Encoded]:
        """The texts encoded, all at once in parallel; each with the characters whose tokens will be asked for."""
        cuts = {text: self._split(text) for text in texts}
        located = {stretch for text, spans in texts.items() for stretch in _overlapping(cuts[text], spans)}
        others = set(chain.from_iterable(cuts.values())) - located
        parts: dict[str, list[Stretch]] = {}
        for stretches, encode_batch in (  # without offsets it is faster
            (list(located), self._backend.encode_batch),
            (list(others), self._backend.encode_batch_fast),
        ):
            for stretch, encoding in zip(stretches, encode_batch(stretches, add_special_tokens=False), strict=True):
                hidden = MARK in stretch
                parts[stretch] = self._encode_placeholders(stretch) if hidden else [_from_library(stretch, encoding)]
        return {text: Encoded([part for stretch in cut for part in parts[stretch]]) for text, cut in cuts.items()}

    def encode_apart(self, prompt: str, answer: str) -> tuple[Encoded, int]:
        """The prompt as a server feeds it, then the answer encoded alone; and how many tokens the prompt has."""
        before = self._encode_placeholders(prompt)
        return Encoded([*before, *self._encode_inside(answer)]), sum(len(stretch.ids) for stretch in before)

    def _split(self, text: str) -> list[str]:
        """A text cut before each token that restarts encoding: the ids of the whole are those of the stretches."""
        if self.restart is None:
            return [text]
        first, *others = text.split(self.restart)
        return [first, *(self.restart + other for other in others)]

    def _encode_placeholders(self, text: str) -> list[Stretch]:
        first, *others = _PLACEHOLDER.split(text)
        parts = [_from_library(first, self._backend.encode(first, add_special_tokens=False))]
        for part in others:
            if _PLACEHOLDER.fullmatch(part):
                parts.append(self._encode_control(self.control[ord(part[1]) - FIRST]))
            else:
                parts += self._encode_inside(part)
        return parts

    def _encode_inside(self, text: str) -> list[Stretch]:
        """`text` as it is encoded in the middle of a text."""
        first, *others = self._encode_placeholders(self._anchor + text)
        skipped = len(self._backend.encode(self._anchor, add_special_tokens=False).ids)
        size = len(self._anchor)
        offsets = [(start - size, end - size) for start, end in first.read_offsets()[skipped:]]
        return [Stretch(first.ids[skipped:], first.length - size, lambda: offsets), *others]

    def _encode_control(self, token: str) -> Stretch:
        """The text of a control token, which stands in a text as a placeholder, encoded as any other text."""
        skipped = len(self._plain.encode(self._anchor, add_special_tokens=False).ids)
        ids = self._plain.encode(self._anchor + token, add_special_tokens=False).ids[skipped:]
        return Stretch(ids, 2, lambda: [(0, 2)] * len(ids))

    @cached_property
    def _plain(self) -> Any:
        """Another tokenizer: one that others encode with at the same time must not change."""
        plain = type(self._backend).from_str(self._backend.to_str())
        plain.encode_special_tokens = True
        return plain


def _overlapping(stretches: Sequence[str], spans: Sequence[Span]) -> Iterator[str]:
    at = 0
    for stretch in stretches if spans else ():
        if any(start < at + len(stretch) and at < end for start, end in spans):
            yield stretch
        at += len(stretch)


def find_restart(tokenizer: PreTrainedTokenizerFast, prompt: str) -> str | None:
    """The last added token of `prompt` at which encoding begins afresh: what is before it cannot change it."""
    added = {str(token): token for token in tokenizer.added_tokens_decoder.values() if str(token).strip()}
    for text in sorted((text for text in added if text in prompt), key=prompt.rfind, reverse=True):
        bound = added[text].normalized or added[text].single_word or added[text].lstrip
        if not bound and not any(_overlaps(other, text) for other in added):
            return text
    return None


def _overlaps(other: str, token: str) -> bool:
    """Whether `other` can take the beginning of `token` away from it, or swallow it, where both are in a text."""
    return (other != token and token in other) or any(other.endswith(token[:size]) for size in range(1, len(token)))


def _from_library(text: str, encoding: Any) -> Stretch:
    return Stretch(encoding.ids, len(text), lambda: encoding.offsets)
