"""What only a GPU can show: python scripts/gpu_check.py [--data FILE.jsonl] [--write] [--tiny]

Random weights at the shapes of Llama 3.1 8B and Qwen3 4B, made on the device and put into NF4 one by one; a rank-16
adapter on all linears; rows as long as those of FILE (four bytes a token), else of a log-normal distribution, the
second half of each supervised; micro-batches of 2,048 and 8,192 tokens; AdamW. Each case in a process of its own:

lorasft    its loss and linears, as few layers recomputed as fit
peft       transformers, PEFT and bitsandbytes as their guides say: padded, prepared, checkpointed, autocast to bf16

and within a cap: the 8B at 2,048 tokens in 7 GiB, the shape of Llama 3.3 70B in 44 GiB. `of peak`: the work without
recomputation against the rate of a bf16 product of 8192 x 8192 matrices. `floor`: weights, adapter with gradients and
moments, the input of every layer and the largest weight in bf16. Then what else depends on the device: the bits of NF4,
attention in one kernel, a run that runs out of memory, one that is resumed. `--write` puts all of it into docs/gpu.md.
`--tiny` runs the same code on small shapes, also on a CPU; it has been run there only.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import importlib.metadata
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench import PACKAGES, ROOT, table

Row = dict[str, Any]
GIB = 1 << 30
LLAMA = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 16384}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.1-8b": ("llama", LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                                       "num_attention_heads": 32}),
    "llama-3.3-70b": ("llama", LLAMA | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                                        "num_attention_heads": 64}),
    "qwen3-4b": ("qwen3", LLAMA | {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
                                   "num_attention_heads": 32, "vocab_size": 151936, "tie_word_embeddings": True}),
    "tiny": ("llama", LLAMA | {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 32,
                               "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One process: who trains which shape in micro-batches of how many tokens, in how many GiB of the card."""

    arm: str
    shape: str
    tokens: int
    cap: int | None = None


CASES = [Case(arm, shape, tokens) for shape in ("qwen3-4b", "llama-3.1-8b") for tokens in (2048, 8192)
         for arm in ("lorasft", "peft")]  # fmt: skip
CASES += [Case("lorasft", "llama-3.1-8b", 2048, cap=7), Case("lorasft", "llama-3.3-70b", 2048, cap=44)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="JSON lines whose lengths are taken")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    import torch

    if options.case:
        print(json.dumps(run_case(Case(**json.loads(options.case)), options.data)))
        return
    if not (options.tiny or torch.cuda.is_available()):
        raise SystemExit("no CUDA device: --tiny runs the same code on a CPU")
    if options.tiny:
        results = [run_case(Case(arm, "tiny", 256), options.data) for arm in ("lorasft", "peft")]
    else:
        results = [run_apart(case, options.data) for case in CASES]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    text = f"{show(results)}\n" + "".join(f"- {name}: {check()}\n" for name, check in CHECKS.items())
    print(text)
    if options.write:
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
        made = f"{datetime.date.today()}, {device};\n{versions}:\n`{shlex.join(['python', 'scripts/gpu_check.py'])}`\n"
        (ROOT / "docs" / "gpu.md").write_text(f"# On a GPU\n\n{text}\n{made}", encoding="utf-8")


