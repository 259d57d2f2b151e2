"""What a run promises, I1 to I20, each by its number: held while it is killed, starved, damaged and disturbed.

The short form of `campaigns.py`, which tells what each campaign does. Other promises stand where their
subject does, by number too: I9 in test_oracles.py, I14 in test_merge.py, I15, I16, I17 and I19 in
test_trust.py, I18 in test_bad_inputs.py.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from conftest import Command

from faults import campaigns, mutants, patches
from faults.campaigns import Tally
from faults.judge import judge_remains, read_metrics
from faults.subject import SAVE_EVERY
from faults.trial import Bench, full_in, in_fork, kill_at, open_bench
from lorasft import report
from lorasft.cli import main
from lorasft.errors import RecipeError
from lorasft.files import LOCK, locked
from lorasft.recipe import load as recipe
from lorasft.training import loop, run
from lorasft.training.optimizer import learning_rate

TRIALS = {"K1": 4, "K2": 2, "K4": 2, "P1": 3, "D1": 3, "T1": 2, "T2": 2, "W2": 2, "S1": 3, "S2": 3, "S3": 1, "N1": 2,
          "N2": 2, "C1": 2, "C2": 3, "H1": 2}  # fmt: skip
ROWS = 36  # that are trained on, of 40
KILLS = ("K1", "K2", "K4", "P1")
Get = Callable[[str], Tally]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return open_bench(tmp_path_factory.mktemp("faults"), seed=20)


@pytest.fixture(scope="module")
def tally(bench: Bench) -> Get:
    """What a campaign says, which is run once."""
    return cache(lambda name: campaigns.run_campaign(name, replace(bench, trials=TRIALS[name])))


@pytest.mark.parametrize("name", TRIALS)
def test_i07_the_result_has_the_same_bits(name: str, tally: Get) -> None:
    """And I1, I2, I3, I5, I6, I13 and I20 where a campaign's judge asks for them."""
    found = tally(name)
    assert not found.wrong, "\n".join(found.wrong)
    assert len(found) >= TRIALS[name]


def test_i01_to_i03_no_torn_checkpoint_none_too_few_and_a_save_interval_lost_at_most(tally: Get) -> None:
    assert sum(tally(name).kills.total() for name in KILLS) >= TRIALS["K1"] + TRIALS["K2"]
    assert not any(tally(name).torn for name in KILLS)
    assert not [reason for name in (*KILLS, "D1") for reason in tally(name).wrong if "promised" in reason]
    assert max(tally(name).lost for name in KILLS) <= SAVE_EVERY and tally("S1").lost == 0


def test_i04_strangers_files_are_not_touched(bench: Bench, tmp_path: Path) -> None:
    mine = tmp_path / "run/tokens/mine.txt"  # a folder of that name, in a place that no run has been in
    mine.parent.mkdir(parents=True)
    mine.write_text("mine", encoding="utf-8")
    code, said = bench.changed("run", output=str(tmp_path / "run")).run()
    assert code == 2 and "not a run's" in said and mine.read_text(encoding="utf-8") == "mine"


