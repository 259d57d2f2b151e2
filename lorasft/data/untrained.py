"""Special tokens that the data asks to learn although the base never trained them: LoRA on linears cannot.

A base without chat has rows for its chat markers that are zero, tiny, or all alike. Read from the safetensors' own
bytes, a row at a time; where there are none to read, as in a folder with a tokenizer only, nothing is said.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lorasft.errors import DataError
from lorasft.tensors import INDEX, TensorFile, open_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TABLES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "lm_head.weight")
KINDS: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
SMALL, ALIKE = 0.02, 0.01  # of an ordinary row's norm; of the row's own norm


def refuse_untrained(base: str, tokenizer: PreTrainedTokenizerFast, *, learned: Sequence[int]) -> None:
    """Raise DataError when special tokens among `learned` (token ids) look untrained in the weights of `base`."""
    added = sorted(tokenizer.added_tokens_decoder)
    tables = [table for name in TABLES if (table := _find_matrix(base, name))]
    found = sorted({token for table in tables for token in untrained_rows(*table, learned, added=added)})
    if found:
        names = ", ".join(tokenizer.convert_ids_to_tokens(found)[:10])
        raise DataError(
            f"the data asks to learn {names}, which the base never trained: its row is empty",
            where=base,
            hint="model.base=the instruct model of this family, or chat.template=plain, which needs no such token",
        )


def untrained_rows(file: TensorFile, name: str, learned: Sequence[int], *, added: Sequence[int]) -> list[int]:
    """The ids of `learned` whose rows in the matrix `name` are empty next to ordinary ones, or equal to those of
    `added` that are not in use."""
    height = file.specs[name].rows
    learned = [token for token in learned if token < height]
    ordinary = np.setdiff1d(np.linspace(0, height - 1, 256).astype(np.int64), added)
    if not learned or not len(ordinary):
        return []
    usual = float(np.median(np.linalg.norm(_read_rows(file, name, ordinary.tolist()), axis=1)))
    idle = _read_rows(file, name, [token for token in added if token < height and token not in learned][:64])
    found = []
    for token, row in zip(learned, _read_rows(file, name, learned), strict=True):
        norm = float(np.linalg.norm(row))
        alike = np.count_nonzero(np.linalg.norm(idle - row, axis=1) <= ALIKE * norm)
        if norm < SMALL * usual or alike >= 2:
            found.append(token)
    return found


def _read_rows(file: TensorFile, name: str, ids: Sequence[int]) -> npt.NDArray[np.float32]:
    """The rows `ids` of a matrix in fp32: (ids, width). Without torch, which takes a second to import."""
    spec = file.specs[name]
    size = spec.width * KINDS[spec.dtype].itemsize
    content = b"".join(file.read_bytes(name, token * size, size) for token in ids)
    rows: npt.NDArray[Any] = np.frombuffer(content, KINDS[spec.dtype]).reshape(-1, spec.width)
    if spec.dtype == "BF16":
        rows = (rows.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return rows.astype(np.float32)


def _find_matrix(base: str, ending: str) -> tuple[TensorFile, str] | None:
    """The matrix whose name has this ending, in the shards of a folder or of the hub's cache."""
    index = _local_file(base, INDEX)
    shards = json.loads(index.read_bytes())["weight_map"] if index else {ending: "model.safetensors"}
    file = next((_local_file(base, shard) for name, shard in shards.items() if name.endswith(ending)), None)
    if file is None:
        return None
    found = open_tensors(file)
    name = next((name for name in found.specs if name.endswith(ending)), "")
    spec = found.specs.get(name)
    return (found, name) if spec and spec.dtype in KINDS and len(spec.shape) == 2 else None


def _local_file(base: str, name: str) -> Path | None:
    if Path(base).is_dir():
        return Path(base) / name if (Path(base) / name).is_file() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(base, name)
    return Path(found) if isinstance(found, str) else None
