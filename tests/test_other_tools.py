"""Adapters as other tools write them: PEFT itself is what merge, chat and evaluate have to answer like."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from conftest import Command, save_base
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_merge_variants import PEFT_DOUBTS, edit_config, load, merge, save_adapter, save_model
from tiny_models import shape
from torch import Tensor

from lorasft.artifact import find_artifact
from lorasft.errors import LorasftError, ModelError, RecipeError
from lorasft.model import adapter as model_adapter
from lorasft.model.adapter import all_linears, attach_adapter, check_targets, load_adapter, load_artifact, trainable
from lorasft.recipe import AdapterSettings
from lorasft.tensors import fingerprint

PEFT_SAYS = ("Model has `tie_word_embeddings", "Using Rank-Stabilized LoRA", "The following (alpha|rank)_pattern keys")
pytestmark = [*PEFT_DOUBTS, *(pytest.mark.filterwarnings(f"ignore:{words}") for words in PEFT_SAYS)]
IDS = torch.arange(3, 23).unsqueeze(0)
QV: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
CPU = torch.device("cpu")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS).logits.float()
    return found


def peft_logits(base: Path, adapter: Path) -> Tensor:
    """What PEFT makes of the files, in fp32."""
    return logits(PeftModel.from_pretrained(load(base, dtype=torch.float32), adapter, torch_device="cpu"))


def check_answers(base: Path, adapter: Path, want: Tensor, *, atol: float = 2e-4) -> None:
    """Chat, evaluate, a run that begins from it and a merge answer `want`; without the adapter the base answers."""
    found = find_artifact(str(adapter), base=str(base))
    live = load_adapter(load(base, dtype=torch.float32), found)
    torch.testing.assert_close(logits(live), want, atol=atol, rtol=1e-4)
    start = load_adapter(load(base, dtype=torch.float32), found, trainable=True)
    torch.testing.assert_close(logits(start), want, atol=atol, rtol=1e-4)
    assert trainable(start)
    own = logits(load(base, dtype=torch.float32))
    with live.disable_adapter():
        torch.testing.assert_close(logits(live), own)
    merge(base, adapter, adapter.parent / "out")
    torch.testing.assert_close(logits(load(adapter.parent / "out")), want, atol=atol, rtol=1e-4)
    assert (want - own).abs().max() > 0.05


STARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "pissa": ("llama", {**QV, "init_lora_weights": "pissa"}),
    "olora": ("llama", {**QV, "init_lora_weights": "olora"}),
    "patterns": (
        "llama",
        {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": "pissa", "use_rslora": True,
         "rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"down_proj": 5}},
    ),
    "transposed": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "init_lora_weights": "pissa"}),
    "dora": ("llama", {**QV, "init_lora_weights": "olora", "use_dora": True}),
    "a head trained in full": ("llama", {**QV, "init_lora_weights": "pissa", "modules_to_save": ["lm_head"]}),
}  # fmt: skip


@pytest.mark.parametrize("kind", STARTS)
def test_a_start_that_was_taken_out_of_the_base_is_pefts(kind: str, tmp_path: Path) -> None:
    name, settings = STARTS[kind]
    base = save_model(tmp_path / "base", name, torch.float32)
    adapter = save_adapter(base, tmp_path / "adapter", **settings)
    check_answers(base, adapter, peft_logits(base, adapter))


def train_with_peft(base: Path, folder: Path, init: str) -> Any:
    """A PEFT model that began with `init`, saved its start beside itself and learned something."""
    from peft import LoraConfig

    model = get_peft_model(
        load(base), LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, init_lora_weights=init, **QV)
    )
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(folder / "pissa_init")
    model.peft_config["default"].init_lora_weights = init
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def test_a_start_by_chance_is_computed_where_it_is_at_hand(tmp_path: Path) -> None:
    """As LLaMA-Factory leaves it, and converted by PEFT."""
    base = save_model(tmp_path / "base", "llama", torch.float32)
    model = train_with_peft(base, tmp_path / "run", "pissa_niter_4")
    want = logits(model)
    model.save_pretrained(tmp_path / "run/adapter")
    check_answers(base, tmp_path / "run/adapter", want)
    model.save_pretrained(
        tmp_path / "converted/adapter", path_initial_model_for_weight_conversion=str(tmp_path / "run/pissa_init")
    )
    check_answers(base, tmp_path / "converted/adapter", want)


@pytest.mark.parametrize("init", ["pissa_niter_16", "corda", "lora_ga", "loftq", "PiSSA_niter_2"])
def test_a_start_that_is_not_known_is_refused_by_name(init: str, tmp_path: Path, cli: Command) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", **QV)
    edit_config(adapter, init_lora_weights=init)
    for words in (["merge", adapter, "--out", tmp_path / "out"], ["chat", adapter, "--prompt", "x"]):
        done = cli(*words)
        assert done.code == 4 and re.search("PiSSA|CorDA|LoRA-GA|LoftQ", done.err) and init.lower() in done.err
        assert "path_initial_model_for_weight_conversion" in done.err and "take it out" not in done.err


def test_a_start_in_16_bits_does_not_go_onto_4(tmp_path: Path, recipe: Callable[..., str], cli: Command) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", **QV, init_lora_weights="pissa")

    def begin(quantization: str) -> str:
        path = Path(recipe(model={"base": str(base), "quantization": quantization}, train={"steps": 3}))
        text = json.dumps(json.loads(path.read_bytes()) | {"adapter": {"start": str(adapter)}})
        path.write_text(text, encoding="utf-8")
        return str(path)

    out = ["--out", tmp_path / "out"]
    for words in (["merge", adapter, *out, "--onto", "dequantized"], ["merge", adapter, *out, "--quantization", "nf4"],
                  ["chat", adapter, "--prompt", "x", "--quantization", "nf4"], ["train", begin("nf4")]):  # fmt: skip
        done = cli(*words)
        assert done.code in (2, 4) and "4 bit" in done.err and not (tmp_path / "out").exists()
    assert cli("train", begin("none")).code == 0
    config = json.loads((tmp_path / "run/adapter/adapter_config.json").read_bytes())
    assert config["init_lora_weights"] is True and config["r"] == 8


Rename = Callable[[str], str]


def in_state(name: str) -> str:
    """The name in a model's own state dict, as FSDP and DeepSpeed save it."""
    for part in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"):
        name = name.replace(f".{part}", f".{part}.default")
    return name.replace("lm_head.weight", "lm_head.modules_to_save.default.weight")


