"""NF4 + LoRA linears that are given the same input, in one function: each y = x W^T (+ bias) + s (x A^T) B^T.

PEFT casts every input to the adapter's fp32 and keeps that copy. Here the small A and B are cast to the dtype of x
instead, once a step where `Trained` made copies; they stay fp32 masters, and their gradients arrive in fp32. Kept for
the backward pass are x A^T, which is `rank` wide, and x, once, or what it can be made again from. W is frozen: it is
dequantized where it is needed, forwards and backwards, into memory that the next layer uses again. Modules that are
trained in full are cast in the same way.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from types import MethodType
from typing import Any, Literal

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

# glibc returns allocations above 32 MB to the system, and each new one faults its pages in, which takes as long as
# dequantizing does ten times. Above that, weights on a CPU are dequantized by blocks into a buffer that stays.
_MALLOC_KEEPS = 32 << 20  # bytes
_BLOCK_ELEMENTS = 1 << 22


def use_lean_linears(model: Any) -> None:
    """Give every plain LoRA layer of `model` the lean forward: those with a variant (DoRA), a bias in B or several
    adapters keep PEFT's own."""
    model.frozen_weights, inputs = getattr(model, "frozen_weights", None) or FrozenWeights(), Inputs()
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.forward = MethodType(_forward_saved, module)
        elif isinstance(module, TrainableTokensWrapper) and getattr(module.original_module, "bias", None) is None:
            (ids,), weight = module.token_adapter.token_indices.values(), module.original_module.weight
            module.register_buffer("tokens", torch.tensor(ids, dtype=torch.long).to(weight.device), persistent=False)
            module.forward = MethodType(_forward_rows, module)
        elif (
            isinstance(module, LoraLayer)
            and not isinstance(module, ParamWrapper)
            and not module.lora_variant
            and not any(module.lora_bias.values())
            and type(module.get_base_layer()) in (nn.Linear, Conv1D, bnb.nn.Linear4bit)
        ):
            module.weights, module.followers = model.frozen_weights, []
            module.forward = partial(inputs.compute, module)


def copy_bytes(model: nn.Module) -> int:
    """Bytes of the 16-bit copies of all 4-bit weights that lean LoRA layers read."""
    bases = (module.base_layer for module in model.modules() if hasattr(module, "followers"))
    states = (quant_state(base) for base in bases if isinstance(base, bnb.nn.Linear4bit))
    return sum(state.shape.numel() * state.dtype.itemsize for state in states)


def quant_state(linear: Any) -> Any:
    """What bitsandbytes knows of the codes of a 4-bit linear; where they lie over several processes its constants are
    parameters, gathered as they are."""
    if not hasattr(linear, "nested_absmax"):
        return linear.weight.quant_state
    state = copy.copy(linear.quant_state)
    state.absmax, state.state2 = linear.absmax.data, copy.copy(state.state2)
    state.state2.absmax = linear.nested_absmax.data
    return state


