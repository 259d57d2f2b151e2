"""Text <-> token ids: which tokens hold which characters, and where a server's prompt ends among them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from lorasft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# A control token's text that is meant as text: a code point that Unicode keeps for no character, then its index.
MARK, FIRST = "\U000ffffe", 0xF0000
PLACEHOLDER = re.compile(f"({MARK}.)")
SHORT = 200  # characters: most prompts end alike, behind a special token


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


class Aligner:
    """Encodes rendered text with one tokenizer; special tokens are never added."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, control: Sequence[str]) -> None:
        self.backend: Any = tokenizer.backend_tokenizer
        self.control = control
        added = tokenizer.added_tokens_decoder.items()
        # Behind such a token encoding begins afresh, so what stands before it cannot change what follows.
        self.restarts = {index for index, token in added if not token.normalized and not token.single_word}
        # SentencePiece puts a space before a text; behind a newline it does not.
        self.anchor = "" if list(self.backend.encode("x", add_special_tokens=False).tokens) == ["x"] else "\n"
        self._control_pattern = re.compile("|".join(map(re.escape, (*control, MARK))))
        self._short: dict[str, list[int]] = {}

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Texts -> encodings, all at once in parallel."""
        encodings: list[Encoding] = self.backend.encode_batch(list(texts), add_special_tokens=False)
        for index, text in enumerate(texts):
            if MARK in text:
                encodings[index] = self._encode_placeholders(text)
        return encodings

    def prompt_tokens(self, text: str, prompt: int, encoding: Encoding) -> int | None:
        """How many tokens the first `prompt` characters make; None when alone they make others than these.

        Only the part behind the last special token is encoded again.
        """
        at, ids = prompt, encoding.ids
        token = None
        while token is None and at > 0:  # blanks that a normalizer dropped belong to no token
            at -= 1
            token = encoding.char_to_token(at)
        if token is None:
            return 0
        while token > 0 and ids[token] not in self.restarts:
            token -= 1
        span = encoding.token_to_chars(token) if token else None
        tail = self._encode_short(text[span[0] if span else 0 : prompt])
        end = token + len(tail)
        return end if ids[token:end] == tail else None

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
        return found.group() if found else None

    def hide_control(self, text: str) -> str:
        """Put a placeholder for each control token's text: encoded as plain text later, not as the token."""
        if MARK in text:
            raise DataError("the text holds U+FFFFE, which is no character")
        return self._control_pattern.sub(lambda found: MARK + chr(FIRST + self.control.index(found.group())), text)

    def _encode_short(self, text: str) -> list[int]:
        if len(text) > SHORT or MARK in text:
            return self._encode_placeholders(text).ids
        if text not in self._short:
            self._short[text] = list(self.backend.encode(text, add_special_tokens=False).ids)
        return self._short[text]

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
        self.backend.encode_special_tokens = True
        try:
            anchor = self.backend.encode(self.anchor, add_special_tokens=False)
            pieces.ids += self.backend.encode(self.anchor + text, add_special_tokens=False).ids[len(anchor.ids) :]
        finally:
            self.backend.encode_special_tokens = False
