"""Liger's kernels for norms, gated layers and rotary positions (CUDA): on request, where they compute the same.

Not yet run on a GPU by lorasft. What a kernel gets wrong going backwards would spoil a run silently, so losses and
gradients of a probe are compared with torch's own before the kernels are kept.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lorasft.data.packing import MicroBatch
from lorasft.errors import DeviceError
from lorasft.model.loss import Network, pair_losses
from lorasft.model.selfcheck import probe

_APART = {torch.float32: 1e-4}  # relative error that is rounding; in 16 bits:
_APART_16_BIT = 3e-2


def require_liger(device: torch.device) -> None:
    """Raise DeviceError where Liger's kernels cannot run."""
    if device.type != "cuda":
        what = f"Liger's kernels run on CUDA devices, and this is {device.type}"
        raise DeviceError(what, where="machine.kernels", hint="machine.kernels=torch")
    if importlib.util.find_spec("liger_kernel") is None:
        hint = "pip install 'lorasft[gpu]', or machine.kernels=torch"
        raise DeviceError("liger-kernel is not installed", where="machine.kernels", hint=hint)


def use_liger(network: Network) -> Network:
    """`network` with Liger's kernels in its model and a notice; as it was where they are none or compute otherwise."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN, _apply_liger_kernel_to_instance

    causal = network.causal
    if causal.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return _noting(network, f"Liger has no kernels for {causal.config.model_type}: torch's are used")
    row = probe(network)
    own = _answers(network, row)
    take_out = _remember(causal)
    parts = {"rope": True, "rms_norm": True, "swiglu": True, "geglu": True}
    try:
        _apply_liger_kernel_to_instance(causal, **parts, cross_entropy=False, fused_linear_cross_entropy=False)
        apart = [float((a - b).norm() / a.norm()) for a, b in zip(own, _answers(network, row), strict=True)]
    except Exception as fault:  # of Triton, of its compiler, of a model that is built otherwise
        take_out(everything=True)
        return _noting(network, f"Liger's kernels do not run here ({fault}): torch's are used")
    fine = all(number <= _APART.get(causal.dtype, _APART_16_BIT) for number in apart)
    take_out(everything=not fine)
    moved = f"losses move by {apart[0]:.1e} and gradients by {apart[1]:.1e}"
    return _noting(network, f"Liger's kernels: {moved}" if fine else f"torch's kernels: with Liger's {moved}")


def _answers(network: Network, row: MicroBatch) -> tuple[Tensor, Tensor]:
    """Losses (pairs,) and all gradients in one row, with nothing dropping out."""
    causal, training = network.causal, network.causal.training
    trained = [parameter for parameter in causal.parameters() if parameter.requires_grad]
    causal.eval()
    losses = pair_losses(network, row)
    slopes = torch.autograd.grad(losses.sum(), trained, allow_unused=True)
    causal.train(training)
    return losses.detach(), torch.cat([slope.flatten() for slope in slopes if slope is not None])


def _remember(causal: Any) -> Callable[..., None]:
    """What takes Liger out again: out of the model, or only out of other models of its family in this process.

    Liger exchanges the family's classes as well. Its rotary function stays: that is how this model gets it.
    """
    family = vars(sys.modules[type(causal).__module__])
    names, modules = dict(family), {module: dict(vars(module)) for module in causal.modules()}

    def take_out(*, everything: bool) -> None:
        family.update((name, value) for name, value in names.items() if everything or isinstance(value, type))
        for module, attributes in modules.items() if everything else ():
            vars(module).clear()
            vars(module).update(attributes)

    return take_out


def _noting(network: Network, notice: str) -> Network:
    return replace(network, notices=(*network.notices, notice))
