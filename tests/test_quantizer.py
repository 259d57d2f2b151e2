"""The quantizer for CPUs: bitsandbytes' own bits, whatever the shape, the numbers and the settings."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from bitsandbytes.functional import get_4bit_type, quantize_4bit
from torch import Tensor

import lorasft.model
from lorasft.model import quantizer

# A device that bitsandbytes has no kernel for gets its general one, in plain torch: what CPUs got before ours.
OWN = torch.library.get_kernel("bitsandbytes::quantize_4bit", "MPS")
CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
SHAPES = [(64, 64), (1, 1), (3, 1), (37, 192), (513, 1024), (130, 40), (5, 7, 11), (28672,), (28673, 1), (57343,)]
LARGEST = torch.finfo(torch.float16).max


def at_bounds(shape: tuple[int, ...]) -> Tensor:
    """Every bound between two codes, and the fp32 numbers next to it, in blocks that have a 1."""
    code = get_4bit_type("nf4", device="cpu")
    bounds = (code[:-1] + code[1:]) / 2
    near = [torch.nextafter(bounds, torch.tensor(far)) for far in (-9.0, 9.0)]
    some = torch.cat([bounds, *near, torch.tensor([1.0, -1.0, 0.0])])  # 48
    return some.repeat(-(-math.prod(shape) // 48))[: math.prod(shape)].view(shape)


NUMBERS: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
    "weights": lambda shape: torch.randn(shape) * 0.02,
    "some blocks of zeros": lambda shape: torch.randn(shape).where(torch.arange(shape[-1]) // 64 % 3 > 0, 0.0),
    "zeros": torch.zeros,
    "too small for a reciprocal": lambda shape: torch.randn(shape) * 1e-39,
    "extremes": lambda shape: torch.randint(-1, 2, shape) * LARGEST,
    "far apart": lambda shape: torch.randn(shape) * 10 ** torch.empty(shape).uniform_(-7, 4),
    "bounds": at_bounds,
    "bounds of blocks without a 1": lambda shape: at_bounds(shape) * 0.9,
    "large": lambda shape: torch.randn(shape) * (1.0 if math.prod(shape) < 9 else 1e4),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numbers", NUMBERS)
def test_the_bits_of_bitsandbytes(numbers: str, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    for shape in SHAPES:
        weight = NUMBERS[numbers](shape).to(dtype)
        for size in (32, 64, 128, 256, 512, 1024, 2048, 4096):
            packed, largest = torch.ops.bitsandbytes.quantize_4bit.default(weight, size, "nf4", torch.uint8)
            wanted = OWN.call_boxed(CPU, weight, size, "nf4", torch.uint8)
            assert packed.dtype == torch.uint8 and torch.equal(packed, wanted[0]), (shape, size)
            assert largest.dtype == torch.float32 and torch.equal(largest, wanted[1]), (shape, size)


def test_ours_is_what_runs_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """And bitsandbytes' own for what ours is not made for."""
    assert lorasft.model.QUANTIZER is not None
    asked = []
    own = quantizer._quantize
    monkeypatch.setattr(quantizer, "_quantize", lambda *args, **kwargs: asked.append(args) or own(*args, **kwargs))
    weight = torch.randn(64, 64).t()  # not contiguous
    quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    assert len(asked) == 1
    for kind, storage in (("fp4", torch.uint8), ("nf4", torch.bfloat16)):
        ours = quantize_4bit(weight, quant_type=kind, quant_storage=storage)[0]
        assert len(asked) == 1 and torch.equal(ours, OWN.call_boxed(CPU, weight, 64, kind, storage)[0])


def test_other_bits_are_never_taken_for_bitsandbytes_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the probe differs, as it may in another version, bitsandbytes keeps its own; nor is ours put in twice."""
    assert quantizer.install_quantizer() is None
    answers = iter([(torch.zeros(1), torch.ones(1)), (torch.zeros(1), torch.zeros(1))])
    monkeypatch.setattr(quantizer, "_quantize", lambda *args, **kwargs: next(answers))
    monkeypatch.setattr(quantizer, "Library", lambda *args: pytest.fail("the probe differed"))
    assert quantizer.install_quantizer() is None
