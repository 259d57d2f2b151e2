"""Attention over segments on a CPU, against dense attention with a mask in float64, and what it keeps."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import HELD_TO_AVX2
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from lorasft.model import attention
from lorasft.model.attention import CascadeAttention, Paths

TREES = {
    "one segment": ([37], [()]),
    "neighbours": ([5, 1, 40], [(), (), ()]),
    "answers to one prompt": ([30, 7, 300, 1], [(), (0,), (0,), (0,)]),
    "a turn inside a turn": ([20, 10, 5, 6, 9], [(), (0,), (0, 1), (0, 1), (0,)]),
    "readers that are no neighbours": ([8, 4, 6, 5], [(), (0,), (), (0,)]),
}


def random_tree(seed: int) -> tuple[list[int], list[tuple[int, ...]]]:
    dice = random.Random(seed)
    lengths, ancestors = [dice.randint(1, 40) for _ in range(12)], [()]
    for number in range(1, 12):
        parent = dice.randrange(-1, number)
        ancestors.append((*ancestors[parent], parent) if parent >= 0 else ())
    return lengths, ancestors


def attend(segments: Paths, *inputs: Tensor, window: int | None = None, sinks: Tensor | None = None) -> list[Tensor]:
    """The output and the gradients of queries, keys and values."""
    inputs = tuple(tensor.clone().requires_grad_() for tensor in inputs)
    options = {"sliding_window": window, "s_aux": sinks}
    output, _ = attention.attend(torch.nn.Module(), *inputs, None, segments=segments, **options)
    output.backward(slopes(output))
    return [output.detach(), *(tensor.grad for tensor in inputs)]  # type: ignore[list-item]


def dense(segments: Paths, *inputs: Tensor, window: int | None = None, sinks: Tensor | None = None) -> list[Tensor]:
    """The same over the whole row in float64, with a mask of all that each token sees, by transformers' own function
    for gpt-oss."""
    query, key, value = (tensor.double().requires_grad_() for tensor in inputs)
    owner = torch.repeat_interleave(torch.arange(len(segments.lengths)), torch.tensor(segments.lengths))
    counts = zip(segments.lengths, segments.key_counts, strict=True)
    place = torch.cat([torch.arange(seen - length, seen) for length, seen in counts])
    seen = torch.zeros(len(owner), len(owner), dtype=torch.bool)
    for number, before in enumerate(segments.ancestors):
        mine = owner == number
        seen |= (mine.unsqueeze(1) & mine).tril()
        for ancestor in before:
            seen |= mine.unsqueeze(1) & (owner == ancestor)
    seen &= place.unsqueeze(1) - place < (window or len(owner))
    module = torch.nn.Module()
    module.num_key_value_groups = query.shape[1] // key.shape[1]
    module.sinks = torch.full((query.shape[1],), -torch.inf, dtype=torch.float64) if sinks is None else sinks
    mask = torch.zeros(1, 1, *seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)
    output, _ = eager_attention_forward(module, query, key, value, mask, scaling=query.shape[-1] ** -0.5)
    output.backward(slopes(output))
    return [output.detach(), *(tensor.grad for tensor in (query, key, value))]  # type: ignore[list-item]


def slopes(output: Tensor) -> Tensor:
    return torch.linspace(-1, 1, output.numel()).view(output.shape).to(output.dtype)


def make_inputs(tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values as projections leave them, (1, tokens, heads, size) turned about."""
    torch.manual_seed(0)
    return [torch.randn(1, tokens, heads, 16).to(dtype).transpose(1, 2) for heads in (4, 2, 2)]


@pytest.mark.parametrize("sinks", [None, torch.tensor([-3.0, 0.5, 2.0, 9.0], dtype=torch.float64)])
@pytest.mark.parametrize("window", [None, 1, 6, 33])
@pytest.mark.parametrize("tree", [*TREES, 0, 1])
def test_windows_and_sinks_are_exact(
    tree: str | int, window: int | None, sinks: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_BLOCK", 8)  # below the larger window
    segments = Paths(*(TREES[tree] if isinstance(tree, str) else random_tree(tree)))
    inputs, limits = make_inputs(sum(segments.lengths), torch.float64), {"window": window, "sinks": sinks}
    for got, want in zip(attend(segments, *inputs, **limits), dense(segments, *inputs, **limits), strict=True):
        assert (got - want).abs().max() < 1e-14 * max(1, want.abs().max())


class LargestTensor(TorchDispatchMode):
    """How many numbers the largest tensor has that an operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.numbers = max(self.numbers, *(one.numel() for one in tree_leaves(result) if isinstance(one, Tensor)), 0)
        return result


@pytest.mark.parametrize("window", [None, 128])
def test_sinks_and_windows_take_no_scores_of_all_tokens_by_all(window: int | None) -> None:
    """Of 2,048 tokens and 4 heads transformers' own has four tensors of 16.8 million numbers."""
    inputs, sinks = make_inputs(2048, torch.float32), torch.ones(4)
    with LargestTensor() as largest:
        attend(Paths([1500, 548], [(), (0,)]), *inputs, window=window, sinks=sinks)
    assert largest.numbers <= 4 * 2048 * 16 < 2048 * 2048


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize("tree", [*TREES, *range(5)])
def test_outputs_and_gradients_are_those_of_dense_attention(tree: str | int, dtype: torch.dtype, error: float) -> None:
    if HELD_TO_AVX2 and dtype == torch.bfloat16:
        pytest.skip("torch has no bf16 attention here")
    segments = Paths(*(TREES[tree] if isinstance(tree, str) else random_tree(tree)))
    inputs = make_inputs(sum(segments.lengths), dtype)
    for got, want in zip(attend(segments, *inputs), dense(segments, *inputs), strict=True):
        assert got.dtype == dtype and (got - want).norm() <= error * want.norm()


def test_gradients_in_16_bits_are_nearer_to_float64_than_the_kernels() -> None:
    inputs = make_inputs(50, torch.bfloat16)
    exact = dense(Paths([50], [()]), *inputs)[1:]
    ours = attend(Paths([50], [()]), *inputs)[1:]
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    output = F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True).transpose(1, 2)
    output.backward(slopes(output))
    for got, leaf, want in zip(ours, leaves, exact, strict=True):
        assert leaf.grad is not None and (got - want).norm() < (leaf.grad - want).norm()


def test_only_the_row_and_a_number_for_each_head_are_kept() -> None:
    inputs = [tensor.requires_grad_() for tensor in make_inputs(50, torch.bfloat16)]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        output = CascadeAttention.apply(*inputs, None, Paths([20, 30], [(), (0,)]).stretches, 0.25)
    assert [tensor.data_ptr() for tensor in kept[:4]] == [tensor.data_ptr() for tensor in (*inputs, output)]
    assert [tuple(tensor.shape) for tensor in kept[4:]] == [(1, 4, 50)]


def test_answers_to_one_prompt_read_it_together() -> None:
    stretches = Paths(*TREES["answers to one prompt"]).stretches
    assert [(run.queries, run.keys) for run in stretches if not run.causal] == [(slice(30, 338), slice(0, 30))]
    assert not any(run for run in Paths(*TREES["neighbours"]).stretches if not run.causal)
