"""Fault campaigns: a byte-sized run is killed, starved, damaged and disturbed; its result must stay the same bits.

    python -m faults [--trials 20] [--only K1,P1] [--seed 0] [--dir FOLDER]

Each trial runs in forks of this process: the run meets a fault, one judge looks at what it leaves (`judge.py`), then
it is resumed without faults, and every logged number and the adapter must be those of a run that was left alone.
`--trials` is the most trials of a campaign; those that go through all cases stop earlier. Started in the folder tests.

    K1  SIGKILL before, in and after each effect on the disk        S1  SIGINT, SIGTERM or SIGHUP at a random moment
    K2  SIGKILL at random moments, also of the resumed run          S2  a second signal soon after, or a storm of 20
    K4  the same among slow effects                                 S3  SIGUSR1 at random moments: saved, then continues
    P1  power loss: any choice of what was not synced is lost       N1  loss, weights or moments that are not finite
    D1  a full or broken disk at each effect, once or for good      N2  out of memory in each part of a step
    T1  a checkpoint's file cut, flipped, swapped, deleted          C1  2 to 5 processes start one run at once
    T2  headers and JSON changed under right hashes                 C2  copies, links and other runs' checkpoints beside
    W2  trackers that raise or return garbage                       H1  sequences of kills, D1, T1 and C2
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from faults import damage, patches, power
from faults.judge import judge_remains, read_metrics
from faults.subject import SAVE_EVERY, STEPS
from faults.trial import Bench, Child, Fault, Phase, fail_at, kill_at, slow
from lorasft.files import MANIFEST

MOMENTS = ("before", "half", "after")


class Trial(NamedTuple):
    """What is wrong after one trial, how many steps it lost at most, and what its kills hit."""

    wrong: Sequence[str] = ()
    lost: int = 0
    kills: Sequence[Phase] = ()


class Tally(list[Trial]):
    """What a campaign has seen."""

    @property
    def wrong(self) -> list[str]:
        return [reason for trial in self for reason in trial.wrong]

    @property
    def lost(self) -> int:
        return max((trial.lost for trial in self), default=0)

    @property
    def kills(self) -> Counter[Phase]:
        return Counter(phase for trial in self for phase in trial.kills)

    @property
    def torn(self) -> int:
        return sum(reason.startswith("torn") for reason in self.wrong)

    @property
    def identical(self) -> int:
        return sum(not trial.wrong for trial in self)


def resume(bench: Bench) -> list[str]:
    """Bring a run to its end without a fault. What is wrong with that or with its result."""
    code, said = bench.run()
    return bench.judge() if code == 0 else [f"resume: exit {code}: {said}"]


def run_patched(bench: Bench, patch: Callable[[], object], *, code: int = 0) -> tuple[list[str], int]:
    """Run anew after `patch`: what is wrong if it does not end with `code`, and how often it has committed."""
    bench.clear()
    child = bench.patched(patch).start()
    ended = child.wait()
    return [] if ended == code else [f"{patch}: exit {ended}: {child.said()[-500:]}"], child.trace.commits


# ---- kills ----------------------------------------------------------------------------------------------------------


def try_once(bench: Bench, ways: Sequence[Callable[..., Child]]) -> Trial:
    """One trial: the run dies in each of `ways` in turn, is judged each time, and is then brought to its end."""
    wrong, most, kills, commits = [], 0, [], 0
    bench.clear()
    for way in ways:
        child = way(commits=commits)
        code = child.wait()
        if code == 0:  # it was done before the kill
            break
        kills.append(Phase(child.trace.phase))
        reasons, lost = judge_remains(bench.folder, commits=child.trace.commits)
        wrong += reasons if code == -signal.SIGKILL else [f"exit {code}: {child.said()}", *reasons]
        most = max(most, lost)
        commits = child.trace.commits if (bench.folder / "recipe.yaml").exists() else 0  # a start begins anew
    return Trial(wrong + resume(bench), most, kills)


def k1(bench: Bench) -> Iterator[Trial]:
    for number, moment in bench.some(itertools.product(range(1, bench.effects + 1), MOMENTS)):
        yield try_once(bench, [partial(bench.start, kill_at(number, moment=moment))])


def k2(bench: Bench, fault: Fault | None = None) -> Iterator[Trial]:
    for number in range(bench.trials):
        dice = bench.dice(number, fault)
        yield try_once(bench, [partial(kill_randomly, bench, fault, dice)] * dice.choice((1, 2, 3)))


def k4(bench: Bench) -> Iterator[Trial]:
    return k2(bench, slow)


def kill_randomly(bench: Bench, fault: Fault | None, dice: Any, *, commits: int) -> Child:
    """SIGKILL a little after a random effect; of a resumed run rather in the beginning.

    Half of the kills among slow effects wait for what is rare otherwise: the start of a resumed run, the retention of
    another.
    """
    child = bench.start(fault, commits=commits)
    if fault and dice.random() < 0.5:
        rare = Phase.RESUME if commits else Phase.RETAIN
        child.wait_until(lambda trace: trace.phase == rare)
    else:
        number = dice.randint(0, bench.effects // (4 if commits else 1))
        child.wait_until(lambda trace: trace.effects >= number)
    time.sleep(dice.uniform(0, 0.02 if fault else bench.seconds / 10))
    child.kill()
    return child


# ---- the disk -------------------------------------------------------------------------------------------------------


def p1(bench: Bench) -> Iterator[Trial]:
    """Each state is judged; every 50th is also brought to its end."""
    log = bench.folder.with_name("effects")
    shutil.rmtree(log, ignore_errors=True)
    bench.clear()
    bench.start(power.record(bench.folder, log)).wait()
    history = power.read_history(log)
    place = bench.folder.with_name("state")
    for number, loss in enumerate(power.power_losses(history, most=20 * bench.trials, seed=bench.seed)):
        power.build(history, loss, log=log, root=place)
        reasons, lost = judge_remains(place / "run", commits=history.commits[loss.at], done=history.steps[loss.at])
        wrong = [f"{reason} (after effect {loss.at}, {loss.how})" for reason in reasons]
        if number % 50 == 0:
            bench.clear()
            if (place / "run").exists():
                (place / "run").rename(bench.folder)
            wrong += resume(bench)
        yield Trial(wrong, lost)


def d1(bench: Bench) -> Iterator[Trial]:
    """The run continues or ends with exit 6; what was saved before is still there; resumed, it gives the same bits."""
    reasons = itertools.cycle((errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, 0))
    for number, for_good in bench.some(itertools.product(range(1, bench.effects + 1), (False, True))):
        bench.clear()
        reason = next(reasons)
        child = bench.start(fail_at(number, reason=reason, for_good=for_good))
        code = child.wait()
        wrong, lost = judge_remains(bench.folder, commits=child.trace.commits) if code == 6 else ([], 0)
        wrong = [one for one in wrong if "steps lost" not in one]  # more may be: saves have failed, which was said
        if code not in (0, 6) or "Traceback" in child.said():
            wrong.append(f"effect {number}, errno {reason}: exit {code}: {child.said()[-500:]}")
        yield Trial(wrong + resume(bench), lost)


def t1(bench: Bench) -> Iterator[Trial]:
    """The newest checkpoint is damaged, or the one before; the run continues from one that is whole, and says so."""
    bench.half_way()
    whole = bench.folder.with_name("whole")
    shutil.rmtree(whole, ignore_errors=True)
    shutil.copytree(bench.folder, whole)
    for place, name, harm in bench.some(itertools.product((-1, -2), damage.FILES, damage.HARMS)):
        bench.clear()
        shutil.copytree(whole, bench.folder)
        checkpoints = bench.checkpoints()
        damage.HARMS[harm](checkpoints[place] / name, checkpoints[-1 - place - 2] / name)
        code, said = bench.run()
        wrong = [] if code == 0 else [f"{name} {harm}: exit {code}: {said}"]
        if place == -1 and f"skipped {checkpoints[-1].name}" not in said:
            wrong.append(f"{name} {harm}: not said")
        yield Trial(wrong + bench.judge())


def t2(bench: Bench) -> Iterator[Trial]:
    """Under a manifest that is right: read or refused, never another exception. All in one fork, for speed."""
    bench.half_way()
    report = bench.folder.with_name("report.json")
    act = partial(damage.read_changed, trials=50 * bench.trials, seed=bench.seed, report=report)
    child = Bench(bench.recipe, setup=bench.setup, act=act).start()
    code = child.wait(600)
    faults = json.loads(report.read_text(encoding="utf-8")) if code == 0 else [child.said()]
    yield from (Trial([fault]) for fault in faults)
    yield from (Trial() for _ in range(50 * bench.trials - len(faults)))


def c1(bench: Bench) -> Iterator[Trial]:
    """One wins, the others are refused with exit 2, and the winner's result is untouched."""
    for number in range(bench.trials):
        bench.clear()
        children = [bench.start() for _ in range(bench.dice("c1", number).randint(2, 5))]
        codes = sorted(child.wait() for child in children)
        wrong = [] if codes == [0] + [2] * (len(codes) - 1) else [f"exits {codes}: {[one.said() for one in children]}"]
        yield Trial(wrong + bench.judge())


