"""Builds the emulated CUDA device, once for each torch and each state of its source, and runs Python on it."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@cache
def build() -> Path:
    """The compiled emulator; of several processes that need it one compiles. Skips where no compiler is there."""
    source = HERE / "emu.cpp"
    key = hashlib.sha256(source.read_bytes() + importlib.metadata.version("torch").encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"lorasft-emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    assert folder.stat().st_uid == os.getuid(), f"{folder} is someone else's"
    library = folder / f"emu-{key}.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
            if compiler is None:
                pytest.skip("no C++ compiler for the emulated CUDA device")
            torch = Path(sysconfig.get_path("purelib")) / "torch"
            includes = [f"-I{torch}/include", f"-I{torch}/include/torch/csrc/api/include"]
            links = [f"-L{torch}/lib", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch}/lib"]
            partial = library.with_suffix(".partial")
            command = [compiler, "-O1", "-std=c++20", "-shared", "-fPIC", *includes, str(source), "-o", str(partial)]
            done = subprocess.run([*command, *links], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"the emulated CUDA device does not compile here: {done.stderr[-300:]}")
            partial.replace(library)
    return library


def run_emulated(*words: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python with `words` as its arguments where there is an emulated CUDA device."""
    library = str(build())
    fixed = {"LD_PRELOAD": library, "EMU_LIB": library, "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    fixed |= {"PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")])}
    command = [sys.executable, *words]
    for _ in range(3):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | fixed | environment)
        # Rarely a thread of autograd still wants Python's lock when all was done and Python ends, which aborts it.
        if not (done.returncode == -signal.SIGABRT and done.stderr.endswith("without an active exception\n")):
            break
    assert not check or done.returncode == 0, done.stderr[-4000:]
    return done


def journey(name: str, *words: Any, **environment: str) -> Any:
    """What the function `name` of journeys.py gives on the emulated device."""
    done = run_emulated("-W", "error::UserWarning", str(HERE / "journeys.py"), name, *map(str, words), **environment)
    return json.loads(done.stdout.splitlines()[-1])
