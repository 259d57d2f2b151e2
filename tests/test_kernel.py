"""One kernel for all segments: what it is given, beside attention segment by segment, and when it is refused.

`flash` is what FlashAttention computes, by hand; tests/cuda runs the same on an emulated device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from test_cascade import TREES, make_inputs, random_tree
from torch import Tensor

from lorasft.model import attention
from lorasft.model.attention import Paths, Shape, attend
from lorasft.model.selfcheck import _find_kernel_error, _reason

PLAIN, WINDOWED = (Shape((4, 2, 2), (16, 16, 16), windowed, open_scores=False) for windowed in (False, True))
SINKS = torch.tensor([-3.0, 0.5, 2.0, 9.0], dtype=torch.float64)


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_flash", flash)
    monkeypatch.setattr(attention, "_flash_back", flash_back)


def find(shape: Shape) -> str | None:
    return _reason(partial(_find_kernel_error, shape, torch.device("cpu"), torch.bfloat16))


def look(
    query: Tensor, key: Tensor, value: Tensor, queries: Tensor, keys: Tensor, causal: bool,
    *, scale: float, window_size_left: int, window_size_right: int,
) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor]]:  # fmt: skip
    """Of each sequence where its queries and keys are, scores (heads, queries, keys), keys and values repeated."""
    for (a, b), (c, d) in zip(queries.unfold(0, 2, 1).tolist(), keys.unfold(0, 2, 1).tolist(), strict=True):
        k, v = (row[c:d].repeat_interleave(query.shape[1] // key.shape[1], 1) for row in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[a:b], k) * scale
        ahead = torch.arange(d - c) - torch.arange(d - c - (b - a), d - c).unsqueeze(1)
        hidden = ahead > (0 if causal else window_size_right)
        hidden |= ahead < (-window_size_left if window_size_left >= 0 else -len(key))
        yield slice(a, b), slice(c, d), scores.masked_fill(hidden, -torch.inf), k, v


def flash(
    query: Tensor, key: Tensor, value: Tensor, queries: Tensor, keys: Tensor, most_queries: int, most_keys: int,
    dropout: float, causal: bool, debug: bool, **how: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """torch.ops.aten._flash_attention_forward, which runs on CUDA alone."""
    assert (queries.dtype, keys.dtype) == (torch.int32, torch.int32) and not (dropout or debug)
    assert (queries.diff().max(), keys.diff().max()) == (most_queries, most_keys)
    assert query.shape[0] == queries[-1] and key.shape[0] == value.shape[0] == keys[-1]
    seen = list(look(query, key, value, queries, keys, causal, **how))
    rows = torch.cat([torch.einsum("hqk,khd->qhd", scores.softmax(-1), v) for _, _, scores, _, v in seen])
    return rows, torch.cat([scores.logsumexp(-1) for _, _, scores, _, _ in seen], 1), queries, keys, rows[:0]


def flash_back(
    upstream: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, log: Tensor, queries: Tensor,
    keys: Tensor, most_queries: int, most_keys: int, dropout: float, causal: bool, *state: Tensor, **how: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """torch.ops.aten._flash_attention_backward: with the output and the denominators that it is given."""
    gradients, group = [torch.zeros_like(row) for row in (query, key, value)], query.shape[1] // key.shape[1]
    for a, c, scores, k, v in look(query, key, value, queries, keys, causal, **how):
        weights = (scores - log[:, a].unsqueeze(-1)).exp()
        slopes = torch.einsum("qhd,khd->hqk", upstream[a], v) - (upstream[a] * output[a]).sum(-1).t().unsqueeze(-1)
        slopes = weights * slopes * how["scale"]
        gradients[0][a] = torch.einsum("hqk,khd->qhd", slopes, k)
        gradients[1][c] = torch.einsum("hqk,qhd->khd", slopes, query[a]).unflatten(1, (-1, group)).sum(2)
        gradients[2][c] = torch.einsum("hqk,qhd->khd", weights, upstream[a]).unflatten(1, (-1, group)).sum(2)
    return tuple(gradients)


def results(segments: Paths, window: int | None, inputs: list[Tensor], sinks: Tensor | None) -> list[Tensor]:
    """The output and the gradients of queries, keys and values."""
    leaves = [row.clone().requires_grad_() for row in inputs]
    output, _ = attend(torch.nn.Module(), *leaves, None, segments=segments, sliding_window=window, s_aux=sinks)
    return [output.detach(), *torch.autograd.grad(output, leaves, output.detach().cos())]


@pytest.mark.parametrize("sinks", [None, SINKS])
@pytest.mark.parametrize("window", [None, 1, 6, 33])
@pytest.mark.parametrize("tree", [*TREES, 0, 1])
def test_it_is_given_what_each_segment_sees(tree: str | int, window: int | None, sinks: Tensor | None) -> None:
    paths = Paths(*(TREES[tree] if isinstance(tree, str) else random_tree(tree)), cascade=False)
    asked: list[Shape] = []
    one = replace(
        paths, kernel=lambda shape: asked.append(shape) or True, places=[torch.from_numpy(n) for n in paths.numbers]
    )
    inputs = make_inputs(sum(paths.lengths), torch.float64)
    others = paths if sinks is None else replace(paths, cascade=True)  # else sinks are left to the model's own function
    wanted = results(others, window, inputs, sinks)
    for got, want in zip(results(one, window, inputs, sinks), wanted, strict=True):
        assert torch.allclose(got, want, atol=1e-12)
    assert asked == [(WINDOWED if window else PLAIN)._replace(sinks=sinks is not None)]


def test_what_many_read_has_exact_gradients() -> None:
    """512 short answers to a prompt: added up in bf16, each is less than half of the sum's last bit."""
    paths = Paths([40] + [4] * 512, [()] + [(0,)] * 512, cascade=False)
    one = replace(paths, kernel=lambda _: True, places=[torch.from_numpy(n) for n in paths.numbers])
    torch.manual_seed(0)
    rows = [torch.randn(1, sum(paths.lengths), heads, 16).bfloat16() for heads in (4, 2, 2)]
    found = []
    for segments, dtype in ((one, torch.bfloat16), (paths, torch.float64)):
        leaves = [row.to(dtype).transpose(1, 2).requires_grad_() for row in rows]
        output, _ = attend(torch.nn.Module(), *leaves, None, segments=segments)
        found.append(torch.autograd.grad(output.sum(), leaves[1:]))
    for got, want in zip(*found, strict=True):
        assert (got - want)[:, :, :40].norm() < 1e-2 * want[:, :, :40].norm()