def c2(bench: Bench) -> Iterator[Trial]:
    """Neighbours in the folder neither mislead a run that continues nor are they touched by it."""
    for name in bench.some(damage.NEIGHBOURS):
        bench.half_way()
        put = damage.NEIGHBOURS[name](bench.checkpoints()[-1])
        before = [damage.fingerprint_tree(path) for path in put]
        code, said = bench.run()
        wrong = [] if code == 0 else [f"{name}: exit {code}: {said[-500:]}"]
        aside = list((bench.folder / "checkpoints").glob("*.aside-*"))
        after = [damage.fingerprint_tree(aside[0] if aside else path) for path in put]
        wrong += [f"{name}: touched"] if before != after else []
        yield Trial(wrong + bench.judge())


def h1(bench: Bench) -> Iterator[Trial]:
    """Up to 6 of them, one after another; of the checkpoints only one is damaged at a time."""
    for number in range(bench.trials):
        bench.clear()
        dice, wrong = bench.dice("h1", number), []
        acts = [*dice.choices(("kill", "disk", "damage"), k=dice.randint(1, 5)), dice.choice(list(damage.NEIGHBOURS))]
        for act in dice.sample(acts, len(acts)):
            effect, whole = dice.randint(1, bench.effects), damage.whole_checkpoints(bench.folder)
            if act in ("kill", "disk"):
                disk = fail_at(effect, for_good=dice.random() < 0.5)
                code, said = bench.run(disk if act == "disk" else kill_at(effect, moment=dice.choice(MOMENTS)))
                wrong += [] if code in (0, 6, -signal.SIGKILL) else [f"exit {code}: {said}"]
            elif act == "damage" and len(whole) > 1:
                damage.HARMS[dice.choice(list(damage.HARMS))](
                    whole[-1] / dice.choice(damage.FILES), whole[0] / MANIFEST
                )
            elif act != "damage" and whole:
                with contextlib.suppress(FileExistsError):  # a checkpoint of that step
                    damage.NEIGHBOURS[act](whole[-1])
        yield Trial([f"{acts}: {reason}" for reason in wrong + resume(bench)])


