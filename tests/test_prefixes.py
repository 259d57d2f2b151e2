"""Trees of shared prefixes: every sequence is there, sees its own path and nothing else, and learns the same."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_architectures import make_model, siblings
from test_families import find_config
from test_oracles import Rows, assert_same_step, differences, oracle, ours, packed_step, plain_step
from test_train import metrics
from tiny_models import CONFIGS, Given, make_base
from transformers import AttentionInterface

from lorasft.cli import main
from lorasft.data import packing
from lorasft.data.packing import MicroBatch, Plan, make_micro_batches
from lorasft.data.prefixes import Sharing
from lorasft.data.store import Tokens, all_supervised
from lorasft.model.attention import SEGMENTS, Paths, attend, default_attention
from lorasft.model.loss import Network, pair_losses
from lorasft.model.scoring import log_probabilities
from lorasft.model.selfcheck import verify
from lorasft.training.layout import choose_sharing, widen
from lorasft.training.state import Layout

Write = Callable[..., str]

# Two token ids make many common beginnings, also whole sequences that others begin with, and equal ones.
sequences = st.lists(st.lists(st.integers(1, 2), min_size=2, max_size=12), min_size=1, max_size=12)


def store(rows: list[list[int]]) -> Given:
    return Given([all_supervised(np.array(row, dtype=np.int32)) for row in rows])


def path_of(batch: MicroBatch, source: int) -> np.ndarray[Any, Any]:
    """Places in the row of all that the token at `source` sees, itself last."""
    (own,) = (segment for segment in batch.segments if segment.start <= source < segment.end)
    before = [batch.segments[number] for number in own.ancestors]
    return np.concatenate([*(np.arange(one.start, one.end) for one in before), np.arange(own.start, source + 1)])


@settings(deadline=None)
@given(sequences, st.integers(1, 60), st.sampled_from(["auto", True, False]))
def test_every_sequence_is_its_path(rows: list[list[int]], capacity: int, share: Sharing) -> None:
    learned = []
    for batch in make_micro_batches(store(rows).sequences, range(len(rows)), capacity=capacity, share=share):
        assert len(batch.ids) <= max(capacity, *(len(row) - 1 for row in rows))
        assert [segment.start for segment in batch.segments[1:]] == [segment.end for segment in batch.segments[:-1]]
        assert batch.segments[0].start == 0 and batch.segments[-1].end == len(batch.ids)
        for source, target, example in zip(batch.sources, batch.targets, batch.examples, strict=True):
            path = path_of(batch, source)
            assert [*batch.ids[path], target] == rows[example][: len(path) + 1]
            assert batch.positions[path].tolist() == list(range(len(path)))
            learned.append((int(example), len(path)))
    assert sorted(learned) == [(example, place) for example, row in enumerate(rows) for place in range(1, len(row))]


@settings(deadline=None)
@given(sequences)
def test_with_room_each_beginning_is_computed_once(rows: list[list[int]]) -> None:
    beginnings = {tuple(row[:end]) for row in rows for end in range(1, len(row))}
    batches = list(make_micro_batches(store(rows).sequences, range(len(rows)), capacity=1000, share=True))
    assert sum(len(batch.ids) for batch in batches) == len(beginnings)


@settings(deadline=None)
@given(sequences, st.integers(1, 60))
def test_sharing_never_computes_more(rows: list[list[int]], capacity: int) -> None:
    def count(share: Sharing) -> int:
        return sum(
            len(batch.ids)
            for batch in make_micro_batches(store(rows).sequences, range(len(rows)), capacity=capacity, share=share)
        )

    assert max(count(True), count("auto")) <= count(False)


def test_a_tree_is_cut_where_the_least_is_repeated() -> None:
    """Two conversations behind one system prompt: the cut falls between them, not inside one."""
    rows = [[9] * 20 + [talk] * 20 + [answer] * 6 for talk in (1, 2) for answer in (3, 4, 5)]
    batches = list(make_micro_batches(store(rows).sequences, range(6), capacity=60, share=True))
    assert [len(batch.ids) for batch in batches] == [55, 55]
    assert {tuple(sorted(set(batch.examples.tolist()))) for batch in batches} == {(0, 1, 2), (3, 4, 5)}


def test_a_short_common_beginning_is_not_worth_its_segments() -> None:
    rows = [[9] * 20 + [answer] * 6 for answer in (1, 2)]
    (automatic,) = make_micro_batches(store(rows).sequences, range(2), capacity=100, share="auto")
    (shared,) = make_micro_batches(store(rows).sequences, range(2), capacity=100, share=True)
    assert (len(automatic.ids), len(shared.ids)) == (50, 30)


def bytes_of(batch: MicroBatch) -> list[Any]:
    return [value.tobytes() if isinstance(value, np.ndarray) else value for value in vars(batch).values()]


def test_without_a_shared_prefix_the_plan_is_the_same_bytes_and_nothing_is_gathered() -> None:
    random = np.random.default_rng(0)
    rows = store([[first, *random.integers(50, 90, random.integers(2, 90)).tolist()] for first in range(40)])
    plain = Plan(40, 20, 2, seed=3, loss="example", micro_batch_tokens=128)
    for number in (1, 2):
        steps = [replace(plan, share_prefixes=share).step(number, rows) for plan in (plain,) for share in (False, True)]
        batches = [[bytes_of(batch) for batch in step.micro_batches] for step in steps]
        assert batches[0] == batches[1]
        for batch in steps[1].micro_batches:
            lengths = [segment.end - segment.start for segment in batch.segments]
            paths = Paths(lengths, [segment.ancestors for segment in batch.segments])
            keys = torch.zeros(1, 2, len(batch.ids), 4)
            assert paths.gather(keys) is keys


def test_equal_pairs_are_counted_for_each_example() -> None:
    """The stem and its first answer, three times; once with another answer."""
    stem = [5, 6, 7]
    rows = store([[*stem, 8, 9]] * 3 + [[*stem, 4, 9]])
    (batch,) = make_micro_batches(rows.sequences, range(4), capacity=100, share=True)
    pairs = Counter(zip(batch.sources.tolist(), batch.targets.tolist(), strict=True))
    assert sorted(pairs.values()) == [1, 1, 3, 3, 4, 4]
    step = Plan(4, 4, 1, 0, "token", 100, share_prefixes=True).step(1, rows)
    assert step.supervised_tokens == 16 and step.divisor == 16 and step.tokens == 5


class Relatives(Rows):
    """Random examples with common beginnings, supervised within them or not, one of them twice."""

    def __init__(self) -> None:
        random = np.random.default_rng(3)
        stem, bough = self._tokens(random, 14), self._tokens(random, 9)
        rows = [[stem, self._tokens(random, 6)], [stem, bough, self._tokens(random, 4)], [stem, bough], [stem, bough]]
        rows += [[stem, bough, self._tokens(random, 12)], [self._tokens(random, 17)]]
        self.rows = [(self._join(parts),) for parts in rows]
        self.rows[0] = (*self.rows[0], self._join([stem, bough, self._tokens(random, 5)]))

    @staticmethod
    def _join(parts: list[Tokens]) -> Tokens:
        ids, labels = (np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "labels"))
        return Tokens(ids, labels)


@pytest.mark.parametrize("loss", ["token", "example"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_shared_step_equals_plain_transformers(name: str, loss: str) -> None:
    rows = Relatives()
    want = plain_step(oracle(name), rows, loss)
    model, network = ours(name)
    assert network.share == "auto", network.notices
    for capacity in (1, 40, 1000):
        assert_same_step(packed_step(model, network, rows, loss, capacity, share=True), want)


def forget_the_bough(batch: MicroBatch) -> MicroBatch:
    """A segment sees the root and itself, not what stands between."""
    segments = [replace(segment, ancestors=segment.ancestors[:1]) for segment in batch.segments]
    return replace(batch, segments=tuple(segments))


def see_the_sibling(batch: MicroBatch) -> MicroBatch:
    """A segment sees the one before it in the row."""
    segments = [replace(one, ancestors=tuple({*one.ancestors, max(0, n - 1)})) for n, one in enumerate(batch.segments)]
    return replace(batch, segments=(batch.segments[0], *segments[1:]))


def start_over(batch: MicroBatch) -> MicroBatch:
    """Positions begin at 0 in every segment."""
    return replace(batch, positions=np.concatenate([np.arange(one.end - one.start) for one in batch.segments]))


def weigh_once(batch: MicroBatch) -> MicroBatch:
    """A pair of several examples counts once."""
    _, first = np.unique(np.stack([batch.sources, batch.targets]), axis=1, return_index=True)
    arrays = ("sources", "targets", "weights", "examples")
    return replace(batch, **{name: getattr(batch, name)[first] for name in arrays})


@pytest.mark.parametrize("mutant", [forget_the_bough, see_the_sibling, start_over, weigh_once])
def test_the_oracle_catches_mutants(mutant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Relatives()
    _, want = plain_step(oracle("llama"), rows, "token")
    model, network = ours("llama")
    monkeypatch.setattr(
        packing, "make_micro_batches", lambda *args, **kwargs: map(mutant, make_micro_batches(*args, **kwargs))
    )
    assert differences(packed_step(model, network, rows, "token", 1000, share=True)[1], want)[0] > 1e-2


def test_the_self_check_sees_a_branch_that_looks_at_its_sibling() -> None:
    def nosy(*args: Any, segments: Paths, **kwargs: Any) -> Any:
        ancestors = [tuple(range(number)) if before else () for number, before in enumerate(segments.ancestors)]
        return attend(*args, segments=replace(segments, ancestors=ancestors), **kwargs)

    AttentionInterface.register(SEGMENTS, nosy)
    try:
        network = verify(make_base("llama"))
    finally:
        AttentionInterface.register(SEGMENTS, attend)
    assert network.segments and network.share is False and "shared prefixes" in network.notices[0]


def test_scores_stay_with_their_examples() -> None:
    network = verify(make_base("llama"))
    rows = [tokens.ids for tokens in siblings()]
    alone = log_probabilities(replace(network, share=False), rows, capacity=1)
    for got, want in zip(log_probabilities(replace(network, share=True), rows, capacity=60), alone, strict=True):
        assert np.allclose(got, want, atol=1e-5)


def test_positions_by_the_longest_of_a_row_keep_short_and_long_apart() -> None:
    """Phi-4 mini's longrope turns all positions of a row by other factors once one is past 64."""
    model = make_model(find_config("phi-4-mini"))
    random = np.random.default_rng(1)
    stem = random.integers(3, 90, 30)
    rows = Given(
        [all_supervised(np.concatenate([stem, random.integers(3, 90, n)]).astype(np.int32)) for n in (60, 9, 50, 5)]
    )
    network = verify(model)
    batches = list(
        make_micro_batches(
            rows.sequences, range(4), capacity=200, share=True, rope_switch_length=network.rope_switch_length
        )
    )
    assert [sorted(set(batch.examples.tolist())) for batch in batches] == [[1, 3], [0, 2]]
    model.set_attn_implementation(default_attention(model.config))
    plain = Network(model, head=None, segments=False)
    alone = {
        int(batch.examples[0]): pair_losses(plain, batch)
        for batch in make_micro_batches(rows.sequences, range(4), capacity=1)
    }
    model.set_attn_implementation(SEGMENTS)
    for batch in batches:
        losses = pair_losses(network, batch)
        for example in set(batch.examples.tolist()):
            assert torch.allclose(losses[torch.as_tensor(batch.examples == example)], alone[example], atol=1e-5)


