"""Experts in 4 bit: the stacks of matrices that transformers fuses them into, which bitsandbytes leaves in 16 bits.

A stack (experts, out, in) is quantized expert by expert while it is read: each matrix has the bits that bitsandbytes
gives it alone. Codes take its place, with constants beside them. transformers sends the experts of nearly every family
through one interface, and one function there computes all that are packed. No matrix is kept for the backward pass: it
is dequantized where it is needed, forwards and backwards, into memory that is used again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from bitsandbytes import functional
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist
from transformers.integrations import moe
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from lorasft.model.linear import FrozenWeights
from lorasft.model.packed import NF4

_FUNCTION = "lorasft_nf4"  # its name in transformers' interface
_STACKS = ("gate_up_proj", "up_proj", "down_proj")
BLOCK, _GROUP = NF4["blocksize"], 256  # numbers that share a scale; scales that share one of their own
PARTS = ("", "_absmax", "_nested_absmax", "_nested_table", "_offset")  # of a stack: its parameters' names end so
# bitsandbytes keeps the tables of its first call for all others: they are to have numbers in them.
functional.quantize_4bit(torch.zeros(BLOCK), **NF4)


def find_experts(model: nn.Module) -> list[tuple[Any, dict[str, Tensor]]]:
    """The modules of experts behind transformers' interface, each with its stacks by name, if all can be packed.
    Not where an expert ends in a norm (Muse Spark), which is not computed here, or a scale would be of two experts."""
    modules: list[Any] = [module for module in model.modules() if hasattr(module, "is_concatenated")]
    found = [(one, {name: getattr(one, name) for name in _STACKS if hasattr(one, name)}) for one in modules]
    odd = any(stack[0].numel() % BLOCK for _, stacks in found for stack in stacks.values())
    return [] if odd or any(getattr(one, "has_post_expert_norm", False) for one in modules) else found


def packed_parts(module: nn.Module) -> dict[str, list[Tensor]]:
    """Of each packed stack of `module` the codes (experts, out, in / 2), two in a byte, and the constants."""
    return {name: [getattr(module, name + end) for end in PARTS] for name in getattr(module, "packed", ())}


class Nf4Quantizer(Bnb4BitHfQuantizer):  # type: ignore[misc]
    """transformers' own for linears, which quantizes stacks of experts as well."""

    def get_modules_to_not_convert(self, model: Any, *args: Any, **kwargs: Any) -> list[str]:
        """Also linears beside the decoder, and with rows shorter than a block (Gemma 3n's mixing of four streams)."""
        linears = {path: one for path, one in model.named_modules() if isinstance(one, nn.Linear)}
        inside = set(model.get_decoder().modules())
        kept = [path for path, one in linears.items() if one not in inside or one.in_features < BLOCK]
        return [*super().get_modules_to_not_convert(model, *args, **kwargs), *kept]

    def _process_model_before_weight_loading(self, model: Any, *args: Any, **kwargs: Any) -> None:
        super()._process_model_before_weight_loading(model, *args, **kwargs)
        self.experts, model.frozen_weights = find_experts(model), FrozenWeights()
        for module, stacks in self.experts:
            module.packed, module.weights = tuple(stacks), model.frozen_weights
            module.config._experts_implementation = _FUNCTION
            for name, stack in stacks.items():
                for end, part in quantize_stack([stack[0].T if module.is_transposed else stack[0]]).items():
                    if end or self.pre_quantized:  # else what is read has the shape of the stack
                        empty = part.new_empty(len(stack), *part.shape[1:])
                        setattr(module, name + end, nn.Parameter(empty, requires_grad=False))

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter is a stack, or the weight of a 4-bit linear."""
        module, name = get_module_from_name(model, param_name)
        return name in getattr(module, "packed", ()) or super().param_needs_quantization(model, param_name, **kwargs)

    def get_quantize_ops(self) -> ConversionOps:
        """What quantizes it."""
        return _Quantize(self)

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        """Where files have the experts' linears, these come to `_Quantize` as they are: no stack is there twice."""
        found: list[Any] = super().update_weight_conversions(weight_conversions, *model)
        for rule in found if self.experts and not self.pre_quantized else ():
            steps = [type(step) for step in getattr(rule, "operations", ())]
            merging = steps in ([MergeModulelist], [MergeModulelist, Concatenate])
            if merging and rule.target_patterns[0].endswith(_STACKS):
                rule.operations = []
        return found


class _Quantize(Bnb4bitQuantize):  # type: ignore[misc]
    def convert(self, input_dict: Any, full_layer_name: str = "", model: Any = None, **others: Any) -> Any:
        """The weight of a linear, or a stack, or lists of the matrices to join to one -> parameters by name."""
        if not full_layer_name.endswith(_STACKS):
            return super().convert(input_dict, full_layer_name, model, **others)
        transposed = get_module_from_name(model, full_layer_name)[0].is_transposed
        given = [input_dict[one] for one in others["source_patterns"] if one in input_dict] or input_dict.values()
        stacks = [one[0] if one[0].dim() == 3 else one for one in given]
        matrices = (torch.cat(parts) for parts in zip(*stacks, strict=True))
        parts = quantize_stack(one.T if transposed else one for one in matrices)
        return {full_layer_name + end: part for end, part in parts.items()}


