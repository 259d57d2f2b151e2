"""The kill campaign: runs killed at random, again while they resume, and compared with one that was left alone."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from faults.judge import Result, judge_remains, judge_result, read_result
from faults.subject import make_subject
from faults.trial import Bench, Child, Phase, slow

Way = Callable[[Bench, int], Child]  # starts a run that has committed so often, and sees to its end


@dataclass(frozen=True)
class Reference:
    """A run that was left alone: what it gives, how long it takes, how many effects on the disk it has."""

    result: Result
    seconds: float
    effects: int


@dataclass
class Tally:
    """What a campaign has seen."""

    trials: int = 0
    kills: Counter[str] = field(default_factory=Counter)  # by the phase that they hit
    torn: int = 0
    lost: int = 0  # steps, the most of any kill
    identical: int = 0
    wrong: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        self.trials += other.trials
        self.kills += other.kills
        self.torn += other.torn
        self.lost = max(self.lost, other.lost)
        self.identical += other.identical
        self.wrong += other.wrong

    @property
    def bound(self) -> float:
        """With no failure in n trials, the rate of failures is below this with 95 % confidence."""
        return float(1 - 0.05 ** (1 / max(1, self.trials)))


def open_bench(folder: Path) -> tuple[Bench, Reference]:
    """Make the subject of the campaigns in `folder`, and run it untouched. Raises RuntimeError when that fails."""
    bench = Bench(make_subject(folder))
    for _ in range(2):  # the first run reads files that the system then knows
        bench.clear()
        started = time.monotonic()
        child = bench.start()
        if child.wait() != 0:
            raise RuntimeError(child.said())
    return bench, Reference(read_result(bench.folder), time.monotonic() - started, child.trace.effects)


def kill_in_time(bench: Bench, commits: int, *, dice: random.Random, reference: Reference) -> Child:
    """SIGKILL at a random moment: of the clock, or a little after a random effect, for machines that are busy."""
    child = bench.start(commits=commits)
    share = 4 if commits else 1  # of a resumed run rather the beginning
    if dice.random() < 0.5:
        time.sleep(dice.uniform(0, reference.seconds / share))
    else:
        child.await_effect(dice.randint(0, reference.effects // share))
        time.sleep(dice.uniform(0, reference.seconds / 10))
    child.kill()
    return child


def kill_in_slow_effects(bench: Bench, commits: int, *, dice: random.Random, reference: Reference) -> Child:
    """SIGKILL at a random moment of a run whose effects on the disk are slow, and are hit more often therefore.

    Half of the kills wait for what is rare otherwise: the start of a resumed run, the retention of another.
    """
    child = bench.start(slow, commits=commits)
    if dice.random() < 0.5:
        child.await_effect(dice.randint(1, reference.effects // (4 if commits else 1)))
    else:
        child.await_phase(Phase.RESUME if commits else Phase.RETAIN)
    time.sleep(dice.uniform(0, 0.02))
    child.kill()
    return child


def try_once(bench: Bench, reference: Reference, ways: Sequence[Way]) -> Tally:
    """One trial: the run dies in each of `ways` in turn, is judged each time, and then goes on to its end."""
    tally = Tally(trials=1)
    bench.clear()
    commits = 0
    for way in ways:
        child = way(bench, commits)
        code = child.wait()
        if code == 0:  # it was done before the kill
            break
        tally.kills[Phase(child.trace.phase).name.lower()] += 1
        wrong, lost = judge_remains(bench.folder, commits=child.trace.commits)
        tally.torn += sum(reason.startswith("torn") for reason in wrong)
        tally.lost = max(tally.lost, lost)
        tally.wrong += wrong if code == -signal.SIGKILL else [f"exit {code}: {child.said()}", *wrong]
        commits = child.trace.commits if (bench.folder / "recipe.yaml").exists() else 0  # a start begins anew
    tally.wrong += bring_to_end(bench, reference)
    tally.identical = int(not tally.wrong)
    return tally


def bring_to_end(bench: Bench, reference: Reference) -> list[str]:
    """Resume without a fault. What is wrong with that or with its result."""
    child = bench.start()
    code = child.wait()
    return judge_result(bench.folder, reference.result) if code == 0 else [f"resume: exit {code}: {child.said()}"]
