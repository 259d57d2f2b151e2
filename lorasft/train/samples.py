"""Answers sampled while a run goes: what it says to a few held-out prompts, beside what the data has there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter

from lorasft.data.store import TokenStore
from lorasft.data.tokens import supervised_runs
from lorasft.errors import first_line
from lorasft.files import replace_file
from lorasft.model.generate import generate
from lorasft.signals import StopRequest
from lorasft.terminal import say, shorten
from lorasft.train.state import Run, State

_PROMPTS = 3
_MOST_TOKENS = 48  # of an answer


@dataclass(frozen=True)
class Sample:
    """What was said to the prompt at `place` (file:line) after a step; step 0 is the base."""

    step: int
    place: str
    prompt: str
    expected: str
    answer: str
    ended: bool  # by itself


def take_samples(run: Run, state: State, stop: StopRequest) -> None:
    """After an evaluation that `run.sample_every` names, the first or the last: answer the prompts, note and show it,
    unless a signal comes. What goes wrong here never reaches the run."""
    settings, held_out, step, progress = run.recipe.run, run.inputs.prepared.held_out, state.step, run.metrics.progress
    if settings.sample_every is None or held_out is None or state.evaluation_due or not run.ranks.is_main:
        return
    every = settings.sample_every * (settings.eval_every or run.plan.steps)
    if step % every and step < run.plan.steps:
        return
    try:
        with progress.interlude("answering"), nullcontext() if step else run.model.disable_adapter():
            new = [_answer(run, step, held_out, at) for at in range(len(held_out))[:_PROMPTS] if not stop.received]
        keep_samples(run.folder, until=step - 1, more=new)
    except Exception as error:
        say(f"no answers after step {step}: {first_line(error)}")
        return
    if progress.live and new:
        first = new[0]
        if step == 0:
            say(f"   asked  {shorten(first.prompt.strip()[-66:], most=66)}")
            say(f"  wanted  {shorten(first.expected, most=66)}")
        say(f"  answer  {shorten(first.answer, most=66)}")


def _answer(run: Run, step: int, held_out: TokenStore, example: int) -> Sample:
    """What is said to the prompt of the last answer of a held-out example."""
    tokenizer, stops, tokens = run.inputs.tokenizer, run.inputs.prepared.stop_ids, held_out.sequences(example)[-1]
    start, end = supervised_runs(tokens)[-1]
    prompt, expected = tokens.ids[:start].tolist(), tokens.ids[start:end].tolist()
    ((answer, ended),) = generate(run.network.causal, tokenizer, [prompt], max_new_tokens=_MOST_TOKENS, stops=stops)
    asked, wanted, said = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, expected, answer))
    return Sample(step, str(held_out.place(example)), asked, wanted, said, ended)


def keep_samples(folder: Path, *, until: int, more: Sequence[Sample] = ()) -> list[Sample]:
    """What `answers.jsonl` of a run holds until a step, and `more`: from here on nothing else."""
    path, found = folder / "answers.jsonl", []
    with suppress(OSError, ValueError):
        found = [TypeAdapter(Sample).validate_json(line, strict=True) for line in path.read_bytes().splitlines()]
    kept = [*(sample for sample in found if sample.step <= until), *more]
    if kept != found:
        replace_file(path, "".join(json.dumps(asdict(sample)) + "\n" for sample in kept))
    return kept
