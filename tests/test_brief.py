"""Attention of short segments: gradients nearer to float64 than the kernel's own, and little kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lorasft.model import attention
from lorasft.model.attention import Paths
from lorasft.model.brief import BriefAttention, is_brief


def attend(segments: Paths, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The output and the gradients of queries, keys and values."""
    inputs = tuple(tensor.clone().requires_grad_() for tensor in inputs)
    output, _ = attention.attend(torch.nn.Module(), *inputs, None, segments=segments)
    output.backward(torch.linspace(-1, 1, output.numel()).view(output.shape).to(output.dtype))
    return output.detach(), *(tensor.grad for tensor in inputs)  # type: ignore[arg-type,misc]


def test_gradients_are_nearer_to_float64_than_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two segments of a row, grouped heads; the second sees an ancestor."""
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, 50, 16).bfloat16() for heads in (4, 2, 2)]
    segments = Paths([20, 30], [(), (0,)])
    used: list[Any] = []
    own = BriefAttention.apply
    monkeypatch.setattr(BriefAttention, "apply", lambda *args: used.append(1) or own(*args))
    ours = attend(segments, *inputs)
    assert len(used) == 2
    exact = attend(segments, *(tensor.double() for tensor in inputs))
    assert len(used) == 2
    monkeypatch.setattr(attention, "is_brief", lambda *args: False)
    theirs = attend(segments, *inputs)
    for got, kernel, want in zip(ours, theirs, exact, strict=True):
        assert got.dtype == torch.bfloat16
        assert (got - want).norm() <= 1.05 * (kernel - want).norm() and (got - want).norm() < 0.01 * want.norm()


def test_only_queries_keys_and_values_are_kept() -> None:
    inputs = [torch.randn(1, heads, 50, 16).bfloat16().requires_grad_() for heads in (4, 2, 2)]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        BriefAttention.apply(*inputs, {"is_causal": True, "enable_gqa": True})
    assert [tensor.data_ptr() for tensor in kept] == [tensor.data_ptr() for tensor in inputs]


def test_long_segments_wider_numbers_and_inference_take_the_kernel() -> None:
    short, long = torch.zeros(1, 2, 16, 8).bfloat16(), torch.zeros(1, 2, 400, 8).bfloat16()
    assert is_brief(short, short) and not is_brief(short, long) and not is_brief(short.float(), short.float())
    with torch.no_grad():
        assert not is_brief(short, short)
