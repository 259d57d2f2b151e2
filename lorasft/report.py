"""The page of a run, or of several over each other: one file, made from those of run folders, which may be damaged."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import cached_property
from html import escape
from itertools import accumulate
from pathlib import Path
from typing import Any

from lorasft.adapter_files import WEIGHTS
from lorasft.artifact import MERGE_RECORD
from lorasft.errors import LorasftError, RecipeError, Stopped, first_line
from lorasft.files import append, is_locked, read_objects, replace_file, sha256
from lorasft.recipe import Recipe
from lorasft.recipe.load import flatten, load_recipe
from lorasft.terminal import harmless, quote, redact, say, size_text

MARK = '<meta name="generator" content="lorasft report">'  # by which a page is known to be ours
_OUTLIER = 3.5  # times the spread, from the median (Iglewicz and Hoaglin 1993)
Points = list[tuple[int, float]]  # a step and a number
Curve = tuple[str, str, int, Points]  # its name in the legend, colour, width in pixels; above 4 it is dots


class History:
    """What a run's files tell of it: of a JSON file the object, of a JSONL file those that have a whole `step`."""

    def __init__(self, folder: Path, *, merges: Sequence[Path] = ()) -> None:
        """`merges`: folders among which one of its adapter is looked for. Raises RecipeError for another folder."""
        if not (folder / "recipe.yaml").is_file():
            what = "this is not a run folder" if folder.exists() else "there is no such folder"
            raise RecipeError(what, where=folder, hint="name one that lorasft train has written")
        self.folder = folder
        self.recipe = load_recipe(str(folder / "recipe.yaml"))
        records = (read_objects(folder / name) for name in ("provenance.json", "memory.json"))
        self.provenance, self.memory = (next(record, {}) for record in records)
        files = (read_objects(folder / f"{name}.jsonl") for name in ("metrics", "answers", "events"))
        self.metrics, self.answers, self.events = ([line for line in file if "step" in line] for file in files)
        self.rows = [row for row in read_objects(folder / "rows.jsonl") if row.get("losses")]
        self.previewed = (folder / "preview.html").is_file()
        self.step = max((line["step"] for line in self.metrics), default=None)
        self.series: dict[str, Points] = defaultdict(list)  # by name what is finite in the metrics
        for name in dict.fromkeys(name for line in self.metrics for name in line):
            told = [(line["step"], line[name]) for line in self.metrics if isinstance(line.get(name), (int, float))]
            # Sums and ratios of smaller ones are finite, too.
            self.series[name] = [point for point in told if abs(point[1]) < 1e100]
        ended = [event for event in self.events[-1:] if event.get("event") in ("ended", "failed")]
        self.running = not ended and is_locked(folder)
        left = "failed" if ended and ended[0]["event"] == "failed" else "stopped"
        self.state = "running" if self.running else "finished" if (folder / "adapter").is_dir() else left
        weights = folder / "adapter" / WEIGHTS
        found = [merge for path in merges for merge in read_objects(path / MERGE_RECORD) if weights.is_file()]
        self.merge = next((one for one in found if one.get("adapter") == sha256(weights)), {})
        self.why = ended[0].get("why", "") if ended else "killed, or without power" * (self.state == "stopped")

    @cached_property
    def history(self) -> list[dict[str, Any]]:
        """Each step with its evaluation, in their order, all with the same keys: None where there is nothing."""
        names, steps = dict.fromkeys(name for line in self.metrics for name in line), dict[int, dict[str, Any]]()
        for line in self.metrics:
            steps.setdefault(line["step"], dict(names)).update(line)
        return [steps[step] for step in sorted(steps)]

    def report(self) -> History:
        """The run as its files tell it now, which a notebook shows as its page."""
        return History(self.folder)

    def _repr_html_(self) -> str:
        """The page in a frame, so that its styles and those of the notebook stay apart."""
        return f'<iframe srcdoc="{escape(render_page([self]))}" sandbox style="width:100%;height:45em"></iframe>'


def note_event(folder: Path, event: str, *, step: int = 0, error: BaseException | None = None, why: str = "") -> None:
    """Add a line to events.jsonl, over one that was cut off; an `error` that is no wanted stop is the event "failed".
    A disk that does not take it stops nothing."""
    path, now = folder / "events.jsonl", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    why = first_line(error) if error else why
    if isinstance(error, LorasftError):
        why = ": ".join(filter(None, (error.what, error.where)))
    event = "failed" if isinstance(error, Exception) and not isinstance(error, Stopped) else event
    with suppress(OSError, LorasftError):
        whole = path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0
        line = json.dumps({"step": step, "event": event, "time": now, "why": why})
        append(path, f"{line}\n".encode(), at=whole)


