"""The page of a run: its words, its numbers, its states, what strangers write into it, and a real browser.

`python tests/test_report.py` writes the golden page anew; read the difference before you commit it.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from jinja2 import Environment
from test_preview import BROWSER
from test_train import stop_at

from lorasft import cli, report
from lorasft.errors import DivergedError, Stopped
from lorasft.files import LOCK, locked, sha256
from lorasft.report import MARK, History, note_event, refresh_report, render_page, smooth, thin

RECORDED = Path(__file__).resolve().parent / "runs" / "0.1.0" / "run"
GOLDEN = Path(__file__).resolve().parent / "golden" / "report.txt"
EVIL = '</td></table><script>document.title=1</script><img src=x onerror="alert(1)"> \u202e\x1b[31m {{ 7 * 7 }} & <b>'
TOKEN = "hf_" + "CanaryCanary" * 3


class Page(HTMLParser):
    """What a page says, by element, and the paths of its charts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.lines: list[str] = []
        self.charts: list[list[tuple[str, list[tuple[float, float]]]]] = []  # of each chart the colours and points
        self.colour, self.inside = "", ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        self.attributes |= given.keys()
        self.inside = tag
        if tag in ("tr", "h1", "h2", "figcaption", "div"):
            self.lines.append("")
        if tag == "svg":
            self.charts.append([])
        if tag == "g":
            self.colour = given["color"]
        if tag == "path" and given.get("class") != "grid":
            numbers = [float(one) for one in re.findall(r"[\d.]+", given["d"].removesuffix("h0"))]
            self.charts[-1].append((self.colour, list(zip(numbers[::2], numbers[1::2], strict=True))))

    def handle_data(self, data: str) -> None:
        if data.strip() and self.inside not in ("style", "title"):
            self.lines[-1:] = [" | ".join(filter(None, [*self.lines[-1:], " ".join(data.split())]))]

    @property
    def text(self) -> str:
        return "\n".join(line for line in self.lines if line) + "\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recorded run of 16 steps, under a name without a place."""
    shutil.copytree(RECORDED, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return Path("run")


def page_of(*folders: Path) -> Page:
    return Page(render_page([History(folder) for folder in folders]))


def write_lines(path: Path, *lines: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def golden_text() -> str:
    return re.sub(r"written .* UTC", "written NOW", page_of(Path("run")).text)


def test_the_page_of_a_recorded_run_says_what_it_said(folder: Path) -> None:
    assert golden_text() == GOLDEN.read_text(encoding="utf-8")


def test_the_numbers_are_those_of_the_metrics(folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    page, text = page_of(folder), render_page([History(folder)])
    held_out = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    dots = re.findall(r"<title>held out, step (\d+): ([\d.]+)</title>", text)
    assert {int(step): float(loss) for step, loss in dots} == {s: float(f"{x:.6g}") for s, x in held_out.items()}
    losses = [line["loss"] for line in lines if "loss" in line]
    mean = sum(losses[-10:]) / len(losses[-10:])
    assert f"training loss | {mean:.4f} | mean of the last 10 steps" in page.text
    assert f"held-out loss | {held_out[16]:.4f} | {held_out[0]:.4f} at first" in page.text
    # Every point of the curves, by the inverse of the scale: logarithmic for losses and gradients, else from zero.
    everything = [*losses, *held_out.values()]
    for chart, key, values, log in [
        (0, "loss", everything, True),
        (1, "learning_rate", [], False),
        (2, "grad_norm", [], True),
        (3, "tokens_per_second", [], False),
    ]:
        own = [(line["step"], line[key]) for line in lines if key in line]
        values = values or [value for _, value in own]
        low, high = min(values) if log else 0.0, max(values)
        (_, places), *_ = page.charts[chart]
        assert len(places) == len(own) == 16
        for (x, y), (step, value) in zip(places, own, strict=True):
            share = 1 - y / 1000
            shown = low * (high / low) ** share if log else share * high
            assert x * 16 / 1000 == pytest.approx(step, abs=0.01)
            assert shown == pytest.approx(value, rel=1e-3 if log else 0, abs=1e-4 * high)


def test_smooth_is_the_mean_around_and_thin_keeps_the_extremes() -> None:
    points = [(step, math.sin(step) + 2) for step in range(1, 3001)]
    points[1700] = (1701, 99.0)
    smoothed = dict(smooth(points))
    assert len(smoothed) == 1000 and dict(smooth(points[:1999])).keys() == {*range(1, 2000)}
    for at in (2, 11, 1499, 2999):
        around = [value for _, value in points[max(0, at - 30) : at + 31]]
        assert smoothed[at + 1] == pytest.approx(sum(around) / len(around))
    kept = thin(points)
    assert len(kept) <= 1001 and set(kept) <= set(points) and kept[-1] == points[-1] and (1701, 99.0) in kept
    assert all(a[0] < b[0] for a, b in pairwise(kept)) and thin([]) == [] and smooth([]) == []
    assert thin(points[:400]) == points[:400]


def test_a_hundred_thousand_steps_are_small_and_fast(folder: Path) -> None:
    steps = 100_000
    line = '{"step": %d, "epoch": 1.5, "loss": %r, "learning_rate": 0.0002, "grad_norm": %r, "tokens": 4000, '
    line += '"supervised_tokens": 900, "tokens_per_second": 2345.6, "memory_bytes": 5551234567, "seconds": 0.4321}\n'
    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as file:
        for step in range(1, steps + 1):
            loss = 3 / (1 + step / 5000) * (1 + 0.1 * math.sin(step)) if step != 77_777 else 1234.5
            file.write(line % (step, loss, 1 + math.cos(step)))
            if step % 100 == 0:
                file.write(json.dumps({"step": step, "eval_loss": loss, "eval_tokens": 99}) + "\n")

    def measure(work: Callable[[], object]) -> float:
        started = time.process_time()
        work()
        return time.process_time() - started

    lines = (folder / "metrics.jsonl").read_bytes().splitlines()
    floor = measure(lambda: [json.loads(line) for line in lines])  # 0.5 s here, more where others want the cores too
    assert any(measure(lambda: refresh_report(folder)) < max(2, 5 * floor) for _ in range(3))  # 1.3 s here
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert len(text) < 300_000
    assert "1,200" in text and f"step {steps:,}" in text  # the spike is in the scale
    assert min(y for _, y in Page(text).charts[0][0][1]) < 1


def test_what_strangers_write_stays_text(folder: Path) -> None:
    plain = page_of(folder)
    answer = {"step": 4, "place": EVIL, "prompt": EVIL, "expected": TOKEN, "answer": EVIL * 500, "ended": EVIL}
    write_lines(folder / "answers.jsonl", answer, {"step": 8, "prompt": None, "answer": [EVIL]})
    row = {"place": f'{EVIL}" onclick="x', "split": "train", "tokens": EVIL, "text": EVIL + TOKEN}
    write_lines(folder / "rows.jsonl", row | {"losses": {"last": [1, math.inf], EVIL: [0, math.nan]}})
    note_event(folder, EVIL)
    note_event(folder, "ended", error=ValueError(EVIL + TOKEN))
    record = json.loads((folder / "provenance.json").read_bytes())
    record |= {"data": EVIL, EVIL: {EVIL: TOKEN}, "report": {EVIL: EVIL}}
    (folder / "provenance.json").write_text(json.dumps(record), encoding="utf-8")
    recipe = (folder / "recipe.yaml").read_text(encoding="utf-8")
    (folder / "recipe.yaml").write_text(recipe.replace("system: null", f"system: {json.dumps(EVIL)}"), encoding="utf-8")
    (folder / "preview.html").touch()
    folder = folder.rename("<i>run&")
    (text := render_page([History(folder)])).encode()
    page = Page(text)
    assert page.tags == plain.tags | {"a"} and page.attributes == plain.attributes | {"href"}
    assert "<script" not in text and "\x1b" not in text and "\u202e" not in text and TOKEN not in text
    assert "{{ 7 * 7 }}" in page.text and " 49 " not in page.text and "hf_..." in page.text and len(text) < 40_000


@pytest.mark.parametrize("damage", ["nothing", "torn", "lost", "wrong"])
def test_what_is_damaged_is_left_out_or_said(damage: str, folder: Path, capsys: Any) -> None:
    note_event(folder, "started")
    logs = [folder / name for name in ("metrics.jsonl", "events.jsonl")]
    records = [folder / name for name in ("provenance.json", "memory.json")]
    for path in logs if damage == "torn" else []:
        path.write_bytes(path.read_bytes() + b'{"step": 17, "loss": 1')
    for path in records if damage == "lost" else []:
        path.unlink()
    if damage == "lost":
        write_lines(logs[0], {"step": 3, "loss": math.nan, "seconds": "x"}, {"loss": 1}, {"step": "4", "loss": 10**400})  # type: ignore[arg-type]
    if damage == "wrong":
        records[0].write_bytes(b'{"report": [1], "steps": "many"}')
    assert cli.main(["report", str(folder)]) == 0 and capsys.readouterr().out.strip() == "run/report.html"
    assert len(History(folder).series["loss"]) == (0 if damage == "lost" else 16)
    text = page_of(folder).text
    assert f"step {3 if damage == 'lost' else 16} | finished" in text
    assert ("training loss | not finite | mean of the last 1 steps" in text) == (damage == "lost")
    assert ("parity breaks" in text) == (damage in ("nothing", "torn"))
    note_event(folder, "ended")
    assert [event["event"] for event in History(folder).events] == ["started", "ended"]


def test_nothing_is_said_of_what_was_not_measured(folder: Path, tmp_path: Path) -> None:
    (folder / "adapter").rename(tmp_path / "elsewhere")
    record = json.loads((folder / "provenance.json").read_bytes()) | {"steps": 16}
    (folder / "provenance.json").write_text(json.dumps(record), encoding="utf-8")
    cards = ["held-out loss", "training loss", "time in steps", "tokens/s", "peak memory", "while it ran"]
    lines = [*map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())]
    for kept, first, shown, axes in (
        ([], "before step 1 of 16 | stopped", [], []),
        (lines[:1], "step 0 of 16 | stopped", cards[:1], ["0 | 1"]),
        ([{"step": 1, "loss": 4.0}], "step 1 of 16 | stopped", cards[1:2], ["0 | 1"]),
    ):
        write_lines(folder / "metrics.jsonl", *kept)
        page = page_of(folder)
        assert first in page.text and "supervised\n" not in page.text
        assert [card for card in cards if f"\n{card} | " in page.text] == shown
        assert len(page.charts) == len(axes) and all(f" | {axis}\n" in page.text for axis in axes)
    (folder / "metrics.jsonl").unlink()
    assert page_of(folder).charts == []


ODD: list[Any] = [None, True, 0, -1, 1.5, 1e308, math.nan, math.inf, -math.inf, 10**400, "", "x", [], [1], {}, {"x": 1}]


def mutants(value: Any) -> list[Any]:
    """Copies of `value`, each with a node of another type, or with none."""
    if not isinstance(value, (dict, list)):
        return ODD
    places = [*value] if isinstance(value, dict) else range(len(value))
    found = [[*value], *ODD]
    for place in places:
        for one in mutants(value[place]):
            other = value.copy()
            other[place] = one
            found.append(other)
    return [*found, *({name: value[name] for name in value if name != gone} for gone in places if type(value) is dict)]


@pytest.mark.parametrize("finished", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_no_record_costs_the_page(
    finished: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every node of every record of another type; the lines of a log at once, in both orders."""
    lines = [*map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())]
    answers = [
        {"step": step, "place": "rows:1", "prompt": "q", "expected": "a", "answer": "a", "ended": True, "ends": True}
        for step in (0, 4)
    ]
    row = {"place": "rows:1", "split": "train", "tokens": 7, "text": "a"}
    rows = [row | {"losses": {"base": [0, 2.5], "best": [4, 1.5], "last": [8, value]}} for value in (2.0, 2.5, 90.0)]
    event = {"step": 4, "event": "continued", "time": "now", "why": ""}
    adapter = sha256(folder / "adapter/adapter_model.safetensors")
    merge = {"adapter": adapter, "table": {"merged": {"kl": 0.1, "same_choice": 0.9, "nll": 4.5}}}
    logs = {"metrics.jsonl": lines[:2], "answers.jsonl": answers, "rows.jsonl": rows, "events.jsonl": [event]}
    records = {name: json.loads((folder / name).read_bytes()) for name in ("provenance.json", "memory.json")}
    records["provenance.json"] |= {
        "versions": {"torch": "2"},
        "steps": 40,
        "report": {"rows": 9, "formats": {"rows.jsonl": "text"}},
    }
    records["memory.json"] |= {"measured": 3, "free": 4, "predicted": {"adapter": 1, "peak": 2}}
    if not finished:
        (folder / "adapter").rename(tmp_path / "elsewhere")
    for name, own in logs.items():
        kept = (folder / name).read_bytes() if (folder / name).exists() else b""
        for odd in (
            [one for line in own for one in mutants(line)],
            [one for line in own for one in mutants(line)][::-1],
        ):
            write_lines(folder / name, *own, *odd)
            for running in (False, True):
                monkeypatch.setattr(report, "is_locked", lambda _, running=running: running)
                assert page_of(folder).text
        (folder / name).write_bytes(kept)
    monkeypatch.setattr("jinja2.Environment", shared_environment())
    for name, record in [*records.items(), ("merge.json", merge)] if finished else ():
        for odd in mutants(record):
            (folder / name).write_text(json.dumps(odd), encoding="utf-8")
            assert "None" not in Page(render_page([History(folder, merges=[folder])])).text, odd
        (folder / name).write_text(json.dumps(record), encoding="utf-8")


def shared_environment() -> Callable[..., Any]:
    """Makes one jinja2 environment and gives it again: a template is compiled once."""
    made = list[Any]()

    def make(**options: Any) -> Any:
        made[:] = made or [Environment(**options)]
        return made[0]

    return make


def test_what_is_not_finite_is_said(folder: Path) -> None:
    odd = [math.nan, math.inf, -math.inf]
    write_lines(folder / "metrics.jsonl", *({"step": at, "loss": one, "eval_loss": one} for at, one in enumerate(odd)))
    row = {"place": "rows:1", "split": "train", "tokens": 7, "text": "a"}
    rows = [{**row, "place": f"odd:{at}", "losses": {"base": [0, 2.0], "last": [8, one]}} for at, one in enumerate(odd)]
    fine = [{**row, "place": f"fine:{at}", "losses": {"base": [0, 2.0], "last": [8, 1.5]}} for at in range(5)]
    write_lines(folder / "rows.jsonl", *fine, *rows)
    text = page_of(folder).text
    assert "held-out loss | not finite | not finite at first, not finite at best" in text
    assert "training loss | not finite | mean of the last 3 steps" in text and not re.search(r"\b(nan|inf)\b", text)
    ledger = text.partition("Ledger of rows | ")[2].splitlines()[2:]
    assert all(re.match(r"odd:\d \| not finite(, above the base)? \| 2.0000 \| not finite", one) for one in ledger[:3])
    assert ledger[3].startswith("fine:")


def test_the_state_of_a_run(folder: Path, tmp_path: Path) -> None:
    record = json.loads((folder / "provenance.json").read_bytes()) | {"steps": 40}
    (folder / "provenance.json").write_text(json.dumps(record), encoding="utf-8")
    assert "step 16 of 40 | finished\n" in page_of(folder).text and "lorasft chat run" in page_of(folder).text
    (folder / "adapter").rename(tmp_path / "elsewhere")
    page = page_of(folder).text
    assert "stopped | killed, or without power" in page
    assert "lorasft train run --resume" in page
    note_event(folder, "started")
    with locked(folder):
        text = render_page([History(folder)])
        assert "step 16 of 40 | running" in Page(text).text and 'http-equiv="refresh"' in text
        assert "about 0:00:0" in Page(text).text and "--resume" not in text and "chat" not in text
        note_event(folder, "ended", error=ValueError("it broke"))
        text = render_page([History(folder)])
        assert "failed | ValueError: it broke" in Page(text).text and 'http-equiv="refresh"' not in text
    assert (folder / LOCK).exists()
    where = ", ".join(f"/a/long/folder/of/data/rows.jsonl:{row}" for row in range(8))
    note_event(folder, "ended", error=DivergedError("the loss of step 17 is not finite", where=where))
    assert f"| failed | the loss of step 17 is not finite: {where}\n" in page_of(folder).text
    note_event(folder, "ended", error=DivergedError("not finite", where=f"{where}, {where}"))
    shown = page_of(folder).text.partition("| failed | ")[2].partition("...\n")[0]
    whole = f"not finite: {where}, {where}".split()
    assert 350 < len(shown) <= 400 and shown.split() == whole[: len(shown.split())]
    for error in (None, Stopped(130, "stopped after step 16", "train"), KeyboardInterrupt()):
        note_event(folder, "ended", error=error)
        assert "| stopped" in page_of(folder).text


def test_what_to_type_next_names_files(folder: Path) -> None:
    plain = page_of(folder).text
    assert "lorasft evaluate run --data FILE\nlorasft merge run --out run-merged" in plain
    recipe = (folder / "recipe.yaml").read_text(encoding="utf-8")
    (folder / "recipe.yaml").write_text(recipe.replace("eval: 0.2", "eval: [a.jsonl, b c.jsonl]"), encoding="utf-8")
    commands = page_of(folder).text.partition("lorasft chat run\n")[2]
    files = "lorasft evaluate run --data a.jsonl\nlorasft evaluate run --data 'b c.jsonl'\n"
    assert commands.startswith(f"{files}lorasft merge run --out run-merged")


def test_answers_stand_beside_the_data(folder: Path) -> None:
    lines = [
        {"step": step, "place": f"rows:{row}", "prompt": f"q{row}", "expected": f"a{row}"}
        | {"ended": step > 2, "ends": row > 1, "answer": f"a{row}" if step > 6 else f"wrong {step}"}
        for step in (0, 2, 4, 6, 8, 10)
        for row in (1, 2)
    ]
    write_lines(folder / "answers.jsonl", *lines)
    heads, first, second = page_of(folder).text.partition("Answers to held-out prompts\n")[2].splitlines()[:3]
    shown = [0, 4, 6, 8, 10]
    assert heads == " | ".join(
        ["prompt", "in the data 1 of 2 end", *(f"step {step} {2 * (step > 2)} of 2 ended" for step in shown)]
    )
    assert first == "q1 rows:1 | a1 | wrong 0 | wrong 4 | wrong 6 | ✓ a1 | ✓ a1" and second.startswith("q2 rows:2 | a2")


def test_the_ledger_has_the_odd_rows_first_and_says_why(folder: Path) -> None:
    """By hand: the median is 2.0, the spread of logarithms the least there is, 0.2: far is above 4.03, below 0.993"""
    last = [2.0] * 9 + [1.9, 2.1, 2.05, 4.0, 4.1, 0.9, 1.1]
    base = [5.0] * len(last)
    base[1] = 1.5  # this row got worse
    lines: list[dict[str, Any]] = [
        {"place": f"rows.jsonl:{at}", "split": "held out", "tokens": 7, "text": f"answer {at}"}
        | {"losses": {"base": [0, base[at]], "best": [4, 1.8], "last": [8, last[at]]}}
        for at in range(len(last))
    ]
    again = {**lines[0], "split": "train", "losses": {"last": [8, 900.0]}}  # alone in its split
    write_lines(folder / "rows.jsonl", *lines, again, {**lines[0], "place": "cut back", "losses": {}})
    head, *rows = page_of(folder).text.partition("Ledger of rows | ")[2].partition("\nRecipe")[0].splitlines()[1:]
    assert head == "row | stands out | base | best | last | tokens | split | text"
    why = {13: "2 times the median", 14: "0.45 times the median", 1: "above the base"}
    order = [14, 13, 1, 12]
    shown = [
        f"rows.jsonl:{at} | {f'{why[at]} | ' if at in why else ''}{base[at]:.4f} | 1.8000 | {last[at]:.4f}"
        f" | 7 | held out | answer {at}"
        for at in order
    ]
    assert rows[:3] == shown[:3] and rows[3] == "rows.jsonl:0 | 900.0000 | 7 | train | answer 0" and rows[4] == shown[3]
    assert len(rows) == len(last) + 1
    write_lines(folder / "rows.jsonl", *({**line, "place": f"{line['place']}{n}"} for n in range(9) for line in lines))
    assert page_of(folder).text.partition("Ledger of rows | ")[2].partition("\nRecipe")[0].count("\n") == 1 + 50
    assert "preview.html#" not in render_page([History(folder)])
    (folder / "preview.html").touch()
    text = render_page([History(folder)])
    assert text.count('<a href="preview.html#') == 50
    assert '<a href="preview.html#rows.jsonl%3A140">' in text and '<a href="preview.html">' in text


def test_several_runs_and_a_merge(folder: Path, capsys: Any) -> None:
    other = Path(shutil.copytree(folder, "other"))
    recipe = (other / "recipe.yaml").read_text(encoding="utf-8").replace("rank: 2", "rank: 64")
    (other / "recipe.yaml").write_text(recipe, encoding="utf-8")
    Path("a file").touch()
    assert cli.main(["report", "a file", "run", "other"]) == 0  # as `runs/*` may give them
    target = Path("report.html")
    assert capsys.readouterr().out.strip() == str(target)
    page = Page(target.read_text(encoding="utf-8"))
    assert page.text.count("finished") == 2
    assert "adapter.rank | 2 | 64" in page.text and "train.batch_size" not in page.text
    colours = [colour for colour, points in page.charts[0] if len(points) == 16]
    assert len(colours) == len(set(colours)) == 2
    assert cli.main(["report", "run", "other"]) == 0  # its own page is written anew, another file is not
    target.write_bytes(b"mine")
    assert cli.main(["report", "run", "other"]) == 2 and target.read_bytes() == b"mine"
    assert "exists already" in capsys.readouterr().err
    assert cli.main(["report", "run", "other", "--out", "all.html"]) == 0 and Path("all.html").is_file()
    assert cli.main(["report", "a file"]) == 2 and "not a run folder" in capsys.readouterr().err
    for name, adapter in (("merged", sha256(folder / "adapter/adapter_model.safetensors")), ("foreign", "0" * 64)):
        Path(name).mkdir()
        table = {name: {"kl": 0.00123456, "same_choice": 0.9, "nll": 4.5}}
        Path(name, "merge.json").write_bytes(json.dumps({"adapter": adapter, "table": table}).encode())
    assert cli.main(["report", "run", "foreign", "merged"]) == 0
    text = Page((folder / "report.html").read_text(encoding="utf-8")).text
    assert "merged | 0.001235 | 0.9 | 4.5" in text and "foreign" not in text
    (folder / "adapter/adapter_model.safetensors").unlink()
    assert cli.main(["report", "run", "merged"]) == 0 and "Merge" not in page_of(folder).text
    shutil.rmtree(folder / "adapter")
    assert cli.main(["report", "run", "merged"]) == 0


def test_what_is_no_run_is_refused_or_passed_over(folder: Path, capsys: Any) -> None:
    assert cli.main(["report", "run", "runs/nope"]) == 2 and not (folder / "report.html").exists()
    assert re.fullmatch(
        "report: .+\nerror: there is no such folder\nwhere: runs/nope\nhint: .+\n", capsys.readouterr().err
    )
    for name in ("other", "merged", "bad"):
        Path(name).mkdir()
    Path("merged/merge.json").write_bytes(b"{}")
    Path("bad/recipe.yaml").write_bytes(b"model: [")
    assert cli.main(["report", "bad", "merged", "other", "run"]) == 0 and (folder / "report.html").is_file()
    _, *said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and said[0].startswith("passed over: bad: "), said
    assert said[1] == "passed over: other: this is not a run folder"
    assert cli.main(["report", "merged", "bad"]) == 2
    _, passed, *refused = capsys.readouterr().err.splitlines()
    assert passed == said[0] and refused[0] == "error: none of these is a run"
    assert cli.main(["report", "bad"]) == 2 and "where: bad/recipe.yaml" in capsys.readouterr().err


def test_open_shows_the_page(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    assert cli.main(["report", "run", "--open"]) == 0
    assert opened == [(folder.resolve() / "report.html").as_uri()]


def test_a_run_is_not_slowed_or_stopped_by_its_page(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    now = [100.0]

    def render(runs: Any) -> str:
        now[0] += cost
        return MARK

    monkeypatch.setattr(report, "render_page", render)
    monkeypatch.setattr(report.time, "monotonic", lambda: now[0])
    cost = 0.01
    due = refresh_report(folder)
    assert due == pytest.approx(now[0] + 10)  # at most every 10 s
    (folder / "report.html").unlink()
    assert refresh_report(folder, due) == due and not (folder / "report.html").exists()
    cost, now[0] = 2.0, due
    assert refresh_report(folder, due) >= now[0] + 99 * cost  # for less than 1 % of the time

    def fail(runs: Any) -> str:
        raise KeyError("steps")

    monkeypatch.setattr(report, "render_page", fail)
    assert refresh_report(folder) == math.inf and "report.html is not written: KeyError" in capsys.readouterr().err
    assert refresh_report(Path("nowhere"), 3.0) == 3.0


def test_a_run_writes_its_page_when_it_is_stopped_resumed_and_diverged(
    recipe: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, folder, seen = recipe(), tmp_path / "run", list[str]()
    with monkeypatch.context() as patch:
        look = lambda: seen.append(page_of(folder).text) or os.kill(os.getpid(), signal.SIGINT)  # noqa: E731
        stop_at(patch, 4, look)
        assert cli.main(["train", path]) == 130
    assert re.search(r"step 3 of \d+ \| running \|", seen[0].replace("\n", " | "))
    stopped = Page((folder / "report.html").read_text(encoding="utf-8")).text
    assert re.search(r"step 4 of \d+ \| stopped \| stopped after step 4 of \d+, saved", stopped)
    with monkeypatch.context() as patch:
        stop_at(patch, 6, lambda: (_ for _ in ()).throw(RuntimeError("a bug")))
        with pytest.raises(RuntimeError, match="a bug"):
            cli.main(["train", path, "--resume"])
    assert "failed | RuntimeError: a bug" in page_of(folder).text
    assert cli.main(["train", path, "--resume"]) == 0
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "| finished\n" in Page(text).text and "continued, step 4: " in text and "saved, still there, step" in text
    events = [event["event"] for event in History(folder).events]
    assert events == ["started", "ended", "continued", "failed", "continued", "ended"]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (500, "dark")])
def test_a_browser_lays_it_out(width: int, scheme: str, folder: Path, tmp_path: Path) -> None:
    """By a script put into a copy: nothing is wider than the window, curves have a size, and colours follow."""
    write_lines(folder / "answers.jsonl", {"step": 0, "prompt": EVIL * 9, "expected": "x" * 999, "answer": EVIL})
    row = {"place": "x" * 999 + ":1", "split": "train", "tokens": 9, "text": EVIL, "losses": {"last": [1, 0.5]}}
    write_lines(folder / "rows.jsonl", row)
    probe = """<script>
    const svg = document.querySelector("svg").getBoundingClientRect(), root = document.documentElement;
    document.title = JSON.stringify({over: root.scrollWidth - root.clientWidth, width: root.clientWidth,
      svg: [svg.width, svg.height], paper: getComputedStyle(document.body).backgroundColor,
      scripts: document.querySelectorAll("script").length});
    </script>"""
    text = render_page([History(folder)])
    page = tmp_path / "page.html"
    page.write_text(text.replace("default-src 'none'; ", "") + probe, encoding="utf-8")
    flags = f"--headless --no-sandbox --disable-gpu --no-first-run --window-size={width},900 --dump-dom"
    dark = ["--blink-settings=preferredColorScheme=0"] * (scheme == "dark")
    command = [str(BROWSER), *flags.split(), *dark, f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
    out = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    (found,) = map(json.loads, re.findall(r"<title>(\{.*?\})</title>", out))
    assert found["over"] <= 0 and found["scripts"] == 1, found
    assert found["svg"][0] > 0.7 * min(found["width"], 1000) and found["svg"][1] > 100
    assert found["paper"] == ("rgb(22, 24, 28)" if scheme == "dark" else "rgb(255, 255, 255)")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        shutil.copytree(RECORDED, Path(place, "run"))
        os.chdir(place)
        GOLDEN.write_text(golden_text(), encoding="utf-8")
