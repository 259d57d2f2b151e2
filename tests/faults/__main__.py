"""The campaigns from the command line, in the folder `tests`; see campaigns.py."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

from faults import campaigns, mutants
from faults.trial import Phase, open_bench

HEAD = (
    "| campaign | trials | kills in start, save, retention, resume, all | torn | steps lost, at most "
    "| bit-identical | failures below (95 %) | s a trial |"
)


def row(name: str, tally: campaigns.Tally, seconds: float) -> str:
    kills = [tally.kills[phase] for phase in (Phase.START, Phase.SAVE, Phase.RETAIN, Phase.RESUME)]
    hits = " ".join(map(str, [*kills, tally.kills.total()])) if tally.kills else "-"
    trials = max(1, len(tally))
    bound = f"{100 * (1 - 0.05 ** (1 / trials)):.2g} %" if not tally.wrong else f"{len(tally.wrong)} WRONG"
    cells = [name, trials, hits, tally.torn, tally.lost, f"{tally.identical} of {trials}", bound]
    return f"| {' | '.join(map(str, cells))} | {seconds / trials:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m faults", description=campaigns.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--only", default=",".join(campaigns.CAMPAIGNS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", type=Path, help="on the disk to be tried; default: the system's temporary folder")
    parser.add_argument("--mutants", action="store_true", help="instead: in which trial each mutant is caught, if ever")
    options = parser.parse_args()
    torch.set_num_threads(1)
    wrong: list[str] = []
    if options.dir:
        options.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="lorasft-faults-", dir=options.dir) as place:
        bench = open_bench(Path(place), trials=options.trials, seed=options.seed)
        if options.mutants:
            for name in mutants.MUTANTS:
                tally = mutants.catch(name, bench)
                wrong += [] if tally.wrong else [f"{name} was not caught"]
                print(f"| {name} | trial {len(tally)} | {tally.wrong[:1]} |", flush=True)
            sys.exit("\n".join(wrong))
        print(HEAD, "|" + "---|" * (HEAD.count("|") - 1), sep="\n")
        for name in options.only.split(","):
            started = time.monotonic()
            tally = campaigns.run_campaign(name, bench)
            print(row(name, tally, time.monotonic() - started), flush=True)
            wrong += tally.wrong
    sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
