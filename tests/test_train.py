"""Runs: exact resumption, a frozen base, signals, refusals, and an adapter that loads everywhere."""

from __future__ import annotations

import io
import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_oracles import Rows, packed_step
from tiny_models import BF16, randomize_adapter
from transformers import AutoModelForCausalLM

from lorasft import files
from lorasft.artifact import find_artifact
from lorasft.cli import main
from lorasft.files import sha256
from lorasft.model.adapter import attach_adapter, load_artifact
from lorasft.model.attention import evaluating
from lorasft.model.base import load_base
from lorasft.model.scoring import generate, score_batches
from lorasft.model.selfcheck import verify
from lorasft.recipe import AdapterSettings, ModelSettings, ScheduleSettings
from lorasft.recipe.load import load_recipe
from lorasft.signals import Ended, StopRequest
from lorasft.training import loop
from lorasft.training import run as runs
from lorasft.training.optimizer import learning_rate

Write = Callable[..., str]


def metrics(run: Path) -> list[dict[str, Any]]:
    """What must be the same in every run of a recipe: all but the clock and the memory."""
    changing = ("seconds", "tokens_per_second", "memory_bytes")
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [{key: value for key, value in line.items() if key not in changing} for line in lines]


def run_folder(recipe: str) -> Path:
    return Path(load_recipe(recipe).run.output)


def stop_at(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], None]) -> None:
    """Do `act` in the middle of step `number`."""
    plain = loop.take_step

    def take_step(run: loop.Run, now: int, stop: StopRequest) -> dict[str, Any]:
        if now == number:
            act()
        return plain(run, now, stop)

    monkeypatch.setattr(loop, "take_step", take_step)


def die() -> None:
    raise Ended(signal.SIGINT)


EIGHT_BITS = {"optimizer": {"name": "adamw8bit"}, "adapter": {"rank": 64}}  # large enough to be kept in 8 bit


