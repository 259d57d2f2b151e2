"""Special tokens that the data asks to learn although the base never trained them: LoRA on linears cannot.

A base without chat has rows for its chat markers that are zero, tiny, or all alike. Read from the safetensors' own
bytes, a row at a time; where there are none to read, as in a folder with a tokenizer only, nothing is said.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lorasft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TABLES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "lm_head.weight")
KINDS: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
SMALL, ALIKE = 0.02, 0.01  # of an ordinary row's norm; of the row's own norm
Rows = npt.NDArray[np.float32]


def refuse_untrained(base: str, tokenizer: PreTrainedTokenizerFast, *, learned: Sequence[int]) -> None:
    """Raise DataError when special tokens among `learned` (token ids) look untrained in the weights of `base`."""
    added = sorted(tokenizer.added_tokens_decoder)
    tables = [table for name in TABLES if (table := _find_table(base, name))]
    found = sorted({token for table in tables for token in untrained_rows(table, learned, added=added)})
    if found:
        names = ", ".join(tokenizer.convert_ids_to_tokens(found)[:10])
        raise DataError(
            f"the data asks to learn {names}, which the base never trained: its row is empty",
            where=base,
            hint="model.base=the instruct model of this family, or chat.template=plain, which needs no such token",
        )


@dataclass(frozen=True)
class Table:
    """A matrix inside a safetensors file: where its bytes are."""

    file: Path
    start: int
    rows: int
    width: int
    kind: str

    def read(self, ids: Sequence[int]) -> Rows:
        """The rows `ids` in fp32: (ids, width)."""
        raw: npt.NDArray[Any] = np.memmap(
            self.file, KINDS[self.kind], "r", offset=self.start, shape=(self.rows, self.width)
        )
        rows: npt.NDArray[Any] = raw[np.asarray(ids, dtype=np.int64)]
        if self.kind == "BF16":
            rows = (rows.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return np.asarray(rows, dtype=np.float32)


def untrained_rows(table: Table, learned: Sequence[int], *, added: Sequence[int]) -> list[int]:
    """The ids of `learned` whose rows are empty next to ordinary ones, or equal to those of `added` that stand idle."""
    learned = [token for token in learned if token < table.rows]
    ordinary = np.setdiff1d(np.linspace(0, table.rows - 1, 256).astype(np.int64), added)
    if not learned or not len(ordinary):
        return []
    usual = float(np.median(np.linalg.norm(table.read(ordinary.tolist()), axis=1)))
    idle = table.read([token for token in added if token < table.rows and token not in learned][:64])
    found = []
    for token, row in zip(learned, table.read(learned), strict=True):
        norm = float(np.linalg.norm(row))
        alike = np.count_nonzero(np.linalg.norm(idle - row, axis=1) <= ALIKE * norm) if len(idle) else 0
        if norm < SMALL * usual or alike >= 2:
            found.append(token)
    return found


def _find_table(base: str, name: str) -> Table | None:
    """The matrix whose name ends in `name`, in the shards of a folder or of the hub's cache."""
    index = _local_file(base, "model.safetensors.index.json")
    if index:
        shards = json.loads(index.read_bytes())["weight_map"]
        file = next((_local_file(base, shard) for key, shard in shards.items() if key.endswith(name)), None)
    else:
        file = _local_file(base, "model.safetensors")
    if file is None:
        return None
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header: dict[str, Any] = json.loads(opened.read(size))
    entry = next((value for key, value in header.items() if key.endswith(name)), None)
    if entry is None or entry["dtype"] not in KINDS or len(entry["shape"]) != 2:
        return None
    rows, width = entry["shape"]
    return Table(file, 8 + size + entry["data_offsets"][0], rows, width, entry["dtype"])


def _local_file(base: str, name: str) -> Path | None:
    if Path(base).is_dir():
        return Path(base) / name if (Path(base) / name).is_file() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(base, name)
    return Path(found) if isinstance(found, str) else None
