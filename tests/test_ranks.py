"""Several processes: the gradients of one, one voice, and nobody who waits for one that is gone.

The processes are forks of this one, which has imported everything; one test goes through torchrun.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.tracking import GeneralTracker
from faults.trial import full_in, with_fault
from safetensors.torch import load_file, save_file
from test_oracles import Rows, assert_same_step, gradients, oracle, ours, plain_step, weigh
from test_prefixes import Relatives
from test_train import metrics

from lorasft.cli import main
from lorasft.data.packing import Plan, Share, assign, make_micro_batches
from lorasft.errors import ModelError
from lorasft.files import read_objects, verify_folder
from lorasft.model.trained import Trained
from lorasft.recipe.load import load_recipe
from lorasft.signals import StopRequest
from lorasft.training import loop, watch
from lorasft.training import metrics as metrics_module
from lorasft.training import run as runs
from lorasft.training.distributed import ALONE, Ranks, join
from lorasft.training.state import Layout, Run, State

Write = Callable[..., str]


class Launch:
    """Forks of this process, as a launcher would start them, each with its words in a file."""

    def __init__(self, folder: Path, act: Callable[[int], object], *, count: int = 2) -> None:
        self.words = [folder / f"words{rank}.txt" for rank in range(count)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.pids = [os.fork() or self._be(rank, port, act) for rank in range(count)]

    def _be(self, rank: int, port: int, act: Callable[[int], object]) -> int:
        code: Any = 1
        try:
            with open(self.words[rank], "w", encoding="utf-8", buffering=1) as words:
                sys.stdout = sys.stderr = words
                PartialState._reset_state()  # what this process was before the fork
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                os.environ |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(len(self.words)))
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "2"}
                try:
                    code = act(rank) or 0
                except SystemExit as end:
                    code = end.code
                except BaseException:
                    traceback.print_exc()
        finally:
            os._exit(code)

    def codes(self, seconds: float = 60) -> list[int]:
        """Exit codes, negative for a signal. A process that hangs is killed, which fails the test."""
        end = time.monotonic() + seconds
        found: dict[int, int] = {}
        while len(found) < len(self.words):
            for pid in set(self.pids) - found.keys():
                if time.monotonic() > end:
                    os.kill(pid, signal.SIGKILL)
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    found[pid] = os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        return [found[pid] for pid in self.pids]

    def said(self) -> str:
        return "".join(path.read_text(encoding="utf-8") for path in self.words)


def some(count: int, *, share: bool = False, weighted: bool = False) -> Rows:
    rows = Relatives() if share else Rows()
    rows.rows = rows.rows[:count]
    return weigh(rows) if weighted else rows


def step_run(model: Any, network: Any, rows: Rows, ranks: Ranks, *, folder: str = "", **plan: Any) -> Run:
    """As much of a run in `folder` as a step's losses and gradients, and an evaluation, need."""
    whole = Plan(len(rows), len(rows), 1, seed=0, processes=ranks.count, **plan)
    stub: Any = SimpleNamespace(
        prepared=SimpleNamespace(train=None, held_out=rows, sources=("rows",)), evaluation=lambda **_: None
    )
    stub.progress = SimpleNamespace(interlude=lambda _: contextlib.nullcontext())
    stub.tokenizer = SimpleNamespace(decode=lambda *_, **__: "")
    stub.run = SimpleNamespace(output=folder)
    return Run(stub, stub, whole, network, model, Trained(model, torch.float32), stub, stub, ranks)


SIZES = ((6, 1000, False), (6, 20, False), (1, 1000, False), (6, 40, True))
CASES = [(loss, *sizes, False) for loss in ("token", "example") for sizes in SIZES]
CASES += [(loss, 6, 40, True, True) for loss in ("token", "example")]


def test_two_processes_have_the_gradients_and_losses_of_one(tmp_path: Path) -> None:
    """Against plain transformers and PEFT in one process; also where one has nothing to do, or prefixes are shared."""

    def act(rank: int) -> None:
        with join() as ranks:
            model, network = ours("llama")
            for number, (loss, count, capacity, shared, weighted) in enumerate(CASES):
                rows = some(count, share=shared, weighted=weighted)
                plan = {"loss": loss, "micro_batch_tokens": capacity, "share_prefixes": shared}
                run = step_run(model, network, rows, ranks, **plan)
                step = run.plan.step(1, rows)
                assert len(assign(step.micro_batches, Share(rank, 2))) > 0 or (count == 1 and rank == 1)
                work = lambda run=run, step=step: loop.add_gradients(run, step)  # noqa: E731
                value = ranks.sum_step(work, run.trained.gradient, stop=StopRequest(alone=False))
                save_file(gradients(model) | {"loss": value}, tmp_path / f"{number}-{rank}.safetensors")
            (tmp_path / f"held_out-{rank}.json").write_text(
                json.dumps(held_out(model, network, ranks, tmp_path / "two")), encoding="utf-8"
            )

    launch = Launch(tmp_path, act)
    assert launch.codes() == [0, 0], launch.said()
    for number, (loss, count, _, shared, weighted) in enumerate(CASES):
        want = plain_step(oracle("llama"), some(count, share=shared, weighted=weighted), loss)
        first, second = (load_file(tmp_path / f"{number}-{rank}.safetensors") for rank in (0, 1))
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert_same_step((float(first.pop("loss")), first), want)
    model, network = ours("llama")
    scores = held_out(model, network, ALONE, tmp_path / "one")
    for rank in (0, 1):
        assert json.loads((tmp_path / f"held_out-{rank}.json").read_text(encoding="utf-8")) == pytest.approx(scores)
    for size in range(1, 7):
        one, two = ([*read_objects(tmp_path / name / f"{size}/rows.jsonl")] for name in ("one", "two"))
        assert len(one) == size and [line.pop("losses")["last"][1] for line in two] == pytest.approx(
            [line.pop("losses")["last"][1] for line in one], rel=1e-6
        )
        assert one == two


