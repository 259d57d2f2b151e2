"""Bases that come in FP8 or MXFP4: read as transformers dequantizes them, trained on in NF4, merged in 16 bits."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from conftest import Command
from safetensors.torch import load_file, save_file
from test_merge_variants import merge, merge_with_peft, save_adapter
from tiny_models import BF16, VOCABULARY, make_base, shape
from tiny_tokenizer import save_tokenizer
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from lorasft.artifact import stored_as
from lorasft.cli import main
from lorasft.errors import ModelError
from lorasft.model.base import load_base, read_config
from lorasft.model.packed import StoredWeight, list_stored
from lorasft.recipe import ModelSettings
from lorasft.tensors import open_tensors

FP8 = torch.float8_e4m3fn
CPU = torch.device("cpu")


def blocks_of(weight: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """FP8 codes and the fp32 scales of blocks of `size` x `size`, as checkpoints of DeepSeek-V3 and Qwen3 have them."""
    rows, columns = (-(-side // size) for side in weight.shape)
    parts = [part.float().abs().max() / 448 for row in weight.split(size) for part in row.split(size, dim=1)]
    scales = torch.stack(parts).view(rows, columns)
    whole = scales.repeat_interleave(size, 0)[: len(weight)].repeat_interleave(size, 1)[:, : weight.shape[1]]
    return (weight.float() / whole).to(FP8), scales


def save_packed(folder: Path, tensors: dict[str, Tensor], config: Any, scheme: dict[str, Any]) -> Path:
    """A checkpoint of two shards, whose config tells of `scheme`."""
    folder.mkdir()
    names = sorted(tensors)
    places = {name: f"model-0000{1 + (at % 2)}-of-00002.safetensors" for at, name in enumerate(names)}
    for file in set(places.values()):
        part = {name: tensors[name].contiguous() for name in names if places[name] == file}
        save_file(part, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    told = {**config.to_dict(), "dtype": "bfloat16", "quantization_config": scheme}
    (folder / "config.json").write_text(json.dumps(told), encoding="utf-8")
    return folder


def save_fp8(folder: Path, *, block: int | None = 128, vocabulary: int = VOCABULARY) -> Path:
    """A tiny Qwen3 whose linears are in FP8, by blocks or, as Ministral 3's, with one scale a weight."""
    model = make_base("qwen3", torch.bfloat16, vocabulary, hidden=256)
    tensors = dict(model.state_dict())
    for name, weight in model.state_dict().items():
        if name.endswith("_proj.weight"):
            codes, scales = blocks_of(weight, block or max(weight.shape))
            tensors[name] = codes
            tensors[f"{name}_scale_inv"] = scales if block else scales.view(()).bfloat16()
            if not block:
                tensors[name.replace("weight", "activation_scale")] = torch.tensor(1.0)
    size = [block, block] if block else None
    scheme = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": size}
    return save_packed(folder, tensors, model.config, scheme)


def save_mxfp4(folder: Path, *, vocabulary: int = VOCABULARY) -> Path:
    """A tiny gpt-oss whose experts are in MXFP4, as the published ones."""
    torch.manual_seed(3)
    config = hf.GptOssConfig(**shape(64) | {"vocab_size": vocabulary}, num_local_experts=3, num_experts_per_tok=2)
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tensors = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, into, out = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (experts, out, into // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(120, 126, (experts, out, into // 32), dtype=torch.uint8)
    return save_packed(folder, tensors, config, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})


def own_load(folder: Path, dtype: torch.dtype) -> Any:
    """As transformers dequantizes it."""
    method = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]["quant_method"]
    scheme = {"fp8": hf.FineGrainedFP8Config, "mxfp4": hf.Mxfp4Config}[method](dequantize=True)
    return hf.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=scheme)


BASES = {
    "blocks": save_fp8,
    "one scale": lambda folder: save_fp8(folder, block=None),
    "MXFP4": save_mxfp4,
}


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("kind", BASES)
def test_a_base_is_read_as_transformers_dequantizes_it(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = BASES[kind](tmp_path / "base")
    name = str(dtype).removeprefix("torch.")
    ours = load_base(ModelSettings(base=str(folder), quantization="none", dtype=name), CPU).state_dict()
    theirs = own_load(folder, dtype).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == dtype for name in ours)
    assert not hasattr(read_config(str(folder)), "quantization_config")


