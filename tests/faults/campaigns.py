"""Fault campaigns: a byte-sized run is killed, starved, damaged and disturbed; its result must stay the same bits.

    python -m faults [--trials 20] [--only K1,P1] [--seed 0] [--dir FOLDER] [--out docs/faults.md]

Each trial runs in forks of this process: the run meets a fault, one judge looks at what it leaves (`judge.py`), then
it is resumed without faults, and every logged number and the adapter must be those of a run that was left alone.
`--trials` is the most trials of a campaign; those that go through all cases stop earlier. Started in the folder tests.

    K1  SIGKILL before, in and after each effect on the disk        S1  SIGINT, SIGTERM or SIGHUP at a random moment
    K2  SIGKILL at random moments, also of the resumed run          S2  a second signal soon after, or a storm of 20
    K4  the same among slow effects                                 S3  SIGUSR1 at random moments: saved, and goes on
    P1  power loss: any choice of what was not synced is lost       N1  loss, weights or moments that are not finite
    D1  a full or broken disk at each effect, once or for good      N2  out of memory in each part of a step
    T1  a checkpoint's file cut, flipped, swapped, deleted          C1  2 to 5 processes start one run at once
    T2  headers and JSON changed under right hashes                 C2  copies, links and other runs' checkpoints beside
    W2  trackers that raise or return garbage                       H1  sequences of all that, shrunk when they fail
"""

from __future__ import annotations

import contextlib
import copy
import errno
import itertools
import json
import os
import random
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis
import torch
from hypothesis.stateful import run_state_machine_as_test

from faults import power as power
from faults.judge import judge_remains, judge_result
from faults.kills import (
    Reference,
    Tally,
    bring_to_end,
    kill_in_slow_effects,
    kill_in_time,
    try_once,
)
from faults.states import state_machine
from faults.trial import Bench, Fault, Phase, halved, kill_at
from lorasft.errors import LorasftError
from lorasft.files import MANIFEST, STAGE, sha256
from lorasft.model import scoring
from lorasft.model.adapter import attach_adapter, trainable
from lorasft.model.base import load_base
from lorasft.recipe import AdapterSettings
from lorasft.train import checkpoint, loop, metrics
from lorasft.train import run as runs
from lorasft.train.checkpoint import list_checkpoints, newest_checkpoint, restore_checkpoint
from lorasft.train.optimizer import make_optimizer
from lorasft.train.state import Learner, Run


