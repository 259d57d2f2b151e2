"""Text -> token ids, and which characters each token holds; a stretch that many texts share is encoded once."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from lorasft.data.tokenizer import control_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# A control token's text that is meant as text: a code point that Unicode keeps for no character, then its index.
MARK, FIRST = "\U000ffffe", 0xF0000
_PLACEHOLDER = re.compile(f"({MARK}.)")
Span = tuple[int, int]


@dataclass
class Pieces:
    """What is needed of `tokenizers.Encoding`, put together from several: token ids, and the characters of each."""

    ids: list[int]
    offsets: list[Span]

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, ids: list[int], offsets: Sequence[Span], at: int) -> None:
        """Append tokens whose offsets count from character `at`."""
        self.ids += ids
        self.offsets += [(start + at, end + at) for start, end in offsets]


class Encoded:
    """The ids of a text, and where they are in it."""

    def __init__(self, stretches: Sequence[str], encodings: Sequence[Any]) -> None:
        """`encodings`: of each stretch of the text, in turn."""
        self.ids = list(chain.from_iterable([encoding.ids for encoding in encodings]))
        self._stretches = stretches
        self._encodings = encodings

    def tokens_between(self, start: int, end: int) -> tuple[Span, Span] | None:
        """The first token that holds a character of `start` to `end`, and the one after the last such token; and the
        characters that those tokens hold. None where there is no such token."""
        found: list[tuple[Span, Span]] = []
        at = token = 0
        for stretch, encoding in zip(self._stretches, self._encodings, strict=True):
            if at < end and start < at + len(stretch):
                offsets = encoding.offsets
                first = bisect_right(offsets, start - at, key=itemgetter(1))
                stop = bisect_left(offsets, end - at, key=itemgetter(0))
                if first < stop:
                    found.append(((token + first, token + stop), (at + offsets[first][0], at + offsets[stop - 1][1])))
            at += len(stretch)
            token += len(encoding)
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
        found: dict[str, Any] = {}
        for stretches, encode_batch in (  # without offsets it is faster
            (list(located), self._backend.encode_batch),
            (list(others), self._backend.encode_batch_fast),
        ):
            found.update(zip(stretches, encode_batch(stretches, add_special_tokens=False), strict=True))
        found.update((stretch, self._encode_placeholders(stretch)) for stretch in found if MARK in stretch)
        return {text: Encoded(cut, [found[stretch] for stretch in cut]) for text, cut in cuts.items()}

    def encode_apart(self, prompt: str, answer: str) -> tuple[Encoded, int]:
        """The prompt as a server feeds it, then the answer encoded alone; and how many tokens the prompt has."""
        before = self._encode_placeholders(prompt)
        return Encoded([prompt, answer], [before, self._encode_inside(answer)]), len(before)

    def _split(self, text: str) -> list[str]:
        """A text cut before each token that restarts encoding: the ids of the whole are those of the stretches."""
        if self.restart is None:
            return [text]
        first, *others = text.split(self.restart)
        return [first, *(self.restart + other for other in others)]

    def _encode_placeholders(self, text: str) -> Pieces:
        first, *others = _PLACEHOLDER.split(text)
        encoding = self._backend.encode(first, add_special_tokens=False)
        pieces, at = Pieces(list(encoding.ids), list(encoding.offsets)), len(first)
        for part in others:
            hidden = _PLACEHOLDER.fullmatch(part)
            inside = self._encode_control(self.control[ord(part[1]) - FIRST]) if hidden else self._encode_inside(part)
            pieces.add(inside.ids, inside.offsets, at)
            at += len(part)
        return pieces

    def _encode_inside(self, text: str) -> Pieces:
        """`text` as it is encoded in the middle of a text."""
        whole = self._encode_placeholders(self._anchor + text)
        skipped = len(self._backend.encode(self._anchor, add_special_tokens=False).ids)
        inside = Pieces([], [])
        inside.add(whole.ids[skipped:], whole.offsets[skipped:], -len(self._anchor))
        return inside

    def _encode_control(self, token: str) -> Pieces:
        """The text of a control token, which is in a text as a placeholder, encoded as any other text."""
        skipped = len(self._plain.encode(self._anchor, add_special_tokens=False).ids)
        ids = self._plain.encode(self._anchor + token, add_special_tokens=False).ids[skipped:]
        return Pieces(ids, [(0, 2)] * len(ids))

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
