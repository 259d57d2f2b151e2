"""The ledger of rows: its losses are those of plain transformers, whatever became of the run, and cost it little."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Command
from faults.trial import full_in, with_fault
from peft import PeftModel
from test_train import die, stop_at
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorasft.cli import main
from lorasft.files import read_objects, sha256
from lorasft.training import loop, samples

Write = Callable[..., str]
PLAIN = {"model": {"quantization": "none"}}


def ledger(run: Path) -> list[dict[str, Any]]:
    return list(read_objects(run / "rows.jsonl"))


@pytest.fixture
def unlimited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the rows that were trained on cost as much time as they want."""
    monkeypatch.setattr(samples, "_SHARE", 1e9)


def test_losses_are_those_of_plain_transformers(
    recipe: Write, base: Path, rows: Path, tmp_path: Path, unlimited: None
) -> None:
    """Of every row: by the base, the best adapter, which is the result, and the last, which is in a checkpoint."""
    run, settings = tmp_path / "run", {"adapter": {"alpha": 256}, "optimizer": {"learning_rate": 0.01}}  # too much
    settings |= {"schedule": {"name": "constant"}, "train": {"steps": 4}}
    assert main(["train", recipe(**PLAIN, **settings, run={"keep_best": True, "eval_every": 1})]) == 0
    noted = {(line["split"], line["place"].rpartition(":")[2]): line for line in ledger(run)}
    steps = {name: {line["losses"][name][0] for line in noted.values()} for name in ("base", "best", "last")}
    evaluated = {line["step"]: line["eval_loss"] for line in read_objects(run / "metrics.jsonl") if "eval_loss" in line}
    best = min(evaluated, key=lambda step: evaluated[step])
    assert steps == {"base": {0}, "best": {best}, "last": {4}} and 0 < best < 4, evaluated
    assert len(noted) == 26 and {split for split, _ in noted} == {"train", "held out"}
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    texts = [json.loads(line)["messages"] for line in rows.read_text(encoding="utf-8").splitlines()]
    sizes = sorted(len(tokenizer.apply_chat_template(messages, return_dict=False)) for messages in texts)
    quantiles = json.loads((run / "provenance.json").read_bytes())["report"]["length_quantiles"]
    assert (quantiles["50%"], quantiles["100%"]) == (sizes[13], sizes[25])
    for name, adapter in (("base", "adapter"), ("best", "adapter"), ("last", "checkpoints/step-000004")):
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = plain if name == "base" else PeftModel.from_pretrained(plain, run / adapter, torch_device="cpu").eval()
        for (_, number), line in noted.items():
            question, answer = texts[int(number) - 1]
            start = len(tokenizer.apply_chat_template([question], add_generation_prompt=True, return_dict=False))
            ids = torch.tensor(tokenizer.apply_chat_template([question, answer], return_dict=False))
            ids = ids[: start + line["tokens"]]
            assert tokenizer.decode(ids[start:], skip_special_tokens=True) == answer["content"] == line["text"]
            with torch.no_grad():
                logits = model(ids[None]).logits[0, start - 1 : -1]
            assert line["losses"][name][1] == pytest.approx(
                float(F.cross_entropy(logits, ids[start:])), rel=1e-4, abs=1e-6
            )


def test_a_resumed_run_has_the_ledger_of_one_that_never_stopped(
    recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unlimited: None
) -> None:
    """Bit for bit, like the adapter; what was noted after the save that it goes on from is forgotten at once."""
    seen = []
    for name in ("whole", "parts"):
        path = recipe(**PLAIN, run={"output": str(tmp_path / name), "eval_every": 1}, train={"steps": 6})
        if name == "parts":
            with monkeypatch.context() as patch:
                stop_at(patch, 5, die)
                assert main(["train", path]) == 130
            assert {line["losses"]["last"][0] for line in ledger(tmp_path / name)} == {4}
            stop_at(monkeypatch, 4, lambda: seen.extend(ledger(tmp_path / "parts")))
        assert main(["train", path, *(["--resume"] if name == "parts" else [])]) == 0
    assert seen and {step for line in seen for step, _ in line["losses"].values()} <= {0, 3}
    whole, parts = (tmp_path / name for name in ("whole", "parts"))
    assert ledger(parts) == ledger(whole) and len(ledger(whole)) == 26
    adapter = "adapter/adapter_model.safetensors"
    assert sha256(parts / adapter) == sha256(whole / adapter)


