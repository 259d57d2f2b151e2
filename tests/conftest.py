"""A tiny base with a byte-level tokenizer, a file of rows, and recipes over them, on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing in a test may reach the hub

ROWS = 26


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny matrices gain nothing from threads, and lose much when another process wants the cores."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test leaves anything in a home folder."""
    os.environ["LORASFT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama in bf16 safetensors, with weights of a size that shows mistakes."""
    return save_base(tmp_path_factory.mktemp("base"))


def save_base(folder: Path, name: str = "llama", *, dtype: str = "bfloat16") -> Path:
    """Write the tiny random model `name` and its tokenizer to `folder`, as a hub snapshot would be."""
    import torch
    from tiny_models import make_base
    from tiny_tokenizer import save_tokenizer

    model = make_base(name, dtype=getattr(torch, dtype), vocabulary=384, hidden=64)  # bitsandbytes: blocks of 64
    model.save_pretrained(folder)
    return save_tokenizer(folder)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny tokenizer alone."""
    from tiny_tokenizer import save_tokenizer

    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def tiny(tokenizer_folder: Path) -> Any:
    """The tiny tokenizer, loaded anew."""
    from lorasft.data.tokenizer import load_tokenizer

    return load_tokenizer(str(tokenizer_folder))


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions of unequal length; 26 rows make a ragged last step with batches of 8."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"what is {n} + {n}?" + " please" * (n % 5)},
                {"role": "assistant", "content": f"{n} + {n} = {2 * n}" + "!" * (n % 7)},
            ]
        }
        for n in range(ROWS)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def recipe(base: Path, rows: Path, tmp_path: Path) -> Callable[..., str]:
    """Writes a recipe over `base` and `rows`, with sections replaced as given, and returns its path."""

    def write(**sections: dict[str, object]) -> str:
        settings: dict[str, object] = {
            "model": {"base": str(base), "dtype": "float32"},
            "adapter": {"rank": 4, "alpha": 8, "dropout": 0.1},
            "data": {"train": str(rows), "eval": 0.2, "max_length": 120},
            "train": {"epochs": 3, "batch_size": 8},
            "optimizer": {"learning_rate": 5e-3},
            "schedule": {"warmup": 2},
            "run": {"output": str(tmp_path / "run"), "eval_every": 4, "save_every": 3, "sample_every": None},
            "machine": {"micro_batch_tokens": 150},
        }
        for name, values in sections.items():
            settings[name] = {**settings.get(name, {}), **values}  # type: ignore[dict-item]
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
        return str(path)

    return write


def save_to_hub(base: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put `base` where the hub's client keeps a snapshot of people/tiny, links to files elsewhere."""
    commit, folder = "0" * 40, cache / "models--people--tiny"
    (folder / "snapshots" / commit).mkdir(parents=True)
    for path in base.iterdir():
        (folder / "snapshots" / commit / path.name).symlink_to(path)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(commit, encoding="utf-8")
    for name in ("huggingface_hub.constants.HF_HUB_CACHE", "transformers.utils.hub.TRANSFORMERS_CACHE"):
        monkeypatch.setattr(name, str(cache), raising=False)


@pytest.fixture(scope="session")
def run(base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in fp32 that has learned something."""
    from lorasft.cli import main

    folder = tmp_path_factory.mktemp("trained")
    data = {"data.train": rows, "data.eval": 0.2, "data.max_length": 120, "adapter.rank": 4, "adapter.alpha": 8}
    settings = data | {"train.epochs": 6, "train.batch_size": 8, "optimizer.learning_rate": 5e-3, "run.eval_every": 4}
    (folder / "r.yaml").write_text(f"model: {{base: {base}, dtype: float32, quantization: none}}\n", encoding="utf-8")
    words = [f"{key}={value}" for key, value in (settings | {"run.output": folder / "run"}).items()]
    assert main(["train", str(folder / "r.yaml"), *words]) == 0
    return folder / "run"


class Done(NamedTuple):
    """Exit code of a command, and what it has said."""

    code: int
    out: str
    err: str


Command = Callable[..., Done]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command line in this process."""
    from lorasft.cli import main

    def run(*words: object) -> Done:
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as ended:  # argparse
            code = int(str(ended.code))
        return Done(code, *capsys.readouterr())

    return run
