"""Text <-> token ids: which tokens hold which characters, and where a server's prompt ends among them."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any, Protocol

from lorasft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# A control token's text that is meant as text: a code point that Unicode keeps for no character, then its index.
MARK, FIRST = "\U000ffffe", 0xF0000
PLACEHOLDER = re.compile(f"({MARK}.)")
RESTART_PROBES = (("", "x"), ("a", "b c"), ("a ", " b"), ("\n", "\n\nb"), ("été 1.", "system\n"))


class Encoding(Protocol):
    """What is needed of `tokenizers.Encoding`."""

    @property
    def ids(self) -> list[int]: ...

    def char_to_token(self, char_pos: int) -> int | None: ...

    def token_to_chars(self, token_index: int) -> tuple[int, int] | None: ...


@dataclass
class Pieces:
    """An encoding put together from several; `spans` are characters of the whole text."""

    ids: list[int] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)

    def char_to_token(self, char_pos: int) -> int | None:
        return next((index for index, (start, end) in enumerate(self.spans) if start <= char_pos < end), None)

    def token_to_chars(self, token_index: int) -> tuple[int, int] | None:
        return self.spans[token_index]

    def add(self, other: Pieces, offset: int) -> None:
        self.ids += other.ids
        self.spans += [(start + offset, end + offset) for start, end in other.spans]


class Chain:
    """Encodings of the stretches of a text, as one."""

    def __init__(self, stretches: Sequence[str], encodings: Mapping[str, tuple[list[int], Encoding]]) -> None:
        found = [encodings[stretch] for stretch in stretches]
        self.ids = list(chain.from_iterable(ids for ids, _ in found))
        self.parts = [encoding for _, encoding in found]
        self.chars = [0, *accumulate(map(len, stretches))]  # where each part begins
        self.tokens = [0, *accumulate(len(ids) for ids, _ in found)]

    def char_to_token(self, char_pos: int) -> int | None:
        part = bisect_right(self.chars, char_pos) - 1
        token = self.parts[part].char_to_token(char_pos - self.chars[part])
        return None if token is None else token + self.tokens[part]

    def token_to_chars(self, token_index: int) -> tuple[int, int] | None:
        part = bisect_right(self.tokens, token_index) - 1
        span = self.parts[part].token_to_chars(token_index - self.tokens[part])
        return None if span is None else (span[0] + self.chars[part], span[1] + self.chars[part])


class Aligner:
    """Encodes rendered text with one tokenizer; special tokens are never added."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, control: Sequence[str], *, probe: str) -> None:
        """`probe`: a prompt as the template renders it, whose tokens show where texts can be cut."""
        self.backend: Any = tokenizer.backend_tokenizer
        self._plain: Any = None
        self.control = control
        # SentencePiece puts a space before a text; behind a newline it does not.
        self.anchor = "" if list(self.backend.encode("x", add_special_tokens=False).tokens) == ["x"] else "\n"
        self._control_pattern = re.compile("|".join(map(re.escape, control)) or "(?!)")
        self.restart = self._find_restart(tokenizer, probe)

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Texts -> encodings, all at once in parallel; a stretch that several texts share is encoded once."""
        split = [self._split(text) for text in texts]
        distinct = list(dict.fromkeys(stretch for stretches in split for stretch in stretches))
        found = self.backend.encode_batch(distinct, add_special_tokens=False)
        encodings = {stretch: (encoding.ids, encoding) for stretch, encoding in zip(distinct, found, strict=True)}
        return [
            self._encode_placeholders(text) if MARK in text else Chain(stretches, encodings)
            for text, stretches in zip(texts, split, strict=True)
        ]

    def _split(self, text: str) -> list[str]:
        """A text cut before each token that restarts encoding: the ids of the whole are those of the stretches."""
        if self.restart is None:
            return [text]
        first, *others = text.split(self.restart)
        return [first, *(self.restart + other for other in others)]

    def _find_restart(self, tokenizer: PreTrainedTokenizerFast, probe: str) -> str | None:
        """The last added token of `probe` at which encoding begins afresh: what stands before cannot change it.

        Tried, not believed: a normalizer or a pre-tokenizer may look across.
        """
        added = {str(token): token for token in tokenizer.added_tokens_decoder.values() if str(token).strip()}
        for text in sorted((text for text in added if text in probe), key=probe.rfind, reverse=True):
            flags = added[text]
            free = not (flags.normalized or flags.single_word or flags.lstrip)
            if free and not any(_overlap(other, text) for other in added) and self._restarts(text):
                return text
        return None

    def _restarts(self, token: str) -> bool:
        texts = [text for one, two in RESTART_PROBES for text in (one, token + two, one + token + two)]
        ids = [encoding.ids for encoding in self.backend.encode_batch(texts, add_special_tokens=False)]
        return all(ids[at] + ids[at + 1] == ids[at + 2] for at in range(0, len(ids), 3))

    def join(self, prompt: str, answer: str) -> tuple[Pieces, int]:
        """The prompt as a server feeds it, then the answer encoded alone; and how many tokens the prompt has."""
        pieces = self._encode_placeholders(prompt)
        count = len(pieces.ids)
        self._add(pieces, answer, len(prompt))
        return pieces, count

    def first_token(self, encoding: Encoding, start: int, end: int) -> int | None:
        """The first token that holds a character of `start` to `end`."""
        found = (encoding.char_to_token(at) for at in range(start, end))
        return next((token for token in found if token is not None), None)

    def last_token(self, encoding: Encoding, start: int, end: int) -> int:
        """The last token that holds a character of `start` to `end`; there is one (see first_token)."""
        found = (encoding.char_to_token(at) for at in range(end - 1, start - 1, -1))
        token = next(token for token in found if token is not None)
        while token + 1 < len(encoding.ids):  # the bytes of one character may be several tokens
            span = encoding.token_to_chars(token + 1)
            if span is None or span[0] >= end:
                break
            token += 1
        return token

    def find_control(self, text: str) -> str | None:
        """The first control token whose text stands in `text` (or U+FFFFE, which is needed here)."""
        found = self._control_pattern.search(text)
        return found.group() if found else MARK if MARK in text else None

    def hide_control(self, text: str) -> str:
        """Put a placeholder for each control token's text: encoded as plain text later, not as the token."""
        if MARK in text:
            raise DataError("the text holds U+FFFFE, which is no character")
        return self._control_pattern.sub(lambda found: MARK + chr(FIRST + self.control.index(found.group())), text)

    def _encode_placeholders(self, text: str) -> Pieces:
        first, *rest = PLACEHOLDER.split(text)
        encoding = self.backend.encode(first, add_special_tokens=False)
        pieces, at = Pieces(list(encoding.ids), list(encoding.offsets)), len(first)
        for part in rest:
            if PLACEHOLDER.fullmatch(part):
                plain = Pieces()
                self._add_plain(plain, self.control[ord(part[1]) - FIRST])
                pieces.ids += plain.ids
                pieces.spans += [(at, at + len(part))] * len(plain.ids)
            elif part:
                self._add(pieces, part, at)
            at += len(part)
        return pieces

    def _add(self, pieces: Pieces, text: str, at: int) -> None:
        """Append `text` as it is encoded in the middle of a text."""
        anchor = self.backend.encode(self.anchor, add_special_tokens=False)
        whole = self._encode_placeholders(self.anchor + text)
        pieces.add(Pieces(whole.ids[len(anchor.ids) :], whole.spans[len(anchor.ids) :]), at - len(self.anchor))

    def _add_plain(self, pieces: Pieces, text: str) -> None:
        if self._plain is None:  # another tokenizer: one that others encode with at the same time must not change
            self._plain = type(self.backend).from_str(self.backend.to_str())
            self._plain.encode_special_tokens = True
        anchor = self._plain.encode(self.anchor, add_special_tokens=False)
        pieces.ids += self._plain.encode(self.anchor + text, add_special_tokens=False).ids[len(anchor.ids) :]


def _overlap(other: str, token: str) -> bool:
    """Whether `other` can take the beginning of `token` away from it, or swallow it, where both stand in a text."""
    return (other != token and token in other) or any(other.endswith(token[:size]) for size in range(1, len(token)))
