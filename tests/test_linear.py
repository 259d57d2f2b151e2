"""The NF4 + LoRA linear against PEFT's own forward, the definition in float64, and numerical derivatives."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from test_oracles import differences, gradients
from tiny_models import make_base, randomize_adapter
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lorasft.model import linear
from lorasft.model.adapter import attach_adapter
from lorasft.model.linear import FrozenWeights, use_lean_linears
from lorasft.model.recompute import recompute
from lorasft.model.selfcheck import verify
from lorasft.model.trained import Trained
from lorasft.recipe import AdapterSettings, OptimizerSettings
from lorasft.training.optimizer import make_optimizer, optimizer_state, restore_optimizer

RANK, IN, OUT = 4, 128, 64


def nf4(*, nested: bool) -> Any:
    layer = bnb.nn.Linear4bit(IN, OUT, bias=False, compress_statistics=nested, quant_type="nf4")
    layer.weight.data.normal_()
    return layer.to("cpu")  # quantizes


BASES = {
    "linear": lambda: nn.Linear(IN, OUT, bias=False),
    "bias": lambda: nn.Linear(IN, OUT),
    "conv1d": lambda: Conv1D(OUT, IN),
    "nf4": lambda: nf4(nested=False),
    "nf4-double": lambda: nf4(nested=True),
}


def make_layer(kind: str, *, lean: bool = True, **settings: Any) -> Any:
    """A PEFT LoRA layer over a base of `kind`, the same whenever it is asked for."""
    torch.manual_seed(4)
    holder = nn.ModuleDict({"layer": BASES[kind]()}).requires_grad_(False)
    options = {"r": RANK, "lora_alpha": 6, "use_rslora": True, "fan_in_fan_out": kind == "conv1d"}
    inject_adapter_in_model(LoraConfig(target_modules=["layer"], **{**options, **settings}), holder)
    randomize_adapter(holder)
    if lean:
        use_lean_linears(holder)
    return holder["layer"]


def run(layer: Any, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Output and gradients of a layer."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    return {"y": y.detach(), "x": x.grad, **gradients(layer)}  # type: ignore[dict-item]


def define(layer: Any, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """The same from the definition, in float64, on the dequantized weight."""
    base = layer.base_layer
    weight = FrozenWeights().read(base, torch.float64)
    a, b = (part["default"].weight.detach().double().requires_grad_() for part in (layer.lora_A, layer.lora_B))
    x = x.double().requires_grad_()
    y = x @ weight.t() + layer.scaling["default"] * (x @ a.t() @ b.t())
    y = y if base.bias is None else y + base.bias
    y.backward(dy.double())
    return {"y": y.detach(), "x": x.grad, "lora_A.default.weight": a.grad, "lora_B.default.weight": b.grad}  # type: ignore[dict-item]


@pytest.mark.parametrize("kind", BASES)
def test_output_and_gradients_are_pefts_and_the_definitions(kind: str) -> None:
    x, dy = torch.randn(3, 7, IN), torch.randn(3, 7, OUT)
    got = run(make_layer(kind), x, dy)
    theirs = run(make_layer(kind, lean=False), x, dy)
    exact = define(make_layer(kind), x, dy)
    for want in (theirs, exact):
        whole, worst = differences(got, want)
        assert whole < 1e-6 and worst < 5e-6
    assert all(value.abs().max() > 0.1 for value in got.values())  # else nothing was compared


def test_nothing_is_kept_but_the_input_once_and_what_is_small() -> None:
    """Three layers that read the same input, as queries, keys and values do."""
    layers = [make_layer("nf4-double") for _ in range(3)]
    x = torch.randn(50, IN, dtype=torch.bfloat16, requires_grad=True)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = [layer(x) for layer in layers]
    assert sum(kept.values()) == x.nbytes + 3 * 50 * RANK * 2
    assert all(y.dtype == torch.bfloat16 for y in outputs)


@pytest.mark.parametrize("changed", [False, True])
def test_an_input_that_can_be_made_again_is_not_kept(changed: bool) -> None:
    """As down's input is in a gated MLP, unless it was changed after it was made."""
    layer, dy = make_layer("nf4-double"), torch.randn(50, OUT)
    parts = [torch.randn(50, IN, requires_grad=True) for _ in range(2)]
    results, kept = [], []
    for made in (False, True):
        x = parts[0] * parts[1]
        if made:
            x.made_by = (torch.mul, parts)  # type: ignore[attr-defined]
        if changed:
            x.mul_(2)
        with saved_tensors_hooks(lambda tensor: (kept.append(tensor.data_ptr()), tensor)[1], lambda tensor: tensor):
            y = layer(x)
        assert (x.data_ptr() in kept) == (changed or not made)
        wanted = [*parts, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        results.append(torch.autograd.grad(y, wanted, dy))
    assert all(map(torch.equal, *results))


def test_in_bf16_gradients_are_as_near_as_pefts() -> None:
    """A whole model in bf16, ours and PEFT's, against the same numbers in float64."""
    settings = AdapterSettings(rank=4, alpha=8.0)
    results = []
    for kind in ("ours", "theirs", "exact"):
        model = attach_adapter(make_base("llama", dtype=torch.bfloat16), settings, seed=0)
        randomize_adapter(model)
        if kind != "ours":
            _restore_forwards(model)
        if kind == "exact":
            model.double()
        results.append(_gradients_of_a_loss(model))
    assert all(gradient.dtype == torch.float32 for gradient in results[0].values())
    ours, theirs = (differences(result, results[2])[0] for result in results[:2])
    assert ours < 1.1 * theirs
    flat = [torch.cat([gradient.double().flatten() for gradient in result.values()]) for result in results]
    assert torch.cosine_similarity(flat[0], flat[2], dim=0) > 0.999


def _restore_forwards(model: Any) -> None:
    for module in model.modules():
        vars(module).pop("forward", None)  # back to the class's


def _gradients_of_a_loss(model: Any) -> dict[str, Tensor]:
    logits = model(torch.arange(40)[None]).logits
    logits.square().mean().backward()
    return gradients(model)


@pytest.mark.parametrize("nested", [False, True])
def test_large_weights_are_dequantized_by_blocks_to_the_same_bits(
    nested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "_MALLOC_KEEPS", 0)
    monkeypatch.setattr(linear, "_BLOCK_ELEMENTS", 1)
    weights, layer = FrozenWeights(), bnb.nn.Linear4bit(IN, 150, compress_statistics=nested, quant_type="nf4")
    layer.to("cpu")
    want = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    got = weights.read(layer, want.dtype)
    assert torch.equal(got, want)
    smaller = weights.read(nf4(nested=nested), want.dtype)
    assert smaller.data_ptr() == got.data_ptr()  # the same memory


def test_what_needs_no_gradient_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """An input without gradient: the weight is not read backwards; without autograd, the base computes as ever."""
    layer, reads, own = make_layer("nf4"), [], FrozenWeights.read
    x, dy = torch.randn(5, IN), torch.randn(5, OUT)
    monkeypatch.setattr(FrozenWeights, "read", lambda *args, **how: reads.append(1) or own(*args, **how))
    layer(x).backward(dy)
    assert len(reads) == 1 and gradients(layer).keys() == {"lora_A.default.weight", "lora_B.default.weight"}
    with torch.no_grad():
        without = layer(x)
    assert len(reads) == 1 and torch.allclose(without, layer(x), atol=1e-5)


def test_a_layer_that_is_disabled_or_dropping_takes_the_plain_way() -> None:
    x = torch.randn(5, IN)
    layer = make_layer("bias")
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))

    dropping = make_layer("bias", lora_dropout=0.5).train()
    assert not torch.equal(dropping(x), dropping(x))
    assert torch.allclose(dropping.eval()(x), make_layer("bias")(x), atol=1e-5)


