"""Mutated adapters, recipes and rows: nothing but our own errors, in bounded time and memory.

    python scripts/fuzz.py --trials 20000              # of each kind; prints a table, exits 1 for what should not be
    python scripts/fuzz.py --kind rows --first 815 --trials 1      # one case again: seed and number make it

Half of the cases change a value somewhere in the tree, the other half bytes as well. A header or config that is still
valid is put on a tiny model and planned to be merged; a base is loaded with its tokenizer and merged into; a recipe is
loaded; rows are shaped, rendered and tokenized.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a mutated name is asked of nobody

import psutil
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging

from lorasft.adapter_files import CONFIG, WEIGHTS
from lorasft.artifact import find_artifact
from lorasft.data.chat_format import ChatFormat
from lorasft.data.examples import read_blocks, shape_block
from lorasft.data.labels import Labeler
from lorasft.data.report import Report
from lorasft.data.tokenizer import load_tokenizer
from lorasft.errors import LorasftError
from lorasft.merge.write import plan_merge
from lorasft.model.adapter import attach_adapter, load_adapter, write_adapter
from lorasft.model.base import load_base
from lorasft.recipe import AdapterSettings, ChatSettings, DataSettings, ModelSettings
from lorasft.recipe.load import load_recipe, shipped_recipes

SECONDS = 5.0  # for one case
GROWTH = 500 << 20  # bytes
TINY = Path(__file__).parents[1] / "recipes/tiny"
ATOMS: list[Any] = [
    None, True, False, 0, 1, -1, 7, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("inf"), float("nan"), "", "x",
    "q_proj", "\x1b[31m\u202e", "x" * 5000, [], {}, [[]], [None], {"a": None}, {"": {}}, "../../etc/passwd",
    "//evil/share", "(a+)+$", "org/model", "https://a:b@c", "<|end|>", "\u2028", [0] * 300, ["q_proj"] * 300,
    [[0, 10**6]], "F32", "F8_E4M3",
]  # fmt: skip
BYTES = [
    b"\x00", b"\xff\xfe", b"{", b"}", b"[", b"[" * 300, b'"', b"\\", b"\\ud800", b"1e999", b"-", b"NaN", b"null",
    b"&a ", b"*a", b"!!python/name:os.system ", b": ", b"\t", b"\n", b"\n- ", b"\xe2\x80\xa8", b"\x1b", b"|", b">",
    b"---\n", b"? ", b"%YAML 9\n", b"#", b"<<: ", b"9" * 5000, b",", b"'",
]  # fmt: skip
QUESTION, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
CALL = {"function": {"name": "f", "arguments": '{"x": 1}'}}
ROWS: list[Any] = [
    {"messages": [{"role": "system", "content": "S"}, QUESTION, ANSWER], "tools": [{"name": "f", "parameters": {}}]},
    {"messages": [QUESTION, {**ANSWER, "tool_calls": [CALL]}, {"role": "tool", "content": "7"}, ANSWER]},
    {"messages": [{**QUESTION, "content": [{"type": "text", "text": "Q"}]}, {**ANSWER, "train": True}]},
    {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "<think>a</think>b"}]},
    {"instruction": "Q", "input": "", "output": "A", "system": "S"},
    {"prompt": [QUESTION, ANSWER, QUESTION], "completion": [{**ANSWER, "weight": 1}], "label": True, "documents": []},
    {"instruction": "Q", "output": "A", "history": [["q", "a"]], "images": [], "chat_template_kwargs": {"x": 1}},
    {"text": "once upon a time"},
]


@dataclass
class Tally:
    """What became of the cases of one kind."""

    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    slowest: float = 0.0  # seconds
    growth: int = 0  # bytes of memory at the end beyond those at the start


class Bench:
    """A tiny base and an adapter on it, to be mutated in `folder`."""

    def __init__(self, folder: Path) -> None:
        config = LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
        )
        self.base, self.adapter, self.file = folder / "base", folder / "adapter", folder / "case"
        self.adapter.mkdir()
        self.model = AutoModelForCausalLM.from_config(config)
        self.model.save_pretrained(self.base)
        settings = AdapterSettings(rank=2, targets=("q_proj", "down_proj"))
        attached = attach_adapter(copy.deepcopy(self.model), settings, seed=0)
        write_adapter(attached, self.adapter, base=ModelSettings(base=str(self.base)))
        self.config = json.loads((self.adapter / CONFIG).read_bytes())
        self.weights = (self.adapter / WEIGHTS).read_bytes()
        for name in ("tokenizer_config.json", "tokenizer.json"):
            shutil.copy(TINY / "base" / name, self.base)
        self.files = {path.name: path.read_bytes() for path in self.base.glob("*.json")}
        self.recipes = [path.read_bytes() for path in shipped_recipes().values()]
        self.trees = [load_recipe("tiny").model_dump(mode="json"), {"model": {"base": "x"}, "data": {"train": "y"}}]
        self.data = DataSettings(train=({"path": str(self.file.with_suffix(".jsonl"))},), eval=None)  # type: ignore[arg-type]
        self.report = Report()
        self.labeler = Labeler(ChatFormat(load_tokenizer(str(TINY / "base")), ChatSettings()), self.data)

    def headers(self, draw: random.Random) -> None:
        (self.adapter / CONFIG).write_text(json.dumps(self.config), encoding="utf-8")
        (self.adapter / WEIGHTS).write_bytes(mutate_header(self.weights, draw))
        self.try_all(self._load, self._merge)

    def configs(self, draw: random.Random) -> None:
        (self.adapter / WEIGHTS).write_bytes(self.weights)
        (self.adapter / CONFIG).write_bytes(mutate_json(self.config, draw))
        self.try_all(self._load, self._merge)

    def bases(self, draw: random.Random) -> None:
        name = draw.choice(list(self.files))
        for other, content in self.files.items():
            (self.base / other).write_bytes(content)
        (self.base / name).write_bytes(mutate_json(json.loads(self.files[name]), draw, most=64))
        (self.adapter / CONFIG).write_text(json.dumps(self.config), encoding="utf-8")
        (self.adapter / WEIGHTS).write_bytes(self.weights)
        self.try_all(self._tokenize, self._load_base, self._merge)

    def recipes_(self, draw: random.Random) -> None:
        whole = draw.random() < 0.5
        content = mutate_json(draw.choice(self.trees), draw) if whole else mutate_bytes(draw.choice(self.recipes), draw)
        path = self.file.with_suffix(".yaml")
        path.write_bytes(content)
        override = mutate_bytes(b"train.batch_size=4", draw).decode("latin-1")
        load_recipe(str(path), ["data.train=x", *([override] if draw.random() < 0.3 else [])])

    def rows(self, draw: random.Random) -> None:
        row = draw.choice(ROWS)
        lines = [json.dumps(row).encode(), mutate_json(row, draw)]
        path = self.file.with_suffix(draw.choice([".jsonl", ".jsonl", ".csv"]))
        path.write_bytes(draw.choice([b"\n", b"\n", b"\r\n", b""]).join(lines))
        report = Report()
        source = self.data.train[0].model_copy(update={"path": str(path)})
        for block in read_blocks(source, self.data):
            list(self.labeler.encode_all(list(shape_block(block, self.data, report=report)), report=report))
        report.raise_errors()

    def try_all(self, *uses: Callable[[], object]) -> None:
        """All ways that a file can go, also when the first refuses it."""
        faults = []
        for use in uses:
            try:
                use()
            except LorasftError as fault:
                faults.append(fault)
        if faults:
            raise faults[0]

    def _load(self) -> None:
        load_adapter(copy.deepcopy(self.model), find_artifact(str(self.adapter)))

    def _merge(self) -> None:
        artifact = find_artifact(str(self.adapter), base=str(self.base))
        artifact.verify()
        plan_merge(artifact)

    def _load_base(self) -> None:
        load_base(ModelSettings(base=str(self.base), quantization="none"), torch.device("cpu"))

    def _tokenize(self) -> None:
        ChatFormat(load_tokenizer(str(self.base)), ChatSettings())


def mutate_bytes(content: bytes, draw: random.Random) -> bytes:
    for _ in range(draw.choice([1, 1, 2, 5])):
        at, end = sorted(draw.randrange(len(content) + 1) for _ in range(2))
        end = min(end, at + draw.choice([0, 1, 4, 64, 4096]))
        middle = draw.choice([draw.choice(BYTES), draw.choice(BYTES), draw.randbytes(3), content[at:end] * 2, b""])
        content = content[:at] + middle + content[end:]
    return content[: draw.randrange(len(content) + 1)] if draw.random() < 0.1 else content


def mutate_value(value: Any, draw: random.Random, *, most: float) -> Any:
    """A copy of a tree with one place of it changed; no number that comes in is larger than `most`."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice(list(value))
        kept = {name: item for name, item in value.items() if name != key}
        renamed = draw.choice([key, key, key, key, key + "s", "", "tokenizer_kwargs"])
        return kept if draw.random() < 0.1 else {**kept, renamed: mutate_value(value[key], draw, most=most)}
    if isinstance(value, list) and value and draw.random() < 0.85:
        at = draw.randrange(len(value))
        return [
            *value[:at],
            *([] if draw.random() < 0.1 else [mutate_value(value[at], draw, most=most)]),
            *value[at + 1 :],
        ]
    if isinstance(value, int) and draw.random() < 0.5:
        return value + draw.choice([-1, 1, 8, -value, 1000 if most > 1000 else 2])
    atoms = [atom for atom in ATOMS if not isinstance(atom, (int, float)) or not atom > most]
    return draw.choice([draw.choice(atoms), draw.choice(atoms), [value], {"a": value}])