NAMES: dict[str, tuple[dict[str, Any], Rename]] = {
    "with the adapter's name": ({**QV, "modules_to_save": ["lm_head"]}, in_state),
    "dora with the adapter's name": ({**QV, "use_dora": True}, in_state),
    "dora of the state": ({**QV, "use_dora": True}, lambda name: re.sub(r"(vector)$", r"\1.default.weight", name)),
    "an embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, in_state),
    "without prefix": (QV, lambda name: name.removeprefix("base_model.model.")),
    "wrapped twice": (QV, lambda name: f"base_model.model.{name}"),
    "fsdp": (QV, lambda name: name.replace("layers.0.", "layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.")),
    "compiled": (QV, lambda name: name.replace("base_model.model.", "base_model.model._orig_mod.")),
}


def rename(adapter: Path, how: Rename) -> None:
    path = adapter / "adapter_model.safetensors"
    save_file({how(name): tensor for name, tensor in load_file(path).items()}, path)


@pytest.mark.parametrize("kind", NAMES)
def test_names_that_tools_give_are_read(kind: str, tmp_path: Path) -> None:
    settings, how = NAMES[kind]
    base = save_model(tmp_path / "base", "llama", torch.float32)
    adapter = save_adapter(base, tmp_path / "adapter", **settings)
    want = peft_logits(base, adapter)
    rename(adapter, how)
    check_answers(base, adapter, want)