def test_recomputed_activations_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward is entered again inside the backward pass, and reads weights into the same memory."""
    monkeypatch.setattr(linear, "_MALLOC_KEEPS", 0)
    holder = nn.Sequential(make_layer("nf4-double"), nn.Linear(OUT, IN).requires_grad_(False), make_layer("nf4"))
    use_lean_linears(holder)  # one memory for both
    assert holder[0].weights is holder[2].weights
    x, dy = torch.randn(5, IN), torch.randn(5, OUT)
    plain = run(holder, x, dy)
    holder.zero_grad()
    x.requires_grad_()
    checkpoint(holder, x, use_reentrant=False).backward(dy)
    again = {"x": x.grad, **gradients(holder)}
    assert all(torch.equal(again[name], plain[name]) for name in again)


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each function computes, in a list that grows."""
    calls: list[int] = []
    own = linear.LoraLinears.apply

    def apply(x: Tensor, layers: list[Any], *adapter: Tensor) -> Any:
        calls.append(len(layers))
        return own(x, layers, *adapter)

    monkeypatch.setattr(linear.LoraLinears, "apply", apply)
    return calls


class Block(nn.Module):
    """Two linears that are given one tensor, and one that is given another; `missing` is not called, `apart` is given
    a tensor of its own."""

    missing = apart = False

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.gate, self.up, self.other = (make_layer(kind, **settings) for kind in ("nf4-double", "bias", "linear"))
        use_lean_linears(self)  # as of one model

    def forward(self, x: Tensor) -> Tensor:
        x = x.sin()
        y = self.gate(x)
        if not self.missing:
            y = y * self.up(x.clone() if self.apart else x)
        return y + self.other(x.cos())