def refresh_report(folder: Path, due: float = 0.0) -> float:
    """Write the page of a run if it is `due`. Returns when the next one is: in 10 s, or in 100 times what it took."""
    started = time.monotonic()
    if started < due or not (folder / "recipe.yaml").is_file():
        return due
    try:
        replace_file(folder / "report.html", render_page([History(folder)]))
    except Exception as error:  # no page is worth a run
        say(f"report.html is not written: {first_line(error)}")
        return math.inf
    return time.monotonic() + max(10.0, 100 * (time.monotonic() - started))


def render_page(runs: Sequence[History]) -> str:
    """The page of one run, or of several compared."""
    from jinja2 import Environment, FileSystemLoader  # not for what is refused before there is a page

    def clean(value: Any) -> Any:
        text = "null" if value is None else str(value)[:20_000]
        return value if hasattr(value, "__html__") else redact(harmless(text))  # what a macro made is clean

    how: Any = {"autoescape": True, "trim_blocks": True, "finalize": clean, "extensions": ["jinja2.ext.do"]}
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), **how)
    environment.filters |= {"flatten": flatten, "number": _number, "quote": quote, "size": size_text}
    environment.filters["time"] = lambda seconds: timedelta(seconds=round(min(1e12, max(0, seconds))))
    environment.filters["median"] = lambda points: statistics.median(value for _, value in points)
    alone, now = runs[0] if len(runs) == 1 else None, time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    facts = {"runs": runs, "alone": alone, "charts": _charts(runs, alone), "now": now}
    parts = {"answers": _answers, "ledger": _ledger, "next_commands": next_commands}
    return environment.get_template("report.html.jinja").render(facts | parts)


def _number(value: float | None, form: str = ".4f") -> str:
    return "" if value is None else format(value, form) if math.isfinite(value) else "not finite"


def _charts(runs: Sequence[History], alone: History | None) -> Iterator[tuple[str, Any, Any, Any]]:
    """The curves of all runs over each other; of one `alone` also each step, saves, and where it continued."""
    series = alone.series.items() if alone else ()
    sources = [(name.partition("/")[2], points) for name, points in series if name.startswith("eval_loss/")]
    colours = [f"hsl({(215 + 163 * at) % 360} 60% 52%)" for at in range(max(4, len(runs), len(sources)))]
    each = [(run, "smoothed" if alone else str(run.folder), colour) for run, colour in zip(runs, colours, strict=False)]

    def curves(key: str) -> list[Curve]:
        smoothed = [(name, colour, 2, smooth(run.series[key])) for run, name, colour in each]
        return [("each step", "hsl(215 60% 52% / .55)", 1, alone.series[key]), *smoothed] if alone else smoothed

    losses = curves("loss")
    for run, name, colour in [(alone, "", colours[1])] if alone else each:
        held_out = run.series["eval_loss"]
        losses += [("", colour, 1, held_out), (f"{name} held out".strip(), colour, 8, held_out)]
    if alone:
        saved = {int(path.name[5:]) for path in alone.folder.glob("checkpoints/step-*") if path.name[5:].isdecimal()}
        again = {event["step"] for event in alone.events if event.get("event") == "continued"}
        for name, colour, steps in (("saved, still there", colours[2], saved), ("continued", colours[3], again)):
            losses.append((name, colour, 8, [point for point in alone.series["loss"] if point[0] in steps]))
    yield from _draw("Loss in nats a supervised token", losses, log=True)
    dots = [(name, colour, 8, points) for (name, points), colour in zip(sources, colours, strict=False)]
    lines = [("", colour, 1, points) for _, colour, _, points in dots]
    yield from _draw("Held-out loss by source", lines + dots, log=True)
    yield from _draw("Learning rate", curves("learning_rate")[: 1 if alone else None])
    yield from _draw("Gradient norm before clipping", curves("grad_norm"), log=True)
    yield from _draw("Tokens a second", curves("tokens_per_second"))


