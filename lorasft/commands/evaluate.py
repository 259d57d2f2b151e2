"""`lorasft evaluate`: what a model gives the answers in a file, base and adapter side by side."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from lorasft.commands.arguments import add_columns, add_json, add_saved, open_saved, show
from lorasft.terminal import say


def add_arguments(parser: ArgumentParser) -> None:
    add_saved(parser, options=["--on-bad-row", "--system"])
    parser.add_argument("--data", required=True, metavar="FILE", help="rows of any shape that a recipe takes")
    add_columns(parser)
    parser.add_argument("--per-example", metavar="OUT", help="write one JSON object for each answer to OUT")
    add_json(parser, "the totals")


def run(data: str, columns: str | None, per_example: str | None, as_json: bool, **saved: Any) -> None:
    """Score the answers in `data`; totals on stdout, one JSON object for each answer to `per_example`."""
    from accelerate import PartialState

    from lorasft.files import make_folder, refuse_existing, write_file
    from lorasft.model.adapter import load_artifact
    from lorasft.model.scoring import read_answers, score_answers, summarize
    from lorasft.model.selfcheck import verify
    from lorasft.model.tokenizer_files import read_tokenizer
    from lorasft.recipe.load import read_source

    if per_example:
        refuse_existing(Path(per_example))
        make_folder(Path(per_example).absolute().parent)
    found = open_saved(**saved)
    source = read_source(data, columns)
    tokenizer = read_tokenizer(found)
    model = load_artifact(found, PartialState().device)
    network = verify(model.get_base_model() if found.adapter else model)
    positions = getattr(network.causal.config.get_text_config(), "max_position_embeddings", None)
    # What the model can read is scored, however long the rows of training were.
    settings = found.data.model_copy(update={"max_length": positions} if positions else {})
    answers, report = read_answers(source, settings, found.chat, tokenizer=tokenizer)
    if report.dropped_examples():
        say(f"{report.dropped_examples()} of {report.rows} rows dropped: over-long or unusable")
    scores = {}
    if found.adapter:
        with model.disable_adapter():
            scores["base"] = score_answers(network, answers)
    scores["adapter" if found.adapter else "model"] = score_answers(network, answers)
    if per_example:
        objects = [
            {"source": vars(answer.place), "tokens": len(answer.ids) - answer.start}
            | {name: rows[index] for name, rows in scores.items()}
            for index, answer in enumerate(answers)
        ]
        write_file(Path(per_example), "".join(json.dumps(line) + "\n" for line in objects))
    totals = {name: summarize(answers, rows) for name, rows in scores.items()}
    lines = [f"{len(answers)} answers in {data}", f"{'':8}  {'nats a token':>12}  {'perplexity':>10}  {'tokens':>8}"]
    for name, total in totals.items():
        lines.append(f"{name:8}  {total['loss']:12.4f}  {total['perplexity']:10.2f}  {total['tokens']:8,}")
    show(totals, lines, as_json=as_json)
