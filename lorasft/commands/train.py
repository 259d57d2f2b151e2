"""`lorasft train`: run a recipe, then show answers before and after."""

from __future__ import annotations

import shlex
import time
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from lorasft.commands.arguments import add_recipe
from lorasft.errors import Stopped
from lorasft.terminal import quote, say, shorten

if TYPE_CHECKING:
    from lorasft.train.state import Run

_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank takes


def add_arguments(parser: ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint of run.output")


def run(recipe: str, overrides: Sequence[str], resume: bool) -> None:
    """Train `recipe`; progress on stderr, the run folder on stdout."""
    from lorasft.recipe.load import load_recipe
    from lorasft.train.distributed import join

    with join() as ranks:
        settings = ranks.on_main(lambda: load_recipe(recipe, overrides))
        from lorasft.train.loop import train
        from lorasft.train.run import export_adapter, open_run

        started, output = time.monotonic(), settings.run.output
        with _saying_what_is_saved(Path(output)), open_run(settings, resume=resume, ranks=ranks) as (ready, state):
            report, plan = ready.inputs.prepared.report, ready.plan
            if ranks.is_main:
                say(
                    f"{report.train_examples:,} examples, {report.held_out_examples:,} held out, "
                    f"{report.tokens:,} tokens, {report.supervised_tokens:,} of them supervised; "
                    f"{plan.steps} steps of {plan.batch_size} examples"
                )
            state = train(ready, state)
            adapter = ranks.on_main(lambda: export_adapter(ready, state))
            if ranks.is_main:
                _show_answers(ready)
                say(f"done in {time.monotonic() - started:.0f} s; adapter in {adapter}")
                say(f"next: lorasft chat {quote(output)}    lorasft merge {quote(output)} --out merged")
                say(f"or serve the adapter: {_serve_command(ready, adapter)}")
                print(output)


def _serve_command(ready: Run, adapter: Path) -> str:
    """vLLM's for the adapter on its base, from which it would take template, stops and, for ranks over 16, an error."""
    settings, model = ready.inputs.adapter, ready.recipe.model
    rank = next((most for most in _VLLM_RANKS if most >= settings.rank), None)
    if rank is None or settings.dora or settings.modules_to_save or model.new_tokens:
        return "vLLM takes none of this kind, merge it"
    words: list[object] = ["vllm", "serve", model.base, *(["--revision", model.revision] if model.revision else [])]
    words += ["--enable-lora", "--lora-modules", f"mine={adapter}", "--max-lora-rank", rank]
    words += ["--chat-template", adapter / "chat_template.jinja", "--generation-config", adapter]
    four_bit = "\n(on the 16-bit base it answers a little otherwise than on the 4-bit one: merge says by how much)"
    return shlex.join(map(str, words)) + four_bit * (model.quantization == "nf4")


@contextmanager
def _saying_what_is_saved(folder: Path) -> Iterator[None]:
    """Where a signal ends the run at once: before the first step, after the last, or for the second time."""
    from lorasft.signals import Ended, exit_code
    from lorasft.train.checkpoint import list_checkpoints

    try:
        yield
    except Ended as signalled:
        what, hint = "stopped before the first step", "start it again"
        if (folder / "adapter").is_dir():
            what, hint = f"stopped; the adapter is whole: {folder / 'adapter'}", ""
        elif saved := list_checkpoints(folder / "checkpoints"):
            what = f"stopped at once, not saved since step {int(saved[-1].name.removeprefix('step-'))}"
            hint = "continue with --resume"
        raise Stopped(exit_code(signalled.args[0]), what, hint=hint) from None


def _show_answers(ready: Run) -> None:
    """Up to three held-out prompts, answered by the base and by the adapter. To run out of memory here is no error."""
    from lorasft.data.tokens import supervised_runs
    from lorasft.model.free_memory import out_of_memory
    from lorasft.model.generate import generate

    tokenizer, prepared, held_out = ready.inputs.tokenizer, ready.inputs.prepared, ready.inputs.prepared.held_out
    if held_out is None:
        return
    try:
        for example in range(len(held_out))[:3]:
            tokens = held_out.sequences(example)[-1]
            prompt = tokens.ids[: supervised_runs(tokens)[-1, 0]].tolist()
            say(f"\nprompt: {shorten(tokenizer.decode(prompt, skip_special_tokens=True)[-80:])}")
            for name, context in (("before", ready.model.disable_adapter()), ("after", nullcontext())):
                with context:
                    given = generate(
                        ready.network.causal, tokenizer, [prompt], max_new_tokens=48, stops=prepared.stop_ids
                    )
                say(f"{name:>6}: {shorten(tokenizer.decode(given[0][0], skip_special_tokens=True))}")
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        say("out of memory: no more answers are shown")
