"""Every kind of adapter that merges: PEFT's own merge in float64 is what it has to be, to one rounding."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Params4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, make_base, shape
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lorasft.artifact import find_artifact
from lorasft.errors import ModelError, UnsafeError
from lorasft.merge import write
from lorasft.merge.merge import merge as merge_artifact
from lorasft.model.adapter import load_adapter
from lorasft.model.base import load_base
from lorasft.model.nf4 import find_packed, nf4_view, read_packed
from lorasft.recipe import ModelSettings
from lorasft.tensors import open_tensors

PEFT_DOUBTS = [  # PEFT says what it does, and doubts biases of B and the ranks of experts, all without a reason
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. . LoRA tensor"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning"),
]
pytestmark = PEFT_DOUBTS
PROJECTIONS = ("self_attn.q", "mlp.up")
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
MORE: dict[str, Callable[[], Any]] = {
    "tied llama": lambda: hf.LlamaConfig(**shape(), tie_word_embeddings=True),
    "llama with biases": lambda: hf.LlamaConfig(**shape(), attention_bias=True),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(**shape(), num_experts=12, num_experts_per_tok=2, moe_intermediate_size=24),
    "mixtral": lambda: hf.MixtralConfig(**shape(), num_local_experts=3),
    "gpt_oss": lambda: hf.GptOssConfig(**shape(), num_local_experts=3, num_experts_per_tok=2),
}


def merge(base: Path, adapter: Path, out: Path) -> dict[str, Any]:
    """The weights alone, nothing measured."""
    return merge_artifact(find_artifact(str(adapter), base=str(base)), out, check=False)


def save_model(folder: Path, name: str, dtype: torch.dtype) -> Path:
    """Write the tiny random model `name` to `folder`."""
    if name == "gemma3 with images":
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                  "image_size": 28, "patch_size": 14}  # fmt: skip
        config = hf.Gemma3Config(text_config=shape(), vision_config=vision, mm_tokens_per_image=1)
        torch.manual_seed(2)
        model = hf.Gemma3ForConditionalGeneration(config).to(dtype)
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


def load(base: Path, *, tokens: int | None = None, dtype: torch.dtype | None = None, **options: Any) -> Any:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype or "auto", **options)
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
    "dora": ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"], "use_dora": True}),
    "dora, transposed": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "embedding and head": ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "experts one by one": ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "experts, ranks": (
        "mixtral",
        {"target_modules": [], "target_parameters": EXPERTS, "rank_pattern": {"experts.down_proj": 2}},
    ),
    "experts in one": ("gpt_oss", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "one of the experts' weights": ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": EXPERTS[1:]}),
    "language model of gemma 3": (
        "gemma3 with images",
        {"target_modules": [f"model.language_model.layers.{n}.{part}_proj" for n in (0, 1) for part in PROJECTIONS]},
    ),
    "larger vocabulary": ("llama", {"target_modules": ["q_proj"], "tokens": 120}),
    "larger vocabulary, tied": ("gemma3", {"target_modules": ["q_proj"], "tokens": 120}),
}
KINDS |= {name: (name, {"target_modules": "all-linear"}) for name in CONFIGS}
EXPERT_KINDS = {"experts one by one", "experts, ranks", "experts in one", "one of the experts' weights"}
OTHER_SUMS = {"dora", "dora, transposed"} | EXPERT_KINDS  # not computed with the shapes and in the order of PEFT
ROUNDED_TWICE = {"embedding and head"}  # by PEFT, in 16 bits


def make_pair(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
    """A base and an adapter of one of KINDS on it."""
    name, settings = KINDS[kind]
    base = save_model(folder / "base", name, dtype)
    return base, save_adapter(base, folder / "adapter", **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_is_pefts(kind: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bits where both multiply matrices of the same shapes; to a few units in the last place everywhere."""
    tokens = KINDS[kind][1].get("tokens")
    base, adapter = make_pair(tmp_path, kind, dtype)
    monkeypatch.setattr(write, "_BLOCK", 1000)  # several blocks of rows
    merge(base, adapter, tmp_path / "ours")
    ours, before = load_file(tmp_path / "ours/model.safetensors"), load_file(base / "model.safetensors")
    exact = merge_with_peft(base, adapter, tmp_path / "exact", tokens=tokens, dtype=torch.float64)
    assert ours.keys() == exact.keys() == before.keys()
    assert all(tensor.dtype == before[key].dtype == dtype for key, tensor in ours.items())
    off = torch.cat([((tensor.double() - exact[key]).abs() / ulps(exact[key], dtype)).flatten()
                     for key, tensor in ours.items()])  # fmt: skip
    assert off.max() <= 16 if dtype == torch.float32 else (off <= 0.5).double().mean() >= 0.999
    if kind not in OTHER_SUMS and (dtype == torch.float32 or kind not in ROUNDED_TWICE):
        theirs = merge_with_peft(base, adapter, tmp_path / "theirs", tokens=tokens, dtype=dtype)
        assert all(torch.equal(tensor, theirs[key].to(dtype)) for key, tensor in ours.items())


