"""Experts in 4 bit: bitsandbytes' bits, plain transformers' losses and gradients, and no matrix that is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers as hf
from conftest import Command
from safetensors.torch import load_file
from test_merge_variants import PEFT_DOUBTS, save_adapter
from test_oracles import Rows, assert_same_as, packed_step
from tiny_models import WINDOWS, randomize_adapter, shape
from tiny_tokenizer import save_tokenizer
from torch import Tensor, nn
from transformers.integrations import moe

from lorasft.artifact import find_artifact
from lorasft.errors import ModelError
from lorasft.model import experts
from lorasft.model.adapter import attach_adapter, load_artifact
from lorasft.model.base import check_mostly_quantized, count_bytes, load_base, make_skeleton, read_config
from lorasft.model.memory import StorageMeter, dry_run, heaviest_batch, run_layers, static_bytes
from lorasft.model.selfcheck import verify
from lorasft.model.weightless import make_weightless, plan_network
from lorasft.recipe import AdapterSettings, ModelSettings

pytestmark = PEFT_DOUBTS
CPU = torch.device("cpu")
WIDE = {**shape(64), "intermediate_size": 64}
PLAIN = {key: value for key, value in WIDE.items() if key != "head_dim"}
EIGHT = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
LINEAR = {f"linear_{name}": size for name, size in
          {"num_key_heads": 4, "num_value_heads": 4, "key_head_dim": 16, "value_head_dim": 16}.items()}  # fmt: skip
FAMILIES: dict[str, Callable[[], Any]] = {
    "aria": lambda: hf.AriaTextConfig(**PLAIN, moe_num_experts=8, moe_topk=2, moe_num_shared_experts=1),
    "deepseek-v3": lambda: hf.DeepseekV3Config(
        **PLAIN | {"num_key_value_heads": 4}, n_routed_experts=8, n_group=2, topk_group=1, num_experts_per_tok=2,
        moe_intermediate_size=64, kv_lora_rank=64, q_lora_rank=64, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=16, first_k_dense_replace=1,
    ),
    "gemma-4": lambda: hf.Gemma4TextConfig(
        **WIDE, **WINDOWS, enable_moe_block=True, num_experts=8, top_k_experts=2, moe_intermediate_size=64,
        num_kv_shared_layers=0, global_head_dim=16, hidden_size_per_layer_input=0,
    ),
    "glm-4.5": lambda: hf.Glm4MoeConfig(
        **WIDE, moe_intermediate_size=64, n_routed_experts=8, num_experts_per_tok=2, n_group=1, topk_group=1,
        first_k_dense_replace=0,
    ),
    "gpt-oss": lambda: hf.GptOssConfig(**WIDE, **WINDOWS, **LOCAL),
    "granite-moe": lambda: hf.GraniteMoeConfig(**PLAIN, **LOCAL, attention_multiplier=0.25, logits_scaling=4.0),
    "mixtral": lambda: hf.MixtralConfig(**WIDE, **LOCAL, sliding_window=None),
    "qwen-3-moe": lambda: hf.Qwen3MoeConfig(**WIDE, **EIGHT),
    "qwen-3.5-moe": lambda: hf.Qwen3_5MoeTextConfig(
        **WIDE, **EIGHT, **LINEAR, shared_expert_intermediate_size=64,
        layer_types=["linear_attention", "full_attention"],
    ),
}  # fmt: skip
FP32 = {"dtype": "float32"}


def save(folder: Path, name: str, **sizes: Any) -> Path:
    """A random model in bf16, with values that show mistakes in biases and norms as well."""
    torch.manual_seed(2)
    config = FAMILIES[name]()
    vars(config).update(sizes)
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def quantize(matrix: Tensor) -> tuple[Tensor, Any]:
    return bnb.functional.quantize_4bit(matrix.contiguous(), quant_type="nf4", compress_statistics=True)


def stacks_of(model: Any) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "packed")}


def twin(model: Any, folder: Path) -> Any:
    """Plain transformers with what 4 bit makes of each matrix alone, of experts by bitsandbytes itself, in fp32."""
    plain = hf.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).requires_grad_(False)
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name).weight.data.copy_(weight)
        for stack in getattr(module, "packed", ()):
            for matrix in getattr(plain.get_submodule(name), stack).data:
                turned = matrix.T if module.is_transposed else matrix
                turned.copy_(bnb.functional.dequantize_4bit(*quantize(turned)))
    return plain


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_gives_what_transformers_does_with_its_dequantized_weights(name: str, tmp_path: Path) -> None:
    """Losses and gradients, of sequences alone; and each matrix has bitsandbytes' own bits."""
    folder = save(tmp_path, name)
    model = load_base(ModelSettings(base=str(folder), **FP32), CPU)
    own = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if name == "aria" and not stacks_of(model):
        pytest.skip("this transformers does not send Aria's experts through its interface")
    assert len(stacks_of(model)) == (1 if name == "deepseek-v3" else 2)
    for path, module in stacks_of(model).items():
        for stack, (codes, absmax, nested, table, offset) in experts.packed_parts(module).items():
            for expert, matrix in enumerate(getattr(own.get_submodule(path), stack).data):
                packed, state = quantize(matrix.T if module.is_transposed else matrix)
                assert torch.equal(codes[expert].view(-1, 1), packed) and torch.equal(offset[expert], state.offset)
                assert torch.equal(absmax[expert, : len(state.absmax)], state.absmax)
                assert torch.equal(nested[expert], state.state2.absmax) and torch.equal(table[0], state.state2.code)
    trained, plain = (
        attach_adapter(one, AdapterSettings(rank=4, alpha=8.0), seed=0) for one in (model, twin(model, folder))
    )
    for one in (trained, plain):
        randomize_adapter(one)
    network = verify(model)
    assert network.segments or name == "qwen-3.5-moe", network.notices
    got = packed_step(trained, network, Rows(), "token", 100 if network.segments else 1)
    assert_same_as(plain, got, Rows(), worst=1e-5 if name == "qwen-3.5-moe" else 5e-6)


