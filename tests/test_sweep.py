"""A sweep: each run has the bits of the same run alone, whatever was run before it on the same base."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command, save_base
from test_start import EARLY, run_python
from test_train import metrics, stop_at

from lorasft.commands.sweep import _VALUE
from lorasft.data import prepare
from lorasft.model.base import copy_base, load_base
from lorasft.recipe import ModelSettings
from lorasft.training import loop
from lorasft.training import run as runs

Write = Callable[..., str]
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
    swept = [RATES, "adapter.rank=4,2", "adapter.targets=[q_proj,v_proj],all-linear"]
    loaded, prepared = (counted(monkeypatch, *one) for one in ((runs, "load_base"), (prepare, "_write_store")))
    done = cli("sweep", path, *swept, "--out", out)
    assert done.code == 0, done.err
    assert len(loaded) == len(prepared) == 1
    folders = sorted(folder for folder in out.iterdir() if folder.name != "tokens" and folder.is_dir())
    assert len(folders) == 8 and len({adapter(folder) for folder in folders}) == 8
    alone = tmp_path / "alone"
    for number, folder in enumerate(folders):
        words = re.fullmatch("learning_rate=(.+),rank=(.),targets=(.+)", folder.name)
        assert words
        targets = "all-linear" if words[3] == "all-linear" else "[q_proj,v_proj]"
        values = [f"optimizer.learning_rate={words[1]}", f"adapter.rank={words[2]}", f"adapter.targets={targets}"]
        assert cli("train", path, *values, f"run.output={alone}/{number}").code == 0
        assert metrics(folder) == metrics(alone / str(number)) and adapter(folder) == adapter(alone / str(number))
    *rows, best, page = done.out.splitlines()[1:]
    assert [row.split()[:3] for row in sorted(rows)] == [[folder.name, "finished", "3"] for folder in folders]
    losses = {folder: metrics(folder)[-1]["eval_loss"] for folder in folders}
    assert best == f"lowest held-out loss: {min(folders, key=lambda folder: losses[folder])}"
    assert page == str(out / "report.html") and all(folder.name in Path(page).read_text() for folder in folders)
