"""Tiny random models of real architectures, with weights large enough that a mistake shows.

At the usual initialization a leak between sequences moves the loss by 5e-6, and B = 0 hides A; so here every
matrix has a standard deviation of 0.2 and B is random.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, GPT2Config, LlamaConfig, Qwen3Config

VOCABULARY = 97


class Given(list[Any]):
    """Sequences in memory, one to an example: what a plan asks of a store."""

    def sequences(self, example: int) -> tuple[Any, ...]:
        return (self[example],)


# ATen held to AVX2 (ATEN_CPU_CAPABILITY) still asks the CPU for more, and its bf16 attention then raises.
HELD_TO_AVX2 = torch.backends.cpu.get_cpu_capability() == "AVX2" and any(
    torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16")
)
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.skipif(HELD_TO_AVX2, reason="torch has no bf16 attention here"))


def shape(hidden: int = 32) -> dict[str, Any]:
    """What the configs of Llama's relatives share."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden // 4,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


WINDOWS: dict[str, Any] = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
LLAMA_3: dict[str, Any] = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA_3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
EYES: dict[str, Any] = {"model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 32}
EYES |= {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "vision_use_head": False}
SOFT_CAPS: dict[str, Any] = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
GPT_2: dict[str, Any] = {"vocab_size": VOCABULARY, "n_layer": 2, "n_head": 4, "n_positions": 128}
GPT_2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
CONFIGS: dict[str, Any] = {
    "llama": lambda hidden: LlamaConfig(**shape(hidden)),
    "qwen3": lambda hidden: Qwen3Config(**shape(hidden)),
    "gemma3": lambda hidden: Gemma3TextConfig(**shape(hidden), **WINDOWS),
    "gemma2": lambda hidden: Gemma2Config(**shape(hidden), **WINDOWS, **SOFT_CAPS, query_pre_attn_scalar=hidden // 4),
    "gpt2": lambda hidden: GPT2Config(**GPT_2, n_embd=hidden, initializer_range=0.2, bos_token_id=1, eos_token_id=2),
}


def make_base(
    name: str, dtype: torch.dtype = torch.float32, vocabulary: int = VOCABULARY, *, hidden: int = 32, layers: int = 2
) -> Any:
    """A random causal language model of the architecture `name`, always the same, under eager attention."""
    torch.manual_seed(2)
    config = CONFIGS[name](hidden)
    config.vocab_size, config.num_hidden_layers = vocabulary, layers
    if layer_types := getattr(config, "layer_types", None):
        config.layer_types = (layer_types * layers)[:layers]
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype)
    with torch.no_grad():  # zeros and ones hide mistakes: biases and norms get values too
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def randomize_adapter(model: Any, seed: int = 11) -> None:
    """Give A and B random values of a size that matters: B at 0, its start, would hide A."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                size = 0.2 if "lora_A" in name else 0.1
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
