"""A run small enough to be killed a thousand times: a byte-sized base, its rows and its recipe, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from lorasft.model.base import quiet_progress
from lorasft.recipe import Recipe

SAVE_EVERY = 2  # steps
KEEP = 2  # checkpoints
_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def make_subject(folder: Path) -> Recipe:
    """Write base and rows into `folder`; the recipe of a run over them, about a second long, into `folder`/run.

    Two layers of 32, 260 tokens, fp32, LoRA of rank 4 with dropout; 35 rows of unequal length in steps of 6, so the
    last step of each of the 2 epochs is ragged; held-out rows every 5 steps.
    """
    _save_base(folder / "base")
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
        "run": {"output": str(folder / "run"), "eval_every": 5, "save_every": SAVE_EVERY, "keep": KEEP},
        "machine": {"micro_batch_tokens": 200, "activation_checkpointing": False},
    }
    return Recipe.model_validate(settings)


def _save_base(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<|start|>", "<|end|>"]
    vocabulary = {token: index for index, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = _TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    )
    with quiet_progress():
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