def take_block(block: Block, x: Tensor, *, recomputed: bool = False) -> dict[str, Tensor]:
    block.zero_grad()
    x = x.clone().requires_grad_()
    y = checkpoint(block, x, use_reentrant=False) if recomputed else block(x)
    y.square().sum().backward()
    return {"y": y.detach(), "x": x.grad, **gradients(block)}  # type: ignore[dict-item]


@pytest.mark.parametrize("change", ["nothing", "recomputed", "missing", "apart", "dropout", "disabled", "interrupted"])
def test_linears_that_share_an_input_are_one_function(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen in a first pass without gradients, relied on in the next, and given up where a pass differs."""
    x, calls = torch.randn(7, IN), count_calls(monkeypatch)
    block = Block(lora_dropout=0.5 if change == "dropout" else 0.0).train()
    with torch.no_grad():
        block(x)
    assert not calls
    if change == "interrupted":  # in the middle of a pass
        monkeypatch.setattr(block.up, "forward", lambda x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            block(x)
        monkeypatch.undo()
        calls = count_calls(monkeypatch)
    block.missing, block.apart = change == "missing", change == "apart"
    if change == "disabled":
        block.up.enable_adapters(False)
    calls.clear()
    torch.manual_seed(1)
    got = [take_block(block, x, recomputed=change == "recomputed") for _ in range(2)][-1]
    shared = {"nothing": [2, 1] * 2, "recomputed": [2, 1] * 4, "dropout": [], "disabled": [1, 1] * 2}
    lone = {"missing": [2, 1, 1, 1], "apart": [2, 1, 1, 1, 1, 1], "interrupted": [1, 1, 1, 2, 1]}
    assert calls == (shared | lone)[change]
    assert not block.gate.forward.func.__self__._ready  # nothing is held
    for layer in (block.gate, block.up, block.other):
        use_lean_linears(layer)  # each alone
    torch.manual_seed(1)
    want = [take_block(block, x) for _ in range(2)][-1]
    assert got.keys() == want.keys() and differences(got, want)[1] < 1e-6


def test_the_layers_of_a_model_that_share_an_input_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = attach_adapter(make_base("llama"), AdapterSettings(rank=4), seed=0)
    calls = count_calls(monkeypatch)
    verify(model.get_base_model()).causal.set_attn_implementation("eager")
    model(torch.arange(5)[None])
    assert calls == [3, 1, 2, 1] * 2


@pytest.mark.parametrize(("keep", "each"), [(None, 3), ("layer", 2), ("run", 1 / 2)])
def test_weights_that_are_kept_are_dequantized_less_often(
    keep: Any, each: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In recomputed layers: forwards, again, and backwards; for a run, once in two passes. The bits are the same."""
    reads, own = [], FrozenWeights.dequantize
    monkeypatch.setattr(FrozenWeights, "dequantize", lambda self, *base: reads.append(base) or own(self, *base))
    holder = nn.Sequential(*(make_layer("nf4-double") for _ in range(2)))
    between = nn.Linear(OUT, IN).requires_grad_(False)
    results = []
    for kept in (None, keep):
        use_lean_linears(holder)
        weights: Any = holder.frozen_weights
        weights.forget(kept)
        reads.clear()
        for _ in range(2):
            holder.zero_grad()
            x = torch.randn(5, IN, generator=torch.Generator().manual_seed(3)).requires_grad_()
            y = between(checkpoint(holder[0], x, use_reentrant=False))
            y = checkpoint(holder[1], y, use_reentrant=False)
            y.square().sum().backward()
            assert len(weights._kept) == (2 if kept == "run" else 0)
        results.append({"x": x.grad, **gradients(holder)})
    assert len(reads) == each * 2 * 2
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recomputed", [False, True])
def test_gradients_are_added_into_one_tensor(dtype: torch.dtype, recomputed: bool) -> None:
    """Over two backward passes, of a model with LoRA, DoRA and a module trained in full."""
    results = []
    for flat in (False, True):
        settings = AdapterSettings(rank=4, dora=dtype == torch.float32, modules_to_save=("lm_head",))
        model = attach_adapter(make_base("llama", dtype=dtype), settings, seed=0)
        randomize_adapter(model)
        causal = verify(model.get_base_model()).causal
        causal.set_attn_implementation("eager")
        recompute(causal, int(recomputed))
        model.train()
        trained = Trained(model, dtype) if flat else None
        for ids in (torch.arange(9), torch.arange(20, 30)):
            if trained:
                trained.check()
            model(ids[None]).logits.float().square().mean().backward()
        results.append(gradients(model))
        if trained:
            copied = {name: part.clone() for name, part in trained.split(trained.gradient).items()}
            assert copied.keys() == results[1].keys()
            assert all(torch.equal(copied[name], results[1][name]) for name in copied)
    assert differences(results[1], results[0])[1] < (1e-6 if dtype == torch.float32 else 2e-2)


def test_a_copy_that_is_not_the_masters_is_an_error() -> None:
    model = attach_adapter(make_base("llama", dtype=torch.bfloat16), AdapterSettings(rank=4), seed=0)
    trained = Trained(model, torch.bfloat16)
    trained.check()
    randomize_adapter(model)
    with pytest.raises(RuntimeError, match="refresh"):
        trained.check()
    trained.refresh()
    trained.check()
    name, parameter = next(iter(trained.parameters.items()))
    assert torch.equal(parameter.copy, parameter.detach().bfloat16()) and "lora_A" in name  # type: ignore[attr-defined]
    optimizer = make_optimizer(OptimizerSettings(name="adamw8bit"), trained)
    before = trained.master.detach().clone()
    trained.gradient.normal_()
    optimizer.step()
    trained.check()
    assert not torch.equal(trained.master, before)
    assert torch.equal(parameter.copy, parameter.detach().bfloat16())  # type: ignore[attr-defined]
    optimizer._optimizer_step_post_hooks.clear()
    optimizer.step()
    with pytest.raises(RuntimeError, match="refresh"):
        trained.check()
    trained.refresh()
    model.zero_grad()
    with pytest.raises(RuntimeError, match="zero_grad"):
        trained.check()


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_the_optimizer_updates_one_tensor_and_its_state_is_kept(name: Any) -> None:
    """As torch's and bitsandbytes' own do; put back, it goes on bit for bit."""
    settings = OptimizerSettings(name=name, learning_rate=1e-2, weight_decay=0.1)
    models = [attach_adapter(make_base("llama"), AdapterSettings(rank=8), seed=0) for _ in range(2)]
    trained, again = (Trained(model, torch.float32) for model in models)
    optimizer, oracle = make_optimizer(settings, trained), nn.Parameter(trained.master.detach().clone())
    kind: Any = {"adamw": torch.optim.AdamW, "adamw8bit": bnb.optim.AdamW8bit}[name]
    other = kind([oracle], lr=1e-2, betas=settings.betas, weight_decay=0.1)
    for step in range(6):
        trained.gradient.normal_(generator=torch.Generator().manual_seed(step))
        oracle.grad = trained.gradient.clone()
        if step == 3:
            optimizer, state = make_optimizer(settings, again), optimizer_state(optimizer)
            restore_optimizer(optimizer, state)
            assert all(torch.equal(state[key], value) for key, value in optimizer_state(optimizer).items())
            again.master.data.copy_(trained.master)
            again.gradient.copy_(trained.gradient)
            trained = again
        optimizer.step()
        other.step()
    assert torch.allclose(trained.master, oracle, rtol=1e-5, atol=1e-7)
    with pytest.raises((LookupError, ValueError)):
        smaller = Trained(attach_adapter(make_base("llama"), AdapterSettings(rank=4), seed=0), torch.float32)
        restore_optimizer(make_optimizer(settings, smaller), optimizer_state(optimizer))