def test_a_run_shares_and_learns_the_same(recipe: Write, tmp_path: Path) -> None:
    """The layout keeps the decision, and a resumed run goes on as it began."""
    results = {}
    for share in (True, False):
        folder = tmp_path / str(share)
        settings: dict[str, Any] = {"adapter": {"dropout": 0.0}, "train": {"steps": 4}, "run": {"output": str(folder)}}
        assert main(["train", recipe(**settings, machine={"share_prefixes": share})]) == 0
        layout = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))["layout"]
        assert layout["share_prefixes"] is share
        results[share] = [line for line in metrics(folder) if "loss" in line]
    for one, other in zip(results[True], results[False], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["supervised_tokens"] == other["supervised_tokens"] and one["tokens"] < other["tokens"]


def test_the_decision_is_the_recipes_then_the_checkpoints_unless_something_drops_out() -> None:
    network = verify(make_base("gpt2"))
    layout = Layout("float32", 64, recomputed_layers=0, segments=True, share_prefixes=True)
    assert choose_sharing(network, "auto", kept=None).share == "auto"
    assert choose_sharing(network, "auto", kept=layout).share is True
    assert choose_sharing(network, False, kept=layout).share is False
    assert choose_sharing(network, True, kept=None) == replace(network, share=True)
    assert choose_sharing(replace(network, share=False), True, kept=None).share is False
    body = network.causal.transformer
    for part, name in ((body.h[0].attn, "attention_dropout"), (body.drop, "p")):
        setattr(part, name, 0.1)
        assert choose_sharing(network, True, kept=None).share is False
        setattr(part, name, 0.0)


def test_micro_batches_widen_where_a_long_stem_would_be_repeated() -> None:
    """To the first doubling that holds the tree; not for rows with nothing, or little, in common."""
    random = np.random.default_rng(0)

    def rows(stem: int) -> Given:
        first = random.integers(0, 1000, stem)
        tails = [random.integers(0, 1000, 100) for _ in range(32)]
        return Given([all_supervised(np.concatenate([first, tail]).astype(np.int32)) for tail in tails])

    plan = Plan(32, 32, 1, seed=0, loss="token", micro_batch_tokens=1024, share_prefixes="auto")
    assert widen(plan, rows(800)) == 4096  # 800 + 32 * 100 tokens
    assert widen(plan, rows(0)) == widen(plan, rows(20)) == 1024
    assert widen(replace(plan, share_prefixes=False), rows(800)) == 1024
