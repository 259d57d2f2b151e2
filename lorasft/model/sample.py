"""A model of which only one decoder layer of each kind has weights, random ones: what is measured before any is read.

Its other layers are shallow copies that share them, so it runs like the whole model and needs the memory of a few
layers. Time and memory of a step do not depend on the values of weights.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lorasft.model.adapter import attach_adapter
from lorasft.model.attention import default_attention
from lorasft.model.base import compute_dtype, patch_linear4bit, quantize_skeleton
from lorasft.model.memory import layer_kind
from lorasft.model.recompute import decoder_layers
from lorasft.recipe import AdapterSettings, ModelSettings


@dataclass(frozen=True)
class Sample:
    """A PEFT model, and those of its decoder layers that share another's weights."""

    model: Any
    copies: tuple[nn.Module, ...]


def make_sample(config: Any, settings: ModelSettings, adapter: AdapterSettings, device: torch.device) -> Sample:
    """The sample of the model that `config` describes, as `load_base` and `attach_adapter` would make the whole."""
    dtype = compute_dtype(settings.dtype, device)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=default_attention(config))
        if settings.quantization == "nf4" or hasattr(config, "quantization_config"):
            quantize_skeleton(base, dtype)
        base.requires_grad_(False)
        model = attach_adapter(base, adapter, seed=0)
    layers = decoder_layers(base)
    first: dict[str, nn.Module] = {}
    for layer in layers:
        first.setdefault(layer_kind(layer), layer)
    twins = {id(layer): first[layer_kind(layer)] for layer in layers}
    copies = [layer for layer in layers if twins[id(layer)] is not layer]
    idle = {id(module) for layer in copies for module in layer.modules()}
    used = [*base.get_decoder().modules(), *base.get_output_embeddings().modules()]
    _fill(base, [module for module in used if id(module) not in idle], device=device)
    for layer in copies:
        vars(layer).update(vars(copy.copy(twins[id(layer)])))
    return Sample(model, tuple(copies))


@torch.no_grad()
def _fill(base: Any, modules: list[nn.Module], *, device: torch.device) -> None:
    """Give the parameters and buffers of `modules` themselves random values on `device`."""
    models = [model for model in base.modules() if isinstance(model, PreTrainedModel)]  # the innermost comes last
    owners = {id(module): model for model in models for module in model.modules()}
    made: dict[int, nn.Parameter] = {}  # tied ones once
    for module in modules:
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.ones_like(buffer, device=device))
        for name, old in list(module.named_parameters(recurse=False)):
            if id(old) not in made:
                made[id(old)] = _quantize(module, device) if _is_packed(old) else _draw(old, device)
            setattr(module, name, made[id(old)])
        if isinstance(module, bnb.nn.Linear4bit):
            patch_linear4bit(module, device, base.name_or_path)
            module.quant_state = module.weight.quant_state
        else:
            owners[id(module)]._init_weights(module)


def _draw(old: nn.Parameter, device: torch.device) -> nn.Parameter:
    values = torch.empty_like(old, device=device)
    return nn.Parameter(values.normal_(std=0.02), requires_grad=old.requires_grad)


def _is_packed(parameter: nn.Parameter) -> bool:
    return isinstance(parameter, bnb.nn.Params4bit)


def _quantize(linear: Any, device: torch.device) -> nn.Parameter:
    weight = torch.randn(linear.weight.shape, dtype=linear.compute_dtype, device=device)
    scheme = {"compress_statistics": linear.weight.compress_statistics, "quant_type": linear.weight.quant_type}
    packed: nn.Parameter = bnb.nn.Params4bit(weight.mul_(0.02), requires_grad=False, **scheme).to(device)
    return packed
