"""Lean norms, MLPs and rotary embeddings: found by what they compute, beside the models' own and float64."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from test_architectures import ARCHITECTURES
from test_oracles import Rows, differences, packed_step
from tiny_models import make_base, randomize_adapter
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from lorasft.model import lean
from lorasft.model.adapter import attach_adapter
from lorasft.model.attention import SEGMENTS
from lorasft.model.lean import GatedProduct, LeanNorm, Rotary, use_lean_layers
from lorasft.model.loss import Network, read_head
from lorasft.model.memory import heaviest_batch, run_layers
from lorasft.model.recompute import only_first, recompute
from lorasft.model.selfcheck import verify
from lorasft.model.weightless import make_weightless, plan_network
from lorasft.recipe import AdapterSettings, ModelSettings

# Norms, gated MLPs and attentions of two layers; experts, which transformers computes all at once, stay as they are.
FAMILIES = {
    "llama": (5, 2, 2),
    "mistral": (5, 2, 2),
    "qwen-3": (9, 2, 2),  # with those of queries and keys
    "gemma-2": (9, 2, 2),
    "gemma-3": (13, 2, 2),
    "phi-3": (5, 2, 2),  # gate and up in one
    "gpt-2": (0, 0, 0),
    "gpt-neox": (0, 0, 2),
    "qwen-2-moe": (5, 2, 2),  # with shared experts
    "mixtral": (5, 0, 2),
}


def found(model: nn.Module) -> tuple[int, ...]:
    """The lean norms, MLPs and attentions of `model`."""
    forwards = [getattr(vars(module).get("forward"), "__func__", None) for module in model.modules()]
    kinds = Counter(one.func.__name__ for one in forwards if isinstance(one, partial))
    return kinds["_normalize"], kinds["_gated_mlp"], kinds["forward"]


def use_own_layers(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(getattr(vars(module).get("forward"), "__func__", None), partial):
            del module.forward


def make_adapted(name: str) -> Any:
    """A random model, large enough weights, with LoRA."""
    torch.manual_seed(2)
    config = ARCHITECTURES[name]()
    config.initializer_range = 0.2
    base = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model = attach_adapter(base.requires_grad_(False), AdapterSettings(rank=4, alpha=8.0), seed=0)
    randomize_adapter(model)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_losses_and_gradients_are_those_of_the_models_own_forwards(name: str) -> None:
    """And the same bits whether layers are recomputed or not."""
    model, rows = make_adapted(name), Rows()
    network = verify(model.get_base_model())
    assert found(model) == FAMILIES[name] and network.lean == any(FAMILIES[name]) and not network.notices
    model.train()
    results = []
    for recomputed in (0, 2):
        recompute(network.causal, recomputed)
        results.append(packed_step(model, network, rows, "token", 40))
    use_own_layers(model)
    assert found(model) == (0, 0, 0)
    value, want = packed_step(model, network, rows, "token", 40)
    for got in results:
        assert abs(got[0] - value) < 1e-6 * value
        whole, worst = differences(got[1], want)
        assert whole < 2e-6 and worst < 5e-6
    assert all(torch.equal(results[0][1][key], results[1][1][key]) for key in want)


class Strange(nn.Module):
    """An RMS norm that no name gives away, or one that is not quite one."""

    def __init__(self, kind: str = "", size: int = 64) -> None:
        super().__init__()
        self.kind, self.tiny, self.other = kind, 1e-4, 0.5
        self.g = nn.Parameter(torch.ones(size), requires_grad=kind == "trained")

    def forward(self, x: Tensor) -> Tensor:
        exact = x.float() - (x.float().mean(-1, keepdim=True) if self.kind == "centred" else 0)
        size = exact.square().mean(-1, keepdim=True)
        if self.kind == "eps outside":
            exact = exact / (size.sqrt() + self.tiny)
        else:
            exact = exact * (size + (0.3 if self.kind == "other eps" else self.tiny)).rsqrt()
        exact = (
            exact.detach() if self.kind == "no gradient" else exact.clamp(max=3) if self.kind == "clamped" else exact
        )
        return (exact * self.g).to(x.dtype)


class TwoInputs(LlamaRMSNorm):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(x) * (1 if gate is None else gate)


class Mlp(nn.Module):
    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.kind, self.w2 = kind, nn.Linear(96, 64)
        self.w3, self.w1 = nn.Linear(64, 96), nn.Linear(64, 96)
        self.bend = nn.PReLU() if kind == "trained act" else nn.Mish()
        if kind == "norm inside":
            self.norm = nn.LayerNorm(96)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bend(self.w1(x)) * self.w3(x)
        y = self.norm(y) if self.kind == "norm inside" else y * 1.01 if self.kind == "scaled" else y
        result: Tensor = self.w2(y)
        return result + x if self.kind == "residual" else result


def run(module: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y, x, dy)]


MLP = hf.LlamaConfig(hidden_size=64, intermediate_size=96)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (Strange(), True),
        (nn.RMSNorm(64, eps=1e-3), True),
        (GemmaRMSNorm(64, eps=1e-6), True),
        (Mlp(), True),
        *((Strange(kind), False) for kind in
          ("centred", "eps outside", "other eps", "no gradient", "clamped", "trained")),
        (nn.LayerNorm(64), False),
        (nn.LayerNorm(64, bias=False), False),
        (nn.RMSNorm(64), False),  # whose eps is that of a dtype
        (TwoInputs(64), False),
        (nn.SiLU(), False),
        *((Mlp(kind), False) for kind in ("norm inside", "scaled", "residual", "trained act")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_modules_are_found_by_what_they_compute(module: Any, expected: bool, device: str) -> None:
    """With numbers and without; what they hold is not written to."""
    frozen = not getattr(module, "kind", "").startswith("trained")
    module = nn.Sequential(module).to(device)
    if frozen:
        module.requires_grad_(False)
    before = {name: (one, one._version) for name, one in module.state_dict(keep_vars=True).items()}
    state, x, dy = torch.get_rng_state(), torch.linspace(-2, 3, 7 * 64).view(7, 64), torch.ones(7, 64)
    own = run(module, x, dy) if expected and device == "cpu" else []
    assert len(use_lean_layers(module)) == expected == sum(found(module))
    after = {name: (one, one._version) for name, one in module.state_dict(keep_vars=True).items()}
    assert all(after[name][0] is one and after[name][1] == version for name, (one, version) in before.items())
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(own and run(module, x, dy), own, strict=True):  # with its own numbers, and gate and up in order
        assert (a - b).norm() < 1e-5 * b.norm()
    use_own_layers(module)
    assert sum(found(module)) == 0 and all("forward" not in vars(one) for one in module.modules())


@pytest.mark.parametrize("kind", [LlamaRMSNorm, GemmaRMSNorm])
def test_norms_in_bf16_are_nearer_to_float64_than_transformers_own(kind: Any) -> None:
    torch.manual_seed(0)
    norm = kind(1024, eps=1e-6).requires_grad_(False).to(torch.bfloat16)
    norm.weight.copy_(torch.randn(1024) * 0.3)
    x, dy = (torch.randn(2, 300, 1024, dtype=torch.bfloat16) for _ in range(2))  # more than one block of a CPU
    own = run(norm, x, dy)
    use_lean_layers(norm)
    ours = run(norm, x, dy)
    scale = norm.weight.double() + (kind is GemmaRMSNorm)
    exact = run(lambda x: F.rms_norm(x, (1024,), scale, 1e-6), x.double(), dy.double())
    for a, b, c in zip(ours, own, exact, strict=True):
        assert a.dtype == torch.bfloat16 and (a - c).norm() <= (b - c).norm() * 1.0001
        assert (a - c).norm() < 2e-3 * c.norm()  # one rounding
    changed = (ours[0] != own[0]).float().mean()
    assert changed < 0.4 and (changed > 0.1 or kind is GemmaRMSNorm)


def test_what_is_made_again_has_the_same_bits_and_is_kept_once() -> None:
    """A norm keeps its input and a number a token, a gated product gate and up; outputs are made of just these."""
    x, gate, up = (torch.randn(3, 50, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    norm, mlp = LlamaRMSNorm(64).requires_grad_(False).bfloat16(), LlamaMLP(MLP).requires_grad_(False)
    norm.weight.copy_(torch.randn(64))
    assert use_lean_layers(nn.ModuleList([norm, mlp])) == [norm, mlp]
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda one: (kept.append(one), one)[1], lambda one: one):
        y = norm(x)
        product = GatedProduct.apply(F.silu, gate, up)
    small = [one for one in kept if one.shape == (3, 50, 1)]
    assert len(small) == 1 and torch.equal(product, F.silu(gate) * up)
    assert {one.data_ptr() for one in kept} == {one.data_ptr() for one in (x, norm.weight, gate, up, *small)}
    make, parts = y.made_by
    assert y._version == 0 and parts == (x,) and torch.equal(make(*parts), y)
    assert norm.float()(x.float())._version == 0

    seen: list[Tensor] = []
    mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    mlp(torch.randn(5, 64, requires_grad=True))
    make, parts = seen[0].made_by  # type: ignore[attr-defined]
    assert seen[0]._version == 0 and len(parts) == 2 and torch.equal(make(*parts), seen[0])


LARGE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
         "num_hidden_layers": 4, "vocab_size": 512, "head_dim": 128, "pad_token_id": 0}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "own", "most"),
    [(hf.LlamaConfig, 180, 93), (hf.Qwen3Config, 200, 103), (hf.Gemma3TextConfig, 232, 119), (hf.Phi3Config, 190, 103)],
)
def test_what_a_layer_of_8b_keeps(config: Any, own: int, most: int) -> None:
    """In KiB a token and layer between forward and backward, in bf16, with LoRA of rank 16 on NF4."""
    cpu, tokens = torch.device("cpu"), 256
    settings = ModelSettings(base="-", dtype="bfloat16")
    model = make_weightless(config(**LARGE), settings, AdapterSettings(rank=16), cpu)
    base = model.get_base_model()
    base.set_attn_implementation(SEGMENTS)
    network = Network(base, head=read_head(base), segments=True, planned=cpu)
    for way, expected in ((False, own), (True, most)):
        network = plan_network(replace(network, lean=way), model)
        batch = heaviest_batch(network, longest=tokens, capacity=tokens)
        kept = []
        for depth in (2, 4):
            with only_first(base, depth):
                kept.append(run_layers(network, batch, 99, 0).kept)
        assert (kept[1] - kept[0]) / 2 / len(batch.ids) / 1024 == pytest.approx(expected, abs=1)


def test_what_changes_the_losses_is_left_off(monkeypatch: pytest.MonkeyPatch) -> None:
    own = lean._rms_norm
    monkeypatch.setattr(lean, "_same", lambda *_: True)  # whatever a probe says
    monkeypatch.setattr(lean, "_rms_norm", lambda x, *more: own(x * 1.5 + 1, *more))
    model = make_base("llama").requires_grad_(False)
    network = verify(model)
    assert not network.lean and "losses differ" in network.notices[0] and found(model) == (0, 0, 0)


def test_only_this_model_computes_so() -> None:
    """Models of the same file have their own rotary embedding, and a second check begins with the model's own."""
    function, names = modeling_llama.apply_rotary_pos_emb, set(vars(modeling_llama))
    model, other = (make_base("llama").requires_grad_(False) for _ in range(2))
    networks = [verify(model), verify(model)]
    assert networks[0].lean and networks[1].lean and found(model) == (5, 2, 2) and found(other) == (0, 0, 0)
    assert modeling_llama.apply_rotary_pos_emb is function and set(vars(modeling_llama)) == names
    q, k = torch.randn(1, 2, 9, 8, dtype=torch.bfloat16), torch.randn(1, 1, 9, 8, dtype=torch.bfloat16)
    cos, sin = torch.randn(1, 9, 4), torch.randn(1, 9, 4)
    for given, options in ((q, k, cos, sin), {}), ((q, q, q[0], q[0]), {"unsqueeze_dim": 1}):
        # Where only a part is turned, or in other dtypes, or otherwise: the file's own.
        assert lean._rotate(lambda *args, **rest: "own", *given, **options) == "own"


def test_gradients_are_numerical_derivatives() -> None:
    q, k, cos, sin = (torch.randn(1, n, 3, 4, dtype=torch.float64, requires_grad=n > 1) for n in (3, 2, 1, 1))
    assert torch.autograd.gradcheck(lambda x: LeanNorm.apply(x, cos[0, 0, 0], 0.1), q)
    assert torch.autograd.gradcheck(lambda gate: GatedProduct.apply(nn.Mish(), gate, gate * 2), q)
    assert torch.autograd.gradcheck(Rotary.apply, (q, k, cos, sin))
