"""`lorasft doctor --crash`: kill a small run again and again on the disk of the user, and count what it survives."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from lorasft.errors import CapacityError
from lorasft.files import make_folder
from lorasft.terminal import say


def run(folder: str, *, trials: int, as_json: bool, seed: int = 0) -> None:
    """Try `trials` times in a new folder inside `folder`. Raises CapacityError when anything was lost or torn."""
    from lorasft.faults.kills import Tally, kill_randomly, open_bench

    place = Path(folder).resolve()  # the recipe of a run holds it: resumed, it has to read the same
    make_folder(place)
    total, started = Tally(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lorasft-crash-", dir=place) as inside:
        bench, reference = open_bench(Path(inside))
        for tally in kill_randomly(bench, reference, trials=trials, seed=seed):
            total.add(tally)
            say(f"{total.trials}/{trials}  {sum(total.kills.values())} kills", end="", over=True)
    say("")
    facts = {
        "trials": total.trials,
        "kills": sum(total.kills.values()),
        **{f"kills_in_{phase}": total.kills[phase] for phase in ("save", "retain", "resume")},
        "torn_checkpoints": total.torn,
        "most_steps_lost": total.lost,
        "bit_identical": total.identical,
        "failures_below": total.bound if not total.wrong else None,
        "seconds": round(time.monotonic() - started),
    }
    print(json.dumps(facts) if as_json else "\n".join(_line(name, value) for name, value in facts.items()))
    if total.wrong:
        what = f"{len(total.wrong)} promises broken on this disk: {total.wrong[0]}"
        raise CapacityError(what, where=folder, hint="put run.output on a local disk, and report this")


def _line(name: str, value: Any) -> str:
    shown = f"{value:.2%} (95 % confidence)" if isinstance(value, float) else value
    return f"{name.replace('_', ' '):18} {shown}"
