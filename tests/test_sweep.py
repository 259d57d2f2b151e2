"""A sweep: each run has the bits of the same run alone, whatever was run before it on the same base."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Command
from safetensors.torch import load_file, save_file
from test_experts import save as save_experts
from test_start import EARLY, run_python
from test_train import metrics, stop_at
from tiny_tokenizer import save_tokenizer

from lorasft.cli import main
from lorasft.commands import sweep
from lorasft.data import prepare
from lorasft.errors import DivergedError
from lorasft.model.base import copy_base, load_base
from lorasft.recipe import ModelSettings
from lorasft.report import History
from lorasft.signals import StopRequest
from lorasft.training import loop
from lorasft.training import run as runs

Write = Callable[..., str]
WHOLE = ("model.embed_tokens.weight", "lm_head.weight")
RATES = "optimizer.learning_rate=5e-3,1e-3"


def adapter(folder: Path) -> bytes:
    return (folder / "adapter/adapter_model.safetensors").read_bytes()


def counted(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[str]:
    """A list that gets the name of a function of `module` whenever it is called."""
    calls, plain = list[str](), getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **kwargs: (calls.append(name), plain(*args, **kwargs))[1])
    return calls


def test_each_run_has_the_bits_of_the_same_run_alone(
    recipe: Write, tmp_path: Path, cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In NF4 with dropout; ranks and targets that differ, so that what one run put on the base would show."""
    path, out = recipe(model={"dtype": "float32"}, train={"epochs": 1}), tmp_path / "sweep"
    swept = ["adapter.rank=4,2", "adapter.targets=[q_proj,v_proj],all-linear"]
    loaded, prepared = (counted(monkeypatch, *one) for one in ((runs, "load_base"), (prepare, "_write_store")))
    done = cli("sweep", path, *swept, "--out", out)
    assert done.code == 0, done.err
    assert len(loaded) == len(prepared) == 1
    folders = [out / f"rank={rank},targets={name}" for rank in (4, 2) for name in ("_q_proj,v_proj_", "all-linear")]
    assert len({adapter(folder) for folder in folders}) == 4
    targets = ["adapter.targets=[q_proj,v_proj]", "adapter.targets=all-linear"]
    each = [[rank, name] for rank in ("adapter.rank=4", "adapter.rank=2") for name in targets]
    for folder, values in zip(folders, each, strict=True):
        alone = tmp_path / "alone" / folder.name
        assert cli("train", path, *values, f"run.output={json.dumps(str(alone))}").code == 0
        assert metrics(folder) == metrics(alone) and adapter(folder) == adapter(alone)
    *rows, page = done.out.splitlines()[1:]
    losses = {folder: metrics(folder)[-1]["eval_loss"] for folder in folders}
    best = sorted(folders, key=lambda folder: losses[folder])
    cells = [[folder.name, "finished", "3", *2 * [f"{losses[folder]:.4f}"]] for folder in best]
    assert [row.split()[:5] for row in rows] == cells
    text = Path(page).read_text(encoding="utf-8")
    assert page == str(out / "report.html") and all(folder.name in text for folder in folders)


def start_with_rows(run: Path, base: Path, folder: Path) -> Path:
    """The adapter of `run` as another tool may save it: with the whole embedding and head, changed."""
    shutil.copytree(run / "adapter", folder, ignore=shutil.ignore_patterns("manifest.json", "recipe.yaml", "prov*"))
    path, weights = folder / "adapter_model.safetensors", load_file(base / "model.safetensors")
    whole = {f"base_model.model.{name}": weights[name].flip(0).contiguous() for name in WHOLE}
    save_file(load_file(path) | whole, path, metadata={"format": "pt"})
    return folder


# What is swept, and the same of its last run.
ON_THE_BASE: dict[str, tuple[list[str], list[str]]] = {
    "DoRA": (["adapter.dora=true,false"], ["adapter.dora=false"]),
    "whole modules": (["adapter.modules_to_save=[lm_head],[]"], ["adapter.modules_to_save=[]"]),
    "layout": (
        ["machine.activation_checkpointing=true,false", "machine.keep_16bit=true,false"],
        ["machine.activation_checkpointing=false", "machine.keep_16bit=false"],
    ),
    "rows": (["data.max_length=100,60", "data.max_dropped=1"], ["data.max_length=60", "data.max_dropped=1"]),
    "attention": (["machine.attention=eager,auto"], ["machine.attention=auto"]),
}


