"""What Python calls: train, load and what they return; the notebook; and what a shell completes."""

from __future__ import annotations

import ast
import html
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from signal import SIGINT
from typing import Any

import pandas
import pytest
from conftest import Command

import lorasft
from lorasft.cli import COMMANDS
from lorasft.errors import DataError, LorasftError, ModelError, RecipeError, Stopped
from lorasft.recipe import Recipe
from lorasft.recipe.load import shipped_recipes
from lorasft.report import History, render_page
from lorasft.terminal import harmless
from lorasft.training.metrics import Metrics

ROOT = Path(__file__).parents[1]


def test_the_import_is_light() -> None:
    code = (
        "import sys, lorasft\n"
        "heavy = {'torch', 'transformers', 'datasets', 'peft', 'bitsandbytes', 'numpy', 'pydantic', 'jinja2', 'yaml'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
        "assert callable(lorasft.train) and callable(lorasft.load)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (Path(lorasft.__file__).parent / "py.typed").is_file()  # hatchling packs every file of the package


def test_train_does_what_the_command_does(
    recipe: Callable[..., str], tmp_path: Path, cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, also when the kernel is interrupted and the run continued."""
    path, folders = recipe(run={"save_every": None}), [tmp_path / "typed", tmp_path / "called"]
    words = ["train.epochs=1", 'chat.system="é 😀"', "optimizer.learning_rate=1e-3", f"run.output={folders[0]}"]
    assert cli("train", path, *words).code == 0
    rate = {"optimizer.learning_rate": 1e-3, "run.output": str(folders[1])}
    step = Metrics.step
    monkeypatch.setattr(Metrics, "step", lambda *it: (step(*it), it[1]["step"] == 1 and signal.raise_signal(SIGINT)))
    with pytest.raises(Stopped, match="stopped after step 1 of 3, saved"):
        lorasft.train(path, train={"epochs": 1}, chat={"system": "é 😀"}, **rate)
    monkeypatch.undo()
    run = lorasft.train(folders[1], resume=True)
    assert run.folder == folders[1] and run.recipe.chat.system == "é 😀"
    typed, called = ((folder / "adapter/adapter_model.safetensors").read_bytes() for folder in folders)
    assert typed == called

    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    kept = [(row["step"], {key: value for key, value in row.items() if value is not None}) for row in run.history]
    steps = sorted({line["step"] for line in lines})
    assert kept == [(step, {k: v for one in lines if one["step"] == step for k, v in one.items()}) for step in steps]
    assert steps == [*range(len(steps))] and len({tuple(row) for row in run.history}) == 1
    frame = pandas.DataFrame(run.history)
    assert set(map(str, frame.dtypes)) == {"int64", "float64"} and frame["loss"].isna().tolist()[:2] == [True, False]


def test_errors_are_those_of_the_command(run: Path, recipe: Callable[..., str], cli: Command) -> None:
    path = recipe()
    for words, wrong in (
        (["train.epoch=1"], {"train": {"epoch": 1}}),
        (["train.epochs=true"], {"train.epochs": True}),
        ([f"run.output={json.dumps(str(run))}"], {"run": {"output": str(run)}}),
    ):
        with pytest.raises(RecipeError) as error:
            lorasft.train(path, **wrong)
        assert str(error.value) in cli("train", path, *words).err
    with pytest.raises(ModelError, match="not a run, an adapter or a model"):
        lorasft.load(ROOT)
    with pytest.raises(LorasftError, match="no recipe"):
        lorasft.train("nothing of the kind")


def test_load_answers_as_chat_does(run: Path, cli: Command, capsys: pytest.CaptureFixture[str]) -> None:
    question, model = "what is 3 + 3?", lorasft.load(run)
    said = cli("chat", run, "--prompt", question, "--max-tokens", 12).out
    answer = model.generate(question, max_tokens=12)
    assert harmless(answer) + "\n" == said and not capsys.readouterr().out
    assert model.generate([{"role": "user", "content": question}], max_tokens=12, show=True) == answer
    assert capsys.readouterr().out == said
    based = model.generate(question, max_tokens=12, adapted=False)
    bare = lorasft.load(History(run).recipe.model.base)
    assert based != answer and based == bare.generate(question, max_tokens=12, adapted=False)
    assert model.generate(question, max_tokens=12) == answer  # the adapter is on again
    with pytest.raises(DataError, match="128 positions"):
        model.generate("word " * 200)
    messages: list[Any] = [[{"role": "user"}], [{"content": "q"}], [{"role": "u", "content": "q"}], ["q"], [], 5, None]
    for wrong in messages:
        with pytest.raises(DataError):
            model.generate(wrong)
    assert model.generate("\x00a\ud800") is not None
    wrong_ways: list[dict[str, Any]] = [{"max_tokens": one} for one in (0, 1.5, None, "a", True)]
    wrong_ways += [{"temperature": one} for one in (-1, float("nan"), float("inf"), "x", None)]
    wrong_ways += [{"top_p": 0.5}, {"top_p": 0}, {"top_p": 1.5, "temperature": 1}, {"top_p": "x"}]
    for how in wrong_ways:
        with pytest.raises(RecipeError, match="no answer can be sampled"):
            model.generate(question, **how)


class Frames(HTMLParser):
    """The attributes of each element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_report_of_a_notebook_is_the_page_in_a_frame(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.strftime", lambda *_: "now")
    shown = History(run).report()._repr_html_()
    ((tag, attributes),) = Frames(shown).found
    assert tag == "iframe" and attributes["srcdoc"] == render_page([History(run)])
    assert attributes["sandbox"] is None  # there and empty: no script runs
    assert html.escape("<title>") in shown and "<style" not in shown


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cell by cell, in one namespace; what a cell ends with is what the notebook shows."""
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "docs/notebook.ipynb").read_text(encoding="utf-8"))
    space: dict[str, Any] = {}
    shown: list[tuple[Any, Any]] = []
    for cell in (cell for cell in notebook["cells"] if cell["cell_type"] == "code"):
        *body, last = ast.parse("".join(cell["source"])).body
        value = None
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), exec_all(body, space))  # noqa: S307
        else:
            exec_all([*body, last], space)
        shown.append((value, [output for output in cell["outputs"] if output["output_type"] == "execute_result"]))
    (_, _), (frame, [table]), (run, _), (answers, [texts]) = shown
    assert frame.columns.tolist() == "".join(table["data"]["text/plain"]).split("\n")[0].split()
    assert run._repr_html_().startswith("<iframe") and run.folder == Path("runs/notebook") and run.state == "finished"
    assert answers[1] == "The founder of Falstead was Paul Pike." and answers[0] != answers[1]
    assert answers[1] in "".join(texts["data"]["text/plain"])


def exec_all(body: list[ast.stmt], space: dict[str, Any]) -> dict[str, Any]:
    exec(compile(ast.Module(body, []), "cell", "exec"), space)
    return space


KEYS = [f"{name}.{key}=" for name, field in Recipe.model_fields.items() for key in field.annotation.model_fields]  # type: ignore[union-attr]
COMPLETED = {
    "lorasft ": [*COMMANDS],
    "lorasft tr": ["train"],
    "lorasft train --": ["--help", "--resume", "--quiet", "--verbose"],
    "lorasft chat --te": ["--temperature"],
    "lorasft train tin": ["tiny"],
    "lorasft plan q": [name for name in shipped_recipes() if name.startswith("q")],
    "lorasft recipes show tin": ["tiny"],
    "lorasft train tiny ": KEYS,
    "lorasft train --quiet tiny train.epochs=1 optimizer.": [key for key in KEYS if key.startswith("optimizer.")],
    "lorasft chat runs/tiny model.q": ["model.quantization="],
    "lorasft train ./my": [],  # bash takes files
    "lorasft evaluate runs/tiny --data ": [],
}


def test_bash_completes_verbs_options_recipes_and_keys(tmp_path: Path) -> None:
    """What argcomplete's function for bash puts into COMPREPLY, in 0.2 s without torch."""
    command, log = tmp_path / "lorasft", tmp_path / "imported"
    python = shlex.quote(sys.executable)
    command.write_text(f'#!/bin/sh\nexec {python} -X importtime -m lorasft "$@" 2>> {shlex.quote(str(log))}\n')
    command.chmod(0o755)
    script = f'eval "$({python} -m argcomplete.scripts.register_python_argcomplete lorasft)"\n'
    for line in COMPLETED:
        script += f"COMP_LINE={shlex.quote(line)} COMP_POINT={len(line)} COMP_TYPE=9 COMPREPLY=()\n"
        script += "_python_argcomplete lorasft; echo ${COMPREPLY[@]}\n"
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(["bash", "-c", script], env=os.environ | path, capture_output=True, text=True, check=True)
    seconds = (resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before) / len(COMPLETED)
    assert dict(zip(COMPLETED, map(str.split, done.stdout.split("\n")), strict=False)) == COMPLETED, done.stderr
    imported = log.read_text()
    assert imported.count("| lorasft\n") == len(COMPLETED) and "| torch\n" not in imported
    assert seconds < 0.4  # 0.2 on a quiet machine
