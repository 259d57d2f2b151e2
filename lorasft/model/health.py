"""Does training work on this device? Two small computations, beside the same in float64 and one sequence at a time."""

from __future__ import annotations

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import get_4bit_type
from transformers import AutoModelForCausalLM, LlamaConfig

from lorasft.model.base import compute_dtype
from lorasft.model.loss import Network
from lorasft.model.selfcheck import verify


def nf4_error(device: torch.device) -> float:
    """Largest error, relative to the largest value, of a linear in NF4 and of its backward, against float64."""
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
    out.backward(identity)
    assert entered.grad is not None
    found = (out.detach().t(), entered.grad)
    return max(float((one.cpu().double() - weight).abs().max() / weight.max()) for one in found)


def nf4_tolerance(device: torch.device) -> float:
    """What rounding in the device's own precision explains."""
    return 1e-5 if compute_dtype("auto", device) == torch.float32 else 2e-2


def try_attention(device: torch.device) -> Network:
    """What is verified of a tiny random Llama, and how its losses would be computed."""
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,  # at the usual size a leak would hardly move the loss
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=compute_dtype("auto", device))
    return verify(model.to(device))
