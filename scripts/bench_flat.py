"""Whether a supervised token costs the same with many rows and with long ones: lorasft alone, on the CPU.

    python scripts/bench_flat.py [--tokenizer FOLDER] [--shape tiny] [--rounds 3] [--steps 6] [--write]

Two tables over synthetic rows, half of whose tokens are learned, all of one length; every figure is the median of
`--rounds` interleaved runs, each in a process of its own, through the real preparation, plan and step.

    rows     1 thousand to 100 thousand rows of 128 tokens: preparing them, planning an epoch, training a few steps
    length   64 to 2048 tokens a row, the same number of tokens a step: attention grows with the length by its nature,
             so its time (of the kernels, by torch's profiler) is shown and the rest compared

`cost` is microseconds per supervised token, the median over the steps after the warm-up; `to first` and `rest to first`
compare with the first line. Memory is above what the process held after its imports.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench_shared import ROOT, SHAPES, make_base, peak, run_process, settle, table, write_section

WARMUP = 2  # steps: the first ones page the weights in
ROWS, ROW_LENGTH = (1_000, 10_000, 100_000), 128
LENGTHS, LENGTH_ROWS = (64, 128, 256, 512, 1024, 2048), 1_000
STEP_TOKENS = 4096
Measured = dict[str, float]


@dataclass(frozen=True)
class Case:
    """`rows` rows of `length` tokens, trained for `steps` steps of STEP_TOKENS tokens."""

    folder: str  # holds base/ and the rows of every case
    rows: int
    length: int
    steps: int

    @property
    def file(self) -> Path:
        return Path(self.folder) / f"{self.rows}-{self.length}.jsonl"


# ---- one case, in a process of its own ------------------------------------------------------------------------------


def run_case(case: Case) -> Measured:
    """Prepare, plan and train; seconds, tokens and bytes by name."""
    from lorasft.data.prepare import prepare
    from lorasft.data.tokenizer import load_tokenizer
    from lorasft.train.run import open_run

    rest = settle()
    recipe = make_recipe(case)
    tokenizer, tokens = load_tokenizer(recipe.model.base), Path(tempfile.mkdtemp(dir=case.folder))
    started = time.perf_counter()
    report = prepare(recipe.data, recipe.chat, tokenizer=tokenizer, folder=tokens / "tokens").report
    prepared = time.perf_counter() - started
    with open_run(recipe, resume=False) as opened:
        run = opened.run
        run.network.causal.train()
        started = time.perf_counter()
        run.plan.step(1, run.rows)
        planned = time.perf_counter() - started
        costs = [time_step(run, number) for number in range(1, case.steps + 1)]
        measured = {"cost": median(costs[WARMUP:]), "memory": peak() - rest, "attention": share_of_attention(run)}
    return measured | {
        "prepare": prepared / report.supervised_tokens,
        "plan": planned,
        "tokens": report.tokens / report.train_examples,
    }


def time_step(run: Any, number: int) -> float:
    """Seconds per supervised token of one step, its cutting included."""
    from lorasft.signals import StopRequest
    from lorasft.train.loop import take_step

    started = time.perf_counter()
    step = run.plan.step(number, run.rows)
    take_step(run, step, StopRequest())
    return (time.perf_counter() - started) / int(step.supervised_tokens)


def share_of_attention(run: Any) -> float:
    """The share of a further step that the attention kernels take, forward and backward."""
    from torch.profiler import ProfilerActivity, profile

    started = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        time_step(run, run.plan.steps)
        seconds = time.perf_counter() - started  # before the profiler sums up
    kernels = [event for event in watched.key_averages() if "scaled_dot_product" in event.key]
    return float(sum(event.self_cpu_time_total for event in kernels)) / 1e6 / seconds


def make_recipe(case: Case) -> Any:
    from lorasft.recipe import Recipe

    sections = {
        "model": {"base": f"{case.folder}/base", "dtype": "bfloat16"},
        "data": {"train": str(case.file), "eval": None, "max_length": max(LENGTHS)},
        "chat": {"template": "none"},
        "train": {"batch_size": STEP_TOKENS // case.length, "steps": case.steps + 1},
        "schedule": {"name": "constant", "warmup": 0},
        "run": {"output": tempfile.mkdtemp(dir=case.folder)},
    }
    return Recipe.model_validate(sections)


# ---- the rows -------------------------------------------------------------------------------------------------------


def write_rows(case: Case, words: list[str]) -> None:
    """Rows of random words, each one token; half of them prompt. A few are left for what begins and ends a row."""
    rng = random.Random(case.length)
    with open(case.file, "w", encoding="utf-8") as file:
        for _ in range(case.rows):
            prompt, completion = (" ".join(rng.choices(words, k=case.length // 2 - 2)) for _ in range(2))
            file.write(json.dumps({"prompt": prompt, "completion": f" {completion}"}) + "\n")


def single_words(folder: Path) -> list[str]:
    """Words that are one token with a space before them."""
    from lorasft.data.tokenizer import load_tokenizer

    tokens = load_tokenizer(str(folder)).get_vocab()
    return sorted(token[1:] for token in tokens if token[0] in "Ġ▁" and token[1:].isascii() and token[1:].isalpha())


# ---- the tables -----------------------------------------------------------------------------------------------------


def tell_rows(results: dict[Case, Measured]) -> str:
    first = next(iter(results.values()))
    head = ["rows", "prepare, us", "plan an epoch, ms", "cost, us", "to first", "MB"]
    return table(
        head,
        [
            [
                f"{case.rows:,}",
                f"{one['prepare'] * 1e6:.2f}",
                f"{one['plan'] * 1e3:.1f}",
                f"{one['cost'] * 1e6:,.0f}",
                f"{one['cost'] / first['cost']:.2f}",
                f"{one['memory'] / 1e6:,.0f}",
            ]
            for case, one in results.items()
        ],
    )


def tell_lengths(results: dict[Case, Measured]) -> str:
    def rest(one: Measured) -> float:
        return one["cost"] * (1 - one["attention"])

    first = next(iter(results.values()))
    head = ["tokens a row", "cost, us", "attention", "cost of the rest, us", "rest to first", "MB"]
    return table(
        head,
        [
            [
                f"{one['tokens']:,.0f}",
                f"{one['cost'] * 1e6:,.0f}",
                f"{one['attention']:.0%}",
                f"{rest(one) * 1e6:,.0f}",
                f"{rest(one) / rest(first):.2f}",
                f"{one['memory'] / 1e6:,.0f}",
            ]
            for one in results.values()
        ],
    )


def measure(cases: list[Case], rounds: int) -> tuple[dict[Case, Measured], float]:
    """The medians of every case, and how many cores other processes used at most."""
    runs: dict[Case, list[Measured]] = {case: [] for case in cases}
    busiest = 0.0
    for number, case in itertools.product(range(rounds), cases):
        said, foreign = run_process(sys.executable, [__file__, "--case", json.dumps(asdict(case))])
        runs[case].append(said)
        busiest = max(busiest, foreign)
        print(
            f"round {number + 1} {case.rows:8,} rows of {case.length:5,} tokens {said['cost'] * 1e6:6,.0f} us a token  "
            f"attention {said['attention']:4.0%}  other processes on {foreign:.1f} cores",
            flush=True,
        )
    return {case: {key: median(one[key] for one in many) for key in many[0]} for case, many in runs.items()}, busiest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "recipes" / "tiny" / "base", help="a folder")
    parser.add_argument("--shape", choices=list(SHAPES), default="tiny")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help=f"optimizer steps; the first {WARMUP} are not counted")
    parser.add_argument("--only", choices=["rows", "length"], help="one of the two tables")
    parser.add_argument("--write", action="store_true", help="the tables into docs/benchmarks.md")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run_case(Case(**json.loads(options.case)))))
        return
    tables: dict[str, tuple[list[tuple[int, int]], Callable[[dict[Case, Measured]], str]]] = {
        "rows": ([(count, ROW_LENGTH) for count in ROWS], tell_rows),
        "length": ([(LENGTH_ROWS, length) for length in LENGTHS], tell_lengths),
    }
    with tempfile.TemporaryDirectory() as folder:
        make_base(SHAPES[options.shape], options.tokenizer, folder=Path(folder) / "base")
        words = single_words(Path(folder) / "base")
        for name in [options.only] if options.only else tables:
            sizes, tell = tables[name]
            cases = [Case(folder, rows, length, options.steps) for rows, length in sizes]
            for case in cases:
                write_rows(case, words)
            results, busiest = measure(cases, options.rounds)
            print(f"\n{tell(results)}")
            if options.write:
                write_section(f"Cost by {name}, {options.shape}", tell(results), busiest=busiest)


if __name__ == "__main__":
    main()
