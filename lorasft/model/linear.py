"""NF4 + LoRA linears that are given the same input, in one function: each y = x W^T (+ bias) + s (x A^T) B^T.

PEFT casts every input to the adapter's fp32 and keeps that copy. Here the small A and B are cast to the dtype of x
instead, once a step where `Trained` made copies; they stay fp32 masters, and their gradients arrive in fp32. Kept for
the backward pass are x A^T, which is `rank` wide, and x, once, or what it can be made again from. W is frozen: it is
dequantized where it is needed, forwards and backwards, into memory that the next layer uses again. Modules that are
trained in full are cast in the same way.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
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
    weights, inputs = FrozenWeights(), Inputs()
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.forward = MethodType(_forward_saved, module)
        elif isinstance(module, LoraLayer) and _is_plain(module):
            module.frozen_weights, module.inputs = weights, inputs
            module.followers = getattr(module, "followers", [])
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
        if not packed.is_cuda and size * state.dtype.itemsize <= _MALLOC_KEEPS:
            return bnb.functional.dequantize_4bit(packed, state).to(dtype)  # type: ignore[no-any-return]
        if len(self._buffer) < size:
            self._buffer = torch.empty(size, dtype=state.dtype, device=packed.device)
        out = self._buffer[:size].view(state.shape)
        if packed.is_cuda:
            bnb.functional.dequantize_4bit(packed, state, out=out)
        elif not packed.is_meta:
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


class Inputs:
    """Which LoRA linears are given the same tensor one after the other, as queries, keys and values.

    What is seen in one pass is relied on in the next: the first of them computes for all, and they take their part.
    One that does not ask for its part is left alone from then on, until it follows again.
    """

    def __init__(self) -> None:
        self._last: tuple[Any, int] = (None, 0)  # the input, weakly, and its version
        self._first: Any = None  # the layer that was given it first
        self._ready: dict[Any, Tensor] = {}  # outputs for it that were not asked for yet

    def compute(self, layer: Any, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out) of `layer`, in the dtype of x."""
        given, version = self._last
        if given is None or given() is not x or version != x._version:
            for one in self._ready:
                self._first.followers.remove(one)
            self._last, self._first, self._ready = (weakref.ref(x), x._version), layer, {}
            if layer.followers and _is_fused(layer):
                layers = [layer, *filter(_is_fused, layer.followers)]
                self._ready = dict(zip(layers, _apply(layers, x), strict=True))
        elif layer is not self._first and layer not in self._first.followers:
            self._first.followers.append(layer)
        if layer in self._ready:
            return self._ready.pop(layer)
        return _apply([layer], x)[0] if _is_fused(layer) else _compute_plainly(layer, x)


