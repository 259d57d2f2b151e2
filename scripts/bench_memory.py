"""What `lorasft plan` foretells against what comes: bench_memory.py --data FILE [FILE ...] --tokenizer FOLDER [--write]

For every shape and file, and with no layer recomputed and with all of them: what `lorasft plan` predicts from the
config and the data alone, and the peak of the CPU's allocator over two micro-batches, the heaviest of the run, with an
update between them, on the base as `lorasft train` loads it (random weights, rank 16 on all linears, AdamW). `beside`
is the peak without the weights, which are known; `off` is how far the prediction is from it, and from the whole. The
second table has learned tokens a second: as foretold from one layer of each kind, and over real steps after that.
`--write` puts the tables into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_shared import run_process, save_base, table, write_section

WARMUP, STEPS = 1, 2
SIZES = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
WIDE = {**SIZES, "intermediate_size": 1408}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", {**WIDE, "vocab_size": 32_000}),
    "Qwen3, 152k tokens": ("Qwen3Config", {**WIDE, "vocab_size": 151_936}),
    "Gemma 2, window 512": ("Gemma2Config", {**WIDE, "vocab_size": 64_000, "sliding_window": 512}),
    "Qwen3-MoE, 2 of 8": (
        "Qwen3MoeConfig",
        {**SIZES, "moe_intermediate_size": 704, "num_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32_000},
    ),
}


def make_recipe(base: Path, shape: str, data: str, *, recompute: bool) -> Any:
    """Fused experts are no linears: such a base stays in 16 bits."""
    from lorasft.recipe import Recipe

    quantization = "none" if "MoE" in shape else "nf4"
    settings = {
        "model": {"base": str(base), "quantization": quantization},
        "data": {"train": [{"path": data}], "eval": None, "max_length": 2048, "overlong": "truncate"},
        "chat": {"template": "plain"},
        "run": {"output": str(base.parent / f"run-{recompute}"), "eval_every": None},
        "machine": {"activation_checkpointing": recompute},
    }
    return Recipe.model_validate_json(json.dumps(settings))


def compare(base: Path, shape: str, data: str, recompute: bool) -> dict[str, float]:
    """Predicted and measured bytes and speeds of one cell, in this process."""
    from lorasft.train.plan import plan_run
    from lorasft.train.run import open_run

    recipe = make_recipe(base, shape, data, recompute=recompute)
    outlook = plan_run(recipe, memory=None)
    loaded = outlook.prediction.static.loaded
    with open_run(recipe, resume=False) as opened:
        measured = real_peak(lambda: work_twice(opened.run))
        reached = real_speed(opened.run)
    return {
        "tokens": len(outlook.fit.heaviest.ids),
        "sequences": len(outlook.fit.heaviest.segments),
        "loaded": loaded,
        "predicted": outlook.prediction.total - loaded,
        "measured": measured,
        "foretold": outlook.duration.supervised_tokens_per_second,
        "reached": reached,
    }


def real_speed(run: Any) -> float:
    """Learned tokens a second of the run's own steps."""
    from lorasft.signals import StopRequest
    from lorasft.train.loop import take_step

    seconds, tokens = 0.0, 0.0
    run.network.causal.train()
    for number in range(1, WARMUP + STEPS + 1):
        started = time.perf_counter()
        step = run.plan.step(number, run.rows)
        take_step(run, step, StopRequest())
        if number > WARMUP:
            seconds += time.perf_counter() - started
            tokens += step.supervised_tokens
    return tokens / seconds


def work_twice(run: Any) -> None:
    """The heaviest micro-batch before and after an update, which makes the optimizer's states."""
    from lorasft.data.packing import Step
    from lorasft.train.layout import find_heaviest
    from lorasft.train.loop import add_gradients

    batch = find_heaviest(run.plan, run.rows)
    step = Step(1, 0.0, batch.examples, (batch,))
    run.network.causal.train()
    add_gradients(run, step)
    run.learner.optimizer.step()
    add_gradients(run, step)


def real_peak(work: Callable[[], object]) -> int:
    """Bytes at the peak of the CPU's allocator while `work` runs."""
    from torch.profiler import ProfilerActivity, profile

    gc.collect()  # nothing older may be freed meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def measure(options: argparse.Namespace) -> None:
    """Every shape and file in a process of its own."""
    peaks, speeds, busiest = [], [], 0.0
    for shape, data in itertools.product(SHAPES, options.data):
        with tempfile.TemporaryDirectory() as folder:
            base = Path(folder) / "base"
            name, sizes = SHAPES[shape]
            save_base(name, sizes, Path(options.tokenizer), folder=base)
            cell = json.dumps([str(base), shape, data])
            said, foreign = run_process(sys.executable, [__file__, "--cell", cell])
        busiest = max(busiest, foreign)
        for recomputed, figures in said.items():
            peaks.append([shape, Path(data).name, *peak_cells(figures, recomputed)])
            speeds.append([shape, Path(data).name, *speed_cells(figures, recomputed)])
            print(*peaks[-1], *speeds[-1][3:], sep="  ", flush=True)
    head = ("shape", "rows", "tokens", "sequences", "recomputed", "predicted, MB", "beside, MB", "off", "of the whole")
    show("Memory predicted", table(head, peaks), busiest=busiest, write=options.write)
    head = ("shape", "rows", "recomputed", "foretold, tok/s", "reached, tok/s", "off")
    show("Speed predicted", table(head, speeds), busiest=busiest, write=options.write)


def show(title: str, text: str, *, busiest: float, write: bool) -> None:
    print(f"\n{text}", end="")
    if write:
        write_section(title, text, busiest=busiest)


def peak_cells(said: dict[str, float], recomputed: str) -> list[str]:
    predicted, measured, loaded = said["predicted"], said["measured"], said["loaded"]
    return [
        f"{said['tokens']:,}",
        f"{said['sequences']}",
        recomputed,
        f"{predicted / 1e6:,.1f}",
        f"{measured / 1e6:,.1f}",
        f"{predicted / measured - 1:+.1%}",
        f"{(predicted + loaded) / (measured + loaded) - 1:+.1%}",
    ]


def speed_cells(said: dict[str, float], recomputed: str) -> list[str]:
    foretold, reached = said["foretold"], said["reached"]
    return [recomputed, f"{foretold:,.0f}", f"{reached:,.0f}", f"{foretold / reached - 1:+.0%}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", help="files of rows in a format of a recipe")
    parser.add_argument("--tokenizer", help="a folder")
    parser.add_argument("--write", action="store_true", help="the tables into docs/benchmarks.md")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        base, *rest = json.loads(options.cell)
        layouts = {"none": False, "all": True}
        print(json.dumps({name: compare(Path(base), *rest, recompute) for name, recompute in layouts.items()}))
    elif options.data and options.tokenizer:
        measure(options)
    else:
        parser.error("give --data and --tokenizer")


if __name__ == "__main__":
    main()
