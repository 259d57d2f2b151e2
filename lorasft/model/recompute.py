"""The decoder layers of a model, and which recompute their activations going backwards: the first ones.

Going backwards the last layers come first, and what they keep is freed before an early layer computes its own again.
Were they recomputed instead, each would do so while all that the first ones keep is held: one layer more at the peak.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def decoder_layers(causal: Any) -> list[nn.Module]:
    """The layers of `causal` that can recompute their activations, first to last; none where the model cannot."""
    if not causal.supports_gradient_checkpointing:
        return []
    decoder = causal.get_decoder()  # beside it a model may have layers that see images
    layers = {
        name: module for name, module in decoder.named_modules() if isinstance(module, GradientCheckpointingLayer)
    }
    return [module for name, module in layers.items() if not any(name.startswith(f"{outer}.") for outer in layers)]


def recomputed_layers(causal: Any) -> int:
    """How many layers of `causal` recompute their activations."""
    return sum(bool(layer.gradient_checkpointing) for layer in decoder_layers(causal))


def recompute(causal: Any, count: int) -> None:
    """Let exactly the first `count` decoder layers recompute their activations; 0: none."""
    if count == 0:
        causal.activation_checkpointing_disable()
    else:
        causal.activation_checkpointing_enable({"use_reentrant": False})
    # Only reentrant checkpoints need inputs with gradients, for which the first layer would do work without a use.
    causal.disable_input_require_grads()
    for index, layer in enumerate(decoder_layers(causal)):
        layer.gradient_checkpointing = index < count  # type: ignore[assignment]


def layer_kinds(causal: Any) -> list[str]:
    """What decides the time and memory of each decoder layer: its modules, their shapes and plain settings."""
    return [_kind(layer) for layer in decoder_layers(causal)]


def _kind(layer: nn.Module) -> str:
    parts = []
    for name, module in layer.named_modules():
        plain = {key: value for key, value in vars(module).items() if isinstance(value, (int, float, str))}
        settings = {key: value for key, value in plain.items() if key not in ("layer_idx", "gradient_checkpointing")}
        shapes = [(tuple(parameter.shape), parameter.requires_grad) for parameter in module.parameters(recurse=False)]
        parts.append(f"{name} {type(module).__name__} {settings} {shapes}")
    return "\n".join(parts)


def layer_list(causal: Any) -> nn.ModuleList:
    """The list in which `causal` has its decoder layers; an empty one where it has none that can recompute."""
    layers = decoder_layers(causal)
    lists = (module for module in causal.modules() if isinstance(module, nn.ModuleList))
    return next((module for module in lists if list(module) == layers), nn.ModuleList())
