"""The tokenizer, loaded; which texts are its control tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasft.errors import ModelError, UnsafeError
from lorasft.hub import is_folder, refuse_offline

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def load_tokenizer(base: str, revision: str | None = None) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a folder (which may hold nothing else) or of a hub id; runs no code that came with it."""
    from transformers import AutoTokenizer

    local = is_folder(base)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            base, revision=revision, trust_remote_code=False, local_files_only=local
        )
        tokenizer.backend_tokenizer.encode("a")  # slow ones have none; a file at odds with itself shows here
    except BaseException as fault:  # transformers, its parsers and the hub raise a dozen kinds here
        if not isinstance(fault, Exception) and type(fault).__name__ != "PanicException":  # the one of tokenizers
            raise
        if not local:
            refuse_offline(fault, base)
        if "custom code" in str(fault) or "trust_remote_code" in str(fault):
            what = "this tokenizer needs code of its own, which lorasft does not run"
            raise UnsafeError(what, where=base, hint="take a base that transformers knows") from None
        what = f"cannot load the tokenizer: {(str(fault) or type(fault).__name__).splitlines()[0]}"
        hint = "the folder needs a tokenizer.json that is whole; or name another base"
        raise ModelError(what, where=base, hint=hint) from None
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
