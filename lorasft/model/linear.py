"""The NF4 + LoRA linear, forward and backward in one function: y = x W^T (+ bias) + s (x A^T) B^T.

PEFT casts every input to the adapter's fp32 and keeps that copy. Here the small A and B are cast to the dtype of x
instead; they stay fp32 masters, and their gradients arrive in fp32. Kept for the backward pass are x A^T, which is
`rank` wide, and x, once, or what it can be made again from. W is frozen: it is dequantized where it is needed, forwards
and backwards, into memory that the next layer uses again. Modules that are trained in full are cast in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

# glibc returns allocations above 32 MB to the system, and each new one faults its pages in, which takes as long as
# dequantizing does ten times. Above that, weights on a CPU are dequantized by blocks into a buffer that stays.
_MALLOC_KEEPS = 32 << 20  # bytes
_BLOCK_ELEMENTS = 1 << 22


def use_lean_linears(model: nn.Module) -> None:
    """Give every plain LoRA layer of `model` the lean forward.

    Layers with a variant (DoRA), a bias in B or several adapters keep PEFT's own forward.
    """
    weights = FrozenWeights()
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.forward = MethodType(_forward_saved, module)
        elif isinstance(module, LoraLayer) and _is_plain(module):
            module.frozen_weights = weights
            module.forward = MethodType(_forward, module)


class FrozenWeights:
    """The weights of frozen linears in a compute dtype, large ones in memory that the next reading uses again.

    What is read is used at once, in the order of one stream, so it does not matter which thread reads.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def read(self, base: Any, dtype: torch.dtype) -> Tensor:
        """The weight of `base`, (out, in) in `dtype`; valid until the next reading."""
        if not isinstance(base, bnb.nn.Linear4bit):
            weight: Tensor = base.weight.detach().to(dtype)
            return weight.t() if isinstance(base, Conv1D) else weight
        packed, state = base.weight.data, base.weight.quant_state
        size = state.shape.numel()
        if packed.is_cuda or size * state.dtype.itemsize <= _MALLOC_KEEPS:
            return bnb.functional.dequantize_4bit(packed, state).to(dtype)  # type: ignore[no-any-return]
        if len(self._buffer) < size:
            self._buffer = torch.empty(size, dtype=state.dtype, device=packed.device)
        out = self._buffer[:size].view(state.shape)
        if not packed.is_meta:
            _dequantize_by_blocks(packed, state, out)
        return out.to(dtype)


def _dequantize_by_blocks(packed: Tensor, state: Any, out: Tensor) -> None:
    """bitsandbytes' own values in `out`: on a CPU it has no way to write into given memory."""
    absmax = state.absmax
    if state.nested:
        absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
    size, columns = state.blocksize, out.shape[1]  # columns are whole blocks of constants: load_base sees to it
    codes, rows = packed.view(torch.uint8).flatten(), max(1, _BLOCK_ELEMENTS // columns)
    for start in range(0, len(out), rows):
        block = out[start : start + rows]
        first, end = start * columns, start * columns + block.numel()
        part = bnb.functional.QuantState(
            absmax[first // size : end // size], block.shape, state.code, size, state.quant_type, out.dtype
        )
        block.copy_(bnb.functional.dequantize_4bit(codes[first // 2 : end // 2].unsqueeze(1), part))


class LoraLinear(torch.autograd.Function):
    """x (..., in), A (rank, in), B (out, rank), s, base, weights -> (..., out) in the dtype of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, scaling: float, base: Any, weights: FrozenWeights) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # (tokens, in)
        weight = weights.read(base, x.dtype).t()
        y = x.new_empty(*x.shape[:-1], weight.shape[1])  # no view of another tensor: Gemma 3n changes it in place
        rows = y.view(-1, weight.shape[1])
        if base.bias is None:
            torch.mm(flat, weight, out=rows)
        else:
            torch.addmm(base.bias.to(x.dtype), flat, weight, out=rows)
        down = flat @ a.to(x.dtype).t()  # (tokens, rank)
        rows.addmm_(down, b.to(x.dtype).t(), alpha=scaling)
        ctx.make, parts = _made_by(x)
        ctx.save_for_backward(down, a, b, *parts)
        ctx.scaling, ctx.base, ctx.weights = scaling, base, weights
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        down, a, b, *parts = ctx.saved_tensors
        x = ctx.make(*parts)
        flat, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        d_down = (dy @ b.to(x.dtype)).mul_(ctx.scaling)  # (tokens, rank)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ ctx.weights.read(ctx.base, x.dtype)
            dx = dx.addmm_(d_down, a.to(x.dtype)).view(x.shape)
        da = (d_down.t() @ flat).to(a.dtype)
        db = (dy.t() @ down).to(b.dtype).mul_(ctx.scaling)
        return dx, da, db, None, None, None


def _made_by(x: Tensor) -> tuple[Callable[..., Tensor], Sequence[Tensor]]:
    """How to make the bits of x again, and from which tensors, which autograd keeps anyway: `x.made_by` of a norm or
    of a gated product, unless x was changed since; else x itself.
    """
    made: tuple[Callable[..., Tensor], Sequence[Tensor]] | None = getattr(x, "made_by", None)
    return made if made and x._version == 0 else (lambda same: same, (x,))


def _is_plain(layer: Any) -> bool:
    return (
        not isinstance(layer, ParamWrapper)
        and not layer.lora_variant
        and not any(layer.lora_bias.values())
        and type(layer.get_base_layer()) in (nn.Linear, Conv1D, bnb.nn.Linear4bit)
    )


def _forward_saved(wrapper: Any, *args: Any, **kwargs: Any) -> Any:
    """A module trained in full, computed in the dtype of the one that it replaces."""
    original = wrapper.original_module
    if wrapper.disable_adapters:
        return original(*args, **kwargs)
    ((_, copy),) = wrapper.modules_to_save.items()
    cast = {name: parameter.to(original.get_parameter(name).dtype) for name, parameter in copy.named_parameters()}
    return functional_call(copy, cast, args, kwargs)


def _forward(layer: Any, x: Tensor) -> Tensor:
    """x: (..., in) -> (..., out) in the dtype of x."""
    base = layer.base_layer
    if layer.disable_adapters:
        result: Tensor = base(x)
        return result
    (name,) = layer.lora_A
    a, b, scaling = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    dropout = layer.lora_dropout[name]
    drops = layer.training and not isinstance(dropout, nn.Identity)
    if torch.is_grad_enabled() and not drops:
        fused: Tensor = LoraLinear.apply(x, a, b, scaling, base, layer.frozen_weights)  # type: ignore[no-untyped-call]
        return fused
    update = F.linear(F.linear(dropout(x), a.to(x.dtype)), (b * scaling).to(x.dtype))
    total: Tensor = base(x) + update
    return total