def _draw(title: str, curves: Sequence[Curve], *, log: bool = False) -> Iterator[tuple[str, Any, Any, Any]]:
    """A chart's rows, columns and curves, in thousandths from the left and from the top; nothing without points."""
    points = [point for *_, own in curves for point in own]
    values = [value for _, value in points if value > 0 or not log]
    if not values:
        return
    last, low, high = max(1, *(step for step, _ in points)), min(values) if log else min(0.0, *values), max(values)
    high += (high == low) * (abs(low) or 1)

    def place(step: float, value: float) -> tuple[str, str]:
        up = math.log(max(value, low) / low) / math.log(high / low) if log else (value - low) / (high - low)
        return f"{1000 * step / last:.1f}", f"{1000 * (1 - up):.1f}"

    values = [low * (high / low) ** (at / 4) if log else low + (high - low) * at / 4 for at in range(5)]
    rows = [(place(0, value)[1], f"{value:,.6g}") for value in (float(f"{value:.2g}") for value in values)]
    columns = [(place(step, high)[0], f"{step:,}") for step in dict.fromkeys(last * at // 4 for at in range(5))]
    drawn = [(*one, [(" ".join(place(*at)), f"step {at[0]}: {at[1]:.6g}") for at in thin(own)]) for *one, own in curves]
    yield title, rows, columns, drawn


def thin(points: Points, *, columns: int = 500) -> Points:
    """Of each column the least and the greatest, so that no spike is lost; and the last."""
    width = math.ceil(len(points) / columns) or 1
    parts = (sorted(points[at : at + width], key=lambda point: point[1]) for at in range(0, len(points), width))
    return sorted({*points[-1:], *(point for part in parts for point in (part[0], part[-1]))})


def smooth(points: Points, *, most: int = 1000) -> Points:
    """The mean of a fiftieth of all points around each, of at least five; of long curves at `most` places, or twice."""
    count, sums = len(points), [0.0, *accumulate(value for _, value in points)]
    reach, every = max(2, count // 100), count // most or 1
    places = range((count - 1) % every, count, every)
    spans = [(max(0, at - reach), min(count, at + reach + 1)) for at in places]
    return [(points[at][0], (sums[b] - sums[a]) / (b - a)) for at, (a, b) in zip(places, spans, strict=True)]


def next_commands(folder: Path, recipe: Recipe) -> list[str]:
    """What to type once a run is finished: to chat, to evaluate it on the files that it held out, and to merge it."""
    run, merged = quote(folder), quote(f"{folder.resolve().name}-merged")
    files = [source.path for source in recipe.data.eval] if isinstance(recipe.data.eval, tuple) else ["FILE"]
    evaluations = [f"lorasft evaluate {run} --data {quote(file)}" for file in files]
    return [f"lorasft chat {run}", *evaluations, f"lorasft merge {run} --out {merged}"]


def _answers(run: History) -> list[Sequence[str]]:
    """Each prompt with the first answer and the last four; ✓: as in the data."""
    every = sorted({line["step"] for line in run.answers})
    steps, rows = dict.fromkeys([*every[:1], *every[-4:]]), dict[tuple[str, str], dict[int, str]]()
    for line in run.answers:
        prompt, expected, answer = (line.get(name, "").strip() for name in ("prompt", "expected", "answer"))
        row = f"{prompt[-1000:]}\n{line.get('place', '')}", expected[:1000]
        rows.setdefault(row, {})[line["step"]] = "✓ " * (answer == expected != "") + answer[:1000]
    ended = {step: [line.get("ended") is True for line in run.answers if line["step"] == step] for step in steps}
    heads = [f"step {step:,}\n{sum(ended[step])} of {len(ended[step])} ended" for step in steps]
    cells = [(*row, *(answers.get(step, "") for step in steps)) for row, answers in list(rows.items())[:50]]
    data = [line["ends"] is True for line in run.answers if line["step"] in every[-1:] and "ends" in line]
    head = "in the data" + f"\n{sum(data)} of {len(data)} end" * bool(data)
    return [("prompt", head, *heads), *cells] if cells else []


def _ledger(run: History) -> list[Sequence[Any]]:
    """The rows whose newest loss is far from the others of their split, or above that of the base, and then those with
    the highest. Losses are compared by their logarithms, whose median and spread a few odd rows do not move."""
    found: list[tuple[bool, float, Sequence[Any]]] = []
    for split in ("held out", "train"):
        own = [(row, max(row["losses"].values())[1]) for row in run.rows if row.get("split") == split]
        logs = [math.log(min(1e6, max(1e-6, loss)) if math.isfinite(loss) else 1e6) for _, loss in own]
        middle = statistics.median(logs or [0.0])
        spread = max(0.2, 1.4826 * statistics.median([abs(log - middle) for log in logs] or [0.0]))
        for (row, loss), log in zip(own, logs, strict=True):
            losses = [row["losses"].get(name, [0, None])[1] for name in ("base", "best", "last")]
            far, worse = abs(log - middle) > _OUTLIER * spread, losses[0] is not None and loss > losses[0] + 0.01
            times = f"{float(f'{math.exp(log - middle):.2g}'):,g} times the median, " * far
            why = (times if math.isfinite(loss) else "not finite, ") + "above the base, " * worse
            place, tokens, text = (row.get(name, "") for name in ("place", "tokens", "text"))
            cells = (place, why.rstrip(", "), *map(_number, losses), tokens, split, text)
            found.append((bool(why), abs(log - middle) / spread if why else loss, cells))
    rows = [cells for *_, cells in sorted(found, key=lambda one: one[:2], reverse=True)[:50]]
    return rows and [("row", "stands out", "base", "best", "last", "tokens", "split", "text"), *rows]