@dataclass(frozen=True)
class Ring:
    """What a campaign works with."""

    bench: Bench
    reference: Reference
    trials: int
    seed: int

    def dice(self, *names: object) -> random.Random:
        return random.Random("-".join(map(str, (self.seed, *names))))

    def some(self, cases: Sequence[Any]) -> Sequence[Any]:
        """All cases, or `trials` of them, evenly spread, in a random order."""
        step = max(1.0, len(cases) / self.trials)
        some = [cases[int(index * step)] for index in range(min(len(cases), self.trials))]
        return self.dice().sample(some, len(some))

    def half_way(self) -> None:
        """Leave a run that was killed a while after its second save."""
        self.bench.clear()
        self.bench.start(kill_at(self.reference.effects * 2 // 3, moment="before")).wait()

    def judge(self, wrong: list[str], *, ends: bool = True) -> Tally:
        """The tally of a trial whose run has come to its end, or is brought there now."""
        wrong = wrong + (bring_to_end(self.bench, self.reference) if ends else [])
        torn = sum(reason.startswith("torn") for reason in wrong)
        return Tally(trials=1, torn=torn, identical=int(not wrong), wrong=wrong)


Campaign = Callable[[Ring], Iterator[Tally]]


def k1(ring: Ring) -> Iterator[Tally]:
    cases = list(itertools.product(range(1, ring.reference.effects + 1), ("before", "half", "after")))
    for number, moment in ring.some(cases):
        fault = kill_at(number, moment=moment)
        yield try_once(ring.bench, ring.reference, [lambda bench, commits, f=fault: bench.start(f, commits=commits)])


def random_kills(ring: Ring, way: Callable[..., Any]) -> Iterator[Tally]:
    for number in range(ring.trials):
        dice = ring.dice(way.__name__, number)
        ways = [partial(way, dice=dice, reference=ring.reference)] * dice.choice((1, 2, 3))
        yield try_once(ring.bench, ring.reference, ways)


def k2(ring: Ring) -> Iterator[Tally]:
    return random_kills(ring, kill_in_time)


def k4(ring: Ring) -> Iterator[Tally]:
    yield from random_kills(ring, kill_in_slow_effects)


def p1(ring: Ring) -> Iterator[Tally]:
    """Each state is judged; every 50th, and every one without a run in it, is also brought to its end."""
    root, log = ring.bench.folder.parent, ring.bench.folder.with_name("effects")
    shutil.rmtree(log, ignore_errors=True)
    ring.bench.clear()
    ring.bench.start(power.record(root, log)).wait()
    history = power.Reader(log).read()
    losses = power.power_losses(history, most=20 * ring.trials, seed=ring.seed)
    place = ring.bench.folder.with_name("state")
    for number, loss in enumerate(losses):
        power.build(history, loss, log=log, root=place)
        commits, done = history.commits[loss.at], history.steps[loss.at]
        wrong, lost = judge_remains(place / "run", commits=commits, done=done)
        ends = number % 50 == 0
        if ends:
            ring.bench.clear()
            if (place / "run").exists():
                (place / "run").rename(ring.bench.folder)
        tally = ring.judge([f"{reason} (after effect {loss.at}, {loss.how})" for reason in wrong], ends=ends)
        tally.lost = lost
        yield tally


def d1(ring: Ring) -> Iterator[Tally]:
    """The run goes on or ends with exit 6; what was saved before stays; resumed, it gives the same bits."""
    reasons = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, 0)
    numbers = range(1, ring.reference.effects + 1)
    for index, (number, for_good) in enumerate(ring.some(list(itertools.product(numbers, (False, True))))):
        ring.bench.clear()
        reason = reasons[index % len(reasons)]
        child = ring.bench.start(fail_at(number, reason=reason, for_good=for_good))
        code = child.wait()
        wrong, lost = judge_remains(ring.bench.folder, commits=child.trace.commits) if code == 6 else ([], 0)
        wrong = [one for one in wrong if "steps lost" not in one]  # more may be: saves have failed, which was said
        if code not in (0, 6) or "Traceback" in child.said():
            wrong.append(f"effect {number}, errno {reason}: exit {code}: {child.said()[-500:]}")
        tally = ring.judge(wrong)
        tally.lost = lost
        yield tally


def fail_at(number: int, *, reason: int, for_good: bool) -> Fault:
    """An OSError in effect `number` (and all later ones `for_good`), with half of its content written.

    Reason 0: no error, the half is all that the disk keeps.
    """

    @contextlib.contextmanager
    def fault(here: int, kind: str, paths: tuple[Path, ...]) -> Iterator[None]:
        hit = (here >= number if for_good else here == number) and kind != "remove"
        if hit and reason and kind not in ("write", "append"):
            raise OSError(reason, os.strerror(reason))
        cut = hit and (kind == "write" or (kind == "append" and reason))
        with halved(paths[0]) if cut else contextlib.nullcontext():
            yield
        if cut and reason:
            raise OSError(reason, os.strerror(reason))

    return fault


def t1(ring: Ring) -> Iterator[Tally]:
    """The newest checkpoint is damaged, or the one before; the run goes on from one that is whole, and says so."""
    ring.half_way()
    whole = ring.bench.folder.with_name("whole")
    shutil.rmtree(whole, ignore_errors=True)
    shutil.copytree(ring.bench.folder, whole)
    files = ["adapter_model.safetensors", "optimizer.safetensors", "state.json", "adapter_config.json", MANIFEST]
    for place, name, harm in ring.some(list(itertools.product((-1, -2), files, HARMS))):
        ring.bench.clear()
        shutil.copytree(whole, ring.bench.folder)
        checkpoints = list_checkpoints(ring.bench.folder / "checkpoints")
        HARMS[harm](checkpoints[place] / name, checkpoints[-1 - place - 2] / name)
        child = ring.bench.start()
        code = child.wait()
        wrong = [] if code == 0 else [f"{name} {harm}: exit {code}: {child.said()}"]
        if place == -1 and f"skipped {checkpoints[-1].name}" not in child.said():
            wrong.append(f"{name} {harm}: not said")
        yield ring.judge(wrong + judge_result(ring.bench.folder, ring.reference.result), ends=False)


def change_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path, Path], None]:
    def harm(path: Path, other: Path) -> None:
        path.write_bytes(change(path.read_bytes()))

    return harm


def flip(content: bytes) -> bytes:
    at = len(content) // 3
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]


def swap(path: Path, other: Path) -> None:
    beside = path.with_name("state.json" if path.name != "state.json" else MANIFEST)
    one, two = path.read_bytes(), beside.read_bytes()
    path.write_bytes(two)
    beside.write_bytes(one)


