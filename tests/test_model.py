"""The loader, the adapter and the self-check: what is quantized, what is refused, what falls back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from conftest import save_base
from safetensors.torch import load_file, save_file
from test_oracles import Rows, differences, packed_step
from tiny_models import make_base, randomize_adapter, shape
from transformers import AutoModelForCausalLM, LlamaConfig, StableLmConfig

from lorasft.artifact import find_artifact
from lorasft.data.packing import make_micro_batches, shuffle
from lorasft.errors import LorasftError, ModelError, RecipeError, UnsafeError
from lorasft.merge.write import plan_merge
from lorasft.model import attention
from lorasft.model.adapter import attach_adapter, check_targets, load_adapter, trainable, write_adapter
from lorasft.model.base import count_bytes, load_base, read_config
from lorasft.model.loss import pair_losses, read_head
from lorasft.model.selfcheck import verify
from lorasft.recipe import AdapterSettings, ModelSettings

CPU = torch.device("cpu")


def test_a_base_in_nf4_is_bitsandbytes_own(base: Path) -> None:
    """Every linear but the head is NF4 with double quantization, bitsandbytes' bits; all is frozen."""
    model = load_base(ModelSettings(base=str(base), dtype="bfloat16"), CPU)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert len(linears) == 14 and not any("lm_head" in name for name in linears)
    for name, module in linears.items():
        weight = plain.get_submodule(name).weight.data.to(torch.bfloat16)
        packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        assert torch.equal(packed, module.weight.data)
        ours = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert torch.equal(ours, bnb.functional.dequantize_4bit(packed, state))
        assert module.support_avx512bf16_for_cpu is False
    assert not any(parameter.requires_grad for parameter in model.parameters())
    table = count_bytes(model)
    weights = sum(module.in_features * module.out_features for module in linears.values())
    tables = len(linears) * (16 + 256 + 1) * 4  # of codes, a constant that counts when matrices are tiny
    assert 4.12 < 8 * (table["4-bit weights"] - tables) / weights < 4.20  # bits a weight
    kept = [p for p in model.parameters() if p.element_size() == 2]
    assert table["16-bit weights"] == sum(2 * p.numel() for p in kept)


def test_rows_that_bitsandbytes_dequantizes_wrongly_are_refused(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(LlamaConfig(**shape(96)), dtype=torch.bfloat16).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="96 inputs"):
        load_base(ModelSettings(base=str(tmp_path)), CPU)


def test_models_that_cannot_do_segments_go_one_sequence_at_a_time() -> None:
    """Attention that is not told of segments: the self-check sees it, and the loss stays right."""
    torch.manual_seed(0)
    config = StableLmConfig(**{key: value for key, value in shape().items() if key != "head_dim"})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    network = verify(model)
    assert not network.segments and "one at a time" in network.notices[0]
    rows = Rows()
    total = 0.0
    for batch in make_micro_batches(rows.sequences, range(len(rows)), capacity=1):
        assert len(batch.segments) == 1
        with torch.no_grad():
            total += float(pair_losses(network, batch).sum())
            wanted = model(input_ids=torch.as_tensor(batch.ids)[None], use_cache=False).logits[0].double()
        wanted = wanted.log_softmax(-1)[torch.as_tensor(batch.sources), torch.as_tensor(batch.targets)]
        total += float(wanted.sum())
    assert abs(total) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_self_check_sees_a_leak_and_an_unknown_head(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = attention.attend

    def leaky(*args: Any, segments: attention.Paths, **kwargs: Any) -> Any:
        return plain(*args, segments=attention.Paths([sum(segments.lengths)], [()]), **kwargs)

    attention.AttentionInterface.register(attention.SEGMENTS, leaky)
    try:
        network = verify(make_base("llama", dtype))
    finally:
        attention.AttentionInterface.register(attention.SEGMENTS, plain)
    assert not network.segments

    head = read_head(make_base("gemma2", dtype).requires_grad_(False))
    assert head is not None
    for found in (replace(head, softcap=None), None):
        monkeypatch.setattr("lorasft.model.selfcheck.read_head", lambda model, found=found: found)
        network = verify(make_base("gemma2", dtype).requires_grad_(False))
        assert network.head is None and (found is None or "own logits" in network.notices[0])


def test_nf4_gradients_equal_those_of_the_dequantized_base(base: Path) -> None:
    """Through NF4, in fp32: the gradients of a plain model that holds the dequantized weights."""
    settings = ModelSettings(base=str(base), dtype="float32")
    four_bit = load_base(settings, CPU)
    plain = load_base(settings.model_copy(update={"quantization": "none"}), CPU)
    for name, module in four_bit.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name).weight.data.copy_(weight.float())
    results = []
    for model in (four_bit, plain):
        peft = attach_adapter(model, AdapterSettings(rank=4), seed=0)
        randomize_adapter(peft)
        results.append(packed_step(peft, verify(peft.get_base_model()), Rows(), "token", 100))
    whole, worst = differences(results[0][1], results[1][1])
    assert abs(results[0][0] - results[1][0]) < 1e-5 and whole < 1e-5 and worst < 5e-5


