"""A training step against plain transformers + PEFT: python scripts/bench_step.py DATA.jsonl --base FOLDER [--steps N]

Both train the same adapter on the same rows of the same NF4 base, in turn and in processes of their own: lorasft
with its packed rows and chunked loss, and a hand-written loop over padded batches with the model's own loss, PEFT's
own linears and the mean over supervised tokens. Prints real (not padded) tokens a second, the median over steps,
and the peak memory of each process. Rows are prompts and answers as a recipe takes them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BATCH, PADDED_ROWS = 16, 8  # examples a step; rows of a padded batch


def prepare(arguments: argparse.Namespace, folder: Path) -> Any:
    """The recipe's data in token ids, the same for both."""
    from lorasft.data.prepare import prepare as prepare_data
    from lorasft.data.tokenizer import load_tokenizer

    recipe = load(arguments)
    return prepare_data(recipe.data, recipe.chat, tokenizer=load_tokenizer(recipe.model.base), folder=folder).train


def load(arguments: argparse.Namespace) -> Any:
    from lorasft.recipe import DataSettings, ModelSettings, Recipe, TrainSettings

    data = DataSettings(train=arguments.data, eval=None, max_length=512, max_dropped=0.5)
    train = TrainSettings(batch_size=BATCH, steps=arguments.steps)
    return Recipe(model=ModelSettings(base=arguments.base), data=data, train=train)


def run_ours(arguments: argparse.Namespace, rows: Any) -> list[float]:
    import torch
    from accelerate import PartialState

    from lorasft.data.packing import Plan
    from lorasft.model.adapter import attach_adapter, trainable
    from lorasft.model.base import load_base
    from lorasft.model.loss import pair_losses
    from lorasft.model.selfcheck import verify

    recipe = load(arguments)
    model = attach_adapter(load_base(recipe.model, PartialState().device), recipe.adapter, seed=0)
    network = verify(model.get_base_model())
    network.causal.train()
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=2e-4)
    plan = Plan(len(rows), BATCH, arguments.steps, seed=0, loss="token", micro_batch_tokens=2048)
    rates = []
    for number in range(1, arguments.steps + 1):
        step = plan.step(number, rows)
        started = time.perf_counter()
        for batch in step.micro_batches:
            weights = torch.as_tensor(batch.weights, device=network.device)
            ((pair_losses(network, batch) * weights).sum() / step.divisor).backward()
        optimizer.step()
        optimizer.zero_grad()
        real = sum(len(tokens) for example in step.examples for tokens in rows.sequences(int(example)))
        rates.append(real / (time.perf_counter() - started))
    return rates


def run_plain(arguments: argparse.Namespace, rows: Any) -> list[float]:
    import torch
    from accelerate import PartialState
    from peft import LoraConfig, get_peft_model

    from lorasft.data.packing import Plan
    from lorasft.model.base import load_base  # the same NF4 base, without the repacking fault of bitsandbytes

    device = PartialState().device
    base = load_base(load(arguments).model, device)
    config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    model = get_peft_model(base, config).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-4)
    plan = Plan(len(rows), BATCH, arguments.steps, seed=0, loss="token", micro_batch_tokens=1)
    rates = []
    for number in range(1, arguments.steps + 1):
        tokens = [one for example in plan.step_examples(number) for one in rows.sequences(int(example))]
        learned = sum(int((one.labels != -100).sum()) for one in tokens)
        started = time.perf_counter()
        for start in range(0, len(tokens), PADDED_ROWS):
            batch = tokens[start : start + PADDED_ROWS]
            ids = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.long)
            labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
            for row, one in enumerate(batch):
                ids[row, : len(one)] = torch.as_tensor(one.ids)
                labels[row, : len(one)] = torch.as_tensor(one.labels)
                mask[row, : len(one)] = 1
            loss = model(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                labels=labels.to(device),
                use_cache=False,
                num_items_in_batch=learned,
            ).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rates.append(sum(map(len, tokens)) / (time.perf_counter() - started))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--base", required=True)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--only", choices=["ours", "plain"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        with tempfile.TemporaryDirectory() as folder:
            rows = prepare(arguments, Path(folder))
            rates = (run_ours if arguments.only == "ours" else run_plain)(arguments, rows)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"rate": statistics.median(rates[1:]), "peak": peak}))  # the first step pages weights in
        return
    results = {}
    for name in ("ours", "plain"):
        command = [sys.executable, *sys.argv, "--only", name]
        # As the command line sets it: long spinning makes the figures of a busy machine meaningless.
        environment = {"GOMP_SPINCOUNT": "10000", **os.environ}
        said = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
        results[name] = json.loads(said.splitlines()[-1])
        print(f"{name:6} {results[name]['rate']:9,.0f} tokens/s   peak {results[name]['peak']:7,.0f} MB", flush=True)
    print(f"ratio  {results['ours']['rate'] / results['plain']['rate']:9.2f}")


if __name__ == "__main__":
    main()
