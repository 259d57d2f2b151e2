"""The page of `preview --html` and `evaluate --answers`: one file, nothing fetched, to search and page through."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")


def make_page(rows: Iterable[Any], facts: Iterable[str], *, legend: str) -> str:
    """The page of `rows`, of lines of facts and of a `legend` in HTML. A row has boxes, those after the first side by
    side, each with a title and parts [[text, whether it is marked, whether it is special], ...]."""
    # Text of the data never becomes markup: it is JSON without "<", and the script puts it in as text.
    data = json.dumps(list(rows)).replace("<", "\\u003c")
    items = "".join(f"<li>{html.escape(fact)}</li>" for fact in facts)
    return PAGE.replace("@LEGEND@", legend).replace("@FACTS@", items).replace("@DATA@", data)
