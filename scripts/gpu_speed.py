"""The parts of gpu_check.py that measure: models of real shapes with random weights, peers, and less memory."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from bench import ROOT, Meter, fit

Row = dict[str, Any]
Cases = Iterator[tuple[str, Callable[[], Row]]]
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
class Scale:
    """What the parts are run on."""

    tiny: bool
    device: Any
    data: str | None = None  # JSON lines whose lengths are taken

    def shape(self, name: str) -> str:
        return "tiny" if self.tiny else name

    def tokens(self, number: int) -> int:
        return number // 32 if self.tiny else number

    @property
    def on_gpu(self) -> bool:
        return bool(self.device.type == "cuda")


# ---- random models of real shapes ------------------------------------------------------------------------------------


def make_config(shape: str) -> Any:
    from transformers import LlamaConfig, Qwen3Config

    kind, sizes = SHAPES[shape]
    return {"llama": LlamaConfig, "qwen3": Qwen3Config}[kind](**sizes)


def make_model(config: Any, device: Any, std: float = 0.02) -> Any:
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
            drawn = drawn.normal_(0, std) if drawn.dim() > 1 else drawn.fill_(1)
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


def make_rows(longest: int, vocabulary: int, data: str | None, total: int) -> list[Any]:
    """Rows of `total` tokens together or a little more, the second half of each supervised."""
    from lorasft.data.store import UNSUPERVISED, Tokens

    draw = np.random.default_rng(0)
    if data:
        lengths = draw.permutation([len(line) // 4 for line in Path(data).read_bytes().splitlines()])
    else:
        lengths = draw.lognormal(np.log(250), 0.9, size=16 * max(1, total // 250)).astype(int)
    lengths = np.clip(lengths, 8, longest)
    rows = []
    for length in np.resize(lengths, int(np.searchsorted(lengths.cumsum(), total)) + 1):
        ids = draw.integers(0, vocabulary, length + 1).astype(np.int32)
        labels = np.where(np.arange(length + 1) > length // 2, ids, UNSUPERVISED).astype(np.int32)
        rows.append(Tokens(ids, labels))
    return rows


def make_batches(tokens: int, vocabulary: int, data: str | None, count: int = 10) -> list[Any]:
    """Full micro-batches, the largest first."""
    from lorasft.data.packing import make_micro_batches

    rows = make_rows(tokens, vocabulary, data, 2 * count * tokens)
    batches = make_micro_batches(lambda index: (rows[index],), range(len(rows)), capacity=tokens)
    return sorted(batches, key=lambda batch: -len(batch.ids))[:count]


@dataclass
class Rig:
    """A verified network with random weights, what it is planned with, its trained tensors and their optimizer."""

    network: Any
    planned: Any
    static: dict[str, int]
    optimizer: Any
    device: Any
    seconds: float  # to measure

    def set_lean(self, lean: bool) -> None:
        from lorasft.model.lean import use_lean_layers

        for network in (self.network, self.planned):
            for module in use_lean_layers(network.causal):
                if not lean:
                    del module.forward

    def step(self, batch: Any) -> None:
        from lorasft.model.loss import weighted_loss

        weighted_loss(self.network, batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)

    def measure(self, batches: list[Any], recomputed: int, keep: Any = None) -> Row:
        """Every batch in turn until some seconds are over, after one that warms up; the memory beside the predicted.

        `keep`: copies of the weights in 16 bits, of a recomputed `layer` or for the `run`.
        """
        import torch

        from lorasft.model.memory import dry_run
        from lorasft.model.recompute import recompute

        recompute(self.network.causal, recomputed)
        self.network.causal.train()
        for network in (self.network, self.planned):
            network.causal.frozen_weights.forget(keep)
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.step(batches[0])
        synchronize(self.device)
        started, spent, tokens, flops = time.perf_counter(), 0.0, 0, 0.0
        while spent <= self.seconds:
            for batch in batches:
                self.step(batch)
                tokens, flops = tokens + len(batch.ids), flops + count_flops(self.network.causal, batch)
            synchronize(self.device)
            spent = time.perf_counter() - started
        found = {"tokens a second": tokens / spent, "share": flops / spent / measure_ceiling(self.device)}
        if on_gpu:
            predicted = sum(self.static.values()) + dry_run(self.planned, batches[0], recomputed=recomputed).peak
            found["predicted"] = predicted / GIB
            found["allocated"] = torch.cuda.max_memory_allocated() / GIB
            found["reserved"] = torch.cuda.max_memory_reserved() / GIB
        return found | {"recomputed": recomputed}


def make_rig(shape: str, device: Any) -> Rig:
    import torch

    from lorasft.model.adapter import attach_adapter
    from lorasft.model.memory import static_bytes
    from lorasft.model.selfcheck import verify
    from lorasft.model.trained import Trained
    from lorasft.model.weightless import make_weightless, plan_network
    from lorasft.recipe import AdapterSettings, ModelSettings, OptimizerSettings
    from lorasft.training.optimizer import make_optimizer

    adapter, model = AdapterSettings(rank=16), make_model(make_config(shape), device)
    peft = attach_adapter(model, adapter, seed=0)
    network = verify(peft.get_base_model())
    print(shape, *network.notices, sep="\n", file=sys.stderr)
    weightless = make_weightless(model.config, ModelSettings(base=shape, dtype="bfloat16"), adapter, device)
    planned = plan_network(network, weightless)
    optimizer = make_optimizer(OptimizerSettings(), Trained(peft, torch.bfloat16))
    return Rig(network, planned, static_bytes(weightless, "adamw"), optimizer, device, 0.2 if shape == "tiny" else 3.0)


def count_flops(model: Any, batch: Any) -> float:
    """Forwards and backwards through frozen weights, attention, and the head where something is supervised."""
    config, weights = model.config, 0
    for parameter in model.parameters():
        weights += 2 * parameter.numel() * (getattr(parameter, "quant_state", None) is not None)
    pairs = sum((segment.end - segment.start) ** 2 / 2 for segment in batch.segments)
    width = config.num_attention_heads * config.head_dim
    attention = 14 * width * pairs * config.num_hidden_layers  # 4 forwards, 10 backwards
    return 4.0 * weights * len(batch.ids) + attention + 4 * config.vocab_size * config.hidden_size * len(batch.targets)


@functools.cache
def measure_ceiling(device: Any) -> float:
    """FLOP a second of a large bf16 product."""
    import torch

    size = 8192 if device.type == "cuda" and torch.cuda.get_device_name() != "Emulated" else 512
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    return 2 * size**3 / time_kernel(lambda: a @ a, device)


def time_kernel(run: Callable[[], Any], device: Any, times: int = 15) -> float:
    """Seconds of one, after five that warm up."""
    for turn in range(times + 5):
        if turn == 5:
            synchronize(device)
            started = time.perf_counter()
        run()
    synchronize(device)
    return (time.perf_counter() - started) / times


def synchronize(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


# ---- speed, peers, memory -------------------------------------------------------------------------------------------


def speed(scale: Scale) -> Cases:
    rig = make_rig(scale.shape("llama-3.1-8b"), scale.device)
    config, layers = rig.network.causal.config, rig.network.causal.config.num_hidden_layers
    for size in (2048, 4096, 8192, 16384):
        batches = make_batches(scale.tokens(size), config.vocab_size, scale.data, count=4)
        for lean in (True, False):
            for recomputed in (0, layers):
                rig.set_lean(lean)
                name = f"{size:,} tokens, {'lean' if lean else 'own'} layers, {recomputed} recomputed"
                yield name, functools.partial(rig.measure, batches, recomputed)
        if size == 4096:
            rig.set_lean(True)
            for keep, recomputed in (("layer", layers), ("run", 0)):
                name = f"{size:,} tokens, 16-bit weights kept for the {keep}, {recomputed} recomputed"
                yield name, functools.partial(rig.measure, batches, recomputed, keep)
            yield "a micro-batch of 4,096", functools.partial(profile, rig, batches[0])
            for name, run in kernels(rig, scale.tokens(size)):
                yield name, functools.partial(lambda run: {"ms": 1e3 * time_kernel(run, scale.device)}, run)


def profile(rig: Rig, batch: Any) -> Row:
    """Launches, the share of the time in which the device computed, and the kernels that took most, in ms."""
    import torch
    from torch.autograd import DeviceType

    rig.measure([batch], 0)
    with torch.profiler.profile(activities=torch.profiler.supported_activities()) as traced:
        started = time.perf_counter()
        rig.step(batch)
        synchronize(rig.device)
        wall = time.perf_counter() - started
    spent: dict[str, float] = {}
    events = [one for one in traced.events() or () if one.device_type == DeviceType.CUDA]
    for one in events:
        spent[one.name[:60]] = spent.get(one.name[:60], 0) + one.time_range.elapsed_us() / 1e3
    top = dict(sorted(spent.items(), key=lambda pair: -pair[1])[:12])
    return {"launches": len(events), "busy": sum(spent.values()) / 1e3 / wall, "wall, ms": 1e3 * wall, "top": top}


def kernels(rig: Rig, tokens: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The parts of a layer alone, forwards."""
    import torch
    import torch.nn.functional as F
    from bitsandbytes.functional import dequantize_4bit

    from lorasft.model.attention import Paths, attend

    config, up = rig.network.causal.config, rig.network.causal.model.layers[0].mlp.up_proj
    up, size = getattr(up, "base_layer", up), config.head_dim
    weight = dequantize_4bit(up.weight.data, up.weight.quant_state)
    fixed = {"device": rig.device, "dtype": torch.bfloat16}
    x, wide = torch.randn(tokens, config.hidden_size, **fixed), torch.randn(tokens, config.intermediate_size, **fixed)
    yield f"dequantize {tuple(weight.shape)}", lambda: dequantize_4bit(up.weight.data, up.weight.quant_state)
    yield f"product {tokens} x {tuple(weight.shape)}", lambda: F.linear(x, weight)
    yield "RMS norm", lambda: F.rms_norm(x, (config.hidden_size,), x[0], 1e-5)
    yield "SwiGLU", lambda: F.silu(wide) * wide
    yield "one more launch", lambda: x[:1].add_(1)
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    q, k, v = (torch.randn(1, count, tokens, size, **fixed) for count in heads)
    for name, kernel in (("one kernel", lambda _: True), ("segment by segment", None)):
        paths = Paths([tokens // 16] * 16, [()] * 16, cascade=False, kernel=kernel)
        paths = replace(paths, places=[torch.from_numpy(one).to(rig.device) for one in paths.numbers])
        yield f"attention, {name}", functools.partial(attend, torch.nn.Identity(), q, k, v, None, segments=paths)


def peer(scale: Scale, *, arm: str) -> Cases:
    shape = scale.shape("llama-3.1-8b")
    yield "the same rows", functools.partial(run_peer, scale, shape, arm)


def run_peer(scale: Scale, shape: str, arm: str) -> Row:
    """Two passes over the same rows, a step each; the second is measured. The loss is that of the first."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    config = make_config(shape)
    rows = make_rows(scale.tokens(2048), config.vocab_size, scale.data, scale.tokens(65536))
    total, supervised = sum(len(row.ids) - 1 for row in rows), sum(int((row.labels != -100).sum()) for row in rows)
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    if arm == "lorasft":
        from lorasft.data.packing import make_micro_batches
        from lorasft.model.loss import weighted_loss

        rig = make_rig(shape, scale.device)
        rig.network.causal.train()
        capacity = scale.tokens(8192)
        parts = list(make_micro_batches(lambda index: (rows[index],), range(len(rows)), capacity=capacity))
        optimizer, loss = rig.optimizer, functools.partial(weighted_loss, rig.network)
    elif arm == "trl":
        return run_trl(make_model(config, scale.device), lora, rows, total)
    else:
        prepared = prepare_model_for_kbit_training(make_model(config, scale.device))
        model: Any = get_peft_model(prepared, lora).train()
        optimizer = torch.optim.AdamW(one for one in model.parameters() if one.requires_grad)
        parts = pad(rows) if arm == "padded" else pack(rows, scale.tokens(4096))

        def loss(part: dict[str, Any]) -> Any:
            count = int((part["labels"][:, 1:] != -100).sum())
            with torch.autocast(model.device.type, torch.bfloat16):
                return model(**{key: one.to(model.device) for key, one in part.items()}, use_cache=False).loss * count

    first = 0.0
    for turn in range(2):
        if scale.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        synchronize(scale.device)
        started, losses = time.perf_counter(), 0.0
        for part in parts:
            summed = loss(part)
            summed.backward()
            losses += float(summed.detach())
        optimizer.step()
        optimizer.zero_grad(set_to_none=arm != "lorasft")
        synchronize(scale.device)
        first = losses if turn == 0 else first
    peak = torch.cuda.max_memory_allocated() / GIB if scale.on_gpu else 0.0
    return {"tokens a second": total / (time.perf_counter() - started), "allocated": peak, "loss": first / supervised}


def pad(rows: list[Any]) -> list[dict[str, Any]]:
    """Batches of eight rows, sorted by length and padded to the longest."""
    import torch

    batches, rows = [], sorted(rows, key=lambda row: len(row.ids))
    for begin in range(0, len(rows), 8):
        part = rows[begin : begin + 8]
        ids = torch.zeros(len(part), len(part[-1].ids), dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for number, row in enumerate(part):
            ids[number, : len(row.ids)], mask[number, : len(row.ids)] = torch.from_numpy(row.ids), 1
            labels[number, : len(row.ids)] = torch.from_numpy(row.labels)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def pack(rows: list[Any], capacity: int) -> list[dict[str, Any]]:
    """Rows side by side with positions that begin anew, by which transformers tells them apart."""
    import torch

    batches: list[list[Any]] = [[]]
    for row in rows:
        if sum(len(one.ids) for one in batches[-1]) + len(row.ids) > capacity:
            batches.append([])
        batches[-1].append(row)
    parts = []
    for group in filter(None, batches):
        columns = {
            "input_ids": np.concatenate([row.ids for row in group]),
            "labels": np.concatenate([np.r_[-100, row.labels[1:]] for row in group]),
            "position_ids": np.concatenate([np.arange(len(row.ids)) for row in group]),
        }
        parts.append({key: torch.from_numpy(one).long().unsqueeze(0) for key, one in columns.items()})
    return parts


def run_trl(model: Any, lora: Any, rows: list[Any], total: int) -> Row:
    """TRL's SFTTrainer as it comes, with Liger's kernels; its second step."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found,unused-ignore]

    meter, liger = Meter(), importlib.metadata.version("liger-kernel")
    model.is_quantized = False  # or it would be asked for the quantizer that loaded it
    fixed = {"max_steps": 2, "per_device_train_batch_size": 8, "gradient_accumulation_steps": len(rows) // 16}
    fixed |= {"logging_steps": 1, "save_strategy": "no", "report_to": [], "bf16": True, "disable_tqdm": True}
    settings = SFTConfig(tempfile.mkdtemp(), use_liger_kernel=True, max_length=None, **fixed)
    data = Dataset.from_list([{"input_ids": row.ids.tolist(), "labels": row.labels.tolist()} for row in rows])
    tokenizer = AutoTokenizer.from_pretrained(str(ROOT / "recipes/tiny/base"))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    fit(SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer, peft_config=lora), meter)
    return {"tokens a second": meter.total[-1] / meter.seconds[-1], "loss": meter.losses[0], "liger": liger}


def caps(scale: Scale, *, shape: str, cases: list[tuple[float, int]]) -> Cases:
    import torch

    from lorasft.errors import out_of_memory
    from lorasft.machine import free_memory
    from lorasft.model.memory import heaviest_batch
    from lorasft.training.layout import fewest_recomputed

    total = torch.cuda.get_device_properties(scale.device).total_memory if scale.on_gpu else 0

    def train_within(cap: float, tokens: int) -> Row:
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap * GIB / total))
        heaviest = heaviest_batch(rig.planned, longest=tokens, capacity=tokens)
        free = free_memory(scale.device)
        recomputed, needs = fewest_recomputed(rig.planned, heaviest, free=free)
        found = {"fits by count": needs is not None and needs.fits(free)}
        try:
            return found | rig.measure(
                make_batches(tokens, rig.network.causal.config.vocab_size, scale.data), recomputed
            )
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            rig.optimizer.zero_grad(set_to_none=False)
            return found | {"recomputed": recomputed, "error": "out of memory"}

    if not scale.on_gpu:
        yield "-", lambda: {"error": "needs CUDA"}
        return
    rig = make_rig(scale.shape(shape), scale.device)
    for cap, tokens in cases:
        cap = cap / 4096 if scale.tiny else cap
        yield f"{cap:g} GiB, {tokens:,} tokens", functools.partial(train_within, cap, scale.tokens(tokens))


