"""Sequences that begin with the same tokens, as trees: what they have in common is computed once.

In sorted order all that is common follows from one number for each sequence: how many tokens it shares with the one
before it. A node of a tree is a stretch of these numbers above their surroundings; to give it up is to lower them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, takewhile
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Sharing = Literal["auto"] | bool  # auto: where it saves work after its own cost; true: whatever it saves

# A segment costs about as much as computing this many tokens, on two cores with 56 million parameters: a stem of 16
# tokens before eight branches gives 0.97 times the speed, of 48 tokens 1.14 (scripts/bench.py prefix). Larger models
# pay less.
_SEGMENT_COST = 16


@dataclass
class Tree:
    """Sequences that are computed together; a single one is a tree too."""

    members: list[int]  # numbers of sequences, in sorted order
    common: list[int]  # tokens that each member shares with the one before it; 0 for the first
    tokens: int  # computed


def build_trees(sequences: Sequence[NDArray[np.int64]], *, capacity: int, share: Sharing) -> list[Tree]:
    """Trees over `sequences`, each of at most max(capacity, longest sequence) tokens, in the order of first members."""
    lengths = [len(ids) for ids in sequences]
    if share is False or len(sequences) < 2:
        return [Tree([index], [0], length) for index, length in enumerate(lengths)]
    # Big-endian bytes compare as their numbers do.
    order = sorted(range(len(sequences)), key=[ids.astype(">i4").tobytes() for ids in sequences].__getitem__)
    limit = max(capacity, *lengths)
    common = [0, *(count_common(sequences[a], sequences[b]) for a, b in pairwise(order))]
    common = drop_small_nodes(common, cost=_SEGMENT_COST if share == "auto" else 0)
    trees: list[Tree] = []
    for index, shared in zip(order, common, strict=True):
        added = lengths[index] - shared
        if shared and trees[-1].tokens + added <= limit:
            trees[-1].members.append(index)
            trees[-1].common.append(shared)
            trees[-1].tokens += added
        else:
            trees.append(Tree([index], [0], lengths[index]))
    return sorted(trees, key=lambda tree: min(tree.members))


def drop_small_nodes(common: Sequence[int], *, cost: int) -> list[int]:
    """`common` without the nodes that are not worth their segments: a run of L tokens with c branches saves (c - 1) L
    tokens and makes one more segment, and c that look back."""
    kept = list(common)
    open_nodes: list[tuple[int, list[int]]] = [(0, [])]  # depth, and where branches but the first begin
    for place, shared in enumerate([*common[1:], 0], start=1):
        while open_nodes[-1][0] > shared:
            depth, places = open_nodes.pop()
            around = max(open_nodes[-1][0], shared)
            if len(places) * (depth - around) > cost * (len(places) + 2):
                continue
            for branch in places:
                kept[branch] = around
            if open_nodes[-1][0] < around:
                open_nodes.append((around, []))
            open_nodes[-1][1].extend(places)
        if open_nodes[-1][0] < shared:
            open_nodes.append((shared, []))
        open_nodes[-1][1].append(place)
    return kept


def branch_ends(common: Sequence[int], place: int, length: int) -> list[int]:
    """Where the tokens that the member at `place` adds are cut: where a later member leaves them, and at its end."""
    lowest = accumulate([length, *common[place + 1 :]], min)
    return sorted({*takewhile(lambda end: end > common[place], lowest)})


def count_common(one: NDArray[Any], other: NDArray[Any]) -> int:
    """How many numbers two sequences begin with in common."""
    size = min(len(one), len(other))
    return int(np.append(one[:size] != other[:size], True).argmax())
