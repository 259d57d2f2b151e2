"""The campaigns from the command line; `campaigns.py` tells what they are."""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch

from faults import campaigns
from faults.campaigns import CAMPAIGNS, Ring, run_campaign
from faults.kills import Tally, open_bench

HEAD = (
    "| campaign | trials | kills in start, save, retention, resume, all | torn | steps lost, at most "
    "| bit-identical | failures below (95 %) | s a trial |"
)


def row(name: str, tally: Tally, seconds: float) -> str:
    kills = [tally.kills[phase] for phase in ("start", "save", "retain", "resume")]
    hits = " ".join(map(str, [*kills, sum(tally.kills.values())])) if tally.kills else "-"
    bound = f"{100 * tally.bound:.2g} %" if not tally.wrong else f"{len(tally.wrong)} WRONG"
    cells = [name, tally.trials, hits, tally.torn, tally.lost, f"{tally.identical} of {tally.trials}", bound]
    return f"| {' | '.join(map(str, cells))} | {seconds / max(1, tally.trials):.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=campaigns.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--only", default=",".join(CAMPAIGNS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", type=Path, help="on the disk to be tried; default: the system's temporary folder")
    parser.add_argument("--out", type=Path, help="a Markdown file for the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [HEAD, "|" + "---|" * (HEAD.count("|") - 1)]
    print("\n".join(lines))
    failed = False
    with tempfile.TemporaryDirectory(prefix="lorasft-faults-", dir=options.dir) as place:
        bench, reference = open_bench(Path(place))
        for name in options.only.split(","):
            started = time.monotonic()
            tally = run_campaign(name, Ring(bench, reference, options.trials, options.seed))
            lines.append(row(name, tally, time.monotonic() - started))
            print(lines[-1], flush=True)
            for reason in tally.wrong:
                print(f"    {reason}", file=sys.stderr)
            failed = failed or bool(tally.wrong)
    if options.out:
        about = f"{datetime.date.today()}, {platform.system()} {platform.release()}, torch {torch.__version__}"
        text = "\n".join(["# Fault campaigns", "", f"`python {' '.join(sys.argv)}`, {about}.", "", *lines, ""])
        options.out.write_text(text, encoding="utf-8")
    sys.exit(failed)


if __name__ == "__main__":
    main()