def wrong(change: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    return lambda *given, **named: flash(*change(given), **named)


class Backward(torch.autograd.Function):
    """Passes on; its backward pass does as it is told."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, error: Exception | None) -> Tensor:
        ctx.error = error
        return row.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        if ctx.error:
            raise ctx.error
        return upstream * 1.1, None


WRONG = {
    "an outer key": (lambda *given, **named: flash(*given, **named | {"window_size_left": 40}), "from float64"),
    "the scale": (lambda *given, **named: flash(*given, **named | {"scale": 0.25}), "from float64"),
    "numbers": (lambda *given, **named: (flash(*given, **named)[0] * torch.nan,), "nan from float64"),
    "gradients of keys": (wrong(lambda rows: (rows[0], Backward.apply(rows[1], None), *rows[2:])), "from float64"),
    "no backward": (
        wrong(lambda rows: (*rows[:2], Backward.apply(rows[2], RuntimeError("head dim 200\nat line 7")), *rows[3:])),
        "RuntimeError: head dim 200",
    ),
    "other arguments": (lambda query: (query,), "TypeError: "),
}


def test_it_is_used_where_it_is_right_and_the_reason_said_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(find(shape._replace(sinks=sinks)) for shape in (PLAIN, WINDOWED) for sinks in (False, True))
    no_sink = lambda *given, **how: flash_back(*given[:5], given[5] - 0.1, *given[6:], **how)  # noqa: E731
    monkeypatch.setattr(attention, "_flash_back", no_sink)
    assert "from float64" in (find(PLAIN._replace(sinks=True)) or "")
    assert "soft caps" in (find(PLAIN._replace(open_scores=True)) or "")
    for name, (kernel, reason) in WRONG.items():
        monkeypatch.setattr(attention, "_flash", kernel)
        said = find(WINDOWED) or ""
        assert reason in said and "line 7" not in said, (name, said)
    monkeypatch.setattr(attention, "_flash", wrong(lambda rows: raise_(torch.OutOfMemoryError("CUDA out of memory"))))
    with pytest.raises(torch.OutOfMemoryError):  # says nothing of the kernel
        find(PLAIN)


def raise_(error: Exception) -> Any:
    raise error
