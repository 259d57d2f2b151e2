"""The page that `lorasft preview --html` writes: one file, nothing fetched, to look at, search and page through."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from typing import Any

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>lorasft preview</title>
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<style>
body{font:16px/1.5 system-ui,sans-serif;max-width:64em;margin:2em auto;padding:0 1em;background:#fff;color:#222}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f6f6f6;padding:1em;color:#666;border-radius:4px}
mark{background:#bfe8c6;color:#033}
b{font-weight:normal;color:#a0509a}
nav{position:sticky;top:0;background:#fff;padding:.6em 0;border-bottom:1px solid #ddd}
</style>
<h1>What is supervised</h1>
<p><mark>Marked text</mark> is supervised, grey text is context, <b>special tokens</b> are coloured.</p>
<details open><summary>The whole set</summary><ul>@FACTS@</ul></details>
<nav><input id="search" type="search" placeholder="search in the text" aria-label="search">
<button id="back">&larr;</button> <span id="where"></span> <button id="on">&rarr;</button></nav>
<main id="rows"></main>
<script type="application/json" id="data">@DATA@</script>
<script>
"use strict";
const all = JSON.parse(document.getElementById("data").textContent), size = 10;
const [rows, where, search] = ["rows", "where", "search"].map(id => document.getElementById(id));
let found = all, first = 0;
function part([text, supervised, special]) {
  const node = document.createElement(supervised ? "mark" : "span");
  const inner = special ? node.appendChild(document.createElement("b")) : node;
  inner.textContent = text;
  return node;
}
function show() {
  rows.replaceChildren(...found.slice(first, first + size).flatMap(row => {
    const title = document.createElement("h2"), text = document.createElement("pre");
    title.textContent = row.title;
    text.append(...row.parts.map(part));
    return [title, text];
  }));
  const last = Math.min(first + size, found.length);
  where.textContent = found.length ? `${first + 1}-${last} of ${found.length}` : "nothing found";
}
function go(by) { if (first + by >= 0 && first + by < found.length) { first += by; show(); scrollTo(0, 0); } }
search.oninput = () => {
  const words = search.value.toLowerCase();
  found = all.filter(row => (row.title + "\\n" + row.parts.map(p => p[0]).join("")).toLowerCase().includes(words));
  first = 0;
  show();
};
document.getElementById("back").onclick = () => go(-size);
document.getElementById("on").onclick = () => go(size);
if (location.hash) { search.value = decodeURIComponent(location.hash.slice(1)); search.oninput(); } else show();
</script>
</html>
"""


def make_page(rows: Iterable[tuple[str, Any]], facts: Iterable[str]) -> str:
    """The page of `rows`, each a title and its parts [[text, supervised, special], ...], and lines of facts."""
    # Text of the data never becomes markup: it is JSON without "<", and the script puts it in as text.
    objects = [{"title": title, "parts": parts} for title, parts in rows]
    data = json.dumps(objects).replace("<", "\\u003c")
    items = "".join(f"<li>{html.escape(fact)}</li>" for fact in facts)
    return PAGE.replace("@FACTS@", items).replace("@DATA@", data)
