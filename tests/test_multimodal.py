"""Checkpoints that also see or hear: their language model is trained, towers are neither read nor changed."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers as hf
from bitsandbytes.nn import Linear4bit
from model_sizes import make_config
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_architectures import LINEAR_ATTENTION
from test_oracles import Rows, assert_same_as, packed_step
from tiny_models import EYES, WINDOWS, randomize_adapter, shape
from torch import nn

from lorasft.artifact import find_artifact
from lorasft.merge.merge import merge
from lorasft.model.adapter import attach_adapter, write_adapter
from lorasft.model.base import check_mostly_quantized, count_bytes, load_base, make_skeleton, read_config
from lorasft.model.memory import dry_run, heaviest_batch
from lorasft.model.recompute import recompute
from lorasft.model.selfcheck import verify
from lorasft.model.tables import keep_on_host
from lorasft.model.weightless import make_sample, make_weightless, plan_network
from lorasft.recipe import AdapterSettings, ModelSettings

CPU = torch.device("cpu")
SHAPE = shape(64)  # bitsandbytes: blocks of 64
PLAIN = {key: value for key, value in SHAPE.items() if key != "head_dim"}
MROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
QWEN_EYES: dict[str, Any] = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16}
QWEN_EYES |= {"out_hidden_size": 64, "patch_size": 4}
POSITIONS: dict[str, Any] = {"num_position_embeddings": 16}
PLACES = {f"{kind}_token_id": 90 + n for n, kind in enumerate(("image", "video", "vision_start", "vision_end"))}
PER_LAYER: dict[str, Any] = {"vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 64}
SOUND: dict[str, Any] = {"hidden_size": 16, "vocab_size": 4, "vocab_offset": 101, "conf_num_attention_heads": 2}
SOUND |= {"conf_num_hidden_layers": 1, "sscp_conv_channel_size": [4, 2]}
SMALL_EYES: dict[str, Any] = {key: EYES[key] for key in EYES if key not in ("model_type", "vision_use_head")}


def _gemma_3n() -> hf.Gemma3nConfig:
    more = {
        "altup_num_inputs": 2,
        "num_kv_shared_layers": 0,
        "laurel_rank": 64,
        "activation_sparsity_pattern": [0.0] * 2,
    }
    eyes = {"hidden_size": 16, "vocab_size": 4, "vocab_offset": 97}
    return hf.Gemma3nConfig(
        text_config={**SHAPE, **WINDOWS, **PER_LAYER, **more}, vision_config=eyes, audio_config=SOUND
    )


KINDS: dict[str, tuple[Callable[[], Any], set[str], str]] = {  # config, towers, how files call a linear of layer 0
    "qwen-2.5-vl": (
        lambda: hf.Qwen2_5_VLConfig(
            text_config={**PLAIN, "rope_parameters": MROPE},
            vision_config={**QWEN_EYES, "fullatt_block_indexes": [0]},
            **PLACES,
        ),
        {"model.visual"},
        "model.layers.0",
    ),
    "qwen-3-vl": (
        lambda: hf.Qwen3VLConfig(
            text_config={**SHAPE, "rope_parameters": MROPE},
            vision_config={**QWEN_EYES, **POSITIONS, "deepstack_visual_indexes": [0]},
            **PLACES,
        ),
        {"model.visual"},
        "model.language_model.layers.0",
    ),
    "qwen-3.5": (
        lambda: hf.Qwen3_5Config(
            text_config={**SHAPE, **LINEAR_ATTENTION, "linear_value_head_dim": 32},
            vision_config={**QWEN_EYES, **POSITIONS}, **PLACES,
        ),
        {"model.visual"},
        "model.language_model.layers.1",
    ),
    "gemma-3": (
        lambda: hf.Gemma3Config(
            text_config={**SHAPE, **WINDOWS}, vision_config=EYES, mm_tokens_per_image=4, image_token_index=90,
            boi_token_index=91, eoi_token_index=92,
        ),
        {"model.vision_tower", "model.multi_modal_projector"},
        "language_model.model.layers.0",
    ),
    "gemma-3n": (_gemma_3n, {"model.vision_tower", "model.audio_tower"}, "model.language_model.layers.0"),
    "gemma-4": (
        lambda: hf.Gemma4Config(
            text_config={**SHAPE, **WINDOWS, **PER_LAYER, "num_kv_shared_layers": 0, "global_head_dim": 16},
            vision_config={**SMALL_EYES, "num_key_value_heads": 2, "head_dim": 8}, image_token_id=90, video_token_id=91,
            audio_token_id=92,
        ),
        {"model.vision_tower", "model.embed_vision"},
        "model.language_model.layers.0",
    ),
    "mistral-3": (
        lambda: hf.Mistral3Config(
            text_config={**SHAPE, "model_type": "mistral", "sliding_window": None}, image_token_index=90,
            vision_config={**SMALL_EYES, "model_type": "pixtral", "head_dim": 8}, tie_word_embeddings=False,
        ),
        {"model.vision_tower", "model.multi_modal_projector"},
        "language_model.model.layers.0",
    ),
    "llava": (
        lambda: hf.LlavaConfig(
            text_config={**SHAPE, "model_type": "llama"}, image_token_index=90,
            vision_config={**SMALL_EYES, "model_type": "clip_vision_model", "projection_dim": 16},
        ),
        {"model.vision_tower", "model.multi_modal_projector"},
        "language_model.model.layers.0",
    ),
}  # fmt: skip


def whole_class(config: Any) -> Any:
    """transformers' class, towers and all; Gemma 3n's eyes, which ask for a library, are no more than a layer here."""
    return hf.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]


def _small_eyes(config: Any, own: Any = hf.AutoModel.from_config, **options: Any) -> Any:
    return nn.Linear(16, 4) if config.model_type == "gemma3n_vision" else own(config, **options)


@pytest.fixture(scope="module", params=KINDS)
def saved(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    """A kind, the folder of a random checkpoint as hubs have it, and its model of transformers' class."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config = KINDS[request.param][0]()
    with patch.object(hf.AutoModel, "from_config", _small_eyes):
        plain = whole_class(config)(config).float().eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    plain.save_pretrained(folder)
    if request.param == "qwen-3.5":
        path = folder / "model.safetensors"
        save_file({**load_file(path), "mtp.fc.weight": torch.randn(8, 4)}, path, {"format": "pt"})
    return request.param, folder, plain


