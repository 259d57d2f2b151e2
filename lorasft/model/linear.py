"""The NF4 + LoRA linear: base(x) + scaling * B A x, without an fp32 copy of x.

PEFT casts every input to the adapter's fp32. Here the small A and B are cast to the dtype of x instead; they
stay fp32 masters, and their gradients arrive in fp32 through the cast.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn


def use_lean_linears(model: nn.Module) -> int:
    """Give every plain LoRA layer of `model` the lean forward. Returns how many there are.

    Layers with a variant (DoRA), a bias in B or several adapters keep PEFT's own forward.
    """
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