def run_apart(case: Case, data: str | None) -> Row:
    """A case in a process of its own; a fault is its result."""
    command = [sys.executable, __file__, "--case", json.dumps(asdict(case)), *(["--data", data] if data else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]
    faults = [line for line in done.stderr.splitlines() if "error" in line.lower()] or ["ended without a word"]
    return asdict(case) | {"fault": faults[-1].strip()[:80]}


def run_case(case: Case, data: str | None) -> Row:
    """Eight micro-batches after two that warm up."""
    import torch

    from lorasft.model.memory import StorageMeter

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if case.cap:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(case.cap * GIB / total)
    on_gpu = device.type == "cuda"
    with contextlib.nullcontext() if on_gpu else StorageMeter() as meter:
        config = make_config(case.shape)
        model = make_model(config, device)
        batches = make_batches(case.tokens, config.vocab_size, data)
        learner = prepare_peft(model) if case.arm == "peft" else prepare_lorasft(case, model, device)
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        for number, batch in enumerate(batches):
            if number == 2:
                synchronize(device)
                started = time.perf_counter()
            learner.loss(batch).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        synchronize(device)
        seconds = time.perf_counter() - started
        peak = torch.cuda.max_memory_allocated(device) if meter is None else meter.peak
    measured = batches[2:]
    work = sum(count_flops(config, model, batch) for batch in measured)
    return asdict(case) | {
        "tokens_per_second": sum(len(batch.ids) for batch in measured) / seconds,
        "share": work / seconds / measure_ceiling(device),
        "peak": peak / GIB,
        "floor": count_floor(config, model, case.tokens) / GIB,
        "note": learner.note,
    }


@dataclass(frozen=True)
class Learner:
    loss: Callable[[Any], Any]
    note: str


def make_config(shape: str) -> Any:
    from transformers import LlamaConfig, Qwen3Config

    kind, sizes = SHAPES[shape]
    return {"llama": LlamaConfig, "qwen3": Qwen3Config}[kind](**sizes)


def make_model(config: Any, device: Any) -> Any:
    """Random weights on `device`: of those in NF4 only one is ever there in 16 bits."""
    import bitsandbytes as bnb
    import torch

    from lorasft.model.base import make_skeleton, quantize_skeleton

    model: Any = make_skeleton(config)
    quantize_skeleton(model, torch.bfloat16)
    torch.manual_seed(0)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            drawn = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
            drawn = drawn.normal_(0, 0.02) if drawn.dim() > 1 else drawn.fill_(1)
            if isinstance(module, bnb.nn.Linear4bit) and name == "weight":
                made = bnb.nn.Params4bit(drawn, requires_grad=False, quant_type="nf4", module=module).to(device)
                module.support_avx512bf16_for_cpu = False
            else:
                made = torch.nn.Parameter(drawn, requires_grad=False)
            module.register_parameter(name, made)
    model.tie_weights()
    with torch.device(device):  # its frequencies are not weights
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


def make_batches(tokens: int, vocabulary: int, data: str | None, count: int = 10) -> list[Any]:
    """Full micro-batches of rows, the second half of each supervised."""
    from lorasft.data.packing import make_micro_batches
    from lorasft.data.tokens import UNSUPERVISED, Tokens

    draw = np.random.default_rng(0)
    if data:
        lengths = draw.permutation([len(line) // 4 for line in Path(data).read_bytes().splitlines()])
    else:
        lengths = draw.lognormal(np.log(250), 0.9, size=16 * count * max(1, tokens // 250)).astype(int)
    lengths = np.clip(lengths, 8, tokens)
    rows = []
    for length in np.resize(lengths, int(np.searchsorted(lengths.cumsum(), 2 * count * tokens)) + 1):
        ids = draw.integers(0, vocabulary, length + 1).astype(np.int32)
        labels = np.where(np.arange(length + 1) > length // 2, ids, UNSUPERVISED).astype(np.int32)
        rows.append(Tokens(ids, labels))
    batches = make_micro_batches(lambda index: (rows[index],), range(len(rows)), capacity=tokens)
    return sorted(batches, key=lambda batch: -len(batch.ids))[:count]


def prepare_lorasft(case: Case, model: Any, device: Any) -> Learner:
    import torch

    from lorasft.model.adapter import attach_adapter
    from lorasft.model.loss import pair_losses
    from lorasft.model.memory import heaviest_batch
    from lorasft.model.recompute import recompute
    from lorasft.model.selfcheck import verify
    from lorasft.model.weightless import make_weightless, plan_network
    from lorasft.recipe import AdapterSettings, ModelSettings
    from lorasft.train.layout import fewest_recomputed

    peft = attach_adapter(model, AdapterSettings(rank=16), seed=0)
    network = verify(peft.get_base_model())
    recomputed = 0
    if device.type == "cuda":
        settings = ModelSettings(base=case.shape, dtype="bfloat16")
        planned = plan_network(network, make_weightless(model.config, settings, AdapterSettings(rank=16), device))
        heaviest = heaviest_batch(planned, longest=case.tokens, capacity=case.tokens)
        gc.collect()
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0]
        free = min(free, case.cap * GIB - torch.cuda.memory_allocated(device)) if case.cap else free
        trained = sum(p.numel() for p in peft.parameters() if p.requires_grad)
        room = free - 12 * trained  # gradients and moments come later
        recomputed, _ = fewest_recomputed(planned, heaviest, free=room)
        recompute(network.causal, recomputed)
    network.causal.train()
    note = f"{recomputed} layers recomputed, {'one kernel' if network.kernel else 'segment by segment'}"
    return Learner(lambda batch: pair_losses(network, batch).mean(), "; ".join([note, *network.notices]))


def prepare_peft(model: Any) -> Learner:
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    settings = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    peft: Any = get_peft_model(prepare_model_for_kbit_training(model), settings).train()

    def loss(batch: Any) -> Any:
        spans = [(segment.start, segment.end) for segment in batch.segments]
        ids = torch.zeros(len(spans), max(end - start for start, end in spans), dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        targets = dict(zip(batch.sources.tolist(), batch.targets.tolist(), strict=True))
        for row, (start, end) in enumerate(spans):
            ids[row, : end - start] = torch.as_tensor(batch.ids[start:end])
            mask[row, : end - start] = 1
            for source in range(start, end - 1):
                labels[row, source - start + 1] = targets.get(source, -100)
        inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        with torch.autocast(peft.device.type, torch.bfloat16):
            return peft(**{name: tensor.to(peft.device) for name, tensor in inputs.items()}, use_cache=False).loss

    return Learner(loss, "padded, all layers recomputed")


def count_linears(model: Any) -> int:
    """Weights in linears that are 4-bit: those of the decoder layers."""
    return sum(2 * p.numel() for p in model.parameters() if getattr(p, "quant_state", None) is not None)


def count_flops(config: Any, model: Any, batch: Any) -> float:
    """Forwards and backwards through frozen weights, attention, and the head where something is supervised."""
    width = config.num_attention_heads * config.head_dim
    pairs = sum((segment.end - segment.start) ** 2 / 2 for segment in batch.segments)
    attention = 14 * width * pairs * config.num_hidden_layers  # 4 forwards, 10 backwards
    head = 4 * config.vocab_size * config.hidden_size * len(batch.targets)
    return 4.0 * count_linears(model) * len(batch.ids) + attention + head


def count_floor(config: Any, model: Any, tokens: int) -> float:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    other = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    kept = config.num_hidden_layers * tokens * config.hidden_size
    largest = config.hidden_size * config.intermediate_size
    return count_linears(model) * 4.127 / 8 + 2 * (other + kept + largest) + 16 * trained


def measure_ceiling(device: Any) -> float:
    """FLOP a second of a large bf16 product."""
    import torch

    size = 8192 if device.type == "cuda" else 512
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    for turn in range(20):
        if turn == 5:
            synchronize(device)
            started = time.perf_counter()
        a @ a
    synchronize(device)
    return 15 * 2 * size**3 / (time.perf_counter() - started)


def synchronize(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def show(results: list[Row]) -> str:
    lines = []
    for row in results:
        cap = f", {row['cap']} GiB" if row["cap"] else ""
        name = f"{row['shape']}, {row['tokens']:,}{cap}: {row['arm']}"
        if "fault" in row:
            lines.append([name, "-", "-", "-", "-", row["fault"]])
        else:
            numbers = [f"{row['tokens_per_second']:,.0f}", f"{row['share']:.0%}", f"{row['peak']:.2f}"]
            lines.append([name, *numbers, f"{row['floor']:.2f}", row["note"]])
    return table(["case", "tokens/s", "of peak", "peak, GiB", "floor, GiB", "how"], lines)


def check_bits() -> str:
    import bitsandbytes as bnb
    import torch

    if not torch.cuda.is_available():
        return "needs CUDA"
    weight = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    seen = []
    for device in ("cpu", "cuda"):
        packed, state = bnb.functional.quantize_4bit(weight.to(device), quant_type="nf4", compress_statistics=True)
        seen.append(bnb.functional.dequantize_4bit(packed, state).cpu())
    same, apart = float((seen[0] == seen[1]).double().mean()), float((seen[0] - seen[1]).norm() / seen[0].norm())
    return f"{same:.4%} of the dequantized weights have the CPU's bits, all are {apart:.1e} apart"


def check_redo() -> str:
    """A run in less than it needs has the losses of one that has room."""
    import torch

    if not torch.cuda.is_available():
        return "needs CUDA"
    wide = "machine.micro_batch_tokens=65536"
    with tempfile.TemporaryDirectory() as folder:
        torch.cuda.reset_peak_memory_stats()
        losses, _ = train_tiny(f"{folder}/a", wide)
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(0.6 * torch.cuda.max_memory_allocated() / total)
        redone, tokens = train_tiny(f"{folder}/b", wide)
        torch.cuda.set_per_process_memory_fraction(1.0)
    return f"losses {apart(losses, redone)} apart; micro-batches of {tokens} tokens in the end"


def check_resume() -> str:
    """A run that is resumed in its middle has the losses of one that was never stopped."""
    from lorasft.files import remove_folder

    with tempfile.TemporaryDirectory() as folder:
        losses, _ = train_tiny(f"{folder}/a")
        remove_folder(Path(folder, "a", "checkpoints", "step-000004"))
        remove_folder(Path(folder, "a", "adapter"))
        again, _ = train_tiny(f"{folder}/a", resume=True)
    return f"losses {apart(losses, again)} apart"


def train_tiny(folder: str, *settings: str, resume: bool = False) -> tuple[list[float], int]:
    """The losses of four steps of the shipped recipe `tiny`, and the tokens of its micro-batches in the end."""
    from lorasft.recipe.load import load_recipe
    from lorasft.train.checkpoint import newest_checkpoint
    from lorasft.train.loop import train
    from lorasft.train.run import export_adapter, open_run

    fixed = [f"run.output={folder}", "run.save_every=2", "train.steps=4", "data.eval=null", "run.eval_every=null"]
    with open_run(load_recipe("tiny", [*fixed, *settings]), resume=resume) as (run, state):
        export_adapter(run, train(run, state))
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    state = newest_checkpoint(Path(folder, "checkpoints"), run=None)
    return [line["loss"] for line in lines if "loss" in line], state.layout.micro_batch_tokens


def apart(one: list[float], other: list[float]) -> str:
    return f"{max(abs(a - b) for a, b in zip(one, other, strict=True)):.1e}"


CHECKS = {"NF4": check_bits, "too little memory": check_redo, "resumed": check_resume}


if __name__ == "__main__":
    main()
