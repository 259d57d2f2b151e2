"""The script that is to run on a GPU runs: the same code, on small shapes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import HELD_TO_AVX2


@pytest.mark.skipif(HELD_TO_AVX2, reason="torch has no bf16 attention here")
def test_the_check_for_gpus_runs_on_small_shapes() -> None:
    command, root = [sys.executable, "scripts/gpu_check.py", "--tiny"], Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "tiny, 256: lorasft" in done.stdout and "tiny, 256: peft" in done.stdout
    assert "- resumed: losses 0.0e+00 apart" in done.stdout
