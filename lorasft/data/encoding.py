"""Text -> token ids, and which characters each token holds; a stretch that many texts share is encoded once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lorasft.data.tokenizer import control_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# A control token's text that is meant as text: a code point that Unicode keeps for no character, then its index.
MARK, FIRST = "\U000ffffe", 0xF0000
_PLACEHOLDER = re.compile(f"({MARK}.)")
Spans = npt.NDArray[np.int32]


class Encoded:
    """The ids of a text of `length` characters."""

    def __init__(self, ids: list[int], length: int, spans: Callable[[], Spans]) -> None:
        """`spans`: is called when they are asked for, which they are not of most texts."""
        self.ids = ids
        self.length = length
        self._spans = spans

    @cached_property
    def spans(self) -> Spans:
        """Start and end of each token among the characters: (tokens, 2)."""
        return self._spans()

    def tokens_between(self, start: int, end: int) -> tuple[int, int]:
        """The first token that holds a character of `start` to `end`, and the one after the last such token."""
        first = int(np.searchsorted(self.spans[:, 1], start, side="right"))
        return first, int(np.searchsorted(self.spans[:, 0], end))


class TextEncoder:
    """Encodes rendered text with one tokenizer; special tokens are never added."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, prompt: str) -> None:
        """`prompt`: one as the template renders it, whose tokens show where texts can be cut."""
        self.control = control_tokens(tokenizer)
        self._backend: Any = tokenizer.backend_tokenizer
        # SentencePiece puts a space before a text; after a newline it does not.
        self._anchor = "" if list(self._backend.encode("x", add_special_tokens=False).tokens) == ["x"] else "\n"
        self.restart = find_restart(tokenizer, prompt)

    def encode(self, texts: Iterable[str]) -> dict[str, Encoded]:
        """The texts encoded, all at once in parallel."""
        stretches = {text: self._split(text) for text in texts}
        distinct = list(dict.fromkeys(chain.from_iterable(stretches.values())))
        found = self._backend.encode_batch(distinct, add_special_tokens=False)
        parts = {
            stretch: self._encode_placeholders(stretch) if MARK in stretch else _from_library(stretch, encoding)
            for stretch, encoding in zip(distinct, found, strict=True)
        }
        return {text: _join([parts[stretch] for stretch in cut]) for text, cut in stretches.items()}

    def encode_apart(self, prompt: str, answer: str) -> tuple[Encoded, int]:
        """The prompt as a server feeds it, then the answer encoded alone; and how many tokens the prompt has."""
        before = self._encode_placeholders(prompt)
        return _join([before, self._encode_inside(answer)]), len(before.ids)

    def _split(self, text: str) -> list[str]:
        """A text cut before each token that restarts encoding: the ids of the whole are those of the stretches."""
        if self.restart is None:
            return [text]
        first, *others = text.split(self.restart)
        return [first, *(self.restart + other for other in others)]

    def _encode_placeholders(self, text: str) -> Encoded:
        first, *others = _PLACEHOLDER.split(text)
        parts = [_from_library(first, self._backend.encode(first, add_special_tokens=False))]
        for part in others:
            hidden = _PLACEHOLDER.fullmatch(part)
            parts.append(self._encode_control(self.control[ord(part[1]) - FIRST]) if hidden else self._encode_inside(part))
        return _join(parts)

    def _encode_inside(self, text: str) -> Encoded:
        """`text` as it is encoded in the middle of a text."""
        anchor = len(self._backend.encode(self._anchor, add_special_tokens=False).ids)
        whole = self._encode_placeholders(self._anchor + text)
        return Encoded(whole.ids[anchor:], len(text), lambda: whole.spans[anchor:] - len(self._anchor))

    def _encode_control(self, token: str) -> Encoded:
        """The text of a control token, which stands in a text as a placeholder, encoded as any other text."""
        anchor = len(self._plain.encode(self._anchor, add_special_tokens=False).ids)
        ids = self._plain.encode(self._anchor + token, add_special_tokens=False).ids[anchor:]
        return Encoded(ids, 2, lambda: np.full((len(ids), 2), (0, 2), dtype=np.int32))

    @cached_property
    def _plain(self) -> Any:
        """Another tokenizer: one that others encode with at the same time must not change."""
        plain = type(self._backend).from_str(self._backend.to_str())
        plain.encode_special_tokens = True
        return plain


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


def _from_library(text: str, encoding: Any) -> Encoded:
    return Encoded(encoding.ids, len(text), partial(_read_spans, encoding))


def _read_spans(encoding: Any) -> Spans:
    return np.fromiter(chain.from_iterable(encoding.offsets), dtype=np.int32).reshape(-1, 2)


def _join(parts: Sequence[Encoded]) -> Encoded:
    ids = list(chain.from_iterable([part.ids for part in parts]))
    return Encoded(ids, sum(part.length for part in parts), partial(_join_spans, parts))


def _join_spans(parts: Sequence[Encoded]) -> Spans:
    starts = accumulate((part.length for part in parts), initial=0)
    return np.concatenate([part.spans + start for part, start in zip(parts, starts)])
