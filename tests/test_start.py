"""What a command imports before it does something. Nothing here is timed: `scripts/bench.py start` does that."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Command

from lorasft.commands import train
from lorasft.data.prepare import prepare
from lorasft.data.tokenizer import load_tokenizer
from lorasft.files import is_locked
from lorasft.recipe.load import load_recipe
from lorasft.training.metrics import Metrics

Write = Callable[..., str]


def run_python(code: str, *words: object) -> subprocess.CompletedProcess[str]:
    """`code` in a process of its own, with the words in sys.argv."""
    return subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=False)


FIRST_STEP = """
import sys
from lorasft import cli
from lorasft.training.metrics import Progress
step = Progress.step
def watched(self, values):
    step(self, values)
    print(values["step"], "torch._inductor" in sys.modules, "torch._dynamo.convert_frame" in sys.modules)
Progress.step = watched
assert cli.main(["train", sys.argv[1]]) == 0
import torch
print(torch.compile(lambda x: x.sin() + 1, backend="eager", fullgraph=True)(torch.zeros(2)).tolist())
print(torch._dynamo.convert_frame.__name__, sys.modules["torch._dynamo"].__file__ is not None)
assert cli.main(["train", sys.argv[1], "run.output=" + sys.argv[2]]) == 0
"""


def test_a_run_does_without_the_compiler_and_leaves_it_whole(recipe: Write, tmp_path: Path) -> None:
    path = recipe(train={"epochs": 1}, model={"dtype": "bfloat16"})
    done = run_python(FIRST_STEP, path, tmp_path / "again")
    assert done.returncode == 0, done.stderr
    steps, after = done.stdout.split(f"{tmp_path}/run\n")
    assert steps.splitlines() == [f"{number} False False" for number in (1, 2, 3)]
    assert after.splitlines()[:2] == ["[1.0, 1.0]", "torch._dynamo.convert_frame True"]
    first, again = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("run", "again"))
    losses = [[json.loads(line).get("loss") for line in text.splitlines()] for text in (first, again)]
    assert losses[0] == losses[1]  # with the compiler's own marks, too


def test_done_is_said_when_nothing_is_left_to_do(
    recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Command
) -> None:
    """So that the process can end at once: trackers closed, the page and the events written, the folder free."""
    run, plain, threads = tmp_path / "run", train.say, {*threading.enumerate()}
    closed: list[bool] = []
    seen: list[tuple[int, bool, bool]] = []
    monkeypatch.setattr(Metrics, "close", lambda _: closed.append(True))

    def say(text: object) -> None:
        if str(text).startswith("done"):
            seen.append((len(closed), is_locked(run), '"ended"' in (run / "events.jsonl").read_text()))
        plain(text)

    monkeypatch.setattr(train, "say", say)
    assert cli("train", recipe(train={"epochs": 1})).code == 0
    assert seen == [(1, False, True)] and "<title>" in (run / "report.html").read_text()
    assert threads.issuperset(threading.enumerate())


EARLY = """
import json, sys
from lorasft import cli
for words in json.loads(sys.argv[1]):
    code = cli.main(words)
    print(code, sorted({"torch", "transformers", "datasets"} & sys.modules.keys()))
"""


def test_what_can_be_known_without_torch_is_refused_without_it(recipe: Write, run: Path, tmp_path: Path) -> None:
    path = recipe()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").touch()
    stopped, other = tmp_path / "stopped", tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "gpt2"}')
    shutil.copytree(run, stopped, ignore=shutil.ignore_patterns("adapter"))
    cases = [
        (2, ["train", path, f"run.output={run}"], "this run folder exists"),
        (2, ["train", path, f"run.output={tmp_path}/full"], "what is not a run's: notes.txt"),
        (2, ["train", path, f"run.output={tmp_path}/none", "--resume"], "there is no run to resume"),
        (3, ["train", path, f"data.train={tmp_path}/none.jsonl"], "there is no such file"),
        (3, ["plan", path, f"data.eval=[{tmp_path}/none.jsonl]"], "there is no such file"),
        (5, ["train", path, "run.trackers=[trackio]"], "not installed: trackio"),
        (2, ["train", path, "train.epochs=many"], "train.epochs"),
        (2, ["train", str(run), "--resume", "train.epochs=7"], "train.epochs: "),
        (4, ["train", path, "model.base=no/such/base"], "there is no such folder"),
        (4, ["train", path, f"model.base={tmp_path}/none"], "there is no such folder"),
        (4, ["chat", f"{tmp_path}/none"], "there is no such folder"),
        (4, ["chat", "runs/none"], "there is no such folder"),
        (5, ["chat", "qwen3-4b"], "the hub cannot be reached"),  # a recipe that has no data
        (2, ["train", str(tmp_path / "full"), "--resume"], "this folder is not that of a run"),
        (4, ["chat", str(tmp_path / "full")], "this is not a run, an adapter or a model"),
        (2, ["chat", str(run), "--top-p", "0.5"], "no answer can be sampled"),
        (4, ["evaluate", "runs/none", "--data", "rows.jsonl"], "there is no such folder"),
        (3, ["evaluate", str(run), "--data", "none.jsonl"], "there is no such file"),
        (2, ["evaluate", str(run), "--data", "none.jsonl", "--answers", "a.txt"], "neither .html nor .jsonl"),
        (4, ["merge", str(stopped), "--out", f"{tmp_path}/out"], "this run has no adapter yet"),
        (4, ["merge", str(run), "--out", f"{tmp_path}/out", "--base", f"{tmp_path}/none"], "there is no such folder"),
        (3, ["merge", str(run), "--out", f"{tmp_path}/out", "--data", "none.jsonl"], "there is no such file"),
        (2, ["merge", str(run), "--out", str(tmp_path / "full")], "this exists already"),
        (4, ["export", str(other), "--to", "gguf", "--out", f"{tmp_path}/m.gguf"], "no GGUF export for gpt2"),
        (2, ["export", str(run), "--to", "gguf-lora", "--type", "Q4_K_M", "--out", "m.gguf"], "leave out --type"),
    ]
    done = run_python(EARLY, json.dumps([words for _, words, _ in cases]))
    assert done.stdout.splitlines() == [f"{code} []" for code, _, _ in cases], done.stderr
    for _, _, said in cases:
        assert said in done.stderr


def test_preview_shows_what_is_trained_on_without_torch_or_datasets(recipe: Write, tmp_path: Path) -> None:
    path = recipe()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "lorasft", "preview", path, "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "tokenizers" in imported and not {"torch", "datasets"} & imported
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert said == ["preview: importing libraries ..."]
    shown: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()[:-1]]

    settings = load_recipe(path)
    tokenizer = load_tokenizer(settings.model.base)
    store = prepare(settings.data, settings.chat, tokenizer=tokenizer, folder=tmp_path / "tokens").store
    trained = [tokens for example in range(len(store)) for tokens in store.sequences(example)]
    assert [line["ids"] for line in shown] == [tokens.ids.tolist() for tokens in trained]
    assert [line["labels"] for line in shown] == [tokens.labels.tolist() for tokens in trained]
    assert {line["held_out"] for line in shown} == {False, True}
