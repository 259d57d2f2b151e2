"""Norms, gated MLPs and rotary embeddings that keep less for the backward pass and take fewer kernels.

They are found by what they compute with random weights, forwards and backwards. A norm keeps its input, which is the
residual, and a number a token; a gated MLP keeps gate and up. What they hand to the next linear carries `made_by`: the
function and the tensors that give its bits again, so that it need not be kept. transformers' own modules keep these
tensors as well, so a model that changes them in place fails with both.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, permutations, product
from types import FunctionType, MethodType
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_ROTARY = "apply_rotary_pos_emb"  # as every file of transformers calls it
_APART = 1e-5  # of each row, relative: more than rounding does in fp32


def use_lean_layers(causal: nn.Module) -> list[nn.Module]:
    """Give modules of `causal`, with or without numbers, the lean forward that computes the same.
    What trains, has hooks or is called by segment is left alone. Returns them; without `forward` each is as before."""
    found = [(one, lean) for one in causal.modules() if not isinstance(one.forward, partial) and (lean := _find(one))]
    for module, lean in found:
        module.forward = MethodType(lean, module)
    return [module for module, _ in found]


def _find(module: nn.Module) -> partial[Any] | None:
    """The lean forward of `module`, to be bound to it."""
    forward: Any = type(module).forward
    if _ROTARY in getattr(getattr(forward, "__code__", None), "co_names", ()):
        return _find_rotary(forward)
    if len(inspect.signature(forward).parameters) != 2:  # a second input may be a gate
        return None
    for parts, lean, x in chain(_norms(module), _gated_mlps(module)):
        small = copy.copy(module)
        vars(small).update(parts)  # found before its parameters and modules
        if _same(partial(forward, small), partial(lean, small), x):
            return lean
    return None


def _same(own: Callable[..., Any], lean: Callable[..., Any], *inputs: Tensor) -> bool:
    """Whether both give the same outputs and gradients of the inputs, row by row."""
    results = []
    try:
        for compute in (own, lean):
            given = [one.detach().requires_grad_() for one in inputs]
            with torch.enable_grad():
                outputs = compute(*given)
                outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                upstream = [_numbers(*y.shape).flip(-1) for y in outputs]  # at right angles to inputs of this shape
                results.append([*outputs, *torch.autograd.grad(outputs, given, upstream)])
    except Exception:  # a module may raise anything on an input that is not for it
        return False
    pairs = zip(*results, strict=True)
    return all(a.shape == b.shape and bool(((a - b).norm(dim=-1) <= _APART * a.norm(dim=-1)).all()) for a, b in pairs)


def _numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


def _norms(module: nn.Module) -> Iterator[tuple[dict[str, Any], partial[Any], Tensor]]:
    """x / sqrt(mean(x^2) + eps) * w, or 1 + w, for every number that may be eps: a weight, the forward, an input."""
    sizes = {name: len(one) for name, one in module.named_parameters() if one.dim() == 1 and not one.requires_grad}
    if len(sizes) == len(list(module.parameters())) == 1:
        ((name, size),) = sizes.items()
        x = _numbers(4, size) * torch.tensor([[1e-6], [1e-3], [1.0], [30.0]])  # so that eps counts
        for eps, offset in product([one for one in vars(module).values() if isinstance(one, float)], (0, 1)):
            yield {name: _numbers(size)}, partial(_normalize, name=name, eps=eps, offset=offset), x


def _normalize(module: nn.Module, x: Tensor, *, name: str, eps: float, offset: int) -> Any:
    """x (..., size) -> (..., size)."""
    weight = getattr(module, name)
    scale = weight.float() + offset if offset else weight  # in 16 bits 1 + w would lose most of w
    y = LeanNorm.apply(x, scale, eps)  # type: ignore[no-untyped-call]
    y.made_by = (lambda x: _rms_norm(x, scale, eps)[0], (x,))
    return y


class LeanNorm(torch.autograd.Function):
    """x (..., size), scale (size,), eps -> (..., size) in the dtype of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        y, rstd = _rms_norm(x, scale, eps)
        ctx.save_for_backward(x, scale, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        x, scale, rstd = ctx.saved_tensors
        if x.is_cuda:
            given = (dy.to(scale.dtype), x.to(scale.dtype), x.shape[-1:], rstd, scale, [True, False])
            return torch.ops.aten._fused_rms_norm_backward(*given)[0].to(x.dtype), None, None
        exact, slope = x.to(rstd.dtype), dy.to(rstd.dtype) * scale
        along = torch.linalg.vecdot(slope, exact).unsqueeze(-1).mul_(rstd.square()).div_(-x.shape[-1])
        return slope.addcmul_(exact, along).mul_(rstd).to(x.dtype), None, None


def _rms_norm(x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of x, rounded once, and 1 / the root of the mean square (..., 1) in fp32."""
    if x.is_cuda:
        y, rstd = torch.ops.aten._fused_rms_norm(x.to(scale.dtype), x.shape[-1:], scale, eps)
        return y.to(x.dtype), rstd
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = exact.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
    return (exact * rstd).mul_(scale).to(x.dtype).data, rstd  # `data`: not yet changed in place, as a linear sees it


def _gated_mlps(module: nn.Module) -> Iterator[tuple[dict[str, Any], partial[Any], Tensor]]:
    """down(act(gate(x)) * up(x)), of three linears in any order, or of two, one of which gives gate and up."""
    linears = [name for name, one in module.named_children() if isinstance(one, (nn.Linear, LoraLayer))]
    others = [name for name, one in module.named_children() if name not in linears and not list(one.parameters())]
    wide = {2: 24, 3: 12}.get(len(linears), 0)
    for *into, down in permutations(linears) if wide and len(others) == 1 else ():
        weights = {name: _numbers(8, wide).roll(index, 0) for index, name in enumerate(into)} | {down: _numbers(12, 8)}
        small = {name: partial(torch.matmul, other=weight) for name, weight in weights.items()}
        yield small, partial(_gated_mlp, into=into, act=others[0], down=down), _numbers(3, 5, 8)


def _gated_mlp(module: nn.Module, x: Tensor, *, into: Sequence[str], act: str, down: str) -> Any:
    """x (..., in) -> (..., out), by the names of the linears and of the activation."""
    parts = [getattr(module, name)(x) for name in into]
    gate, up = parts if len(parts) == 2 else parts[0].chunk(2, dim=-1)
    y = GatedProduct.apply(getattr(module, act), gate, up)  # type: ignore[no-untyped-call]
    y.made_by = (lambda gate, up: getattr(module, act)(gate) * up, (gate, up))
    return getattr(module, down)(y)


class GatedProduct(torch.autograd.Function):
    """act, which is for each element, gate and up (..., size) -> act(gate) * up."""

    @staticmethod
    def forward(ctx: Any, act: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return act(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            active = ctx.act(gate)
        return None, *torch.autograd.grad(active, gate, dy * up), active.detach().mul_(dy)


def _find_rotary(forward: FunctionType) -> partial[Any] | None:
    """q cos + rotate_half(q) sin, and k alike, by the function of the module's file, which others go on using: here
    the module's own forward gets a copy of the names of its file, in which the function is the lean one."""
    own, names = forward.__globals__[_ROTARY], dict(forward.__globals__)
    lean = names[_ROTARY] = partial(_rotate, own)
    turns = {"cos": _numbers(2, 5, 8), "sin": _numbers(2, 5, 8).flip(0)}
    if not _same(partial(own, **turns), partial(lean, **turns), _numbers(2, 3, 5, 8), _numbers(2, 1, 5, 8)):
        return None
    copied = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    copied.__kwdefaults__ = forward.__kwdefaults__
    return partial(copied)


def _rotate(own: Callable[..., Any], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> Any:
    """q and k turned; as `own` does it where it is a part of them, or in several dtypes, or otherwise."""
    if options or k is None or not q.dtype == k.dtype == cos.dtype or q.shape[-1] != cos.shape[-1] or cos.dim() != 3:
        return own(q, k, cos, sin, **options)
    return Rotary.apply(q, k, cos.unsqueeze(1), sin.unsqueeze(1))  # type: ignore[no-untyped-call]


class Rotary(torch.autograd.Function):
    """q and k (rows, heads, tokens, size), cos and sin (rows, 1, tokens, size) -> q and k turned."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        return tuple(_turn(x, cos, sin.chunk(2, dim=-1), 1) for x in (q, k))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return *(_turn(dy, cos, sin.chunk(2, dim=-1)[::-1], -1) for dy in slopes), None, None


def _turn(x: Tensor, cos: Tensor, sines: Sequence[Tensor], sign: int) -> Tensor:
    """x cos + the halves of x, exchanged, times -`sign` and `sign` and the `sines`."""
    y = x * cos
    (first, second), (into_first, into_second) = x.chunk(2, dim=-1), y.chunk(2, dim=-1)
    into_first.addcmul_(second, sines[0], value=-sign)
    into_second.addcmul_(first, sines[1], value=sign)
    return y