class Toy(nn.Module):
    """Dequantizes under transformers' own forward: the same numbers, and autograd keeps every matrix."""

    @staticmethod
    def compute(module: Any, *inputs: Tensor) -> Tensor:
        for name in module.packed:
            whole = experts._dequantize(module, name, slice(None), inputs[0].dtype)
            vars(module)[name] = whole.mT if module.is_transposed else whole.clone()
        parameters = {name: module._parameters.pop(name) for name in module.packed}
        y = moe.grouped_mm_experts_forward(module, *inputs)
        module._parameters |= parameters
        for name in module.packed:
            del vars(module)[name]
        return y


@pytest.mark.parametrize("name", ["gpt-oss", "qwen-3-moe"])
def test_no_matrix_is_kept_for_the_backward_pass(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the meter; and the step without numbers foresees what a real one takes."""
    settings, adapter = ModelSettings(base=str(save(tmp_path, name)), **FP32), AdapterSettings(rank=4)
    model = attach_adapter(load_base(settings, CPU), adapter, seed=0)
    weightless = make_weightless(read_config(str(tmp_path)), settings, adapter, CPU)
    assert static_bytes(weightless, "adamw") == static_bytes(model, "adamw")
    network = verify(model.get_base_model())
    batch, planned = heaviest_batch(network, longest=6, capacity=12), plan_network(network, weightless)
    stack = 8 * 3 * 64 * 64 * 4  # bytes of a layer's experts in fp32
    for recomputed in (0, 2):
        real, foreseen = run_layers(network, batch, 99, recomputed), dry_run(planned, batch, recomputed=recomputed)
        assert foreseen.kept == pytest.approx(real.kept, abs=2000) and real.kept < stack
        assert foreseen.peak == pytest.approx(real.peak, abs=2000) and real.peak < 2 * stack
    monkeypatch.setitem(moe.ALL_EXPERTS_FUNCTIONS, experts._FUNCTION, Toy.compute)
    assert run_layers(network, batch, 99, 0).kept > 2 * stack


def test_constants_that_groups_do_not_divide() -> None:
    """gpt-oss has 259,200 of them in a matrix: 1,012 groups and a half."""
    torch.manual_seed(0)
    matrices = torch.randn(2, 5760, 2880) * torch.tensor([0.02, 0.5]).view(2, 1, 1)
    module = nn.Module()
    for end, part in experts.quantize_stack(matrices).items():
        setattr(module, f"up_proj{end}", nn.Parameter(part, requires_grad=False))
    module.packed, module.weights = ("up_proj",), experts.FrozenWeights()  # type: ignore[assignment]
    assert module.up_proj_absmax.shape == (2, 1013 * 256)
    want = [bnb.functional.dequantize_4bit(*quantize(matrix)) for matrix in matrices]
    for first, last in ((0, 1), (1, 2), (0, 2)):
        got = experts._dequantize(module, "up_proj", slice(first, last), torch.float32)
        assert all(map(torch.equal, got, want[first:last]))


def test_a_number_after_the_last_expert_does_not_count(tmp_path: Path) -> None:
    model = load_base(ModelSettings(base=str(save(tmp_path, "gpt-oss")), **FP32), CPU)
    module = next(iter(stacks_of(model).values()))
    x, weights = torch.randn(5, 64, requires_grad=True), torch.rand(5, 2, requires_grad=True)
    index = torch.tensor([[0, 8], [8, 3], [8, 8], [1, 2], [7, 8]])
    y = module(x, index, weights)
    lost = index == 8
    want = module(x, index.masked_fill(lost, 0), weights.masked_fill(lost, 0))
    torch.testing.assert_close(y, want)
    (slope,) = torch.autograd.grad(y.sum(), weights)
    assert not y[2].any() and not slope[lost].any() and slope[~lost].all()


class RealMeter(StorageMeter):
    def _add(self, value: Any, *, counted: bool) -> None:
        if not (isinstance(value, Tensor) and value.is_meta):
            super()._add(value, counted=counted)


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])  # stored expert by expert, and as one
def test_one_stack_at_a_time_is_in_16_bits(name: str, tmp_path: Path) -> None:
    """While it is loaded, beside what stays: at most one stack, a matrix, and the codes of the stack before."""
    settings = ModelSettings(base=str(save(tmp_path, name, num_local_experts=64)), **FP32)
    with RealMeter() as meter:
        model = load_base(settings, CPU)
    stack = 64 * 128 * 64 * 4
    assert meter.peak - sum(count_bytes(model).values()) < 1.35 * stack


def test_a_kept_base_has_the_same_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORASFT_CACHE", str(tmp_path / "cache"))
    for name in ("mixtral", "gpt-oss"):
        settings = ModelSettings(base=str(save(tmp_path / name, name)), **FP32)
        first, second = load_base(settings, CPU, keep=True), load_base(settings, CPU, keep=True)
        assert len(list((tmp_path / "cache/bases").iterdir())) == (1 if name == "mixtral" else 2)
        a, b = first.state_dict(), second.state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        ids = torch.arange(5, 25).unsqueeze(0)
        assert torch.equal(first(ids).logits, second(ids).logits)


@pytest.mark.parametrize("name", [pytest.param("mixtral", marks=pytest.mark.slow), "gpt-oss"])
def test_a_journey_in_4_bit(
    name: str, rows: Path, recipe: Callable[..., str], tmp_path: Path, cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planned, trained, resumed, merged onto what it saw and onto the original, asked."""
    monkeypatch.setenv("LORASFT_CACHE", str(tmp_path / "cache"))
    base = save_tokenizer(save(tmp_path / "base", name, vocab_size=384))
    path = recipe(model={"base": str(base)}, data={"train": str(rows), "eval": None}, train={"epochs": 1},
                  run={"eval_every": None, "save_every": 1})  # fmt: skip
    plan = json.loads(cli("plan", path, "--json").out)
    assert plan["holds"] and plan["bytes"]["4-bit weights"] > plan["bytes"]["16-bit weights"]
    done = cli("train", path)
    assert done.code == 0 and "attention and shared linears" in done.err and "not known beforehand" not in done.err
    run, whole = tmp_path / "run", (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes()
    for path_of in ("adapter", "checkpoints/step-000004"):
        (run / path_of).rename(tmp_path / Path(path_of).name)
    assert cli("train", path, "--resume").code == 0
    assert (run / "adapter/adapter_model.safetensors").read_bytes() == whole
    said = json.loads(cli("merge", run, "--out", tmp_path / "seen", "--json").out)
    assert said["onto"] == "dequantized"
    assert said["table"]["merged"]["kl"] < said["table"]["onto original, before rounding"]["kl"] / 5
    assert cli("merge", run, "--out", tmp_path / "out", "--onto", "original", "--no-check").code == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], before[key]) for key in before if "experts" in key)
    plain = twin(load_base(ModelSettings(base=str(base), **FP32), CPU), base)
    seen, info = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "seen", output_loading_info=True)
    assert not any(info.values()), info
    for key, stack in plain.named_parameters():
        if stack.dim() == 3:
            assert torch.equal(seen.get_parameter(key), stack.to(seen.dtype)), key
    assert cli("chat", run, "--prompt", "what is 1 + 1?", "--max-tokens", "3").code == 0
    evaluated = json.loads(cli("evaluate", run, "--data", rows, "--json").out)
    assert evaluated["adapter"] != evaluated["base"]
    refused = cli("merge", run, "--out", tmp_path / "packed", "--quantize", "nf4")
    assert refused.code == 4 and "experts" in refused.err and not (tmp_path / "packed").exists()


