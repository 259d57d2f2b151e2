"""Special tokens that the data asks to learn although the base never trained them: LoRA on linears cannot.

A base without chat has rows for its chat markers that are zero, tiny, or all alike. Where there are no weights to read,
as in a folder with a tokenizer only, nothing is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lorasft.errors import DataError, LorasftError
from lorasft.tensors import TensorFile, find_weights, open_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TABLES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "lm_head.weight")
KINDS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # as numpy reads them; it has no bfloat16
SMALL, ALIKE = 0.02, 0.01  # of an ordinary row's norm; of the row's own norm


def refuse_untrained(base: str, tokenizer: PreTrainedTokenizerFast, *, learned: Sequence[int]) -> None:
    """Raise DataError when special tokens among `learned` (token ids) look untrained in the weights of `base`."""
    added = sorted(tokenizer.added_tokens_decoder)
    tables = list(_find_tables(base)) if learned else []
    found = sorted({token for file, name in tables for token in untrained_rows(file, name, learned, added=added)})
    if found:
        names = ", ".join(tokenizer.convert_ids_to_tokens(found)[:10])
        raise DataError(
            f"the data asks to learn {names}, which the base never trained: its row is empty",
            where=base,
            hint="model.base=the instruct model of this family, or chat.template=plain, which needs no such token",
        )


def untrained_rows(file: TensorFile, name: str, learned: Sequence[int], *, added: Sequence[int]) -> list[int]:
    """The ids of `learned` whose rows are empty next to ordinary ones, or equal to those of `added` that are idle."""
    count = file.specs[name].rows
    learned = [token for token in learned if token < count]
    ordinary = np.setdiff1d(np.linspace(0, count - 1, 256).astype(np.int64), added).tolist()
    if not learned or not ordinary:
        return []
    usual = float(np.median(np.linalg.norm(_read_rows(file, name, ordinary), axis=1)))
    idle = _read_rows(file, name, [token for token in added if token < count and token not in learned][:64])
    found = []
    for token, row in zip(learned, _read_rows(file, name, learned), strict=True):
        norm = float(np.linalg.norm(row))
        alike = np.count_nonzero(np.linalg.norm(idle - row, axis=1) <= ALIKE * norm)
        if norm < SMALL * usual or alike >= 2:
            found.append(token)
    return found


def _read_rows(file: TensorFile, name: str, ids: Sequence[int]) -> npt.NDArray[np.float32]:
    """Some rows of a matrix in fp32: (ids, width)."""
    spec = file.specs[name]
    size = spec.size // spec.rows
    parts = [np.frombuffer(file.read_bytes(name, token * size, size), dtype=KINDS[spec.dtype]) for token in ids]
    rows = np.array(parts).reshape(len(ids), spec.width)
    if spec.dtype == "BF16":
        rows = (rows.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return rows.astype(np.float32)


def _find_tables(base: str) -> Iterator[tuple[TensorFile, str]]:
    """The embedding and the head in a folder or in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    config = str(Path(base) / "config.json") if Path(base).is_dir() else try_to_load_from_cache(base, "config.json")
    try:
        files = find_weights(Path(str(config)).parent)
    except LorasftError:  # none here
        return
    for file in map(open_tensors, files):
        for name, spec in file.specs.items():
            if name.endswith(TABLES) and spec.dtype in KINDS and len(spec.shape) == 2:
                yield file, name