def test_two_adapters_in_one_file_are_refused(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "llama", torch.float32)
    adapter = save_adapter(base, tmp_path / "adapter", **QV)
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({f(name): t.clone() for name, t in tensors.items() for f in (str, in_state)}, path)
    with pytest.raises(ModelError, match="more than one adapter"):
        merge(base, adapter, tmp_path / "out")


def test_module_names_of_an_earlier_transformers_are_read(tmp_path: Path) -> None:
    """Gemma 3's language model was called otherwise until 4.52."""
    base = save_model(tmp_path / "base", "gemma3 with images", torch.float32)
    paths = [f"model.language_model.layers.{n}.self_attn.{part}_proj" for n in (0, 1) for part in "qv"]
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=paths)
    want = peft_logits(base, adapter)
    edit_config(
        adapter, target_modules="(?:.*?(?:language|text).*?(?:q_proj|v_proj).*?)|(?:\\bmodel\\.layers\\.[\\d]{1,}.*)"
    )
    rename(adapter, lambda name: name.replace("model.model.language_model.", "model.language_model.model."))
    check_answers(base, adapter, want)


EXPERTS = {
    "mixtral": ("mixtral", "block_sparse_moe", {"w1": (64, 32), "w3": (64, 32), "w2": (32, 64)}),
    "qwen3_moe": ("qwen3_moe", "mlp", {"gate_proj": (24, 32), "up_proj": (24, 32), "down_proj": (32, 24)}),
}


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_that_were_linears_are_adapted(kind: str, tmp_path: Path) -> None:
    """An adapter of transformers 4, on a base whose experts are one tensor by now: PEFT converts it."""
    name, block, sizes = EXPERTS[kind]
    base = save_model(tmp_path / "base", name, torch.float32)
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    count = {"mixtral": 3, "qwen3_moe": 12}[kind]
    for path in [f"layers.{n}.{block}.experts.{one}" for n in (0, 1) for one in range(count)]:
        for part, (out, into) in sizes.items():
            tensors[f"base_model.model.model.{path}.{part}.lora_A.weight"] = torch.randn(4, into) * 0.2
            tensors[f"base_model.model.model.{path}.{part}.lora_B.weight"] = torch.randn(out, 4) * 0.2
    save_file(tensors, adapter / "adapter_model.safetensors")
    edit_config(adapter, target_modules=["q_proj", *sizes])
    want = peft_logits(base, adapter)
    edit_config(adapter, lora_dropout=0.05)  # which PEFT refuses on such experts: it only trained
    found = find_artifact(str(adapter), base=str(base))
    torch.testing.assert_close(logits(load_adapter(load(base), found)), want, atol=2e-4, rtol=1e-4)
    merge(base, adapter, tmp_path / "out")
    torch.testing.assert_close(logits(load(tmp_path / "out")), want, atol=2e-4, rtol=1e-4)


def test_half_of_the_experts_is_refused_in_words(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "mixtral", torch.float32)
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    name = "base_model.model.model.layers.0.block_sparse_moe.experts.0.w1.lora_"
    path = adapter / "adapter_model.safetensors"
    save_file({**load_file(path), f"{name}A.weight": torch.ones(4, 32), f"{name}B.weight": torch.ones(64, 4)}, path)
    with pytest.raises(ModelError, match=r"PEFT cannot make this adapter|does not fit the base"):
        load_adapter(load(base), find_artifact(str(adapter), base=str(base)))