@pytest.mark.parametrize("settings", [{}, EIGHT_BITS], ids=["adamw", "adamw8bit"])
def test_resumed_equals_uninterrupted(
    settings: dict[str, Any], recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, in NF4, with dropout, evaluations in between, ragged steps and deaths between two saves."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["train", recipe(**settings, run={"output": str(whole)})]) == 0
    want = metrics(whole)
    assert sum("loss" in line for line in want) == 9 and sum("eval_loss" in line for line in want) == 4
    path = recipe(**settings, run={"output": str(parts)})
    for number in (2, 5, 8):
        with monkeypatch.context() as patch:
            stop_at(patch, number, die)
            assert main(["train", path, *(["--resume"] if number > 2 else [])]) == 130
    state = load_file(parts / "checkpoints/step-000006/optimizer.safetensors")
    assert any(tensor.dtype == torch.uint8 for tensor in state.values()) == bool(settings)
    assert main(["train", path, "--resume"]) == 0
    assert metrics(parts) == want
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert sha256(parts / "adapter" / name) == sha256(whole / "adapter" / name)


def test_the_frozen_base_is_unchanged(recipe: Write, base: Path) -> None:
    """After training in NF4, every frozen tensor has the bits of a fresh load."""
    settings = load_recipe(recipe(model={"dtype": "auto"}, train={"steps": 3}))
    with runs.open_run(settings, resume=False) as (run, state):
        loop.run_steps(run, state)
        after = {
            name.removeprefix("base_model.model.").replace(".base_layer", ""): parameter
            for name, parameter in run.model.named_parameters()
            if not parameter.requires_grad
        }
        trained = set(run.trained.parameters)
    assert all("lora_" in name for name in trained) and trained
    fresh = dict(load_base(settings.model, torch.device("cpu")).named_parameters())
    assert fresh.keys() == after.keys()
    assert all(torch.equal(fresh[name].data, after[name].data) for name in fresh)


def test_evaluating_and_generating_do_not_change_gradients(base: Path) -> None:
    """bitsandbytes repacks 4-bit weights in place when a model in evaluation mode runs on some CPUs."""
    peft = attach_adapter(
        load_base(ModelSettings(base=str(base)), torch.device("cpu")), AdapterSettings(rank=4), seed=0
    )
    randomize_adapter(peft)
    network = verify(peft.get_base_model())
    rows = Rows()
    before = packed_step(peft.train(), network, rows, "token", 100)
    list(score_batches(network, rows.sequences, range(len(rows)), capacity=100))
    generate(network.causal, None, [[1, 5, 9]], max_new_tokens=4, stops=[2])
    after = packed_step(peft.train(), network, rows, "token", 100)
    assert before[0] == after[0]
    assert all(torch.equal(before[1][name], after[1][name]) for name in before[1])


def test_the_adapter_loads_in_peft_and_gives_the_same_logits(recipe: Write, base: Path, tmp_path: Path) -> None:
    path = recipe(model={"quantization": "none"}, adapter={"dropout": 0})
    assert main(["train", path]) == 0
    adapter = run_folder(path) / "adapter"
    fresh = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(fresh, adapter, torch_device="cpu").eval()
    ours = load_artifact(find_artifact(str(run_folder(path))), torch.device("cpu")).get_base_model()
    ids = torch.arange(5, 60).unsqueeze(0)
    with torch.no_grad(), evaluating(ours, "eager"):
        difference = (theirs(ids).logits - ours(ids).logits).abs().max()
    assert difference < 1e-4
    assert all(tensor.dtype == torch.float32 for tensor in load_file(adapter / "adapter_model.safetensors").values())
    assert any(tensor.abs().max() > 0 for name, tensor in load_file(adapter / "adapter_model.safetensors").items()
               if "lora_B" in name)  # fmt: skip


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("adapter", [{"dora": True}, {"modules_to_save": ["lm_head"]}, {"rslora": True}])
def test_other_adapters_train_and_load(adapter: dict[str, Any], dtype: torch.dtype, recipe: Write) -> None:
    path = recipe(adapter=adapter, model={"dtype": str(dtype).removeprefix("torch.")})
    assert main(["train", path]) == 0
    losses = [line["loss"] for line in metrics(run_folder(path)) if "loss" in line]
    assert losses[-1] < losses[0]
    assert main(["chat", str(run_folder(path)), "--prompt", "what is 1 + 1?", "--max-tokens", "3"]) == 0


def test_a_reader_that_goes_away_does_not_end_the_run(recipe: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    path = recipe(train={"steps": 3})
    with monkeypatch.context() as patch:
        patch.setattr("sys.stderr", Gone())
        assert main(["train", path]) == 0
    assert (run_folder(path) / "adapter/adapter_model.safetensors").is_file()


def test_the_base_is_evaluated_after_the_first_step(recipe: Write) -> None:
    """With the adapter off it has, bit for bit, the held-out losses that the run began with."""
    settings = load_recipe(recipe(adapter={"modules_to_save": ["norm"]}, train={"steps": 3}))
    with runs.open_run(settings, resume=False) as (run, state):
        begun = loop.evaluate(run, state, StopRequest()).best_loss
        run.of_base.clear()  # in which it is remembered
        loop.run_steps(run, state)
    own, *lines = metrics(Path(settings.run.output))
    assert [line["step"] for line in lines] == [1, 0, 2, 3, 3] and "eval_loss" in lines[1].keys() & lines[4].keys()
    assert own["eval_loss"] == lines[1]["eval_loss"] == begun


def test_an_adapter_starts_from_another(recipe: Write, tmp_path: Path) -> None:
    """It begins where the other ended: the first loss continues, and the config of the other holds."""
    assert main(["train", recipe(adapter={"dropout": 0})]) == 0
    first = metrics(tmp_path / "run")
    path = Path(recipe(run={"output": str(tmp_path / "second")}, optimizer={"learning_rate": 1e-6}))
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["adapter"] = {"start": str(tmp_path / "run")}
    path.write_text(json.dumps(settings), encoding="utf-8")
    assert main(["train", str(path)]) == 0
    second = metrics(tmp_path / "second")  # which evaluates what it begins with, before it changes
    assert second[0]["eval_loss"] == pytest.approx(first[-1]["eval_loss"], rel=1e-5)


def test_keep_best_gives_the_best_adapter(recipe: Write) -> None:
    path = recipe(run={"keep_best": True, "keep": 1, "eval_every": 1}, optimizer={"learning_rate": 0.01})
    assert main(["train", path]) == 0
    held_out = {line["step"]: line["eval_loss"] for line in metrics(run_folder(path)) if "eval_loss" in line}
    del held_out[0]
    best = min(held_out, key=lambda step: held_out[step])
    folders = sorted(folder.name for folder in (run_folder(path) / "checkpoints").iterdir())
    assert folders == sorted({f"step-{best:06d}", "step-000009"})
    saved = sha256(run_folder(path) / "checkpoints" / f"step-{best:06d}/adapter_model.safetensors")
    assert sha256(run_folder(path) / "adapter/adapter_model.safetensors") == saved


def test_the_base_is_kept_until_it_is_known_not_to_be_the_best(recipe: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal in the first step comes before the base is measured, which may yet be better than what is trained."""
    path = recipe(run={"keep_best": True, "keep": 1, "eval_every": 3}, optimizer={"learning_rate": 0.01})
    with monkeypatch.context() as patch:
        stop_at(patch, 1, lambda: signal.raise_signal(signal.SIGINT))
        assert main(["train", path]) == 130
    kept = run_folder(path) / "checkpoints"
    assert sorted(folder.name for folder in kept.iterdir()) == ["step-000000", "step-000001"]
    assert main(["train", path, "--resume"]) == 0
    held_out = {line["step"]: line["eval_loss"] for line in metrics(run_folder(path)) if "eval_loss" in line}
    best = min(held_out, key=lambda step: held_out[step])
    assert sorted(folder.name for folder in kept.iterdir()) == sorted({f"step-{best:06d}", "step-000009"})


def test_a_start_that_failed_leaves_a_folder_that_can_be_used(recipe: Write) -> None:
    path = recipe()
    assert main(["train", path, "train.batch_size=64"]) == 2
    assert main(["train", path, "train.steps=3"]) == 0


def test_what_tells_of_a_failed_start_is_removed_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ended midway by a second signal, it leaves a folder that the next start knows by its lock, and no half of one."""
    removed: list[str] = []
    monkeypatch.setattr(files, "_remove", lambda path: removed.append(path.name) if path.exists() else None)
    for number in range(20):  # the order of a set is another one for each folder
        folder = tmp_path / str(number)
        (folder / "tokens").mkdir(parents=True)
        (folder / files.LOCK).touch()
        files.remove_new(folder, (), ())
        assert not (folder / "tokens").exists()
    assert [re.sub(r"\.trash-|-\w{8}$", "", name) for name in removed] == ["tokens", files.LOCK] * 20


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_the_learning_rate_is_a_closed_form(name: Any) -> None:
    schedule = ScheduleSettings(name=name, warmup=0.1, min_ratio=0.2)
    rates = [learning_rate(step, steps=100, peak=1e-3, schedule=schedule) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([1e-4 * step for step in range(1, 11)])
    assert rates[-1] == pytest.approx(1e-3 if name == "constant" else 2e-4)
    assert rates[9:] == sorted(rates[9:], reverse=True)
