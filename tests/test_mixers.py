"""Hybrid and recurrent models: their mixers called by segment give what transformers and PEFT give, one by one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from conftest import Command
from peft import LoraConfig, get_peft_model
from test_architectures import LINEAR_ATTENTION, MULTIHEAD, PLAIN, SHAPE
from test_oracles import Rows, differences, packed_step, plain_step
from test_train import die, stop_at
from tiny_models import VOCABULARY, randomize_adapter
from tiny_tokenizer import save_tokenizer
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback

from lorasft.data.packing import make_micro_batches
from lorasft.model import mixers
from lorasft.model.adapter import all_linears, attach_adapter, trainable
from lorasft.model.base import load_base
from lorasft.model.loss import Network, pair_losses
from lorasft.model.memory import StorageMeter, dry_run, heaviest_batch
from lorasft.model.recompute import decoder_layers, recompute
from lorasft.model.selfcheck import verify
from lorasft.model.trained import Trained
from lorasft.model.weightless import make_weightless, plan_network
from lorasft.recipe import AdapterSettings, ModelSettings

SETTINGS = AdapterSettings(rank=4, alpha=8.0)
STATES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
HEADS: dict[str, Any] = {"num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2, "chunk_size": 16}
MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
MAMBA |= {"mamba_chunk_size": 16}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES: dict[str, tuple[str, Callable[[], Any]]] = {
    "qwen3-next": ("Qwen3NextGatedDeltaNet", lambda: hf.Qwen3NextConfig(
        **SHAPE, **LINEAR_ATTENTION, **EXPERTS, shared_expert_intermediate_size=16)),
    "qwen3.5": ("Qwen3_5GatedDeltaNet", lambda: hf.Qwen3_5TextConfig(**SHAPE, **LINEAR_ATTENTION)),
    "falcon-h1": ("FalconH1Mixer", lambda: hf.FalconH1Config(**SHAPE, **MAMBA, mamba_d_ssm=64)),
    "lfm2": ("Lfm2ShortConv", lambda: hf.Lfm2Config(
        **PLAIN, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False)),
    "granite-4": ("GraniteMoeHybridMambaLayer", lambda: hf.GraniteMoeHybridConfig(
        **PLAIN, **MAMBA, layer_types=["mamba", "attention"], mamba_expand=2, shared_intermediate_size=64,
        num_local_experts=0)),
    "mamba-2": ("Mamba2Mixer", lambda: hf.Mamba2Config(**STATES, **HEADS)),
    "mamba": ("MambaMixer", lambda: hf.MambaConfig(**STATES)),
    "recurrent-gemma": ("RecurrentGemmaRecurrentBlock", lambda: hf.RecurrentGemmaConfig(
        **PLAIN, lru_width=32, attention_window_size=8, block_types=["recurrent", "attention"])),
    "kimi-linear": ("KimiLinearDeltaAttention", lambda: hf.KimiLinearConfig(
        **MULTIHEAD, layer_types=["linear_attention", "full_attention"], mlp_layer_types=["dense", "dense"],
        linear_head_dim=8, linear_num_heads=4, kv_lora_rank=16, q_lora_rank=None, qk_rope_head_dim=4,
        qk_nope_head_dim=8, v_head_dim=8)),
}  # fmt: skip


class Segments(Rows):
    """Sequences of one token and of many, several of them about as long as others."""

    def __init__(self) -> None:
        random = np.random.default_rng(7)
        self.rows = [(self._tokens(random, length),) for length in (24, 2, 23, 9, 40, 22, 9)]


def make_base(name: str, **sizes: int) -> Any:
    """A random model in which a neighbour's state shows."""
    torch.manual_seed(2)
    config = FAMILIES[name][1]()
    config = type(config)(**config.to_dict() | sizes)
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
                module.weight.normal_(0, 0.2)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def ours(name: str) -> tuple[Any, Network]:
    model = attach_adapter(make_base(name), SETTINGS, seed=0)
    randomize_adapter(model)
    return model, verify(model.get_base_model())


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")  # of fused experts
@pytest.mark.parametrize("name", FAMILIES)
def test_mixers_called_by_segment_give_what_sequences_give_alone(name: str) -> None:
    """Packed, alone, and with all layers recomputed."""
    base, rows = make_base(name), Segments()
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=all_linears(base))
    oracle = get_peft_model(base, config)
    randomize_adapter(oracle)
    want = plain_step(oracle, rows, "token")
    rounding = 0.0  # of transformers' own in fp32; experts cannot be asked: their grouped product has no float64
    if not hasattr(base.config, "num_experts"):
        rounding = differences(want[1], plain_step(oracle.double(), rows, "token")[1])[1]
    model, network = ours(name)
    assert network.segments and network.mixer and network.mixer.__name__ == FAMILIES[name][0], network.notices
    assert network.share is False and network.head and not network.notices
    for capacity, layers in ((200, 0), (60, 2), (1, 0)):
        recompute(network.causal, layers)
        model.train()
        loss, gradients = packed_step(model, network, rows, "token", capacity)
        whole, worst = differences(gradients, want[1])
        assert loss == pytest.approx(want[0], rel=1e-6), capacity
        assert whole < 1e-5 and worst < max(1e-5, 2 * rounding) < 1e-4, (capacity, whole, worst, rounding)


