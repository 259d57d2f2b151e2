"""`lorasft report`: the page of a run, or of several over each other."""

from __future__ import annotations

import webbrowser
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", metavar="RUN", help="run folders, and what merge wrote, for its table")
    parser.add_argument("--out", metavar="FILE", help="default: report.html in the run, of several beside the first")
    parser.add_argument("--open", action="store_true", dest="show", help="show it in the browser")


def run(folders: Sequence[str], out: str | None, show: bool) -> None:
    """Write the page and print its name. Raises RecipeError, or ModelError for records that cannot be read."""
    from lorasft.errors import ModelError
    from lorasft.files import refuse_existing, replace_file
    from lorasft.report import MARK, History, render_page

    paths = [Path(folder) for folder in folders]
    named = [path for path in paths if (path / "recipe.yaml").is_file()] or paths[:1]  # `runs/*` may name other things
    target = Path(out) if out else (named[0] if len(named) == 1 else named[0].parent) / "report.html"
    if not (target.is_file() and MARK.encode() in target.read_bytes()[:1000]):
        refuse_existing(target)
    try:
        replace_file(target, render_page([History(path, merges=paths) for path in named]))
    except (OSError, TypeError, AttributeError, LookupError, ValueError, ArithmeticError) as error:
        raise ModelError(f"the records of a run cannot be read: {error!r:.200}", where=", ".join(folders)) from None
    print(target)
    if show:
        webbrowser.open(target.absolute().as_uri())
