"""`lorasft chat`: talk to a run, an adapter or a model; the turns are kept."""

from __future__ import annotations

import re
import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from signal import SIGINT
from typing import Any

from lorasft.commands.arguments import add_saved, load_saved, open_saved, whole_number
from lorasft.errors import LorasftError, RecipeError
from lorasft.signals import Ended, StopRequest, stop_signals
from lorasft.terminal import harmless, say

_COMMANDS = "/reset: a new conversation; /system TEXT: one with this system text; /base: what the base answers; /quit"


def add_arguments(parser: ArgumentParser) -> None:
    add_saved(parser, options=["--system"])
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and stop")
    parser.add_argument("--max-tokens", type=whole_number, default=512, metavar="N", help="of an answer (default: 512)")
    parser.add_argument("--temperature", type=_temperature, default=0.0, metavar="T", help="0 (default): the likeliest")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="of the likeliest with P together")


def _temperature(text: str) -> float:
    if not 0 <= float(text) < float("inf"):
        raise ArgumentTypeError(f"{text} is not a number from 0 up")
    return float(text)


def run(prompt: str | None, max_tokens: int, temperature: float, top_p: float, **saved: Any) -> None:
    """Answer `prompt`, or what is typed line by line. Answers stream to stdout."""
    if top_p != 1 and not (temperature and 0 < top_p < 1):
        raise RecipeError("--top-p is not a share, or --temperature is 0", hint="--temperature 0.7 --top-p 0.9")
    found = open_saved(**saved)
    typed = prompt is None and sys.stdin.isatty()
    if typed:
        what = f"{found.adapter} on {found.model.base}" if found.adapter else f"{found.model.base}, without an adapter"
        say(f"{what} (quantization: {found.model.quantization})\n{_COMMANDS}; Ctrl-C stops an answer, then the chat")
    answer = _load(found, typed, max_new_tokens=max_tokens, temperature=temperature, top_p=top_p)
    system: list[dict[str, Any]] = []
    turns: list[dict[str, Any]] = []
    for line in _questions() if prompt is None else [prompt]:
        word, _, text = line.strip().partition(" ") if prompt is None else ("", "", "")
        try:
            if word in ("/reset", "/system"):
                system = system if word == "/reset" else [{"role": "system", "content": text}] * bool(text)
                turns = []
            elif word == "/base" and turns and found.adapter:
                answer([*system, *turns[:-1]], False)
            elif re.fullmatch("/[a-z]+", line.strip()) and prompt is None:
                say(_COMMANDS)
            else:
                # An argument may be no UTF-8.
                asked = {"role": "user", "content": line.encode(errors="replace").decode()}
                turns += [asked, {"role": "assistant", "content": answer([*system, *turns, asked], True)}]
        except LorasftError as error:
            if not typed:
                raise
            say(error)


def _load(found: Any, typed: bool, **sampling: Any) -> Callable[[list[dict[str, Any]], bool], str]:
    """What answers messages, with the adapter or without, as it streams. `typed`: a person asks, who may stop it."""
    from lorasft.data.chat_format import ChatFormat
    from lorasft.model.generate import generate

    tokenizer, model, causal = load_saved(found)
    chat_format = ChatFormat(tokenizer, found.chat)
    sampling |= {"stops": chat_format.stop_ids, "on_text": lambda text: print(harmless(text), end="", flush=True)}

    def answer(messages: list[dict[str, Any]], adapted: bool) -> str:
        prompt = chat_format.prompt_ids(messages)
        # A stop is looked for after each token: an interrupt could leave half an import, or the model half changed.
        with (
            stop_signals(alone=True) if typed else nullcontext(StopRequest()) as stop,
            nullcontext() if adapted else model.disable_adapter(),
        ):
            ((ids, _),) = generate(causal, tokenizer, [prompt], stopped=lambda: stop.signal > 0, **sampling)
        print(flush=True)
        if stop.signal not in (0, SIGINT):
            raise Ended(stop.signal)
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    return answer


def _questions() -> Iterator[str]:
    """Lines from a terminal, with history and editing, or a pipe, until it ends or says /quit; no empty ones."""
    edited = sys.stdin.isatty() and sys.stdout.isatty()
    if edited:
        with suppress(ImportError):  # not every Python has it
            import readline  # noqa: F401  `input` uses it, and writes nothing
    with suppress(EOFError):
        while (line := input("> " if edited else "")).strip() != "/quit":
            if line.strip():
                yield line
