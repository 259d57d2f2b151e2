"""A model before its weights are read: with shapes alone, or with random numbers in one decoder layer of each kind."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from lorasft.model.adapter import attach_adapter
from lorasft.model.base import compute_dtype, make_skeleton, patch_linear4bit, quantize_skeleton
from lorasft.model.lean import use_lean_layers
from lorasft.model.loss import Network, read_head
from lorasft.model.mixers import call_by_segment
from lorasft.model.recompute import decoder_layers, layer_kinds
from lorasft.model.tables import keep_on_host
from lorasft.recipe import AdapterSettings, ModelSettings

_MOST_TOKENS = 8192  # of a sample: embedding and head are large, and the time of a head grows with them


def make_weightless(
    config: Any, settings: ModelSettings, adapter: AdapterSettings, device: torch.device, *, depth: int | None = None
) -> Any:
    """The PEFT model that `load_base` and `attach_adapter` would make for `device`, on the meta device; its first
    `depth` layers only."""
    base = make_skeleton_4bit(config, settings, device, depth=depth)
    with torch.device("meta"):
        return attach_adapter(base, adapter, seed=0, new_rows=dict.fromkeys(range(len(settings.new_tokens))))


def make_skeleton_4bit(config: Any, settings: ModelSettings, device: torch.device, *, depth: int | None = None) -> Any:
    """The model that `load_base` would make for `device`, on the meta device."""
    dtype = compute_dtype(settings.dtype, device)
    base = make_skeleton(config, dtype)
    if depth:
        del decoder_layers(base)[depth:]
    if settings.quantization == "nf4" or hasattr(config, "quantization_config"):
        quantize_skeleton(base, dtype)
    for linear in base.modules():
        if isinstance(linear, bnb.nn.Linear4bit):
            linear.weight.data = linear.weight.data.to(linear.compute_dtype)
            linear.weight._quantize("meta")
    keep_on_host(base, device)
    base.requires_grad_(False)
    return base


def plan_network(network: Network, model: Any) -> Network:
    """`network`, as it was verified, with the `model` without numbers in place of its own."""
    base = model.get_base_model()
    base.set_attn_implementation(network.causal.config._attn_implementation)
    base.frozen_weights.on_cpu = network.runs_on.type == "cpu"
    base.frozen_weights.whole = network.causal.frozen_weights.whole
    head = read_head(base, network.runs_on) if network.head else None
    call_by_segment(base, network.mixer)
    if network.lean:
        use_lean_layers(base)
    return replace(network, causal=base, head=head, planned=network.runs_on)


def make_sample(
    whole: Any, config: Any, settings: ModelSettings, adapter: AdapterSettings, device: torch.device
) -> Any:
    """The first layers of the PEFT model `whole`, which is on the meta device and was made with the same arguments, and
    all around the layers, with random numbers on `device`: time does not depend on the values.

    The first layer of each kind computes, the others hand on what they are given; most of the vocabulary is left out.
    """
    kinds = layer_kinds(whole.get_base_model())
    depth = 1 + max(map(kinds.index, kinds), default=-1)
    small = copy.deepcopy(config)
    for part in (small, small.get_text_config()):
        for name in ("vocab_size", "vocab_size_per_layer_input"):
            if getattr(part, name, None):
                setattr(part, name, min(_MOST_TOKENS, getattr(part, name)))
        part.pad_token_id = 0  # an embedding refuses one beyond its end, and Gemma 4 to have none
    model = make_weightless(small, settings, adapter, device, depth=depth)
    base = model.get_base_model()
    layers = decoder_layers(base)
    hand_on = {"forward": lambda _, hidden, *__, **___: hidden}
    for index, kind in enumerate(kinds[:depth]):
        if (first := kinds.index(kind)) < index:
            layers[index] = copy.copy(layers[first])
            layers[index].__class__ = type("Skipped", (type(layers[first]),), hand_on)
    fill(base.named_modules(), device, lambda _, old: _draw_like(old, device))
    base.initialize_weights()
    patch_linear4bit(base, device)
    return model


@torch.no_grad()
def fill(modules: Iterable[tuple[str, nn.Module]], device: torch.device, draw: Callable[[str, Tensor], Tensor]) -> None:
    """Give the parameters of `modules` themselves, which come with their paths, the values that `draw` gives for the
    name of each; constants of 4-bit weights random ones, and buffers ones."""
    made: dict[int, nn.Parameter] = {}  # tied ones once
    for path, module in [*modules]:
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.ones_like(buffer, device=device))
        state = getattr(module, "quant_state", None)
        while state:
            tensors = {name: one for name, one in vars(state).items() if isinstance(one, Tensor)}
            vars(state).update({name: _draw_like(one, device) for name, one in tensors.items()})
            state = state.state2
        for name, old in [one for one in module.named_parameters(recurse=False) if one[1].is_meta]:
            if id(old) not in made:
                made[id(old)] = new = Tensor._make_subclass(type(old), draw(f"{path}.{name}", old), old.requires_grad)
                vars(new).update(vars(old), _is_hf_initialized=not old.is_floating_point())
            setattr(module, name, made[id(old)])
        if isinstance(module, (nn.Linear, nn.Embedding)):  # else `initialize_weights` draws anew, and into 4-bit codes
            module.weight._is_hf_initialized = True  # type: ignore[attr-defined]


def _draw_like(given: Tensor, device: torch.device) -> Tensor:
    """Random numbers in the shape of `given`: a prime number of them, repeated, which is faster than to draw all."""
    few = torch.empty(65_521, dtype=given.dtype, device=device)
    few = few.uniform_(-0.1, 0.1) if few.is_floating_point() else few.random_()
    return few.repeat(-(-given.numel() // len(few)))[: given.numel()].view(given.shape)