def mutate_json(value: Any, draw: random.Random, *, most: float = float("inf")) -> bytes:
    for _ in range(draw.choice([1, 1, 1, 3])):
        value = mutate_value(value, draw, most=most)
    content = json.dumps(value, ensure_ascii=draw.random() < 0.5).encode()
    return content if draw.random() < 0.7 else mutate_bytes(content, draw)


def mutate_header(content: bytes, draw: random.Random) -> bytes:
    """A safetensors file with another length, header, or end."""
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    if draw.random() < 0.8:
        header = mutate_json(json.loads(header), draw)
    if draw.random() < 0.05:
        header = header.ljust(draw.choice([1 << 10, 1 << 20, 17 << 20]))
    length = len(header)
    if draw.random() < 0.1:
        length = draw.choice([0, 1, max(length - 1, 0), length + 1, 2**32, 2**63, 2**64 - 1])
    if draw.random() < 0.2:
        data = draw.choice([data[:-1], data + b"\0", b"", mutate_bytes(data, draw)])
    return length.to_bytes(8, "little") + header + data


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"over {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def run_cases(kind: str, case: Callable[[random.Random], None], *, seed: int, first: int, trials: int) -> Tally:
    tally, memory = Tally(), psutil.Process().memory_info
    before = memory().rss
    for number in range(first, first + trials):
        started = time.perf_counter()
        try:
            with at_most(SECONDS):
                case(random.Random(f"{kind} {seed} {number}"))
            tally.accepted += 1
        except LorasftError as fault:
            tally.refused[type(fault).__name__] += 1
            str(fault).encode()
        except BaseException as fault:
            if isinstance(fault, KeyboardInterrupt):
                raise
            tally.broken.append(f"{kind} {number}: {type(fault).__name__}: {str(fault)[:200]}")
        tally.slowest = max(tally.slowest, time.perf_counter() - started)
        tally.growth = max(tally.growth, memory().rss - before)
    return tally


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=500, help="cases of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--kind", choices=["headers", "configs", "bases", "recipes", "rows"], action="append")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    broken: list[str] = []
    titles = ["mutated", "cases", "accepted", "refused", "other exceptions", "slowest", "memory grew by"]
    print("| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        kinds = {
            "headers": bench.headers,
            "configs": bench.configs,
            "bases": bench.bases,
            "recipes": bench.recipes_,
            "rows": bench.rows,
        }
        for kind in given.kind or kinds:
            tally = run_cases(kind, kinds[kind], seed=given.seed, first=given.first, trials=given.trials)
            refused = ", ".join(f"{count:,} {name}" for name, count in tally.refused.most_common())
            print(f"| {kind} | {given.trials:,} | {tally.accepted:,} | {refused} | {len(tally.broken)} | "
                  f"{tally.slowest:.2f} s | {tally.growth / 2**20:.0f} MiB |", flush=True)  # fmt: skip
            broken += tally.broken
            if tally.growth > GROWTH:
                broken.append(f"{kind}: memory grew by {tally.growth / 2**20:.0f} MiB")
    print("\n".join(broken), file=sys.stderr, end="\n" if broken else "")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
