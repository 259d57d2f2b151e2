"""The script that is to run on a GPU runs: the same code, on small shapes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_the_check_for_gpus_runs_on_small_shapes() -> None:
    script = Path(__file__).parents[1] / "scripts" / "gpu_check.py"
    few = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script), "--tiny"], capture_output=True, text=True, env=few)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "tiny, 256: lorasft" in done.stdout and "tiny, 256: peft" in done.stdout
    assert "- resumed: losses 0.0e+00 apart" in done.stdout
