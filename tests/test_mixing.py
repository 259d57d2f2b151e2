"""Mixing: what an epoch takes of each source, counted by itself; held-out losses by source; the same bits resumed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Command
from test_keys import write as write_rows
from test_train import die, metrics, stop_at

from lorasft.cli import main
from lorasft.data.packing import Plan, Portion, mix, shuffle
from lorasft.data.prepare import name_sources
from lorasft.data.store import all_supervised, append_arrays, map_store, pack_examples
from lorasft.files import read_objects, sha256
from lorasft.recipe import DataSource
from lorasft.training.layout import find_heaviest

Write = Callable[..., str]
PORTIONS = (Portion(60, 0.2), Portion(40, 1.0), Portion(30, 1.5), Portion(7, 0.01), Portion(5, 3.2), Portion(1, 1.0))
# Of 12 rows under seed 3 in steps of 5, written down before sources had shares.
BEFORE = [[1, 7, 5, 2, 4], [0, 6, 10, 9, 11], [3, 8], [4, 0, 3, 2, 8], [11, 10, 6, 1, 9], [7, 5], [11, 5, 1, 7, 2]]


def test_the_order_of_recipes_without_shares_is_what_it_was() -> None:
    plans = [Plan(12, 5, 9, 3, "token", 100, portions=parts) for parts in ((), (Portion(5, 1.0), Portion(7, 1.0)))]
    assert all([plan.step_examples(number).tolist() for number in range(1, 8)] == BEFORE for plan in plans)


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_every_row_of_a_source_has_come_once_before_one_comes_again(seed: int) -> None:
    ends = np.cumsum([portion.rows for portion in PORTIONS])
    taken = [12, 40, 45, 1, 16, 1]  # by hand
    steps = -(-sum(taken) // 8)
    plan = Plan(sum(taken), 8, 25 * steps, seed, "token", 100, portions=PORTIONS)
    come: list[Counter[int]] = [Counter() for _ in PORTIONS]
    for epoch in range(25):
        numbers = range(epoch * steps + 1, (epoch + 1) * steps + 1)
        rows = np.concatenate([plan.step_examples(number) for number in numbers])
        sources = np.searchsorted(ends, rows, side="right")
        assert np.bincount(sources).tolist() == taken
        for number, portion in enumerate(PORTIONS):
            come[number].update(rows[sources == number].tolist())
            counts = [come[number][row] for row in range(ends[number] - portion.rows, ends[number])]
            assert sum(counts) == (epoch + 1) * taken[number] and max(counts) - min(counts) <= 1
    assert plan.epochs_for_all == 7
    mix.cache_clear()
    shuffle.cache_clear()
    assert (np.sort(plan.order(24)) == np.sort(rows)).all() and (plan.order(24) == rows).all()


def test_what_is_drawn_differs_by_seed_and_says_nothing_of_its_place() -> None:
    drawn = [mix((Portion(1000, 0.1),), seed=seed, epoch=0) for seed in range(40)]
    assert len({tuple(sorted(order.tolist())) for order in drawn}) == 40
    places = np.concatenate([np.corrcoef(order, np.arange(100))[:1, 1] for order in drawn])
    assert abs(places.mean()) < 3 * 0.1 / 40**0.5  # the spread of a correlation of 100 points is 0.1


def test_the_heaviest_batch_may_come_in_a_later_epoch(tmp_path: Path) -> None:
    sequences = [[all_supervised(np.arange(200 if number == 3 else 5))] for number in range(40)]
    each = {"lines": range(40), "digests": 0, "sources": 0, "row_weights": 1.0, "held_out": False}
    append_arrays(tmp_path, **pack_examples(sequences, files=0, **each))
    rows = map_store(tmp_path, ["rows"])
    sizes = []
    for steps in (5, 20):  # of one epoch, and of four, in which every row comes
        plan = Plan(10, 2, steps, 1, "token", 64, portions=(Portion(40, 0.25),))
        sizes.append(len(find_heaviest(plan, rows).ids))
        assert (3 in plan.order(0)) is False and plan.epochs_for_all == 4
    assert sizes[0] <= 64 < sizes[1]


def test_names_of_sources() -> None:
    def names(*paths: str) -> list[str]:
        return name_sources([DataSource(path=path) for path in paths])

    assert names("/a/b.jsonl", "org/set", "c/*.csv") == ["b.jsonl", "set", "-.csv"]
    assert names("/a/b.jsonl", "/c/b.jsonl") == ["1-b.jsonl", "2-b.jsonl"]


@pytest.fixture
def mixed(recipe: Write, rows: Path, tmp_path: Path) -> Callable[..., str]:
    """A recipe over two sources: 26 rows, and half of 20 others an epoch."""
    talk = lambda n: [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": "yes " * (n % 4 + 1)}]  # noqa: E731
    other = write_rows(tmp_path, [{"messages": talk(n)} for n in range(20)], "other.jsonl")
    return lambda **more: recipe(**more, data={"train": [str(rows), {"path": str(other), "share": 0.5}]})


def test_a_mixed_run_resumes_with_the_same_bits(
    mixed: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Command
) -> None:
    assert main(["train", mixed(run={"output": str(tmp_path / "whole")})]) == 0
    path = mixed(run={"output": str(tmp_path / "parts")})
    for number, more in ((2, []), (7, ["--resume"])):
        with monkeypatch.context() as patch:
            stop_at(patch, number, die)
            assert main(["train", path, *more]) == 130
    assert main(["train", path, "--resume"]) == 0
    want = metrics(tmp_path / "whole")
    assert metrics(tmp_path / "parts") == want
    name = "adapter/adapter_model.safetensors"
    assert sha256(tmp_path / "parts" / name) == sha256(tmp_path / "whole" / name)
    counts = Counter(line["place"].rpartition("/")[2].partition(":")[0] for line in ledger(tmp_path / "whole"))
    said = json.loads((tmp_path / "whole/provenance.json").read_bytes())["report"]["epoch"]
    in_training = {"rows.jsonl": 26 - counts["rows.jsonl"], "other.jsonl": 20 - counts["other.jsonl"]}
    half = round(0.5 * in_training["other.jsonl"])
    told = [f"{in_training['rows.jsonl']}", f"{half} (of {in_training['other.jsonl']})"]
    assert said == dict(zip(in_training, told, strict=True))
    assert sum("loss" in line for line in want) == 3 * -(-(in_training["rows.jsonl"] + half) // 8)
    line = f"an epoch takes {told[0]} of rows.jsonl, {told[1]} of other.jsonl"
    assert line in cli("preview", path).out and line in cli("plan", path, "--memory", "8GB").err
    assert json.loads(cli("plan", path, "--json").out)["examples"] == in_training["rows.jsonl"] + half
    changed = cli("train", path, "--resume", "data.train=[{path: x, share: 0.25}, y]")
    assert changed.code == 2 and "data.train" in changed.err


def ledger(run: Path) -> list[dict[str, Any]]:
    """The held-out rows."""
    return [line for line in read_objects(run / "rows.jsonl") if line["split"] == "held out"]


def test_held_out_losses_by_source_are_those_of_its_rows(mixed: Write, tmp_path: Path, cli: Command) -> None:
    done = cli("train", mixed())
    last = [line for line in metrics(tmp_path / "run") if "eval_loss" in line][-1]
    sums: dict[str, list[float]] = {"rows.jsonl": [0.0, 0], "other.jsonl": [0.0, 0]}
    for line in ledger(tmp_path / "run"):
        own = sums[line["place"].rpartition("/")[2].partition(":")[0]]
        own[0] += line["tokens"] * line["losses"]["last"][1]
        own[1] += line["tokens"]
    for name, (loss, tokens) in sums.items():
        assert last[f"eval_loss/{name}"] == pytest.approx(loss / tokens, rel=1e-6)
    assert last["eval_tokens"] == sum(tokens for _, tokens in sums.values())
    parts = ", ".join(f"{name} {last[f'eval_loss/{name}']:.4f}" for name in sums)
    assert f"held-out loss {last['eval_loss']:.4f} over {last['eval_tokens']} tokens: {parts}\n" in done.err
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    chart = page.partition("Held-out loss by source")[2].partition("</figure>")[0]
    assert all(name in chart for name in sums) and f": {last['eval_loss/other.jsonl']:.6g}" in chart


def test_one_source_that_is_held_out_is_not_told_apart(recipe: Write, tmp_path: Path) -> None:
    assert main(["train", recipe(train={"steps": 3})]) == 0
    assert not any("/" in name for line in metrics(tmp_path / "run") for name in line)


def test_a_share_of_what_is_held_out_is_refused(recipe: Write, rows: Path, cli: Command) -> None:
    path = recipe(data={"eval": [str(rows), {"path": str(rows), "share": 0.5}]})
    done = cli("train", path)
    assert (
        done.code == 2
        and "data.eval takes all rows of a source" in done.err
        and "hint: make a file of some" in done.err
    )
    assert f"where: {path}:1\n" in done.err
