"""`lorasft merge`: full weights from an adapter, and a check that they answer alike."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from lorasft.merge.stream import Merged, merge
from lorasft.terminal import say, show_bytes


def run(saved: str, base: str | None, out: str, onto: str, no_check: bool, as_json: bool) -> None:
    """Merge `saved` into the new folder `out`; what was done on stdout."""
    from lorasft.merge.source import find_source

    source = find_source(saved, base=base)
    started = time.monotonic()
    merged = merge(source.base, source.adapter, Path(out), on_progress=show_bytes if sys.stderr.isatty() else None)
    say(_describe(merged, seconds=time.monotonic() - started))
    check = None
    if not no_check:
        from lorasft.merge.check import check_merge

        say("checking that the merged model answers like the base with its adapter (--no-check leaves this out)")
        check = check_merge(source, Path(out))
        say(str(check))
    if as_json:
        print(json.dumps({**asdict(merged), "folder": out, "check": asdict(check) if check else None}))
    else:
        print(out)


def _describe(merged: Merged, *, seconds: float) -> str:
    text = (
        f"merged {merged.updated} tensors, copied {merged.copied}: {merged.size / 1e9:.3f} GB in {seconds:.1f} s "
        f"to {merged.folder}"
    )
    if merged.unchanged:
        text += f"; rounding left {merged.unchanged} of the merged tensors as they were"
    return text