@pytest.mark.parametrize("kind", ["gpt2", "llama", "embedding and head", "dora", "experts in one"])
def test_a_tensor_that_is_cut_into_slices_is_the_same(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = make_pair(tmp_path, kind)
    merge(base, adapter, tmp_path / "whole")
    monkeypatch.setattr(write, "_SLICE", 1)
    merge(base, adapter, tmp_path / "cut")
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(((cut[key] - whole[key]).abs() <= 16 * ulps(whole[key], torch.float32)).all() for key in whole)


def ulps(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of the numbers of `dtype` around each number, or around what it may be the small rest of."""
    bits = 24 if dtype == torch.float32 else 8
    return 2.0 ** (torch.frexp(exact.double().abs().clamp(min=0.125 if bits == 24 else 0))[1].double() - bits)


def edit_config(adapter: Path, **values: object) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


@pytest.mark.parametrize(("kind", "double"), [("nf4", True), ("fp4", False)])
def test_a_four_bit_checkpoint_becomes_a_16_bit_one(
    kind: str, double: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "_BLOCK", 500)  # several blocks of rows
    scheme = hf.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    make_base("llama", dtype=torch.bfloat16, hidden=64).save_pretrained(tmp_path / "full")
    full = load(tmp_path / "full", quantization_config=scheme)
    base = tmp_path / "base"
    full.save_pretrained(base, max_shard_size="30KB")
    assert len(list(base.glob("*.safetensors"))) > 1
    adapter = save_adapter(tmp_path / "full", tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    merge(base, adapter, tmp_path / "ours")
    full.dequantize(dtype=torch.bfloat16).save_pretrained(tmp_path / "dequantized")
    want = merge_with_peft(tmp_path / "dequantized", adapter, tmp_path / "theirs", tokens=None, dtype=torch.bfloat16)
    ours = {
        name: tensor for file in (tmp_path / "ours").glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    assert ours.keys() == want.keys()
    assert all(torch.equal(ours[name], want[name]) for name in want)
    assert "quantization_config" not in json.loads((tmp_path / "ours/config.json").read_text(encoding="utf-8"))
    index = json.loads((tmp_path / "ours/model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["weight_map"].keys() == ours.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in ours.values())
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_groups_that_go_over_rows_are_read(tmp_path: Path) -> None:
    """Against a look into the table: bitsandbytes 0.50.2 is wrong on a CPU where 64 does not divide the width."""
    weight = torch.randn(50, 48).to(torch.bfloat16)
    codes, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=False, blocksize=64)
    parts = {f"w.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    save_file({"w": codes, **parts}, tmp_path / "model.safetensors")
    nibbles = torch.stack([codes.view(-1) >> 4, codes.view(-1) & 15], dim=1).view(-1).long()
    scales = state.absmax.repeat_interleave(64)[: weight.numel()]
    want = (state.code[nibbles] * scales).to(torch.bfloat16).view(50, 48)
    assert torch.equal(read_packed("w", *find_packed([open_tensors(tmp_path / "model.safetensors")])["w"]), want)
    assert (want - weight).abs().max() < 0.7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [(64, 64), (37, 192), (513, 1024), (130, 40), (3, 1)])
def test_a_weight_is_seen_as_the_loader_quantizes_it(size: tuple[int, int], dtype: torch.dtype) -> None:
    weight = (torch.randn(size, generator=torch.Generator().manual_seed(2)) * 0.02).to(torch.bfloat16)
    packed = Params4bit(weight.to(dtype), requires_grad=False, quant_type="nf4", compress_statistics=True).to("cpu")
    seen = nf4_view(weight, dtype)
    assert seen.dtype == dtype and torch.equal(seen, dequantize_4bit(packed.data, packed.quant_state))
    assert not torch.equal(seen.to(torch.bfloat16), weight)


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "mxfp4", "bitsandbytes"])
def test_a_base_quantized_otherwise_is_refused(method: str, tmp_path: Path) -> None:
    base, adapter = make_pair(tmp_path, "llama")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config |= {"quantization_config": {"quant_method": method, "load_in_8bit": True}}
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError, match=rf"quantized with {method}[^$]*--base"):
        merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["modules to save", "all biases", "dora", "experts in one", "larger vocabulary"])
def test_what_a_streamed_base_cannot_carry_is_refused(kind: str, tmp_path: Path) -> None:
    """Its weights are on no device: PEFT would leave them out or read them as nothing."""
    base, adapter = make_pair(tmp_path, kind)
    streamed = load_base(ModelSettings(base=str(base), quantization="none"), torch.device("cpu"), streamed=True)
    with pytest.raises(ModelError, match="does not fit into memory"):
        load_adapter(streamed, find_artifact(str(adapter)))


Harm = Callable[[dict[str, Tensor], dict[str, Any]], object]


def drop(part: str) -> Harm:
    """Take the first tensor away whose name has `part`."""
    return lambda tensors, _: tensors.pop(next(name for name in tensors if part in name))


def put(name: str, *size: int) -> Harm:
    """Give the adapter one tensor more."""
    return lambda tensors, _: tensors.update({f"base_model.model.{name}": torch.ones(size)})


def say(**values: object) -> Harm:
    """Let the config say something else."""
    return lambda _, config: config.update(values)


ENDLESS = ("(a+)+$", "(a|a)" * 30, "a*" * 3, "x" * 300)  # patterns that might never end


@pytest.mark.parametrize(
    ("kind", "harm", "words"),
    [
        ("dora", drop("magnitude"), "use_dora"),
        ("dora", say(use_dora=False), "magnitude_vector: LoRA makes"),
        ("tokens", say(trainable_token_indices=[3, 96]), "has 3 trained tokens"),
        ("tokens", say(trainable_token_indices=[3, 96, 97]), "another height alone"),
        ("modules to save", put("model.layers.0.self_attn.q_proj.weight", 32, 32), "nothing .* explains .*q_proj"),
        ("modules to save", put("model.layers.0.self_attn.q_proj.lora_C.weight", 3), "nothing .* explains .*lora_C"),
        ("tokens", drop("trainable"), "lacks tokens"),
        ("modules to save", drop("lm_head"), "lacks lm_head"),
        ("modules to save", put("lm_head.weight", 120, 32), "another height alone"),
        ("modules to save", put("lm_head.base_layer.weight", 97, 32), "lm_head.weight more than once"),
        ("all biases", say(bias="none"), "nothing .* explains .*bias"),
        ("larger vocabulary, tied", drop("lm_head"), "tied to its twin"),
        ("larger vocabulary, tied", put("lm_head.weight", 120, 32), "tied to its twin"),
        ("rank and alpha patterns", say(rank_pattern={}), "the config says rank 4"),
        ("experts one by one", drop("experts.lora_A"), "down_proj has lora_B.weight"),
        ("experts one by one", say(target_parameters=["mlp.experts.down_proj"]), "experts.base_layer has B .* rank"),
        ("experts one by one", say(layer_replication=[[0, 1]]), "layer_replication"),
        ("llama", say(r=8), "the config says rank 8"),
        ("llama", drop("lora_B"), "lora_B"),
        ("llama", lambda tensors, _: next(iter(tensors.values())).fill_(math.nan), "not finite"),
        ("llama", lambda tensors, _: [tensor.zero_() for tensor in tensors.values()], "no weight changed"),
        ("llama", put("model.layers.0.self_attn.q_prj.lora_A.weight", 4, 32), "LoRA makes"),
        *(("llama", say(rank_pattern={pattern: 4}), "rank_pattern") for pattern in ENDLESS),
    ],
)
def test_what_does_not_fit_is_refused_by_name(kind: str, harm: Harm, words: str, tmp_path: Path) -> None:
    base, adapter = make_pair(tmp_path, kind)
    tensors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    harm(tensors, config)
    save_file(tensors, adapter / "adapter_model.safetensors")
    edit_config(adapter, **config)
    with pytest.raises((ModelError, UnsafeError), match=words):
        merge(base, adapter, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_update_of_one_of_two_tied_weights_is_refused(target: str, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "tied llama", torch.float32)
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj", target])
    with pytest.raises(ModelError, match="tied to its twin"):
        merge(base, adapter, tmp_path / "out")