def test_an_adapter_survives_the_disk_bit_for_bit(tmp_path: Path) -> None:
    model = attach_adapter(make_base("llama"), AdapterSettings(rank=4), seed=0)
    randomize_adapter(model)
    write_adapter(model, tmp_path, base=ModelSettings(base="x"))
    again = load_adapter(make_base("llama"), find_artifact(str(tmp_path)), trainable=True)
    assert all(torch.equal(p, trainable(again)[name]) for name, p in trainable(model).items())
    assert all(p.dtype == torch.float32 for p in trainable(again).values())


def _edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def _lose_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop(next(iter(tensors)))
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("harm", "kind", "words"),
    [
        (_lose_a_tensor, ModelError, "missing"),
        (lambda folder: _edit(folder / "adapter_config.json", r=8), ModelError, "not"),
        (lambda folder: _edit(folder / "adapter_config.json", peft_type="IA3"), ModelError, "IA3"),
        (lambda folder: _edit(folder / "adapter_config.json", lora_alpha=None), ModelError, "lora_alpha"),
        (lambda folder: (folder / "adapter_config.json").write_bytes(b"{oops"), ModelError, "cannot read"),
        (lambda folder: _edit(folder / "adapter_config.json", auto_map={"a": "b.C"}), UnsafeError, "auto_map"),
        (lambda folder: _edit(folder / "adapter_config.json", alpha_pattern={"(a+)+$": 2}), UnsafeError, "pattern"),
        (lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"), UnsafeError,
         "pickle"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x" * 99), ModelError, "[Hh]eader"),
    ],
)  # fmt: skip
def test_an_adapter_that_does_not_fit_is_refused(
    harm: Callable[[Path], None], kind: type[LorasftError], words: str, tmp_path: Path
) -> None:
    model = attach_adapter(make_base("llama"), AdapterSettings(rank=4), seed=0)
    write_adapter(model, tmp_path, base=ModelSettings(base="x"))
    harm(tmp_path)
    with pytest.raises(kind, match=words):
        load_adapter(make_base("llama"), find_artifact(str(tmp_path)))
    make_base("llama").save_pretrained(tmp_path / "base")
    with pytest.raises(LorasftError):
        plan_merge(find_artifact(str(tmp_path), base=str(tmp_path / "base")))


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_a_tied_head_is_not_trained_alone(name: str) -> None:
    base = AutoModelForCausalLM.from_config(LlamaConfig(**shape(), tie_word_embeddings=True))
    with pytest.raises(RecipeError, match="tied to its twin"):
        check_targets(base, AdapterSettings(modules_to_save=(name,)))


@pytest.mark.parametrize(
    ("config", "kind", "words"),
    [
        ({"model_type": "t5", "is_encoder_decoder": True}, ModelError, "causal language model"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ModelError, "gptq"),
        ({"model_type": "strange", "auto_map": {"AutoConfig": "a.B"}}, UnsafeError, "code"),
        ({"model_type": "clip"}, ModelError, "causal language model"),
    ],
)
def test_a_base_that_cannot_be_trained_is_refused_before_its_weights(
    config: dict[str, Any], kind: type[LorasftError], words: str, base: Path, tmp_path: Path
) -> None:
    _edit(Path(shutil.copy(base / "config.json", tmp_path)), **config)
    with pytest.raises(kind, match=words):
        read_config(str(tmp_path))


def test_an_adapter_given_as_base_is_told_apart(tmp_path: Path) -> None:
    model = attach_adapter(make_base("llama"), AdapterSettings(rank=4), seed=0)
    write_adapter(model, tmp_path, base=ModelSettings(base="org/the-base"))
    with pytest.raises(ModelError, match="adapter, not a base") as caught:
        read_config(str(tmp_path))
    assert "org/the-base" in str(caught.value.hint)


def test_weights_that_are_not_there_are_not_made_up(tmp_path: Path) -> None:
    folder = save_base(tmp_path)
    _edit(folder / "config.json", num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"model\.layers\.2\."):
        load_base(ModelSettings(base=str(folder), quantization="none"), CPU)


def test_the_order_is_a_permutation_that_depends_on_seed_and_epoch_alone() -> None:
    orders = [shuffle(101, seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order.tolist()) == list(range(101)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 4
    assert shuffle(5, seed=0, epoch=0).tolist() == shuffle(5, seed=0, epoch=0).tolist()
