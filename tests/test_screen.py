"""What a person sees of a run: on a terminal, piped, stopped, in an error; and the answers that are sampled for it."""

from __future__ import annotations

import json
import os
import pty
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Command
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from test_train import die, metrics, stop_at
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorasft.cli import main
from lorasft.errors import DivergedError
from lorasft.files import sha256
from lorasft.recipe import RunSettings
from lorasft.terminal import say
from lorasft.training.metrics import Progress, sparkline

Write = Callable[..., str]


def screen(stream: str) -> list[str]:
    """The lines of a terminal that knows what lorasft uses: a line that is begun anew, and bold letters."""
    shown = [""]
    for part in stream.replace("\x1b[1m", "").replace("\x1b[0m", "").replace("\r\n", "\n").split("\n"):
        shown[-1] = part.rpartition("\r\x1b[K")[2] if "\r\x1b[K" in part else shown[-1] + part
        assert "\x1b" not in shown[-1] and "\r" not in shown[-1]
        shown.append("")
    return shown[:-1]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> SimpleNamespace:
    """Makes stderr a terminal of 80 columns, and `clock.now` the time."""
    clock = SimpleNamespace(now=100.0, columns=80)
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: True)  # that of capsys, made anew for the test
    monkeypatch.setattr("lorasft.training.metrics.get_terminal_size", lambda: os.terminal_size((clock.columns, 24)))
    monkeypatch.setattr("lorasft.training.metrics.time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return clock


def show(clock: SimpleNamespace, progress: Progress, number: int) -> None:
    """A step of 2 seconds in training whose loss falls from 4 to 1."""
    clock.now += 2
    loss = 4 - 3 * number / progress.steps
    values = {"step": number, "loss": loss, "learning_rate": 2e-4, "tokens_per_second": 1234.5, "seconds": 2.0}
    progress.step(values)


def wait(clock: SimpleNamespace, progress: Progress, what: str, seconds: float) -> None:
    with progress.interlude(what):
        clock.now += seconds


GOLDEN = """\
   step      loss  held out  tokens/s  loss so far
      0              4.0000
      4    3.2500    2.8000     1,234  █▆▃▁
      8    2.0500    1.7000     1,234  █▇▆▅▄▃▂▁
 80% ██████░░  8/10  loss 1.6000 █▇▅▄▃▁  1,234 tokens/s  0:00:08 left"""


def test_the_table_and_the_bar(terminal: SimpleNamespace, capsys: Any) -> None:
    """What is left after step 8: two steps of 2 s, two evaluations of 1 s with answers of 0.5 s, and a save of 1 s."""
    progress = Progress(RunSettings(eval_every=4, save_every=10, sample_every=2), steps=10, done=0, live=True)
    wait(terminal, progress, "evaluating", 30)
    progress.evaluation(step=0, loss=4.0, tokens=9, by_source={})
    wait(terminal, progress, "answering", 0.5)
    wait(terminal, progress, "saving", 1)
    for number in range(1, 9):
        show(terminal, progress, number)
        if number == 4:
            wait(terminal, progress, "evaluating", 1)
            progress.evaluation(step=4, loss=2.8, tokens=9, by_source={})
    bar = capsys.readouterr().err
    assert screen(bar)[-1] == GOLDEN.splitlines()[-1] and max(map(len, screen(bar))) < 80
    progress.evaluation(step=8, loss=1.7, tokens=9, by_source={})
    lines = screen(bar + capsys.readouterr().err)
    assert [line.rstrip() for line in lines[:-1]] == GOLDEN.splitlines()[:-1]


@pytest.mark.parametrize("columns", [10, 40, 80, 120, 300])
def test_a_bar_never_wraps(columns: int, terminal: SimpleNamespace, capsys: Any) -> None:
    terminal.columns = columns
    progress = Progress(RunSettings(), steps=1_000_000, done=0, live=True)
    for number in (1, 500_000, 1_000_000):
        show(terminal, progress, number)
        wait(terminal, progress, "evaluating", 1)
        drawn = [part for part in capsys.readouterr().err.split("\r\x1b[K") if part]
        assert len(drawn) == 2 and all(len(part) < columns and "\n" not in part for part in drawn)


@given(st.lists(st.floats(-1e6, 1e6), max_size=50), st.integers(-3, 60))
def test_a_sparkline_goes_from_the_lowest_to_the_highest(values: list[float], width: int) -> None:
    line = sparkline(values, width=width)
    assert len(line) == max(0, min(len(values), width)) and set(line) <= set("▁▂▃▄▅▆▇█")
    if len(values) == len(line) > 0 and max(values) > min(values):
        assert line[values.index(min(values))] == "▁" and line[values.index(max(values))] == "█"


@pytest.mark.parametrize(("names", "bold"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_colours_are_for_terminals_that_want_them(
    names: dict[str, str], bold: bool, terminal: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    say("head\x1b[31m", bold=True)
    said = capsys.readouterr().err
    assert ("\x1b[1m" in said) == bold and "\\x1b[31m" in said and ("\r\x1b[K" in said) == ("TERM" not in names)


def test_a_run_on_a_real_terminal_that_is_stopped(recipe: Write, tmp_path: Path) -> None:
    """Ctrl-C lands on a line of its own, is no error, and what is said to type next continues the run to its end."""
    leader, follower = pty.openpty()
    settings = {"sample_every": 1, "output": str(tmp_path / "my run")}
    path = recipe(train={"steps": 500}, run=settings, model={"quantization": "none"})
    words = [sys.executable, "-m", "lorasft", "train", path]
    environment = {**os.environ, "TERM": "xterm", "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, stderr=follower, stdout=subprocess.PIPE, env=environment) as process:
        os.close(follower)
        said, stopped = b"", False
        while part := read(leader):
            said += part
            if b" 12/500 " in said and not stopped:
                process.send_signal(signal.SIGINT)
                stopped = True
    os.close(leader)
    lines = screen(said.decode())
    assert process.returncode == 130 and "error" not in "\n".join(lines), lines
    where = next(index for index, line in enumerate(lines) if line.startswith("stopping after this step"))
    assert lines[where + 1].startswith("stopped after step") and lines[where + 2].startswith("next: "), lines[where:]
    assert [line.split()[0] for line in lines if line[:4] in ("base", "data", "fit ", "run ")] == [
        "base",
        "data",
        "fit",
        "run",
    ]
    assert any(line.split()[:1] == ["answer"] for line in lines)
    command = shlex.split(lines[where + 2].removeprefix("next: "))
    assert command[:2] == ["lorasft", "train"] and command[2] == str(tmp_path / "my run")


def read(descriptor: int) -> bytes:
    """What a terminal shows next; nothing at its end, which Linux tells by an error."""
    try:
        return os.read(descriptor, 4096)
    except OSError:
        return b""


def test_an_error_in_the_middle_is_behind_no_open_line(
    recipe: Write, terminal: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, cli: Command
) -> None:
    def diverge() -> None:
        raise DivergedError("step 3 is not finite")

    stop_at(monkeypatch, 3, diverge)
    done = cli("train", recipe(model={"quantization": "none"}))
    lines = [line for line in screen(done.err) if line]
    assert done.code == 7 and lines[-1] == "error: step 3 is not finite" and not any("2/9" in line for line in lines)


def test_quiet_says_errors_alone(recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Command) -> None:
    monkeypatch.setenv("LORASFT_QUIET", "")
    path = recipe(train={"steps": 3}, model={"quantization": "none"})
    done = cli("train", path, "--quiet")
    assert (done.code, done.out, done.err) == (0, f"{tmp_path / 'run'}\n", "")
    assert "error: this run folder exists" in cli("train", path, "--quiet").err
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    said = screen(cli("train", path, "--verbose", f"run.output={tmp_path / 'other'}").err)
    assert [line.split()[1] for line in said if "  loss " in line] == ["1/3", "2/3", "3/3"]


# --- sampled answers -----------------------------------------------------------------------------------------------


def samples(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "answers.jsonl").read_text(encoding="utf-8").splitlines()]


def test_answers_are_those_of_plain_transformers(run: Path, base: Path, rows: Path) -> None:
    """At step 0 of the base, at the last of the adapter, by PEFT and a loop over whole prompts without a cache."""
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(plain, run / "adapter", torch_device="cpu").eval()
    stops, noted = tokenizer.convert_tokens_to_ids(["<|end|>", "</s>"]), samples(run)
    steps = sorted({line["step"] for line in metrics(run) if "eval_loss" in line})
    assert [line["step"] for line in noted] == [step for step in steps for _ in range(3)]
    written = [json.loads(line)["messages"] for line in rows.read_text(encoding="utf-8").splitlines()]
    for line in (line for line in noted if line["step"] in (steps[0], steps[-1])):
        question, answer = written[int(line["place"].rpartition(":")[2]) - 1]
        assert line["expected"] == answer["content"] and question["content"] in line["prompt"] and line["ends"]
        ids = tokenizer.apply_chat_template([question], add_generation_prompt=True, return_dict=False)
        new: list[int] = []
        while len(new) < 48 and (not new or new[-1] not in stops):
            with torch.no_grad(), adapted.disable_adapter() if line["step"] == 0 else torch.no_grad():
                new.append(int(adapted(torch.tensor([[*ids, *new]])).logits[0, -1].argmax()))
        ended = new[-1] in stops
        assert (line["answer"], line["ended"]) == (
            tokenizer.decode(new[: len(new) - ended], skip_special_tokens=True),
            ended,
        )


def test_answers_change_no_bit_and_a_resumed_run_has_each_once(
    recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout; killed after an evaluation that the save before it does not know. Only every second is sampled."""
    for name, every in (("without", None), ("whole", 2), ("parts", 2)):
        settings = {"output": str(tmp_path / name), "sample_every": every, "eval_every": 1, "save_every": 3}
        path = recipe(run=settings, train={"steps": 5}, model={"quantization": "none"})
        if name == "parts":
            with monkeypatch.context() as patch:
                stop_at(patch, 5, die)
                assert main(["train", path]) == 130
            assert [line["step"] for line in samples(tmp_path / name)] == [0] * 3 + [2] * 3 + [4] * 3
        assert main(["train", path, *(["--resume"] if name == "parts" else [])]) == 0
        assert metrics(tmp_path / name) == metrics(tmp_path / "without")
        adapter = "adapter/adapter_model.safetensors"
        assert sha256(tmp_path / name / adapter) == sha256(tmp_path / "without" / adapter)
    assert samples(tmp_path / "parts") == samples(tmp_path / "whole")
    assert [line["step"] for line in samples(tmp_path / "whole")] == [0] * 3 + [2] * 3 + [4] * 3 + [5] * 3
    assert not (tmp_path / "without/answers.jsonl").exists()


def test_answers_that_fail_or_were_changed_cost_nothing_else(
    recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Command
) -> None:
    path = recipe(train={"steps": 4}, run={"sample_every": 1}, model={"quantization": "none"})
    with monkeypatch.context() as patch:
        stop_at(patch, 4, die)
        assert main(["train", path]) == 130
    (tmp_path / "run/answers.jsonl").write_text('{"step": 0}\n')

    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("no cache for this model\nand more")

    monkeypatch.setattr("lorasft.training.samples.generate", full)
    done = cli("train", path, "--resume")
    assert done.code == 0 and "no answers after step 4: RuntimeError: no cache for this model\n" in done.err


# --- a run by its folder -------------------------------------------------------------------------------------------


def test_a_run_is_resumed_by_its_folder(
    recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Command
) -> None:
    """With the overrides that it began with, wherever it is now; until then its newest checkpoint answers."""
    path = recipe(model={"quantization": "none"})
    with monkeypatch.context() as patch:
        stop_at(patch, 5, die)
        began = cli("train", path, "train.steps=6", "adapter.rank=2")
    assert began.code == 130 and began.err.splitlines()[-1] == f"next: lorasft train {tmp_path / 'run'} --resume"
    (tmp_path / "recipe.yaml").unlink()
    (tmp_path / "run").rename(tmp_path / "moved run")
    monkeypatch.chdir(tmp_path)
    for words in (
        ["chat", "moved run"],
        ["evaluate", "moved run", "--data", "x"],
        ["merge", "moved run", "--out", "m"],
    ):
        refused = cli(*words)
        hint = refused.err.partition("hint: ")[2].strip()
        assert refused.code == 4 and hint.startswith("finish it: lorasft train 'moved run' --resume, or take"), (
            refused.err
        )
    checkpoint = shlex.split(hint.rpartition(": ")[2])[0]
    assert checkpoint == "moved run/checkpoints/step-000003"
    assert cli("chat", checkpoint, "--prompt", "hi", "--max-tokens", 2).code == 0
    done = cli(*shlex.split(hint.partition(": ")[2].partition(",")[0])[1:])
    assert done.code == 0 and done.out == "moved run\n" and metrics(tmp_path / "moved run")[-1]["step"] == 6
    assert json.loads((tmp_path / "moved run/adapter/adapter_config.json").read_bytes())["r"] == 2
    assert "--resume; or start another" in cli("train", "moved run").err


def test_a_checkpoint_is_asked_as_its_run_is(recipe: Write, tmp_path: Path, cli: Command) -> None:
    """It brings no tokenizer: template, its options, system message and new tokens are those of the run's recipe."""
    (tmp_path / "own.jinja").write_text(
        "{% for m in messages %}{{ m.role }}{{ mark }}{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant{{ mark }}{% endif %}"
    )
    chat = {"template": str(tmp_path / "own.jinja"), "template_options": {"mark": " <says> "}, "system": "be kind"}
    path = recipe(chat=chat, model={"new_tokens": ["<says>"], "quantization": "none"}, train={"steps": 4})
    assert cli("train", path).code == 0
    names = [tmp_path / "run", tmp_path / "run/checkpoints/step-000004"]
    answers = [cli("chat", name, "--prompt", "what is 1 + 1?", "--max-tokens", 9) for name in names]
    assert answers[0].out == answers[1].out and not answers[1].code
    data = json.loads(Path(path).read_text(encoding="utf-8"))["data"]["train"]
    losses = [json.loads(cli("evaluate", name, "--data", data, "--json").out) for name in names]
    assert losses[0] == losses[1]
    for name, out in zip(names, ("whole", "part"), strict=True):
        assert cli("merge", name, "--out", tmp_path / out, "--no-check").code == 0
    whole, part = (AutoTokenizer.from_pretrained(tmp_path / out) for out in ("whole", "part"))
    messages = [{"role": "user", "content": "hello"}]
    prompts = [
        one.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) for one in (whole, part)
    ]
    assert prompts[0] == prompts[1] and whole.convert_tokens_to_ids("<says>") in prompts[1]


def test_a_run_that_has_not_begun_is_begun_again(
    recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Command
) -> None:
    monkeypatch.setattr("lorasft.training.run._prepare", lambda *_, **__: die())
    stopped = cli("train", recipe(), "chat.system=be kind")
    assert stopped.code == 130
    assert stopped.err.splitlines()[1:] == [
        "stopped before the first step", f"next: lorasft train {tmp_path / 'recipe.yaml'} 'chat.system=be kind'"
    ]  # fmt: skip


def test_lorasft_alone_says_how_to_begin(cli: Command) -> None:
    done = cli()
    assert done.code == 0 and not done.err and len(done.out.splitlines()) <= 6
    assert "lorasft train tiny" in done.out
