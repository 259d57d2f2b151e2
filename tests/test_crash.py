"""A save that is killed at each of its file operations, once before and never after: nothing torn, nothing lost."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lorasft import files
from lorasft.cli import main
from lorasft.errors import CapacityError, LorasftError
from lorasft.files import sha256, staged_folder, sweep, verify_folder
from lorasft.merge.folder import merge
from lorasft.merge.source import Source
from lorasft.model.adapter import attach_adapter, trainable, write_adapter
from lorasft.model.base import load_base
from lorasft.recipe import AdapterSettings, ModelSettings, OptimizerSettings
from lorasft.train.checkpoint import (
    Layout,
    Learner,
    State,
    list_checkpoints,
    newest_checkpoint,
    restore_checkpoint,
    retain,
    save_checkpoint,
)
from lorasft.train.optimizer import make_optimizer

KEEP = 2


@pytest.fixture(scope="module")
def learner(base: Path) -> Learner:
    """An adapter with an optimizer that has taken a step."""
    model = attach_adapter(
        load_base(ModelSettings(base=str(base)), torch.device("cpu")), AdapterSettings(rank=2), seed=0
    )
    parameters = trainable(model)
    optimizer = make_optimizer(OptimizerSettings(), parameters)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return Learner(model, parameters, optimizer)


def save_and_retain(folder: Path, learner: Learner, base: Path, step: int) -> None:
    layout = Layout(dtype="bfloat16", micro_batch_tokens=64, recomputed_layers=0, segments=True)
    state = State(step=step, data="key", metrics_bytes=0, layout=layout)
    save_checkpoint(folder, state, learner, base=ModelSettings(base=str(base)))
    retain(folder, keep=KEEP, best_step=None)


def killed_at(operation: int, act: Callable[[], None]) -> bool:
    """Run `act` in a child that kills itself before its n-th effect on the disk. Returns whether it came to that."""
    child = os.fork()
    if child == 0:
        count = 0

        def kill(effect: str, path: Path) -> None:
            nonlocal count
            count += 1
            if count == operation:
                os.kill(os.getpid(), signal.SIGKILL)

        files.about_to = kill
        try:
            act()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def test_a_save_killed_at_every_file_operation(learner: Learner, base: Path, tmp_path: Path) -> None:
    """Each checkpoint under its final name verifies, never fewer than `keep` are there, and the next save works."""
    operation = 0
    while True:
        operation += 1
        folder = tmp_path / f"run{operation}"
        for step in (1, 2):
            save_and_retain(folder, learner, base, step)
        died = killed_at(operation, lambda folder=folder: save_and_retain(folder, learner, base, 3))  # type: ignore[misc]
        checkpoints = list_checkpoints(folder)
        assert len(checkpoints) >= KEEP
        for checkpoint in checkpoints:
            verify_folder(checkpoint)
        newest, skipped = newest_checkpoint(folder)
        assert newest == checkpoints[-1] and not skipped
        restore_checkpoint(newest, learner)
        sweep(folder)
        assert all(path.name.startswith("step-") for path in folder.iterdir())
        save_and_retain(folder, learner, base, 4)
        if not died:
            break
    assert operation > 20, "the save has fewer file operations than it is known to have"


@pytest.mark.parametrize("share", [0.0, 0.4, 0.8])
def test_a_run_killed_in_a_save_resumes_with_the_same_bits(
    share: float, recipe: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = recipe(run={"output": str(tmp_path / "whole"), "save_every": 2})
    effects: list[Path] = []
    with monkeypatch.context() as patch:
        patch.setattr(files, "about_to", lambda effect, path: effects.append(path))
        assert main(["train", whole]) == 0
    saves = [index for index, path in enumerate(effects, start=1) if "checkpoints" in path.parts]
    later = saves[len(saves) // 4 :]  # behind the first of the five saves
    parts = recipe(run={"output": str(tmp_path / "parts"), "save_every": 2})
    assert killed_at(later[int(share * len(later))], lambda: main(["train", parts]) and None)
    assert main(["train", parts, "--resume"]) == 0
    name = "adapter/adapter_model.safetensors"
    assert sha256(tmp_path / "parts" / name) == sha256(tmp_path / "whole" / name)
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts/metrics.jsonl").read_text("utf-8").splitlines()
             if "eval_loss" not in line]  # fmt: skip
    assert steps == list(range(1, 10))


def merge_into(base: Path, adapter: Path, out: Path) -> None:
    merge(Source(adapter, base, str(base)), out, check=False)


@pytest.fixture(scope="module")
def adapter(learner: Learner, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    for name, parameter in learner.parameters.items():
        parameter.data += 0.1 * ("lora_B" in name)
    write_adapter(learner.model, folder, base=ModelSettings(base=str(base)))
    return folder


def test_a_merge_killed_at_every_file_operation(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Under the final name is a whole merge or nothing; the next one succeeds and clears what was left."""
    operation, died = 0, True
    while died:
        operation += 1
        out = tmp_path / f"out{operation}"
        died = killed_at(operation, lambda out=out: merge_into(base, adapter, out))  # type: ignore[misc]
        if not out.exists():
            merge_into(base, adapter, out)
        verify_folder(out)
        assert not list(tmp_path.glob(".stage-*"))
    assert operation > 15, "the merge has fewer file operations than it is known to have"