def test_a_mixer_that_runs_over_the_whole_row_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the self-check, and by gradients that are those of sequences alone otherwise."""
    model, network = ours("qwen3.5")
    rows, (_, want) = Segments(), packed_step(*ours("qwen3.5"), Segments(), "token", 1)
    for module in network.causal.modules():
        if type(module) is network.mixer:
            del module.forward
    assert differences(packed_step(model, network, rows, "token", 200)[1], want)[0] > 1e-2
    monkeypatch.setattr(
        mixers, "_call", lambda causal, module, *args, **kwargs: type(module).forward(module, *args, **kwargs)
    )
    for name in ("qwen3.5", "mamba"):
        _, network = ours(name)
        assert not network.segments and network.mixer is None and "one at a time" in network.notices[0]


def lengths_of(rows: torch.Tensor, seq_idx: torch.Tensor | None, cu_seqlens: torch.Tensor | None) -> list[int]:
    """Of the sequences of `rows` (1, tokens, ...); of one, where nothing is said."""
    if seq_idx is not None:
        return torch.unique_consecutive(seq_idx[0], return_counts=True)[1].tolist()
    return [rows.shape[1]] if cu_seqlens is None else cu_seqlens.diff().tolist()


def install_kernels(monkeypatch: pytest.MonkeyPatch, *, ignored: str = "") -> None:
    """Packages that Qwen3.5 calls when they are installed, which see where sequences begin but for what is `ignored`,
    and which read numbers, as kernels do."""
    modeling = hf.models.qwen3_5.modeling_qwen3_5
    plain = {name: getattr(modeling, name) for name in ("causal_conv1d_fn", "torch_chunk_gated_delta_rule")}
    convolve, apply_rule = (function.__wrapped__ for function in plain.values())

    def causal_conv1d_fn(
        x: Any, weight: Any, bias: Any = None, seq_idx: Any = None, activation: Any = None
    ) -> torch.Tensor:
        x.detach().flatten()[0].item()
        parts = x.split(lengths_of(x.mT, None if ignored == "seq_idx" else seq_idx, None), -1)
        return torch.cat([convolve(part, weight, bias, activation=activation) for part in parts], -1)

    def chunk_gated_delta_rule(
        q: Any, k: Any, v: Any, g: Any, beta: Any, initial_state: Any = None, output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False, cu_seqlens: Any = None,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        q.detach().flatten()[0].item()
        lengths = lengths_of(q, None, None if ignored == "cu_seqlens" else cu_seqlens)
        parts = zip(*(one.split(lengths, 1) for one in (q, k, v, g, beta)), strict=True)
        return torch.cat(
            [apply_rule(*part, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel)[0] for part in parts], 1
        ), None

    rules = SimpleNamespace(chunk_gated_delta_rule=chunk_gated_delta_rule)
    monkeypatch.setitem(sys.modules, "causal_conv1d", SimpleNamespace(causal_conv1d_fn=causal_conv1d_fn))
    monkeypatch.setitem(sys.modules, "fla", SimpleNamespace(ops=SimpleNamespace(gated_delta_rule=rules)))
    for name, package in zip(plain, ("causal_conv1d", "fla"), strict=True):
        kernel = use_kernel_func_from_hub_with_fallback(name.removeprefix("torch_"), package)(plain[name].__wrapped__)
        monkeypatch.setattr(modeling, name, kernel)


def test_kernels_that_are_told_where_sequences_begin_get_the_whole_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one call, where they listen; the memory of a step is known all the same."""
    rows, want = Segments(), packed_step(*ours("qwen3.5"), Segments(), "token", 1)
    install_kernels(monkeypatch)
    model, network = ours("qwen3.5")
    assert network.segments and network.told and not network.mixer and not network.notices
    for capacity, layers in ((200, 0), (60, 2)):
        recompute(network.causal, layers)
        loss, gradients = packed_step(model.train(), network, rows, "token", capacity)
        whole, worst = differences(gradients, want[1])
        assert loss == pytest.approx(want[0], rel=1e-6) and whole < 1e-5 and worst < 1e-5, (capacity, whole, worst)
    weightless = make_weightless(network.causal.config, ModelSettings(base="none"), SETTINGS, torch.device("cpu"))
    batch = next(make_micro_batches(rows.sequences, range(7), capacity=200))
    assert dry_run(plan_network(network, weightless), batch, recomputed=0).peak > 0


