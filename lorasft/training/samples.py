"""What a run notes of single rows: answers to a few held-out prompts, beside what the data has there, and losses."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lorasft.data.packing import MicroBatch
from lorasft.data.store import UNSUPERVISED, TokenStore, supervised_runs
from lorasft.errors import first_line
from lorasft.files import read_objects, replace_file
from lorasft.model.scoring import generate, score_batches
from lorasft.signals import StopRequest
from lorasft.terminal import say, shorten
from lorasft.training.distributed import ALONE
from lorasft.training.state import Run, State

Ledger = dict[str, dict[str, Any]]  # lines of rows.jsonl, by split and place
_PROMPTS = 3
_MOST_TOKENS = 48  # of an answer
_MOST_ROWS = 256  # of those that were trained on
_SHARE = 0.02  # of the time of all steps, for their losses


def take_samples(run: Run, state: State, stop: StopRequest) -> None:
    """After an evaluation that `run.sample_every` names, or the last: answer the prompts, note and show it, unless a
    signal comes; the first time as the base, too. What goes wrong here never reaches the run."""
    settings, held_out, step, progress = run.recipe.run, run.inputs.prepared.held_out, state.step, run.metrics.progress
    ranks = run.ranks if run.ranks.in_step else ALONE  # who must pass through the model with this process
    if settings.sample_every is None or held_out is None or state.evaluation_due or step == 0:
        return  # a person waits for the first step
    every = settings.sample_every * (settings.eval_every or run.plan.steps)
    if (step % every and step < run.plan.steps) or not (run.ranks.is_main or run.ranks.in_step):
        return
    try:
        kept, new = ranks.on_main(lambda: keep_samples(run.folder, until=step - 1)), list[dict[str, Any]]()
        base = all(line["step"] for line in kept)
        with progress.interlude("answering"):
            for after in (0, step)[not base :]:
                with nullcontext() if after else run.model.disable_adapter():
                    numbers = (one for one in range(len(held_out))[:_PROMPTS] if not any(ranks.gather(stop.received)))
                    new += [_answer(run, after, held_out, one) for one in numbers]
        if not any(ranks.gather(stop.received)):  # else the next evaluation asks all of them
            ranks.on_main(lambda: keep_samples(run.folder, until=step - 1, more=new))
    except Exception as error:
        if ranks.count > 1:  # the others wait in it
            raise
        say(f"no answers after step {step}: {first_line(error)}")
        return
    if progress.live and base and new:
        say(f"   asked  {shorten(new[0]['prompt'].strip()[-66:], most=66)}")
        say(f"  wanted  {shorten(new[0]['expected'], most=66)}")
        say(f"    base  {shorten(new[0]['answer'], most=66)}")
    for line in [line for line in new if line["step"] == step][: progress.live]:
        say(f"  answer  {shorten(line['answer'], most=66)}")


def _answer(run: Run, step: int, held_out: TokenStore, example: int) -> dict[str, Any]:
    """What is said to the prompt of the last answer of a held-out example; step 0 is the base. `ended`: by itself;
    `ends`: in the data, with a stop, within as many tokens."""
    tokenizer, stops, tokens = run.inputs.tokenizer, run.inputs.prepared.stop_ids, held_out.sequences(example)[-1]
    start, end = supervised_runs(tokens)[-1]
    prompt, expected = tokens.ids[:start].tolist(), tokens.ids[start:end].tolist()
    ((answer, ended),) = generate(run.network.causal, tokenizer, [prompt], max_new_tokens=_MOST_TOKENS, stops=stops)
    texts = {"prompt": prompt, "expected": expected, "answer": answer}
    line = {name: tokenizer.decode(ids, skip_special_tokens=True) for name, ids in texts.items()}
    ends = expected[-1] in stops and len(expected) <= _MOST_TOKENS
    return {"step": step, "place": str(held_out.place(example)), **line, "ended": ended, "ends": ends}


def keep_samples(folder: Path, *, until: int, more: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """What `answers.jsonl` of a run holds until a step, and `more`: from here on nothing else."""
    path = folder / "answers.jsonl"
    found = [line for line in read_objects(path) if "step" in line]
    kept = [*(line for line in found if line["step"] <= until), *more]
    if kept != found:
        replace_file(path, "".join(json.dumps(line) + "\n" for line in kept))
    return kept


@contextmanager
def open_ledger(folder: Path, *, until: float = math.inf) -> Iterator[Ledger]:
    """What a run's rows.jsonl holds, to be added to; of that the losses until a step are written back. What goes wrong
    within never reaches the run."""
    lines = (line for line in read_objects(folder / "rows.jsonl") if "losses" in line)
    ledger = {f"{line.get('split')} {line.get('place')}": line for line in lines}
    try:
        yield ledger
        for line in ledger.values():
            line["losses"] = {name: one for name, one in line["losses"].items() if one[0] <= until}
        if ledger:
            replace_file(folder / "rows.jsonl", "".join(json.dumps(line) + "\n" for line in ledger.values()))
    except Exception as error:
        say(f"rows.jsonl stays as it was: {first_line(error)}")


def note_held_out(run: Run, rows: TokenStore, losses: Sequence[float], state: State) -> None:
    """Note the mean loss of every held-out row as the last, and as the base's and the best where they are."""
    names = ["base"] * (state.step == 0) + ["best"] * (state.step == state.best_step) + ["last"]
    with open_ledger(run.folder) as ledger:
        for number, loss in enumerate(losses):
            _note(run, ledger, rows, number, dict.fromkeys(names, (state.step, loss)))