# ---- signals --------------------------------------------------------------------------------------------------------

STOPPED = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 143}


def s1(bench: Bench, *, more: Sequence[int] = (0,)) -> Iterator[Trial]:
    """Stopped within a step, saved, with the exit code of the signal."""
    for number in range(bench.trials):
        dice = bench.dice("s1", number, *more)
        pauses = [dice.uniform(0, bench.seconds), *(dice.uniform(0, 0.05) for _ in range(dice.choice(more)))]
        yield signalled(bench, [(pause, dice.choice(list(STOPPED))) for pause in pauses])


def s2(bench: Bench) -> Iterator[Trial]:
    """A second signal, or a storm of 20, ends at once: steps may be lost, nothing is torn."""
    return s1(bench, more=(1, 20))


def signalled(bench: Bench, signals: list[tuple[float, signal.Signals]]) -> Trial:
    bench.clear()
    child = bench.start()
    for pause, number in signals:
        while number == signal.SIGUSR1 and not (bench.folder / "metrics.jsonl").exists():
            time.sleep(0.001)  # before it is answered it ends a process
        time.sleep(pause)
        child.kill(number)
    sent, code = time.monotonic(), child.wait()
    wrong, lost = judge_remains(bench.folder, commits=child.trace.commits)
    if code != 0 and code not in [STOPPED.get(number) for _, number in signals]:
        wrong.append(f"exit {code} after {signals}: {child.said()[-500:]}")
    if time.monotonic() - sent > 10:
        wrong.append("it took more than 10 s to stop")
    phase = Phase(child.trace.phase)
    if len(signals) == 1 and phase in (Phase.TRAIN, Phase.SAVE, Phase.RETAIN) and code != 0 and lost:
        wrong.append(f"{lost} steps lost after a signal")
    return Trial(wrong + resume(bench), lost, [phase] if code else [])


