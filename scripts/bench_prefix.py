"""Steps with shared prefixes against the same without: python scripts/bench_prefix.py [--base FOLDER] [--write]

Both train one adapter in one process, step about, on random tokens: examples that begin with the same `--stem` tokens
and end with about `--answer` learned ones of their own. Prints examples a second and computed tokens of both, medians
over steps, and their ratio. With shared prefixes the micro-batches are as wide as `machine: auto` would make them; both
begin with `--tokens`. Without --base the model is a random Llama of 56 million parameters in NF4. With a short stem it
shows from where on sharing pays (the cost of a segment in lorasft/data/prefixes.py). `--write` puts the table into
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
from bench_shared import table, write_section

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the command line sets it

RANDOM: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
}


def write_random_base(folder: Path) -> str:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**RANDOM)).to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


def make_rows(arguments: argparse.Namespace, vocabulary: int) -> Any:
    """Examples of one stem and an answer of its own, half to one and a half times as long as `--answer`."""
    import numpy as np

    from lorasft.data.tokens import Tokens
    from lorasft.model.scoring import Given

    random = np.random.default_rng(0)
    stem = random.integers(0, vocabulary, arguments.stem)
    rows = []
    for length in random.integers(arguments.answer // 2, arguments.answer * 3 // 2 + 1, 4 * arguments.batch):
        ids = np.concatenate([stem, random.integers(0, vocabulary, length)]).astype(np.int32)
        rows.append(Tokens(ids, np.where(np.arange(len(ids)) < max(1, arguments.stem), -100, ids).astype(np.int32)))
    return Given(rows)


def run(arguments: argparse.Namespace, base: str) -> str:
    """Train both, and tell what came of it as a table."""
    import torch
    from accelerate import PartialState

    from lorasft.data.packing import Plan
    from lorasft.model.adapter import attach_adapter, trainable
    from lorasft.model.base import load_base
    from lorasft.model.loss import pair_losses
    from lorasft.model.selfcheck import verify
    from lorasft.recipe import AdapterSettings, ModelSettings
    from lorasft.train.layout import widen

    model = attach_adapter(load_base(ModelSettings(base=base), PartialState().device), AdapterSettings(), seed=0)
    network = verify(model.get_base_model())
    print(*network.notices, sep="\n", end="")
    network.causal.train()
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=2e-4)
    rows = make_rows(arguments, network.causal.config.get_text_config().vocab_size)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    tokens: dict[bool, list[int]] = {True: [], False: []}
    alone = Plan(len(rows), arguments.batch, arguments.steps, 0, "token", arguments.tokens)
    together = replace(alone, share_prefixes=True)
    plans = {True: replace(together, micro_batch_tokens=widen(together, rows)), False: alone}
    for number in range(1, arguments.steps + 2):
        for share, plan in plans.items():
            started = time.perf_counter()
            step = plan.step(number, rows)
            for batch in step.micro_batches:
                weights = torch.as_tensor(batch.weights, device=network.device)
                ((pair_losses(network, batch) * weights).sum() / step.divisor).backward()
            float(optimizer.param_groups[0]["params"][0].grad.sum())  # wait for the device
            optimizer.step()
            optimizer.zero_grad()
            seconds[share].append(time.perf_counter() - started)
            tokens[share].append(step.tokens)
    ratios = [long / short for long, short in zip(seconds[False], seconds[True], strict=True)][1:]
    spread = f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"
    lines = [
        (
            name,
            f"{arguments.batch / statistics.median(seconds[share][1:]):.2f}",  # the first step pages weights in
            f"{statistics.median(tokens[share][1:]):,.0f}",
            f"{plans[share].micro_batch_tokens:,}",
            ratio,
        )
        for share, name, ratio in ((False, "alone", "1.00x"), (True, "shared", spread))
    ]
    return table(("prefixes", "examples/s", "tokens a step", "micro-batches of up to", "speed"), lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="a model folder")
    parser.add_argument("--stem", type=int, default=800, help="tokens that all examples begin with")
    parser.add_argument("--answer", type=int, default=200, help="tokens of each example's own, about")
    parser.add_argument("--batch", type=int, default=32, help="examples a step")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=2048, help="micro_batch_tokens without shared prefixes")
    parser.add_argument("--write", action="store_true", help="the table into docs/benchmarks.md")
    arguments = parser.parse_args()
    started, own, idle = time.monotonic(), time.process_time(), psutil.cpu_times().idle
    with tempfile.TemporaryDirectory() as folder:
        text = run(arguments, arguments.base or write_random_base(Path(folder)))
    print(text)
    wall = time.monotonic() - started
    busy = wall * (os.cpu_count() or 1) - (psutil.cpu_times().idle - idle) - (time.process_time() - own)
    if arguments.write:
        title = f"Shared prefixes, {arguments.stem} tokens and about {arguments.answer} of each example's own"
        write_section(title, text, busiest=max(0.0, busy / wall))


if __name__ == "__main__":
    main()