UNSLOTH = {"base_model_class": "LlamaForCausalLM", "parent_library": "a.b", "unsloth_fixed": True}
IDLE: dict[str, dict[str, Any]] = {
    "unsloth": {
        "auto_mapping": UNSLOTH,
        "target_modules": r"(?:.*?(?:language).*?(?:attn).*?(?:q_proj|v_proj).*?)" * 3,
    },
    "eva": {"init_lora_weights": "eva", "eva_config": {"rho": 2.0, "tau": 0.99}},
    "a quantizer's start": {"loftq_config": {"loftq_bits": 4}, "corda_config": {"cache_file": "x.pt"}},
    "layers": {"layers_to_transform": [0, 1], "layers_pattern": "(a+)+(b+)+(c+)+", "exclude_modules": ".*vision.*"},
    "ms-swift": {"target_modules": r"^(language_model(?=\.).*\.(q_proj|v_proj))$", "lora_dropout": 0.05},
    "axolotl": {"fan_in_fan_out": None, "use_dora": None, "bias": "none", "megatron_config": {"tp": 2}},
    "gaussian": {"init_lora_weights": "gaussian", "runtime_config": {"ephemeral_gpu_offload": True}},
    "more words than tensors": {"target_modules": ["q_proj", "v_proj", "k_proj", "c_attn"]},
    "no base": {"base_model_name_or_path": None},
    "torchtune": {"target_modules": None, "task_type": None},
}


@pytest.mark.parametrize("kind", IDLE)
def test_what_a_trained_adapter_does_not_need_is_passed_over(kind: str, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "llama", torch.float32)
    adapter = save_adapter(base, tmp_path / "adapter", **QV)
    want = peft_logits(base, adapter)
    edit_config(adapter, **IDLE[kind])
    check_answers(base, adapter, want)


@pytest.mark.parametrize(
    ("said", "words"),
    [({"trust_remote_code": True}, "code"), ({"use_qalora": True}, "use_qalora"), ({"peft_type": "LOHA"}, "LORA"),
     ({"alora_invocation_tokens": [3]}, "alora"), ({"kasa_config": {"a": 1}}, "kasa"),
     ({"rank_pattern": {"(a+)+": 4}}, "pattern"), ({"base_model_name_or_path": ""}, "--base")],
)  # fmt: skip
def test_what_changes_the_update_is_refused(said: dict[str, Any], words: str, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "llama", torch.float32)
    adapter = save_adapter(base, tmp_path / "adapter", **QV)
    edit_config(adapter, **said)
    with pytest.raises(LorasftError, match=words) as caught:
        find_artifact(str(adapter))
    assert "take it out" not in str(caught.value.hint)


