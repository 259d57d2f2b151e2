"""lorasft fine-tunes a language model: 4-bit base, LoRA adapters, masked-label SFT, and a merge into full weights."""

# The verbs and their options. A command is imported only when it runs, so that `--help` answers at once.

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from errno import ENAMETOOLONG
from typing import Any, NoReturn

from lorasft import __version__
from lorasft.errors import LorasftError, RecipeError
from lorasft.signals import Ended, end_at_once, ended_in_order
from lorasft.terminal import say

EXIT_CODES = """exit codes: 0 done; 1 a bug; 2 usage or recipe; 3 data; 4 model, adapter or checkpoint files; 5 device;
6 memory or disk; 7 the training diverged; 8 refused for safety; 130/143 stopped by a signal, saved"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the command line as all faults are said, with the nearest name that there is."""
        wrong, _, known = message.partition(" (choose from ")
        names = re.findall(r"[\w-]+", known) or list(self._option_string_actions)
        words = re.findall(r"[\w-]+", wrong.rpartition(": ")[2]) or [""]
        near = get_close_matches(words[0], names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(names)}" if known else f"{self.prog} --help"
        raise RecipeError(wrong, hint=hint)


def make_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = _Parser(prog="lorasft", description=__doc__, epilog=EXIT_CODES)
    top.add_argument("--version", action="version", version=f"lorasft {__version__}")
    verbs = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    train = verbs.add_parser("train", help="train an adapter as a recipe says")
    _add_recipe(train)
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of run.output")

    preview = verbs.add_parser("preview", help="show what will be learned, token by token")
    _add_recipe(preview)
    preview.add_argument("--rows", type=_positive, metavar="N", help="examples to show (default: 3; with --html 1000)")
    preview.add_argument("--json", action="store_true", help="every example and a summary as JSON lines")
    preview.add_argument("--html", metavar="FILE", help="write a page to search instead")

    plan = verbs.add_parser("plan", help="will it fit, how will it be run, how long will it take; reads no weights")
    _add_recipe(plan)
    plan.add_argument("--memory", type=_bytes, metavar="SIZE", help="8GiB, 24GB, ... (default: what is free here)")
    plan.add_argument("--json", action="store_true", help="the plan as JSON")

    evaluate = verbs.add_parser("evaluate", help="log-probabilities of answers: base and adapter side by side")
    _add_saved(evaluate)
    evaluate.add_argument("--data", required=True, metavar="FILE", help="rows of any shape that a recipe takes")
    _add_columns(evaluate)
    evaluate.add_argument("--per-example", metavar="OUT", help="write one JSON object for each answer to OUT")
    evaluate.add_argument("--json", action="store_true", help="the totals as JSON")

    chat = verbs.add_parser("chat", help="talk to a run, an adapter or a model")
    _add_saved(chat)
    chat.add_argument("--prompt", metavar="TEXT", help="answer this and stop")
    chat.add_argument("--max-new-tokens", type=_positive, default=512, metavar="N", help="default: 512")
    chat.add_argument(
        "--temperature", type=_not_negative, default=0.0, metavar="T", help="0 (default): always the likeliest"
    )

    merge = verbs.add_parser("merge", help="fold an adapter (of a run, or a folder) into full weights")
    _add_saved(merge)
    merge.add_argument("--out", required=True, metavar="DIR", help="a folder that does not exist yet")
    merge.add_argument(
        "--onto",
        choices=["auto", "original", "dequantized"],
        default="auto",
        help="the base's own weights, those that NF4 made of them, or what held-out rows speak for (default)",
    )
    merge.add_argument("--quantize", choices=["nf4"], help="write a 4-bit checkpoint instead of full weights")
    merge.add_argument("--data", metavar="FILE", help="rows to compare answers on (default: held out in the run)")
    _add_columns(merge)
    merge.add_argument("--no-check", action="store_true", help="compare no answers; onto auto is then the original")
    merge.add_argument("--force-base", action="store_true", help="take a base that the run was not trained on")
    merge.add_argument("--json", action="store_true", help="what was done as JSON")

    export = verbs.add_parser("export", help="write a model as GGUF, or as a folder for Ollama")
    export.add_argument("model", metavar="RUN|DIR", help="a run or an adapter, merged first, or a model folder")
    export.add_argument("--to", choices=["gguf", "ollama"], required=True, help="a GGUF file, or that with a Modelfile")
    export.add_argument("--out", required=True, metavar="FILE", help="a file, or for ollama a folder, not there yet")
    export.add_argument("--type", choices=["f16", "q8_0"], default="f16", help="of the matrices (default: f16)")
    export.add_argument("--json", action="store_true", help="what was done as JSON")

    recipes = verbs.add_parser("recipes", help="list, show or copy the shipped recipes")
    recipes.add_argument("action", nargs="?", default="list", choices=["list", "show", "copy", "schema"])
    recipes.add_argument("name", nargs="?", help="of a shipped recipe")
    recipes.add_argument("to", nargs="?", help="file to copy to (default: ./NAME.yaml)")
    recipes.add_argument("--json", action="store_true", help="the list as JSON")

    doctor = verbs.add_parser("doctor", help="is this machine fit to train? also what a bug report needs")
    doctor.add_argument("--hub", action="store_true", help="ask the hub as well whether it can be reached")
    doctor.add_argument("--json", action="store_true", help="what was found as JSON")
    for verb in verbs.choices.values():
        verb.set_defaults(parser=verb)
    return top


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number above 0")
    return int(text)


