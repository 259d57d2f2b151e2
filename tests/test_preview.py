"""The preview: facts of the whole set, the terminal's colours, and the page in a real browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizer import save_tokenizer

from lorasft import cli
from lorasft.commands.preview import COLOURS, painted
from lorasft.data.store import UNSUPERVISED
from lorasft.data.tokenizer import load_tokenizer

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = '</script><img src=x onerror="document.title=1"> \u202e \x1b[31mred\x07 & <b>'


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    rows = [{"prompt": f"What is {n} + 1?", "completion": f"{n + 1} apples" if n % 2 else "pears"} for n in range(24)]
    rows.append({"prompt": EVIL, "completion": "no <mark>harm</mark>"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    file = tmp_path / "recipe.yaml"
    folder = save_tokenizer(tmp_path / "tokenizer")
    file.write_text(f"model: {{base: {folder}}}\ndata: {{train: [{tmp_path}/rows.jsonl], eval: null}}\n")
    return file


def test_the_facts_of_the_whole_set(recipe: Path, capsys: Any) -> None:
    assert cli.main(["preview", str(recipe), "data.max_length=80", "data.max_dropped=0.1"]) == 0
    out = capsys.readouterr().out
    assert {"25 rows", "24 sequences", "1 over long examples"} <= set(out.splitlines())
    assert "parity: all 25 answers" in out and "dropped: 1," in out
    assert re.search(r"^.*rows.jsonl:25: \d+ tokens, over data.max_length \(80\)$", out, re.MULTILINE)


def test_the_terminal_shows_what_is_supervised_and_no_control_character(recipe: Path, capsys: Any) -> None:
    assert cli.main(["preview", str(recipe), "--rows", "25"]) == 0
    out = capsys.readouterr().out
    assert "What is 3 + 1?<|end|>\n<|start|>assistant\n⟦4 apples<|end|>⟧" in out
    assert "\\x1b[31mred\\x07" in out and "\x1b" not in out and "\x07" not in out


def test_json_has_every_sequence(recipe: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a local base must not reach for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert cli.main(["preview", str(recipe), "--json"]) == 0
    *lines, last = map(json.loads, capsys.readouterr().out.splitlines())
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    assert [line["source"] for line in lines] == [{"file": f"{tmp_path}/rows.jsonl", "line": n} for n in range(1, 26)]
    supervised = [token for token in lines[0]["labels"] if token != UNSUPERVISED]
    assert tokenizer.decode(supervised) == "pears<|end|>" and len(lines[0]["ids"]) == len(lines[0]["labels"])
    assert [span["text"] for span in lines[0]["spans"] if span["learned"]] == ["pears", "<|end|>"]
    assert "".join(span["text"] for span in lines[0]["spans"]) == tokenizer.decode(lines[0]["ids"])
    assert last["summary"]["rows"] == 25
    assert last["summary"]["parity_breaks"] == 0 and last["summary"]["answers"] == 25


def test_colours_where_there_is_a_terminal(recipe: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert cli.main(["preview", str(recipe), "--rows", "1"]) == 0
    out = capsys.readouterr().out
    (_, plain), (green, _) = COLOURS
    assert f"assistant\n{plain}{green}pears<|end|>{plain}" in out


def test_parts_make_the_whole_text(tmp_path: Path) -> None:
    from test_chat import conversation, make_encoder

    tokenizer = load_tokenizer(str(save_tokenizer(tmp_path)))
    for tokens in make_encoder(tokenizer).encode(conversation("a b", " é👋 c", "", "\n\nd  ")):
        assert "".join(text for text, _, _ in painted(tokens, tokenizer)) == tokenizer.decode(tokens.ids)


def test_the_page_holds_text_as_text(recipe: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert cli.main(["preview", str(recipe), "--html", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.count("<script") == 2 and "<img" not in text and "src=" not in text.replace("img src=x", "")
    (data,) = re.findall(r'id="data">(.*?)</script>', text, re.DOTALL)
    rows = json.loads(data)
    assert len(rows) == 25 and "\x1b" not in text and "\u202e" not in text
    ((_, parts),) = rows[0]
    assert [part[:2] for part in parts if part[1]] == [["pears", True], ["<|end|>", True]]
    assert cli.main(["preview", str(recipe), "--html", str(page)]) == 2  # nothing is overwritten


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on the path")
def test_the_page_in_a_browser(recipe: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert cli.main(["preview", str(recipe), "--html", str(page)]) == 0
    first = browse(page, tmp_path / "a")
    assert "1-10 of 25" in first and first.count("<h2>") == 10
    assert "<mark>pears</mark><mark><b>&lt;|end|&gt;</b></mark>" in first
    found = browse(page, tmp_path / "b", "#no%20%3Cmark%3E")
    assert "1-1 of 1" in found and "&lt;/script&gt;&lt;img" in found and "<title>lorasft</title>" in found
    assert "nothing found" in browse(page, tmp_path / "c", "#there is none")
    assert html.unescape(found).count("<mark>harm</mark>") >= 1


FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --virtual-time-budget=3000 --dump-dom"
)


def browse(page: Path, profile: Path, fragment: str = "") -> str:
    """The page's document after its script ran, from where its rows begin to the data."""
    assert BROWSER is not None
    command = [BROWSER, *FLAGS.split(), f"--user-data-dir={profile}", f"{page.as_uri()}{fragment}"]
    out = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    return re.sub(r"<script.*?</script>", "", out, flags=re.DOTALL)
