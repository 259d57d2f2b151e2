"""What the base's config and index say, and what they have to say after the merge."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

from lorasft.artifact import Artifact
from lorasft.merge.shards import Shard
from lorasft.tensors import INDEX

CONFIG = "config.json"


def rewrite_config(
    artifact: Artifact, shards: Sequence[Shard], targets: Sequence[Shard], *, vocabulary: int | None
) -> dict[str, bytes]:
    """The base's config and index where its tensors get other forms or names; else nothing.

    `vocabulary`: how many tokens the embedding has, if the adapter changed that.
    """
    if list(shards) == list(targets):
        return {}
    base, config = artifact.base, copy.deepcopy(dict(artifact.base_config))
    config.pop("quantization_config", None)
    if vocabulary is not None:
        config.get("text_config", config)["vocab_size"] = vocabulary
    after = {entry.name: entry for shard in targets for entry in shard.entries}
    files = {CONFIG: _to_json(config)}
    if (base / INDEX).is_file():
        index = json.loads((base / INDEX).read_text(encoding="utf-8"))
        index["weight_map"] = {name: file for name, file in index["weight_map"].items() if name in after}
        index.setdefault("metadata", {})["total_size"] = sum(entry.size for entry in after.values())
        files[INDEX] = _to_json(index)
    return files


def _to_json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
