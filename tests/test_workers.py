"""The work of preparing data, shared by processes: the same result as in one, whatever the rows; and how it ends."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from lorasft.data.prepare import prepare
from lorasft.data.workers import available_workers, map_blocks
from lorasft.errors import CapacityError, DataError, LorasftError
from lorasft.recipe import ChatSettings, DataSettings

pytestmark = pytest.mark.skipif(available_workers() < 1 or not hasattr(os, "fork"), reason="no fork here")
FILES, ROWS = 7, 40  # a file is a block at least: enough for processes to be started


def row(number: int, **more: Any) -> dict[str, Any]:
    talk = [{"role": "user", "content": f"What is {number} + 1?"}, {"role": "assistant", "content": f"é {number + 1}"}]
    return {"messages": talk * (1 + number % 3), **more}


def write_files(folder: Path, bad: dict[int, str]) -> tuple[str, ...]:
    """Files of conversations; `bad`: the lines that stand in the place of rows, by number."""
    for file in range(FILES):
        numbers = range(file * ROWS, (file + 1) * ROWS)
        lines = [bad.get(number, json.dumps(row(number))) for number in numbers]
        (folder / f"{file}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "8.json").write_text(json.dumps([row(number) for number in range(20)]), encoding="utf-8")
    (folder / "9.csv").write_text("prompt,completion\n7,8\n1,2,3\n8,9\n", encoding="utf-8")
    return tuple(str(file) for file in sorted(folder.iterdir()))


BAD = {
    3: "{",
    47: "[1]",
    48: json.dumps(row(48) | {"messages": [{"role": "user", "content": "x"}]}),
    90: json.dumps(row(90)).replace("What", "<|end|>"),
    91: json.dumps(row(91)).replace("What", "W" * 300),
    131: json.dumps(row(7)),
    199: '{"messages": []}',
    200: json.dumps({"messages": [row(2)["messages"][0] | {"role": "assistant"}]}),
}
SETTINGS: list[dict[str, Any]] = [
    {"eval": 0.2},
    {"eval": None, "overlong": "truncate"},
    {"eval": 0.1, "max_length": 45},
    {"eval": "apart"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_processes_make_the_same_store(tmp_path: Path, tiny: Any, settings: dict[str, Any]) -> None:
    (tmp_path / "rows").mkdir()
    files = write_files(tmp_path / "rows", BAD)
    (tmp_path / "apart.jsonl").write_text("".join(json.dumps(row(n)) + "\n" for n in range(900, 910)))
    if settings["eval"] == "apart":
        settings = settings | {"eval": (str(tmp_path / "apart.jsonl"),)}
    sources = ({"path": files[0], "share": 0.5}, *files[1:])
    data = DataSettings(train=sources, on_bad_row="drop", **{"max_length": 120, "max_dropped": 1.0, **settings})
    contents = []
    for workers in (1, 3):
        made = prepare(data, ChatSettings(), tokenizer=tiny, folder=tmp_path / str(workers), workers=workers)
        files = (path for path in made.folder.rglob("*") if path.is_file())
        contents.append({path.relative_to(made.folder): path.read_bytes() for path in files})
    assert contents[0] == contents[1] != {}
    report = made.report
    apart = 10 if isinstance(data.eval, tuple) else 0
    assert report.bad_rows >= 6 and report.rows == FILES * ROWS + 20 + 3 + apart
    assert len(report.dropped) == report.dropped_examples()
    places = [made.train.place(at) for at in range(len(made.train))]
    assert places == sorted(places, key=lambda place: (place.file, place.line))


def failure(tiny: Any, folder: Path, workers: int, **settings: Any) -> str:
    data = DataSettings(train=(str(folder),), eval=None, **settings)
    with pytest.raises(LorasftError) as fault:
        prepare(data, ChatSettings(), tokenizer=tiny, folder=folder / "store", workers=workers)
    return str(fault.value)


FAULTS: dict[str, tuple[dict[int, str], int]] = {
    "few, read": ({3: "{", 170: "[]", 171: "7"}, 3),
    "twenty of many": (dict.fromkeys(range(30, 200, 7), "{"), 19),
    "few, encoded": ({n: json.dumps(row(n)).replace("What", "<|end|>") for n in (1, 2, 100, 250)}, 4),
    "twenty of many, encoded": ({n: json.dumps(row(n)).replace("What", "</s>") for n in range(0, 270, 3)}, 19),
    "another format": ({80: '{"other": 1}', 10: "{"}, 2),
    "encoded and read": ({3: json.dumps(row(3)).replace("What", "</s>"), 270: "{"}, 2),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_come_together_and_in_order(tmp_path: Path, tiny: Any, name: str) -> None:
    bad, count = FAULTS[name]
    write_files(tmp_path, bad)
    (tmp_path / "9.csv").unlink()
    alone, shared = (failure(tiny, tmp_path, workers) for workers in (1, 3))
    assert alone == shared and alone.count("error: ") == count
    lines = re.findall("where: ([^ \n]+)", alone)
    assert lines == sorted(lines, key=lambda line: (line.split(":")[0], int(line.split(":")[1])))


def test_a_file_that_ends_wrong_comes_behind_the_rows_before_it(tmp_path: Path, tiny: Any) -> None:
    write_files(tmp_path, dict.fromkeys(range(0, 36, 2), "{"))
    (tmp_path / "9.csv").unlink()
    (tmp_path / "8.json").write_text("[" + json.dumps(row(1)) + ", 3, 4, {", encoding="utf-8")
    alone, shared = (failure(tiny, tmp_path, workers) for workers in (1, 3))
    assert alone == shared and alone.count("error: ") == 19 and "8.json:1" in alone
    (tmp_path / "0.jsonl").write_text("{", encoding="utf-8")
    alone, shared = (failure(tiny, tmp_path, workers) for workers in (1, 3))
    assert alone == shared and alone.count("error: ") == 2 and alone.startswith("error: not JSON: Expecting property")


def slow_square(number: int) -> tuple[int, bytes]:
    time.sleep(0.02 if number % 5 == 0 else 0.001)
    return number**2, bytes(100_000)  # more than a pipe holds


def test_results_come_in_order_and_processes_end() -> None:
    blocks = [(number, bytes(100_000)) for number in range(60)]
    with closing(map_blocks(lambda block: slow_square(block[0]), blocks, workers=4)) as results:
        assert [square for square, _ in results] == [number**2 for number in range(60)]
    with closing(map_blocks(slow_square, range(1000), workers=2)) as results:
        assert next(results)[0] == 0 and len(multiprocessing.active_children()) == 2
    assert not multiprocessing.active_children()


def at_twenty(act: Callable[[], object]) -> Callable[[int], int]:
    def work(number: int) -> int:
        if number == 20:
            act()
        return number

    return work


def raise_memory_error() -> None:
    raise MemoryError


def test_a_process_that_dies_ends_the_work() -> None:
    with pytest.raises(CapacityError, match="died"):
        list(map_blocks(at_twenty(lambda: os.kill(os.getpid(), signal.SIGKILL)), range(99), workers=2))
    with pytest.raises(MemoryError):
        list(map_blocks(at_twenty(raise_memory_error), range(99), workers=2))
    with pytest.raises(ZeroDivisionError):
        list(map_blocks(at_twenty(lambda: 1 // 0), range(99), workers=2))
    assert not multiprocessing.active_children()


def die_while_answering(number: int) -> bytes:
    """The answer takes many times as long to be sent as the process lives."""
    if number == 20:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
    return bytes(10**8 * (number == 20))


def test_nobody_waits_for_the_rest_of_an_answer() -> None:
    """Of a process that is killed while it sends one, as out of memory, or because the work is left."""
    with pytest.raises(CapacityError, match="died"):
        list(map_blocks(die_while_answering, range(99), workers=2))
    for _ in range(10):
        with closing(map_blocks(lambda _: bytes(3_000_000), range(99), workers=3)) as results:
            next(results)
    assert not multiprocessing.active_children()


def test_blocks_that_cannot_be_read_end_the_work() -> None:
    def blocks() -> Any:
        yield from range(30)
        raise DataError("cut")

    with pytest.raises(DataError, match="cut"):
        list(map_blocks(at_twenty(int), blocks(), workers=2))
    assert not multiprocessing.active_children()


SCRIPT = """
import multiprocessing, signal, sys, time
from lorasft.data.workers import map_blocks

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it

def work(number):
    time.sleep(0.05)
    return number

try:
    for number in map_blocks(work, range(10_000), workers=2):
        if number == 3:
            print(*(child.pid for child in multiprocessing.active_children()), flush=True)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("group", [True, False])
def test_a_signal_leaves_no_process_behind(number: int, group: bool) -> None:
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], start_new_session=True, **streams)
    assert process.stdout
    children = [int(word) for word in process.stdout.readline().split()]
    (os.killpg if group else os.kill)(process.pid, number)
    _, errors = process.communicate(timeout=10)  # to the end of stderr, which the last child closes
    assert errors == "" and len(children) == 2
    assert process.returncode == (130 if number == signal.SIGINT else -number)