def test_what_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    llama = hf.Llama4TextConfig(**WIDE, **LOCAL, intermediate_size_mlp=64, layer_types=["full_attention"] * 2)
    for config in (llama, FAMILIES["mixtral"]()):
        skeleton = make_skeleton(config)
        for module in skeleton.modules():
            module.has_post_expert_norm = True  # as Muse Spark's
        with pytest.raises(ModelError, match=r"not 4-bit, such as .*experts"):
            check_mostly_quantized(skeleton)
    with pytest.raises(ModelError, match="a matrix of 96 inputs cannot be 4-bit on a CPU"):
        load_base(ModelSettings(base=str(save(tmp_path, "mixtral", intermediate_size=96))), CPU)


def test_lora_on_experts_needs_them_in_16_bits(tmp_path: Path, recipe: Callable[..., str], cli: Command) -> None:
    base = save_tokenizer(save(tmp_path / "base", "gpt-oss", vocab_size=384))
    adapter = save_adapter(base, tmp_path / "4bit", target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    (adapter / "args.json").write_text('{"load_in_4bit": true}', encoding="utf-8")
    assert find_artifact(str(adapter)).model.quantization == "none"
    load_artifact(find_artifact(str(adapter)), CPU)
    refused = cli("chat", adapter, "--prompt", "x", "--quantization", "nf4")
    assert refused.code == 4 and "adapts experts" in refused.err and "--quantization none" in refused.err
    path = Path(recipe(model={"base": str(base)}))
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(settings | {"adapter": {"start": str(adapter)}}), encoding="utf-8")
    refused = cli("train", path)
    assert refused.code == 2 and "experts" in refused.err and "model.quantization=none" in refused.err


def test_experts_in_4_bit_cannot_be_saved_whole(tmp_path: Path) -> None:
    base = load_base(ModelSettings(base=str(save(tmp_path, "qwen-3-moe")), **FP32), CPU)
    with pytest.raises(ModelError, match="PEFT cannot make this adapter"):
        attach_adapter(base, AdapterSettings(modules_to_save=("experts",)), seed=0)
