"""The tokenizer, loaded; which texts are its control tokens; a recipe's new tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from lorasft.errors import RecipeError
from lorasft.hub import is_folder, loading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def load_tokenizer(base: str, revision: str | None = None) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a folder (which may hold nothing else) or of a hub id; runs no code that came with it."""
    from transformers import AutoTokenizer

    how: Any = {"revision": revision, "trust_remote_code": False, "local_files_only": is_folder(base)}
    hint = "the folder needs a tokenizer.json that is whole; or name another base"
    with loading("the tokenizer", base, hint=hint):
        tokenizer = AutoTokenizer.from_pretrained(base, **how)
        tokenizer.backend_tokenizer.encode("a")  # slow ones have none; a file at odds with itself shows here
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def adds_bos(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the tokenizer's own encoding of a text begins with its BOS token."""
    first = tokenizer.backend_tokenizer.encode("a").ids[:1]
    return tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]


def control_tokens(tokenizer: PreTrainedTokenizerFast) -> tuple[str, ...]:
    """The special tokens' texts, longest first: what a row must not contain unnoticed."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted(special | set(tokenizer.all_special_tokens), key=lambda text: (-len(text), text)))


def add_tokens(tokenizer: PreTrainedTokenizerFast, new_tokens: Mapping[str, str]) -> dict[int, list[int]]:
    """Give `tokenizer` the recipe's new tokens, as ordinary text. Returns the id of each, in alphabetical order, with
    those of the text that it starts as. Raises RecipeError for one that is there, or would split another."""
    from tokenizers import AddedToken, decoders

    backend, entries, starts = tokenizer.backend_tokenizer, new_tokens and tokenizer.get_vocab(), []
    decode, text = (backend.decoder or decoders.Fuse()).decode, "\0".join(entries)
    for token in sorted(new_tokens):
        pieces, back = backend.encode(token, add_special_tokens=False), decode(["x", token])[1:]
        own = token if tokenizer.unk_token_id in pieces.ids else "".join(pieces.tokens).removeprefix("\u2581")
        split = [one for one in (*tokenizer.get_added_vocab(), *new_tokens) if one in token and one != token]
        split += [entry for entry in entries if own in entry] if own in text else []  # in the tokenizer's alphabet
        starts.append(backend.encode(new_tokens[token], add_special_tokens=False).ids)
        if split or back != token or not token.strip():
            reason = f"would split the token {decode(split[:1])}" if split else f"would come out as {back}"
            reason = "is blank" if not token.strip() else "is a token already" if own in split else reason
            hint = "another one, with marks, as <name>"
            raise RecipeError(f"{token!r} {reason}", where="model.new_tokens", hint=hint)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in sorted(new_tokens)])
    return dict(zip(tokenizer.convert_tokens_to_ids(sorted(new_tokens)), starts, strict=True))


def needed_rows(rows: int, tokens: Iterable[int]) -> int:
    """Rows of an embedding that has `rows`, and needs some for `tokens`: as many or, if too few, a multiple of 64."""
    return rows if (most := max(tokens, default=0)) < rows else 64 * (most // 64 + 1)
