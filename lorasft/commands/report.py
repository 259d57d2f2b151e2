"""`lorasft report`: the page of a run, or of several over each other."""

from __future__ import annotations

import webbrowser
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from lorasft.artifact import MERGE_RECORD
from lorasft.errors import LorasftError, RecipeError
from lorasft.files import refuse_existing, replace_file
from lorasft.report import MARK, History, render_page
from lorasft.terminal import say


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", metavar="RUN", help="run folders, and what merge wrote, for its table")
    parser.add_argument("--out", metavar="FILE", help="default: report.html in the run, of several beside the first")
    parser.add_argument("--open", action="store_true", dest="show", help="show it in the browser")


def run(folders: Sequence[str], out: str | None, show: bool) -> None:
    """Write the page and print its name; say what of `runs/*` is no run, or damaged. Raises RecipeError without any."""
    paths, runs = [Path(folder) for folder in folders], list[History]()
    for path in paths:
        try:
            runs.append(History(path, merges=paths))
        except LorasftError as error:
            if len(paths) == 1 or not path.exists():
                raise
            if not (path / MERGE_RECORD).is_file():
                say(f"passed over: {path}: {error.what}")
    if not runs:
        raise RecipeError("none of these is a run", where=", ".join(folders), hint="lorasft report runs/NAME")
    target = Path(out) if out else (runs[0].folder if len(runs) == 1 else runs[0].folder.parent) / "report.html"
    refuse_stranger(target)
    replace_file(target, render_page(runs))
    print(target)
    if show:
        webbrowser.open(target.absolute().as_uri())


def refuse_stranger(page: Path) -> None:
    """Raise RecipeError where a file that is no page of ours is in the place of one."""
    if not (page.is_file() and MARK.encode() in page.read_bytes()[:1000]):
        refuse_existing(page)