def test_an_adapter_of_mlx_lm_is_refused_as_its(base: Path, tmp_path: Path, cli: Command) -> None:
    said = {"fine_tune_type": "full", "model": "x", "num_layers": 2}
    (tmp_path / "adapter_config.json").write_text(json.dumps(said), encoding="utf-8")
    assert "mlx-lm" in cli("chat", tmp_path, "--prompt", "x").err
    said |= {"fine_tune_type": "dora", "lora_parameters": {"rank": 8, "scale": 20.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(said), encoding="utf-8")
    save_file({"model.layers.0.self_attn.q_proj.lora_a": torch.ones(64, 8)}, tmp_path / "adapters.safetensors")
    done = cli("merge", tmp_path, "--base", base, "--out", tmp_path / "out")
    assert done.code == 4 and "mlx-lm" in done.err and "mlx_lm.fuse" in done.err


EVIDENCE = [
    ("org/Llama-3.2-1B", {}, "none"),
    ("unsloth/Llama-3.2-1B-bnb-4bit", {}, "nf4"),
    ("unsloth/qwen3-4b-unsloth-bnb-4bit", {}, "nf4"),
    ("org/model-nf4", {}, "nf4"),
    ("org/model_4bit", {}, "nf4"),
    ("org/model-8bit", {}, "none"),
    ("org/Chat4bitcoin", {}, "none"),
    ("mlx-community/Llama-3.2-1B-Instruct-4bit", {}, "none"),
    ("org/Llama-3-8B-GPTQ-4bit", {}, "none"),
    ("org/m", {"README.md": "quantization config was used:\n- load_in_8bit: False\n- load_in_4bit: True\n"}, "nf4"),
    ("org/m", {"README.md": "```yaml\nadapter: qlora\nload_in_4bit: true\n```"}, "nf4"),
    ("org/m", {"README.md": "load_in_4bit: false\nadapter: lora"}, "none"),
    ("org/m", {"args.json": '{"quant_method": "bnb", "quant_bits": 4}'}, "nf4"),
    ("org/m", {"args.json": '{"quant_method": null, "quant_bits": null, "load_in_4bit": false}'}, "none"),
    ("org/m", {"training_args.yaml": "quantization_bit: 4\n"}, "nf4"),
    ("org/m", {"training_args.yaml": "quantization_bit: 8\n"}, "none"),
]


@pytest.mark.parametrize(("named", "files", "quantization"), EVIDENCE)
def test_what_tells_of_4_bit(named: str, files: dict[str, str], quantization: str, base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", **QV)
    edit_config(adapter, base_model_name_or_path=named)
    (adapter / "README.md").unlink()  # PEFT's own
    for name, text in files.items():
        (adapter / name).write_text(text, encoding="utf-8")
    assert find_artifact(str(adapter)).model.quantization == quantization
    assert find_artifact(str(adapter), base=str(base)).model.quantization == quantization


def test_a_base_in_4_bit_tells_of_it(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", **QV)
    packed = load(base, quantization_config=hf.BitsAndBytesConfig(load_in_4bit=True))
    packed.save_pretrained(tmp_path / "packed")
    assert find_artifact(str(adapter), base=str(tmp_path / "packed")).model.quantization == "nf4"


def test_an_adapter_that_nobody_says_was_in_4_bit_is_merged_onto_16(base: Path, tmp_path: Path, cli: Command) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", **QV)
    said = json.loads(cli("merge", adapter, "--out", tmp_path / "out", "--json").out)
    assert said["onto"] == "original" and "nothing says" in said["why"]
    refused = cli("merge", adapter, "--out", tmp_path / "other", "--onto", "dequantized")
    assert refused.code == 4 and "4 bit" in refused.err and not (tmp_path / "other").exists()
    edit_config(adapter, base_model_name_or_path="unsloth/tiny-bnb-4bit")
    said = json.loads(cli("merge", adapter, "--base", base, "--out", tmp_path / "four", "--json").out)
    assert said["onto"] == "dequantized"
    assert "onto original, before rounding" in said["table"]


@pytest.mark.parametrize("gain", [1.0, -1.0])
def test_one_row_can_speak_for_the_original(gain: float, base: Path, tmp_path: Path, rows: Path) -> None:
    """Its tokens are measured then: over rows the standard error of one is infinite."""
    from lorasft.merge.check import MergeCheck

    adapter = save_adapter(base, tmp_path / "adapter", **QV)
    edit_config(adapter, base_model_name_or_path="unsloth/tiny-bnb-4bit")
    judge = MergeCheck(find_artifact(str(adapter), base=str(base)), None)
    judge.origin = "rows.jsonl"
    better = judge.trained.clone()
    better.scatter_add_(1, judge.targets, torch.full_like(judge.targets, gain, dtype=better.dtype))
    judge.__dict__["original"] = better
    judge.table["onto original, before rounding"] = {"kl": 1.0}
    assert judge.choose()[0] == ("original" if gain > 0 else "dequantized")


def test_what_does_not_fit_in_16_bits_says_so(
    base: Path, tmp_path: Path, cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", **QV)
    monkeypatch.setattr(model_adapter, "free_memory", lambda device: 1000)
    done = cli("chat", adapter, "--prompt", "x")
    assert done.code == 6 and "--quantization nf4" in done.err and "iB are free" in done.err


def test_experts_that_4_bit_cannot_hold_are_loaded_in_16(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "gpt_oss", torch.float32)
    adapter = save_adapter(
        base, tmp_path / "adapter", target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"]
    )
    found = find_artifact(str(adapter))
    assert found.model.quantization == "none"
    found = replace(found, model=found.model.model_copy(update={"dtype": "float32"}))
    want = peft_logits(base, adapter)
    torch.testing.assert_close(logits(load_artifact(found, CPU)), want, atol=2e-4, rtol=1e-4)


TIED = [{"target_modules": ["q_proj", name]} for name in ("embed_tokens", "lm_head")]
TIED += [{"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}]


@pytest.mark.parametrize("settings", TIED)
@pytest.mark.parametrize("base_layer", [True, False])
def test_a_tied_embedding_is_adapted_as_peft_ties_it(
    settings: dict[str, Any], base_layer: bool, tmp_path: Path
) -> None:
    base = save_model(tmp_path / "base", "tied llama", torch.float32)
    adapter = save_adapter(base, tmp_path / "adapter", **settings, ensure_weight_tying=True)
    want = peft_logits(base, adapter)
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: t for name, t in tensors.items() if base_layer or "base_layer" not in name}, path)
    check_answers(base, adapter, want)


def test_twins_that_were_trained_apart_are_refused(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "tied llama", torch.float32)
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["embed_tokens"], ensure_weight_tying=True)
    path = adapter / "adapter_model.safetensors"
    save_file({name: t * 2 if "lm_head.lora_B" in name else t for name, t in load_file(path).items()}, path)
    with pytest.raises(ModelError, match="otherwise trained along") as caught:
        merge(base, adapter, tmp_path / "out")
    assert "fetch" not in str(caught.value.hint)


MAMBAS: dict[str, tuple[Any, dict[str, Any]]] = {
    "mamba2": (hf.Mamba2Config, {"num_heads": 8, "head_dim": 8, "state_size": 8, "expand": 2, "n_groups": 1}),
    "mamba": (hf.MambaConfig, {"state_size": 8, "expand": 2}),
    "falcon_mamba": (hf.FalconMambaConfig, {"state_size": 8, "expand": 2}),
}


@pytest.mark.parametrize("name", MAMBAS)
def test_all_linear_leaves_out_what_a_mamba_block_reads_past(name: str) -> None:
    make, settings = MAMBAS[name]
    sizes = {key: shape()[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers")}
    base = hf.AutoModelForCausalLM.from_config(make(**sizes, **settings))
    targets = {path.rpartition(".")[2] for path in all_linears(base)}
    assert "in_proj" in targets and "out_proj" not in targets
    attach_adapter(base, AdapterSettings(rank=2), seed=0)
    with pytest.raises(RecipeError, match="out_proj"):
        check_targets(base, AdapterSettings(targets=("out_proj",)))


def test_what_peft_raises_is_an_error_in_words() -> None:
    base = hf.AutoModelForCausalLM.from_config(hf.LlamaConfig(**shape()))
    with pytest.raises(ModelError, match="PEFT") as caught:
        attach_adapter(base, AdapterSettings(targets=("norm",)), seed=0)
    assert caught.value.hint


def test_a_single_file_is_read_before_an_index(tmp_path: Path, cli: Command) -> None:
    """As transformers does; the merged folder has no index that names other files."""
    base = save_model(tmp_path / "base", "llama", torch.float32)
    other = load(save_model(tmp_path / "other", "llama", torch.float32))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    other.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    for path in (tmp_path / "shards").glob("model*"):
        (base / path.name).write_bytes(path.read_bytes())
    (base / "model-00001-of-00003.safetensors").write_text("version https://git-lfs", encoding="utf-8")  # left behind
    assert fingerprint(base)
    adapter = save_adapter(base, tmp_path / "adapter", **QV)
    check_answers(base, adapter, peft_logits(base, adapter))
    assert [path.name for path in (tmp_path / "out").glob("model*")] == ["model.safetensors"]