def held_out(model: Any, network: Any, ranks: Ranks, folder: Path) -> list[Any]:
    """Losses of held-out sets of every size; those of their rows are in `folder`."""
    state, plan = State(1, "", 0, Layout("float32", 1, 0, segments=True)), {"loss": "token", "micro_batch_tokens": 20}
    losses = []
    for size in range(1, 7):
        rows: Any = some(size)
        rows.place, rows.sources = "rows:{}".format, partial(np.zeros, size, dtype=np.int64)
        (folder / str(size)).mkdir(parents=True, exist_ok=True)
        run = step_run(model, network, rows, ranks, folder=str(folder / str(size)), **plan)
        run.of_base = {}
        losses.append(loop.evaluate(run, state, StopRequest()).best_loss)
    return losses


@pytest.mark.parametrize("count", [2, 3, 8])
def test_shares_are_a_balanced_partition(count: int) -> None:
    many = some(6)
    many.rows *= 20
    batches = tuple(make_micro_batches(many.sequences, range(len(many)), capacity=64, processes=count))
    shares = [assign(batches, Share(index, count)) for index in range(count)]
    assert sorted(id(batch) for mine in shares for batch in mine) == sorted(map(id, batches))
    tokens = [sum(len(batch.ids) for batch in mine) for mine in shares]
    assert max(tokens) < 1.15 * sum(tokens) / count
    assert max(len(batch.ids) for batch in batches) <= 64
    few = tuple(
        make_micro_batches(many.sequences, range(6), capacity=4096, processes=count)
    )  # one micro-batch would hold them all
    assert len(few) >= min(count, 4)


def test_a_run_through_torchrun_is_the_run_of_one_process(recipe: Write, tmp_path: Path) -> None:
    settings = recipe(adapter={"dropout": 0})
    assert main(["train", settings, f"run.output={tmp_path / 'one'}"]) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    address = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    command = ["-m", "lorasft", "train", settings, f"run.output={tmp_path / 'two'}"]
    done = subprocess.run([*launcher, *address, *command], capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(tmp_path / "two")]
    assert len(re.findall(r"^step \d+/9  loss", done.stderr, re.MULTILINE)) == 9
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(one) == len(two)
    for alone, together in zip(one, two, strict=True):
        assert together.pop("tokens", 0) >= alone.pop("tokens", 0)  # what both need of a shared prefix both compute
        assert together == pytest.approx(alone, rel=1e-5)
    assert (tmp_path / "two/adapter/adapter_model.safetensors").is_file()


def test_all_processes_end_with_the_same_parameters(recipe: Write, tmp_path: Path) -> None:
    """Bit for bit, with dropout that differs between them."""
    settings = load_recipe(recipe(run={"trackers": ["tensorboard"]}))

    def act(rank: int) -> None:
        metrics_module.start_trackers = lambda *_: [Accelerator(), GeneralTracker(_blank=True)][1:]
        with join() as ranks, runs.open_run(settings, resume=False, ranks=ranks) as (run, state):
            loop.run_steps(run, state)
            run.metrics.close()  # of trackers, in the first alone: must not part the processes
            parameters = {name: tensor.detach() for name, tensor in run.trained.parameters.items()}
            save_file(parameters, tmp_path / f"{rank}.safetensors")

    launch = Launch(tmp_path, act)
    assert launch.codes() == [0, 0], launch.said()
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_killed_process_is_named_and_other_numbers_of_them_go_on_with_the_same_rows(
    recipe: Write, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"adapter": {"dropout": 0}, "train": {"epochs": 8}, "machine": {"share_prefixes": False}}
    path = recipe(**settings, run={"output": str(tmp_path / "whole")})
    assert main(["train", path]) == 0
    path = recipe(**settings, run={"output": str(tmp_path / "parts")})
    for victim, lines in ((1, range(2, 12)), (0, range(15, 25))):
        resume = ["--resume"] if victim == 0 else []
        launch = Launch(tmp_path, lambda rank, resume=resume: main(["train", path, *resume]))
        kill_at_random(launch, victim, tmp_path / "parts/metrics.jsonl", random.choice(lines))
    assert main(["train", path, "--resume"]) == 0
    for line, want in zip(metrics(tmp_path / "parts"), metrics(tmp_path / "whole"), strict=True):
        assert line == pytest.approx(want, rel=1e-3)  # a step on other rows is off by far more
        assert line["step"] == want["step"] and line.get("tokens") == want.get("tokens")


