"""Special tokens that the data supervises although the base never trained them: their rows are tiny, or all alike.

Where there are no weights to read, as in a folder with a tokenizer only, nothing is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lorasft.errors import DataError, LorasftError
from lorasft.hub import find_local
from lorasft.tensors import TensorFile, find_weights, open_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TABLES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "lm_head.weight")
SMALL, ALIKE = 0.02, 0.01  # of an ordinary row's norm; of the row's own norm


def refuse_untrained(base: str, tokenizer: PreTrainedTokenizerFast, *, supervised: Sequence[int]) -> None:
    """Raise DataError when special tokens among `supervised` (token ids) look untrained in the weights of `base`."""
    added = sorted(tokenizer.added_tokens_decoder)
    try:
        files = find_weights(find_local(base, "config.json").parent) if supervised else []
    except LorasftError:  # none here
        files = []
    found: set[int] = set()
    for file in map(open_tensors, files):
        for name, spec in file.specs.items():  # the embedding and the head
            if name.endswith(TABLES) and spec.dtype in ("F32", "F16", "BF16") and len(spec.shape) == 2:
                found.update(untrained_rows(file, name, supervised, added=added))
    if found:
        names = ", ".join(tokenizer.convert_ids_to_tokens(sorted(found))[:10])
        what = f"the data asks to learn {names}, which the base never trained: its row is empty"
        hint = "model.base=the instruct model of this family, or chat.template=plain, which needs no such token"
        raise DataError(what, where=base, hint=hint)


def untrained_rows(file: TensorFile, name: str, supervised: Sequence[int], *, added: Sequence[int]) -> Iterator[int]:
    """The ids of `supervised` whose rows are empty next to ordinary ones, or equal to two idle ones of `added`."""
    count = file.specs[name].rows
    some = {place * (count - 1) // 255 for place in range(256)}
    ordinary, idle = some.difference(added), [token for token in added if token < count and token not in supervised]
    usual, others = ([_read_row(file, name, token) for token in ids] for ids in (sorted(ordinary), idle[:64]))
    for token in (token for token in supervised if token < count and usual):
        row = _read_row(file, name, token)
        norm = np.linalg.norm(row)
        alike = sum(np.linalg.norm(other - row) <= ALIKE * norm for other in others)
        if norm < SMALL * np.median(np.linalg.norm(usual, axis=1)) or alike >= 2:
            yield token


def _read_row(file: TensorFile, name: str, row: int) -> NDArray[np.float32]:
    """A row in fp32, without torch, which takes a second to import."""
    spec = file.specs[name]
    content = file.read_bytes(name, row * (spec.size // spec.rows), spec.size // spec.rows)
    if spec.dtype == "BF16":  # the upper half of fp32
        return (np.frombuffer(content, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(content, {"F32": np.float32, "F16": np.float16}[spec.dtype]).astype(np.float32)
