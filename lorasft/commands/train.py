"""`lorasft train`: run a recipe, then show answers before and after."""

from __future__ import annotations

import time
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from lorasft.commands.arguments import add_recipe
from lorasft.errors import Stopped
from lorasft.terminal import say

if TYPE_CHECKING:
    from lorasft.train.run import Opened


def add_arguments(parser: ArgumentParser) -> None:
    """What `lorasft train` takes."""
    add_recipe(parser)
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint of run.output")


def run(recipe: str, overrides: Sequence[str], resume: bool) -> None:
    """Train `recipe`; progress on stderr, the run folder on stdout."""
    from lorasft.recipe import load_recipe
    from lorasft.signals import save_signal_ignored
    from lorasft.train.ranks import join

    with save_signal_ignored(), join() as ranks:
        settings = ranks.lead(lambda: load_recipe(recipe, overrides))
        from lorasft.train.loop import train
        from lorasft.train.run import finish, open_run

        started = time.monotonic()
        with _saying_what_is_saved(settings.run.output), open_run(settings, resume=resume, ranks=ranks) as opened:
            if ranks.is_main:
                _introduce(opened)
            state = train(opened.run, opened.state)
            with ranks.agreed():
                adapter = finish(opened, state) if ranks.is_main else None
            if ranks.is_main:
                _show_answers_within_memory(opened)
                say(f"done in {time.monotonic() - started:.0f} s; adapter in {adapter}")
                say(f"next: lorasft chat {settings.run.output}    lorasft merge {settings.run.output} --out merged")
                print(settings.run.output)


@contextmanager
def _saying_what_is_saved(output: str) -> Iterator[None]:
    """Where a signal ends the run at once: before the first step, after the last, or for the second time."""
    from lorasft.signals import Ended

    try:
        yield
    except Ended as signalled:
        from lorasft.train.checkpoint import list_checkpoints

        folder, code = Path(output), signalled.exit_code
        saved = list_checkpoints(folder / "checkpoints")
        if (folder / "adapter").is_dir():
            raise Stopped(code, f"stopped; the adapter is whole: {folder / 'adapter'}", hint=None) from None
        if not saved or not (folder / "recipe.yaml").is_file():
            raise Stopped(code, "stopped before the first step", hint="start it again") from None
        step = int(saved[-1].name.removeprefix("step-"))
        raise Stopped(code, f"stopped at once, not saved since step {step}") from None


def _introduce(opened: Opened) -> None:
    """What was found and made ready, before the first step."""
    report, plan = opened.prepared.report, opened.run.plan
    for note in (*opened.notes, report.key_warning()):
        if note:
            say(note)
    say(
        f"{report.train_examples:,} examples, {report.held_out_examples:,} held out, {report.tokens:,} tokens, "
        f"{report.supervised_tokens:,} of them learned; {plan.steps} steps of {plan.batch_size} examples"
    )


def _show_answers_within_memory(opened: Opened) -> None:
    """The result is written: memory that runs out here takes nothing from it."""
    from lorasft.model.free_memory import out_of_memory

    try:
        _show_answers(opened)
    except (RuntimeError, MemoryError) as fault:
        if not out_of_memory(fault):
            raise
        say("out of memory: no more answers are shown")


def _show_answers(opened: Opened, most: int = 3) -> None:
    """Up to three held-out prompts, answered by the base and by the adapter."""
    from lorasft.data.chat import Encoder
    from lorasft.data.report import Report
    from lorasft.model.generate import generate
    from lorasft.recipe_faults import printable

    run, tokenizer = opened.run, opened.tokenizer
    encoder = Encoder(tokenizer, run.recipe.chat, data=run.recipe.data, report=Report())
    for example in opened.prepared.samples[:most]:
        prompt = encoder.prompt_ids(example.messages[:-1], example.tools)
        say(f"\nprompt: {printable(str(example.messages[-2]['content']))[:200]}")
        for name, context in (("before", run.learner.model.disable_adapter()), ("after", nullcontext())):
            with context:
                ids = generate(run.network.causal, tokenizer, prompt, max_new_tokens=48, stops=encoder.stop_ids)
            say(f"{name:>6}: {printable(tokenizer.decode(ids, skip_special_tokens=True))}")
