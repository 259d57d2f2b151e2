"""What people do with folders between commands: move them, name them oddly, start again, copy what was printed."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Command
from test_train import die, metrics, stop_at

from lorasft.artifact import find_artifact
from lorasft.cli import main
from lorasft.errors import ModelError
from lorasft.files import sha256, verify_folder
from lorasft.hub import is_hub_id
from lorasft.recipe.load import load_recipe
from lorasft.terminal import quote
from lorasft.training import metrics as metrics_module
from lorasft.training.metrics import Metrics

Write = Callable[..., str]


# --- a project that was moved --------------------------------------------------------------------------------------


@pytest.fixture
def project(base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds base, template, rows and recipe of a run that was stopped after its first save."""
    folder = tmp_path / "old"
    shutil.copytree(base, folder / "base")
    lines = rows.read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "data").mkdir()
    (folder / "data/a.jsonl").write_text("".join(lines[:12]), encoding="utf-8")
    (folder / "data/b.jsonl").write_text("".join(lines[12:]), encoding="utf-8")
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    (folder / "own.jinja").write_text(template + "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    settings = {
        "model": {"base": "base", "dtype": "float32", "quantization": "none"},
        "data": {"train": "data", "eval": None, "max_length": 120},
        "chat": {"template": "own.jinja"},
        "train": {"steps": 6, "batch_size": 8},
        "run": {"output": "run", "save_every": 2},
    }
    (folder / "r.yaml").write_text(json.dumps(settings))
    monkeypatch.chdir(folder)
    with monkeypatch.context() as patch:
        stop_at(patch, 4, die)
        assert main(["train", "r.yaml"]) == 130
    return folder


def move(project: Path, monkeypatch: pytest.MonkeyPatch, name: str = ".") -> Path:
    """Move the project, or what is called `name` in it, and be where the recipe is."""
    target = project.parent / ("new" if name == "." else f"moved-{name}")
    (project / name).rename(target)
    here = target if name == "." else project
    monkeypatch.chdir(here)
    return here


@pytest.mark.parametrize("name", [".", "base", "data", "own.jinja", "run"])
def test_what_was_moved_resumes_on_the_tokens_that_are_there(
    name: str, project: Path, monkeypatch: pytest.MonkeyPatch, cli: Command
) -> None:
    before = metrics(project / "run")
    keys = {"base": "model.base", "data": "data.train", "own.jinja": "chat.template", "run": "run.output"}
    here = move(project, monkeypatch, name)
    words = [] if name == "." else [f"{keys[name]}=../moved-{name}"]
    monkeypatch.setattr("lorasft.data.prepare._write_store", None)  # nothing is prepared again
    done = cli("train", "r.yaml", "--resume", *words)
    assert done.code == 0 and "continuing from step 2" in done.err
    run = Path("../moved-run" if name == "run" else "run")
    assert metrics(run)[: len(before)] == before and len(metrics(run)) == 6
    assert find_artifact(str(run)).base == (here / "../moved-base" if name == "base" else here / "base").resolve()


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def swap(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")


CHANGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a row": (lambda at: swap(at / "data/b.jsonl", "14 + 14 =", "14 + 14 is"),
              ["data/b.jsonl:3: the first row that differs", "14 before"]),
    "a row less": (lambda at: (at / "data/a.jsonl").write_text("".join((at / "data/a.jsonl").read_text().splitlines(
        keepends=True)[:-1])), ["a.jsonl, after its last row", "12 before and 11 now"]),
    "a file more": (lambda at: shutil.copy(at / "data/a.jsonl", at / "data/c.jsonl"), ["files: 2 -> 3"]),
    "blank lines": (lambda at: (at / "data/b.jsonl").write_bytes((at / "data/b.jsonl").read_bytes() + b"\n"),
                    ["other bytes"]),
    "the template": (lambda at: swap(at / "own.jinja", "|end|", "|user|"),
                     ["template: ", "<|end|>", "<|user|>"]),
    "the base": (lambda at: edit_json(at / "base/config.json", rope_theta=5.0), ["model.base: ", "other files"]),
    "a setting": (lambda at: edit_json(at / "r.yaml", optimizer={"learning_rate": 1e-3}),
                  ["optimizer.learning_rate: 0.0002 -> 0.001"]),
}  # fmt: skip


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_is_refused_with_what_it_was(
    change: str, moved: bool, project: Path, monkeypatch: pytest.MonkeyPatch, cli: Command
) -> None:
    here = move(project, monkeypatch) if moved else project
    harm, said = CHANGES[change]
    harm(here)
    before = sorted(here.rglob("*"))
    done = cli("train", "r.yaml", "--resume")
    assert done.code == 2 and all(words in done.err for words in said), done.err
    assert sorted(here.rglob("*")) == before  # nor is what was prepared left


