"""What only a GPU can show, the most valuable first: python scripts/gpu_check.py [--only PART ...] [--out FOLDER]

Each part has a process of its own and at most five minutes. What it finds is a line of FOLDER/results.jsonl as soon as
it is found, an error like another; what it says on stderr lies whole in FOLDER/PART.log. In this order:

versions, doctor     the machine; every check of `lorasft doctor`
nf4, attention       bits of NF4 as on the CPU; the one kernel, and segment by segment, beside dense float64: outputs
gradients            and gradients; those of LoRA and loss beside float64, and PEFT's on the same device
tiny                 the recipe `tiny` beside the CPU; adamw8bit; resumed; in too little memory; merged with its check
speed                the shape of Llama 3.1 8B: micro-batches of 2,048 to 16,384 tokens, lean layers or the model's own,
                     none or all recomputed; one profiled step; kernels alone
peer-*               the same rows by lorasft, by PEFT padded in eights and packed, by TRL with Liger
caps-8b, caps-70b    trained in less memory than there is
waits, fragments*    how often the host waits for the device, and what the allocator holds beside what is used

Weights are random. `share`: the work without recomputation against a product of 8192 x 8192 matrices in bf16; sizes are
GiB. `--write` puts all of it into docs/gpu.md. `--tiny` runs the same code on small shapes, also on a CPU.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import gc
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from bench import PACKAGES, ROOT, Meter, fit, table

Row = dict[str, Any]
Cases = Iterator[tuple[str, Callable[[], Row]]]
GIB = 1 << 30
LIMIT = 300  # seconds of a part
PAGE, FOUND = ROOT / "docs" / "gpu.md", "\n## What was found\n"
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


# ---- parts, each in a process of its own ---------------------------------------------------------------------------


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART")
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), metavar="FOLDER")
    parser.add_argument("--data", help="JSON lines whose lengths are taken, four bytes a token")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        run_part(options.part, options)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.jsonl").unlink(missing_ok=True)
    for part in options.only:
        run_apart(part, options)
    if options.write:
        write_page(options.out)


def run_apart(part: str, options: argparse.Namespace) -> None:
    """A part in a process of its own, which is ended after its time."""
    words = ["--part", part, "--out", str(options.out), *(["--tiny"] if options.tiny else [])]
    words += ["--data", options.data] if options.data else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"} | ENVIRONMENT.get(part, {})
    with (options.out / f"{part}.log").open("w", encoding="utf-8") as log:
        command = [sys.executable, __file__, *words]
        process = subprocess.Popen(command, stderr=log, env=environment, start_new_session=True)
        try:
            error = f"ended with {process.wait(LIMIT)}"
        except subprocess.TimeoutExpired:
            error = f"ran past {LIMIT} s"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode:
        said = (options.out / f"{part}.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        note(options.out, {"part": part, "case": "-", "error": f"{error}; {said[-1][:200] if said else 'no word'}"})


def run_part(part: str, options: argparse.Namespace) -> None:
    """Every case of a part; one that fails leaves the others."""
    import lorasft.model  # noqa: F401  which asks the hub for nothing, and sets up the allocator

    import torch  # isort: skip

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = PARTS[part](Scale(options.tiny, device, options.data))
    while True:
        name, started = "-", time.perf_counter()
        try:
            name, run = next(cases)
            found = run()
        except StopIteration:
            return
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"}
        note(options.out, {"part": part, "case": name, **found, "seconds": round(time.perf_counter() - started, 1)})
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def note(out: Path, row: Row) -> None:
    """One finding: on the disk, and on the screen."""
    with (out / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())
    facts = ", ".join(f"{key} {show(value)}" for key, value in row.items() if key not in ("part", "case"))
    print(f"{row['part']}: {row['case']}: {facts}", flush=True)


def show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "; ".join(f"{key} {show(one)}" for key, one in value.items()) if isinstance(value, dict) else str(value)


def write_page(out: Path) -> None:
    """The findings as tables, in place of those that docs/gpu.md had."""
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    text = ""
    for part in dict.fromkeys(row["part"] for row in rows):
        own = [row for row in rows if row["part"] == part]
        keys = [key for key in dict.fromkeys(key for row in own for key in row) if key not in ("part", "case")]
        lines = [[row["case"], *(show(row.get(key, "")).replace("|", "/") for key in keys)] for row in own]
        text += f"\n### {part}\n\n{table(['case', *keys], lines)}"
    head = PAGE.read_text(encoding="utf-8").partition(FOUND)[0]
    PAGE.write_text(f"{head}{FOUND}\n{datetime.date.today()}, `python scripts/gpu_check.py`.\n{text}", encoding="utf-8")


# ---- the machine, and whether it computes rightly ------------------------------------------------------------------


def versions(scale: Scale) -> Cases:
    import torch

    def machine() -> Row:
        found = {"python": platform.python_version(), "torch CUDA": str(torch.version.cuda)}
        if scale.on_gpu:
            card = torch.cuda.get_device_properties(scale.device)
            found |= {"device": card.name, "sm": f"{card.major}.{card.minor}", "memory": card.total_memory / GIB}
        return found | {name: importlib.metadata.version(name) for name in (*PACKAGES, "tokenizers", "numpy")}

    yield "machine", machine
    yield "TFLOP/s of a bf16 product", lambda: {"measured": measure_ceiling(scale.device) / 1e12}


def doctor(scale: Scale) -> Cases:
    command = [sys.executable, "-m", "lorasft", "doctor", "--json"]
    for check in json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout)["checks"]:
        fix = {"error": check["mend"]} if check["mend"] else {}
        yield check["name"], functools.partial(dict, said=check["what"], **fix)


def nf4(scale: Scale) -> Cases:
    import bitsandbytes as bnb
    import torch

    def compare(dtype: Any) -> Row:
        weight = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)
        seen = []
        for device in ("cpu", scale.device):
            packed, state = bnb.functional.quantize_4bit(weight.to(device), quant_type="nf4", compress_statistics=True)
            seen.append((packed.cpu().flatten(), bnb.functional.dequantize_4bit(packed, state).cpu().double()))
        (codes, mine), (others, other) = seen
        same = {"same codes": float((codes == others).double().mean()), "same": float((mine == other).double().mean())}
        return same | {"apart": float((mine - other).norm() / mine.norm())}

    for dtype in (torch.float32, torch.bfloat16):
        yield str(dtype), functools.partial(compare, dtype)


def attention(scale: Scale) -> Cases:
    for size in (64, 80, 96, 128, 160, 192, 224, 256):
        for window in (None, 100):
            for way in ("one kernel", "segment by segment") if scale.on_gpu else ("segment by segment",):
                name = f"{way}, head size {size}" + (f", window {window}" if window else "")
                yield name, functools.partial(compare_attention, scale.device, size, window, way == "one kernel")


def compare_attention(device: Any, size: int, window: int | None, at_once: bool) -> Row:
    """Segments with ancestors and grouped keys in bf16, beside a dense softmax in float64: shares of the norms."""
    import torch

    from lorasft.model.attention import Paths, attend

    lengths, ancestors = [150, 70, 5, 90], [(), (0,), (0, 1), ()]
    paths = Paths(lengths, ancestors, cascade=False, kernel=(lambda _: True) if at_once else None)
    paths = replace(paths, places=[torch.from_numpy(one).to(device) for one in paths.numbers])
    draw = torch.Generator().manual_seed(0)
    shapes = [(1, heads, sum(lengths), size) for heads in (8, 2, 2, 8)]
    q, k, v, upstream = (torch.randn(shape, generator=draw).bfloat16() for shape in shapes)
    owner = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    begun = [sum(lengths[one] for one in before) for before in ancestors]
    places = torch.cat([torch.arange(length) + start for length, start in zip(lengths, begun, strict=True)])
    family = torch.tensor([[one == two or one in ancestors[two] for one in range(4)] for two in range(4)])
    ahead = places.unsqueeze(1) - places  # (queries, keys): how far back the key is
    seen = family[owner][:, owner] & (ahead >= 0) & (ahead < (window or 1 << 30))
    exact = [one.double().requires_grad_() for one in (q, k, v)]
    keys, values = (one.repeat_interleave(4, 1) for one in exact[1:])
    scores = (exact[0] @ keys.transpose(2, 3) * size**-0.5).masked_fill(~seen, float("-inf"))
    truth = (scores.softmax(-1) @ values).transpose(1, 2)
    given = [one.to(device).requires_grad_() for one in (q, k, v)]
    found, _ = attend(None, *given, None, segments=paths, sliding_window=window)  # type: ignore[arg-type]
    wanted = torch.autograd.grad(truth, exact, upstream.double().transpose(1, 2))
    got = torch.autograd.grad(found, given, upstream.to(device).transpose(1, 2))
    return {name: distance(mine, one) for name, mine, one in
            zip(("output", "dq", "dk", "dv"), (found, *got), (truth, *wanted), strict=True)}  # fmt: skip


def distance(found: Any, truth: Any) -> float:
    """The norm of the difference, as a share."""
    return float((found.detach().double().cpu() - truth.detach()).norm() / truth.detach().norm())


def gradients(scale: Scale) -> Cases:
    """Losses and gradients of a small NF4 base under LoRA with B that is not 0, beside float64 by other code."""
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from lorasft.model.adapter import attach_adapter
    from lorasft.model.loss import weighted_loss
    from lorasft.model.selfcheck import verify
    from lorasft.recipe import AdapterSettings

    config, settings = make_config("tiny"), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    batch = make_batches(256, config.vocab_size, None, count=1)[0]
    ours = attach_adapter(make_model(config, scale.device, std=0.1), AdapterSettings(rank=16), seed=0)
    lora = {name: one for name, one in ours.named_parameters() if one.requires_grad}
    for name, one in lora.items():
        one.data.normal_(0, 0.05 if "lora_B" in name else 0.2)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="sdpa").eval()
    held = make_model(config, scale.device, std=0.1)
    for name, module in base.named_modules():
        other = held.get_submodule(name)
        for key, parameter in module.named_parameters(recurse=False):
            state = getattr(getattr(other, key), "quant_state", None)
            value = getattr(other, key) if state is None else dequantize_4bit(getattr(other, key).data, state)
            parameter.data.copy_(value)
    exact, plain = (get_peft_model(one.requires_grad_(False), settings) for one in (base, held))
    plain.set_attn_implementation("sdpa")
    for model in (exact, plain):
        for name, one in model.named_parameters():
            if name in lora:
                one.data = one.data.copy_(lora[name].data)

    def run(model: Any, loss: Any) -> dict[str, Any]:
        loss.backward()
        return {"loss": loss} | {name: one.grad for name, one in model.named_parameters() if one.requires_grad}

    truth = run(exact, alone_loss(exact, batch))

    def compare(found: dict[str, Any]) -> Row:
        apart = sorted(distance(found[name], value) for name, value in truth.items() if name != "loss")
        return {"loss": distance(found["loss"], truth["loss"]), "median": apart[len(apart) // 2], "largest": apart[-1]}

    network = verify(ours.get_base_model())
    yield "lorasft", lambda: compare(run(ours, weighted_loss(network, batch))) | {"notices": "; ".join(network.notices)}
    yield "transformers and PEFT", lambda: compare(run(plain, alone_loss(plain, batch)))


def alone_loss(model: Any, batch: Any) -> Any:
    """The sum of the losses of a micro-batch, one sequence at a time."""
    import torch

    total, targets = 0.0, dict(zip(batch.sources.tolist(), batch.targets.tolist(), strict=True))
    for segment in batch.segments:
        places = [place for place in range(segment.start, segment.end) if place in targets]
        ids = torch.as_tensor(batch.ids[segment.start : segment.end], device=model.device).unsqueeze(0)
        logs = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        wanted = torch.tensor([targets[place] for place in places], device=model.device)
        total = total - logs[[place - segment.start for place in places], wanted].sum()
    return total


# ---- tiny: the recipe that is shipped -------------------------------------------------------------------------------


def tiny(scale: Scale) -> Cases:
    folder = tempfile.mkdtemp()
    for dtype in ("float32", "bfloat16"):
        yield f"beside the CPU, {dtype}", functools.partial(beside_cpu, folder, f"model.dtype={dtype}")
    yield "adamw8bit", functools.partial(beside_cpu, folder, "model.dtype=float32", "optimizer.name=adamw8bit")
    yield "resumed", functools.partial(check_resume, folder)
    yield "in too little memory", functools.partial(check_redo, scale, folder)
    yield "merged", functools.partial(check_merge, folder)


def train_tiny(folder: str, *settings: str, resume: bool = False) -> tuple[list[float], int]:
    """The losses of four steps of the shipped recipe `tiny`, and the tokens of its micro-batches in the end."""
    from lorasft.recipe.load import load_recipe
    from lorasft.train.checkpoint import newest_checkpoint
    from lorasft.train.loop import train
    from lorasft.train.run import export_adapter, open_run

    with open_run(load_recipe("tiny", tiny_settings(folder, *settings)), resume=resume) as (run, state):
        export_adapter(run, train(run, state))
    state = newest_checkpoint(Path(folder, "checkpoints"), run=None)
    return read_losses(folder), state.layout.micro_batch_tokens


def tiny_settings(folder: str, *settings: str) -> list[str]:
    fixed = [f"run.output={folder}", "run.save_every=2", "train.steps=4", "data.eval=null", "run.eval_every=null"]
    return [*fixed, *settings]


def read_losses(folder: str) -> list[float]:
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def apart(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def beside_cpu(folder: str, *settings: str) -> Row:
    """A run here, and the same run in a process that sees the CPU alone."""
    mine, theirs = (f"{folder}/{'-'.join((place, *settings))}" for place in ("here", "cpu"))
    losses, tokens = train_tiny(mine, *settings)
    command = [sys.executable, "-m", "lorasft", "train", "tiny", *tiny_settings(theirs, *settings)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"ACCELERATE_USE_CPU": "true"})
    return {"losses apart": apart(losses, read_losses(theirs)), "last": losses[-1], "tokens": tokens}


def check_resume(folder: str) -> Row:
    """A run that is resumed in its middle has the losses of one that was never stopped."""
    from lorasft.files import remove_folder

    losses, _ = train_tiny(f"{folder}/a")
    remove_folder(Path(folder, "a", "checkpoints", "step-000004"))
    remove_folder(Path(folder, "a", "adapter"))
    again, _ = train_tiny(f"{folder}/a", resume=True)
    return {"losses apart": apart(losses, again)}


def check_redo(scale: Scale, folder: str) -> Row:
    """A run in less than it needs has the losses of one that has room."""
    import torch

    if not scale.on_gpu:
        return {"error": "needs CUDA"}
    wide = "machine.micro_batch_tokens=65536"
    torch.cuda.reset_peak_memory_stats()
    losses, before = train_tiny(f"{folder}/wide", wide)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(0.6 * torch.cuda.max_memory_allocated() / total)
    redone, tokens = train_tiny(f"{folder}/narrow", wide)
    torch.cuda.set_per_process_memory_fraction(1.0)
    return {"losses apart": apart(losses, redone), "tokens before": before, "tokens": tokens}


def check_merge(folder: str) -> Row:
    from lorasft.artifact import find_artifact
    from lorasft.merge.merge import merge

    merge(find_artifact(f"{folder}/a"), Path(folder, "merged"))  # raises where the merged weights answer otherwise
    return {"check": "holds"}


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
    from lorasft.data.tokens import UNSUPERVISED, Tokens

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

    def set_lean(self, lean: bool) -> None:
        from lorasft.model.lean import use_lean_layers, use_own_layers

        for network in (self.network, self.planned):
            (use_lean_layers if lean else use_own_layers)(network.causal)

    def step(self, batch: Any) -> None:
        from lorasft.model.loss import weighted_loss

        weighted_loss(self.network, batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)

    def measure(self, batches: list[Any], recomputed: int, seconds: float = 3.0) -> Row:
        """Steps after one that warms up; the memory that they took beside what was predicted."""
        import torch

        from lorasft.model.memory import dry_run
        from lorasft.model.recompute import recompute

        recompute(self.network.causal, recomputed)
        self.network.causal.train()
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.step(batches[0])
        synchronize(self.device)
        started, tokens, flops = time.perf_counter(), 0, 0.0
        for number, batch in enumerate(cycle(batches)):
            self.step(batch)
            tokens, flops = tokens + len(batch.ids), flops + count_flops(self.network.causal, batch)
            if number % 4 == 3:
                synchronize(self.device)
                if time.perf_counter() - started > seconds:
                    break
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
    from lorasft.train.optimizer import make_optimizer

    adapter, model = AdapterSettings(rank=16), make_model(make_config(shape), device)
    peft = attach_adapter(model, adapter, seed=0)
    network = verify(peft.get_base_model())
    print(shape, *network.notices, sep="\n", file=sys.stderr)
    weightless = make_weightless(model.config, ModelSettings(base=shape, dtype="bfloat16"), adapter, device)
    planned = plan_network(network, weightless)
    optimizer = make_optimizer(OptimizerSettings(), Trained(peft, torch.bfloat16))
    return Rig(network, planned, static_bytes(weightless, "adamw"), optimizer, device)


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
    for size in (4096, 2048, 8192, 16384):
        batches = make_batches(scale.tokens(size), config.vocab_size, scale.data)
        for lean in (True, False):
            for recomputed in (0, layers):
                rig.set_lean(lean)
                name = f"{size:,} tokens, {'lean' if lean else 'own'} layers, {recomputed} recomputed"
                yield name, functools.partial(rig.measure, batches, recomputed)
        if size == 4096:
            rig.set_lean(True)
            rig.measure(batches, 0, seconds=0)
            yield "a micro-batch of 4,096", functools.partial(profile, rig, batches[0])
            for name, run in kernels(rig, scale.tokens(size)):
                yield name, functools.partial(lambda run: {"ms": 1e3 * time_kernel(run, scale.device)}, run)


def profile(rig: Rig, batch: Any) -> Row:
    """Launches, the share of the time in which the device computed, and the kernels that took most, in ms."""
    import torch
    from torch.autograd import DeviceType

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
    yield "RMS norm", lambda: F.rms_norm(x, (config.hidden_size,))
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
    fixed = {"max_steps": 3, "per_device_train_batch_size": 8, "gradient_accumulation_steps": len(rows) // 16}
    fixed |= {"logging_steps": 1, "save_strategy": "no", "report_to": [], "bf16": True, "disable_tqdm": True}
    settings = SFTConfig(tempfile.mkdtemp(), use_liger_kernel=True, max_length=None, **fixed)
    data = Dataset.from_list([{"input_ids": row.ids.tolist(), "labels": row.labels.tolist()} for row in rows])
    tokenizer = AutoTokenizer.from_pretrained(str(ROOT / "recipes/tiny/base"))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    fit(SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer, peft_config=lora), meter)
    return {"tokens a second": meter.total[-1] / meter.seconds[-1], "loss": meter.losses[0], "liger": liger}


def caps(scale: Scale, *, shape: str, cases: list[tuple[float, int]]) -> Cases:
    import torch

    from lorasft.model.free_memory import free_memory
    from lorasft.model.memory import heaviest_batch
    from lorasft.train.layout import fewest_recomputed

    total = torch.cuda.get_device_properties(scale.device).total_memory if scale.on_gpu else 0

    def train_within(cap: float, tokens: int) -> Row:
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap * GIB / total))
        heaviest = heaviest_batch(rig.planned, longest=tokens, capacity=tokens)
        free = free_memory(scale.device) - rig.static["16-bit copies"]
        recomputed, needs = fewest_recomputed(rig.planned, heaviest, free=free)
        found = {"fits by count": needs is not None and needs.fits(free)}
        try:
            return found | rig.measure(
                make_batches(tokens, rig.network.causal.config.vocab_size, scale.data), recomputed
            )
        except torch.OutOfMemoryError:
            rig.optimizer.zero_grad(set_to_none=False)
            return found | {"recomputed": recomputed, "error": "out of memory"}

    if not scale.on_gpu:
        yield "-", lambda: {"error": "needs CUDA"}
        return
    rig = make_rig(scale.shape(shape), scale.device)
    rig.measure(make_batches(scale.tokens(1024), rig.network.causal.config.vocab_size, scale.data), 0, seconds=0)
    for cap, tokens in cases:
        cap = cap / 256 if scale.tiny else cap
        yield f"{cap:g} GiB, {tokens:,} tokens", functools.partial(train_within, cap, scale.tokens(tokens))


def waits(scale: Scale) -> Cases:
    """What PyTorch says of a step under `set_sync_debug_mode`: none but one a step should wait."""
    import torch

    rig = make_rig(scale.shape("qwen3-4b"), scale.device)
    (batch,) = make_batches(scale.tokens(4096), rig.network.causal.config.vocab_size, scale.data, count=1)
    rig.measure([batch], 0, seconds=0)

    def count() -> Row:
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
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
    yield os.environ.get("PYTORCH_ALLOC_CONF", "torch's own"), lambda: rig.measure(batches, 0, seconds=20)


PARTS: dict[str, Callable[[Scale], Cases]] = {
    **{part.__name__: part for part in (versions, doctor, nf4, attention, gradients, tiny, speed)},
    **{f"peer-{arm}": functools.partial(peer, arm=arm) for arm in ("lorasft", "padded", "packed", "trl")},
    "caps-8b": functools.partial(
        caps, shape="llama-3.1-8b", cases=[(24, 4096), (24, 16384), (8, 2048), (7.5, 2048), (7, 2048)]
    ),
    "caps-70b": functools.partial(caps, shape="llama-3.3-70b", cases=[(46, 2048), (44, 2048)]),
    **{part.__name__: part for part in (waits, fragments)},
    "fragments-fixed": fragments,
}
ENVIRONMENT = {"fragments-fixed": {"PYTORCH_ALLOC_CONF": "expandable_segments:False"}}


if __name__ == "__main__":
    main()
