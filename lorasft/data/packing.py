"""Which examples make a step, and how a step is cut into flat micro-batches of segments, where nothing is padded.

The examples are a pure function of seed and step. How they are cut depends on the machine and changes no result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lorasft.data.prefixes import Sharing, Tree, branch_ends, build_trees
from lorasft.data.store import Ints, Tokens, TokenStore

Sequences = Callable[[int], tuple[Tokens, ...]]  # the tokenized sequences of an example


@dataclass(frozen=True)
class Segment:
    """A run of tokens in a flat row, which see the segment's ancestors, then its own tokens up to themselves."""

    start: int
    end: int
    ancestors: tuple[int, ...] = ()  # numbers of segments of the row, the root first


@dataclass(frozen=True)
class Spread:
    """A row in pieces that several processes compute together: a piece sees those before it, wherever they are."""

    processes: int
    size: int  # tokens of the process that has most: each gives as many keys, its last ones of no meaning
    starts: tuple[int, ...]  # where the keys of each piece begin among those of all processes
    lengths: tuple[int, ...]  # tokens of each piece
    own: tuple[int, ...]  # numbers of the pieces that this process computes


@dataclass(frozen=True)
class MicroBatch:
    """One forward and backward pass: a flat row of tokens and the supervised pairs."""

    ids: Ints  # (tokens,)
    positions: Ints  # (tokens,) of a segment: from its last ancestor's on, or from 0
    segments: tuple[Segment, ...]
    sources: Ints  # (pairs,) index into the row
    targets: Ints  # (pairs,) token ids
    weights: NDArray[np.float32]  # (pairs,) where no row has any: 1 under `loss: token`, 1/|y| under `loss: example`
    examples: Ints  # (pairs,) which example of the store a pair belongs to
    spread: Spread | None = None  # where it is a process's part of a row; ancestors of its segments are pieces then


@dataclass(frozen=True)
class Step:
    """The work of one optimizer step, cut for this machine."""

    number: int  # from 1
    epoch: float  # epochs done after this step
    examples: Ints
    micro_batches: tuple[MicroBatch, ...]

    @property
    def tokens(self) -> int:
        """Tokens computed."""
        return sum(len(batch.ids) for batch in self.micro_batches)

    @property
    def supervised_tokens(self) -> int:
        """Supervised tokens; one in a shared prefix counts for each example that supervises it."""
        return sum(len(batch.targets) for batch in self.micro_batches)

    @property
    def divisor(self) -> float:
        """What the weighted sum of losses is divided by: the sum of all weights, tokens or examples."""
        return float(sum(batch.weights.sum(dtype=np.float64) for batch in self.micro_batches))


@dataclass(frozen=True)
class Portion:
    """What an epoch takes of the rows of one source, which lie together in the training set."""

    rows: int  # of the source, at least one
    share: float

    @property
    def taken(self) -> int:
        return max(min(1, self.rows), round(self.share * self.rows))

    def __str__(self) -> str:
        return f"{self.taken:,}" + f" (of {self.rows:,})" * (self.taken != self.rows)


