"""Every kind of adapter that merges: PEFT's own merge in float64 is what it has to be, to one rounding."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import make_base, shape
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)
from transformers.pytorch_utils import Conv1D

from lorasft.merge.folder import merge

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
MORE: dict[str, Callable[[], Any]] = {
    "tied llama": lambda: LlamaConfig(**shape(), tie_word_embeddings=True),
    "llama with biases": lambda: LlamaConfig(**shape(), attention_bias=True),
    "qwen3_moe": lambda: Qwen3MoeConfig(**shape(), num_experts=12, num_experts_per_tok=2, moe_intermediate_size=24),
    "mixtral": lambda: MixtralConfig(**shape(), num_local_experts=3),
    "gpt_oss": lambda: GptOssConfig(**shape(), num_local_experts=3, num_experts_per_tok=2),
}


def save_model(folder: Path, name: str, dtype: torch.dtype) -> Path:
    """Write the tiny random model `name` to `folder`."""
    if name == "gemma3 with images":
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                  "image_size": 28, "patch_size": 14}  # fmt: skip
        config = Gemma3Config(text_config=shape(), vision_config=vision, mm_tokens_per_image=1)
        torch.manual_seed(2)
        model = Gemma3ForConditionalGeneration(config).to(dtype)
    elif name in MORE:
        torch.manual_seed(2)
        model = AutoModelForCausalLM.from_config(MORE[name](), dtype=dtype)
    else:
        model = make_base(name, dtype=dtype)
    with torch.no_grad():  # zeros and ones hide mistakes
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def save_adapter(base: Path, folder: Path, *, tokens: int | None = None, **settings: Any) -> Path:
    """A PEFT adapter, random in everything that it trains, on the model in `base`, written by PEFT itself."""
    model = load(base, tokens=tokens)
    conv1d = any(isinstance(module, Conv1D) for module in model.modules())
    config = LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8, "fan_in_fan_out": conv1d, **settings})
    peft = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for _, parameter in sorted(peft.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    peft.save_pretrained(folder)
    return folder


def load(base: Path, *, tokens: int | None = None, dtype: torch.dtype | None = None) -> Any:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype or "auto")
    if tokens:
        model.resize_token_embeddings(tokens, mean_resizing=False)
    return model


def merge_with_peft(
    base: Path, adapter: Path, out: Path, *, tokens: int | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors that PEFT's merge in `dtype` and transformers' saving write."""
    peft = PeftModel.from_pretrained(load(base, tokens=tokens, dtype=dtype), adapter, torch_device="cpu")
    if dtype == torch.float64:
        peft.double()
    peft.merge_and_unload().save_pretrained(out)
    return load_file(out / "model.safetensors")


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "rank and alpha patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "down_proj", "v_proj"],
            "rank_pattern": {"layers.0.self_attn.q_proj": 2, r"layers\.1\..*proj": 7, "v_proj": 3},
            "alpha_pattern": {"down_proj": 5, "^model.layers.1.self_attn.q_proj": 3},
            "use_rslora": True,
        },
    ),
    "modules to save": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm", "embed_tokens"]},
    ),
    "all biases": ("llama with biases", {"target_modules": ["q_proj", "up_proj"], "bias": "all"}),
    "adapted biases": ("gpt2", {"target_modules": ["c_attn"], "bias": "lora_only"}),
    "bias of B": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "lora_bias": True}),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 96, 5]}),
    "tokens of a tied embedding": ("gpt2", {"target_modules": ["c_attn"], "trainable_token_indices": {"wte": [3, 5]}}),
    "dora": ("llama", {"target_modules": "all-linear", "use_dora": True}),
    "dora, transposed": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "embedding and head": ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "experts one by one": ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "experts, ranks": (
        "mixtral",
        {"target_modules": [], "target_parameters": EXPERTS, "rank_pattern": {"experts.down_proj": 2}},
    ),
    "experts in one": ("gpt_oss", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "one of the experts' weights": ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": EXPERTS[1:]}),
    "language model of gemma 3": ("gemma3 with images", {"target_modules": r".*language_model.*\.(q|up)_proj"}),
    "larger vocabulary": ("llama", {"target_modules": ["q_proj"], "tokens": 120}),
    "larger vocabulary, tied": ("gemma3", {"target_modules": ["q_proj"], "tokens": 120}),
}
DIFFERENT = {"dora", "dora, transposed"}  # a norm is summed in another order than PEFT's
ROUNDED_TWICE = {
    "experts one by one",
    "experts, ranks",
    "experts in one",
    "one of the experts' weights",
    "embedding and head",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_is_pefts(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    name, settings = KINDS[kind]
    base = save_model(tmp_path / "base", name, dtype)
    adapter = save_adapter(base, tmp_path / "adapter", **settings)
    if isinstance(settings["target_modules"], str):
        edit_config(adapter, target_modules=["q_proj"])  # a pattern from a file is not run
    merge(base, adapter, tmp_path / "ours")
    ours = load_file(tmp_path / "ours/model.safetensors")
    if isinstance(settings["target_modules"], str):
        edit_config(adapter, target_modules=settings["target_modules"])
    tokens = settings.get("tokens")
    exact = merge_with_peft(base, adapter, tmp_path / "exact", tokens=tokens, dtype=torch.float64)
    theirs = merge_with_peft(base, adapter, tmp_path / "theirs", tokens=tokens, dtype=dtype)
    assert ours.keys() == exact.keys()
    before = load_file(base / "model.safetensors")
    for key, tensor in ours.items():
        assert tensor.dtype == before[key].dtype
        if dtype == torch.bfloat16:
            ulp = 2.0 ** (torch.frexp(exact[key])[1].double() - 8)
            assert ((tensor.double() - exact[key]).abs() <= 0.5 * ulp).double().mean() >= 0.999, key
        if kind not in DIFFERENT and (dtype == torch.float32 or kind not in ROUNDED_TWICE):
            assert torch.equal(tensor, theirs[key].to(dtype)), key
        else:
            torch.testing.assert_close(tensor, theirs[key].to(dtype), msg=key)
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert not tokens or merged.get_input_embeddings().num_embeddings == tokens == merged.config.vocab_size


def edit_config(adapter: Path, **values: object) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")
