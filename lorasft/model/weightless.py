"""A model before its weights are read: with shapes alone, or with random numbers in one decoder layer of each kind."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lorasft.model.adapter import attach_adapter
from lorasft.model.attention import default_attention
from lorasft.model.base import compute_dtype, patch_linear4bit, quantize_skeleton
from lorasft.model.loss import Network, read_head
from lorasft.model.recompute import decoder_layers, layer_kinds, layer_list
from lorasft.recipe import AdapterSettings, ModelSettings


def make_weightless(
    config: Any, settings: ModelSettings, adapter: AdapterSettings, device: torch.device, *, depth: int | None = None
) -> Any:
    """The PEFT model that `load_base` and `attach_adapter` would make for `device`, on the meta device.

    `depth`: only its first layers.
    """
    dtype = compute_dtype(settings.dtype, device)
    config = copy.deepcopy(config)  # transformers notes the attention in it
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=default_attention(config))
        if depth:
            del layer_list(base)[depth:]
        if settings.quantization == "nf4" or hasattr(config, "quantization_config"):
            quantize_skeleton(base, dtype)
    _quantize_nothing()
    for linear in base.modules():
        if isinstance(linear, bnb.nn.Linear4bit):
            _quantize(linear, torch.empty(linear.out_features, linear.in_features, dtype=dtype, device="meta"))
    base.requires_grad_(False)
    with torch.device("meta"):
        return attach_adapter(base, adapter, seed=0)


def plan_network(network: Network, model: Any) -> Network:
    """`network`, as it was verified, with the `model` without numbers in place of its own."""
    base = model.get_base_model()
    base.set_attn_implementation(network.causal.config._attn_implementation)
    head = read_head(base, network.runs_on) if network.head else None
    return replace(network, causal=base, head=head, planned=network.runs_on, varlen=False)


def _shrink_vocabulary(config: Any, most: int = 8192) -> Any:
    """`config` with at most so many tokens: embedding and head are large, and the time of a head grows with them."""
    config = copy.deepcopy(config)
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for name in ("vocab_size", "vocab_size_per_layer_input"):
            if getattr(part, name, None):
                setattr(part, name, min(most, getattr(part, name)))
        part.pad_token_id = None  # an embedding refuses one beyond its end
    return config


class Sample:
    """A model without weights in which one decoder layer of each kind, and all around the layers, get random numbers.

    The other layers hand on what they are given, and those after are left out, as is most of the vocabulary. Time does
    not depend on the values.
    """

    def __init__(
        self, whole: Any, config: Any, settings: ModelSettings, adapter: AdapterSettings, device: torch.device
    ) -> None:
        """A sample of the model `whole` without weights, which was made with the same arguments."""
        self.kinds = layer_kinds(whole.get_base_model())  # of all its layers
        depth = 1 + max(map(self.kinds.index, self.kinds), default=-1)
        self.model = make_weightless(_shrink_vocabulary(config), settings, adapter, device, depth=depth)
        self.layers = decoder_layers(self.model.get_base_model())
        self.live = {kind: self.layers[self.kinds.index(kind)] for kind in self.kinds}  # the first of each kind
        self._output: Any = None  # of the layer that ran last
        base, live = self.model.get_base_model(), list(self.live.values())
        idle = {id(module) for layer in self.layers if layer not in live for module in layer.modules()}
        used = [*base.get_decoder().modules(), *base.get_output_embeddings().modules()]
        _fill(base, [module for module in used if id(module) not in idle], device=device)
        for layer in live:
            layer.register_forward_hook(self._remember)
        self.run_only(*self.live)

    def run_only(self, *kinds: str) -> None:
        """Let the first layers of `kinds` compute, and the others hand on what they are given."""
        for layer in self.layers:
            vars(layer).pop("forward", None)
            if layer not in [self.live[kind] for kind in kinds]:
                layer.forward = self._hand_on

    def _remember(self, layer: nn.Module, given: Any, output: Any) -> None:
        self._output = output if isinstance(output, Tensor) else output[1:]

    def _hand_on(self, hidden: Tensor, *_: Any, **__: Any) -> Any:
        return hidden if isinstance(self._output, Tensor) else (hidden, *self._output)


@torch.no_grad()
def _fill(base: Any, modules: list[nn.Module], *, device: torch.device) -> None:
    """Give the parameters and buffers of `modules` themselves random values on `device`."""
    models = [model for model in base.modules() if isinstance(model, PreTrainedModel)]  # the innermost comes last
    owners = {id(module): model for model in models for module in model.modules()}
    made: dict[int, nn.Parameter] = {}  # tied ones once
    for module in modules:
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.ones_like(buffer, device=device))
        if isinstance(module, bnb.nn.Linear4bit):
            weight = torch.empty(module.out_features, module.in_features, dtype=module.compute_dtype, device="meta")
            _quantize(module, _draw_like(weight, device))
            patch_linear4bit(module, device, base.name_or_path)
            continue
        for name, old in list(module.named_parameters(recurse=False)):
            if id(old) not in made:
                made[id(old)] = nn.Parameter(_draw_like(old, device), requires_grad=old.requires_grad)
            setattr(module, name, made[id(old)])
        owners[id(module)]._init_weights(module)


def _draw_like(given: Tensor, device: torch.device) -> Tensor:
    """Random numbers in the shape of `given`: a prime number of them, repeated, which is faster than to draw all."""
    few = torch.empty(65_521, dtype=given.dtype, device=device).uniform_(-0.03, 0.03)
    return few.repeat(-(-given.numel() // len(few)))[: given.numel()].view(given.shape)


@cache
def _quantize_nothing() -> None:
    """Let bitsandbytes make its tables with numbers in them: it keeps those of its first call for all others."""
    bnb.functional.quantize_4bit(torch.zeros(64), compress_statistics=True, quant_type="nf4")


def _quantize(linear: Any, weight: Tensor) -> None:
    """Give `linear` its `weight` in 4 bit; on the meta device its shapes."""
    scheme = {"compress_statistics": linear.weight.compress_statistics, "quant_type": linear.weight.quant_type}
    packed, linear.quant_state = bnb.functional.quantize_4bit(weight, **scheme)
    linear.weight = bnb.nn.Params4bit(
        packed, requires_grad=False, quant_state=linear.quant_state, bnb_quantized=True, **scheme
    )