@dataclass(frozen=True)
class Plan:
    """The whole run as a pure function of the step."""

    examples: int  # of an epoch
    batch_size: int  # examples per optimizer step; the last step of an epoch takes what is left
    steps: int  # optimizer steps of the run
    seed: int
    loss: Literal["token", "example"]
    micro_batch_tokens: int
    processes: int = 1  # that share the micro-batches of a step
    share_prefixes: Sharing = False
    rope_switch_length: int | None = None  # see `make_micro_batches`
    portions: tuple[Portion, ...] = ()  # none: an epoch takes each row once
    spread: bool = False  # sequences of more than micro_batch_tokens are computed by all processes together

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.examples / self.batch_size)

    @property
    def epochs_for_all(self) -> int:
        """Epochs after which every row has come."""
        return max((math.ceil(portion.rows / portion.taken) for portion in self.portions), default=1)

    def order(self, epoch: int) -> Ints:
        """The rows of epoch `epoch` (from 0) that the run takes, in order."""
        order = mix(self.portions or (Portion(self.examples, 1.0),), seed=self.seed, epoch=epoch)
        return order[: max(0, self.steps - epoch * self.steps_per_epoch) * self.batch_size]

    def step_examples(self, step: int) -> Ints:
        """The rows of step `step` (from 1). Within an epoch a row of a source of share 1 comes exactly once."""
        epoch, position = divmod(step - 1, self.steps_per_epoch)
        start = position * self.batch_size
        return self.order(epoch)[start : start + self.batch_size]

    def first_part(self, batch: MicroBatch) -> MicroBatch:
        """What the first process computes of `batch`, if it computes any of it."""
        return spread(batch, 0, self.processes) if self.spread and len(batch.ids) > self.micro_batch_tokens else batch

    def step(self, number: int, rows: TokenStore) -> Step:
        """The rows of a step, cut into micro-batches."""
        examples = self.step_examples(number)
        batches = make_micro_batches(
            rows.sequences,
            examples,
            capacity=self.micro_batch_tokens,
            loss=self.loss,
            processes=self.processes,
            share=self.share_prefixes,
            rope_switch_length=self.rope_switch_length,
        )
        return Step(number, number / self.steps_per_epoch, examples, tuple(batches))


