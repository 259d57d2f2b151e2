"""Text -> token ids, and which characters each token holds; a stretch that many texts share is encoded once."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import accumulate, chain
from operator import itemgetter
from types import SimpleNamespace
from typing import Any

from lorasft.data.tokenizer import FastTokenizer

# A control token's text that is meant as text: a code point that Unicode keeps for no character, then its index.
MARK, FIRST = "\U000ffffe", 0xF0000
_PLACEHOLDER = re.compile(f"({MARK}.)")


class Encoded:
    """The ids of a text, and where they are in it."""

    def __init__(self, stretches: Sequence[str], encodings: Sequence[Any]) -> None:
        """`encodings`: of each stretch of the text, in turn."""
        ids = [encoding.ids for encoding in encodings]
        self.ids = list(chain.from_iterable(ids))
        self._parts = list(zip(stretches, encodings, map(len, ids), strict=True))

    def tokens_between(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """The first and the last token that hold a character of `start` to `end`: their number, and start and end of
        the characters that they hold. Empty where there is no such token."""
        found: list[tuple[int, int, int]] = []
        at = token = 0
        for stretch, encoding, size in self._parts:
            if at < end and start < at + len(stretch):
                offsets = encoding.offsets
                first = bisect_right(offsets, start - at, key=itemgetter(1))
                stop = bisect_left(offsets, end - at, key=itemgetter(0))
                if first < stop:
                    found += [(token + n, at + offsets[n][0], at + offsets[n][1]) for n in (first, stop - 1)]
            at += len(stretch)
            token += size
        return [found[0], found[-1]] if found else []


class TextEncoder:
    """Encodes rendered text with one tokenizer; special tokens are never added."""

    def __init__(self, tokenizer: FastTokenizer, *, prompt: str) -> None:
        """`prompt`: one as the template renders it, whose tokens show where texts can be cut."""
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        # What a row must not contain unnoticed, longest first.
        self.control = tuple(sorted(special | {*tokenizer.all_special_tokens}, key=lambda text: (-len(text), text)))
        self._backend: Any = tokenizer.backend_tokenizer
        # SentencePiece puts a space before a text; after a newline it does not.
        self._anchor = "" if list(self._backend.encode("x", add_special_tokens=False).tokens) == ["x"] else "\n"
        self.restart = find_restart(tokenizer, prompt)

    def encode(self, texts: Iterable[tuple[str, int]]) -> dict[str, Encoded]:
        """The texts encoded, all at once in parallel; each comes with the character from which on its tokens will be
        looked up: to know where tokens are takes a third more time than their ids."""
        cuts: dict[str, list[str]] = {}
        located: set[str] = set()
        for text, first in texts:
            # Cut before each token that restarts encoding: the ids of the whole are those of the stretches.
            head, *others = text.split(self.restart) if self.restart else [text]
            cuts[text] = [head, *(f"{self.restart}{other}" for other in others)]
            ends = accumulate(map(len, cuts[text]))
            located.update(stretch for stretch, end in zip(cuts[text], ends, strict=True) if end > first)
        rest = set(chain.from_iterable(cuts.values())) - located
        found: dict[str, Any] = {}
        for stretches, encode in ((located, self._backend.encode_batch), (rest, self._backend.encode_batch_fast)):
            listed = list(stretches)
            found.update(zip(listed, encode(listed, add_special_tokens=False), strict=True))
        return {
            text: self.encode_apart(text) if MARK in text else Encoded(cut, [found[stretch] for stretch in cut])
            for text, cut in cuts.items()
        }

    def encode_apart(self, *texts: str) -> Encoded:
        """The texts, one after another, each encoded alone, and so their placeholders and what is between them."""
        parts = [part for text in texts for part in _PLACEHOLDER.split(text)]
        return Encoded(parts, [self._encode_part(part, first=number == 0) for number, part in enumerate(parts)])

    def _encode_part(self, part: str, *, first: bool) -> Any:
        """Ids and offsets of a placeholder, or of a text without one; not the `first`: as in the middle of a text."""
        anchor, hidden = "" if first else self._anchor, MARK in part
        encode = (self._plain if hidden else self._backend).encode
        shown = self.control[ord(part[1]) - FIRST] if hidden else part
        skipped = len(encode(anchor, add_special_tokens=False))
        encoding = encode(anchor + shown, add_special_tokens=False)
        shift = len(anchor)
        spans = [(0, len(part)) if hidden else (start - shift, end - shift) for start, end in encoding.offsets]
        return SimpleNamespace(ids=encoding.ids[skipped:], offsets=spans[skipped:])

    @cached_property
    def _plain(self) -> Any:
        """Another tokenizer: one that others encode with at the same time must not change."""
        plain = type(self._backend).from_str(self._backend.to_str())
        plain.encode_special_tokens = True
        return plain


def find_restart(tokenizer: FastTokenizer, prompt: str) -> str | None:
    """The last added token of `prompt` at which encoding begins afresh: what is before it cannot change it."""
    added = {str(token): token for token in tokenizer.added_tokens_decoder.values() if str(token).strip()}
    for text in sorted((text for text in added if text in prompt), key=prompt.rfind, reverse=True):
        bound = added[text].normalized or added[text].single_word or added[text].lstrip
        # No other one may swallow it, nor take its beginning away from it.
        heads = tuple(text[:size] for size in range(1, len(text)))
        if not bound and not any((other != text and text in other) or other.endswith(heads) for other in added):
            return text
    return None
