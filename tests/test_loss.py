"""The chunked loss: the definition in float64, numerical derivatives, what is kept, and heads that are not plain."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from test_oracles import Rows, gradients, plain_step
from tiny_models import make_base, randomize_adapter
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lorasft.data.packing import make_micro_batches
from lorasft.model.adapter import attach_adapter
from lorasft.model.loss import ChunkedLoss, Head, pair_losses, read_head, round_up
from lorasft.model.selfcheck import verify
from lorasft.recipe import AdapterSettings

PAIRS, HIDDEN, VOCABULARY = 11, 16, 40


def heads(dtype: torch.dtype = torch.float32) -> dict[str, Head]:
    torch.manual_seed(3)
    weight, bias = torch.randn(VOCABULARY, HIDDEN).to(dtype), torch.randn(VOCABULARY).to(dtype)
    return {
        "plain": Head(weight, None, 1.0, None),
        "bias": Head(weight, bias, 1.0, None),
        "scaled": Head(weight, None, 0.25, None),
        "capped": Head(weight, bias, 0.5, 3.0),
    }


def define(hidden: Tensor, targets: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """Losses, and the gradient of their weighted sum, in float64."""
    hidden = hidden.detach().double().requires_grad_()
    logits = torch.nn.functional.linear(hidden, head.weight.double(), None if head.bias is None else head.bias.double())
    logits = logits * head.scale
    logits = logits if head.softcap is None else torch.tanh(logits / head.softcap) * head.softcap
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    (losses * weights()).sum().backward()
    return losses.detach(), hidden.grad  # type: ignore[return-value]


def weights() -> Tensor:
    return torch.arange(1.0, PAIRS + 1)


class Kernels(TorchDispatchMode):
    """The names of the operations that read or write a whole matrix of `size` numbers, without views."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.names = size, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [one for one in (*args, result) if isinstance(one, Tensor)]
        if any(one.numel() == self.size for one in given) and not func.is_view:
            self.names.append(func.overloadpacket.__name__)
        return result


def test_three_kernels_pass_over_the_logits_beside_the_products() -> None:
    """A cast, a softmax and an exponential; what is gathered and scattered is one number of each row, and no token is
    new."""
    head = heads(torch.bfloat16)["plain"]
    hidden = torch.randn(PAIRS, HIDDEN).bfloat16().requires_grad_()
    with Kernels(PAIRS * VOCABULARY) as seen:
        ChunkedLoss.apply(hidden, torch.randint(0, VOCABULARY, (PAIRS,)), head)
    few = {"mm", "gather", "scatter_", "new_empty", "index", "index_copy_", "index_fill_"}
    names = sorted(name for name in seen.names if name not in few)
    assert names == ["_log_softmax", "_to_copy", "exp"]


@pytest.mark.parametrize("kind", ["plain", "bias", "scaled", "capped"])
@pytest.mark.parametrize("pairs", [4, 11, 192])  # of a chunk: a ragged last one, all, more than there are
@pytest.mark.parametrize(("dtype", "apart"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_losses_and_gradients_are_the_definitions(kind: str, pairs: int, dtype: torch.dtype, apart: float) -> None:
    head = replace(heads(dtype)[kind], chunk=pairs)
    hidden = (torch.randn(PAIRS, HIDDEN) * 2).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (PAIRS,))
    losses = ChunkedLoss.apply(hidden, targets, head)
    (losses * weights()).sum().backward()
    want, slopes = define(hidden, targets, head)
    assert losses.dtype == torch.float32 and hidden.grad is not None
    assert (losses - want).norm() < apart * want.norm()
    assert (hidden.grad - slopes).norm() < apart * slopes.norm()


def test_nothing_as_wide_as_the_vocabulary_is_kept_and_without_gradients_nothing_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    products: list[tuple[int, ...]] = []
    own = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **kwargs: products.append(args[1].shape) or own(*args, **kwargs))
    hidden, targets = torch.randn(PAIRS, HIDDEN), torch.randint(0, VOCABULARY, (PAIRS,))
    without = ChunkedLoss.apply(hidden, targets, heads()["plain"])
    assert products == [(HIDDEN, VOCABULARY)]  # logits, and no product back
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        losses = ChunkedLoss.apply(hidden.requires_grad_(), targets, heads()["plain"])
    assert torch.equal(losses, without)
    assert [tuple(tensor.shape) for tensor in kept] == [(PAIRS, HIDDEN)]


def test_a_head_with_an_adapter_or_in_4_bit_goes_through_the_model() -> None:
    """Losses and gradients through an adapted head, and through one of NF4, as from the model's own logits."""
    rows = Rows()
    for adapted in (True, False):
        base = make_base("llama", hidden=64)
        targets = ("lm_head", "q_proj") if adapted else ("q_proj",)
        if not adapted:
            base.lm_head = _in_nf4(base.lm_head)
        model = attach_adapter(base, AdapterSettings(rank=4, targets=targets), seed=0)
        randomize_adapter(model)
        network = verify(model.get_base_model())
        assert network.head is None is read_head(network.causal) and network.segments
        (batch,) = make_micro_batches(rows.sequences, range(len(rows)), capacity=1000)
        losses = pair_losses(network, batch)
        (losses.sum() / len(losses)).backward()
        got = gradients(model)
        network.causal.set_attn_implementation("eager")
        value, want = plain_step(model, rows, "token")
        assert abs(float(losses.detach().mean()) - value) < 1e-5 * value
        assert got.keys() == want.keys() and len(got) == (6 if adapted else 4)
        assert all((got[name] - want[name]).norm() < 1e-5 * want[name].norm() for name in want)


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # gpt2 has an embedding for each position
def test_what_sizes_are_rounded_up_with_changes_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows()
    model = attach_adapter(make_base(family), AdapterSettings(rank=4), seed=0)
    randomize_adapter(model)
    network = verify(model.get_base_model())
    (batch,) = make_micro_batches(rows.sequences, range(len(rows)), capacity=1000)
    rounded = round_up(batch)
    assert len(rounded.ids) % 64 == len(rounded.sources) % 64 == 0 and len(batch.ids) % 64 and len(batch.sources) % 64
    found = []
    for one in (batch, rounded):
        losses = pair_losses(network, one)[: len(batch.sources)]
        (losses * torch.linspace(0, 1, len(losses))).sum().backward()
        found.append([losses.detach(), *gradients(model).values()])
        model.zero_grad()
    for got, want in zip(*found, strict=True):
        assert (got - want).norm() <= 2e-6 * want.norm()

    seen: list[int] = []
    network.causal.bfloat16().register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    assert pair_losses(replace(network, head=None), batch).shape == batch.sources.shape
    assert seen == [len(rounded.ids)]


def _in_nf4(head: Any) -> Any:
    four_bit = bnb.nn.Linear4bit(head.in_features, head.out_features, bias=False, quant_type="nf4")
    four_bit.support_avx512bf16_for_cpu = False
    four_bit.weight.data = head.weight.data
    return four_bit.to("cpu").requires_grad_(False)
