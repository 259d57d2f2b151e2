"""The emulated device itself: attention beside float64, what raises, what is counted."""

from __future__ import annotations

from pathlib import Path

import pytest
from emulated import run_emulated

ATTENTION = """
import torch
from torch.nn.attention.varlen import varlen_attn

for left in (-1, 3):
    given = [torch.randn(n, h, 16, dtype=torch.bfloat16) for n, h in ((12, 4), (17, 2), (17, 2))]
    own = [one.cuda().requires_grad_() for one in given]
    starts = [torch.tensor(one, dtype=torch.int32, device="cuda") for one in ([0, 5, 12], [0, 5, 17])]
    out = varlen_attn(*own, *starts, 7, 12, scale=0.3, window_size=(left, 0), enable_gqa=True)
    upstream = torch.randn(12, 4, 16, dtype=torch.bfloat16)
    out.backward(upstream.cuda())
    exact, parts = [one.double().requires_grad_() for one in given], []
    for a, b, c, d in ((0, 5, 0, 5), (5, 12, 5, 17)):
        k, v = (one[c:d].repeat_interleave(2, 1) for one in exact[1:])
        seen = torch.tensor([[j <= i + d - c - b + a and (left < 0 or j >= i + d - c - b + a - left)
                              for j in range(d - c)] for i in range(b - a)])
        scores = torch.einsum("qhd,khd->hqk", exact[0][a:b], k) * 0.3
        parts.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -1e9).softmax(-1), v))
    torch.cat(parts).backward(upstream.double())
    pairs = [(out.detach(), torch.cat(parts).detach()), *((a.grad, b.grad) for a, b in zip(own, exact))]
    assert max(float((a.cpu() - b).norm() / b.norm()) for a, b in pairs) < 1e-2
"""

NORMS = """
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from lorasft.model.lean import use_lean_layers
import emu

for kind in (LlamaRMSNorm, GemmaRMSNorm):
    norm = kind(64, eps=1e-5).requires_grad_(False).bfloat16().cuda()
    norm.weight.copy_(torch.randn(64) * 0.3)
    assert use_lean_layers(norm) == [norm]
    x, dy = (torch.randn(3, 50, 64, device="cuda").bfloat16() for _ in range(2))
    x.requires_grad_()
    emu.clear()
    y = norm(x)
    y.backward(dy)
    names = [name for name in emu.report() if "rms_norm" in name]
    assert names == ["aten::_fused_rms_norm", "aten::_fused_rms_norm_backward"], names
    exact, scale = x.detach().cpu().double().requires_grad_(), norm.weight.cpu().double() + (kind is GemmaRMSNorm)
    want = torch.nn.functional.rms_norm(exact, (64,), scale, 1e-5)
    want.backward(dy.cpu().double())
    for a, b in ((y.detach(), want.detach()), (x.grad, exact.grad)):
        assert a.dtype == torch.bfloat16 and float((a.cpu() - b).norm() / b.norm()) < 2e-3
    make, parts = y.made_by
    assert torch.equal(make(*parts), y)
"""

DEVICE = """
import emu, torch

one = torch.ones(4, device="cuda")
for wrong in (lambda: one + torch.ones(4), lambda: torch.cat([one, torch.ones(4)])):
    try:
        wrong()
    except RuntimeError as error:
        assert "same device" in str(error)
    else:
        raise SystemExit("devices were mixed")
assert torch.empty(4, device="cuda").isnan().all()
pinned = torch.zeros(8, dtype=torch.int64).pin_memory()
assert pinned[2:].is_pinned() and not torch.zeros(8).is_pinned()
emu.clear()
there = pinned.to("cuda", non_blocking=True)
assert emu.report()["copy_ H2D async"] == 1 and not emu.waits()
there[there > 0], float(there.sum()), torch.tensor([1], device="cuda"), there.cpu()
assert emu.waits() == {"aten::_local_scalar_dense": 1, "aten::nonzero": 1, "copy_ H2D": 1, "copy_ D2H": 1}
with emu.no_waits():
    try:
        float(one.sum())
    except RuntimeError as error:
        assert "waits for the device" in str(error)
    else:
        raise SystemExit("the host waited")
torch.cuda.set_per_process_memory_fraction(0.01)
try:
    torch.empty(1 << 30, device="cuda")
except torch.OutOfMemoryError:
    print("fine")
"""


@pytest.mark.parametrize("script", [ATTENTION, NORMS, DEVICE], ids=["attention", "norms", "device"])
def test_the_emulated_device_does_what_it_says(script: str, tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text("import sys\nimport torch\ntorch.manual_seed(0)\n" + script, encoding="utf-8")
    run_emulated("-W", "error", str(path))