def add_losses(sums: NDArray[np.float64], batch: MicroBatch, losses: Tensor) -> None:
    """Add the losses of the pairs of `batch` to those of its examples, in `sums`: (2, examples), and their counts."""
    for own, numbers in zip(sums, (losses.double().cpu().numpy(), None), strict=True):
        own += np.bincount(batch.examples, numbers, minlength=len(own))


def average_by_source(sums: NDArray[np.float64], numbers: NDArray[np.int64], names: Sequence[str]) -> dict[str, float]:
    """The loss a token of each source that has rows, by name, if there are several. `sums`: see `add_losses`;
    `numbers`: (examples,) indices into `names`."""
    found = [np.bincount(numbers, own, minlength=len(names)).tolist() for own in sums]
    averages = {name: loss / count for name, loss, count in zip(names, *found, strict=True) if count}
    return averages if len(averages) > 1 else {}


def score_trained_rows(run: Run, step: int, names: Sequence[str], stop: StopRequest) -> None:
    """Note the mean losses of some rows that were trained on: after `step` under `names`, and with the last the base's.
    The first process takes a few at once, for a share of the time that the steps took or until a signal comes."""
    plan, passes = run.plan, [(names, step), (["base"], 0)][: 1 + ("last" in names)]
    if not run.ranks.is_main or run.ranks.in_step:  # the others would have to know what there is time for
        return
    score = partial(score_batches, run.network, capacity=plan.micro_batch_tokens)
    with open_ledger(run.folder) as ledger, run.metrics.progress.interlude("scoring rows"):
        lines = [line for line in read_objects(run.folder / "metrics.jsonl") if {"seconds", "tokens"} <= line.keys()]
        seconds, tokens = (sum(line[name] for line in lines) for name in ("seconds", "tokens"))
        limit, spent, done = _SHARE * seconds * len(passes) / (2 + run.recipe.run.keep_best), 0.0, 0
        order = [*dict.fromkeys(plan.order(0).tolist())][:_MOST_ROWS]
        at_once = max(1, min(16, int(_SHARE / 2 * plan.steps * plan.batch_size)))
        for group in (order[start : start + at_once] for start in range(0, len(order), at_once)):
            sequences, started = [*map(run.rows.sequences, group)], time.monotonic()
            size = sum(len(one) for own in sequences for one in own)
            rate = spent / done if done else seconds / tokens  # a step's tokens pass forwards and backwards
            if stop.received or spent + rate * size > limit:
                break
            for given, after in passes:
                sums = np.zeros((2, len(group)))
                with nullcontext() if after else run.model.disable_adapter():
                    for scored in score(sequences.__getitem__, range(len(group))):
                        add_losses(sums, *scored)
                for row, loss in zip(group, sums[0] / sums[1], strict=True):
                    _note(run, ledger, run.rows, row, dict.fromkeys(given, (after, loss)))
            spent, done = spent + time.monotonic() - started, done + size


def _note(run: Run, ledger: Ledger, rows: TokenStore, number: int, losses: Mapping[str, tuple[int, float]]) -> None:
    split, place = "train" if rows is run.rows else "held out", str(rows.place(number))
    if f"{split} {place}" not in ledger:
        ids = np.concatenate([one.labels[one.labels != UNSUPERVISED] for one in rows.sequences(number)])
        text = run.inputs.tokenizer.decode(ids[:_MOST_TOKENS], skip_special_tokens=True)
        ledger[f"{split} {place}"] = {"place": place, "split": split, "tokens": len(ids), "text": text, "losses": {}}
    ledger[f"{split} {place}"]["losses"] |= losses
