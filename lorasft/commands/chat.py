"""`lorasft chat`: talk to a run, an adapter or a model; the turns are kept."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Iterator
from typing import Any

from lorasft.commands.arguments import add_saved, open_saved, whole_number
from lorasft.terminal import harmless, say


def add_arguments(parser: ArgumentParser) -> None:
    add_saved(parser, options=["--system"])
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and stop")
    parser.add_argument("--max-new-tokens", type=whole_number, default=512, metavar="N", help="default: 512")
    parser.add_argument("--temperature", type=_temperature, default=0.0, metavar="T", help="0 (default): the likeliest")


def _temperature(text: str) -> float:
    if not 0 <= float(text) < float("inf"):
        raise ArgumentTypeError(f"{text} is not a number from 0 up")
    return float(text)


def run(prompt: str | None, max_new_tokens: int, temperature: float, **saved: Any) -> None:
    """Answer `prompt`, or what is typed line by line. Answers stream to stdout."""
    from accelerate import PartialState

    from lorasft.data.chat_format import ChatFormat
    from lorasft.model.adapter import load_artifact
    from lorasft.model.generate import generate
    from lorasft.model.tokenizer_files import read_tokenizer

    found = open_saved(**saved)
    tokenizer = read_tokenizer(found)
    model = load_artifact(found, PartialState().device)
    chat_format = ChatFormat(tokenizer, found.chat)
    messages: list[dict[str, Any]] = []
    for question in [prompt] if prompt is not None else _questions():
        # An argument may be no UTF-8.
        messages.append({"role": "user", "content": question.encode(errors="replace").decode()})
        ids = generate(
            model.get_base_model() if found.adapter else model,
            tokenizer,
            chat_format.prompt_ids(messages),
            max_new_tokens=max_new_tokens,
            stops=chat_format.stop_ids,
            temperature=temperature,
            on_text=lambda text: print(harmless(text), end="", flush=True),
        )
        print(flush=True)
        messages.append({"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True)})


def _questions() -> Iterator[str]:
    """Lines from the terminal or a pipe until it ends; empty ones are passed over."""
    while True:
        if sys.stdin.isatty():
            say("> ", end="")
        line = sys.stdin.readline()
        if line.strip():
            yield line.rstrip("\n")
        elif not line:
            return