def assert_last_is_same_alone(path: str, swept: list[str], last: list[str], out: Path, cli: Command) -> None:
    done = cli("sweep", path, *swept, "--out", out / "sweep")
    assert done.code == 0, done.err
    assert cli("train", path, *last, f"run.output={out}/alone").code == 0
    name = re.findall(r"^run (\S.*)$", done.err, re.MULTILINE)[-1]
    assert metrics(out / "sweep" / name) == metrics(out / "alone")
    assert adapter(out / "sweep" / name) == adapter(out / "alone")


USUAL = ("DoRA",)


@pytest.mark.parametrize(
    ("swept", "last"),
    [pytest.param(*one, id=name, marks=() if name in USUAL else pytest.mark.slow) for name, one in ON_THE_BASE.items()],
)
def test_nothing_stays_on_the_base(
    swept: list[str], last: list[str], recipe: Write, tmp_path: Path, cli: Command
) -> None:
    path = recipe(train={"steps": 3}, model={"dtype": "bfloat16"})
    assert_last_is_same_alone(path, swept, last, tmp_path, cli)


def test_new_tokens_are_not_there_yet_for_the_next_run(recipe: Write, tmp_path: Path, cli: Command) -> None:
    """Rows that are there already, and one more: each begins as the mean of rows that no run before has changed."""
    path = recipe(train={"steps": 3}, model={"new_tokens": {"<one>": "what is", "<two>": ""}})
    assert_last_is_same_alone(path, ["train.seed=0,3"], ["train.seed=3"], tmp_path, cli)


def test_an_adapter_with_its_own_embedding_leaves_the_next_run_that_of_the_base(
    recipe: Write, run: Path, base: Path, tmp_path: Path, cli: Command
) -> None:
    path, whole = Path(recipe(train={"steps": 3})), start_with_rows(run, base, tmp_path / "whole")
    settings = json.loads(path.read_text(encoding="utf-8")) | {"adapter": {}}
    path.write_text(json.dumps(settings), encoding="utf-8")
    starts = f"adapter.start={whole},{run}/adapter"
    assert_last_is_same_alone(str(path), [starts], [f"adapter.start={run}/adapter"], tmp_path, cli)


@pytest.mark.parametrize("name", ["gpt-oss", pytest.param("qwen-3.5-moe", marks=pytest.mark.slow)])
def test_experts_and_mixers_are_shared(name: str, recipe: Write, tmp_path: Path, cli: Command) -> None:
    """Packed experts, and modules that are called by segment."""
    base = save_tokenizer(save_experts(tmp_path / "base", name, vocab_size=384))
    path = recipe(train={"steps": 3}, model={"base": str(base)})
    assert_last_is_same_alone(path, [RATES], ["optimizer.learning_rate=1e-3"], tmp_path, cli)


def test_a_copy_shares_what_is_frozen_and_nothing_else(base: Path) -> None:
    loaded = load_base(ModelSettings(base=str(base)), torch.device("cpu"))
    for own_rows in (False, True):
        copied = copy_base(loaded, own_rows=own_rows)
        pairs = zip(loaded.named_parameters(), copied.named_parameters(), strict=True)
        apart = {name for (name, one), (_, other) in pairs if one is not other}
        assert apart == ({"model.embed_tokens.weight", "lm_head.weight"} if own_rows else set())
        assert not {*loaded.modules()} & {*copied.modules()} and copied.config is not loaded.config
        four_bit = copied.model.layers[0].self_attn.q_proj.weight
        assert four_bit.quant_state is loaded.model.layers[0].self_attn.q_proj.weight.quant_state


TWO = ["learning_rate=5e-3", "learning_rate=1e-3"]


