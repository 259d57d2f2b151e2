"""GGUF and Ollama: read back by transformers, by llama.cpp's tokenizer cases, and by a small reader of Go templates."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from conftest import Command
from tiny_models import EYES, LLAMA_3, SOFT_CAPS, shape
from tiny_tokenizer import save_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorasft.errors import DeviceError, ModelError
from lorasft.export.gguf import write_gguf

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
VOCABULARY = 331  # one more than the tokenizer has: a token that is only padding
SHAPE = {**shape(64), "vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
del SHAPE["head_dim"]
LONG: dict[str, Any] = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64}
LONG |= {"short_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5], "long_factor": [4.0] * 6}
SHORT = LONG | {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
# transformers' reader fills the numbers that it does not read with the defaults of Gemma's and Qwen's configs.
MODELS: dict[str, Any] = {
    "llama": lambda: hf.LlamaConfig(**SHAPE, head_dim=16),
    "llama-biased-tied": lambda: hf.LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "mistral": lambda: hf.MistralConfig(**SHAPE, head_dim=24, sliding_window=None),
    "qwen2": lambda: hf.Qwen2Config(**SHAPE),
    "qwen3": lambda: hf.Qwen3Config(**SHAPE, head_dim=128),
    "gemma2": lambda: hf.Gemma2Config(**SHAPE, head_dim=256, sliding_window=6),
    "gemma3": lambda: hf.Gemma3TextConfig(**{**SHAPE, "num_hidden_layers": 6}, head_dim=256, sliding_window=6),
    "phi3": lambda: hf.Phi3Config(**SHAPE),
}
# fp16 keeps 11 bits of a weight, Q8_0 8 bits of a block's largest: relative L2 error of the logits.
ERROR = {"f16": 2e-3, "q8_0": 6e-2}


def save_model(folder: Path, config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A random model of `config` with the tiny tokenizer; norms and biases have values, too."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(folder))
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    return model


def logits(model: Any) -> torch.Tensor:
    ids = torch.from_numpy(np.random.default_rng(5).integers(0, 300, (1, 40)))
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def read(file: Path) -> Any:
    return gguf.GGUFReader(file)


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_the_same_model_back(name: str, kind: Any, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", MODELS[name]())
    written = write_gguf(tmp_path / "model", tmp_path / "m.gguf", kind=kind)
    # The reader takes the config from the file, but not whether there are biases.
    given = {"config": model.config} if name == "llama-biased-tied" else {}
    back = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32, attn_implementation="eager", **given
    )
    assert distance(logits(back.eval()), logits(model)) < ERROR[kind]
    assert written["size"] == (tmp_path / "m.gguf").stat().st_size
    found = read(tmp_path / "m.gguf")
    assert {tensor.tensor_type.name for tensor in found.tensors} == {"F32", kind.upper()}
    rooms = [gguf.Keys.General, gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope, gguf.Keys.Tokenizer]
    architecture = found.fields["general.architecture"].contents()
    known = {str(key).replace("{arch}", architecture) for room in rooms for key in vars(room).values()}
    assert {field for field in found.fields if not field.startswith("GGUF.")} <= known  # the format's names


def test_bfloat16_shards_and_small_blocks_make_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_model(tmp_path / "model", MODELS["llama"](), torch.bfloat16)
    write_gguf(tmp_path / "model", tmp_path / "one.gguf")
    embedding = model.get_input_embeddings().weight.detach().float().numpy()
    (tmp_path / "model/model.safetensors").unlink()
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    monkeypatch.setattr("lorasft.export.gguf._BLOCK", 7 * 64)
    write_gguf(tmp_path / "model", tmp_path / "many.gguf")
    one, many = ({t.name: t.data for t in read(tmp_path / f"{name}.gguf").tensors} for name in ("one", "many"))
    assert one.keys() == many.keys() and all(np.array_equal(one[name], many[name]) for name in one)
    assert np.array_equal(one["token_embd.weight"].astype(np.float32), embedding)


def test_llama_3_slows_frequencies_down_by_a_tensor(tmp_path: Path) -> None:
    save_model(tmp_path / "model", hf.LlamaConfig(**SHAPE, rope_parameters=dict(LLAMA_3)))
    write_gguf(tmp_path / "model", tmp_path / "m.gguf")
    tensors = {tensor.name: tensor.data for tensor in read(tmp_path / "m.gguf").tensors}
    waves = 2 * np.pi * 10000.0 ** (np.arange(0, 16, 2) / 16)
    smooth = (64 / waves - 1.0) / (4.0 - 1.0)
    between = 1 / ((1 - smooth) / 8.0 + smooth)
    want = np.where(waves < 64 / 4.0, 1.0, np.where(waves > 64 / 1.0, 8.0, between))
    assert np.allclose(tensors["rope_freqs.weight"], want, rtol=1e-5)
    assert len(set(want)) > 2


def test_phi_3_5_has_short_and_long_factors(tmp_path: Path) -> None:
    config = hf.Phi3Config(
        **SHAPE, original_max_position_embeddings=64, partial_rotary_factor=0.75, rope_parameters=dict(LONG)
    )
    save_model(tmp_path / "model", config)
    write_gguf(tmp_path / "model", tmp_path / "m.gguf")
    found = read(tmp_path / "m.gguf")
    tensors = {tensor.name: tensor.data.tolist() for tensor in found.tensors}
    assert tensors["rope_factors_short.weight"] == LONG["short_factor"]
    assert tensors["rope_factors_long.weight"] == LONG["long_factor"]
    assert found.fields["phi3.rope.dimension_count"].contents() == 12
    attention = (1 + np.log(128 / 64) / np.log(64)) ** 0.5
    assert found.fields["phi3.rope.scaling.attn_factor"].contents() == pytest.approx(attention)


@pytest.mark.parametrize(("longest", "context"), [(None, 64), (40, 64), (90, 90)])
def test_the_context_up_to_which_short_factors_hold_is_told(
    longest: int | None, context: int, tmp_path: Path, cli: Command
) -> None:
    config = hf.Phi3Config(**SHAPE, original_max_position_embeddings=64, rope_parameters=dict(SHORT))
    save_model(tmp_path / "model", config)
    if longest:
        (tmp_path / "model/merge.json").write_text(json.dumps({"longest_row": longest}), encoding="utf-8")
    done = cli("export", tmp_path / "model", "--to", "ollama", "--out", tmp_path / "out")
    assert done.code == 0 and "above -c 64" in done.err and f"has {longest} tokens" in done.err + "has None tokens"
    assert f"PARAMETER num_ctx {context}\n" in (tmp_path / "out/Modelfile").read_text(encoding="utf-8")
    save_model(tmp_path / "other", MODELS["llama"]())
    done = cli("export", tmp_path / "other", "--to", "ollama", "--out", tmp_path / "plain")
    assert "-c " not in done.err and "num_ctx" not in (tmp_path / "plain/Modelfile").read_text(encoding="utf-8")


def test_a_model_with_eyes_gives_its_language_model(tmp_path: Path) -> None:
    text = MODELS["gemma3"]().to_dict()
    places = {"image_token_index": 320, "boi_token_index": 321, "eoi_token_index": 322}
    config = hf.Gemma3Config(text_config=text, vision_config=EYES, mm_tokens_per_image=4, **places)
    torch.manual_seed(3)
    model = hf.Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "m.gguf")
    known = {"config": model.config.get_text_config(), "attn_implementation": "eager"}  # no padding token in the file
    back = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32, **known)
    assert distance(logits(back.eval()), logits(model)) < ERROR["f16"]


REFUSED: dict[str, tuple[Any, str]] = {
    "gpt2": (lambda: hf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=2), "no GGUF export for gpt2"),
    "activation": (lambda: hf.LlamaConfig(**SHAPE, hidden_act="gelu"), "activation gelu"),
    "windows": (
        lambda: hf.Gemma2Config(**SHAPE, head_dim=256, layer_types=["full_attention"] * 2),
        "sliding windows on these layers",
    ),
    "scale": (lambda: hf.Gemma2Config(**SHAPE, head_dim=16, query_pre_attn_scalar=32), "query_pre_attn_scalar 32"),
    "caps": (lambda: hf.Gemma3TextConfig(**SHAPE, head_dim=256, **SOFT_CAPS), "soft caps"),
    "rope": (lambda: hf.Qwen2Config(**SHAPE, rope_parameters=dict(LLAMA_3)), "rope type llama3"),
    "bias": (lambda: hf.Qwen3Config(**SHAPE, head_dim=16, attention_bias=True), "k_proj.bias has no place"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_would_compute_otherwise_is_refused(name: str, tmp_path: Path) -> None:
    config, words = REFUSED[name]
    save_model(tmp_path / "model", config())
    with pytest.raises(ModelError, match=words):
        write_gguf(tmp_path / "model", tmp_path / "m.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_weights_beyond_fp16_leave_nothing_behind(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", MODELS["llama"]())
    with torch.no_grad():
        model.lm_head.weight[3, 5] = 1e5
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=r"lm_head\.weight leaves the range"):
        write_gguf(tmp_path / "model", tmp_path / "m.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_commands_words(tmp_path: Path, cli: Command) -> None:
    save_model(tmp_path / "model", MODELS["llama"]())
    export = ["export", tmp_path / "model", "--to", "gguf", "--out", tmp_path / "m.gguf"]
    assert json.loads(cli(*export, "--type", "q8_0", "--json").out)["size"] == (tmp_path / "m.gguf").stat().st_size
    assert cli(*export).code == 2  # it exists
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}", encoding="utf-8")
    done = cli("export", tmp_path / "adapter", "--to", "gguf", "--out", tmp_path / "n.gguf")
    assert done.code == 4 and "error:" in done.err and not (tmp_path / "n.gguf").exists()


def test_without_the_package_its_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(DeviceError, match="not installed") as caught:
        write_gguf(tmp_path, tmp_path / "m.gguf")
    assert caught.value.exit_code == 5 and "pip install" in str(caught.value)
