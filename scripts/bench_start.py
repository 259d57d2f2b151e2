"""How long a person waits: python scripts/bench_start.py [--runs N] [--base FOLDER | --layers N] [--write]

Whole processes of the command line, from start to exit, in turn: the median and the extremes of each. The target of
`lorasft --help` is 0.5 s. Then a base in 4 bit on the CPU, a random Llama of the shape of TinyLlama 1.1B (22 layers) or
the one in `--base`, from the call that loads it to the end of a first forward pass of 32 tokens, without imports:

bitsandbytes   quantized by bitsandbytes' own general kernel
first start    quantized by lorasft's, which gives the same bits
keeping it     the same, and written for the next start
second start   what was kept, its hashes compared; the target is 2 s

each in processes of their own, in turn, files in the system's cache; medians. `anonymous` is the most memory that is no
clean page of a file, sampled every 5 ms: the 16-bit model is never in it. `--write` puts the table into docs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from bench_merge import make_model
from bench_shared import run_process, settle, status, table, write_section

COMMANDS = (
    ("python", [sys.executable, "-c", "pass"]),
    ("lorasft --help", [sys.executable, "-m", "lorasft", "--help"]),
    ("lorasft recipes", [sys.executable, "-m", "lorasft", "recipes"]),
    ("import torch", [sys.executable, "-c", "import torch"]),
    ("import lorasft.train.run", [sys.executable, "-c", "import lorasft.train.run"]),
)
ARMS = ("bitsandbytes", "first start", "keeping it", "second start")


def measure(command: list[str]) -> float:
    """Seconds of one whole process."""
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def measure_commands(runs: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name, _ in COMMANDS}
    for _ in range(runs):
        for name, command in COMMANDS:
            seconds[name].append(measure(command))
    for name, each in seconds.items():
        print(f"{name:26} median {statistics.median(each):6.3f} s   {min(each):6.3f} to {max(each):6.3f}")


def load(arm: str, base: str) -> dict[str, float]:
    """Load `base` and run it once, in this process."""
    import torch

    import lorasft.model
    from lorasft.model.base import load_base
    from lorasft.recipe import ModelSettings

    importlib.import_module("lorasft.train.run")
    before = settle()
    if arm == "bitsandbytes":
        lorasft.model.QUANTIZER = None
    most, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            most[0] = max(most[0], status("RssAnon"))

    watcher = threading.Thread(target=watch)
    anonymous = status("RssAnon")
    watcher.start()
    started, cpu = time.perf_counter(), time.process_time()
    model = load_base(ModelSettings(base=base), torch.device("cpu"), keep=arm in ("keeping it", "second start"))
    loaded = time.perf_counter() - started
    with torch.no_grad():
        model(torch.arange(32).unsqueeze(0), use_cache=False)
    ended = time.perf_counter() - started
    used = time.process_time() - cpu
    done.set()
    watcher.join()
    return {
        "load": loaded,
        "forward": ended - loaded,
        "both": ended,
        "cpu": used,
        "anonymous": (most[0] - anonymous) / 1e6,
        "peak": (status("VmHWM") - before) / 1e6,
    }


def measure_loading(base: str, rounds: int) -> tuple[str, float]:
    """The table of all arms, and how many cores other processes kept busy at most."""
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    busiest = 0.0
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            os.environ["LORASFT_CACHE"] = cache
            for arm in ARMS:
                result, foreign = run_process(sys.executable, [__file__, "--arm", arm, "--base", base])
                found[arm].append(result)
                busiest = max(busiest, foreign)
    lines = []
    for arm, results in found.items():
        median = {key: statistics.median(result[key] for result in results) for key in results[0]}
        seconds = [f"{median[key]:.2f}" for key in ("load", "forward", "both", "cpu")]
        lines.append([arm, *seconds, f"{median['anonymous']:,.0f}", f"{median['peak']:,.0f}"])
    head = ["base of 1.1B", "load, s", "forward, s", "both, s", "CPU, s", "anonymous, MB", "peak, MB"]
    return table(head, lines), busiest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9, help="of each command; 0 leaves them out")
    parser.add_argument("--rounds", type=int, default=3, help="of loading a base; 0 leaves it out")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--base")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(load(options.arm, options.base)))
        return
    if options.runs:
        measure_commands(options.runs)
    if not options.rounds:
        return
    with tempfile.TemporaryDirectory() as folder:
        if not options.base:
            make_model(Path(folder), options.layers)
        text, busiest = measure_loading(options.base or f"{folder}/base", options.rounds)
    print(text)
    if options.write:
        write_section("Start", text, busiest=busiest)


if __name__ == "__main__":
    main()
