"""What a run promises, I1 to I20, each by its number: held while it is killed, starved, damaged and disturbed.

The short form of `campaigns.py`, which tells what each campaign does. Other promises stand where their
subject does, by number too: I9 in test_oracles.py, I14 in test_merge.py, I15, I16, I17 and I19 in test_trust.py, I18 in
test_bad_inputs.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from faults import campaigns, mutants
from faults.judge import judge_remains, judge_result, read_metrics
from faults.kills import Tally, open_bench
from faults.states import full_in, in_fork, state_machine
from faults.subject import SAVE_EVERY
from faults.trial import Bench, Fault, kill_at
from lorasft.cli import main
from lorasft.commands import train
from lorasft.data.packing import Step
from lorasft.errors import RecipeError
from lorasft.files import LOCK, MANIFEST, locked
from lorasft.model.adapter import attach_adapter, trainable
from lorasft.model.base import load_base
from lorasft.recipe import AdapterSettings, ModelSettings, OptimizerSettings, dump_recipe
from lorasft.train import loop, run
from lorasft.train.checkpoint import list_checkpoints
from lorasft.train.optimizer import make_optimizer
from lorasft.train.schedule import learning_rate
from lorasft.train.state import Learner

TRIALS = {"K1": 6, "K2": 2, "K4": 2, "P1": 4, "D1": 5, "T1": 4, "T2": 4, "W2": 4, "S1": 4, "S2": 3, "S3": 1, "N1": 3,
          "N2": 4, "C1": 2, "C2": 3}  # fmt: skip
ROWS = 36  # that are trained on, of 40
KILLS = ("K1", "K2", "K4", "P1")


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> campaigns.Ring:
    torch.set_num_threads(1)
    bench, reference = open_bench(tmp_path_factory.mktemp("faults"))
    return campaigns.Ring(bench, reference, trials=0, seed=20)


@pytest.fixture(scope="module")
def tally(ring: campaigns.Ring) -> Callable[[str], Tally]:
    """What a campaign says, which is run once."""
    done: dict[str, Tally] = {}

    def get(name: str) -> Tally:
        if name not in done:
            done[name] = campaigns.run_campaign(name, replace(ring, trials=TRIALS[name]))
        return done[name]

    return get


Get = Callable[[str], Tally]


@pytest.mark.parametrize("name", TRIALS)
def test_i07_the_result_has_the_same_bits(name: str, tally: Get) -> None:
    found = tally(name)
    assert not found.wrong, "\n".join(found.wrong)
    assert found.identical == found.trials >= TRIALS[name]


def test_i01_no_torn_checkpoint(tally: Get) -> None:
    assert all(tally(name).torn == 0 for name in KILLS)
    assert sum(sum(tally(name).kills.values()) for name in KILLS) >= TRIALS["K1"] + TRIALS["K2"]


def test_i02_never_fewer_checkpoints_than_promised(tally: Get) -> None:
    assert not [reason for name in (*KILLS, "D1") for reason in tally(name).wrong if "promised" in reason]


def test_i03_a_save_interval_is_lost_at_most_and_nothing_on_a_signal(tally: Get) -> None:
    assert max(tally(name).lost for name in KILLS) <= SAVE_EVERY
    assert tally("S1").lost == 0


def test_i04_strangers_files_are_not_touched(ring: campaigns.Ring, tally: Get, tmp_path: Path) -> None:
    assert not tally("C2").wrong
    mine = tmp_path / "run/tokens/mine.txt"  # a folder of that name, in a place that no run has been in
    mine.parent.mkdir(parents=True)
    mine.write_text("mine", encoding="utf-8")
    code, said = start(changed(ring.bench, "run", output=str(tmp_path / "run")))
    assert code == 2 and "no run's" in said and mine.read_text(encoding="utf-8") == "mine"


def test_i04_no_link_is_followed(ring: campaigns.Ring, tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("mine\n", encoding="utf-8")
    ring.half_way()
    metrics = ring.bench.folder / "metrics.jsonl"
    metrics.unlink()
    metrics.symlink_to(outside)
    code, said = start(ring.bench)
    assert code == 6 and "metrics.jsonl" in said and outside.read_text(encoding="utf-8") == "mine\n"


def start(bench: Bench, fault: Fault | None = None) -> tuple[int, str]:
    """Exit code and words of a run, or of its resumption."""
    child = bench.start(fault)
    return child.wait(), child.said()


def changed(bench: Bench, section: str, **values: Any) -> Bench:
    """The same run with other settings."""
    settings = getattr(bench.recipe, section).model_copy(update=values)
    return replace(bench, recipe=bench.recipe.model_copy(update={section: settings}))


def test_i05_a_full_disk_in_one_save_is_said_and_the_run_goes_on(ring: campaigns.Ring, tally: Get) -> None:
    assert not tally("D1").wrong
    ring.bench.clear()
    code, said = start(ring.bench, full_in("step-000004"))
    assert code == 0 and said.count("the save after step 4 failed: cannot write: No space left on device") == 1
    assert "saved up to step 2, going on" in said
    assert not judge_result(ring.bench.folder, ring.reference.result)


def test_i05_two_in_a_row_stop_it_with_all_before_intact(ring: campaigns.Ring) -> None:
    ring.bench.clear()
    code, said = start(ring.bench, full_in("step-000004", "step-000006"))
    assert code == 6 and "the save after step 6 failed" in said and "--resume from step 2" in said
    assert judge_remains(ring.bench.folder, commits=2, done=2) == ([], 0)
    assert start(ring.bench)[0] == 0 and not judge_result(ring.bench.folder, ring.reference.result)


def test_i05_a_save_that_cannot_be_made_up_for_ends_the_run(ring: campaigns.Ring) -> None:
    ring.bench.clear()
    code, said = start(ring.bench, full_in("step-000012", times=1))
    assert code == 6 and "--resume from step 10" in said
    assert start(ring.bench)[0] == 0 and not judge_result(ring.bench.folder, ring.reference.result)


def test_i05_lines_that_the_disk_does_not_take_wait_for_it(ring: campaigns.Ring) -> None:
    ring.bench.clear()
    code, said = start(ring.bench, full_in("metrics.jsonl", times=3))
    assert code == 0 and said.count("its lines wait in memory") == 1
    assert not judge_result(ring.bench.folder, ring.reference.result)
    ring.bench.clear()
    code, said = start(ring.bench, full_in("metrics.jsonl"))  # for good: no checkpoint is saved without them
    assert code == 6 and [path.name for path in list_checkpoints(ring.bench.folder / "checkpoints")] == ["step-000000"]


def test_i05_a_best_that_was_not_saved_is_not_the_best(ring: campaigns.Ring) -> None:
    bench = changed(ring.bench, "run", keep_best=True, eval_every=1)
    bench.clear()
    code, said = start(bench, full_in("step-000003", "step-000009"))
    assert code == 0, said
    assert said.count("failed") == 2 and (bench.folder / "adapter/adapter_model.safetensors").is_file()


def test_i06_one_writer(tally: Get, tmp_path: Path) -> None:
    """A lock whose holder was killed does not block, and says who it was."""
    assert not tally("C1").wrong

    def hold_and_die() -> None:
        with locked(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)

    in_fork(hold_and_die)
    dead = (tmp_path / LOCK).read_text(encoding="ascii")
    with locked(tmp_path) as left:
        assert left == dead
        assert in_fork(lambda: take_lock(tmp_path)) == 0
    with locked(tmp_path) as left:
        assert left == ""


def take_lock(folder: Path) -> None:
    """In another process: must be refused, naming the holder."""
    try:
        with locked(folder):
            os._exit(1)
    except RecipeError as fault:
        os._exit(0 if f"process {os.getppid()}" in fault.what else 2)


def test_a_run_that_ended_without_a_word_is_named(ring: campaigns.Ring) -> None:
    ring.bench.clear()
    child = ring.bench.start(kill_at(ring.reference.effects // 2, moment="after"))
    child.wait()
    code, said = start(ring.bench)
    assert code == 0 and f"process {child.pid} ended without a word" in said and "going on from step" in said
    assert "without a word" not in start(ring.bench)[1]


def test_i08_each_row_exactly_once_an_epoch(ring: campaigns.Ring) -> None:
    """Through three deaths; a step that is done again has the same rows."""
    ring.bench.clear()
    ledger = ring.bench.folder.with_name("ledger.jsonl")
    ledger.unlink(missing_ok=True)
    bench = replace(ring.bench, setup=(partial(note_rows, ledger),))
    for share in (0.5, 0.2, 0.2):
        bench.start(kill_at(int(share * ring.reference.effects), moment="before")).wait()
    assert start(bench)[0] == 0
    steps: dict[int, list[int]] = {}
    for line in ledger.read_text(encoding="utf-8").splitlines():
        number, rows = json.loads(line)
        assert steps.setdefault(number, rows) == rows
    assert sorted(steps) == list(range(1, 13))
    for epoch in (range(1, 7), range(7, 13)):
        rows = sorted(row for number in epoch for row in steps[number])
        assert rows == list(range(len(rows))) and len(rows) == ROWS


def note_rows(ledger: Path) -> None:
    plain = loop.take_step

    def take_step(run: loop.Run, step: Step, stop: Any) -> dict[str, Any]:
        with open(ledger, "a", encoding="utf-8") as file:
            file.write(json.dumps([step.number, [int(row) for row in step.examples]]) + "\n")
        return plain(run, step, stop)

    loop.take_step = take_step


def test_i10_the_learning_rate_is_a_closed_form_over_interruptions(ring: campaigns.Ring) -> None:
    ring.half_way()
    assert start(ring.bench)[0] == 0
    lines = [line for line in read_metrics(ring.bench.folder) if "loss" in line]
    recipe = ring.bench.recipe
    for number, line in enumerate(lines, start=1):
        peak = recipe.optimizer.learning_rate
        assert line["learning_rate"] == learning_rate(number, steps=12, peak=peak, schedule=recipe.schedule)


def test_i12_a_run_that_trains_nothing_does_not_exit_0(ring: campaigns.Ring) -> None:
    """Zero targets and zero modules are refused in test_train.py, a merge of nothing in test_merge.py."""
    ring.bench.clear()
    code, said = start(replace(ring.bench, setup=(learn_nothing,)))
    assert code == 7 and "nothing was trained" in said and not (ring.bench.folder / "adapter").exists()


def learn_nothing() -> None:
    plain = loop.pair_losses
    loop.pair_losses = lambda *values: plain(*values) * 0.0


def test_i13_finite_or_stop(ring: campaigns.Ring, tally: Get) -> None:
    assert not tally("N1").wrong
    ring.bench.clear()
    code, said = start(replace(ring.bench, setup=(partial(campaigns.poison, 5, "loss"),)))
    assert code == 7 and "rows.jsonl:" in said and "checkpoints/step-000004" in said


def test_i20_trackers_cannot_hurt(tally: Get) -> None:
    assert not tally("W2").wrong


def test_sigusr1_saves_after_the_step_and_goes_on(ring: campaigns.Ring) -> None:
    bench = changed(ring.bench, "run", save_every=None, save_minutes=None)
    bench.clear()
    ask = partial(campaigns.before_step, 5, lambda run: os.kill(os.getpid(), signal.SIGUSR1))
    bench = replace(bench, setup=(ask,))
    child = bench.start()
    assert child.wait() == 0, child.said()
    steps = [path.name for path in list_checkpoints(bench.folder / "checkpoints")]
    assert steps == ["step-000005", "step-000012"]
    assert not judge_result(bench.folder, ring.reference.result)


def test_sigusr1_before_the_first_step_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: object) -> None:
        assert signal.getsignal(signal.SIGUSR1) != signal.SIG_DFL
        os.kill(os.getpid(), signal.SIGUSR1)
        raise EOFError

    monkeypatch.setattr("lorasft.recipe.load_recipe", ask)
    with pytest.raises(EOFError):
        main(["train", "tiny"])
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_i11_what_is_shown_is_what_is_learned(
    ring: campaigns.Ring, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The labels that a preview shows, added up, are the supervised tokens that each of the two epochs logs."""
    words = [*command[1:], "data.eval=null", "run.eval_every=null"]
    assert main(["preview", *words, "--json"]) == 0
    *shown, told = map(json.loads, capsys.readouterr().out.splitlines())
    labels = [sum(label != -100 for label in one["labels"]) for one in shown]
    texts = [[part["text"] for part in one["spans"] if part["learned"]] for one in shown]
    assert "".join(texts[8]) == "16!<|end|>" and len(labels) == 40
    assert main(["train", *words]) == 0
    logged = [line["supervised_tokens"] for line in read_metrics(ring.bench.folder) if "loss" in line]
    assert 2 * sum(labels) == 2 * told["summary"]["supervised_tokens"] == sum(logged) > 0