def waits(scale: Scale) -> Cases:
    """What PyTorch says of a step under `set_sync_debug_mode`: none but one a step should wait."""
    import torch

    rig = make_rig(scale.shape("qwen3-4b"), scale.device)
    (batch,) = make_batches(scale.tokens(4096), rig.network.causal.config.vocab_size, scale.data, count=1)

    def count() -> Row:
        rig.measure([batch], 0)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            rig.step(batch)
            torch.cuda.set_sync_debug_mode("default")
        places = [f"{Path(one.filename).name}:{one.lineno}" for one in seen if "synchronizing" in str(one.message)]
        return {"waits": len(places), "where": dict.fromkeys(places, "")}

    yield "a micro-batch and an update", count


def fragments(scale: Scale) -> Cases:
    """Micro-batches of many sizes one after the other: what the allocator holds beside what was in use."""
    rig = make_rig(scale.shape("qwen3-4b"), scale.device)
    vocabulary, draw = rig.network.causal.config.vocab_size, np.random.default_rng(0)
    sizes = draw.integers(scale.tokens(1024), scale.tokens(8192), 40)
    batches = [make_batches(int(size), vocabulary, scale.data, count=1)[0] for size in sizes]
    yield os.environ.get("PYTORCH_ALLOC_CONF", "torch's own"), lambda: rig.measure(batches, 0)
