"""The page of `preview --html` and `evaluate --answers`: one file, nothing fetched, to search and page through."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from typing import Any

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>lorasft</title>
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<style>
body{font:16px/1.5 system-ui,sans-serif;max-width:64em;margin:2em auto;padding:0 1em;background:#fff;color:#222}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f6f6f6;padding:1em;color:#666;border-radius:4px}
mark{background:#bfe8c6;color:#033}
b{font-weight:normal;color:#a0509a}
nav{position:sticky;top:0;background:#fff;padding:.6em 0;border-bottom:1px solid #ddd}
article{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(16em,100%),1fr));gap:0 1em}
section:first-child{grid-column:1/-1} h2{overflow-wrap:anywhere} li{white-space:pre-wrap;font:14px/1.4 monospace}
</style>
@LEGEND@
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
function box([name, parts], index) {
  const node = document.createElement("section"), title = document.createElement(index ? "h3" : "h2");
  title.textContent = name;
  node.append(title, document.createElement("pre"));
  node.lastChild.append(...parts.map(part));
  return node;
}
function show() {
  rows.replaceChildren(...found.slice(first, first + size).map(row => {
    const node = document.createElement("article");
    node.append(...row.map(box));
    return node;
  }));
  const last = Math.min(first + size, found.length);
  where.textContent = found.length ? `${first + 1}-${last} of ${found.length}` : "nothing found";
}
function go(by) { if (first + by >= 0 && first + by < found.length) { first += by; show(); scrollTo(0, 0); } }
search.oninput = () => {
  const words = search.value.toLowerCase();
  const text = ([name, parts]) => name + "\\n" + parts.map(p => p[0]).join("");
  found = all.filter(row => row.map(text).join("\\n").toLowerCase().includes(words));
  first = 0;
  show();
};
document.getElementById("back").onclick = () => go(-size);
document.getElementById("on").onclick = () => go(size);
if (location.hash) { search.value = decodeURIComponent(location.hash.slice(1)); search.oninput(); } else show();
</script>
</html>
"""


def make_page(rows: Iterable[Any], facts: Iterable[str], *, legend: str) -> str:
    """The page of `rows`, of lines of facts and of a `legend` in HTML. A row has boxes, those after the first side by
    side, each with a title and parts [[text, whether it is marked, whether it is special], ...]."""
    # Text of the data never becomes markup: it is JSON without "<", and the script puts it in as text.
    data = json.dumps(list(rows)).replace("<", "\\u003c")
    items = "".join(f"<li>{html.escape(fact)}</li>" for fact in facts)
    return PAGE.replace("@LEGEND@", legend).replace("@FACTS@", items).replace("@DATA@", data)
