"""Text <-> token ids: which tokens hold which characters, and where a server's prompt ends among them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

from lorasft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# A control token's text that is meant as text: a code point that Unicode keeps for no character, then its index.
MARK, FIRST = "\U000ffffe", 0xF0000
PLACEHOLDER = re.compile(f"({MARK}.)")
Span = tuple[int, int]
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
    """The ids of a text, put together from those of its stretches; where its tokens are is found out when asked."""

    def __init__(self, text: str, ids: list[int], backend: Any) -> None:
        self.text = text
        self.ids = ids
        self._backend = backend

    @cached_property
    def _located(self) -> Encoding:
        found: Encoding = self._backend.encode(self.text, add_special_tokens=False)
        return found

    def char_to_token(self, char_pos: int) -> int | None:
        return self._located.char_to_token(char_pos)

    def token_to_chars(self, token_index: int) -> tuple[int, int] | None:
        return self._located.token_to_chars(token_index)


class Aligner:
    """Encodes rendered text with one tokenizer; special tokens are never added."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, control: Sequence[str], *, probe: str, lead: str, end: str
    ) -> None:
        """`probe`: a prompt as the template renders it, whose tokens show where texts can be cut; `lead`: what the
        template puts between a prompt and its answer; `end`: what it puts behind."""
        self.backend: Any = tokenizer.backend_tokenizer
        self._plain: Any = None
        self.control = control
        # SentencePiece puts a space before a text; behind a newline it does not.
        self.anchor = "" if list(self.backend.encode("x", add_special_tokens=False).tokens) == ["x"] else "\n"
        self._control_pattern = re.compile("|".join(map(re.escape, control)) or "(?!)")
        self.added = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
        self.restart = self._find_restart(tokenizer, probe)
        self.end = end if self._is_free(tokenizer, end) else None
        self.tail = probe[probe.rfind(self.restart) :] if self.restart else ""  # that all prompts end with
        self.heads = {text: ids for text in (self.tail, self.tail + lead) if (ids := self._ids_if_exact(text))}

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Texts -> encodings, all at once in parallel; a stretch that several texts share is encoded once."""
        if self.restart is None:
            found = self.backend.encode_batch(texts, add_special_tokens=False)
            return [self._encode_placeholders(t) if MARK in t else e for t, e in zip(texts, found, strict=True)]
        split = [self._split(text, self.restart) for text in texts]
        distinct = list(dict.fromkeys(chain.from_iterable(split)))
        found = self.backend.encode_batch_fast(distinct, add_special_tokens=False)
        ids = {stretch: encoding.ids for stretch, encoding in zip(distinct, found, strict=True)}
        return [
            self._encode_placeholders(text)
            if MARK in text
            else Chain(text, list(chain.from_iterable([ids[stretch] for stretch in stretches])), self.backend)
            for text, stretches in zip(texts, split, strict=True)
        ]

    @staticmethod
    def _split(text: str, restart: str) -> list[str]:
        """A text cut before each token that restarts encoding: the ids of the whole are those of the stretches."""
        first, *others = text.split(restart)
        return [first, *(restart + other for other in others)]

    def _find_restart(self, tokenizer: PreTrainedTokenizerFast, probe: str) -> str | None:
        """The last added token of `probe` at which encoding begins afresh: what stands before cannot change it.

        Tried, not believed: a normalizer or a pre-tokenizer may look across.
        """
        found = sorted((text for text in self.added if text in probe), key=probe.rfind, reverse=True)
        return next((text for text in found if self._is_free(tokenizer, text) and self._restarts(text)), None)

    def _is_free(self, tokenizer: PreTrainedTokenizerFast, text: str) -> bool:
        """Whether an added token is found wherever its text stands, and takes nothing that stands before it."""
        if not text.strip() or text not in self.added:
            return False
        token = tokenizer.added_tokens_decoder[self.added[text]]
        bound = token.normalized or token.single_word or token.lstrip
        return not bound and not any(_overlap(other, text) for other in self.added if other.strip())

    def _restarts(self, token: str) -> bool:
        texts = [text for one, two in RESTART_PROBES for text in (one, token + two, one + token + two)]
        ids = [encoding.ids for encoding in self.backend.encode_batch(texts, add_special_tokens=False)]
        return all(ids[at] + ids[at + 1] == ids[at + 2] for at in range(0, len(ids), 3))

    def _ids_if_exact(self, text: str) -> list[int] | None:
        """The ids of the end of a prompt, if they hold it to its last character and nothing else can stand for them."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        unknown = getattr(self.backend.model, "unk_token", None)
        exact = encoding.ids and encoding.offsets[-1][1] == len(text) and encoding.tokens[-1] != unknown
        return list(encoding.ids) if exact else None

    def span_from_ids(self, encoding: Encoding, start: int, end: int, *, prompt: tuple[int, int]) -> Span | None:
        """First token of an answer and the one after its last, where the ids alone tell; None where they do not.

        `start`, `end`: the answer's characters; `prompt`: characters and tokens of its prompt, which `encoding` begins
        with.
        """
        if not isinstance(encoding, Chain) or self.end is None or self.restart is None:
            return None
        text, ids = encoding.text, encoding.ids
        head = self.heads.get(text[prompt[0] - len(self.tail) : start])
        if head is None or self.tail not in self.heads:
            return None
        first = prompt[1] - len(self.heads[self.tail]) + len(head)
        if ids[first - len(head) : first] != head or text.find(self.end, start) != end - len(self.end):
            return None
        token = self.added[self.end]
        if ids.count(token) != text.count(self.end):  # one of them is no end
            return None
        return first, ids.index(token, first) + 1

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
