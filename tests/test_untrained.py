"""Special tokens that a base never trained, and the token that generation has to stop on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_base
from safetensors.torch import load_file, save_file

from lorasft import cli
from lorasft.data.tokenizer import load_tokenizer, refuse_untrained
from lorasft.errors import DataError

EMBEDDING = "model.embed_tokens.weight"
START, END = 2, 3  # <|start|>, <|end|> of the tiny tokenizer


def with_rows(folder: Path, change: Callable[[torch.Tensor], None], dtype: torch.dtype) -> Path:
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors[EMBEDDING])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def empty(rows: torch.Tensor) -> None:
    rows[END] *= 1e-4


def alike(rows: torch.Tensor) -> None:
    rows[[0, 1, END]] = rows[0].clone()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("change", [empty, alike])
def test_untrained_rows_are_refused_where_they_are_learned(
    tmp_path: Path, change: Callable[[torch.Tensor], None], dtype: torch.dtype
) -> None:
    folder = save_base(tmp_path)
    tokenizer = load_tokenizer(str(folder))
    refuse_untrained(str(folder), tokenizer, supervised=[START, END])
    with_rows(folder, change, dtype)
    refuse_untrained(str(folder), tokenizer, supervised=[START])
    with pytest.raises(DataError, match=r"asks to learn <\|end\|>") as fault:
        refuse_untrained(str(folder), tokenizer, supervised=[END, START])
    assert "chat.template=plain" in str(fault.value.hint)


def test_shards_and_folders_without_weights(tmp_path: Path) -> None:
    folder = with_rows(save_base(tmp_path / "base"), empty, torch.float32)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    tokenizer = load_tokenizer(str(folder))
    refuse_untrained(str(folder), tokenizer, supervised=[END])  # nothing to read
    index = {"weight_map": {EMBEDDING: "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="never trained"):
        refuse_untrained(str(folder), tokenizer, supervised=[END])


def test_preview_and_training_refuse_untrained_tokens(recipe: Any, tmp_path: Path, capsys: Any) -> None:
    folder = with_rows(save_base(tmp_path / "base"), empty, torch.bfloat16)
    path = recipe(model={"base": str(folder)})
    assert cli.main(["preview", path]) == 3 and cli.main(["train", path]) == 3
    assert capsys.readouterr().err.count("asks to learn <|end|>") == 2
    assert cli.main(["preview", path, "chat.template=plain"]) == 0


def test_the_adapters_generation_stops_where_answers_end(recipe: Any, tmp_path: Path) -> None:
    assert cli.main(["train", recipe(), "train.steps=1", "schedule.warmup=0", "run.eval_every=null"]) == 0
    config = json.loads((tmp_path / "run/adapter/generation_config.json").read_bytes())
    assert config["eos_token_id"][0] == END