class LoraLinears(torch.autograd.Function):
    """x (..., in), layers, their A (rank, in), their B (out, rank) -> of each (..., out) in the dtype of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: Sequence[Any], *adapter: Tensor) -> tuple[Tensor, ...]:
        flat = x.reshape(-1, x.shape[-1])  # (tokens, in)
        stacked = _join(adapter[: len(layers)], x.dtype).view(-1, x.shape[-1])  # (ranks, in)
        down = flat @ stacked.t()  # (tokens, ranks)
        outputs = []
        for layer, b, part in _parts(layers, down):
            weight, bias = layer.frozen_weights.read(layer.base_layer, x.dtype).t(), layer.base_layer.bias
            y = x.new_empty(*x.shape[:-1], weight.shape[1])  # no view of another tensor: Gemma 3n changes it in place
            rows = y.view(-1, weight.shape[1])
            if bias is None:
                torch.mm(flat, weight, out=rows)
            else:
                torch.addmm(bias.to(x.dtype), flat, weight, out=rows)
            outputs.append(y)
            rows.addmm_(part, b.t(), alpha=_scaling(layer))
        ctx.make, parts = _made_by(x)
        ctx.save_for_backward(down, *parts)
        ctx.layers, ctx.shape = layers, x.shape
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        down, *parts = ctx.saved_tensors
        layers, a = ctx.layers, [_adapter(layer)[0] for layer in ctx.layers]
        b = [_adapter(layer)[1] for layer in layers]
        d_down, db = torch.empty_like(down), down.new_empty(sum(one.numel() for one in b))
        dx: Tensor | None = None
        rest = zip(
            upstream,
            torch.split(d_down, [len(one) for one in a], 1),
            torch.split(db, [one.numel() for one in b]),
            strict=True,
        )
        for (layer, up, part), (dy, d_part, db_part) in zip(_parts(layers, down), rest, strict=True):
            if dy is None:
                d_part.zero_(), db_part.zero_()
                continue
            dy = dy.reshape(-1, dy.shape[-1])
            d_part.addmm_(dy, up, beta=0, alpha=_scaling(layer))
            db_part.view_as(up).addmm_(dy.t(), part, beta=0, alpha=_scaling(layer))
            if ctx.needs_input_grad[0]:
                weight = layer.frozen_weights.read(layer.base_layer, down.dtype)
                dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
        if dx is not None:
            dx = dx.addmm_(d_down, _join(a, down.dtype).view(-1, ctx.shape[-1])).view(ctx.shape)
        da = d_down.t() @ ctx.make(*parts).reshape(-1, ctx.shape[-1])
        return dx, None, *_add_gradient(a, da.view(-1)), *_add_gradient(b, db)


def _apply(layers: Sequence[Any], x: Tensor) -> tuple[Tensor, ...]:
    adapters = [_adapter(layer) for layer in layers]
    outputs: tuple[Tensor, ...] = LoraLinears.apply(  # type: ignore[no-untyped-call]
        x, layers, *(a for a, _ in adapters), *(b for _, b in adapters)
    )
    return outputs


def _parts(layers: Sequence[Any], down: Tensor) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """Each layer, its B and its columns of `down` (tokens, ranks)."""
    ups = [_cast(_adapter(layer)[1], down.dtype) for layer in layers]
    return zip(layers, ups, torch.split(down, [up.shape[1] for up in ups], 1), strict=True)


def _adapter(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """A (rank, in) and B (out, rank), fp32."""
    ((name, a),) = layer.lora_A.items()
    return a.weight, layer.lora_B[name].weight


def _scaling(layer: Any) -> float:
    (scaling,) = layer.scaling.values()
    return float(scaling)


def _cast(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """`parameter` in `dtype`: the copy that `Trained` made of it, if it did."""
    copy: Tensor | None = getattr(parameter, "copy", None)
    return copy if copy is not None and copy.dtype == dtype else parameter.detach().to(dtype)


def _join(parameters: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """All numbers of `parameters` in `dtype` and one dimension."""
    copies = [_cast(one, dtype) for one in parameters]
    row = _as_row(copies)
    return torch.cat([one.flatten() for one in copies]) if row is None else row


def _as_row(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """`tensors` as one of one dimension, if they lie one after the other in one memory."""
    first, size = tensors[0], 0
    for one in tensors:
        if first is None or one is None or not one.is_contiguous():
            return None
        same = one.untyped_storage()._cdata == first.untyped_storage()._cdata
        if not same or one.storage_offset() != first.storage_offset() + size:
            return None
        size += one.numel()
    return first.as_strided((size,), (1,)) if first is not None else None


def _add_gradient(parameters: Sequence[Tensor], gradient: Tensor) -> list[Tensor | None]:
    """Add `gradient`, of all `parameters`, to theirs, if these lie in a row too; else what autograd is to add."""
    row = _as_row([one.grad for one in parameters])
    if row is not None:
        row.add_(gradient)
        return [None] * len(parameters)
    parts = torch.split(gradient, [one.numel() for one in parameters])
    return [part.view_as(one).to(one.dtype) for one, part in zip(parameters, parts, strict=True)]


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


def _is_fused(layer: Any) -> bool:
    """Whether `layer` is computed by `LoraLinears`: where gradients are wanted and nothing is disabled or drops out."""
    (dropout,) = layer.lora_dropout.values()
    drops = layer.training and not isinstance(dropout, nn.Identity)
    return torch.is_grad_enabled() and not drops and not layer.disable_adapters


def _compute_plainly(layer: Any, x: Tensor) -> Tensor:
    """x: (..., in) -> (..., out)."""
    y: Tensor = layer.base_layer(x)
    if layer.disable_adapters:
        return y
    (a, b), (dropout,) = _adapter(layer), layer.lora_dropout.values()
    return y + F.linear(F.linear(dropout(x), a.to(x.dtype)), (b * _scaling(layer)).to(x.dtype))


def _forward(layer: Any, x: Tensor) -> Tensor:
    y: Tensor = layer.inputs.compute(layer, x)
    return y