def _trained(folder: Path) -> Any:
    base = load_base(ModelSettings(base=str(folder), quantization="none", dtype="float32"), CPU)
    model = attach_adapter(base, AdapterSettings(rank=4, alpha=8.0), seed=0)
    randomize_adapter(model)
    return model


def _whole(folder: Path) -> Any:
    """The checkpoint in transformers' own class, with no key missing."""
    with patch.object(hf.AutoModel, "from_config", _small_eyes):
        found = whole_class(read_config(str(folder))).from_pretrained(folder, output_loading_info=True)
    assert not found[1]["missing_keys"] and not found[1]["mismatched_keys"], found[1]
    return found[0]


def _on_whole(folder: Path, adapter: Path) -> Any:
    """The adapter on it: PEFT warns of missing keys and says which are unexpected."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        peft = PeftModel.from_pretrained(_whole(folder), adapter, is_trainable=True)
        assert not peft.load_adapter(adapter, "default", is_trainable=True).unexpected_keys
    return peft


def test_towers_are_left_out_and_a_step_equals_the_whole_models(saved: tuple[str, Path, Any], tmp_path: Path) -> None:
    kind, folder, plain = saved
    model = _trained(folder)
    base, names = model.get_base_model(), {name for name, _ in plain.named_parameters()}
    assert set(base.left_out) == KINDS[kind][1] and type(base).__name__ == type(plain).__name__
    own = {name.replace("base_layer.", "") for name, _ in base.named_parameters() if "lora_" not in name}
    assert own == {name for name in names if not name.startswith(tuple(base.left_out))}
    assert make_skeleton(base.config).left_out == base.left_out
    network, rows = verify(base), Rows()
    assert network.head and network.segments and not network.notices, network.notices
    arguments = (base.config, ModelSettings(base="-", quantization="none", dtype="float32"), AdapterSettings(), CPU)
    weightless = make_weightless(*arguments)
    sample = verify(make_sample(weightless, *arguments).get_base_model())
    assert sample.segments and sample.head
    assert dry_run(
        plan_network(network, weightless), heaviest_batch(network, longest=20, capacity=60), recomputed=0
    ).peak
    got = packed_step(model, network, rows, "token", 100)
    write_adapter(model, tmp_path, base=ModelSettings(base=str(folder)))
    assert_same_as(_on_whole(folder, tmp_path), got, rows, worst=1e-5 if kind == "qwen-3.5" else 5e-6)


@pytest.mark.parametrize("kind", ["gemma-3n", "gemma-4"])
def test_layers_that_read_keys_and_values_of_earlier_ones(kind: str) -> None:
    """The last ones of Gemma 3n and 4: alone, in a row, and where those that made them are computed a second time."""
    torch.manual_seed(0)
    config = KINDS[kind][0]().get_text_config().to_dict() | {"num_kv_shared_layers": 2, "num_hidden_layers": 4}
    config |= {"layer_types": 2 * ["sliding_attention", "full_attention"]}
    config |= {"activation_sparsity_pattern": [0.0] * 4, "intermediate_size": 64} if kind == "gemma-3n" else {}
    plain = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(**config), dtype=torch.float32)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    ours, oracle = (
        attach_adapter(copy.deepcopy(plain), AdapterSettings(rank=4, alpha=8.0), seed=0).train() for _ in range(2)
    )
    for model in (ours, oracle):
        randomize_adapter(model)
    network = verify(ours.get_base_model())
    assert network.segments and not network.notices, network.notices
    assert "model.layers.3.self_attn.k_proj" not in dict(network.causal.named_modules())
    for capacity, layers in ((1, 0), (100, 0), (100, 4)):
        recompute(network.causal, layers)
        got = packed_step(ours, network, Rows(), "token", capacity)
        assert_same_as(copy.deepcopy(oracle), got, Rows(), worst=5e-6)


def test_a_merge_keeps_names_and_bytes_of_what_it_leaves_alone(saved: tuple[str, Path, Any], tmp_path: Path) -> None:
    kind, folder, _ = saved
    adapter, out, four = tmp_path / "adapter", tmp_path / "out", tmp_path / "four"
    adapter.mkdir()
    write_adapter(_trained(folder), adapter, base=ModelSettings(base=str(folder)))
    artifact = find_artifact(str(adapter), base=str(folder))
    done = merge(artifact, out, check=False)
    before, after = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert list(before) == list(after) and f"{KINDS[kind][2]}.self_attn.q_proj.weight" in before
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == done["updated"] and not any(
        re.search("vis|tower|projector|audio|mtp", one) for one in changed
    )
    merged = _whole(out)
    ids = torch.arange(3, 13).unsqueeze(0)
    want = _on_whole(folder, adapter).eval()(input_ids=ids).logits
    torch.testing.assert_close(merged(input_ids=ids).logits, want, atol=1e-4, rtol=1e-4)
    assert (_whole(folder)(input_ids=ids).logits - want).abs().max() > 0.01
    merge(artifact, four, check=False, quantize="nf4")
    packed, again = load_file(four / "model.safetensors"), _whole(four)
    assert all(
        torch.equal(after[name], packed[name]) for name in before if re.search("visual|tower|multi_modal|mtp", name)
    )
    towers = [again.get_submodule(path) for path in _trained(folder).get_base_model().left_out]
    inside = {type(module) for tower in towers for module in tower.modules()}
    assert Linear4bit not in inside and Linear4bit in {type(module) for module in again.modules()}


def test_what_is_called_for_text_is_kept() -> None:
    """Gemma 3n looks the ids beyond its words up in embeddings of images and sounds."""
    assert "model.embed_vision.embedding.weight" in dict(make_skeleton(_gemma_3n()).named_parameters())


# By hub id: GiB on a card of 8 GiB beside the adapter, and of the table that stays on the host.
PUBLISHED = {
    "google/gemma-3n-E4B-it": (2.91, 4.38),
    "google/gemma-3n-E2B-it": (1.92, 3.75),
    "google/gemma-4-E4B-it": (3.16, 5.25),
    "google/gemma-4-E2B-it": (1.65, 4.38),
    "Qwen/Qwen3-VL-8B-Instruct": (5.66, 0),
    "Qwen/Qwen2.5-VL-7B-Instruct": (5.17, 0),
    "Qwen/Qwen3.5-9B": (7.12, 0),
    "google/gemma-3-4b-it": (2.79, 0),
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503": (13.18, 0),
}


@pytest.mark.parametrize("base", PUBLISHED)
def test_published_models_are_mostly_4_bit_and_as_large_as_said(base: str) -> None:
    config = make_config(base)
    check_mostly_quantized(make_skeleton(config))
    model = make_weightless(config, ModelSettings(base="-", dtype="bfloat16"), AdapterSettings(), CPU)
    keep_on_host(model.get_base_model(), CPU, card=8 << 30)
    sizes = count_bytes(model)
    host = sum(one.nbytes for one in model.parameters() if hasattr(one, "on_host"))
    got = (round((sum(sizes.values()) - sizes["adapter"]) / 2**30, 2), round(host / 2**30, 2))
    assert got == PUBLISHED[base], got