@pytest.fixture(scope="module")
def whole(base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A recipe of 9 steps, and the folder of its sweep over RATES that nothing has ended."""
    folder = tmp_path_factory.mktemp("whole")
    settings = {
        "model": {"base": str(base), "dtype": "float32"},
        "adapter": {"rank": 4, "dropout": 0.1},
        "data": {"train": str(rows), "eval": 0.2, "max_length": 120},
        "train": {"epochs": 3, "batch_size": 8},
        "run": {"output": str(folder / "run"), "eval_every": 4, "save_every": 3, "sample_every": None},
    }
    (folder / "recipe.yaml").write_text(json.dumps(settings), encoding="utf-8")
    assert main(["sweep", str(folder / "recipe.yaml"), RATES]) == 0
    return str(folder / "recipe.yaml"), folder / "run-sweep"


def assert_goes_on(whole: tuple[str, Path], out: Path, cli: Command, *states: str) -> None:
    """What is left of a sweep in `out` has these states, is continued, and then what the whole one is."""
    left = [History(out / name).state if (out / name / "recipe.yaml").is_file() else "" for name in TWO]
    assert left == list(states)
    finished = [adapter(out / name) for name, state in zip(TWO, left, strict=True) if state == "finished"]
    done = cli("sweep", whole[0], RATES, "--out", out, "--resume")
    assert done.code == 0, done.err
    assert [f"run {name}\n" in done.err for name in TWO] == [state != "finished" for state in states]
    rows = sorted(done.out.splitlines()[1:3], reverse=True)
    assert [row.split()[:3] for row in rows] == [[name, "finished", "9"] for name in TWO]
    for name in TWO:
        assert metrics(out / name) == metrics(whole[1] / name) and adapter(out / name) == adapter(whole[1] / name)
    assert len(finished) == states.count("finished")


def in_second(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], object], *, which: str = TWO[1]) -> None:
    """Do `act` in the middle of step `number` of the second run, or another."""
    plain = loop.take_step

    def take_step(run: loop.Run, now: int, stop: StopRequest) -> dict[str, Any]:
        if now == number and run.folder.name == which:
            act()
        return plain(run, now, stop)

    monkeypatch.setattr(loop, "take_step", take_step)


def test_a_signal_ends_the_sweep_with_the_command_that_continues_it(
    whole: tuple[str, Path], tmp_path: Path, cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a b"
    with monkeypatch.context() as patch:
        in_second(patch, 5, lambda: signal.raise_signal(signal.SIGINT))
        done = cli("sweep", whole[0], RATES, "--out", out)
    assert done.code == 130
    assert (
        f"{TWO[1]}: stopped after step 5 of 9, saved\nnext: lorasft sweep {whole[0]} {RATES} --out '{out}' --resume"
        in (done.err)
    )
    refused = cli("sweep", whole[0], RATES, "--out", out)
    assert refused.code == 2 and "this sweep has begun" in refused.err
    changed = cli("sweep", whole[0], RATES, "train.seed=1", "--out", out, "--resume")
    assert changed.code == 2 and "train.seed: 0 -> 1" in changed.err
    lines = Path(History(out / TWO[1]).recipe.data.train[0].path).read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join([*lines[:4], *lines[5:]]), encoding="utf-8")
    for words in (["train", out / TWO[1]], ["sweep", whole[0], RATES, "--out", out]):
        changed = cli(*words, f"data.train={tmp_path}/rows.jsonl", "--resume")
        assert changed.code == 2 and f"{tmp_path}/rows.jsonl:5: the first row that differs, of 26" in changed.err
    shutil.copytree(out / TWO[1], tmp_path / "by itself")  # without the tokens of the sweep
    assert cli("train", tmp_path / "by itself", "--resume").code == 0
    assert metrics(tmp_path / "by itself") == metrics(whole[1] / TWO[1])
    assert adapter(tmp_path / "by itself") == adapter(whole[1] / TWO[1])
    assert_goes_on(whole, out, cli, "finished", "stopped")


def test_a_signal_in_the_last_step_of_a_run_begins_no_other(
    whole: tuple[str, Path], tmp_path: Path, cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no evaluation is due, with which it would wait."""
    out, words = tmp_path / "out", ["sweep", whole[0], RATES, "data.eval=null", "train.steps=9"]
    with monkeypatch.context() as patch:
        in_second(patch, 9, lambda: signal.raise_signal(signal.SIGTERM), which=TWO[0])
        done = cli(*words, "--out", out)
    assert done.code == 143 and f"{TWO[0]}: it is done\nnext: lorasft sweep" in done.err
    assert adapter(out / TWO[0]) and not (out / TWO[1]).exists()
    assert cli(*words, "--out", out, "--resume").code == 0 and adapter(out / TWO[1])


KILLED = """
import os, sys
from lorasft import cli
from lorasft.report import History
from lorasft.signals import StopRequest
from lorasft.training import loop
plain = loop.take_step
def take_step(run, number, stop):
    if number == 5 and run.folder.name == sys.argv[1]:
        os.kill(os.getpid(), 9)
    return plain(run, number, stop)
loop.take_step = take_step
cli.main(sys.argv[2:])
"""


@pytest.mark.parametrize(
    ("name", "states"),
    [pytest.param(TWO[0], ("stopped", ""), marks=pytest.mark.slow), (TWO[1], ("finished", "stopped"))],
)
def test_a_killed_sweep_goes_on(
    name: str, states: tuple[str, str], whole: tuple[str, Path], tmp_path: Path, cli: Command
) -> None:
    assert run_python(KILLED, name, "sweep", whole[0], RATES, "--out", tmp_path / "out").returncode == -signal.SIGKILL
    assert_goes_on(whole, tmp_path / "out", cli, *states)


def test_the_budget_stops_a_run_after_its_step_and_begins_no_other(
    whole: tuple[str, Path], tmp_path: Path, cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, late = SimpleNamespace(monotonic=lambda: time.monotonic() + late[0]), [0]
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        for file in ("training.loop", "commands.sweep"):
            patch.setattr(f"lorasft.{file}.time", clock)
        stop_at(patch, 3, lambda: late.__setitem__(0, 31 * 60))
        done = cli("sweep", whole[0], RATES, "--out", out, "--budget", "30min")
    assert done.code == 0 and "stopped after step 4 of 9, saved" in done.err
    again = f"lorasft sweep {whole[0]} {RATES} --out {out} --resume"
    assert done.err.endswith(f"the budget is used up\nnext: {again}\n")
    cells = [row.split()[:3] for row in done.out.splitlines()[1:3]]
    assert cells == [[TWO[0], "stopped", "4"], [TWO[1], "not", "begun"]]  # no held-out loss of either
    assert_goes_on(whole, out, cli, "stopped", "")


def test_a_run_that_fails_does_not_end_the_others(
    whole: tuple[str, Path], tmp_path: Path, cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One cannot start, one is not finite, one finds no memory: the first of them decides the exit code, at the end."""

    def refuse_non_finite(run: loop.Run, step: Any, *, loss: float, norm: float) -> None:
        rate, number = run.recipe.optimizer.learning_rate, step.number
        if run.recipe.train.batch_size == 8 and rate == 1e-3 and number == 4:
            raise DivergedError("step 4 is not finite")
        if run.recipe.train.batch_size == 8 and rate == 2e-3 and number == 2:
            raise RuntimeError("CUDA out of memory: of a library, not in a micro-batch")

    monkeypatch.setattr(loop, "refuse_non_finite", refuse_non_finite)
    words = ["train.batch_size=8,64", "optimizer.learning_rate=1e-3,2e-3,5e-3"]
    done = cli("sweep", whole[0], *words, "--out", tmp_path / "out")
    assert done.code == 7, done.err
    assert "error: step 4 is not finite" in done.err and "error: out of memory: CUDA" in done.err
    assert done.err.count("21 rows are fewer than one batch of 64") == 3 and "5 of 6 runs failed" in done.err
    states = {row.split()[0]: row.split()[1] for row in done.out.splitlines()[1:-1]}
    why = dict(re.findall(r"^(\S+) .* \d:\d\d:\d\d *(.*)$", done.out, re.MULTILINE))
    assert why["batch_size=8,learning_rate=1e-3"] == "step 4 is not finite"
    assert "CUDA out of memory: of a library" in why["batch_size=8,learning_rate=2e-3"]
    assert why["batch_size=64,learning_rate=5e-3"].startswith("21 rows are fewer than one batch of 64")
    good = "batch_size=8,learning_rate=5e-3"
    assert {name: state for name, state in states.items() if state != "failed"} == {good: "finished"}
    assert why[good] == ""
    assert len(states) == 6 and adapter(tmp_path / "out" / good) == adapter(whole[1] / TWO[0])
    assert History(tmp_path / "out" / "batch_size=8,learning_rate=1e-3").why == "step 4 is not finite"


def test_what_can_be_known_is_refused_for_all_runs_before_torch_is_imported(recipe: Write, tmp_path: Path) -> None:
    path = recipe()
    (tmp_path / "page").mkdir()
    (tmp_path / "page/report.html").write_text("of somebody else", encoding="utf-8")
    (tmp_path / "other/rank=16").mkdir(parents=True)
    (tmp_path / "other/rank=16/recipe.yaml").touch()
    (tmp_path / "taken/rank=8").mkdir(parents=True)
    (tmp_path / "taken/rank=8/notes.txt").touch()
    cases = [
        (2, ["sweep", path], "no key has several values"),
        (2, ["sweep", path, "adapter.targets=[q_proj,v_proj]"], "no key has several values"),
        (2, ["sweep", path, "adapter.rank=4,8", "optimizer.learning_rate=1e-4,1"], "optimizer.learning_rate"),
        (2, ["sweep", path, "adapter.rank=4,8", "adapter.ranks=4,8"], "unknown key adapter.ranks"),
        (2, ["sweep", path, "adapter.rank=4,8,4"], "two runs would be called rank=4"),
        (2, ["sweep", path, "model.dtype=float32,bfloat16"], "model.dtype has several values"),
        (3, ["sweep", path, f"data.train={tmp_path}/none.jsonl,{tmp_path}/no.jsonl"], "there is no such file"),
        (2, ["sweep", path, "adapter.rank=4,8", "--out", f"{tmp_path}/taken"], "what is not a run's: notes.txt"),
        (2, ["sweep", path, "adapter.rank=4,8", "--out", f"{tmp_path}/page"], f"{tmp_path}/page/report.html"),
        (2, ["sweep", path, "adapter.rank=4,8", "--out", f"{tmp_path}/other", "--resume"], "not name: rank=16"),
        (5, ["sweep", path, "adapter.rank=4,8", "run.trackers=[trackio]"], "not installed: trackio"),
        (2, ["sweep", path, "adapter.rank=4,8", "--budget", "soon"], "soon is not a time like 45s, 30min or 2h"),
        (2, ["sweep", path, "adapter.rank=4,8", "--budget", "0min"], "0min is not a time"),
    ]
    done = run_python(EARLY, json.dumps([words for _, words, _ in cases]))
    assert done.stdout.splitlines() == [f"{code} []" for code, _, _ in cases], done.stderr
    for _, _, said in cases:
        assert said in done.stderr
    assert not (tmp_path / "run-sweep").exists()


def test_several_processes_are_refused(recipe: Write, cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = cli("sweep", recipe(), RATES)
    assert done.code == 2 and "a sweep is one process" in done.err


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1e-4,2e-4", ["1e-4", "2e-4"]),
        ("[q_proj,v_proj],all-linear", ["[q_proj,v_proj]", "all-linear"]),
        ("[{path: a, columns: {prompt: q}}, {path: b}],c", ["[{path: a, columns: {prompt: q}}, {path: b}]", "c"]),
        ("\"a, b\",'c, d'", ['"a, b"', "'c, d'"]),
        ("true", ["true"]),
        ("don't, won't", ["don't, won't"]),
    ],
)
def test_values_are_split_at_commas_outside_brackets_and_quotes(text: str, values: list[str]) -> None:
    assert sweep._VALUE.findall(text) == values
