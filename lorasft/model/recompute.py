"""The decoder layers of a model, and which recompute their activations going backwards: the first ones.

Going backwards the last layers come first, and what they keep is freed before an early layer computes its own again.
Were they recomputed instead, each would do so while all that the first ones keep is held: one layer more at the peak.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


def decoder_layers(causal: Any) -> nn.ModuleList:
    """The list of the layers of `causal` that can recompute their activations; an empty one where it has none."""
    if not causal.supports_gradient_checkpointing:
        return nn.ModuleList()
    lists = [module for module in causal.get_decoder().modules() if isinstance(module, nn.ModuleList)]
    fitting = [one for one in lists if all(isinstance(layer, GradientCheckpointingLayer) for layer in one)]
    return max(fitting, key=len, default=nn.ModuleList())  # beside it a model may have layers that see images


def recomputed_layers(causal: Any) -> int:
    """How many layers of `causal` recompute their activations."""
    return sum(bool(layer.gradient_checkpointing) for layer in decoder_layers(causal))


def recompute(causal: Any, count: int) -> None:
    """Let exactly the first `count` decoder layers recompute their activations; 0: none. By the layers' own attributes:
    the model's method has two names, and gives the embeddings gradients without a use."""
    row = partial(patch.object, causal, "row", create=True)  # may be another when the backward pass comes to a layer
    run = partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), row(getattr(causal, "row", ()))))
    for index, layer in enumerate(decoder_layers(causal)):
        layer.gradient_checkpointing = index < count  # type: ignore[assignment]
        layer._gradient_checkpointing_func = run  # type: ignore[assignment]


def only_first(causal: Any, depth: int) -> AbstractContextManager[Any]:
    """Let `causal` have no more than its first `depth` decoder layers."""
    layers = decoder_layers(causal)
    return patch.object(layers, "_modules", dict(list(layers._modules.items())[:depth]))


def layer_kinds(causal: Any) -> list[str]:
    """What decides the time and memory of each layer of the list: its modules, their shapes and plain settings."""
    kinds = []
    for layer in decoder_layers(causal):
        parts = []
        for name, module in layer.named_modules():
            settings = {key: value for key, value in vars(module).items() if isinstance(value, (int, float, str))}
            for passing in ("layer_idx", "training", "gradient_checkpointing"):
                settings.pop(passing, None)
            shapes = [(tuple(one.shape), one.requires_grad) for one in module.parameters(recurse=False)]
            parts.append(f"{name} {type(module).__name__} {settings} {shapes}")
        kinds.append("\n".join(parts))
    return kinds


def layer_period(causal: Any) -> int:
    """After how many layers of the list their kinds come again, to its end; 0 where they do not."""
    kinds = layer_kinds(causal)
    return next((size for size in range(1, len(kinds)) if kinds[size:] == kinds[:-size]), 0)
