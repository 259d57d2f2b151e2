"""Attention on the emulated device: one kernel a layer, with windows and shared prefixes, as exact as here; refused."""

from __future__ import annotations

import pytest
from emulated import run_emulated

MODEL = """
import emu, copy, torch
from test_prefixes import Relatives
from tiny_models import CONFIGS, WINDOWS, make_base, randomize_adapter, shape
from transformers import GptOssConfig
from lorasft.data.packing import make_micro_batches
from lorasft.model.adapter import attach_adapter, trainable
from lorasft.model.loss import pair_losses
from lorasft.model.selfcheck import verify
from lorasft.recipe import AdapterSettings

rows, experts = Relatives(), {"num_local_experts": 4, "num_experts_per_tok": 2}
CONFIGS["gpt_oss"] = lambda hidden: GptOssConfig(**shape(hidden), **WINDOWS, **experts)  # sinks
for name in ("llama", "qwen3", "gemma3", "gpt2", "gpt_oss"):  # gemma3, gpt_oss: windows of 6 and 40 tokens
    base = make_base(name, torch.bfloat16)
    results = []
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.bfloat16), ("cpu", torch.float64)):
        model = attach_adapter(copy.deepcopy(base), AdapterSettings(rank=4), seed=0)
        randomize_adapter(model)
        if name == "gpt_oss" and dtype == torch.float64:
            model.get_base_model().set_experts_implementation("eager")  # grouped products have no float64
        network = verify(model.to(device, dtype).get_base_model())
        assert network.share and not network.notices, network.notices
        batches = list(make_micro_batches(rows.sequences, range(len(rows)), capacity=300, share=True))
        assert any(segment.ancestors for batch in batches for segment in batch.segments)
        emu.clear()
        with emu.no_waits():
            losses = [pair_losses(network, batch) for batch in batches]
            torch.cat(losses).mean().backward()
        found = {key: one.grad.cpu().double() for key, one in trainable(model).items()}
        results.append((torch.cat(losses).detach().cpu().double(), found))
        if device == "cuda":
            counts, layers = emu.report(), network.causal.config.num_hidden_layers
            for kernel in ("aten::_flash_attention_forward", "aten::_flash_attention_backward"):
                assert counts[kernel] == layers * len(batches), counts
    (exact, truth), errors = results.pop(), []
    for losses, gradients in results:
        flat = [torch.cat([one.flatten() for one in found.values()]) for found in (gradients, truth)]
        pairs = ((losses, exact), flat)
        errors.append([float((one - other).norm() / other.norm()) for one, other in pairs])
    assert all(there < 1.6 * here for there, here in zip(*errors)), (name, errors)  # as far off as 16 bits are on a CPU
"""

REFUSED = """
import emu, torch
from tiny_models import make_base
from lorasft.commands import doctor
from lorasft.model.selfcheck import verify

old = torch.cuda.get_device_capability() < (8, 0)
network = verify(make_base("llama", torch.float32 if old else torch.bfloat16).to("cuda"))
assert network.share and len(network.notices) == old, network
print(doctor._check_attention())
"""


DROPPING = """
import emu, torch
from lorasft.model.attention import Paths, attend

numbers = Paths([5, 3], [(), ()]).numbers
paths = Paths([5, 3], [(), ()], False, lambda _: True, [torch.from_numpy(one).cuda() for one in numbers])
q, k, v = (torch.randn(1, 2, 8, 16).cuda().bfloat16() for _ in range(3))
compute = lambda rate: attend(torch.nn.Module(), q, k, v, None, dropout=rate, segments=paths)[0].float().cpu()
emu.clear()
mean = torch.stack([compute(0.3) for _ in range(300)]).mean(0)
assert emu.report()["aten::_flash_attention_forward"] == 300
whole, once = compute(0.0), compute(0.3)
assert (mean - whole).norm() < 0.1 * whole.norm() < (once - whole).norm()
"""


def test_one_kernel_a_layer_computes_all_segments() -> None:
    run_emulated("-c", MODEL)


@pytest.mark.slow
def test_attention_that_drops_out_takes_the_kernel_too() -> None:
    run_emulated("-c", DROPPING)


def test_a_device_without_the_kernel_is_told_so_and_is_sound() -> None:
    said = run_emulated("-c", REFUSED, EMU_CAP="7.5").stdout
    assert "FlashAttention only supports Ampere" in said and said.count("segment by segment") == 1
    assert "segment by segment" not in run_emulated("-c", REFUSED).stdout
