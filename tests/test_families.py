"""Every shipped recipe on a tiny random model of its architecture: targets, segments, head, a step."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from tiny_models import EYES, LLAMA_3, VOCABULARY, WINDOWS, shape
from torch import nn

from lorasft.data.packing import make_micro_batches
from lorasft.data.store import all_supervised
from lorasft.errors import RecipeError
from lorasft.model.adapter import attach_adapter, check_targets, trainable
from lorasft.model.base import make_skeleton
from lorasft.model.loss import Network, pair_losses
from lorasft.model.selfcheck import verify
from lorasft.model.towers import model_class
from lorasft.recipe import AdapterSettings
from lorasft.recipe.load import load_recipe, shipped_recipes

SHAPE = shape()
_SHAPE = {key: value for key, value in SHAPE.items() if key != "head_dim"}
ROPE_YARN = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 2.0, "original_max_position_embeddings": 64}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}


PER_LAYER: dict[str, Any] = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8}
LINEAR: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2}
LINEAR |= {"linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}


def _long_rope(rotary: int, **own: Any) -> hf.Phi3Config:
    """`rotary`: how many of a head's 8 numbers turn."""
    factors = {"short_factor": [1.0] * (rotary // 2), "long_factor": [4.0] * (rotary // 2)}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64, **factors}
    return hf.Phi3Config(
        **_SHAPE, original_max_position_embeddings=64, partial_rotary_factor=rotary / 8, rope_parameters=rope, **own
    )


def _gemma_3_with_eyes(**own: Any) -> hf.Gemma3Config:
    places = {"image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92}
    return hf.Gemma3Config(text_config={**SHAPE, **WINDOWS}, vision_config=EYES, mm_tokens_per_image=4, **places, **own)


def _granite(**own: Any) -> hf.GraniteConfig:
    factors = {"embedding_multiplier": 12.0, "attention_multiplier": 0.25, "residual_multiplier": 0.22}
    return hf.GraniteConfig(**_SHAPE, **factors, logits_scaling=16.0, **own)


def _granite_hybrid(**own: Any) -> hf.GraniteMoeHybridConfig:
    mixer = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
    kinds = {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 32}
    return hf.GraniteMoeHybridConfig(**_SHAPE, **mixer, **kinds, **own)


FAMILIES: dict[str, Any] = {  # by the names of recipes; of models with towers, what they are in test_towers.py
    r"llama-3.*|.*distill-llama.*": lambda **own: hf.LlamaConfig(**SHAPE, rope_parameters=dict(LLAMA_3), **own),
    r"qwen2\.5-.*|.*distill-qwen.*": lambda **own: hf.Qwen2Config(**_SHAPE, **own),
    r"gemma-3-(4|12|27)b": _gemma_3_with_eyes,
    r"gemma-3-(270m|1b)": lambda **own: hf.Gemma3TextConfig(**SHAPE, **WINDOWS, **own),
    r"gemma-3n-.*": lambda **own: hf.Gemma3nTextConfig(
        **{**SHAPE, **WINDOWS}, **PER_LAYER, altup_num_inputs=2, altup_correct_scale=False, laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 2, num_kv_shared_layers=0, **own,
    ),
    r"gemma-4-e.*": lambda **own: hf.Gemma4TextConfig(**SHAPE, **WINDOWS, **PER_LAYER, global_head_dim=8, **own),
    r"gemma-4-(12|31)b": lambda **own: hf.Gemma4TextConfig(
        **SHAPE, **WINDOWS, hidden_size_per_layer_input=0, global_head_dim=16, attention_k_eq_v=True,
        num_global_key_value_heads=1, **own,
    ),
    r"gemma-4-26b-a4b": lambda **own: hf.Gemma4TextConfig(
        **SHAPE, **WINDOWS, hidden_size_per_layer_input=0, global_head_dim=16, enable_moe_block=True, num_experts=4,
        top_k_experts=2, moe_intermediate_size=16, **own,
    ),
    r"glm-4\.7-flash": lambda **own: hf.Glm4MoeLiteConfig(
        **{**_SHAPE, "num_key_value_heads": 4}, **EXPERTS, n_routed_experts=4, kv_lora_rank=16, q_lora_rank=16,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, **own,
    ),
    r"gpt-oss-20b": lambda **own: hf.GptOssConfig(
        **SHAPE, **WINDOWS, num_local_experts=4, num_experts_per_tok=2, rope_parameters=dict(ROPE_YARN), **own
    ),
    r"gpt2": lambda **own: hf.GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=128),
    r"granite-4\.1-.*": _granite,
    r"granite-4\.0-h-micro": lambda **own: _granite_hybrid(num_local_experts=0, num_experts_per_tok=0, **own),
    r"granite-4\.0-h-tiny": lambda **own: _granite_hybrid(num_local_experts=4, num_experts_per_tok=2, **own),
    r"ministral-3-.*": lambda **own: hf.Ministral3Config(**SHAPE, **own),
    r"mistral-.*": lambda **own: hf.MistralConfig(**SHAPE, sliding_window=None, **own),
    r"olmo-3.*": lambda **own: hf.Olmo3Config(**_SHAPE, **WINDOWS, **own),
    r"phi-4-14b": lambda **own: hf.Phi3Config(**_SHAPE, **own),
    r"phi-4-mini": lambda **own: _long_rope(6, **own),
    r"qwen3-30b-a3b": lambda **own: hf.Qwen3MoeConfig(**SHAPE, **EXPERTS, num_experts=4, **own),
    r"qwen3-(?!30b).*|.*-qwen3-8b": lambda **own: hf.Qwen3Config(**SHAPE, **own),
    r"qwen3\.[56]-[\d.]+b": lambda **own: hf.Qwen3_5TextConfig(**SHAPE, **LINEAR, **own),
    r"qwen3\.6-35b-a3b": lambda **own: hf.Qwen3_5MoeTextConfig(
        **SHAPE, **LINEAR, **EXPERTS, num_experts=4, shared_expert_intermediate_size=16, **own
    ),
    r"smollm3-3b": lambda **own: hf.SmolLM3Config(**_SHAPE, no_rope_layers=[1, 0], **own),
    r"tiny": lambda **own: hf.LlamaConfig(**SHAPE, **own),
}  # fmt: skip
TIED = r"llama-3\.2.*|gemma.*|granite.*|ministral-3-3b|phi-4-mini|qwen3-(0\.6|1\.7|4)b|qwen3\.5-(0\.8|2|4)b|smollm.*"


def find_config(name: str) -> Any:
    """The config of a tiny model of the architecture that the recipe `name` is for."""
    (make,) = (make for pattern, make in FAMILIES.items() if re.fullmatch(pattern, name))
    return make(**({"tie_word_embeddings": True} if re.fullmatch(TIED, name) else {}))


# Weights that no adapter reaches, though they are no embedding and no norm: experts in stacks, their routers, what
# a recurrent mixer convolves with.
UNREACHED = r"\.experts\.|\.(router|gate)\.weight$|conv1d"
SHARED = r"\.mlp\."  # of GLM, too: in the place of linears that all tokens share PEFT would adapt the experts
UNUSED = r"altup\..*_coefs"  # while it trains, Gemma 3n reads these weights without a call: their B stays 0


# Every family takes both fast paths: one that fell back would be named here, with its reason.
@pytest.mark.parametrize("name", shipped_recipes())
def test_targets_segments_head_and_a_step(name: str) -> None:
    recipe = load_recipe(name, ["data.train=rows.jsonl"])
    torch.manual_seed(0)
    config = find_config(name)
    base = model_class(config)._from_config(config, dtype=torch.float32)
    assert recipe.model.quantization == "nf4"
    matrices = _matrices(base)
    model = attach_adapter(base, recipe.adapter, seed=0)
    unreached = matrices - {f"{path}.weight" for path in _adapted(model)}
    assert unreached == {path for path in matrices if re.search(SHARED if "glm" in name else UNREACHED, path)}
    network = verify(model.get_base_model())
    assert network.segments and network.head is not None, network.notices
    _learns_from_a_step(model, network)


def _matrices(base: Any) -> set[str]:
    """Names of the weights that do a model's work: without embeddings, a tied or untied head, norms and biases."""
    head = base.get_output_embeddings()
    lookups = {id(module.weight) for module in base.modules() if isinstance(module, nn.Embedding) or module is head}
    return {
        path
        for path, parameter in base.named_parameters()
        if parameter.dim() >= 2 and id(parameter) not in lookups and not path.endswith("_bias")
    }


def _adapted(model: Any) -> set[str]:
    return {
        path.removeprefix("base_model.model.") for path, module in model.named_modules() if hasattr(module, "lora_A")
    }


def _learns_from_a_step(model: Any, network: Network) -> None:
    """In training mode, over two sequences in a row, every B gets a gradient: A is random, so none may be zero."""
    model.train()
    ids = np.random.default_rng(5).integers(0, 90, 40).astype(np.int32)  # 90 and above: Gemma's images
    (batch,) = make_micro_batches(
        [(all_supervised(ids[:23]),), (all_supervised(ids[23:]),)].__getitem__, range(2), capacity=40
    )
    pair_losses(network, batch).mean().backward()
    gradients = {path: weight.grad for path, weight in trainable(model).items() if "lora_B" in path}
    assert gradients
    for path, gradient in gradients.items():
        if re.search(UNUSED, path):
            continue
        assert gradient is not None and gradient.isfinite().all() and gradient.abs().max() > 0, path


def test_targets_never_reach_into_a_vision_tower() -> None:
    """It is not there; of what a model has beside its decoder nothing is adapted."""
    check_targets(make_skeleton(_gemma_3_with_eyes()), AdapterSettings(targets=("q_proj",)))
    model = make_skeleton(hf.Gemma3nConfig(text_config={"num_hidden_layers": 5, "num_kv_shared_layers": 0}))
    with pytest.raises(RecipeError, match=r"2 of 2 called embedding_projection are not linears of the language model"):
        check_targets(model, AdapterSettings(targets=("embedding_projection",)))