def _not_negative(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number from 0 up")
    return number


def _bytes(text: str) -> int:
    match = re.fullmatch(r"([0-9.]+) *(?:([KMGT])(i?)B?)?", text, re.IGNORECASE)
    try:
        number, unit, binary = float(match[1]), (match[2] or "").upper(), match[3]  # type: ignore[index]
    except (TypeError, ValueError):
        number = -1.0
    if not 0 < number < 1e15:
        raise argparse.ArgumentTypeError(f"{text[:80]} is no size like 8GiB or 24GB")
    if not unit and number < 2**20:
        raise argparse.ArgumentTypeError(f"{text} is {text} bytes: give a unit, as in {text}GiB")
    return int(number * (1024 if binary else 1000) ** ("KMGT".index(unit) + 1 if unit else 0))


def _add_recipe(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
    verb.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="for example train.epochs=3"
    )


def _add_saved(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("saved", metavar="RUN|ADAPTER|MODEL", help="a run folder, an adapter folder, or a model")
    verb.add_argument(
        "--base", metavar="MODEL", help="the adapter's base, if it lies elsewhere than where it was trained"
    )


def _add_columns(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--columns", metavar="MAPPING", help="of --data: '{prompt: question, completion: answer}', as in a recipe"
    )


def entry() -> NoReturn:
    """The process of the command line, from its first signal to its last."""
    end_at_once()
    sys.exit(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code; an error that the user can mend is printed, never a traceback."""
    # Threads that spin long while they wait slow a run down twentyfold when another process wants the cores; a short
    # spin costs nothing on a quiet machine. Read by libgomp when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        with ended_in_order():
            options = _parse(argv)
            command = importlib.import_module(f"lorasft.commands.{options.pop('command')}")
            command.run(**options)
    except LorasftError as fault:
        say(str(fault))
        return fault.exit_code
    except Ended as signalled:
        say("stopped")
        return signalled.exit_code
    except BrokenPipeError:  # the reader of stdout went away: nothing is lost
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as fault:
        if fault.errno != ENAMETOOLONG:
            raise
        say(str(RecipeError("a name that is too long for a file", where=str(fault.filename)[:200], hint="shorten it")))
        return RecipeError.exit_code
    return 0


def _parse(argv: Sequence[str] | None) -> dict[str, Any]:
    """The options of the command; overrides may also stand behind options, where argparse does not look for them."""
    given, rest = make_parser().parse_known_args(argv)
    options = vars(given)
    parser = options.pop("parser")
    for word in rest:
        if "overrides" not in options or word.startswith("-"):
            parser.error(f"unrecognized arguments: {word}")
        options["overrides"].append(word)
    if "json" in options:
        options["as_json"] = options.pop("json")
    return options