def test_a_merge_killed_at_any_moment(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Not only between its file operations: 50 kills, spread over the time that a merge takes."""
    started = time.monotonic()
    merge_into(base, adapter, tmp_path / "whole")
    seconds = time.monotonic() - started
    wanted = sha256(tmp_path / "whole/model.safetensors")
    for trial in range(50):
        out = tmp_path / f"out{trial}"
        child = os.fork()
        if child == 0:
            merge_into(base, adapter, out)
            os._exit(0)
        time.sleep(seconds * (trial + 0.5) / 50)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if not out.exists():
            merge_into(base, adapter, out)
        verify_folder(out)
        assert sha256(out / "model.safetensors") == wanted and not list(tmp_path.glob(".stage-*"))


def test_a_merge_on_a_full_disk_at_every_file_operation(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operation, full = 0, True
    while full:
        operation += 1
        count, full = 0, False

        def fill(effect: str, path: Path, at: int = operation) -> None:
            nonlocal count, full
            count += 1
            if count == at:
                full = True
                raise OSError(28, "No space left on device")

        out = tmp_path / f"out{operation}"
        with monkeypatch.context() as patch, contextlib.suppress(CapacityError, OSError):
            patch.setattr(files, "about_to", fill)
            merge_into(base, adapter, out)
        assert not list(tmp_path.glob(".stage-*"))
        if out.exists():
            verify_folder(out)
        else:
            merge_into(base, adapter, out)
    assert operation > 15


@pytest.mark.parametrize("harm", ["cut", "flip", "delete"])
def test_a_damaged_checkpoint_is_skipped_and_named(harm: str, learner: Learner, base: Path, tmp_path: Path) -> None:
    for step in (1, 2):
        save_and_retain(tmp_path, learner, base, step)
    path = tmp_path / "step-000002/optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if harm == "delete":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if harm == "cut" else content)
    newest, skipped = newest_checkpoint(tmp_path)
    assert newest.name == "step-000001" and "optimizer.safetensors" in skipped[0]


def test_a_full_disk_leaves_nothing_under_the_final_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(effect: str, path: Path) -> None:
        if effect == "write":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "about_to", fill)
    with pytest.raises(CapacityError, match="No space left"), staged_folder(tmp_path / "out") as stage:
        files.write_file(stage / "a", b"x")
    assert not list(tmp_path.iterdir())


def test_one_writer_per_folder(tmp_path: Path) -> None:
    """A second process is refused; a lock whose holder was killed does not block."""
    with files.locked(tmp_path):
        assert killed_at(10_000, lambda: _expect_refusal(tmp_path)) is False
    assert killed_at(1, lambda: _lock_and_touch(tmp_path))
    with files.locked(tmp_path):
        pass


def _expect_refusal(folder: Path) -> None:
    try:
        with files.locked(folder):
            pass
    except LorasftError as fault:
        assert str(os.getppid()) in str(fault)
        return
    raise AssertionError("two writers")


def _lock_and_touch(folder: Path) -> None:
    with files.locked(folder):
        files.make_folder(folder / "x")
