"""`lorasft preview`: what will be trained on, with what is learned in colour. Needs the tokenizer only."""

from __future__ import annotations

import html as markup
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorasft import files
from lorasft.recipe import load_recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from lorasft.data.examples import Example
    from lorasft.data.report import Report
    from lorasft.data.tokens import Tokens

Shown = list[tuple["Example", tuple["Tokens", ...], bool]]
GREEN, PLAIN = "\x1b[32m", "\x1b[0m"
STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em;background:#fff;color:#222}"
    "pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f6f6f6;padding:1em}"
    "mark{background:#bfe8c6;color:#033}"
)


def run(recipe: str, overrides: Sequence[str], rows: int, as_json: bool, html: str | None) -> None:
    """Print the first `rows` examples and a summary; `as_json`: every sequence as a line, then the summary.

    `html`: write a page to that file instead. Raises RecipeError, DataError or ModelError.
    """
    settings = load_recipe(recipe, overrides)
    if html:
        files.refuse_existing(Path(html))
    from lorasft.data.chat import Encoder
    from lorasft.data.prepare import encode_sources
    from lorasft.data.report import Report
    from lorasft.data.tokenizer import compare_with_file, load_tokenizer

    tokenizer = load_tokenizer(settings.model.base, settings.model.revision)
    notice = compare_with_file(tokenizer)
    if notice:
        print(f"note: {notice}", file=sys.stderr)
    report = Report()
    encoder = Encoder(tokenizer, settings.chat, data=settings.data, report=report)
    shown: Shown = []
    for example, sequences, held_out in encode_sources(settings.data, encoder=encoder):
        if as_json:
            _print_json(example, sequences)
        elif len(shown) < rows:
            shown.append((example, sequences, held_out))
    if html:
        files.write_file(Path(html), _page(shown, tokenizer, report).encode())
        print(html)
    elif as_json:
        print(json.dumps({"summary": report.as_dict()}))
    else:
        _print_text(shown, tokenizer, report)


def painted(tokens: Tokens, tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[str, bool]]:
    """The text of a sequence in pieces, and whether each is learned; control characters are shown, not sent."""
    from lorasft.data.tokens import supervised_runs

    # A run decoded alone would lose the blank that it begins with, so each piece is what the text grows by.
    before = ""
    start = 0
    for first, end in [*supervised_runs(tokens).tolist(), (len(tokens), len(tokens))]:
        for cut, learned in ((first, False), (end, True)):
            text = tokenizer.decode(tokens.ids[:cut], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            if cut > start:
                yield _harmless(text[len(before) :]), learned
            before, start = text, cut


def summary(report: Report) -> Iterator[str]:
    """What was read, dropped and made, a line each; counts of zero are left out."""
    formats = ", ".join(sorted(set(report.formats.values())))
    yield f"{report.rows:,} rows read ({formats}), in {report.sequences:,} sequences"
    yield f"{report.train_examples:,} examples to train on, {report.held_out_examples:,} held out"
    share = report.supervised_tokens / max(report.tokens, 1)
    yield f"{report.tokens:,} tokens, {report.supervised_tokens:,} learned ({share:.0%})"
    held = report.answers - report.parity_breaks
    yield f"parity: {held:,} of {report.answers:,} answers stand behind the very ids that a server feeds"
    lengths = ", ".join(f"{name}: {length:,}" for name, length in report.length_quantiles().items())
    yield f"tokens of the longest sequence of an example: {lengths}"
    counts = {
        "bad rows dropped": report.bad_rows,
        "duplicates": report.duplicate_rows,
        "over-long, dropped": report.over_long_examples,
        "over-long, truncated": report.truncated_examples,
        "over-long texts, learned in windows": report.windowed_texts,
        "learned tokens lost to the over-long policy": report.over_long_lost_tokens,
        "answers cut before the token that ends them": report.answers_cut,
        "with nothing to learn, dropped": report.examples_without_target,
        "conversations in one sequence per answer": report.split_conversations,
        "tokens across the border of prompt and answer": report.straddling_tokens,
        "system texts put into the first user turn, which the template saved with the adapter does as well": (
            report.merged_systems
        ),
        "blanks that the template trims": report.trimmed_characters,
        "characters of answers that the template drops": report.dropped_characters,
        "characters of reasoning among what is dropped": report.dropped_reasoning,
        "characters of reasoning that are context (chat.thinking=mask)": report.masked_reasoning,
        "conversations whose {% generation %} markers differ in the template's own text": report.marker_differences,
        "examples whose tools the template does not show": report.tools_left_out,
    }
    yield from (f"{count:,} {name}" for name, count in counts.items() if count)


def _print_json(example: Example, sequences: Sequence[Tokens]) -> None:
    source = {"file": example.place.file, "line": example.place.line}
    for tokens in sequences:
        print(json.dumps({"source": source, "ids": tokens.ids.tolist(), "labels": tokens.labels.tolist()}))


def _print_text(shown: Shown, tokenizer: PreTrainedTokenizerFast, report: Report) -> None:
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    opening, closing = (GREEN, PLAIN) if colour else ("⟦", "⟧")
    for example, sequences, held_out in shown:
        for number, tokens in enumerate(sequences, start=1):
            print(f"--- {_title(example, number, len(sequences), held_out)}")
            pieces = painted(tokens, tokenizer)
            print("".join(f"{opening}{text}{closing}" if learned else text for text, learned in pieces), end="\n\n")
    print("\n".join(summary(report)))


def _page(shown: Shown, tokenizer: PreTrainedTokenizerFast, report: Report) -> str:
    parts = [f"<!doctype html><meta charset=utf-8><title>lorasft preview</title><style>{STYLE}</style>"]
    parts.append("<h1>What is learned</h1><p>Marked text is learned, the rest is context.</p>")
    for example, sequences, held_out in shown:
        for number, tokens in enumerate(sequences, start=1):
            parts.append(f"<h2>{markup.escape(_title(example, number, len(sequences), held_out))}</h2><pre>")
            for text, learned in painted(tokens, tokenizer):
                parts.append(f"<mark>{markup.escape(text)}</mark>" if learned else markup.escape(text))
            parts.append("</pre>")
    parts.append("<h2>Summary</h2><ul>")
    parts.extend(f"<li>{markup.escape(line)}</li>" for line in summary(report))
    return "".join([*parts, "</ul>\n"])


def _title(example: Example, number: int, count: int, held_out: bool) -> str:
    part = f", sequence {number} of {count}" if count > 1 else ""
    return _harmless(f"{example.place}{part}{' (held out)' if held_out else ''}")


def _harmless(text: str) -> str:
    """Text that cannot move the cursor or change the terminal: control characters as escapes, but for newlines."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
