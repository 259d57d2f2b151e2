"""`lorasft preview`: what will be trained on, with supervised tokens in colour. Needs the tokenizer only."""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from lorasft.commands.arguments import add_json, add_recipe, fill_in, whole_number
from lorasft.files import write_file
from lorasft.recipe import load_recipe

if TYPE_CHECKING:
    from lorasft.data.store import Tokens
    from lorasft.data.tokenizer import FastTokenizer

Part = tuple[str, bool, bool]  # text, whether it is supervised, whether it is a special token
# Around text that is context, and that is supervised: in colour for a terminal, elsewhere in brackets.
COLOURS = ("\x1b[2m", "\x1b[0m"), ("\x1b[32m", "\x1b[0m")
BRACKETS = ("", ""), ("⟦", "⟧")


def add_arguments(parser: ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--rows", type=whole_number, metavar="N", help="examples to show (3, with --html 1000)")
    add_json(parser, "every example and a summary, a line each,")
    parser.add_argument("--html", metavar="FILE", help="write a page to search instead")


def run(recipe: str, overrides: Sequence[str], rows: int | None, as_json: bool, html: str | None) -> None:
    """Print the first `rows` examples and a summary; `as_json`: every sequence as a line, then the summary.

    `html`: write a page to that file instead. Raises RecipeError, ModelError, or DataError, also when nothing would be
    supervised, when a supervised special token was never trained, or when parity does not hold.
    """
    settings = load_recipe(recipe, overrides)
    from lorasft.data.prepare import prepare
    from lorasft.data.tokenizer import add_tokens, load_tokenizer, refuse_untrained

    tokenizer = load_tokenizer(settings.model.base, settings.model.revision)
    new = add_tokens(tokenizer, settings.model.new_tokens)
    with TemporaryDirectory(prefix="lorasft-") as folder:
        prepared = prepare(settings.data, settings.chat, tokenizer=tokenizer, folder=Path(folder))
        if not settings.adapter.modules_to_save:
            refuse_untrained(settings.model.base, tokenizer, supervised=[*{*prepared.supervised_special} - {*new}])
        store, most = prepared.store, None if as_json else rows or (1000 if html else 3)
        found = (
            (store.place(example), bool(held_out), tokens, list(painted(tokens, tokenizer)))
            for example, held_out in enumerate(store.arrays["held_out"][store.chosen[:most]])
            for tokens in store.sequences(example)
        )
        if as_json:
            for place, held_out, tokens, parts in found:
                spans = [{"text": text, "learned": supervised} for text, supervised, _ in parts]
                fed = {name: one.tolist() for name, one in vars(tokens).items() if hasattr(one, "tolist")}
                fed |= {"row_weight": tokens.row_weight} if tokens.row_weight != 1 else {}
                print(json.dumps({"source": vars(place), **fed, "spans": spans, "held_out": held_out}))
            print(json.dumps({"summary": prepared.report.as_dict()}))
            return
        shown = [(_harmless(f"{place}{' (held out)' * held_out}"), parts) for place, held_out, _, parts in found]
        counts = {tokenizer.decode([token]): int((store.arrays["ids"] == token).sum()) for token in new}
    told = {"report": prepared.report, "counts": counts}
    facts = _harmless(fill_in("preview.txt.jinja", told).rstrip()).split("\n")
    if html:
        page = {"rows": [[one] for one in shown], "facts": facts, "answers": False}
        write_file(Path(html), fill_in("page.html.jinja", page, html=True))
        print(html)
        return
    marks = COLOURS if sys.stdout.isatty() and "NO_COLOR" not in os.environ else BRACKETS
    print("\n".join([*(f"--- {title}\n{mark(parts, marks)}\n" for title, parts in shown), *facts]))


def painted(tokens: Tokens, tokenizer: FastTokenizer) -> Iterator[Part]:
    """The text of a sequence in parts that are supervised or not, and added tokens; control characters are shown."""
    added = tokenizer.added_tokens_decoder
    special = [(token in added) * (1 + at) for at, token in enumerate(tokens.ids.tolist())]  # 0: it is not
    kinds = zip((tokens.labels >= 0).tolist(), special, strict=True)
    end = 0
    for (supervised, place), run in groupby(kinds):
        start, end = end, end + len(list(run))
        # Decoded alone a part would lose the blank that it begins with, so the token before it is decoded too.
        before, text = (
            str(tokenizer.decode(tokens.ids[max(start - 1, 0) : stop], clean_up_tokenization_spaces=False))
            for stop in (start, end)
        )
        yield _harmless(text.removeprefix(before)), supervised, place > 0


def mark(parts: Iterable[Part], marks: Sequence[tuple[str, str]]) -> str:
    """The text of `parts` with `marks` around what is context, and around what is supervised."""
    runs = groupby(parts, key=lambda part: part[1])
    return "".join("".join(text for text, _, _ in run).join(marks[supervised]) for supervised, run in runs)


def _harmless(text: str) -> str:
    """Text that cannot move the cursor or change the terminal: control characters as escapes, but for newlines."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
