"""The NF4 + LoRA linear: base(x) + scaling * B A x, without an fp32 copy of x.

PEFT casts every input to the adapter's fp32. Here the small A and B are cast to the dtype of x instead; they
stay fp32 masters, and their gradients arrive in fp32 through the cast. So do modules that are trained in full.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.func import functional_call


def use_lean_linears(model: nn.Module) -> int:
    """Give every plain LoRA layer of `model` the lean forward. Returns how many there are.

    Layers with a variant (DoRA), a bias in B or several adapters keep PEFT's own forward.
    """
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            wrapper.forward = MethodType(_forward_saved, wrapper)
    plain = [layer for layer in model.modules() if isinstance(layer, LoraLayer) and _is_plain(layer)]
    for layer in plain:
        layer.forward = MethodType(_forward, layer)
    return len(plain)


def _is_plain(layer: Any) -> bool:
    return (
        not isinstance(layer, ParamWrapper)
        and len(layer.lora_A) == 1
        and not layer.lora_variant
        and not any(layer.lora_bias.values())
        and not isinstance(layer.get_base_layer(), nn.Embedding)
    )


def _forward_saved(wrapper: Any, *args: Any, **kwargs: Any) -> Any:
    """A module trained in full, computed in the dtype of the one that it stands for."""
    original = wrapper.original_module
    if wrapper.disable_adapters:
        return original(*args, **kwargs)
    ((_, copy),) = wrapper.modules_to_save.items()
    dtypes = {name: parameter.dtype for name, parameter in original.named_parameters()}
    cast = {name: parameter.to(dtypes[name]) for name, parameter in copy.named_parameters()}
    return functional_call(copy, cast, args, kwargs)


def _forward(layer: Any, x: Tensor) -> Tensor:
    """x: (..., in) -> (..., out) in the dtype of x."""
    result: Tensor = layer.base_layer(x)
    if layer.disable_adapters:
        return result
    (name,) = layer.lora_A
    down = F.linear(layer.lora_dropout[name](x), layer.lora_A[name].weight.to(x.dtype))
    update = F.linear(down, layer.lora_B[name].weight.to(x.dtype)) * layer.scaling[name]
    total: Tensor = result + update
    return total