def test_it_is_quantized_a_weight_at_a_time_to_the_bits_of_its_16_bit_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, alive, most = save_fp8(tmp_path / "base"), weakref.WeakSet[Tensor](), 0
    own_load(folder, torch.bfloat16).save_pretrained(tmp_path / "full", save_original_format=False)
    read = StoredWeight.read

    def watched(weight: StoredWeight) -> Tensor:
        nonlocal most
        numbers = read(weight)
        if weight.convert:
            alive.add(numbers)
            most = max(most, len(alive))
        return numbers

    monkeypatch.setattr(StoredWeight, "read", watched)
    ours, theirs = (
        load_base(ModelSettings(base=str(tmp_path / name), dtype="bfloat16"), CPU).state_dict()
        for name in ("base", "full")
    )
    assert most == 1 and ours.keys() == theirs.keys() and any("absmax" in name for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", BASES)
def test_a_merge_is_peft_s_on_the_16_bit_numbers_and_all_in_16_bits(kind: str, tmp_path: Path) -> None:
    folder = BASES[kind](tmp_path / "base")
    own_load(folder, torch.bfloat16).save_pretrained(tmp_path / "full", save_original_format=False)
    adapter = save_adapter(tmp_path / "full", tmp_path / "adapter", target_modules=["q_proj", "o_proj"])
    merge(folder, adapter, tmp_path / "ours")
    want = merge_with_peft(tmp_path / "full", adapter, tmp_path / "theirs", tokens=None, dtype=torch.bfloat16)
    files = sorted((tmp_path / "ours").glob("*.safetensors"))
    ours = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert len(files) == 2 and ours.keys() == want.keys()
    assert all(torch.equal(ours[name], want[name]) and ours[name].dtype == torch.bfloat16 for name in want)
    assert "quantization_config" not in json.loads((tmp_path / "ours/config.json").read_text(encoding="utf-8"))
    index = json.loads((tmp_path / "ours/model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    _, info = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def read_one(tmp_path: Path, **tensors: Tensor) -> Tensor:
    save_file({name.replace("__", "."): tensor for name, tensor in tensors.items()}, tmp_path / "one.safetensors")
    (weight,) = list_stored([open_tensors(tmp_path / "one.safetensors")]).values()
    return weight.read()


def test_blocks_that_are_cut_off_and_scales_that_are_exponents_are_read(tmp_path: Path) -> None:
    """DeepSeek's kv_a_proj has 576 rows, whose last block transformers 5.23 refuses."""
    weight = torch.randn(200, 576)
    codes, scales = blocks_of(weight, 128)
    numbers = read_one(tmp_path, q__weight=codes, q__weight_scale_inv=scales)
    for part, code, scale in zip(numbers.split(128), codes.split(128), scales, strict=True):
        for at, factor in enumerate(scale):
            block = slice(128 * at, 128 * at + 128)
            assert torch.equal(part[:, block], code[:, block].float() * factor)
    assert (numbers - weight).norm() < 0.04 * weight.norm()
    codes, powers = torch.randn(256, 128).to(FP8), torch.randint(100, 150, (2, 1), dtype=torch.uint8)
    want = Fp8Dequantize(None)._dequantize_one(codes, powers, output_dtype=torch.float32)
    for given in (powers, powers.view(torch.float8_e8m0fnu)):
        assert torch.equal(read_one(tmp_path, q__weight=codes, q__weight_scale_inv=given), want)


def test_each_code_and_exponent_of_mxfp4_is_exact_in_bf16(tmp_path: Path) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(1, 16, 1, 16).repeat(252, 1, 1, 1)
    powers = torch.arange(252, dtype=torch.uint8).view(252, 1, 1).repeat(1, 16, 1)
    numbers = read_one(tmp_path, e__up_blocks=codes, e__up_scales=powers)  # (252, 32, 16)
    assert torch.equal(numbers, convert_moe_packed_tensors(codes, powers))
    steps = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    steps = torch.cat([steps, -steps])
    pairs = torch.stack([steps[codes.long() & 15], steps[codes.long() >> 4]], dim=-1).view(252, 16, 32)
    assert torch.equal(numbers.double(), (pairs * 2.0 ** (powers.double() - 127)).mT)


def test_scales_that_do_not_fit_or_are_not_known_are_refused_by_name(tmp_path: Path) -> None:
    codes = torch.randn(256, 128).to(FP8)
    with pytest.raises(ModelError, match=r"q\.weight is F8_E4M3"):
        read_one(tmp_path, q__weight=codes)
    with pytest.raises(ModelError, match=r"q\.weight does not fit"):
        read_one(tmp_path, q__weight=codes, q__weight_scale_inv=torch.ones(2, 3, 1))


@pytest.mark.parametrize(
    ("name", "original"),
    [
        ("Qwen/Qwen3-8B-AWQ", "Qwen3-8B"),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", "Qwen2.5-7B-Instruct"),
        ("RedHatAI/Llama-3.1-8B-Instruct-quantized.w4a16", "Llama-3.1-8B-Instruct"),
        ("RedHatAI/gemma-3-27b-it-FP8-dynamic", "gemma-3-27b-it"),
        ("org/model-4bit", "model"),
        ("org/my-model", None),
    ],
)
def test_another_quantization_is_refused_naming_the_original(name: str, original: str | None) -> None:
    with pytest.raises(ModelError, match="quantized with gptq") as error:
        stored_as({"quant_method": "gptq"}, name)
    assert (f"by its name {original}," in str(error.value)) == bool(original)
    assert stored_as({"quant_method": "fp8"}, name) == "FP8"


@pytest.mark.parametrize("kind", ["FP8", "MXFP4"])
def test_the_whole_journey(kind: str, rows: Path, recipe: Any, cli: Command, tmp_path: Path) -> None:
    folder = (save_fp8 if kind == "FP8" else save_mxfp4)(tmp_path / "base", vocabulary=384)
    model, run = {"base": str(save_tokenizer(folder)), "dtype": "float32"}, tmp_path / "run"
    path = recipe(model=model, train={"steps": 4}, run={"save_every": 2})
    assert main(["plan", path]) == 0 and main(["train", path]) == 0
    shutil.rmtree(run / "checkpoints/step-000004")
    assert main(["train", path, "--resume"]) == 0
    for onto in ("original", "dequantized"):
        said = cli("merge", run, "--out", tmp_path / onto, "--onto", onto, "--data", rows, "--json")
        assert said.code == 0 and f"comes in {kind}" in said.err, said.err
        table = json.loads(said.out)["table"]
    # Rounded to bf16, and no more; of the random experts some are chosen otherwise then.
    assert table["merged"]["kl"] < (1e-3 if kind == "FP8" else 2e-2) < 1 < table["without the adapter"]["nll"]
    answers = [cli("chat", one, "--prompt", "what is 3 + 3?").out for one in (run, tmp_path / "dequantized")]
    assert answers[0][:3] == answers[1][:3] != ""