SAVED = {"make_plan": "before the first step", "_introduce": "not saved since step 0", "_show_answers": "is whole"}


@pytest.mark.parametrize("number", campaigns.STOPPED)
@pytest.mark.parametrize("where", SAVED)
def test_a_signal_where_there_is_no_step_to_finish(
    where: str,
    number: signal.Signals,
    ring: campaigns.Ring,
    command: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The run ends in order: it says what is saved, and the next start does not take it for killed."""

    def ask(*_: object, **__: object) -> None:
        (ring.bench.folder / "checkpoints" / "step-000008.aside-1").mkdir(parents=True)  # damaged, put aside: no save
        signal.raise_signal(number)

    monkeypatch.setattr(run if where == "make_plan" else train, where, ask)
    assert main(command) == campaigns.STOPPED[number]
    said = capsys.readouterr().err
    assert SAVED[where] in said and "Traceback" not in said
    assert ("--resume" in said) == (where == "_introduce")
    assert not (ring.bench.folder / LOCK).read_text(encoding="ascii")


@pytest.mark.parametrize("number", campaigns.STOPPED)
def test_a_signal_while_a_library_is_imported_ends_at_once(number: signal.Signals, tmp_path: Path) -> None:
    """Raised there it might be caught, and half a library be gone on with."""
    (tmp_path / "half.py").write_text(f"import signal\nsignal.raise_signal({int(number)})\n", encoding="utf-8")
    act = """
import signal
from lorasft.signals import ended_in_order
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
with ended_in_order():
    try:
        import half
    except BaseException:
        print("gone on")
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", act], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (campaigns.STOPPED[number], "", "stopped\n")


def test_nohup_holds(ring: campaigns.Ring, command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    stood = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    plain = loop.take_step

    def take_step(*values: Any) -> dict[str, Any]:
        signal.raise_signal(signal.SIGHUP)
        return plain(*values)

    monkeypatch.setattr(loop, "take_step", take_step)
    try:
        assert main(command) == 0
    finally:
        signal.signal(signal.SIGHUP, stood)


@pytest.fixture
def command(ring: campaigns.Ring, tmp_path: Path) -> Iterator[list[str]]:
    """The command line of the run, where every signal is heard: a background job ignores Ctrl-C, nohup SIGHUP."""
    ring.bench.clear()
    (tmp_path / "recipe.yaml").write_text(dump_recipe(ring.bench.recipe), encoding="utf-8")
    stood = {number: signal.signal(number, signal.SIG_DFL) for number in campaigns.STOPPED}
    yield ["train", str(tmp_path / "recipe.yaml")]
    for number, handler in stood.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [5, 12])
def test_a_signal_does_not_wait_for_an_evaluation(number: int, ring: campaigns.Ring) -> None:
    """Held-out rows are due after steps 5 and 12, the last: they are scored when the run goes on."""
    ring.bench.clear()
    ask = partial(campaigns.before_step, number, lambda run: os.kill(os.getpid(), signal.SIGTERM))
    child = replace(ring.bench, setup=(ask,)).start()
    assert child.wait() == 143, child.said()
    assert list_checkpoints(ring.bench.folder / "checkpoints")[-1].name == f"step-{number:06d}"
    metrics = read_metrics(ring.bench.folder)
    assert metrics[-1]["step"] == number and "loss" in metrics[-1] and "eval_loss" not in metrics[-1]
    child = ring.bench.start()
    assert child.wait() == 0, child.said()
    assert not judge_result(ring.bench.folder, ring.reference.result)


STATES = {"dtype": "evil", "micro_batch_tokens": "x", "recomputed_layers": "x", "share_prefixes": "evil",
          "processes": 0, "metrics_bytes": -5, "step": "4"}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_a_state_of_the_wrong_kind_is_skipped(name: str, ring: campaigns.Ring) -> None:
    """Also where its hash is right: whoever can write the one can write the other."""
    ring.half_way()
    path = list_checkpoints(ring.bench.folder / "checkpoints")[-1]
    state = json.loads((path / "state.json").read_bytes())
    (state if name in state else state["layout"])[name] = STATES[name]
    (path / "state.json").write_text(json.dumps(state), encoding="utf-8")
    manifest = json.loads((path / MANIFEST).read_bytes())
    content = (path / "state.json").read_bytes()
    manifest["state.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    code, said = start(ring.bench)
    assert code == 0 and f"skipped {path.name}: state.json:" in said
    assert not judge_result(ring.bench.folder, ring.reference.result)


def test_a_lost_record_does_not_lose_the_run(ring: campaigns.Ring) -> None:
    ring.half_way()
    (ring.bench.folder / "provenance.json").unlink()
    code, said = start(ring.bench)
    assert code == 0, said
    assert not judge_result(ring.bench.folder, ring.reference.result)


def test_saves_come_by_the_clock_too(ring: campaigns.Ring) -> None:
    bench = changed(ring.bench, "run", save_every=None, save_minutes=0.0001)
    bench.clear()
    child = bench.start()
    assert child.wait() == 0 and child.trace.commits > 5, child.said()
    assert not judge_result(bench.folder, ring.reference.result)


def test_a_changed_recipe_or_file_is_refused_with_a_table(ring: campaigns.Ring) -> None:
    ring.half_way()
    code, said = start(changed(ring.bench, "optimizer", learning_rate=0.001, weight_decay=0.5))
    assert code == 2
    assert "optimizer.learning_rate: 0.005 -> 0.001\n" in said and "optimizer.weight_decay: 0.0 -> 0.5\n" in said
    rows = Path(ring.bench.recipe.data.train[0].path)
    before = rows.read_text(encoding="utf-8")
    rows.write_text(before.replace("what is 3 + 3", "what is 3 + 4"), encoding="utf-8")
    code, said = start(ring.bench)
    rows.write_text(before, encoding="utf-8")
    assert code == 2 and f"files.{rows}: " in said and " -> " in said and "changed since step" in said
    assert start(ring.bench)[0] == 0 and not judge_result(ring.bench.folder, ring.reference.result)


def test_a_damaged_best_checkpoint_is_named_not_used(ring: campaigns.Ring) -> None:
    bench = replace(changed(ring.bench, "run", keep_best=True, eval_every=1), setup=(get_worse,))
    bench.clear()
    assert start(bench)[0] == 0
    shutil.rmtree(bench.folder / "adapter")
    (bench.folder / "checkpoints/step-000003/adapter_model.safetensors").write_bytes(b"rotten")
    code, said = start(bench)
    assert code == 4 and "adapter_model.safetensors" in said
    assert not (bench.folder / "adapter").exists()


def get_worse() -> None:
    """The held-out loss is best at step 3."""
    plain, losses = loop.evaluate, iter([5.0, 4.0, 3.0, 1.0, *map(float, range(2, 20))])
    loop.evaluate = lambda *values, **named: (next(losses), plain(*values, **named)[1])


@pytest.mark.parametrize("name", mutants.MUTANTS)
def test_each_mutant_is_caught(name: str, ring: campaigns.Ring) -> None:
    found = mutants.catch(name, ring.bench, ring.reference, trials=mutants.ENOUGH[name])
    assert found.wrong, f"{name} was not caught in {found.trials} trials"


def test_h1_any_sequence_of_saves_deaths_and_damage(base: Path) -> None:
    adapter = AdapterSettings(rank=1, targets=("q_proj",))
    model = attach_adapter(load_base(ModelSettings(base=str(base)), torch.device("cpu")), adapter, seed=0)
    parameters = trainable(model)
    learner = Learner(model, parameters, make_optimizer(OptimizerSettings(), parameters))
    few = settings(max_examples=15, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(state_machine(learner, ModelSettings(base=str(base))), settings=few)
