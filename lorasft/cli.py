"""lorasft fine-tunes a language model: 4-bit base, LoRA adapters, masked-label SFT, and a merge into full weights."""

# Only the chosen command's file is imported, and the top of it imports nothing heavy, so that `--help` answers at once.

from __future__ import annotations

import argparse
import atexit
import importlib
import os
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from errno import ENAMETOOLONG
from os.path import expanduser
from typing import Any, NoReturn

from lorasft import __version__
from lorasft.commands.arguments import say_error, suggest
from lorasft.errors import LorasftError, RecipeError
from lorasft.signals import Ended, end_at_once, ended_in_order, exit_code
from lorasft.terminal import say

COMMANDS = {  # each is a file in commands/, which declares its own arguments
    "init": "a first recipe for a file of rows, with a model that fits",
    "train": "train an adapter as a recipe says",
    "sweep": "train with each combination of several values: key=1,2 other=3,4",
    "preview": "show what will be supervised, token by token",
    "plan": "will it fit, how will it be run, how long will it take; reads no weights",
    "evaluate": "log-probabilities of answers: base and adapter side by side",
    "chat": "talk to a run, an adapter or a model",
    "report": "the page of a run: curves, answers, data, memory; or several runs over each other",
    "merge": "fold an adapter (of a run, or a folder) into full weights",
    "export": "write a model as GGUF, or as a folder for Ollama",
    "push": "send an adapter or merged weights to the hub, with a model card",
    "recipes": "list, show or copy the shipped recipes",
    "doctor": "is this machine fit to train? also what a bug report needs",
}
EXIT_CODES = """exit codes: 0 done; 1 a bug; 2 usage or recipe; 3 data; 4 model, adapter or checkpoint files; 5 device;
6 memory or disk; 7 not finite, or nothing trained; 8 refused for safety; 130/143 stopped by a signal, saved"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the command line as all errors are said."""
        raise RecipeError(message, hint=f"{self.prog} --help")


def read_command_line(words: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The command, and the keyword arguments of its `run`. Raises RecipeError for what neither of them knows."""
    top = _Parser(prog="lorasft", description=__doc__, epilog=EXIT_CODES)
    top.add_argument("--version", action="version", version=f"lorasft {__version__}")
    verbs = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    parsers = {name: verbs.add_parser(name, help=about, description=about) for name, about in COMMANDS.items()}
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what may follow
        for name in parsers.keys() & os.environ["COMP_LINE"].split():
            importlib.import_module(f"lorasft.commands.{name}").add_arguments(parsers[name])
        importlib.import_module("argcomplete").autocomplete(top, False, default_completer=suggest)
    if not words:
        print(f"{__doc__}\n\na first command:  lorasft train tiny\nall commands:     lorasft --help")
        top.exit()
    command = top.parse_args(words[:1]).command
    importlib.import_module(f"lorasft.commands.{command}").add_arguments(parsers[command])
    options = vars(parsers[command].parse_intermixed_args(words[1:]))  # overrides may also stand after options
    for name in {"saved", "base", "model", "out"} & options.keys():
        options[name] = options[name] and expanduser(options[name])  # noqa: PTH111  a Path would lose ./
    return command, options


def entry() -> NoReturn:
    """The process of the command line, from its first signal to its last."""
    end_at_once()
    if sys.argv[1:2] == ["preview"]:  # tokenizers do without torch, but transformers imports it for them if it can
        sys.modules["torch"] = None  # type: ignore[assignment]
        os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # about that
    try:
        code = main()
    except SystemExit as end:  # ends as below: torch's threads may outlive what Python takes apart
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    with suppress(BrokenPipeError):  # the reader of stdout went away
        print(end="", flush=True)
    threading._shutdown()  # type: ignore[attr-defined]  # waits for them, as Python itself does
    atexit._run_exitfuncs()
    os._exit(code)  # the libraries made a million objects, which Python would take apart


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code; an error that the user can fix is printed, never a traceback."""
    # Threads that spin long while they wait slow a run down twentyfold when another process wants the cores; a short
    # spin costs nothing on a quiet machine. Read by libgomp when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        with ended_in_order():
            command, options = read_command_line(sys.argv[1:] if argv is None else argv)
            if not options.get("quiet") and os.environ.get("RANK", "0") == "0":
                say(f"{command}: importing libraries ...")
            importlib.import_module(f"lorasft.commands.{command}").run(**options)
    except (LorasftError, RuntimeError, MemoryError) as error:
        return say_error(error)
    except Ended as signalled:
        say("stopped")
        return exit_code(signalled.args[0])
    except BrokenPipeError:  # the reader of stdout went away: nothing is lost
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno != ENAMETOOLONG:
            raise
        say(RecipeError("a name that is too long for a file", where=str(error.filename)[:200], hint="shorten it"))
        return RecipeError.exit_code
    finally:
        say("", end="")  # where a line of progress is open, a traceback begins on its own
    return 0
