"""`lorasft chat`: talk to a run, an adapter or a model; the turns are kept."""

from __future__ import annotations

import re
import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from signal import SIGINT
from typing import Any

from lorasft.commands.arguments import add_saved, load_saved, open_saved, whole_number
from lorasft.errors import DataError, LorasftError, RecipeError
from lorasft.signals import Ended, StopRequest, stop_signals
from lorasft.terminal import harmless, say

_COMMANDS = "/reset: a new conversation; /system TEXT: one with this system text; /base: what the base answers; /quit"


def add_arguments(parser: ArgumentParser) -> None:
    add_saved(parser, options=["--system"])
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and stop")
    parser.add_argument("--max-tokens", "--max-new-tokens", type=whole_number, default=512, help="default: 512")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default): the likeliest")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="of the likeliest with P together")


def run(prompt: str | None, max_tokens: int, temperature: float, top_p: float, **saved: Any) -> None:
    """Answer `prompt`, or what is typed line by line. Answers stream to stdout."""
    check_sampling(max_tokens, temperature, top_p)
    found = open_saved(**saved)
    typed = prompt is None and sys.stdin.isatty()
    if typed:
        what = f"{found.adapter} on {found.model.base}" if found.adapter else f"{found.model.base}, without an adapter"
        say(f"{what} (quantization: {found.model.quantization})\n{_COMMANDS}; Ctrl-C stops an answer, then the chat")
    answer = LoadedModel(found).generate
    how: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "typed": typed}
    system: list[dict[str, Any]] = []
    turns: list[dict[str, Any]] = []
    for line in _questions() if prompt is None else [prompt]:
        word, _, text = line.strip().partition(" ") if prompt is None else ("", "", "")
        try:
            if word in ("/reset", "/system"):
                system = system if word == "/reset" else [{"role": "system", "content": text}] * bool(text)
                turns = []
                say(f"a new conversation, system text: {system[0]['content'] if system else 'as in training'}")
            elif word == "/base" and not (turns and found.adapter):
                say("nothing was asked yet" if found.adapter else "this is the base, without an adapter")
            elif word == "/base":
                answer([*system, *turns[:-1]], adapted=False, show=True, **how)
            elif re.fullmatch("/[a-z]+", line.strip()) and prompt is None:
                say(f"there is no {word}. {_COMMANDS}")
            else:
                asked = {"role": "user", "content": line}
                turns += [asked, {"role": "assistant", "content": answer([*system, *turns, asked], show=True, **how)}]
        except LorasftError as error:
            if not typed:
                raise
            say(error)


def check_sampling(max_tokens: int, temperature: float, top_p: float) -> None:
    """Raise RecipeError where answers cannot be sampled so."""
    numbers = type(max_tokens) is int and {type(temperature), type(top_p)} <= {int, float}
    if not (numbers and max_tokens >= 1 and 0 <= temperature < 1e9 and 0 < top_p <= 1 and (temperature or top_p == 1)):
        what = f"no answer can be sampled with max_tokens {max_tokens}, temperature {temperature}, top_p {top_p}"
        hint = "max_tokens from 1; temperature from 0; top_p above 0 and up to 1, below 1 with a temperature above 0"
        raise RecipeError(what, hint=hint)


class LoadedModel:
    """A run, an adapter or a model that answers."""

    def __init__(self, found: Any) -> None:
        from lorasft.data.chat_format import ChatFormat

        self._tokenizer, self._model, self._causal = load_saved(found)
        self._format = ChatFormat(self._tokenizer, found.chat)

    def generate(self, prompt: str | list[dict[str, Any]], *, max_tokens: int = 512, temperature: float = 0,
                 top_p: float = 1, adapted: bool = True, show: bool = False, typed: bool = False) -> str:  # fmt: skip
        """The answer to a prompt or to messages, at temperature 0 the likeliest; if not `adapted`, that of the base.
        `show`: print it as it grows. `typed`: Ctrl-C ends it alone. Raises RecipeError, or DataError for no prompt."""
        from lorasft.data.examples import normalize_message
        from lorasft.model.scoring import generate

        check_sampling(max_tokens, temperature, top_p)
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not asked or not isinstance(asked, list):
            raise DataError("this is neither a text nor a list of messages", hint='{"role": "user", "content": "..."}')
        read = (normalize_message(message, set()) for message in asked)
        plain = [one | {"content": one["content"].encode(errors="replace").decode()} for one in read]  # may be no UTF-8
        ids = self._format.prompt_ids(plain)
        options: dict[str, Any] = {"max_new_tokens": max_tokens, "temperature": temperature, "top_p": top_p}
        options["on_text"] = (lambda text: print(harmless(text), end="", flush=True)) if show else None
        whose = nullcontext() if adapted or self._model is self._causal else self._model.disable_adapter()
        # A stop is looked for after each token: an interrupt could leave half an import, or the model half changed.
        with stop_signals(alone=True, notice=b"") if typed else nullcontext(StopRequest()) as stop, whose:
            options |= {"stops": self._format.stop_ids, "stopped": lambda: stop.signal > 0}
            ((new, _),) = generate(self._causal, self._tokenizer, [ids], **options)
        if stop.signal not in (0, SIGINT):
            raise Ended(stop.signal)
        return str(self._tokenizer.decode(new, skip_special_tokens=True))


def load(saved: str | Path, *, base: str | None = None) -> LoadedModel:
    """What `lorasft chat` would load. Raises LorasftError where it says an error."""
    return LoadedModel(open_saved(str(saved), base, [], []))


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
