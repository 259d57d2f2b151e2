"""Weights of rows and messages: read from every format, kept, and in the gradients what rows that come twice are."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Command
from test_keys import ALPACA, CHAT, FORMATS, LISTS, A, Q, make, read_row, write
from test_oracles import Rows, assert_same_step, differences, oracle, ours, packed_step, plain_step, weigh
from test_prefixes import Relatives
from test_train import die, metrics, stop_at

from lorasft.cli import main
from lorasft.errors import DataError, LorasftError
from lorasft.files import sha256

Write = Callable[..., str]


@pytest.mark.parametrize("loss", ["token", "example"])
def test_a_weighted_step_is_that_of_plain_transformers(loss: str) -> None:
    """In fp32 to the limits of this project, in every cut; and that in fp64 is another than without weights."""
    want = plain_step(oracle("llama"), weigh(Rows()), loss)
    model, network = ours("llama")
    for capacity in (1, 40, 1000):
        assert_same_step(packed_step(model, network, weigh(Rows()), loss, capacity), want)
    want = plain_step(oracle("llama"), weigh(Relatives()), loss)
    assert_same_step(packed_step(model, network, weigh(Relatives()), loss, 60, share=True), want)
    exact, without = (plain_step(oracle("llama").double(), rows, loss)[1] for rows in (weigh(Rows()), Rows()))
    assert differences(without, exact)[0] > 1e-2


@pytest.mark.parametrize("loss", ["token", "example"])
def test_a_row_of_weight_two_is_the_row_twice(loss: str) -> None:
    twice, heavy = Rows(), Rows()
    twice.rows += twice.rows[1:3]
    heavy.rows[1:3] = [tuple(replace(one, row_weight=2.0) for one in sequences) for sequences in heavy.rows[1:3]]
    model, network = ours("llama")
    assert_same_step(packed_step(model, network, heavy, loss, 100), plain_step(oracle("llama"), twice, loss))


def test_weights_of_messages_lie_on_their_tokens(tmp_path: Path, tiny: Any) -> None:
    messages = [Q, A | {"weight": 0.5}, Q, A | {"content": "BB"}, Q, A | {"content": "CC", "weight": "3"}, Q,
                A | {"content": "DD", "weight": 0}]  # fmt: skip
    made = make(tmp_path, tiny, [CHAT] * 3 + [{"messages": messages, "weight": 4}] + [CHAT | {"weight": 1.0}])
    sequences = [made.train.sequences(number) for number in range(5)]
    (tokens,) = sequences[3]
    assert tokens.weights is not None and tokens.row_weight == 4
    learned = tokens.labels != -100
    found = [(tiny.decode(tokens.ids[place]), weight) for place, weight in enumerate(tokens.weights) if learned[place]]
    texts = {weight: "".join(text for text, own in found if own == weight) for weight in (0.5, 1, 3)}
    assert texts == {0.5: "A<|end|>", 1: "BB<|end|>", 3: "CC<|end|>"}
    assert (tokens.weights[~learned] == 0).all()
    others = [one for number in (0, 1, 2, 4) for one in sequences[number]]
    assert all(one.row_weight == 1 and one.weights is None for one in others)
    assert made.report.weighted_examples == 1 and made.report.unread == []


def test_a_weight_of_a_row_is_none_of_its_messages(tmp_path: Path, tiny: Any) -> None:
    made = make(tmp_path, tiny, [CHAT, CHAT | {"weight": 2}])
    assert [made.train.sequences(number)[0].weights for number in (0, 1)] == [None, None]


@pytest.mark.parametrize("row", [*FORMATS, {"text": "T" * 30}], ids=lambda row: "-".join(row))
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_weight_of_a_row_of_every_format(tmp_path: Path, tiny: Any, row: dict[str, Any], kind: str) -> None:
    given = [row | {"weight": 0.25}, row | {"weight": None if kind == "parquet" else ""}, row | {"weight": 0}]
    if kind == "parquet":
        given = [one | {"weight": one["weight"] and float(one["weight"])} for one in given]
    made = make(tmp_path, tiny, given, f"rows.{kind}")
    assert [made.train.sequences(number)[0].row_weight for number in range(len(made.train))] == [0.25, 1.0]
    assert made.report.rows_of_weight_0 == 1 and made.report.dropped_examples() == 0
    assert [*made.report.notices()] == ["left out, as their weight is 0: 1 of 3 rows"]
    with pytest.raises(DataError, match=r"1 rows read, 0 dropped \(.*\), 1 of weight 0: none left"):
        make(tmp_path, tiny, given[2:], f"rows.{kind}")


@pytest.mark.parametrize("value", [-1, -1e-30, "inf", "nan", 1e10, 1e-10, "much", [1], {"a": 1}])
def test_what_is_no_weight_is_refused_at_its_place(tmp_path: Path, value: Any) -> None:
    for row in (ALPACA | {"weight": value}, {"messages": [Q, A | {"weight": value}]}):
        with pytest.raises(DataError, match="'weight'") as refused:
            read_row(tmp_path, row)
        assert refused.value.where == f"{tmp_path}/rows.jsonl:1" and "data.on_bad_row=drop" in str(refused.value.hint)
        assert "from 1e-09 to 1e+09" in str(refused.value) and "cut off" not in str(refused.value)


def test_a_column_may_be_mapped_to_it(tmp_path: Path) -> None:
    example = read_row(tmp_path, ALPACA | {"score": 0.5}, columns={"weight": "score"}, format="alpaca")
    assert example.weight == 0.5


def test_a_weight_of_a_message_under_everything_is_refused(tmp_path: Path, tiny: Any) -> None:
    with pytest.raises(LorasftError, match="has a weight of its own, under supervise: everything"):
        make(tmp_path, tiny, [{"messages": [Q, A | {"weight": 2}]}], chat={"supervise": "everything"})
    made = make(tmp_path, tiny, [LISTS | {"weight": 2}], chat={"supervise": "everything"})
    assert made.train.sequences(0)[0].row_weight == 2


def test_rows_that_differ_by_their_weights_stay_on_one_side(tmp_path: Path, tiny: Any) -> None:
    talk = [[Q | {"content": f"Q{n}"}, A] for n in range(20)]
    rows = [{"messages": one, "weight": w} for one in talk for w in (1, 2)]
    rows += [{"messages": [one[0], A | {"weight": 3}]} for one in talk]
    made = make(tmp_path, tiny, rows, eval=0.3)
    assert made.held_out is not None and len(made.held_out) == 18
    sides = [{side.arrays["digests"][number] for number in side.chosen} for side in (made.train, made.held_out)]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 20


@pytest.fixture
def weighted(recipe: Write, rows: Path, tmp_path: Path) -> Callable[..., str]:
    """The recipe over its rows with weights of rows and of answers; or, with `weights=False`, without."""
    lines = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    plain = write(tmp_path, lines, "plain.jsonl")
    for number, line in enumerate(lines):
        line["weight"] = 1 + number % 3
        if number % 4 == 1:
            line["messages"][1]["weight"] = 0.5
    heavy = write(tmp_path, lines, "heavy.jsonl")

    def make_recipe(*, weights: bool = True, **more: Any) -> str:
        return recipe(**{**more, "data": {"train": str(heavy if weights else plain), **more.get("data", {})}})

    return make_recipe


def test_a_weighted_run_resumes_with_the_same_bits(
    weighted: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Command
) -> None:
    assert cli("train", weighted(run={"output": str(tmp_path / "whole")})).code == 0
    path = weighted(run={"output": str(tmp_path / "parts")})
    with monkeypatch.context() as patch:
        stop_at(patch, 5, die)
        done = cli("train", path)
    assert done.code == 130 and " held out, 19 weighted; " in done.err  # all but seven of nine of weight 1
    assert main(["train", path, "--resume"]) == 0
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    name = "adapter/adapter_model.safetensors"
    assert sha256(tmp_path / "parts" / name) == sha256(tmp_path / "whole" / name)
    lines = [json.loads(line) for line in cli("preview", path, "--json").out.splitlines()][:-1]
    assert [line.get("row_weight", 1) for line in lines] == [1 + number % 3 for number in range(26)]
    assert {weight for line in lines[:2] for weight in line.get("weights", [])} == {0, 0.5}


def test_held_out_losses_have_no_weights(weighted: Write, tmp_path: Path) -> None:
    losses = []
    for weights in (True, False):
        output = str(tmp_path / f"run{weights}")
        assert main(["train", weighted(weights=weights, run={"output": output}, train={"steps": 3})]) == 0
        losses.append([line for line in metrics(Path(output)) if line["step"] < 2])
    assert losses[0][0]["loss"] != losses[1][0]["loss"]
    assert losses[0][1] == losses[1][1] and "eval_loss" in losses[0][1]


@pytest.mark.parametrize("loss", ["token", "example"])
def test_a_run_on_weights_is_one_on_rows_that_come_as_often(
    loss: str, recipe: Write, rows: Path, tmp_path: Path
) -> None:
    """Each step takes all rows; the data, the loop and the optimizer in between are those of every run."""
    lines = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()][:12]
    heavy = [line | {"weight": 1 + number % 3} for number, line in enumerate(lines)]
    often = [line for number, line in enumerate(lines) for _ in range(1 + number % 3)]
    found = []
    for name, given in (("heavy", heavy), ("often", often)):
        data = {"train": str(write(tmp_path, given, f"{name}.jsonl")), "eval": None}
        run = {"output": str(tmp_path / name), "eval_every": None}
        train = {"batch_size": len(given), "epochs": 5, "loss": loss}
        more = {"model": {"quantization": "none"}, "adapter": {"dropout": 0}}
        assert main(["train", recipe(**more, data=data, train=train, run=run)]) == 0
        found.append([line["loss"] for line in metrics(tmp_path / name)])
    assert found[0] == pytest.approx(found[1], rel=2e-5) and len(set(found[0])) == 5
    assert np.ptp(found[0]) > 0.01 and torch.tensor(found[0]).isfinite().all()
