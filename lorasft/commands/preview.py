"""`lorasft preview`: what will be trained on, with what is learned in colour. Needs the tokenizer only."""

from __future__ import annotations

import json
import math
import os
import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasft.commands.arguments import add_json, add_recipe, whole_number
from lorasft.terminal import say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from lorasft.data.examples import Example
    from lorasft.data.report import Report
    from lorasft.data.tokens import Tokens

Part = tuple[str, bool, bool]  # text, whether it is learned, whether it is a special token
Row = dict[str, Any]  # title, parts
DROPPED_SHOWN = 10
DIM, GREEN, MAGENTA, PLAIN = "\x1b[2m", "\x1b[32m", "\x1b[35m", "\x1b[0m"


def add_arguments(parser: ArgumentParser) -> None:
    """What `lorasft preview` takes."""
    add_recipe(parser)
    parser.add_argument(
        "--rows", type=whole_number, metavar="N", help="examples to show (default: 3; with --html 1000)"
    )
    add_json(parser, "every example and a summary, a line each,")
    parser.add_argument("--html", metavar="FILE", help="write a page to search instead")


def run(recipe: str, overrides: Sequence[str], rows: int | None, as_json: bool, html: str | None) -> None:
    """Print the first `rows` examples and a summary; `as_json`: every sequence as a line, then the summary.

    `html`: write a page to that file instead. Raises RecipeError, DataError or ModelError: DataError as well when
    nothing would be learned, when a special token to be learned was never trained, or when parity does not hold.
    """
    from lorasft import files
    from lorasft.commands.preview_page import make_page
    from lorasft.recipe import load_recipe

    settings = load_recipe(recipe, overrides)
    if html:
        files.refuse_existing(Path(html))
    from lorasft.data.chat import Encoder
    from lorasft.data.prepare import encode_sources
    from lorasft.data.report import Report
    from lorasft.data.tokenizer import compare_with_file, load_tokenizer
    from lorasft.data.untrained import refuse_untrained

    tokenizer = load_tokenizer(settings.model.base, settings.model.revision)
    notice = compare_with_file(tokenizer)
    if notice:
        say(f"note: {notice}")
    report = Report()
    encoder = Encoder(tokenizer, settings.chat, data=settings.data, report=report)
    most = rows if rows is not None else 1000 if html else 3
    shown: list[Row] = []
    for number, (example, sequences, held_out) in enumerate(encode_sources(settings.data, encoder=encoder)):
        if as_json:
            _print_json(example, sequences, tokenizer, held_out)
        elif number < most:
            shown.extend(_rows(example, sequences, tokenizer, held_out))
    if not settings.adapter.modules_to_save:
        refuse_untrained(settings.model.base, tokenizer, learned=encoder.learned_special())
    facts = list(summary(report, batch_size=settings.train.batch_size))
    if html:
        files.write_file(Path(html), make_page(shown, facts).encode())
        print(html)
    elif as_json:
        print(json.dumps({"summary": report.as_dict()}))
    else:
        _print_text(shown, facts)


def painted(tokens: Tokens, tokenizer: PreTrainedTokenizerFast) -> Iterator[Part]:
    """The text of a sequence in parts that are learned or not, special or not; control characters are shown."""
    added = tokenizer.added_tokens_decoder
    kinds = [(int(label) >= 0, int(token) in added) for token, label in zip(tokens.ids, tokens.labels, strict=True)]
    cuts = [at for at in range(1, len(kinds)) if kinds[at] != kinds[at - 1]]
    for start, end in zip([0, *cuts], [*cuts, len(kinds)], strict=True):
        # Decoded alone a part would lose the blank that it begins with, so the token before it is decoded too.
        before = _decode(tokenizer, tokens.ids[max(start - 1, 0) : start])
        text = _decode(tokenizer, tokens.ids[max(start - 1, 0) : end])
        yield (_harmless(text.removeprefix(before)), *kinds[start])


def summary(report: Report, *, batch_size: int) -> Iterator[str]:
    """What was read, dropped and made, a line each; counts of zero are left out. `batch_size`: examples a step."""
    formats = ", ".join(sorted(set(report.formats.values())))
    yield f"{report.rows:,} rows read ({formats}), in {report.sequences:,} sequences"
    yield f"{report.train_examples:,} examples to train on, {report.held_out_examples:,} held out"
    share = report.supervised_tokens / max(report.tokens, 1)
    yield f"{report.tokens:,} tokens, {report.supervised_tokens:,} learned ({share:.0%})"
    examples = max(report.train_examples + report.held_out_examples, 1)
    steps = math.ceil(report.train_examples / batch_size)
    yield f"{steps:,} steps an epoch, about {report.tokens * batch_size // examples:,} tokens a step of {batch_size}"
    if report.answers:
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
        "answers behind text that only the template adds (an empty thought?); see chat.template_options": (
            report.led_answers
        ),
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
    if warning := report.key_warning():
        yield _harmless(warning)
    yield from (f"dropped: {_harmless(row)}" for row in report.dropped[:DROPPED_SHOWN])
    if report.dropped_examples() > DROPPED_SHOWN:
        named = len(report.dropped)
        yield f"dropped: {report.dropped_examples() - DROPPED_SHOWN:,} more (--json names the first {named:,})"
    histogram = report.length_histogram()
    most = max((count for _, count in histogram), default=1)
    for edge, count in histogram:
        yield f"up to {edge:>7,} tokens: {count:>9,} {'█' * math.ceil(30 * count / most)}"


def _print_json(
    example: Example, sequences: Sequence[Tokens], tokenizer: PreTrainedTokenizerFast, held_out: bool
) -> None:
    source = {"file": example.place.file, "line": example.place.line}
    for tokens in sequences:
        spans = [{"text": text, "learned": learned} for text, learned, _ in painted(tokens, tokenizer)]
        line = {"source": source, "ids": tokens.ids.tolist(), "labels": tokens.labels.tolist(), "spans": spans}
        print(json.dumps(line | {"held_out": held_out}))


def _rows(
    example: Example, sequences: Sequence[Tokens], tokenizer: PreTrainedTokenizerFast, held_out: bool
) -> Iterator[Row]:
    for number, tokens in enumerate(sequences, start=1):
        part = f", sequence {number} of {len(sequences)}" if len(sequences) > 1 else ""
        title = _harmless(f"{example.place}{part}{' (held out)' if held_out else ''}")
        yield {"title": title, "parts": list(painted(tokens, tokenizer))}


def _print_text(shown: Sequence[Row], facts: Sequence[str]) -> None:
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for row in shown:
        print(f"--- {row['title']}")
        parts: list[Part] = row["parts"]
        print("".join(_coloured(*part) for part in parts) if colour else _bracketed(parts), end="\n\n")
    print("\n".join(facts))


def _coloured(text: str, learned: bool, special: bool) -> str:
    return f"{MAGENTA if special else ''}{GREEN if learned and not special else '' if learned else DIM}{text}{PLAIN}"


def _bracketed(parts: Sequence[Part]) -> str:
    """Parts with what is learned in brackets."""
    opened = False
    text = ""
    for part, learned, _ in parts:
        text += ("⟦" if learned else "⟧") * (learned != opened) + part
        opened = learned
    return text + "⟧" * opened


def _decode(tokenizer: PreTrainedTokenizerFast, ids: Any) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _harmless(text: str) -> str:
    """Text that cannot move the cursor or change the terminal: control characters as escapes, but for newlines."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
