"""Does 4 bit work on this device? A small computation, beside the same in float64."""

from __future__ import annotations

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import get_4bit_type

from lorasft.model.base import compute_dtype


def nf4_error(device: torch.device) -> tuple[float, float]:
    """Largest error, relative to the largest value, of a linear in NF4 and of its backward, against float64; and what
    rounding in the device's own precision explains."""
    dtype = compute_dtype("auto", device)
    scheme = {"compress_statistics": False, "quant_type": "nf4"}
    layer = bnb.nn.Linear4bit(256, 256, bias=False, compute_dtype=dtype, **scheme)
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (1024, 64), generator=random)  # blocks of numbers that share a scale
    codes[:, 0] = 15  # the largest: NF4 has these numbers
    blocks = get_4bit_type("nf4", device="cpu")[codes] * (torch.rand(1024, 1, generator=random) + 0.5)
    weight = blocks.view(256, 256)
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, **scheme)
    layer = layer.to(device)
    layer.support_avx512bf16_for_cpu = False  # as in training: see base.py
    identity = torch.eye(256, dtype=dtype, device=device)
    entered = identity.clone().requires_grad_()
    out = layer(entered)
    found = (out.detach().t(), *torch.autograd.grad(out, entered, identity))
    error = max(float((one.cpu().double() - weight).abs().max() / weight.max()) for one in found)
    return error, 1e-5 if dtype == torch.float32 else 2e-2