def test_a_start_from_an_adapter_that_moved_too(recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["train", recipe(adapter={"dropout": 0}, run={"output": str(tmp_path / "first")})]) == 0
    path = Path(recipe(run={"output": str(tmp_path / "run")}))
    edit_json(path, adapter={"start": str(tmp_path / "first")})
    with monkeypatch.context() as patch:
        stop_at(patch, 5, die)
        assert main(["train", str(path)]) == 130
    (tmp_path / "first").rename(tmp_path / "second")
    other = shutil.copytree(tmp_path / "run/checkpoints/step-000003", tmp_path / "third")
    assert main(["train", str(path), "--resume", f"adapter.start={other}"]) == 2
    assert main(["train", str(path), "--resume", f"adapter.start={tmp_path}/second"]) == 0


# --- what a refused start leaves -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("word", "there"), [
    ("train.batch_size=64", ()), ("train.batch_size=64", ("runs",)), ("data.max_length=8", ("runs", "runs/x")),
    ("model.base=base/none", ()), ("signal", ()), ("late", ("runs",))])  # fmt: skip
def test_a_refused_start_leaves_nothing(
    word: str, there: tuple[str, ...], recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it ends after the weights were loaded, and whatever was there before stays."""
    monkeypatch.chdir(tmp_path)
    for name in there:
        Path(name).mkdir()
    path = recipe(run={"output": "runs/x"})
    before = sorted(tmp_path.rglob("*"))
    with monkeypatch.context() as patch:
        if word == "signal":
            patch.setattr("lorasft.training.run.load_base", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
        elif word == "late":
            patch.setattr(
                "lorasft.training.run.write_start", lambda *_: (_ for _ in ()).throw(MemoryError("out of memory"))
            )
        assert main(["train", path, *([word] if "=" in word else [])]) > 0
    assert sorted(tmp_path.rglob("*")) == before
    assert main(["train", path, "train.steps=3"]) == 0


def test_files_that_come_while_a_start_fails_are_not_ours(recipe: Write, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    lost = tmp_path / "run/checkpoints/step-000009/state.json"  # of a run whose recipe.yaml was lost
    lost.parent.mkdir(parents=True)
    lost.write_text("{}")
    (tmp_path / "run/run.lock").write_text("")
    assert main(["train", recipe(), "train.batch_size=64"]) == 2
    assert lost.is_file() and (tmp_path / "run/run.lock").is_file()


# --- names of folders ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../out", "sub/../out", "./out/", "link", ".", "~/out", "my out", "it's", "-out"])
def test_a_run_has_any_name(
    name: str, recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Command
) -> None:
    """Stopped, resumed, pruned and merged by that name, and by the command that the run prints."""
    (tmp_path / "here/sub").mkdir(parents=True)
    (tmp_path / "here/elsewhere").mkdir()
    (tmp_path / "here/link").symlink_to("elsewhere")
    here = tmp_path / "here/elsewhere" if name == "." else tmp_path / "here"
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = recipe(run={"output": name, "save_every": 2}, model={"quantization": "none"})
    with monkeypatch.context() as patch:
        stop_at(patch, 5, die)
        assert main(["train", path]) == 130
    done = cli("train", path, "--resume")
    assert done.code == 0, done.err
    run = Path(done.out.strip())
    assert len(list((run / "checkpoints").iterdir())) == 2
    verify_folder(run / "adapter")
    chat, _, merge = done.err.partition("next: ")[2].splitlines()[:3]  # between them evaluate, on a FILE
    assert cli(*shlex.split(chat)[1:], "--prompt", "hi", "--max-tokens", 2).code == 0
    out = "../merged" if name == "." else "merged"
    assert cli(*shlex.split(merge)[1:-1], out, "--no-check").code == 0
    assert (here / out / "config.json").is_file()


def test_a_manifest_leads_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    entry = {"bytes": 1, "sha256": sha256(tmp_path / "secret")}
    (tmp_path / "a/b").mkdir(parents=True)
    for name in ("../secret", str(tmp_path / "secret"), "b/../../secret"):
        (tmp_path / "a/manifest.json").write_text(json.dumps({name: entry}))
        with pytest.raises(ModelError, match="missing or was changed"):
            verify_folder(tmp_path / "a")


@pytest.mark.parametrize(("word", "said"), [("a/b", "a/b"), ("a b", "'a b'"), ("it's", "'it'\"'\"'s'"), ("-x", "./-x"),
                                            ("a=[]", "'a=[]'"), ("$HOME", "'$HOME'"), ("a=1", "a=1")])  # fmt: skip
def test_words_of_commands_are_quoted(word: str, said: str) -> None:
    assert quote(word) == said and shlex.split(said)[0].removeprefix("./") == word


HUB = ("Qwen/Qwen3-4B", "org/a.b-c_d")
PATHS = ("runs/nope", "./nope", "../nope", "/a/b", "~/nope", "a/b/c", "nope", "nope/", "a/", ".a/b", "a/..")


def test_a_name_like_a_path_is_never_asked_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Command
) -> None:
    assert all(map(is_hub_id, HUB)) and not any(map(is_hub_id, PATHS))
    monkeypatch.setattr("lorasft.hub.find_hub", None)
    for name in ("runs/nope", "./nope", "../nope", "a/b/c", "nope/"):
        run = f"run.output={tmp_path / 'run'}"
        for words in (["chat", name, "--prompt", "q"], ["evaluate", name, "--data", "x.jsonl"],
                      ["merge", name, "--out", "out"], ["export", name, "--to", "gguf", "--out", "out"],
                      ["train", "tiny", run, f"model.base={name}"],
                      ["preview", "tiny", f"model.base={name}"]):  # fmt: skip
            done = cli(*words)
            assert done.code == 4 and "no such folder" in done.err, (words, done.err)


# --- in which order, and in which words ----------------------------------------------------------------------------


def test_what_can_be_known_is_said_before_the_work(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Command
) -> None:
    (tmp_path / "out").mkdir()
    done = cli("merge", run, "--out", tmp_path / "out")
    assert done.code == 2 and "asking" not in done.err
    assert cli("merge", run, "--out", tmp_path / "new", "--columns", "{prompt: q}").code == 2  # of no rows
    assert "asking" not in cli("merge", tmp_path / "nope", "--out", tmp_path / "new").err
    monkeypatch.setattr("lorasft.merge.merge.merge", None)
    monkeypatch.setitem(sys.modules, "gguf", None)
    for to in ("gguf", "ollama"):
        done = cli("export", run, "--to", to, "--out", tmp_path / "deep/model")
        assert done.code == 5 and "pip install gguf" in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_help_offers_what_a_command_takes(cli: Command) -> None:
    for command, offered in (("merge", False), ("chat", True), ("evaluate", True)):
        assert ("hub id" in " ".join(cli(command, "--help").out.split())) == offered


@pytest.mark.parametrize(("command", "code", "hint"), [
    (["recipes", "copy", "tiny", "there.yaml"], 2, "hint: name another place"),
    (["plan", "tiny", "--memory", "60MiB"], 6, "0.50 GiB of it for driver and libraries")])  # fmt: skip
def test_refusals_say_what_helps(
    command: list[str], code: int, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Command
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.yaml").touch()
    done = cli(*command)
    assert done.code == code and hint in done.err and "free some space" not in done.err, done.err


def test_the_time_left_is_that_of_the_steps(recipe: Write, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """What comes before the first step, as the evaluation of the base, is not repeated."""
    now = [100.0]
    monkeypatch.setattr("lorasft.training.metrics.time", SimpleNamespace(monotonic=lambda: now[0]))
    settings = load_recipe(recipe())
    Path(settings.run.output).mkdir()
    shown = Metrics(settings, steps=11, done=0, metrics_bytes=0, quiet=True)
    now[0] += 60
    shown.evaluation(step=0, loss=1.0, tokens=9, by_source={})
    for number in (1, 2):
        now[0] += 2
        shown.step({"step": number, "loss": 1.0, "learning_rate": 0.1, "tokens_per_second": 9.0, "seconds": 2.0})
    assert [line.rpartition("  ")[2] for line in capsys.readouterr().err.splitlines()[1:]] == [
        "0:00:20 left",
        "0:00:18 left",
    ]


def test_an_error_is_on_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Also a traceback, where a line of progress is open."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")

    def crash(*_: Any, **__: Any) -> None:
        print("step 1/9", end="", file=sys.stderr)
        raise ZeroDivisionError

    monkeypatch.setattr("lorasft.commands.recipes.run", crash)
    with pytest.raises(ZeroDivisionError):
        main(["recipes"])
    assert capsys.readouterr().err.endswith("\r\x1b[K")


def test_a_tracker_gets_a_parameter_for_each_key_and_the_name_of_the_folder(
    recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    class Accelerator:
        trackers = ()

        def __init__(self, **given: Any) -> None:
            seen.update(given)

        def init_trackers(self, project: str, *, config: dict[str, Any], init_kwargs: dict[str, Any]) -> None:
            seen.update(config, names=init_kwargs)

    monkeypatch.setattr("accelerate.Accelerator", Accelerator)
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    settings = load_recipe(recipe(run={"output": "../my-run", "trackers": ["mlflow", "wandb", "trackio"]}))
    metrics_module.start_trackers(settings)
    assert seen["optimizer.learning_rate"] == 5e-3 and seen["adapter.rank"] == 4 and seen["adapter.dora"] is False
    assert seen["optimizer.betas"] == "[0.9, 0.999]" and seen["train.steps"] == "null"
    assert json.loads(seen["data.train"])[0]["path"].endswith("rows.jsonl")
    assert seen["names"] == {
        "mlflow": {"run_name": "my-run"},
        "wandb": {"name": "my-run"},
        "trackio": {"name": "my-run"},
    }
    assert os.fspath(seen["project_dir"]) == "../my-run"
