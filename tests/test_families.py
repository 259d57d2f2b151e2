"""Every shipped recipe on a tiny random model of its architecture: targets, segments, a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, shape
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)
from transformers.pytorch_utils import Conv1D

from lorasft.model.adapter import attach_adapter
from lorasft.model.selfcheck import verify
from lorasft.recipe import load_recipe, shipped_recipes

SHAPE = shape()
_SHAPE = {key: value for key, value in SHAPE.items() if key != "head_dim"}
ARCHITECTURES: dict[str, Any] = {
    "gemma-3-1b": lambda: Gemma3TextConfig(**SHAPE, sliding_window=8),
    "gpt2": lambda: GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=128),
    "llama-3.1-8b": lambda: LlamaConfig(**SHAPE),
    "llama-3.2-1b": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama-3.2-3b": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "mistral-7b-v0.3": lambda: MistralConfig(**SHAPE),
    "phi-4-mini": lambda: Phi3Config(**_SHAPE, partial_rotary_factor=0.75, tie_word_embeddings=True),
    "qwen2.5-7b": lambda: Qwen2Config(**_SHAPE),
    "qwen3-4b": lambda: Qwen3Config(**SHAPE, tie_word_embeddings=True),
    "qwen3-8b": lambda: Qwen3Config(**SHAPE),
    "smollm2-1.7b": lambda: LlamaConfig(**_SHAPE, tie_word_embeddings=True),
    "tiny": lambda: LlamaConfig(**SHAPE),
}


def test_every_recipe_has_its_architecture_here() -> None:
    assert ARCHITECTURES.keys() == shipped_recipes().keys()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_targets_resolve_and_segments_hold(name: str) -> None:
    recipe = load_recipe(name, ["data.train=rows.jsonl"])
    base = AutoModelForCausalLM.from_config(ARCHITECTURES[name](), dtype=torch.float32)
    head = base.get_output_embeddings()
    linears = {path for path, module in base.named_modules()
               if isinstance(module, (nn.Linear, Conv1D)) and module is not head}  # fmt: skip
    model = attach_adapter(base, recipe.adapter, seed=0)
    adapted = {path.removeprefix("base_model.model.") for path, module in model.named_modules()
               if hasattr(module, "lora_A")}  # fmt: skip
    assert adapted == linears and linears
    network = verify(model.get_base_model())
    assert network.segments and network.head is not None, network.notices
