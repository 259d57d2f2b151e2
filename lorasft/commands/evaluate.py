"""`lorasft evaluate`: what models give the answers in a file, and what they answer themselves, side by side."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorasft.artifact import Artifact
from lorasft.commands import arguments
from lorasft.data.folders import find_files
from lorasft.errors import DataError, RecipeError
from lorasft.files import make_folder, refuse_existing, write_file
from lorasft.recipe import DataSource
from lorasft.recipe.load import read_source
from lorasft.terminal import harmless, say

Lines = list[dict[str, Any]]  # for each answer its source, tokens, prompt, expected, and what each model gives it


def add_arguments(parser: ArgumentParser) -> None:
    arguments.add_saved(parser, "RUN|ADAPTER|MODEL ...", options=["--on-bad-row", "--system"])
    parser.add_argument("--data", required=True, metavar="FILE", help="rows of any shape that a recipe takes")
    arguments.add_columns(parser)
    parser.add_argument("--answers", metavar="OUT", help="let the models answer, to a page (.html) or JSON lines")
    parser.add_argument("--max-tokens", type=arguments.whole_number, metavar="N", help="default: 2 x expected + 32")
    parser.add_argument("--per-example", metavar="OUT", help="write one JSON object for each answer to OUT")
    arguments.add_json(parser, "the totals")


def run(saved: str, overrides: Sequence[str], data: str, columns: str | None, as_json: bool, **options: Any) -> None:
    """Score the answers in `data`; totals on stdout. Raises RecipeError for files that exist."""
    answers, per_example, most = (options.pop(name) for name in ("answers", "per_example", "max_tokens"))
    if answers and not answers.endswith((".html", ".jsonl")):
        raise RecipeError("it is neither .html nor .jsonl", where=f"--answers {answers}", hint="--answers answers.html")
    for out in filter(None, (answers, per_example)):
        refuse_existing(Path(out))
        make_folder(Path(out).absolute().parent)
    others = [word for word in overrides if "=" not in word or Path(word).exists()]
    options["overrides"] = [word for word in overrides if word not in others]
    artifacts = [arguments.open_saved(name, **options) for name in (saved, *others)]
    if len({found.model.model_dump_json() for found in artifacts if found.adapter}) > 1:
        raise RecipeError("these adapters have different bases", hint="evaluate each by itself")
    source = read_source(data, columns)
    find_files(source)
    from lorasft.model.scoring import compare_with_base, summarize

    lines: Lines = []
    named = {found.name if others else "adapter" if found.adapter else "model": found for found in artifacts}
    for name, found in named.items():
        lines = _score(found, name, source, lines, most if answers else 0)
    totals = {name: summarize([line[name] for line in lines]) for name in lines[0] if name in ("base", *named)}
    for name in (name for name, found in named.items() if found.adapter):
        totals[name]["against_base"] = compare_with_base(lines, name)
    first = next(iter(named))
    worst = sorted(lines, key=lambda line: _harm(line, first), reverse=True)
    shown = [_side_by_side(line, totals) for line in worst]
    worse = sum(_harm(line, first) > (False, 0.0) for line in lines)
    titles = [boxes[0][0] for boxes in shown[: min(worse, 5)]]
    told = {"count": len(lines), "data": data, "answers": answers, "worse": worse, "first": first, "titles": titles}
    said = arguments.fill_in("evaluate.txt.jinja", {**told, "totals": totals}).rstrip().split("\n")
    for out, chosen in ((per_example, lines), (answers, worst)):
        if out and out.endswith(".html"):
            page = {"rows": shown, "facts": said, "answers": True}
            write_file(Path(out), arguments.fill_in("page.html.jinja", page, html=True))
        elif out:
            write_file(Path(out), "".join(json.dumps(line) + "\n" for line in chosen))
    arguments.show(totals, said, as_json=as_json)


def _score(found: Artifact, name: str, source: DataSource, lines: Lines, most: int | None) -> Lines:
    """The answers in `source`, or `lines` of other models, with what was found gives them under its `name`, and an
    adapter's base unless it is there. `most`: tokens of an answer that is generated; 0: none is. Raises DataError."""
    from lorasft.model.scoring import generate_answers, match, read_answers, score_answers
    from lorasft.model.selfcheck import verify

    tokenizer, model, causal = arguments.load_saved(found)
    network = verify(causal)
    positions = getattr(causal.config.get_text_config(), "max_position_embeddings", None)
    # What the model can read is scored, however long the rows of training were.
    settings = found.data.model_copy(update={"max_length": positions} if positions else {})
    answers, prepared = read_answers(source, settings, found.chat, tokenizer=tokenizer)
    report, stops = prepared.report, prepared.stop_ids
    if report.dropped_examples():
        say(f"{report.dropped_examples()} of {report.rows} rows dropped: over-long or unusable")
    read: Lines = []
    for answer in answers:
        x, y = answer.ids[: answer.start].tolist(), answer.ids[answer.start :].tolist()
        texts = {"prompt": tokenizer.decode(x), "expected": tokenizer.decode(y[:-1] if y[-1] in stops else y)}
        read.append({"source": vars(answer.place), "tokens": len(y), **texts})
    lines = lines or read
    if [{name: line[name] for name in read[0]} for line in lines] != read:
        raise DataError(f"{name} reads other prompts than those before", hint="evaluate each by itself")

    def ask(name: str) -> None:
        for line, numbers in zip(lines, score_answers(network, answers), strict=True):
            line[name] = numbers
        for number, text, ended in generate_answers(network, tokenizer, answers, stops, most) if most != 0 else ():
            lines[number][name] |= {"answer": text, "ended": ended, **match(text, lines[number]["expected"])}

    if found.adapter and "base" not in lines[0]:
        with model.disable_adapter():
            ask("base")
    ask(name)
    return lines


def _harm(line: Mapping[str, Any], name: str) -> tuple[bool, float]:
    """Whether an adapter lost a match, and by how much it raised the loss; of a model by itself the loss."""
    old, new = line.get("base", {"loss": 0.0}), line[name]
    return old.get("exact_match", False) > new.get("exact_match", False), new["loss"] - old["loss"]


def _side_by_side(line: Mapping[str, Any], models: Iterable[str]) -> list[tuple[str, Any]]:
    """Boxes of a page: the prompt, and beside the expected answer that of each model, marked if it is the same."""
    losses = ", ".join(f"{name} {line[name]['loss']:.4f}" for name in models)
    title = f"{line['source']['file']}:{line['source']['line']}, loss: {losses}"
    boxes = [(title, line["prompt"], False), ("expected", line["expected"], True)]
    boxes += [(name, line[name].get("answer", ""), line[name].get("exact_match", False)) for name in models]
    return [(harmless(name), [[harmless(text), marked, False]]) for name, text, marked in boxes]
