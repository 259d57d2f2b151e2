"""One base over several processes: each holds a part of what is frozen and large, by torch's `fully_shard` (FSDP2).

What is in 4 bit lies there as plain codes and constants, beside embedding and head. They are gathered for a layer when
it computes, forwards and backwards, and let go of after; nothing of them trains, so nothing is ever reduced. Norms and
adapters stay whole, outside FSDP. A part is filled from the base that is kept in 4 bit: no process ever holds more than
its parts, and one layer or the embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from lorasft.errors import ModelError
from lorasft.model.base import find_kept, load_base, make_stops, patch_linear4bit, read_config
from lorasft.model.cache import read_kept
from lorasft.model.experts import PARTS, packed_parts
from lorasft.model.loss import whole_head
from lorasft.model.recompute import decoder_layers
from lorasft.model.tables import vocabulary_tables
from lorasft.model.weightless import fill, make_skeleton_4bit
from lorasft.recipe import ModelSettings
from lorasft.tensors import TensorFile, find_weights, open_tensors

_CPU = torch.device("cpu")
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4")
Files = Mapping[str, TensorFile]  # of a kept base, by the names of tensors


def keep_whole(settings: ModelSettings) -> None:
    """Have the base kept in 4 bit on this machine, of which one process calls this. It is quantized on the CPU."""
    if read_kept(find_kept(settings, read_config(settings.base, settings.revision), _CPU), str) is None:
        load_base(settings, _CPU, keep=True)


def load_around(settings: ModelSettings, device: torch.device) -> Any:
    """The base that is kept in 4 bit, on `device`; but what is in 4 bit has shapes alone, and no memory."""
    config, files = read_config(settings.base, settings.revision), open_kept(settings)
    base = make_skeleton_4bit(config, settings, device)
    packed = {id(part) for module in base.modules() for parts in packed_parts(module).values() for part in parts}

    def read(name: str, old: Tensor) -> Tensor:
        if isinstance(old, bnb.nn.Params4bit) or id(old) in packed:
            return torch.empty((), dtype=old.dtype, device=device).expand(old.shape)
        return files[name].read(name).to(device)

    fill(base.named_modules(), device, read)
    for parameter in base.parameters():
        parameter._is_hf_initialized = True
    base.initialize_weights()  # the buffers that files do not have
    base.requires_grad_(False)
    base.name_or_path, base.generation_config = settings.base, make_stops(settings, config)
    patch_linear4bit(base, device)
    return base.eval()


def shard_base(causal: Any, settings: ModelSettings, processes: int) -> None:
    """Fill what is in 4 bit in a model of `load_around`, with its adapter, layer by layer, and keep the parts of this
    process, of so many that hold one copy. Raises ModelError for a model whose layers are not known."""
    layers, device, files = decoder_layers(causal), causal.device, open_kept(settings)
    paths = {one: path.replace(".base_layer", "") for path, one in causal.named_modules()}
    tables = vocabulary_tables(causal)
    tied = tables[0].weight is tables[1].weight
    sizes = torch.distributed.get_world_size() // processes, processes
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("copies", "parts"))["parts"]
    if not layers:
        raise ModelError("its layers are not known: one base cannot lie over several processes", where="machine.shard")

    def split(module: Any, parts: list[nn.Parameter]) -> None:
        # After each use everywhere, also by the head, which is no part of the backbone: a state_dict lets go as well,
        # and processes that hold other things would gather other things.
        ignored = {*module.parameters()} - {*parts}
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=ignored)

    for table in tables[: 1 if tied else 2]:
        split(table, [table.weight])
    causal.head_holder = tables[0 if tied else -1]
    if tied:
        tables[-1].weight, tables[-1].forward = tables[0].weight, partial(_project, causal)
    for layer in (*layers, causal.base_model):  # the last time what is around them
        found: list[nn.Parameter] = []
        for module in layer.modules():
            if isinstance(module, bnb.nn.Linear4bit) and not hasattr(module, "nested_absmax"):
                found += _fill_linear(module, paths[module], files, device)
                module.forward = partial(_forward, causal.frozen_weights, module)
            elif getattr(module, "packed", ()) and not isinstance(module, FSDPModule):
                split(module, _fill_experts(module, paths[module], files, device))
        split(layer, found)


def open_kept(settings: ModelSettings) -> Files:
    """The tensors of the base that is kept in 4 bit."""
    place = find_kept(settings, read_config(settings.base, settings.revision), _CPU)
    return {name: file for file in map(open_tensors, find_weights(place)) for name in file.specs}


def _fill_linear(linear: Any, path: str, files: Files, device: torch.device) -> list[nn.Parameter]:
    """Give a 4-bit linear its numbers: codes and constants as parameters, which are returned; see `quant_state`."""
    names = {part: f"{path}.weight.{part}" for part in _PARTS}
    parts = {part: files[name].read(name) for part, name in names.items() if name in files}
    linear.quant_state = bnb.functional.QuantState.from_dict(parts, device)
    codes = files[f"{path}.weight"].read(f"{path}.weight").to(device)
    constants = linear.quant_state.absmax, linear.quant_state.state2.absmax
    linear.weight, linear.absmax, linear.nested_absmax = found = [
        nn.Parameter(one, requires_grad=False) for one in (codes, *constants)
    ]
    linear.quant_state.absmax = linear.quant_state.state2.absmax = None
    return found


def _fill_experts(module: nn.Module, path: str, files: Files, device: torch.device) -> list[nn.Parameter]:
    """Give packed experts their numbers: codes and constants, which are returned."""
    names = [f"{name}{end}" for name in packed_parts(module) for end in PARTS]
    for name in names:
        value = files[f"{path}.{name}"].read(f"{path}.{name}").to(device)
        setattr(module, name, nn.Parameter(value, requires_grad=False))
    return [getattr(module, name) for name in names]


def _forward(weights: Any, linear: Any, x: Tensor) -> Tensor:
    """What bitsandbytes' own forward gives, which would read constants that are not there."""
    y = FrozenLinear.apply(x, weights, linear)  # type: ignore[no-untyped-call]
    return y if linear.bias is None else y + linear.bias.to(y.dtype)  # type: ignore[no-any-return]


class FrozenLinear(torch.autograd.Function):
    """x (..., in) -> (..., out): the weight is read anew going backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Any, linear: Any) -> Tensor:
        ctx.weights, ctx.linear = weights, linear
        return x @ weights.read(linear, x.dtype).t()  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return dy @ ctx.weights.read(ctx.linear, dy.dtype), None, None


def _project(causal: Any, x: Tensor) -> Tensor:
    """x (..., hidden) -> logits, by a head that is tied to an embedding, which holds the weight of both."""
    if torch.is_grad_enabled():
        what = "a tied head that does more than is known cannot be trained through where it lies over several processes"
        raise ModelError(what, where="machine.shard", hint="machine.shard=1")
    with whole_head(causal) as weight:
        return F.linear(x, weight)
