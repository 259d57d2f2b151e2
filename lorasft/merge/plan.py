"""What a merge will write, settled before the first byte."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lorasft.artifact import Artifact
from lorasft.merge.changes import read_changes
from lorasft.merge.config import rewrite_config
from lorasft.merge.fold import Change
from lorasft.merge.packed import Packed, find_packed, unpacked_forms
from lorasft.merge.shards import Form, Shard, read_shard, reform_shard
from lorasft.tensors import find_weights

Onto = Literal["original", "dequantized"]


@dataclass(frozen=True)
class Choice:
    """Which base the update is added to, and why in one line."""

    onto: Onto
    why: str


@dataclass(frozen=True)
class Plan:
    """A checkpoint as it is and as it is to be."""

    shards: tuple[Shard, ...]  # as they are
    targets: tuple[Shard, ...]  # the same files as they are to be
    changes: Mapping[str, Change]  # what becomes of tensors, by their names in the files
    packed: Mapping[str, Packed]  # the weights that the base stores in 4 bit, and that are written in 16
    files: Mapping[str, bytes]  # config and index where they do not stay as they are

    @property
    def size(self) -> int:
        """Bytes of weights."""
        return sum(shard.size for shard in self.targets)


def plan_merge(artifact: Artifact) -> Plan:
    """What a merge of `artifact` will write. Raises ModelError for what does not fit or is not supported."""
    shards = tuple(read_shard(path) for path in find_weights(artifact.base))
    packed = find_packed(shards)
    forms = unpacked_forms(packed)
    unpacked = [reform_shard(shard, forms) for shard in shards]
    changes = read_changes(artifact, unpacked)
    entries = [entry for shard in unpacked for entry in shard.entries if entry.name in changes]
    resized = {entry.name: Form(entry.dtype, changes[entry.name].shape) for entry in entries
               if changes[entry.name].shape != entry.shape}  # fmt: skip
    targets = tuple(reform_shard(shard, resized) for shard in unpacked)
    vocabulary = next((form.shape[0] for form in resized.values()), None)
    return Plan(shards, targets, changes, packed, rewrite_config(artifact, shards, targets, vocabulary=vocabulary))
