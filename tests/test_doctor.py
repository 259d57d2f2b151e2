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

import bitsandbytes as bnb
import pytest
import torch

from lorasft.cli import main
from lorasft.commands import doctor
from lorasft.errors import CapacityError, DeviceError
from lorasft.hub import hub_error
from lorasft.model.health import nf4_error, try_attention

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


def test_versions_are_those_that_are_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line for each library that is out of range, with what fixes it; extras are not asked for."""
    needed = ["torch>=2.10", "transformers>=99,<100", "pyyaml>=99", "nowhere>=1", 'gguf>=99; extra == "gguf"']
    monkeypatch.setattr("importlib.metadata.requires", lambda name: needed)
    assert main(["doctor"]) == 5
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("ok    torch: 2.") for line in lines)
    place = next(number for number, line in enumerate(lines) if line.startswith("FAIL  transformers: 5."))
    assert lines[place + 1].split("fix it: ")[1] == "pip install 'transformers<100,>=99'"
    place = next(
        number for number, line in enumerate(lines) if line.startswith("FAIL  others: nowhere missing, pyyaml 6")
    )
    assert lines[place + 1].split("fix it: ")[1] == "pip install 'pyyaml>=99' 'nowhere>=1'"
    assert "gguf" not in "".join(lines)


def test_doctor_works_from_the_sources_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.requires", missing)
    assert doctor._check_library("torch") == torch.__version__ and doctor._check_others() == "not compared"


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
    with pytest.raises(CapacityError, match="GB are free") as caught:
        doctor._check_disk()
    assert caught.value.where == str(Path.cwd())


def test_a_wrong_kernel_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    error, most = nf4_error(CPU)
    network = try_attention(CPU)
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
