"""GGUF and Ollama: read back by transformers, by llama.cpp's tokenizer cases, and by a small reader of Go templates."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from conftest import Command
from k_quants import make_tool
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import EYES, LLAMA_3, SOFT_CAPS, shape
from tiny_tokenizer import save_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorasft.commands.arguments import fill_in
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
# fp16 keeps 11 bits of a weight, bf16 8 bits, Q8_0 8 bits of a block's largest: relative L2 error of the logits.
ERROR = {"f16": 2e-3, "bf16": 2e-2, "q8_0": 6e-2}


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


@pytest.mark.parametrize("kind", ERROR)
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


def test_weights_in_bf16_keep_every_bit(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", MODELS["qwen3"](), torch.bfloat16)
    write_gguf(tmp_path / "model", tmp_path / "m.gguf", kind="bf16")
    found = {tensor.name: tensor for tensor in read(tmp_path / "m.gguf").tensors}["blk.1.ffn_up.weight"]
    kept = torch.from_numpy(found.data.copy()).view(torch.bfloat16)
    assert torch.equal(kept, model.model.layers[1].mlp.up_proj.weight)


# --- K-quants by what is on the PATH -------------------------------------------------------------------------------

COPY = "content = source.read_bytes()"
TOOLS = {  # what a quantizer does, how wide the model is, what is said
    "fails": ("print('no such type', file=sys.stderr); sys.exit(3)", 64, "exit code 3, version: 7 (of a stand-in)"),
    "fails without a word": ("raise SystemExit(3)", 64, "exit code 3, without a word"),
    "dies": ("import os; os.kill(os.getpid(), 9)", 64, "exit code -9"),
    "writes nothing": ("", 64, "No such file"),
    "writes half": (f"{COPY}; target.write_bytes(content[:len(content) // 2])", 64, "did not write this model"),
    "writes no GGUF": ("target.write_text('done')", 64, "did not write this model"),
    "quantizes nothing": (f"{COPY}; target.write_bytes(content)", 256, "blk.0.attn_k.weight is still F32"),
    "changes the template": (
        f"{COPY}; target.write_bytes(content.replace(b'{{ bos_', b'{{ eos_'))",
        64,
        "template",
    ),
    "changes numbers": (f"{COPY}; target.write_bytes(content[:-9999] + bytes(9999))", 64, "has other numbers than"),
}


@pytest.mark.parametrize("name", TOOLS)
def test_a_quantizer_that_did_not_do_it_leaves_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Command
) -> None:
    body, width, said = TOOLS[name]
    tool = make_tool(tmp_path / "bin", body, **({"start": ""} if "without a word" in name else {}))
    monkeypatch.setenv("PATH", str(tool))
    config = hf.LlamaConfig(**{**SHAPE, "hidden_size": width, "intermediate_size": width, "num_hidden_layers": 1})
    save_model(tmp_path / "model", config)
    for to in ("gguf", "ollama"):
        done = cli("export", tmp_path / "model", "--to", to, "--type", "q4_k_m", "--out", tmp_path / "m.gguf")
        assert done.code == 5 and said in done.err and str(tool) in done.err and "--type q8_0" in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "model"]


def test_a_signal_ends_the_quantizer_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Command
) -> None:
    body = f"import os, time; Path({str(tmp_path / 'process')!r}).write_text(str(os.getpid())); target.touch()"
    monkeypatch.setenv("PATH", str(make_tool(tmp_path / "bin", f"{body}; os.kill(os.getppid(), 15); time.sleep(60)")))
    save_model(tmp_path / "model", MODELS["llama"]())
    done = cli("export", tmp_path / "model", "--to", "gguf", "--type", "q6_k", "--out", tmp_path / "new/m.gguf")
    assert done.code == 143 and not [*(tmp_path / "new").iterdir()]
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "process").read_text()), 0)


def test_what_the_quantizer_wrote_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Command) -> None:
    """Of a width that K-quants do not divide, where llama.cpp takes other types."""
    monkeypatch.setenv("PATH", str(make_tool(tmp_path / "bin", f"{COPY}; target.write_bytes(content)")))
    save_model(tmp_path / "model", MODELS["llama"]())
    export = ["export", tmp_path / "model", "--to", "gguf", "--type", "q6_k"]
    done = cli(*export, "--out", tmp_path / "new/m.gguf")
    assert (
        done.code == 0
        and "by llama-quantize 7 (of a stand-in); read back, its weights are 0.0% off: 21 F32" in done.err
    )
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["m.gguf"]


def test_without_a_quantizer_nothing_begins(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Command
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("lorasft.export.quantize.find_spec", lambda name: None)
    monkeypatch.setattr("lorasft.merge.merge.merge", None)
    for to in ("gguf", "ollama"):
        done = cli("export", run, "--to", to, "--type", "q5_k_m", "--out", tmp_path / "new/m.gguf")
        assert done.code == 5 and "llama-quantize" in done.err and "pip install llama-cpp-python" in done.err
    assert not [*tmp_path.iterdir()]


WRITTEN = {"architecture": "llama", "type": "f16", "size": 5e6, "raw_start": "", "short_context": None}


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({}, ["llama as f16, 4.8 MiB"]),
        ({"system": True, "trims": False, "raw_start": None}, [" text without it (/completion) has other ids than in"]),
        ({"raw_start": "<s>\n"}, ["(/completion) has the ids of training on texts only after '<s>\\n'"]),
        ({"system": False, "trims": True}, ["takes no system messages", "trims messages, Ollama does not"]),
        ({"short_context": 4096, "longest_row": 77}, ["above -c 4096; the longest row of training has 77 tokens"]),
        ({"short_context": 4096, "longest_row": None}, ["above -c 4096; the rows of training are not known"]),
    ],
)
def test_where_others_do_otherwise_than_training_is_said(facts: dict[str, Any], said: list[str]) -> None:
    """A line for each, and what was written on the last one."""
    *lines, last = fill_in("export.txt.jinja", WRITTEN | facts).splitlines()
    assert last == "llama as f16, 4.8 MiB"
    lines = [*lines, last][: len(said)]
    assert all(part in line for part, line in zip(said, lines, strict=True))


def test_what_a_killed_export_left_goes_with_the_next(tmp_path: Path, cli: Command) -> None:
    save_model(tmp_path / "model", MODELS["llama"]())
    (tmp_path / ".stage-m.gguf-0123abcd/merged").mkdir(parents=True)
    (tmp_path / ".stage-m.gguf-0123abce").write_bytes(b"half")
    assert cli("export", tmp_path / "model", "--to", "gguf", "--out", tmp_path / "m.gguf").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "model"]


# --- an adapter alone ----------------------------------------------------------------------------------------------


def save_adapter(tmp_path: Path, config: Any, **settings: Any) -> Any:
    """An adapter of random numbers on the model in `model`, in `adapter`."""
    model = save_model(tmp_path / "model", config)
    model.name_or_path = str(tmp_path / "model")
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings
    adapted = get_peft_model(model, LoraConfig(**settings))
    with torch.no_grad():
        for parameter in (value for name, value in adapted.named_parameters() if "lora_" in name):
            parameter.normal_(std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    return adapted


WITHOUT_PLACE: dict[str, dict[str, Any]] = {
    "lora_magnitude_vector": {"use_dora": True},
    "embed_tokens": {"modules_to_save": ["embed_tokens"]},
    "embed_tokens.base_layer": {"target_modules": ["q_proj", "embed_tokens"]},
    "lora_B.bias": {"lora_bias": True, "target_modules": ["q_proj"]},
    "trainable_tokens_delta": {"trainable_token_indices": [5]},
    "lm_head": {"target_modules": ["q_proj", "lm_head"]},
    "pissa": {"init_lora_weights": "pissa"},
}


@pytest.mark.filterwarnings("ignore")  # PEFT's, of such adapters
@pytest.mark.parametrize("name", WITHOUT_PLACE)
def test_what_an_adapter_of_llama_cpp_cannot_say_is_refused(name: str, tmp_path: Path, cli: Command) -> None:
    save_adapter(tmp_path, hf.LlamaConfig(**SHAPE, tie_word_embeddings=name == "lm_head"), **WITHOUT_PLACE[name])
    done = cli("export", tmp_path / "adapter", "--to", "gguf-lora", "--out", tmp_path / "l.gguf")
    assert done.code == 4 and name in done.err and f"lorasft export {tmp_path}/adapter --to gguf" in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "model"]


def test_an_adapters_file_adds_what_peft_adds(tmp_path: Path, cli: Command) -> None:
    """alpha / rank * B A of the file, its rows of q and k put back by hand, beside PEFT's own difference of weights."""
    patterns = {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"up_proj": 5}}
    adapted = save_adapter(tmp_path, MODELS["llama"](), use_rslora=True, **patterns)
    before = {name: value.clone() for name, value in adapted.get_base_model().named_parameters()}
    assert cli("export", tmp_path / "adapter", "--to", "gguf-lora", "--out", tmp_path / "l.gguf", "--json").code == 0
    found = read(tmp_path / "l.gguf")
    told = ["general.type", "general.architecture", "adapter.type", "adapter.lora.alpha"]
    assert [found.fields[key].contents() for key in told] == ["adapter", "llama", "lora", 8.0]
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in found.tensors}
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tmp_path / "adapter")
    places = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
    places |= {"attn_output": "self_attn.o_proj"} | {
        f"ffn_{name}": f"mlp.{name}_proj" for name in ("up", "gate", "down")
    }
    after = dict(merged.merge_and_unload().named_parameters())
    assert len(tensors) == 2 * 2 * len(places)
    for layer in range(2):
        for place, module in places.items():
            a, b = (tensors[f"blk.{layer}.{place}.weight.lora_{part}"] for part in "ab")
            added = 8.0 / len(a) * (b @ a)
            if place in ("attn_q", "attn_k"):  # rows 0, 1, 2, 3, ... of a head of 16 are its rows 0, 8, 1, 9, ...
                added = added[
                    torch.tensor([16 * (row // 16) + row % 8 * 2 + row % 16 // 8 for row in range(len(added))])
                ]
            name = f"model.layers.{layer}.{module}.weight"
            key = name.replace(".weight", ".base_layer.weight")
            assert torch.allclose(added, (after[name] - before[key]).detach(), atol=1e-5), place


def test_the_words_of_an_adapter(run: Path, tmp_path: Path, cli: Command) -> None:
    export = ["export", run, "--to", "gguf-lora", "--out", tmp_path / "l.gguf"]
    assert cli(*export, "--type", "f16").code == 2
    done = cli(*export)
    assert done.code == 0 and f"--chat-template-file {run}/adapter/chat_template.jinja" in done.err
    assert "trained in 4 bit" not in done.err and done.out == f"{tmp_path}/l.gguf\n"
    assert cli(*export).code == 2  # it exists
    save_adapter(tmp_path, MODELS["llama"]())
    (tmp_path / "adapter/README.md").write_text("load_in_4bit: true", encoding="utf-8")
    done = cli("export", tmp_path / "adapter", "--to", "gguf-lora", "--out", tmp_path / "m.gguf")
    assert done.code == 0 and "trained in 4 bit" in done.err and "--chat-template-file" not in done.err
    done = cli("export", tmp_path / "model", "--to", "gguf-lora", "--out", tmp_path / "n.gguf")
    assert done.code == 4 and "no adapter in it" in done.err


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_an_adapter_without_a_gguf_is_refused_before_it_is_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Command
) -> None:
    save_adapter(tmp_path, hf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=2))
    monkeypatch.setattr("lorasft.merge.merge.merge", None)
    for to in ("gguf", "ollama", "gguf-lora"):
        done = cli("export", tmp_path / "adapter", "--to", to, "--out", tmp_path / "new/m")
        assert done.code == 4 and "no GGUF export for gpt2" in done.err and "lorasft merge RUN --out DIR" in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "model"]