def take_other(path: Path, other: Path) -> None:
    content = other.read_bytes()
    path.write_bytes(content if content != path.read_bytes() else content + b" ")


HARMS: dict[str, Callable[[Path, Path], None]] = {
    "emptied": change_bytes(lambda content: b""),
    "cut to a byte": change_bytes(lambda content: content[:1]),
    "cut by half": change_bytes(lambda content: content[: len(content) // 2]),
    "cut by a byte": change_bytes(lambda content: content[:-1]),
    "flipped": change_bytes(flip),
    "zeroed": change_bytes(lambda content: bytes(len(content[:4096])) + content[4096:]),
    "swapped": swap,
    "deleted": lambda path, other: path.unlink(),
    "of another step": take_other,
}


def t2(ring: Ring) -> Iterator[Tally]:
    """Under a manifest that is right: read or refused, never another exception. All in one fork, for speed."""
    ring.half_way()
    report = ring.bench.folder.with_name("report.json")
    act = partial(read_changed, trials=50 * ring.trials, seed=ring.seed, report=report)
    child = replace(ring.bench, act=act).start()
    code = child.wait(600)
    faults = json.loads(report.read_text(encoding="utf-8")) if code == 0 else [child.said()]
    yield from (Tally(trials=1, identical=1) for _ in range(50 * ring.trials - len(faults)))
    yield from (Tally(trials=1, wrong=[fault]) for fault in faults)


def read_changed(recipe: Any, trace: Any, *, trials: int, seed: int, report: Path) -> None:
    faults = []
    with runs.open_run(recipe, resume=True) as opened:
        newest = list_checkpoints(opened.run.checkpoints)[-1]
        place = opened.run.folder.with_name("changed") / newest.name
        for number in range(trials):
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(newest, place)
            told = change_checkpoint(place, random.Random(f"{seed}-{number}"))
            try:
                newest_checkpoint(place.parent, run=opened.state.run)
                restore_checkpoint(place, opened.run.learner)
            except LorasftError:
                pass
            except BaseException as fault:
                faults.append(f"{told}: {type(fault).__name__}: {fault}")
    report.write_text(json.dumps(faults), encoding="utf-8")


ODD: tuple[Any, ...] = (None, -1, 1e308, "", "x" * 10_000, [], {}, [[[]]], True, "../../x", 2**70, "F32", [0, 1])


def change_checkpoint(folder: Path, dice: random.Random) -> str:
    """Change one file of a checkpoint, in its JSON or its bytes, and make the manifest right again."""
    name = dice.choice(("adapter_model.safetensors", "optimizer.safetensors", "state.json", MANIFEST))
    path = folder / name
    content = path.read_bytes()
    start = 8 if name.endswith(".safetensors") else 0
    stop = start + int.from_bytes(content[:8], "little") if start else len(content)
    if dice.random() < 0.3:
        at = dice.randrange(stop)
        content = content[:at] + bytes([dice.randrange(256)]) + content[at + 1 :]
    else:
        document = json.loads(content[start:stop])
        for _ in range(dice.choice((1, 1, 3))):
            change_json(document, dice)
        header = json.dumps(document).encode()
        content = (len(header).to_bytes(8, "little") if start else b"") + header + content[stop:]
    path.write_bytes(content)
    if name != MANIFEST:
        entries = json.loads((folder / MANIFEST).read_bytes())
        entries[name] = {"bytes": len(content), "sha256": sha256(path)}
        (folder / MANIFEST).write_text(json.dumps(entries), encoding="utf-8")
    return f"{name} {content[start : start + 200]!r}"


def change_json(document: Any, dice: random.Random) -> None:
    """Replace, delete or double a value somewhere in `document`."""
    while isinstance(document, (dict, list)) and document:
        key = dice.choice(list(document) if isinstance(document, dict) else range(len(document)))
        if isinstance(document[key], (dict, list)) and document[key] and dice.random() < 0.8:
            document = document[key]
            continue
        if dice.random() < 0.3:
            del document[key]
        elif isinstance(document, dict) and dice.random() < 0.2:
            document[str(dice.choice(ODD))] = copy.deepcopy(document[key])
        else:
            document[key] = copy.deepcopy(dice.choice(ODD))
        return


STOPPED = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 143}


def s1(ring: Ring) -> Iterator[Tally]:
    """Stopped within a step, saved, with the exit code of the signal."""
    for number in range(ring.trials):
        dice = ring.dice("s1", number)
        yield signalled(ring, [(dice.uniform(0, ring.reference.seconds), dice.choice(list(STOPPED)))])


def s2(ring: Ring) -> Iterator[Tally]:
    """The second signal ends at once: steps may be lost, nothing is torn."""
    for number in range(ring.trials):
        dice = ring.dice("s2", number)
        first = (dice.uniform(0, ring.reference.seconds), dice.choice(list(STOPPED)))
        later = [(dice.uniform(0, 0.05), dice.choice(list(STOPPED))) for _ in range(dice.choice((1, 20)))]
        yield signalled(ring, [first, *later])


def signalled(ring: Ring, signals: list[tuple[float, signal.Signals]]) -> Tally:
    ring.bench.clear()
    child = ring.bench.start()
    for pause, number in signals:
        time.sleep(pause)
        child.kill(number)
    sent, code = time.monotonic(), child.wait()
    wrong, lost = judge_remains(ring.bench.folder, commits=child.trace.commits)
    if code != 0 and code not in [STOPPED[number] for _, number in signals]:
        wrong.append(f"exit {code} after {signals}: {child.said()[-500:]}")
    if time.monotonic() - sent > 10:
        wrong.append("it took more than 10 s to stop")
    if len(signals) == 1 and child.trace.phase in (Phase.TRAIN, Phase.SAVE, Phase.RETAIN) and code != 0:
        wrong += [f"{lost} steps lost after a signal"] * (lost > 0)
    tally = ring.judge(wrong)
    tally.lost = lost
    tally.kills[Phase(child.trace.phase).name.lower()] += code != 0
    return tally


def s3(ring: Ring) -> Iterator[Tally]:
    """Asked to save: done after the step, and the run goes on to the same bits."""
    for number in range(ring.trials):
        ring.bench.clear()
        child = ring.bench.start()
        while not (ring.bench.folder / "metrics.jsonl").exists():
            time.sleep(0.001)
        time.sleep(ring.dice("s3", number).uniform(0, ring.reference.seconds / 2))
        child.kill(signal.SIGUSR1)
        code = child.wait()
        wrong = [] if code in (0, -signal.SIGUSR1) else [f"exit {code}: {child.said()}"]
        if code != 0 and child.trace.phase < Phase.FINISH:
            wrong.append("SIGUSR1 ended the run")
        yield ring.judge(wrong)


def n1(ring: Ring) -> Iterator[Tally]:
    """Exit 7 before anything that is not finite is saved; the last checkpoint goes on to the same bits."""
    steps = sum("loss" in line for line in ring.reference.result.lines)
    for step, where in ring.some(
        list(itertools.product(range(1, steps + 1), ("loss", "gradient", "weight", "moment")))
    ):
        ring.bench.clear()
        child = replace(ring.bench, setup=(*ring.bench.setup, partial(poison, step, where))).start()
        code = child.wait()
        wrong, lost = judge_remains(ring.bench.folder, commits=child.trace.commits)
        if code != 7 and not (where == "moment" and step == 1):  # there are no moments before the first step
            wrong.append(f"{where} at step {step}: exit {code}: {child.said()[-500:]}")
        tally = ring.judge(wrong)
        tally.lost = lost
        yield tally


def before_step(number: int, act: Callable[[Run], object]) -> None:
    """Do `act` once, before step `number`, in this process."""
    plain, done = loop.take_step, []

    def take_step(run: Run, step: Any, stop: Any) -> dict[str, Any]:
        if step.number == number and not done:
            done.append(act(run))
        return plain(run, step, stop)

    loop.take_step = take_step


def poison(number: int, where: str) -> None:
    plain_losses, plain_norm = loop.pair_losses, loop.get_total_norm

    def put(run: Run) -> None:
        first = next(iter(run.learner.parameters.values()))
        if where == "weight":
            first.data.view(-1)[0] = float("inf")
        elif where == "moment" and run.learner.optimizer.state:
            run.learner.optimizer.state[first]["exp_avg"].view(-1)[0] = float("nan")
        elif where == "loss":
            loop.pair_losses = lambda *values: plain_losses(*values) * float("nan")
        elif where == "gradient":
            loop.get_total_norm = lambda gradients: plain_norm([tensor * float("inf") for tensor in gradients])

    before_step(number, put)


def n2(ring: Ring) -> Iterator[Tally]:
    """Redone in smaller micro-batches, which draws other dropout: the same steps, rates and tokens, not the same bits.

    In an update it is exit 6, in a save the run goes on; both give the same bits.
    """
    steps = sum("loss" in line for line in ring.reference.result.lines)
    parts = ("forward", "backward", "evaluation", "update", "save")
    for step, part in ring.some(list(itertools.product(range(1, steps + 1), parts))):
        ring.bench.clear()
        child = replace(ring.bench, setup=(*ring.bench.setup, partial(starve, step, part))).start()
        code = child.wait()
        wrong = [] if code == (6 if part == "update" else 0) else [f"{part} {step}: exit {code}: {child.said()[-500:]}"]
        if part in ("update", "save"):
            yield ring.judge(wrong)
            continue
        yield ring.judge(wrong + judge_steps(ring), ends=False)


def judge_steps(ring: Ring) -> list[str]:
    """What is wrong with the steps of a run whose losses may be others."""
    from faults.judge import read_metrics

    keys = ("step", "epoch", "learning_rate", "supervised_tokens", "eval_tokens")
    want, have = ([[line.get(key) for key in keys] for line in lines]
                  for lines in (ring.reference.result.lines, read_metrics(ring.bench.folder)))  # fmt: skip
    return [] if want == have else [f"other steps: {have}"]


def starve(number: int, part: str) -> None:
    """Run out of memory once, at step `number` or at the first chance after it."""
    module, name = {
        "forward": (loop, "pair_losses"),
        "backward": (torch.Tensor, "backward"),
        "evaluation": (scoring, "pair_losses"),
        "update": (torch.optim.AdamW, "step"),
        "save": (checkpoint, "save_checkpoint"),
    }[part]
    plain = getattr(module, name)

    def fail(*values: Any, **named: Any) -> Any:
        setattr(module, name, plain)
        raise torch.OutOfMemoryError("out of memory, as it is tried here")

    before_step(number, lambda run: setattr(module, name, fail))


def w2(ring: Ring) -> Iterator[Tally]:
    recipe = ring.bench.recipe.model_copy(
        update={"run": ring.bench.recipe.run.model_copy(update={"trackers": ("tensorboard",)})}
    )
    for moment, way in ring.some(list(itertools.product(("start", "log", "finish"), ("raise", "garbage")))):
        ring.bench.clear()
        setup = (*ring.bench.setup, partial(break_trackers, moment, way))
        child = replace(ring.bench, recipe=recipe, setup=setup).start()
        code = child.wait()
        wrong = [] if code == 0 else [f"{moment} {way}: exit {code}: {child.said()[-500:]}"]
        yield ring.judge(wrong + judge_result(ring.bench.folder, ring.reference.result), ends=False)


def break_trackers(moment: str, way: str) -> None:
    def act(at: str) -> Any:
        if at == moment and way == "raise":
            raise RuntimeError("a tracker that raises")
        return object() if at == moment else None

    class Tracker:
        def log(self, values: dict[str, Any], step: int) -> Any:
            values.clear()
            return act("log")

        def finish(self) -> Any:
            return act("finish")

    def start(recipe: Any, folder: Path) -> list[Any]:
        act("start")
        return [Tracker()]

    metrics.start_trackers = start
    runs.check_trackers = lambda names: None


def c1(ring: Ring) -> Iterator[Tally]:
    """One wins, the others are refused with exit 2, and the winner's result is untouched."""
    for number in range(ring.trials):
        ring.bench.clear()
        children = [ring.bench.start() for _ in range(ring.dice("c1", number).randint(2, 5))]
        codes = sorted(child.wait() for child in children)
        wrong = [] if codes == [0] + [2] * (len(codes) - 1) else [f"exits {codes}: {[one.said() for one in children]}"]
        yield ring.judge(wrong + judge_result(ring.bench.folder, ring.reference.result), ends=False)


def c2(ring: Ring) -> Iterator[Tally]:
    """Neighbours in the folder neither mislead a run that goes on nor are they touched by it."""
    for name in ring.some(list(NEIGHBOURS)):
        ring.half_way()
        checkpoints = list_checkpoints(ring.bench.folder / "checkpoints")
        put = NEIGHBOURS[name](checkpoints[-1])
        before = [fingerprint_tree(path) for path in put]
        child = ring.bench.start()
        code = child.wait()
        wrong = [] if code == 0 else [f"{name}: exit {code}: {child.said()[-500:]}"]
        aside = list((ring.bench.folder / "checkpoints").glob("*.aside-*"))
        after = [fingerprint_tree(aside[0] if aside else path) for path in put]
        wrong += [f"{name}: touched"] if before != after else []
        yield ring.judge(wrong + judge_result(ring.bench.folder, ring.reference.result), ends=False)


def h1(ring: Ring) -> Iterator[Tally]:
    """`trials` sequences of up to 30 actions; see states.py."""
    settings = hypothesis.settings(
        max_examples=ring.trials,
        stateful_step_count=30,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    model = ring.bench.recipe.model
    adapter = AdapterSettings(rank=1, targets=("q_proj",))
    peft = attach_adapter(load_base(model, torch.device("cpu")), adapter, seed=ring.seed)
    parameters = trainable(peft)
    learner = Learner(peft, parameters, make_optimizer(ring.bench.recipe.optimizer, parameters))
    try:
        run_state_machine_as_test(state_machine(learner, model), settings=settings)
    except Exception:
        yield Tally(trials=1, wrong=[traceback.format_exc()])
    else:
        yield from (Tally(trials=1, identical=1) for _ in range(ring.trials))


def fingerprint_tree(path: Path) -> list[tuple[str, str]]:
    paths = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [(one.relative_to(path).as_posix(), sha256(one) if one.is_file() else "") for one in paths]


def copy_to(name: str) -> Callable[[Path], list[Path]]:
    def copy(newest: Path) -> list[Path]:
        return [Path(shutil.copytree(newest, newest.with_name(name)))]

    return copy


def copy_of_other_run(name: str) -> Callable[[Path], list[Path]]:
    """A checkpoint that verifies, of another run."""

    def copy(newest: Path) -> list[Path]:
        target = Path(shutil.copytree(newest, newest.with_name(name)))
        state = json.loads((target / "state.json").read_bytes()) | {"run": "other", "step": int(name[5:])}
        (target / "state.json").write_text(json.dumps(state), encoding="utf-8")
        entries = json.loads((target / MANIFEST).read_bytes())
        size = (target / "state.json").stat().st_size
        entries["state.json"] = {"bytes": size, "sha256": sha256(target / "state.json")}
        (target / MANIFEST).write_text(json.dumps(entries), encoding="utf-8")
        return [target]

    return copy


def write_to(*names: str) -> Callable[[Path], list[Path]]:
    def write(newest: Path) -> list[Path]:
        for name in names:
            (newest.parent / name).write_text("mine", encoding="utf-8")
        return [newest.parent / name for name in names]

    return write


def link_to_stranger(newest: Path) -> list[Path]:
    outside = Path(shutil.copytree(newest, newest.parents[2] / "outside", dirs_exist_ok=True))
    for name in ("step-000090", f"{STAGE}step-000090-0123abcd"):
        (newest.parent / name).symlink_to(outside, target_is_directory=True)
    return [outside]


def touch_all(newest: Path) -> list[Path]:
    for number, path in enumerate(sorted(newest.parents[1].rglob("*"), reverse=True)):
        os.utime(path, (1e9 + number, 1e9 + number))
    return []


def link_output(newest: Path) -> list[Path]:
    folder = newest.parents[1]
    elsewhere = folder.with_name("elsewhere")
    shutil.rmtree(elsewhere, ignore_errors=True)
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere, target_is_directory=True)
    return []


def crowd(newest: Path) -> list[Path]:
    """Copies under a higher number and by hand, other runs' checkpoints before and after, files of editors."""
    neighbours = (
        copy_to("step-000099"),
        copy_to("step-000004 (1)"),
        copy_of_other_run("step-000098"),
        copy_of_other_run("step-000001"),
        write_to(".DS_Store", "notes.txt~", "step-000002.swp", f"{STAGE}mine"),
    )
    return [path for put in neighbours for path in put(newest)]


NEIGHBOURS: dict[str, Callable[[Path], list[Path]]] = {
    "copies, other runs and files of editors": crowd,
    "another run's checkpoint in the way": copy_of_other_run("step-000010"),
    "links and other times": lambda newest: touch_all(newest) + link_to_stranger(newest),
    "a linked output": link_output,
}

CAMPAIGNS: dict[str, Campaign] = {
    name.__name__.upper(): name for name in (k1, k2, k4, p1, d1, t1, t2, w2, s1, s2, s3, n1, n2, c1, c2, h1)
}


def run_campaign(name: str, ring: Ring, *, most_wrong: int = 5) -> Tally:
    """All trials of one campaign; it ends early when enough has gone wrong."""
    total = Tally()
    for tally in CAMPAIGNS[name](ring):
        total.add(tally)
        if len(total.wrong) >= most_wrong:
            break
    return total
