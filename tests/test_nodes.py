"""Two launchers on this machine as two machines: a kill on one ends all within seconds, and the run continues."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_ranks import Launch, wait_for_lines
from test_train import metrics

from lorasft.cli import main

Write = Callable[..., str]
VICTIMS = ("worker", "agent")  # of the first machine, which has the rendezvous, or of the other


class Nodes:
    """torchrun twice, with one worker each; words of each in a file."""

    def __init__(self, folder: Path, words: list[str], *, places: tuple[str, str] = (".", ".")) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.words, self.agents = [folder / f"node{number}.txt" for number in (0, 1)], []
        meeting = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "test"]
        meeting += ["--rdzv-endpoint", f"127.0.0.1:{port}"]
        for number, place in enumerate(places):
            host = ["--rdzv-conf", f"is_host={1 - number}"]
            command = [sys.executable, "-m", "torch.distributed.run", *meeting, *host, "-m", "lorasft", "train", *words]
            with open(self.words[number], "w", encoding="utf-8") as log:
                how = {"stdout": log, "stderr": log, "cwd": place, "start_new_session": True}
                self.agents.append(subprocess.Popen(command, **how))  # type: ignore[call-overload]

    def workers(self) -> list[int]:
        """The process that each launcher started."""
        lists = (Path(f"/proc/{one.pid}/task/{one.pid}/children").read_text("utf-8").split() for one in self.agents)
        return [int(found[0]) for found in lists]

    def said(self) -> str:
        return "".join(path.read_text(encoding="utf-8", errors="replace") for path in self.words)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that ended and that nobody waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill_and_wait(nodes: Nodes, kind: str, number: int) -> float:
    """Kill a worker or a launcher. Returns the seconds until all workers have ended."""
    workers = nodes.workers()
    os.kill(workers[number] if kind == "worker" else nodes.agents[number].pid, signal.SIGKILL)
    killed = time.monotonic()
    while any(map(is_alive, workers)) and time.monotonic() - killed < 60:
        time.sleep(0.05)
    took = time.monotonic() - killed
    for agent in nodes.agents:
        agent.wait(60)
    return took


MOMENTS = [(kind, number, 0) for kind in VICTIMS for number in (0, 1)]
MOMENTS += [(kind, number, moment) for kind, number, _ in MOMENTS for moment in range(1, 10)]


@pytest.mark.parametrize(
    ("kind", "number", "moment"),
    [pytest.param(*one, marks=[] if one == ("agent", 1, 0) else pytest.mark.slow) for one in MOMENTS],
)
def test_a_killed_worker_or_launcher_ends_all_and_the_run_continues(
    kind: str, number: int, moment: int, recipe: Write, tmp_path: Path
) -> None:
    """Continued by one process, by two, or by two with a sharded base, it has the losses of one that was left alone."""
    settings = {"adapter": {"dropout": 0}, "train": {"epochs": 30}, "machine": {"share_prefixes": False}}
    path = recipe(**settings, run={"save_every": 2, "eval_every": None})
    nodes = Nodes(tmp_path, [path])
    wait_for_lines(tmp_path / "run/metrics.jsonl", random.randint(2, 30))
    time.sleep(0.05 * random.random())
    assert kill_and_wait(nodes, kind, number) < 30, nodes.said()
    said = nodes.said()
    own = r"error: (the launcher|rank \d \(process \d+\)|.* \(node \d\)|the rendezvous on \S+)( of 2)? was lost"
    assert re.search(own, said) or "stopped after step" in said, said
    assert len(metrics(tmp_path / "run")) < 90, "it had ended before it was killed"
    resume = ["train", path, "--resume"]
    if moment % 3 == 0:
        assert main(resume) == 0
    else:
        shard = "machine.shard=all" if moment % 3 == 2 else "machine.shard=1"
        launch = Launch(tmp_path, lambda _: main([*resume, shard]))
        assert launch.codes(120) == [0, 0], launch.said()
    whole = tmp_path / "whole"
    assert main(["train", path, f"run.output={whole}"]) == 0
    for line, want in zip(metrics(tmp_path / "run"), metrics(whole), strict=True):
        assert line["step"] == want["step"]
        assert line.get("loss", 0) == pytest.approx(want.get("loss", 0), rel=1e-3)


def test_machines_that_see_other_folders_are_refused_and_named(recipe: Write, tmp_path: Path) -> None:
    """Working folders of their own stand for file systems of their own."""
    places = tmp_path / "first", tmp_path / "second"
    for place in places:
        place.mkdir()
    nodes = Nodes(tmp_path, [recipe(), "run.output=run"], places=(str(places[0]), str(places[1])))
    for agent in nodes.agents:
        agent.wait(90)
    said = nodes.said()
    assert "(node 1) does not see the run folder of the first process" in said and said.count("error:") == 1, said
    assert len(re.findall(r"exitcode  : 5", said)) == 2
    assert not (places[0] / "run").exists() and not (places[1] / "run").exists()
