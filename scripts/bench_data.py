"""Rows per second of preparing data, with every check on; and of TRL's preparation where `trl` is installed.

    python scripts/bench_data.py TOKENIZER FILE [--rows N] [--repeat N]

TOKENIZER is a folder or a hub id, FILE holds prompt-completion, alpaca or chat rows. The rows are repeated up to N,
each with its number in its first question, so that no two are equal. TRL prepares in one process
(`dataset_num_proc=None`), lorasft in one per core; the third line is a bare batched call of the tokenizer on the
finished text. Nothing is installed or downloaded. Each is timed in turn, `--repeat` times, and the best is printed: run
it on a quiet machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorasft.data.examples import read_blocks, shape_block
from lorasft.data.prepare import prepare
from lorasft.data.report import BadRows, Report
from lorasft.data.tokenizer import load_tokenizer
from lorasft.recipe import ChatSettings, DataSettings

Messages = list[dict[str, Any]]
LENGTH = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer")
    parser.add_argument("file")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--repeat", type=int, default=2)
    options = parser.parse_args()
    rows = numbered_rows(options.file, options.rows)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")
        ways: dict[str, Callable[[], float]] = {"lorasft": lambda: time_ours(options.tokenizer, file)}
        if importlib.util.find_spec("trl"):
            ways["trl, one process"] = lambda: time_trl(options.tokenizer, rows, Path(folder))
        else:
            print("trl is not installed: ours only", file=sys.stderr)
        ways["the tokenizer alone"] = lambda: time_tokenizer(options.tokenizer, rows)
        for name, way in ways.items():
            seconds = min(way() for _ in range(options.repeat))
            print(f"{name:>20}: {len(rows):,} rows in {seconds:6.2f} s, {len(rows) / seconds:8,.0f} rows/s", flush=True)


def numbered_rows(path: str, count: int) -> list[Messages]:
    """The conversations of a file, repeated up to `count`, no two of them equal."""
    settings = DataSettings(train=(path,), on_bad_row="drop")
    bad = BadRows("drop", Report())
    blocks = (block for source in settings.train for block in read_blocks(source, settings))
    examples = (example for block in blocks for example in shape_block(block, settings, bad=bad))
    found = [example.messages for example in examples if example.messages]
    rows = [[dict(message) for message in found[number % len(found)]] for number in range(count)]
    for number, row in enumerate(rows):
        row[0]["content"] += f" ({number})"
    return rows


def time_ours(name: str, file: Path) -> float:
    tokenizer = load_tokenizer(name)
    settings = DataSettings(train=(str(file),), max_length=LENGTH, max_dropped=1.0)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        made = prepare(settings, ChatSettings(), tokenizer=tokenizer, folder=Path(folder) / "tokens")
        seconds = time.perf_counter() - start
        assert made.report.parity_breaks == 0
    return seconds


def time_trl(name: str, rows: list[Messages], folder: Path) -> float:
    """TRL's own preparation: prompt and completion where there is one answer, whole conversations otherwise."""
    import datasets
    import transformers
    import trl

    datasets.disable_progress_bars()
    datasets.disable_caching()
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    pairs = all(len(row) == 2 for row in rows)
    data = datasets.Dataset.from_list(
        [{"prompt": row[:-1], "completion": row[-1:]} if pairs else {"messages": row} for row in rows]
    )
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **sizes)
    arguments = trl.SFTConfig(
        output_dir=str(folder / "trl"),
        max_length=LENGTH,
        assistant_only_loss=not pairs,
        use_cpu=True,
        bf16=False,
        report_to=[],
    )
    trainer = trl.SFTTrainer(
        model=transformers.LlamaForCausalLM(config),
        args=arguments,
        train_dataset=data.select(range(4)),
        processing_class=tokenizer,
    )
    start = time.perf_counter()
    trainer._prepare_dataset(data, tokenizer, arguments, False, None, "train")
    return time.perf_counter() - start


def time_tokenizer(name: str, rows: list[Messages]) -> float:
    tokenizer = load_tokenizer(name)
    texts = [tokenizer.apply_chat_template(row, tokenize=False) for row in rows]
    start = time.perf_counter()
    tokenizer(texts, add_special_tokens=False)
    return time.perf_counter() - start


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