@pytest.mark.parametrize("ignored", ["seq_idx", "cu_seqlens"])
def test_kernels_that_do_not_listen_are_called_by_segment(ignored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install_kernels(monkeypatch, ignored=ignored)
    _, network = ours("qwen3.5")
    assert network.segments and not network.told and network.mixer and not network.notices


class Neighbours(torch.nn.Module):
    """A norm that adds half of each token to the next one."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.inner, self.weight = norm, norm.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        return y + 0.5 * F.pad(y[:, :-1], (0, 0, 1, 0))


def test_what_mixes_in_two_ways_is_called_by_segment_as_a_whole() -> None:
    """The block round both, if it can be; with attention in it sequences go alone, saying so."""
    base = make_base("mamba-2")
    for layer in decoder_layers(base):
        layer.norm = Neighbours(layer.norm)
    network = verify(base)
    assert network.mixer and network.mixer.__name__ == "Mamba2Block" and not network.notices
    base = make_base("falcon-h1")
    for layer in decoder_layers(base):
        layer.input_layernorm = Neighbours(layer.input_layernorm)
    network = verify(base)
    assert not network.segments and network.mixer is None and "one at a time: losses move" in network.notices[0]


def test_a_row_is_computed_again_with_its_own_segments() -> None:
    """Where another row was computed before the backward pass."""
    model, network = ours("mamba-2")
    batches = list(make_micro_batches(Segments().sequences, range(7), capacity=70))
    results = []
    for count in (0, 2):
        recompute(network.causal, count)
        model.train().zero_grad()
        losses = [pair_losses(network, batch) for batch in batches]
        sum(part.sum() for part in losses).backward()
        results.append({name: one.grad.clone() for name, one in trainable(model).items()})
    assert len(batches) > 1 and all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("name", ["qwen3.5", "mamba"])
def test_a_dry_run_calls_mixers_as_a_step_does(name: str) -> None:
    settings = ModelSettings(base="-", quantization="none", dtype="float32")
    model, network = ours(name)
    weightless = make_weightless(network.causal.config, settings, SETTINGS, torch.device("cpu"))
    planned = plan_network(network, weightless)
    batch = heaviest_batch(network, longest=20, capacity=70)
    for count in (0, 1, 2):
        recompute(network.causal, count)
        Trained(model.train(), torch.float32)
        with StorageMeter() as meter:
            loss = pair_losses(network, batch).sum()
            kept = meter.live
            loss.backward()
        predicted = dry_run(planned, batch, recomputed=count)
        assert predicted.kept == pytest.approx(kept, abs=2000)
        assert predicted.peak == pytest.approx(meter.peak, abs=2000)


def save(name: str, folder: Path) -> Path:
    """The model `name` and a tokenizer on disk, wide enough for 4 bits."""
    sizes = {"hidden_size": 64, "vocab_size": 384}
    sizes |= (
        {"num_heads": 16}
        if name == "mamba-2"
        else {"linear_value_head_dim": 32, "head_dim": 16}
        if name == "qwen3.5"
        else {}
    )
    make_base(name, **sizes).save_pretrained(folder)
    return save_tokenizer(folder)


def test_what_a_mamba_block_reads_past_is_neither_adapted_nor_4_bit(tmp_path: Path) -> None:
    base = load_base(ModelSettings(base=str(save("mamba", tmp_path)), dtype="float32"), torch.device("cpu"))
    kinds = {name.rpartition(".")[2]: type(module).__name__ for name, module in base.named_modules()}
    assert [kinds[name] for name in ("in_proj", "x_proj", "dt_proj", "lm_head")] == ["Linear4bit"] * 2 + ["Linear"] * 2
    assert {path.rpartition(".")[2] for path in all_linears(base)} == {"in_proj", "x_proj"}
    model = attach_adapter(base, SETTINGS, seed=0)
    randomize_adapter(model)
    network = verify(model.get_base_model())
    packed, alone = (packed_step(model.train(), network, Segments(), "token", capacity) for capacity in (200, 1))
    assert packed[0] == pytest.approx(alone[0], rel=1e-6) and differences(packed[1], alone[1])[0] < 1e-5


@pytest.mark.parametrize("name", ["qwen3.5", pytest.param("mamba-2", marks=pytest.mark.slow)])
def test_a_journey(name: str, tmp_path: Path, cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planned, trained in 4 bit, stopped, resumed, merged, asked; and what its long system prompt costs is said."""
    base, run, rows = save(name, tmp_path / "base"), tmp_path / "run", tmp_path / "rows.jsonl"
    system = {"role": "system", "content": "the cat sat on the mat and the dog ran. " * 3}
    lines = [[system, {"role": "user", "content": f"{n} + {n}"}, {"role": "assistant", "content": f"{2 * n}"}]
             for n in range(12)]  # fmt: skip
    rows.write_text("".join(json.dumps({"messages": line}) + "\n" for line in lines), encoding="utf-8")
    words = [f"model.base={base}", f"data.train={rows}", f"run.output={run}", "train.steps=4", "train.batch_size=4",
             "model.dtype=float32", "data.max_length=120", "run.save_every=1", "data.eval=0.2", "run.eval_every=2",
             "adapter.rank=4"]  # fmt: skip
    assert cli("plan", "tiny", *words).code == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 3, die)
        stopped = cli("train", "tiny", *words)
    assert stopped.code == 130 and "shared prefixes are computed for each example" in stopped.err
    assert cli("train", "tiny", *words, "--resume").code == 0
    assert cli("evaluate", run, "--data", rows).code == 0
    assert cli("merge", run, "--out", tmp_path / "merged").code == 0
    asked = [cli("chat", path, "--prompt", "1 + 1", "--max-tokens", "5") for path in (run, tmp_path / "merged")]
    assert [one.code for one in asked] == [0, 0]
    _, found = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
