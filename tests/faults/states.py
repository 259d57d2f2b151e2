"""H1: any sequence of saves, deaths, full disks, damage and copies in a folder of checkpoints; hypothesis shrinks it.

Below the run itself, so that a step takes milliseconds: `save_checkpoint`, `prune_checkpoints`, `sweep` and
`newest_checkpoint` on a real adapter.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from hypothesis import strategies
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from faults.subject import KEEP
from faults.trial import fail_at, in_fork, kill_at, with_fault
from lorasft.errors import CapacityError, ModelError
from lorasft.files import sweep
from lorasft.recipe import ModelSettings
from lorasft.train.checkpoint import (
    list_checkpoints,
    newest_checkpoint,
    prune_checkpoints,
    read_state,
    save_checkpoint,
)
from lorasft.train.state import Layout, Learner, State

RUN = "ours"
EFFECTS = strategies.integers(min_value=1, max_value=45)  # of a save with its retention


def state_machine(learner: Learner, base: ModelSettings) -> type[RuleBasedStateMachine]:
    """The machine over one learner, whose weights do not matter here."""
    layout = Layout(dtype="bfloat16", micro_batch_tokens=64, recomputed_layers=0, segments=True)

    class Checkpoints(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.folder = Path(tempfile.mkdtemp()) / "checkpoints"
            self.step = 0
            self.whole: set[int] = set()  # steps of ours that are there and whole, as far as we know
            self.strangers: set[Path] = set()

        def teardown(self) -> None:
            shutil.rmtree(self.folder.parent)

        def ours(self) -> set[int]:
            found = set()
            for path in list_checkpoints(self.folder):
                with contextlib.suppress(ModelError):
                    found.add(read_state(path, run=RUN).step)
            return found

        def save_and_retain(self) -> None:
            """What a run does to its checkpoints at a step."""
            state = State(step=self.step, data="key", metrics_bytes=0, layout=layout, run=RUN)
            save_checkpoint(self.folder, state, learner, base=base)
            prune_checkpoints(self.folder, run=RUN, keep=KEEP, best_step=None)

        def meet(self, act: Callable[[], object]) -> None:
            """What was promised before is still there after a save that met a fault."""
            self.step += 1
            before = self.whole
            act()
            sweep(self.folder)
            self.whole = self.ours()
            assert len(self.whole) >= min(KEEP, len(before)) and self.whole >= set(sorted(before)[1 - KEEP :])

        @rule()
        def save(self) -> None:
            self.meet(self.save_and_retain)
            assert self.step in self.whole

        @rule(number=EFFECTS, moment=strategies.sampled_from(("before", "half", "after")))
        def die_in_a_save(self, number: int, moment: str) -> None:
            def die() -> None:
                with with_fault(kill_at(number, moment=moment)):
                    self.save_and_retain()

            self.meet(lambda: in_fork(die))

        @rule(number=EFFECTS)
        def meet_a_full_disk(self, number: int) -> None:
            def fail() -> None:
                with with_fault(fail_at(number, for_good=True)), contextlib.suppress(CapacityError):
                    self.save_and_retain()

            self.meet(fail)

        @rule(choice=strategies.integers(0, 10), name=strategies.sampled_from(("state.json", "optimizer.safetensors")))
        def damage(self, choice: int, name: str) -> None:
            paths = [path for path in list_checkpoints(self.folder) if path not in self.strangers]
            if len(self.whole) > 1 and paths:
                path = paths[choice % len(paths)] / name
                path.write_bytes(path.read_bytes()[:-1])
                self.whole = self.ours()

        @rule(ahead=strategies.integers(1, 9))
        def copy(self, ahead: int) -> None:
            paths = [path for path in list_checkpoints(self.folder) if path not in self.strangers]
            target = self.folder / f"step-{self.step + ahead:06d}"
            if paths and not target.exists():
                self.strangers.add(Path(shutil.copytree(paths[-1], target)))

        @rule(choice=strategies.integers(0, 10))
        def touch(self, choice: int) -> None:
            paths = list_checkpoints(self.folder)
            if paths:
                os.utime(paths[choice % len(paths)], (choice, choice))

        @invariant()
        def the_newest_whole_one_is_found(self) -> None:
            if self.whole:
                assert newest_checkpoint(self.folder, run=RUN)[1].step == max(self.whole)

        @invariant()
        def strangers_are_still_there(self) -> None:
            for path in self.strangers:
                assert path.exists() or list(path.parent.glob(f"{path.name}.aside-*"))

    return Checkpoints