def test_i04_no_link_is_followed(bench: Bench, tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("mine\n", encoding="utf-8")
    bench.half_way()
    metrics = bench.folder / "metrics.jsonl"
    metrics.unlink()
    metrics.symlink_to(outside)
    code, said = bench.run()
    assert code == 6 and "metrics.jsonl" in said and outside.read_text(encoding="utf-8") == "mine\n"


FULL = [  # where something is written, how often that fails, exit code, what is said once
    (["step-000002"], 1000, 0, "saved up to step 0"),  # that the base is the best so far is known all the same
    (["step-000004"], 1000, 0, "the save after step 4 failed: cannot write: No space left on device"),
    (["step-000004"], 1000, 0, "saved up to step 2"),
    (["step-000004", "step-000006"], 1000, 6, "room on the disk; from step 2"),  # two in a row
    (["step-000012"], 1, 6, "room on the disk; from step 10"),  # cannot be made up for
    (["metrics.jsonl"], 3, 0, "its lines wait in memory"),
    (["metrics.jsonl"], 1000, 6, "room on the disk; from step 0"),  # no checkpoint is saved without them
]


@pytest.mark.parametrize(("names", "times", "exit_code", "words"), FULL)
def test_i05_a_full_disk_costs_one_save_and_two_stop_the_run(
    names: list[str], times: int, exit_code: int, words: str, bench: Bench
) -> None:
    """What was saved before is intact, and resumed it gives the same bits."""
    bench.clear()
    code, said = bench.run(full_in(*names, times=times))
    assert code == exit_code and said.count(words) == 1, said
    step = int(words.rpartition(" ")[2]) if code else 12
    assert judge_remains(bench.folder, commits=step // SAVE_EVERY + 1, done=step) == ([], 0)
    assert bench.run()[0] == 0 and not bench.judge()


def test_i05_a_best_that_was_not_saved_is_not_the_best(bench: Bench) -> None:
    bench = bench.changed("run", keep_best=True, eval_every=1)
    bench.clear()
    code, said = bench.run(full_in("step-000003", "step-000009"))
    assert code == 0, said
    assert said.count("failed") == 2 and (bench.folder / "adapter/adapter_model.safetensors").is_file()


def test_i06_one_writer(tmp_path: Path) -> None:
    """A lock whose holder was killed does not block, and says who it was."""

    def hold_and_die() -> None:
        with locked(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)

    in_fork(hold_and_die)
    dead, _ = (tmp_path / LOCK).read_text(encoding="ascii").split()  # and what no other file system has there
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


def test_a_run_that_ended_without_a_word_is_named(bench: Bench) -> None:
    bench.clear()
    child = bench.start(kill_at(bench.effects // 2, moment="after"))
    child.wait()
    code, said = bench.run()
    assert code == 0 and f"process {child.pid} ended without a word" in said and "continuing from step" in said
    assert "without a word" not in bench.run()[1]


def test_i08_each_row_exactly_once_an_epoch(bench: Bench) -> None:
    """Through three deaths; a step that is done again has the same rows."""
    bench.clear()
    ledger = bench.folder.with_name("ledger.jsonl")
    ledger.unlink(missing_ok=True)
    bench = bench.patched(partial(patches.note_rows, ledger))
    for share in (0.5, 0.2, 0.2):
        bench.start(kill_at(int(share * bench.effects), moment="before")).wait()
    assert bench.run()[0] == 0
    steps: dict[int, list[int]] = {}
    for line in ledger.read_text(encoding="utf-8").splitlines():
        number, rows = json.loads(line)
        assert steps.setdefault(number, rows) == rows
    assert sorted(steps) == list(range(1, 13))
    for epoch in (range(1, 7), range(7, 13)):
        rows = sorted(row for number in epoch for row in steps[number])
        assert rows == list(range(len(rows))) and len(rows) == ROWS


def test_i10_the_learning_rate_is_a_closed_form(bench: Bench) -> None:
    """Also over interruptions, after which I7 asks for the same lines."""
    settings = bench.recipe
    for number, line in enumerate((line for line in bench.result.lines if "loss" in line), start=1):
        peak = settings.optimizer.learning_rate
        assert line["learning_rate"] == learning_rate(number, steps=12, peak=peak, schedule=settings.schedule)


def test_i12_a_run_that_trains_nothing_does_not_exit_0(bench: Bench) -> None:
    """Zero targets and zero modules are refused in test_train.py, a merge of nothing in test_merge.py."""
    bench.clear()
    code, said = bench.patched(patches.learn_nothing).run()
    assert code == 7 and "nothing was trained" in said and not (bench.folder / "adapter").exists()


def test_i13_finite_or_stop(bench: Bench) -> None:
    bench.clear()
    code, said = bench.patched(partial(patches.poison, 5, "loss")).run()
    assert code == 7 and "rows.jsonl:" in said and "checkpoints/step-000004" in said


def test_sigusr1_saves_after_the_step_and_goes_on(bench: Bench) -> None:
    bench = bench.changed("run", save_every=None, save_minutes=None)
    bench.clear()
    ask = partial(patches.before_step, 5, lambda run: os.kill(os.getpid(), signal.SIGUSR1))
    bench = bench.patched(ask)
    child = bench.start()
    assert child.wait() == 0, child.said()
    steps = [path.name for path in bench.checkpoints()]
    assert steps == ["step-000005", "step-000012"]
    assert not bench.judge()


def test_sigusr1_before_the_first_step_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: object) -> None:
        assert signal.getsignal(signal.SIGUSR1) != signal.SIG_DFL
        os.kill(os.getpid(), signal.SIGUSR1)
        raise EOFError

    monkeypatch.setattr(recipe, "load_recipe", ask)
    with pytest.raises(EOFError):
        main(["train", "tiny"])
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_i11_what_is_shown_is_what_is_supervised(bench: Bench, command: list[str], cli: Command) -> None:
    """The labels that a preview shows, added up, are the supervised tokens that each of the two epochs logs."""
    words = [*command[1:], "data.eval=null", "run.eval_every=null"]
    *shown, told = map(json.loads, cli("preview", *words, "--json").out.splitlines())
    labels = [sum(label != -100 for label in one["labels"]) for one in shown]
    texts = [[part["text"] for part in one["spans"] if part["learned"]] for one in shown]
    assert "".join(texts[8]) == "16!<|end|>" and len(labels) == 40
    assert main(["train", *words]) == 0
    logged = [line["supervised_tokens"] for line in read_metrics(bench.folder) if "loss" in line]
    assert 2 * sum(labels) == 2 * told["summary"]["supervised_tokens"] == sum(logged) > 0


SAVED = {"read_inputs": "before the first step", "run_steps": "not saved since step 0", "next_commands": "is whole"}


@pytest.mark.parametrize("number", campaigns.STOPPED)
@pytest.mark.parametrize("where", SAVED)
def test_a_signal_where_there_is_no_step_to_finish(
    where: str, number: signal.Signals, bench: Bench, command: list[str], monkeypatch: pytest.MonkeyPatch, cli: Command
) -> None:
    """The run ends in order: it says what is saved, and the next start does not take it for killed."""

    def ask(*_: object, **__: object) -> None:
        (bench.folder / "checkpoints" / "step-000008.aside-1").mkdir(parents=True)  # damaged, put aside: no save
        signal.raise_signal(number)

    monkeypatch.setattr({"read_inputs": run, "run_steps": loop}.get(where, report), where, ask)
    code, _, said = cli(*command)
    assert code == campaigns.STOPPED[number]
    assert SAVED[where] in said and "Traceback" not in said
    assert ("--resume" in said) == (where == "run_steps")
    monkeypatch.undo()
    assert where != "run_steps" or main([*command, "--resume"]) == 0  # a run folder is never a dead end
    lock = bench.folder / LOCK
    assert not lock.exists() or not lock.read_text(encoding="ascii")


@pytest.mark.parametrize("number", campaigns.STOPPED)
def test_a_signal_while_a_library_is_imported_ends_at_once(number: signal.Signals, tmp_path: Path) -> None:
    """Raised there it might be caught, and the process continue with half a library."""
    (tmp_path / "half.py").write_text(f"import signal\nsignal.raise_signal({int(number)})\n", encoding="utf-8")
    act = """
import signal
from lorasft.signals import ended_in_order
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
with ended_in_order():
    try:
        import half
    except BaseException:
        print("continued")
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", act], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (campaigns.STOPPED[number], "", "stopped\n")


def test_nohup_holds(bench: Bench, command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
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
def command(bench: Bench, tmp_path: Path) -> Iterator[list[str]]:
    """The command line of the run, where every signal is heard: a background job ignores Ctrl-C, nohup SIGHUP."""
    bench.clear()
    (tmp_path / "recipe.yaml").write_text(recipe.dump_recipe(bench.recipe), encoding="utf-8")
    stood = {number: signal.signal(number, signal.SIG_DFL) for number in campaigns.STOPPED}
    yield ["train", str(tmp_path / "recipe.yaml")]
    for number, handler in stood.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [1, 5, 12])
def test_a_signal_does_not_wait_for_an_evaluation(number: int, bench: Bench) -> None:
    """Held-out rows are due after steps 1, by the base, 5 and 12, the last: they are scored when the run continues."""
    bench.clear()
    ask = partial(patches.before_step, number, lambda run: os.kill(os.getpid(), signal.SIGTERM))
    child = bench.patched(ask).start()
    assert child.wait() == 143, child.said()
    assert bench.checkpoints()[-1].name == f"step-{number:06d}"
    metrics = read_metrics(bench.folder)
    assert metrics[-1]["step"] == number and "loss" in metrics[-1] and "eval_loss" not in metrics[-1]
    child = bench.start()
    assert child.wait() == 0, child.said()
    assert not bench.judge()


def test_saves_come_by_the_clock_too(bench: Bench) -> None:
    bench = bench.changed("run", save_every=None, save_minutes=0.0001)
    bench.clear()
    child = bench.start()
    assert child.wait() == 0 and child.trace.commits > 5, child.said()
    assert not bench.judge()


def test_a_changed_recipe_or_file_is_refused_with_a_table(bench: Bench) -> None:
    bench.half_way()
    code, said = bench.changed("optimizer", learning_rate=0.001, weight_decay=0.5).run()
    assert code == 2
    assert "optimizer.learning_rate: 0.005 -> 0.001\n" in said and "optimizer.weight_decay: 0.0 -> 0.5\n" in said
    rows = Path(bench.recipe.data.train[0].path)
    before = rows.read_text(encoding="utf-8")
    rows.write_text(before.replace("what is 3 + 3", "what is 3 + 4"), encoding="utf-8")
    code, said = bench.run()
    rows.write_text(before, encoding="utf-8")
    assert code == 2 and f"{rows}:4: the first row that differs" in said and "changed since step" in said
    assert bench.run()[0] == 0 and not bench.judge()


def test_a_damaged_best_checkpoint_is_named_not_used(bench: Bench) -> None:
    bench = bench.changed("run", keep_best=True, eval_every=1).patched(patches.get_worse)
    bench.clear()
    assert bench.run()[0] == 0
    shutil.rmtree(bench.folder / "adapter")
    (bench.folder / "checkpoints/step-000003/adapter_model.safetensors").write_bytes(b"rotten")
    code, said = bench.run()
    assert code == 4 and "adapter_model.safetensors" in said
    assert not (bench.folder / "adapter").exists()


SEEN_OFTEN = ("manifest first", "resume by the highest number", "overwritten in place")  # the others take longer


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SEEN_OFTEN else pytest.mark.slow) for name in mutants.MUTANTS]
)
def test_each_mutant_is_caught(name: str, bench: Bench) -> None:
    assert mutants.catch(name, bench).wrong, f"{name} was not caught in {bench.trials} trials"
