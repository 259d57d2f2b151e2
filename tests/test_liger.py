"""Liger's kernels: refused where they cannot run, before anything is loaded. scripts/gpu_check.py runs them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lorasft.cli import main
from lorasft.errors import DeviceError
from lorasft.model.liger import require_liger


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it is no error")
def test_without_a_gpu_it_is_an_error(
    recipe: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", recipe(machine={"kernels": "liger"})]) == 5
    assert "CUDA" in (said := capsys.readouterr().err) and "hint: machine.kernels=torch" in said
    assert not (tmp_path / "run" / "recipe.yaml").exists()


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is not None, reason="it is installed")
def test_what_is_missing_is_named() -> None:
    with pytest.raises(DeviceError, match="not installed") as caught:
        require_liger(torch.device("cuda"))
    assert "lorasft[gpu]" in str(caught.value)