def test_rows_that_were_trained_on_take_a_share_of_the_time(
    recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps take 2 s, a row 20 ms by the base and by the adapter: of 18 s, 2 % are enough for some of them."""
    clock, plain_step, plain_score = SimpleNamespace(now=0.0), loop.take_step, samples.score_batches

    def take_step(*given: Any) -> dict[str, Any]:
        return {**plain_step(*given), "seconds": 2.0}

    def score(*given: Any, **options: Any) -> Iterator[Any]:
        clock.now += 0.02
        yield from plain_score(*given, **options)

    monkeypatch.setattr(loop, "take_step", take_step)
    monkeypatch.setattr(samples, "score_batches", score)
    monkeypatch.setattr(samples, "time", SimpleNamespace(monotonic=lambda: clock.now))
    assert main(["train", recipe(**PLAIN)]) == 0
    trained = [line for line in ledger(tmp_path / "run") if line["split"] == "train"]
    assert all(line["losses"].keys() >= {"base", "last"} for line in trained)
    assert clock.now == pytest.approx(0.04 * len(trained)) and 0.2 < clock.now <= 0.02 * 18


def test_odd_notes_are_left_out_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a resumed run reads them: nothing is said, and what can be read stays."""
    whole = {
        "split": "train",
        "place": "rows:1",
        "tokens": 7,
        "text": "a",
        "losses": {"base": [0, 2.5], "last": [3, 1.5]},
    }
    odd: list[Any] = [3, [1], None, "x", {"last": 3}, {"base": [0, 2.0], "last": [5, "x"]}, {"last": [True, 1.0]}]
    rows = [whole, *({**whole, "place": f"odd:{at}", "losses": one} for at, one in enumerate(odd)), {"place": [1]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with samples.open_ledger(tmp_path, until=3):
        pass
    kept = {line.get("place"): line["losses"] for line in ledger(tmp_path)}
    assert kept.pop("rows:1") == whole["losses"] and kept.pop("odd:5") == {"base": [0, 2.0]}
    assert len(kept) == 6 and not any(kept.values()) and capsys.readouterr().err == ""
    answers = [{"step": 3, "place": "rows:1", "prompt": "q"}, {"step": "3"}, {"step": 4, "answer": [1], "place": {}}]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(one) + "\n" for one in answers), encoding="utf-8")
    assert samples.keep_samples(tmp_path, until=4) == [answers[0], {"step": 4}]


@pytest.mark.parametrize("fault", ["memory", "signal", "disk", "damage"])
def test_what_goes_wrong_with_it_never_reaches_the_run(
    fault: str, recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Command, unlimited: None
) -> None:
    path, number, plain = recipe(**PLAIN, train={"steps": 3}), 0, samples.score_batches

    def score(*given: Any, **options: Any) -> Any:
        nonlocal number
        number += 1
        if fault == "memory" and number == 3:
            raise torch.OutOfMemoryError
        if fault == "signal" and number == 1:
            signal.raise_signal(signal.SIGINT)
        return plain(*given, **options)

    monkeypatch.setattr(samples, "score_batches", score)
    if fault == "damage":
        damaged = tmp_path / "run/rows.jsonl"
        odd = ["3", "[1]", '{"last": 3}', '{"last": ["x", []]}', '{"base": [0, 2.5], "last": [true, 1]}', "null"]
        lines = [f'{{"split": "train", "place": [{at}], "losses": {one}}}\n' for at, one in enumerate(odd)]
        stop_at(monkeypatch, 2, lambda: damaged.write_text("".join([*lines, '{"place": "x:1"}\n']), encoding="utf-8"))
    if fault == "disk":
        with with_fault(full_in("rows.jsonl")):
            done = cli("train", path)
    else:
        done = cli("train", path)
    assert done.code == 0 and (tmp_path / "run/adapter/adapter_model.safetensors").is_file(), done.err
    said = "rows.jsonl stays as it was: " in done.err
    trained = [line for line in ledger(tmp_path / "run") if line.get("split") == "train"]
    kept = fault in ("signal", "damage")  # what is damaged is left out
    assert said != kept and (len(trained) >= 16 if kept else not trained)
    assert not list((tmp_path / "run").glob(".stage-*"))