@lru_cache(maxsize=2)
def mix(portions: tuple[Portion, ...], *, seed: int, epoch: int) -> Ints:
    """The rows that an epoch takes of all sources, shuffled: a pure function of seed and epoch.

    Of each source the next ones of an endless order, in which every row has come once before one comes again.
    """
    drawn, first = [], 0
    for number, portion in enumerate(portions):
        rows, begin = portion.rows, epoch * portion.taken
        # Another seed than any that a recipe has: what is drawn tells nothing of where in the epoch it comes.
        own = seed + ((number + 1) << 32)
        for turn in range(begin // rows, math.ceil((begin + portion.taken) / rows)):
            start, end = max(0, begin - turn * rows), min(rows, begin + portion.taken - turn * rows)
            order = shuffle(rows, seed=own, epoch=turn) if end - start < rows else np.arange(rows)
            drawn.append(first + np.sort(order[start:end]))
        first += rows
    found: Ints = np.concatenate(drawn)[shuffle(sum(map(len, drawn)), seed=seed, epoch=epoch)]
    found.flags.writeable = False  # remembered for the other steps of the epoch
    return found


@lru_cache(maxsize=8)
def shuffle(count: int, *, seed: int, epoch: int) -> Ints:
    """A permutation of 0..count-1 by splitmix64 of (seed, epoch, index) (Steele, Lea, Flood 2014): the same on every
    machine and with every version of numpy."""
    salt = _mix(np.array([seed], dtype=np.uint64) * np.uint64(0x10001) + np.uint64(epoch))[0]
    keys = _mix(np.arange(count, dtype=np.uint64) + salt)
    order = np.argsort(keys, kind="stable").astype(np.int64)
    order.flags.writeable = False  # remembered for the other steps of the epoch
    return order


def make_micro_batches(
    sequences: Sequences,
    examples: Iterable[int],
    *,
    capacity: int,
    loss: Literal["token", "example"] = "token",
    processes: int = 1,
    share: Sharing = False,
    rope_switch_length: int | None = None,
) -> Iterator[MicroBatch]:
    """Cut examples into micro-batches of at most `capacity` tokens, or of one longer sequence; best fit.

    Several processes get smaller ones where that gives each of them work. What comes after the last target of a
    sequence is not computed. With `share`, what sequences begin with in common is computed once. Sequences up to
    `rope_switch_length` tokens and longer ones never meet: some models compute all positions of a row by its longest.
    """
    pieces = [piece for example in examples for piece in _pieces(sequences(example), example, loss)]
    switch = rope_switch_length or math.inf
    for is_long in (False, True):
        kind = [piece for piece in pieces if (len(piece.ids) > switch) == is_long]
        ids, room = [piece.ids for piece in kind], capacity
        trees = build_trees(ids, capacity=room, share=share)
        if processes > 1:
            tokens = _count_tokens(trees)
            rounds = max(1, math.ceil(tokens / (capacity * processes)))
            # Equally many for each, 3 % to fit them in, and what a tree repeats when it is cut.
            repeated = max((shared for tree in trees for shared in tree.common), default=0)
            room = min(capacity, math.ceil(1.03 * tokens / (rounds * processes)) + repeated)
            trees = build_trees(ids, capacity=room, share=share)
        yield from (layout_segments(kind, trees) for trees in best_fit_decreasing(trees, capacity=room))


def best_fit_decreasing(trees: list[Tree], *, capacity: int) -> list[list[Tree]]:
    """Best fit in order of falling size."""
    bins: list[list[Tree]] = []
    for tree in sorted(trees, key=lambda tree: -tree.tokens):
        fits = [some for some in bins if _count_tokens(some) + tree.tokens <= capacity]
        if fits:
            max(fits, key=_count_tokens).append(tree)
        else:
            bins.append([tree])
    return bins


@dataclass(frozen=True)
class Share:
    """Which part of the work is this process's."""

    index: int = 0
    count: int = 1
    in_step: bool = False  # each pass is one of all processes
    spread_above: float = math.inf  # tokens, above which a micro-batch is computed by all together


def assign(batches: Iterable[MicroBatch], share: Share) -> list[MicroBatch]:
    """The micro-batches of the process of `share`: the dearest first, each to the one with the least to do.

    In step each gets as many, the cheapest once more, without its pairs, where there is nothing left.
    """
    batches = list(batches)
    if share.count == 1:
        return batches
    spent, each = [0.0] * share.count, [list[MicroBatch]() for _ in range(share.count)]
    order = sorted((one for one in batches if len(one.ids) <= share.spread_above), key=cost, reverse=True)
    for batch in order:
        chosen = spent.index(min(spent))
        spent[chosen] += cost(batch)
        each[chosen].append(batch)
    missing = share.in_step * (max(map(len, each)) - len(each[share.index]))
    filling = [replace(one, sources=one.sources[:0], targets=one.targets[:0], weights=one.weights[:0],
                       examples=one.examples[:0]) for one in order[-1:]]  # fmt: skip
    parts = [spread(one, share.index, share.count) for one in batches if len(one.ids) > share.spread_above]
    return [*parts, *each[share.index], *filling * missing]


def spread(batch: MicroBatch, index: int, count: int) -> MicroBatch:
    """The part of process `index` of `count` in a row that all compute: of each segment a piece near its begin, which
    sees few, and the one as near to its end, which sees many."""
    pieces: list[tuple[int, int, tuple[int, ...], int]] = []  # start, end, pieces that it sees, process
    of: list[list[int]] = []  # of each segment its pieces
    for segment in batch.segments:
        before = [piece for number in segment.ancestors for piece in of[number]]
        cuts = np.linspace(segment.start, segment.end, 2 * count + 1).round().astype(int).tolist()
        of.append([])
        for place, (start, end) in enumerate(pairwise(cuts)):
            if start < end:
                pieces.append((start, end, (*before, *of[-1]), min(place, 2 * count - 1 - place)))
                of[-1].append(len(pieces) - 1)
    lengths, filled, starts = [end - start for start, end, *_ in pieces], [0] * count, []
    for length, (*_, process) in zip(lengths, pieces, strict=True):
        starts.append(filled[process])
        filled[process] += length
    own = [number for number, piece in enumerate(pieces) if piece[3] == index]
    local = np.concatenate([np.arange(*pieces[number][:2]) for number in own])
    places = np.full(len(batch.ids), -1)
    places[local] = np.arange(len(local))
    here, most = places[batch.sources] >= 0, max(filled)
    keys = tuple(piece[3] * most + start for piece, start in zip(pieces, starts, strict=True))
    return MicroBatch(
        ids=batch.ids[local],
        positions=batch.positions[local],
        segments=tuple(Segment(starts[one], starts[one] + lengths[one], pieces[one][2]) for one in own),
        sources=places[batch.sources[here]],
        targets=batch.targets[here],
        weights=batch.weights[here],
        examples=batch.examples[here],
        spread=Spread(count, most, keys, tuple(lengths), tuple(own)),
    )


def cost(batch: MicroBatch) -> float:
    """Tokens, and for attention one more for 16,384 pairs of query and key (6 times a hidden size of 2,700)."""
    lengths = [one.end - one.start for one in batch.segments]
    all_lengths = batch.spread.lengths if batch.spread else lengths
    ancestors = [sum(all_lengths[n] for n in one.ancestors) for one in batch.segments]
    pairs = sum(own * (own + before) for own, before in zip(lengths, ancestors, strict=True))
    return len(batch.ids) + pairs / 2 / 16_384


def _pieces(sequences: tuple[Tokens, ...], example: int, loss: str) -> Iterator[MicroBatch]:
    """Each sequence of an example as a micro-batch of its own."""
    supervised = [np.flatnonzero(tokens.labels != -100) for tokens in sequences]
    given = [
        np.ones(len(places)) if tokens.weights is None else tokens.weights[places].astype(np.float64)
        for tokens, places in zip(sequences, supervised, strict=True)
    ]
    whole = 1.0 if loss == "token" else sum(one.sum() for one in given)
    for tokens, places, own_weights in zip(sequences, supervised, given, strict=True):
        if len(places) == 0:
            continue
        ids = tokens.ids.astype(np.int64)
        # The shift, made here and nowhere else: the token at p is predicted from position p - 1.
        weights = (tokens.row_weight / whole * own_weights).astype(np.float32)
        own, row = np.full(len(places), example, dtype=np.int64), np.arange(places[-1])
        yield MicroBatch(ids[: len(row)], row, (Segment(0, len(row)),), places - 1, ids[places], weights, own)


def layout_segments(pieces: list[MicroBatch], trees: list[Tree]) -> MicroBatch:
    """Lay trees out in a row, segment after segment, and point the pairs of each piece at the tokens it is made of."""
    segments: list[Segment] = []
    runs: list[tuple[Ints, ...]] = []  # of each segment: ids, positions
    pairs: list[tuple[NDArray[Any], ...]] = []  # of each piece: sources, targets, weights, examples
    for tree in trees:
        path: list[tuple[int, int]] = []  # of the last piece: number of a segment, tokens of the piece up to its end
        for place, (member, start) in enumerate(zip(tree.members, tree.common, strict=True)):
            piece = pieces[member]
            path = [(number, end) for number, end in path if end <= start]
            for end in branch_ends(tree.common, place, len(piece.ids)):
                begin = segments[-1].end if segments else 0
                segments.append(Segment(begin, begin + end - start, tuple(number for number, _ in path)))
                runs.append((piece.ids[start:end], piece.positions[start:end]))
                path.append((len(segments) - 1, end))
                start = end
            row = np.concatenate([np.arange(segments[number].start, segments[number].end) for number, _ in path])
            pairs.append((row[piece.sources], piece.targets, piece.weights, piece.examples))
    ids, positions = map(np.concatenate, zip(*runs, strict=True))
    sources, targets, weights, examples = map(np.concatenate, zip(*pairs, strict=True))
    return MicroBatch(ids, positions, tuple(segments), sources, targets, weights, examples)


def _count_tokens(trees: list[Tree]) -> int:
    return sum(tree.tokens for tree in trees)


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64, element by element; overflow is part of it."""
    with np.errstate(over="ignore"):
        state = state + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return state ^ (state >> np.uint64(31))
