"""`lorasft merge`: full weights from an adapter, and how near they are to what was trained."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from lorasft.commands.arguments import add_columns, add_json, add_saved, fill_in, open_saved, show
from lorasft.data.folders import find_files
from lorasft.errors import RecipeError
from lorasft.files import refuse_existing
from lorasft.recipe.load import read_source
from lorasft.terminal import say


def add_arguments(parser: ArgumentParser) -> None:
    add_saved(parser, "RUN|ADAPTER", options=["--on-bad-row"])
    parser.add_argument("--out", required=True, metavar="DIR", help="a folder that does not exist yet")
    parser.add_argument(
        "--onto",
        choices=["auto", "original", "dequantized"],
        default="auto",
        help="the base's own weights, those that NF4 made of them, or what held-out rows speak for (default)",
    )
    parser.add_argument("--quantize", choices=["nf4"], help="write a 4-bit checkpoint instead of full weights")
    compared = parser.add_mutually_exclusive_group()
    compared.add_argument("--data", metavar="FILE", help="rows to compare answers on (default: held out in the run)")
    add_columns(parser)
    compared.add_argument("--no-check", action="store_false", dest="check", help="compare no answers; auto: original")
    parser.add_argument("--force-base", action="store_true", help="take a base that the run was not trained on")
    add_json(parser, "what was done")


def run(out: str, data: str | None, columns: str | None, as_json: bool, **options: Any) -> None:
    """Merge into the new folder `out`; what was done on stdout. `options`: what names an artifact, and those of `merge`
    as they are."""
    refuse_existing(Path(out))
    if columns and not data:
        raise RecipeError("--columns is of --data, which is not given", hint="--data FILE")
    artifact = open_saved(*(options.pop(name) for name in ("saved", "base", "given", "overrides")))
    source = read_source(data, columns) if data else None
    if source:
        find_files(source)
    from lorasft.merge.merge import merge

    merged = merge(artifact, Path(out), data=source, **options)
    say(fill_in("merge.txt.jinja", merged).rstrip())
    show({**merged, "folder": out}, [out], as_json=as_json)