def wait_until(true: Callable[[], bool]) -> None:
    """Wait until something is true, for two minutes at most."""
    end = time.monotonic() + 120
    while not true():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.002)


def wait_for_lines(log: Path, least: int) -> None:
    wait_until(lambda: log.exists() and log.read_bytes().count(b"\n") >= least)


def kill_at_random(launch: Launch, victim: int, log: Path, least: int) -> None:
    """Kill one process some time after the log has `least` lines; the other must say so and end."""
    wait_for_lines(log, least)
    time.sleep(0.02 * random.random())
    os.kill(launch.pids[victim], signal.SIGKILL)
    killed = time.monotonic()
    codes = launch.codes(30)
    assert time.monotonic() - killed < 30
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 5, launch.said()
    words = launch.words[1 - victim].read_text(encoding="utf-8")
    assert f"error: rank {victim} (process {launch.pids[victim]}) of 2 was lost" in words and words.count("error:") == 1


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_works_and_one_that_waits_end_when_the_other_is_lost(
    victim: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first works long and asks nobody; the second waits for it, as it does while data are prepared."""
    monkeypatch.setattr(watch, "GRACE", 0.1)

    def act(rank: int) -> None:
        with join() as ranks:
            (tmp_path / f"joined{rank}").touch()
            ranks.on_main(lambda: time.sleep(60))

    launch = Launch(tmp_path, act)
    wait_until(lambda: all((tmp_path / f"joined{rank}").exists() for rank in (0, 1)))
    os.kill(launch.pids[victim], signal.SIGKILL)
    codes = launch.codes(30)
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 5, launch.said()
    said = launch.said()
    assert said.count("error:") == said.count(f"error: rank {victim}") == 1 and "Traceback" not in said


def out_of_memory(*args: Any) -> torch.Tensor:
    raise torch.OutOfMemoryError


def no_model(*args: Any, **options: Any) -> Any:
    raise ModelError("cannot load")


@pytest.mark.parametrize(
    ("arguments", "broken", "code", "words"),
    [
        (["train.batch=3"], None, 2, "here it is train.batch_size"),
        (["data.train=missing.jsonl"], None, 3, "missing.jsonl"),
        (["run.save_every=2"], "disk", 6, "from step 2: torchrun"),
        ([], "model", 4, "cannot load"),
        ([], "nan", 7, "is not finite"),
        ([], "memory", 6, "out of memory"),
    ],
)
def test_a_fault_ends_all_with_its_code_and_is_said_once(
    arguments: list[str], broken: str | None, code: int, words: str, recipe: Write, tmp_path: Path
) -> None:
    """The last three happen in the second process alone, a full disk in the first."""
    path = recipe()
    plain = loop.weighted_loss

    def act(rank: int) -> int:
        if rank == 1 and broken == "nan":
            loop.weighted_loss = lambda *args: plain(*args) * float("nan")  # type: ignore[assignment]
        if rank == 1 and broken == "model":
            runs.load_base = no_model  # type: ignore[assignment]
        if rank == 1 and broken == "memory":
            loop.weighted_loss = out_of_memory
        with with_fault(full_in("step-000004", "step-000006")) if broken == "disk" else contextlib.nullcontext():
            return main(["train", path, *arguments])

    launch = Launch(tmp_path, act)
    assert launch.codes(30) == [code, code], launch.said()
    said = launch.said()
    assert said.count("error:") == 1 and words in said and "Traceback" not in said, said


@pytest.mark.parametrize(("number", "epochs", "code"), [(signal.SIGTERM, 100, 143), (signal.SIGUSR1, 12, 0)])
def test_a_signal_to_one_is_answered_by_all_after_the_same_step(
    number: signal.Signals, epochs: int, code: int, recipe: Write, tmp_path: Path
) -> None:
    """SIGTERM stops them, SIGUSR1 saves and they continue; the second process gets it."""
    path = recipe(train={"epochs": epochs}, run={"save_every": None, "save_minutes": None, "keep": 9})
    launch = Launch(tmp_path, lambda rank: main(["train", path]))
    wait_for_lines(tmp_path / "run/metrics.jsonl", 5)
    os.kill(launch.pids[1], number)
    assert launch.codes(60) == [code, code], launch.said()
    first, *saved, last = sorted((tmp_path / "run/checkpoints").iterdir())
    ended = re.findall(r"stopped after step (\d+) of", launch.said()) if code else [str(3 * epochs)]
    assert (first.name, last.name) == ("step-000000", f"step-{int(ended[0]):06d}") and len(ended) == 1
    assert len(saved) == (0 if code else 1)
    verify_folder(last)
