"""The script that is to run on a GPU runs: the same code, on small shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import gpu_check
import gpu_speed
import pytest
import torch
from tiny_models import HELD_TO_AVX2

from lorasft.model.memory import dry_run

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(HELD_TO_AVX2, reason="torch has no bf16 attention here")
def test_the_check_for_gpus_runs_on_small_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Findings of several parts, an error among them, each on the disk; and the page that is made of them."""
    command = [sys.executable, "scripts/gpu_check.py", "--tiny", "--out", str(tmp_path), "--only"]
    parts = ["versions", "gradients", "waits", "peer-lorasft", "peer-packed"]
    old = [{"part": "nf4", "case": "kept"}, {"part": "waits", "case": "asked again"}]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in old))
    quiet = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *parts], cwd=ROOT, capture_output=True, text=True, env=os.environ | quiet)
    assert done.returncode == 0, done.stderr[-2000:]
    kept, *rows = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert kept == old[0] and old[1] not in rows
    found = {(row["part"], row["case"]): row for row in rows}
    assert list(dict.fromkeys(row["part"] for row in rows)) == parts
    ours, theirs = (found["gradients", name] for name in ("lorasft", "transformers and PEFT"))
    assert ours["median"] < 1.3 * theirs["median"] < 0.1  # rounding in bf16
    lorasft, packed = (found[part, "the same rows"]["loss"] for part in ("peer-lorasft", "peer-packed"))
    assert lorasft == pytest.approx(packed, abs=2e-2)
    assert "CUDA" in found["waits", "a micro-batch and an update"]["error"]
    assert "Traceback" in (tmp_path / "waits.log").read_text()
    page = tmp_path / "gpu.md"
    page.write_text(f"# On a GPU\n\nWritten by hand.\n{gpu_check.FOUND}\nold\n")
    monkeypatch.setattr(gpu_check, "PAGE", page)
    gpu_check.write_page(tmp_path)
    assert "by hand" in page.read_text() and "old" not in page.read_text() and "### gradients" in page.read_text()


def test_lean_layers_can_be_turned_off_and_on() -> None:
    rig = gpu_speed.make_rig("tiny", torch.device("cpu"))
    batch, peaks = gpu_speed.make_batches(256, 512, None, count=1)[0], []
    for lean in (True, False, True):
        rig.set_lean(lean)
        peaks.append(dry_run(rig.planned, batch, recomputed=0).peak)
    assert peaks[0] == peaks[2] < peaks[1]


def test_a_part_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "LIMIT", 0.2)
    gpu_check.run_apart("caps-70b", Namespace(out=tmp_path, tiny=True, data=None))
    (row,) = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert row["part"] == "caps-70b" and row["error"].startswith("ran past 0.2 s")