def s3(bench: Bench) -> Iterator[Trial]:
    """Asked to save: done after the step, and the run continues to the same bits."""
    for number in range(bench.trials):
        yield signalled(bench, [(bench.dice("s3", number).uniform(0, bench.seconds / 2), signal.SIGUSR1)])


# ---- numbers, memory, trackers --------------------------------------------------------------------------------------


def n1(bench: Bench) -> Iterator[Trial]:
    """Exit 7 before anything that is not finite is saved; the last checkpoint leads to the same bits."""
    cases = itertools.product(range(1, STEPS + 1), ("loss", "gradient", "weight", "moment"))
    for step, where in bench.some(case for case in cases if case != (1, "moment")):  # there are none before a step
        wrong, commits = run_patched(bench, partial(patches.poison, step, where), code=7)
        remains, lost = judge_remains(bench.folder, commits=commits)
        yield Trial(wrong + remains + resume(bench), lost)


def n2(bench: Bench) -> Iterator[Trial]:
    """Redone in smaller micro-batches, which draws other dropout: the same steps, rates and tokens, not the same bits.

    In an update or the last save it is exit 6, in an earlier save the run continues; all give the same bits.
    """
    keys = ("step", "epoch", "learning_rate", "supervised_tokens", "eval_tokens")
    parts = ("forward", "backward", "evaluation", "update", "save")
    for step, part in bench.some(itertools.product(range(1, STEPS + 1), parts)):
        code = 6 if part == "update" or (part == "save" and step > STEPS - SAVE_EVERY) else 0
        wrong, _ = run_patched(bench, partial(patches.starve, step, part), code=code)
        if part in ("update", "save"):
            yield Trial(wrong + resume(bench))
            continue
        want, have = ([[line.get(key) for key in keys] for line in lines]
                      for lines in (bench.result.lines, read_metrics(bench.folder)))  # fmt: skip
        yield Trial(wrong + ([] if want == have else [f"other steps: {have}"]))


def w2(bench: Bench) -> Iterator[Trial]:
    """What a tracker does changes nothing."""
    tracked = bench.changed("run", trackers=("tensorboard",))
    for moment, way in bench.some(itertools.product(("start", "log", "finish"), ("raise", "garbage"))):
        wrong, _ = run_patched(tracked, partial(patches.break_trackers, moment, way))
        yield Trial(wrong + bench.judge())


CAMPAIGNS: dict[str, Callable[[Bench], Iterator[Trial]]] = {
    name.__name__.upper(): name for name in (k1, k2, k4, p1, d1, t1, t2, w2, s1, s2, s3, n1, n2, c1, c2, h1)
}


def run_campaign(name: str, bench: Bench, *, most_wrong: int = 5) -> Tally:
    """All trials of one campaign; it ends early when enough has gone wrong."""
    total = Tally()
    for trial in CAMPAIGNS[name](bench):
        total.append(trial)
        if len(total.wrong) >= most_wrong:
            break
    return total
