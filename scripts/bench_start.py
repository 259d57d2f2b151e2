"""How long a person waits for the command line: python scripts/bench_start.py [--runs N]

Whole processes, from start to exit, in turn; prints the median and the extremes of each. The target of
`lorasft --help` is 0.5 s.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

COMMANDS = (
    ("python", [sys.executable, "-c", "pass"]),
    ("lorasft --help", [sys.executable, "-m", "lorasft", "--help"]),
    ("lorasft recipes", [sys.executable, "-m", "lorasft", "recipes"]),
    ("import torch", [sys.executable, "-c", "import torch"]),
    ("import lorasft.train.run", [sys.executable, "-c", "import lorasft.train.run"]),
)


def measure(command: list[str]) -> float:
    """Seconds of one whole process."""
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=9)
    runs = parser.parse_args().runs
    seconds: dict[str, list[float]] = {name: [] for name, _ in COMMANDS}
    for _ in range(runs):
        for name, command in COMMANDS:
            seconds[name].append(measure(command))
    for name, each in seconds.items():
        print(f"{name:26} median {statistics.median(each):6.3f} s   {min(each):6.3f} to {max(each):6.3f}")


if __name__ == "__main__":
    main()
