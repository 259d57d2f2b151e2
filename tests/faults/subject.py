"""A run small enough to be killed a thousand times: a byte-sized base, its rows and its recipe, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conftest import save_base

from lorasft.recipe import Recipe

SAVE_EVERY = 2  # steps
KEEP = 2  # checkpoints
STEPS = 12


def make_subject(folder: Path) -> Recipe:
    """Write base and rows into `folder`; the recipe of a run over them, about a second long, into `folder`/run.

    Two layers of 64, fp32, LoRA of rank 4 with dropout; 36 rows of unequal length in steps of 6, 2 epochs of them;
    held-out rows every 5 steps.
    """
    save_base(folder / "base", dtype="float32")
    lines = [
        {"prompt": f"what is {n} + {n}?" + " please" * (n % 5), "completion": f"{2 * n}" + "!" * (n % 7)}
        for n in range(40)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    settings: dict[str, Any] = {
        "model": {"base": str(folder / "base"), "dtype": "float32", "quantization": "none"},
        "adapter": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "data": {"train": str(folder / "rows.jsonl"), "eval": 0.1, "max_length": 120},
        "train": {"epochs": 2, "batch_size": 6},
        "optimizer": {"learning_rate": 5e-3},
        "schedule": {"warmup": 2},
        "run": {
            "output": str(folder / "run"),
            "eval_every": 5,
            "save_every": SAVE_EVERY,
            "keep": KEEP,
            "sample_every": None,
        },
        "machine": {"micro_batch_tokens": 200, "activation_checkpointing": False},
    }
    return Recipe.model_validate(settings)
