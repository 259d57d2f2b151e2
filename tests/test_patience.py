"""Early stopping: a run whose held-out loss rises ends as a finished one, and again wherever it is resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Command
from test_ranks import Launch
from test_train import die, metrics, stop_at

from lorasft.cli import main
from lorasft.data.packing import Plan
from lorasft.files import read_objects, sha256
from lorasft.report import History
from lorasft.training import loop, samples
from lorasft.training.state import Layout, State

Write = Callable[..., str]
WEIGHTS = "adapter/adapter_model.safetensors"


@pytest.fixture
def rising(recipe: Write, tmp_path: Path) -> Callable[..., str]:
    """A recipe of 60 steps under which the held-out loss falls at first, then rises."""

    def write(name: str, **run: Any) -> str:
        settings = {"output": str(tmp_path / name), "eval_every": 2, "patience": 2, **run}
        more: dict[str, Any] = {"train": {"epochs": 20}, "schedule": {"name": "constant"}, "adapter": {"alpha": 64}}
        return recipe(optimizer={"learning_rate": 0.01}, run=settings, **more)

    return write


def expected_end(run: Path, patience: int) -> tuple[int, int]:
    """The best step and the last, by hand from the losses that were written down."""
    losses = {line["step"]: line["eval_loss"] for line in metrics(run) if "eval_loss" in line}
    best, since = 0, 0
    for step, loss in losses.items():
        best, since = (step, 0) if step == 0 or loss < losses[best] else (best, since + 1)
        if since == patience:
            return best, step
    raise AssertionError(f"it went on: {losses}")


@pytest.mark.parametrize("keep_best", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_run_that_gets_no_better_ends_finished(
    keep_best: bool, rising: Write, tmp_path: Path, cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "_SHARE", 1e9)  # rows that were trained on are scored, however long it takes
    run = tmp_path / "run"
    done = cli("train", rising("run", keep_best=keep_best, sample_every=99))
    assert done.code == 0 and done.out.strip() == str(run)
    best, last = expected_end(run, 2)
    assert 0 < best < last < 60 and metrics(run)[-1]["step"] == last
    why = "no better held-out loss in 2 evaluations"
    assert f"ended after step {last}: {why}\n" in done.err
    events = list(read_objects(run / "events.jsonl"))
    assert [(event["event"], event["why"]) for event in events] == [("started", ""), ("ended", why)]
    result = best if keep_best else last
    assert sha256(run / WEIGHTS) == sha256(run / f"checkpoints/step-{result:06d}/adapter_model.safetensors")
    assert (run / f"checkpoints/step-{last:06d}").is_dir()
    assert {line["step"] for line in read_objects(run / "answers.jsonl")} == {0, last}
    ledger = list(read_objects(run / "rows.jsonl"))
    assert len(ledger) == 26 and {line["losses"]["last"][0] for line in ledger} == {last}
    history = History(run)
    assert (history.state, history.why) == ("finished", why)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.count(why) == 2 and f"step {last} of 60" in page


def test_a_resumed_run_ends_where_the_other_one_did(
    rising: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Command
) -> None:
    assert main(["train", rising("whole")]) == 0
    want, (_, last) = metrics(tmp_path / "whole"), expected_end(tmp_path / "whole", 2)
    path = rising("parts")
    for number, more in ((5, []), (last, ["--resume"])):
        with monkeypatch.context() as patch:
            stop_at(patch, number, die)
            assert main(["train", path, *more]) == 130
    for _ in range(2):  # the second time it has ended, and says so again
        done = cli("train", tmp_path / "parts", "--resume")
        assert done.code == 0 and f"ended after step {last}: no better" in done.err
        assert metrics(tmp_path / "parts") == want
        assert sha256(tmp_path / "parts" / WEIGHTS) == sha256(tmp_path / "whole" / WEIGHTS)
    events = list(read_objects(tmp_path / "parts/events.jsonl"))
    why = "no better held-out loss in 2 evaluations"
    assert [event["why"] for event in events[-4:]] == ["", why, "", why]


def test_with_more_patience_it_goes_on_and_has_another_result(rising: Write, tmp_path: Path, cli: Command) -> None:
    assert main(["train", rising("run")]) == 0
    last, first = metrics(tmp_path / "run")[-1]["step"], sha256(tmp_path / "run" / WEIGHTS)
    done = cli("train", tmp_path / "run", "--resume", "run.patience=4")
    assert done.code == 0 and metrics(tmp_path / "run")[-1]["step"] == expected_end(tmp_path / "run", 4)[1] > last
    newest = sorted((tmp_path / "run/checkpoints").glob("step-*"))[-1]
    assert first != sha256(tmp_path / "run" / WEIGHTS) == sha256(newest / "adapter_model.safetensors")


def test_two_processes_end_after_the_same_step(rising: Write, tmp_path: Path) -> None:
    path = rising("run", patience=1)
    launch = Launch(tmp_path, lambda rank: main(["train", path]))
    assert launch.codes() == [0, 0], launch.said()
    _, last = expected_end(tmp_path / "run", 1)
    assert metrics(tmp_path / "run")[-1]["step"] == last < 60
    assert launch.said().count(f"ended after step {last}: no better held-out loss in 1 evaluation\n") == 1


def test_it_is_a_function_of_the_state() -> None:
    def ends(step: int, best: int | None, **state: Any) -> bool:
        settings = SimpleNamespace(eval_every=4, patience=3)
        ranks, plan = SimpleNamespace(is_main=False), Plan(10, 2, 60, 0, "token", 100)
        run: Any = SimpleNamespace(recipe=SimpleNamespace(run=settings), plan=plan, ranks=ranks)
        loop.end_early(run, State(step, "", 0, Layout("float32", 1, 0, segments=True), best_step=best, **state))
        return bool(run.plan.steps == step)

    assert [ends(step, 4) for step in (8, 12, 15, 16, 17, 20)] == [False, False, False, True, True, True]
    assert ends(12, 0) and ends(12, None) and not ends(12, 0, evaluation_due=True)
    assert not ends(10, 0) and not ends(14, 4)
