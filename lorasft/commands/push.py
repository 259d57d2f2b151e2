"""`lorasft push`: an adapter or merged weights to the hub, with a model card; private unless it is said otherwise."""

from __future__ import annotations

import sys
from argparse import ArgumentParser

from lorasft.errors import RecipeError
from lorasft.terminal import harmless, say


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("saved", metavar="RUN|ADAPTER|MERGED", help="a run, an adapter's folder, or what merge wrote")
    parser.add_argument("repo", metavar="OWNER/NAME", help="on the hub; made if it is not there yet")
    seen = parser.add_mutually_exclusive_group()
    seen.add_argument("--private", action="store_true", default=True, help="for you and whom you allow (default)")
    seen.add_argument("--public", action="store_false", dest="private", help="for everybody")
    parser.add_argument("--base", metavar="ID", help="what the hub calls an adapter's base, if that was a folder")
    parser.add_argument("--dry-run", action="store_true", help="list the files and show the card; send nothing")
    parser.add_argument("--yes", action="store_true", help="do not ask")


def run(saved: str, repo: str, base: str | None, private: bool, dry_run: bool, yes: bool) -> None:
    """Check, list, ask, and send to `repo`; the address of the commit on stdout, or the card of a dry run. Raises
    RecipeError for what cannot be a name, and unless somebody says yes."""
    from lorasft.hub import is_hub_id
    from lorasft.share import gather, push_files

    for name in filter(None, (repo, base)):
        if not is_hub_id(name) or "--" in name or ".." in name:
            raise RecipeError("this is not OWNER/NAME, as the hub has it", where=name, hint="as me/support-bot")
    if not (dry_run or yes or sys.stdin.isatty()):
        raise RecipeError("nothing is sent unasked, and nobody is there to ask", hint="--dry-run to look, then --yes")
    files = gather(saved, repo, base=base, dry_run=dry_run)
    for name, one in files.items():
        size = len(one) if isinstance(one, bytes) else one.stat().st_size
        say(f"{size:>15,}  {name}")
    if dry_run:
        print(harmless(bytes(files["README.md"]).decode()))
        return
    if not yes:
        say(f"to {repo}, {'private' if private else 'PUBLIC'}; if it is there, as a new commit. Send? [y/N] ", end="")
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise RecipeError("nothing was sent", hint="y sends it")
    print(push_files(files, repo, private=private))
