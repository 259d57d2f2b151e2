"""`lorasft doctor`: what it finds on a sound machine, and that each error is a line with what fixes it."""

from __future__ import annotations

import http.server
import importlib.metadata
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import pytest
import torch

from lorasft.cli import main
from lorasft.commands import doctor
from lorasft.errors import CapacityError, DeviceError
from lorasft.hub import hub_error
from lorasft.model.base import load_base, nf4_error
from lorasft.model.selfcheck import verify
from lorasft.recipe.load import load_recipe

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]


def test_a_sound_machine_is_said_to_be_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the hub is asked only with --hub")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(doctor, "LEAST_DISK", 0)
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    names = [check["name"] for check in found["checks"]]
    assert found["ok"] and {"lorasft", *doctor.LIBRARIES, "device", "memory", "NF4", "attention"} <= set(names)
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(names) and all(line.startswith("ok    ") for line in lines)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What the installed lorasft asks for, in the one item of the list; without an item it is not installed."""
    asked: list[Any] = [
        ["torch>=2.10", "transformers>=99,<100", "pyyaml>=99", "nowhere>=1", 'gguf>=99; extra == "gguf"']
    ]
    real = importlib.metadata.distributions

    def distributions(name: str) -> Any:
        return [SimpleNamespace(requires=one) for one in asked] if name == "lorasft" else real(name=name)

    monkeypatch.setattr("importlib.metadata.distributions", distributions)
    yield asked


def test_versions_are_those_that_are_asked_for(asked: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    """A line for those that are out of range, with what fixes them; extras are not asked for."""
    assert main(["doctor"]) == 5
    text = capsys.readouterr().out
    assert "ok    torch: 2." in text and "gguf" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("FAIL  versions: ")]
    assert "nowhere 0" in line and "pyyaml 6" in line and "asked for: " in line and "torch" not in line
    assert "transformers<100,>=99" in line and "fix it: pip install " in text and "'nowhere>=1'" in text


def test_doctor_works_from_the_sources_alone(asked: list[Any]) -> None:
    asked.clear()
    assert doctor._check_library("torch") == torch.__version__ and "from its sources" in doctor._check_versions()


def test_a_library_that_breaks_is_a_line(tmp_path: Path) -> None:
    """As bitsandbytes does without a binary for the CUDA at hand, while it is imported."""
    (tmp_path / "bitsandbytes").mkdir()
    (tmp_path / "bitsandbytes/__init__.py").write_text("raise RuntimeError('CUDA Setup failed\\nmore')")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-m", "lorasft", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 5 and "Traceback" not in done.stderr, done.stderr
    lines = done.stdout.splitlines()
    failed = [line for line in lines if line.startswith("FAIL")]
    assert any("bitsandbytes" in line and "CUDA Setup failed" in line for line in failed), lines
    assert any("fix it: pip install -U bitsandbytes" in line for line in lines)
    assert any(line.startswith("ok    disk") for line in lines) and "checks failed" in done.stderr


def test_a_driver_that_torch_cannot_use_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.57.02  Tue\n", encoding="utf-8")
    monkeypatch.setattr(doctor, "DRIVER", driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for built in (None, "13.0"):  # a torch for CPUs only, and one for a newer driver
        monkeypatch.setattr(torch.version, "cuda", built)
        with pytest.raises(DeviceError, match=f"470.57.02.*CUDA {built} cannot use") as caught:
            doctor._check_device()
        assert caught.value.hint


def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "not/there/yet"))
    assert "not/there/yet" in doctor._check_disk()
    monkeypatch.setattr(doctor, "LEAST_DISK", 1 << 60)
    with pytest.raises(CapacityError, match="iB are free") as caught:
        doctor._check_disk()
    assert caught.value.where == str(Path.cwd())


def test_a_wrong_kernel_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    error, most = nf4_error(CPU)
    tiny = load_recipe("tiny").model.model_copy(update={"quantization": "none"})
    network = verify(load_base(tiny, CPU))
    assert error <= most and not network.notices and network.share and network.head
    right = bnb.functional.dequantize_4bit
    monkeypatch.setattr(bnb.functional, "dequantize_4bit", lambda *given, **named: right(*given, **named) * 1.03)
    assert nf4_error(CPU)[0] > most


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_hub_is_there_when_anything_answers(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server)  # it answers 501
    monkeypatch.setattr(http.server.BaseHTTPRequestHandler, "log_message", lambda *_: None)
    assert hub_error() is None
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert "Connection refused" in str(hub_error())
    with pytest.raises(DeviceError, match="does not answer"):
        doctor._check_hub()