class FrozenWeights:
    """The weights of frozen linears and experts in a compute dtype, in memory that the next reading uses again.

    What is read is used at once, in the order of one stream, so it does not matter which thread reads. Copies of 4-bit
    weights may be kept: all of them for the `run`, or a recomputed `layer`'s until its backward pass has used them.
    """

    def __init__(self) -> None:
        self.on_cpu = True  # or would be, if it had numbers: on a GPU it is torch that uses memory again
        self.whole = False  # stacks of experts are read at once, not expert by expert
        self.forget()

    def forget(self, keep: Literal["run", "layer"] | None = None) -> None:
        """Give the memory back, and from now on keep what `keep` says."""
        self.keep, self._buffer, self._kept = keep, torch.empty(0), dict[Any, Tensor]()

    def read(self, base: Any, dtype: torch.dtype, *, again: bool = False) -> Tensor:
        """The weight of `base`, (out, in) in `dtype`; valid until the next reading. `again`: going backwards too."""
        if not isinstance(base, bnb.nn.Linear4bit):
            weight: Tensor = base.weight.detach().to(dtype)
            return weight.t() if isinstance(base, Conv1D) else weight
        if base in self._kept:
            return (self._kept[base] if again or self.keep == "run" else self._kept.pop(base)).to(dtype)
        recomputing = again and torch._C._current_graph_task_id() >= 0
        if self.keep == "run" or (self.keep == "layer" and recomputing):
            self._buffer = torch.empty(0)
            self._kept[base] = self.dequantize(base.weight.data, quant_state(base)).to(dtype)
            self._buffer = torch.empty(0)  # it is the copy's
            return self._kept[base]
        return self.dequantize(base.weight.data, quant_state(base)).to(dtype)

    def dequantize(self, packed: Tensor, state: Any) -> Tensor:
        """The numbers that bitsandbytes describes by `state`, in its shape and dtype; valid until the next reading."""
        size = state.shape.numel()
        if not self.on_cpu or packed.is_cuda or size * state.dtype.itemsize <= _MALLOC_KEEPS:
            return bnb.functional.dequantize_4bit(packed, state)  # type: ignore[no-any-return]
        if len(self._buffer) < size:
            self._buffer = torch.empty(size, dtype=state.dtype, device=packed.device)
        out = self._buffer[:size].view(state.shape)
        if packed.is_meta:
            return out
        # On a CPU bitsandbytes has no way to write into given memory.
        absmax = state.absmax
        if state.nested:
            absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
        size, columns = state.blocksize, out.shape[1]  # columns are whole blocks of constants: load_base sees to it
        codes, rows = packed.view(torch.uint8).flatten(), max(1, _BLOCK_ELEMENTS // columns)
        for start in range(0, len(out), rows):
            block = out[start : start + rows]
            first, end = start * columns, start * columns + block.numel()
            kind = (state.code, size, state.quant_type, out.dtype)
            part = bnb.functional.QuantState(absmax[first // size : end // size], block.shape, *kind)
            block.copy_(bnb.functional.dequantize_4bit(codes[first // 2 : end // 2].unsqueeze(1), part))
        return out


class Inputs:
    """Which LoRA linears are given the same tensor one after the other, as queries, keys and values.

    What is seen in one pass is relied on in the next: the first of them computes for all, and they take their part.
    One that does not ask for its part is left alone from then on, until it follows again.
    """

    def __init__(self) -> None:
        self._last: tuple[Any, int] = (lambda: None, 0)  # the input, weakly, and its version
        self._first: Any = None  # the layer that was given it first
        self._ready: dict[Any, Tensor] = {}  # outputs for it that were not asked for yet

    def compute(self, layer: Any, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out) of `layer`, in the dtype of x."""
        layers = [layer]
        if self._last[0]() is not x or self._last[1] != x._version:
            for one in self._ready:
                self._first.followers.remove(one)
            self._last, self._first, self._ready = (weakref.ref(x), x._version), layer, {}
            layers += filter(_is_fused, layer.followers)
        elif layer is not self._first and layer not in self._first.followers and not x.is_meta:
            self._first.followers.append(layer)
        if layer in self._ready:
            return self._ready.pop(layer)
        if not _is_fused(layer):
            return _compute_plainly(layer, x)
        a, b, _ = zip(*map(_adapter, layers), strict=True)
        y, *others = LoraLinears.apply(x, layers, *a, *b)  # type: ignore[no-untyped-call]
        self._ready |= zip(layers[1:], others, strict=True)
        return y  # type: ignore[no-any-return]


class LoraLinears(torch.autograd.Function):
    """x (..., in), layers, their A (rank, in), their B (out, rank) -> of each (..., out) in the dtype of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: Sequence[Any], *adapter: Tensor) -> tuple[Tensor, ...]:
        flat, outputs = x.reshape(-1, x.shape[-1]), []  # (tokens, in)
        down = flat @ _stack(adapter[: len(layers)], x.dtype).t()  # (tokens, ranks)
        for layer, part in zip(layers, _split(down, layers), strict=True):
            _, b, scaling = _adapter(layer)
            weight = layer.weights.read(layer.base_layer, x.dtype, again=ctx.needs_input_grad[0]).t()
            y = x.new_empty(*x.shape[:-1], weight.shape[1])  # no view of another tensor: Gemma 3n changes it in place
            rows, bias = y.view(-1, weight.shape[1]), layer.base_layer.bias
            if bias is None:
                torch.mm(flat, weight, out=rows)
            else:
                torch.addmm(bias.to(x.dtype), flat, weight, out=rows)
            rows.addmm_(part, _cast(b, x.dtype).t(), alpha=scaling)
            outputs.append(y)
        # What makes the bits of x again, a norm's or a gated product's, from what autograd keeps anyway; else x itself.
        made = getattr(x, "made_by", None) if x._version == 0 else None  # unless it was changed since
        ctx.make, parts = made or (lambda same: same, (x,))
        ctx.save_for_backward(down, *parts)
        ctx.layers, ctx.shape = layers, x.shape
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        layers, (down, *parts) = ctx.layers, ctx.saved_tensors
        a, d_down = [_adapter(layer)[0] for layer in layers], torch.empty_like(down)
        dx: Tensor | None = None
        db: list[Tensor | None] = []
        for layer, dy, part, d_part in zip(layers, upstream, _split(down, layers), _split(d_down, layers), strict=True):
            _, b, scaling = _adapter(layer)
            if dy is None:
                d_part.zero_()
                db.append(None)
                continue
            dy = dy.reshape(-1, dy.shape[-1])
            d_part.addmm_(dy, _cast(b, dy.dtype), beta=0, alpha=scaling)
            db.append(_add_gradient(b, dy.t() @ part, scaling))
            if ctx.needs_input_grad[0]:
                weight = layer.weights.read(layer.base_layer, dy.dtype)
                dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
        if dx is not None:
            dx = dx.addmm_(d_down, _stack(a, down.dtype)).view(ctx.shape)
        product = d_down.t() @ ctx.make(*parts).reshape(-1, ctx.shape[-1])  # (ranks, in)
        da = [_add_gradient(one, part.t()) for one, part in zip(a, _split(product.t(), layers), strict=True)]
        return dx, None, *da, *db


def _adapter(layer: Any) -> tuple[nn.Parameter, nn.Parameter, float]:
    """A (rank, in) and B (out, rank), fp32, and what their product is scaled by."""
    ((name, a),) = layer.lora_A.items()
    return a.weight, layer.lora_B[name].weight, layer.scaling[name]


def _split(rows: Tensor, layers: Sequence[Any]) -> Sequence[Tensor]:
    """rows (any, ranks) -> of each layer (any, rank)."""
    return torch.split(rows, [len(_adapter(layer)[0]) for layer in layers], 1)


def _cast(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """`parameter` in `dtype`: the copy that `Trained` made of it, if it did."""
    copy: Tensor | None = getattr(parameter, "copy", None)
    return copy if copy is not None and copy.dtype == dtype else parameter.detach().to(dtype)


def _stack(a: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """All A, (ranks, in) in `dtype`; a view where they lie one after the other in one memory."""
    parts = [_cast(one, dtype) for one in a]
    places = [(one.untyped_storage()._cdata, one.storage_offset()) for one in parts]
    starts = accumulate((one.numel() for one in parts[:-1]), initial=places[0][1])
    if places == [(places[0][0], start) for start in starts]:
        return parts[0].as_strided((sum(map(len, parts)), parts[0].shape[1]), (parts[0].shape[1], 1))
    return torch.cat(parts)


def _add_gradient(parameter: Tensor, gradient: Tensor, scaling: float = 1.0) -> Tensor | None:
    """Add to the gradient of `parameter`, if it has one, in place; else what autograd is to give it."""
    if parameter.grad is None:
        return gradient.to(parameter.dtype) * scaling
    parameter.grad.add_(gradient, alpha=scaling)
    return None


def _forward_saved(wrapper: Any, *args: Any, **kwargs: Any) -> Any:
    """A module trained in full, computed in the dtype of the one that it replaces."""
    original = wrapper.original_module
    if wrapper.disable_adapters:
        return original(*args, **kwargs)
    (copy,) = wrapper.modules_to_save.values()
    cast = {name: parameter.to(original.get_parameter(name).dtype) for name, parameter in copy.named_parameters()}
    return functional_call(copy, cast, args, kwargs)


def trained_rows(module: Any) -> tuple[Any, Any]:
    """The tokens (tokens,) for which an embedding or head has trained rows, and these, (tokens, hidden) in fp32; None
    where it has none, or adapters are disabled."""
    found = hasattr(module, "tokens") and not module.disable_adapters
    return (module.tokens, *module.token_adapter.trainable_tokens_delta.values()) if found else (None, None)


def _forward_rows(wrapper: Any, x: Tensor) -> Tensor:
    """An embedding or a head with trained rows: PEFT makes a copy of the whole weight, and a gradient as large."""
    base, (tokens, rows) = wrapper.original_module, trained_rows(wrapper)
    y: Tensor = base(x)
    if rows is None:
        return y
    if isinstance(base, nn.Linear):
        return y.index_copy(-1, tokens, F.linear(x, rows.to(x.dtype)))
    chosen = x.unsqueeze(-1) == tokens  # (..., tokens)
    scale = torch.as_tensor(getattr(base, "embed_scale", 1.0)).to(y)  # Gemma's
    return torch.where(chosen.any(-1, keepdim=True), chosen.to(y.dtype) @ rows.to(y.dtype) * scale, y)


def _is_fused(layer: Any) -> bool:
    """Whether `layer` is computed by `LoraLinears`: where gradients are wanted and nothing is disabled or drops out."""
    (dropout,) = layer.lora_dropout.values()
    drops = layer.training and not isinstance(dropout, nn.Identity)
    return torch.is_grad_enabled() and not drops and not layer.disable_adapters


def _compute_plainly(layer: Any, x: Tensor) -> Tensor:
    base = layer.base_layer
    if layer.weights.keep == "run":
        y = F.linear(x, layer.weights.read(base, x.dtype), None if base.bias is None else base.bias.to(x.dtype))
    else:
        y = base(x)
    if layer.disable_adapters:
        return y
    (a, b, scaling), (dropout,) = _adapter(layer), layer.lora_dropout.values()
    return y + F.linear(F.linear(dropout(x), a.to(x.dtype)), (b * scaling).to(x.dtype))