def quantize_stack(matrices: Iterable[Tensor]) -> dict[str, Tensor]:
    """Matrices (out, in), one of each expert -> the parts of their stack."""
    experts = []
    for matrix in matrices:
        codes, state = functional.quantize_4bit(matrix.contiguous(), **NF4)
        nested, table = state.state2.absmax, state.state2.code
        absmax = F.pad(state.absmax, (0, len(nested) * _GROUP - len(state.absmax)))  # whole groups: all are one row
        experts.append((codes.view(len(matrix), -1), absmax, nested, table, state.offset))
    return {end: torch.stack(parts) for end, parts in zip(PARTS, zip(*experts, strict=True), strict=True)}


def _dequantize(module: Any, name: str, experts: slice, dtype: torch.dtype) -> Tensor:
    """The matrices of some experts: (experts, out, in), valid until the next reading."""
    codes, absmax, nested, tables, offset = (part[experts] for part in packed_parts(module)[name])
    count, out, half = codes.shape
    groups = functional.QuantState(nested.flatten(), None, tables[0], _GROUP, dtype=torch.float32)
    scales = functional.dequantize_blockwise(absmax.flatten(), groups).view(count, -1)
    scales = (scales[:, : 2 * out * half // BLOCK] + offset.unsqueeze(1)).flatten()
    state = functional.QuantState(scales, torch.Size([count * out, 2 * half]), None, BLOCK, "nf4", dtype)
    numbers: Tensor = module.weights.dequantize(codes.reshape(-1, 1), state)
    return numbers.view(count, out, 2 * half)


def _multiply(module: Any, name: str, rows: Tensor, experts: Tensor, *, back: bool = False) -> Tensor:
    """rows (pairs, in) of the sorted `experts` (pairs,) -> (pairs, out), biases added; `back`: gradients the other way.

    By all matrices at once where `module.weights.whole` says so and there are rows enough; else by one after the other.
    """
    numbers = torch.arange(module.num_experts, device=rows.device)
    ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)
    if module.weights.whole and len(rows) >= module.num_experts:
        matrices = _dequantize(module, name, slice(None), rows.dtype)
        y: Tensor = moe._grouped_mm(rows, matrices if back else matrices.mT, offs=ends)
    else:
        _, out, half = getattr(module, name).shape
        y, start = rows.new_empty(len(rows), 2 * half if back else out), 0
        # Where there are no numbers the worst is taken: all rows are of one expert.
        for expert, end in enumerate([len(rows)] if rows.is_meta else ends.tolist()):
            if start < end:
                (matrix,) = _dequantize(module, name, slice(expert, expert + 1), rows.dtype)
                torch.mm(rows[start:end], matrix if back else matrix.T, out=y[start:end])
                del matrix  # before the next one comes
            start = end
    return y.add_(getattr(module, f"{name}_bias")[experts]) if module.has_bias and not back else y


class PackedExperts(torch.autograd.Function):
    """x (tokens, hidden), weights (tokens, k) of the experts (tokens, k) of each token -> (tokens, hidden)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, index: Tensor, module: Any) -> Tensor:
        experts, order = torch.sort(index.flatten(), stable=True)
        first, second = module.packed
        up = _multiply(module, first, x[order // index.shape[1]], experts)
        ctx.module, ctx.activate = module, module._apply_gate if module.has_gate else module.act_fn
        y = _multiply(module, second, ctx.activate(up), experts) * weights.flatten()[order].unsqueeze(1)
        ctx.save_for_backward(up, weights, experts, order)
        return y[order.argsort()].view(*index.shape, -1).sum(1).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        module, (up, weights, experts, order) = ctx.module, ctx.saved_tensors
        (first, second), dy = module.packed, dy[order // weights.shape[1]]
        with torch.enable_grad():
            up = up.detach().requires_grad_()
            active = ctx.activate(up)
        slope = _multiply(module, second, dy, experts, back=True)  # before the weights
        d_weights = (slope * active).sum(1, dtype=weights.dtype)
        if module.has_bias:
            d_weights += (dy * getattr(module, f"{second}_bias")[experts]).sum(1)
        slope = (slope * weights.flatten()[order].unsqueeze(1)).to(active.dtype)
        (d_up,) = torch.autograd.grad(active, up, slope)
        dx, back = _multiply(module, first, d_up, experts, back=True), order.argsort()
        return dx[back].view(*weights.shape, -1).sum(1), d_weights[back].view_as(weights), None, None


def compute_experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers calls: hidden_states (tokens, hidden), the other two (tokens, k) -> (tokens, hidden)."""
    # The number after the last expert's marks what does not count.
    weights = top_k_weights.masked_fill(top_k_index >= module.num_experts, 0)
    index = top_k_index.clamp(max=module.num_experts - 1)
    return PackedExperts.apply(hidden_states, weights, index, module)  # type: ignore[no-any-return, no-untyped-call]


moe.ALL_EXPERTS_FUNCTIONS.register(_FUNCTION, compute_experts)
