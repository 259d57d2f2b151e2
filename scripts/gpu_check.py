"""What only a GPU can show, the most valuable first: python scripts/gpu_check.py [--only PART ...] [--out FOLDER]

Each part has a process of its own and at most five minutes. What it finds is a line of FOLDER/results.jsonl as soon as
it is found, an error like another; what it says on stderr lies whole in FOLDER/PART.log. In this order:

versions, doctor     the machine; every check of `lorasft doctor`
nf4, attention       bits of NF4 as on the CPU; the one kernel, and segment by segment, beside dense float64: outputs
gradients            and gradients; those of LoRA and loss beside float64, and PEFT's on the same device
tiny                 the recipe `tiny` beside the CPU; adamw8bit; resumed; in too little memory; merged with its check
speed                the shape of Llama 3.1 8B: micro-batches of 2,048 to 16,384 tokens, lean layers or the model's own,
                     none or all recomputed, weights kept in 16 bits; one profiled step; kernels alone
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
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import PACKAGES, ROOT, table
from gpu_speed import (
    GIB,
    Cases,
    Row,
    Scale,
    caps,
    fragments,
    make_batches,
    make_config,
    make_model,
    measure_ceiling,
    peer,
    speed,
    waits,
)

LIMIT = 300  # seconds of a part
PAGE, FOUND = ROOT / "docs" / "gpu.md", "\n## What was found\n"


# ---- parts, each in a process of its own ---------------------------------------------------------------------------


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
    results = options.out / "results.jsonl"
    older = results.read_text(encoding="utf-8").splitlines(keepends=True) if results.is_file() else []
    results.write_text(
        "".join(line for line in older if json.loads(line)["part"] not in options.only), encoding="utf-8"
    )
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
    from lorasft.training.checkpoint import newest_checkpoint
    from lorasft.training.loop import run_steps
    from lorasft.training.run import export_adapter, open_run

    with open_run(load_recipe("tiny", tiny_settings(folder, *settings)), resume=resume) as (run, state):
        export_adapter(run, run_steps(run, state))
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
    wide = ("machine.micro_batch_tokens=65536", "machine.activation_checkpointing=false")
    torch.cuda.reset_peak_memory_stats()
    losses, before = train_tiny(f"{folder}/wide", *wide)
    most = torch.cuda.max_memory_allocated() / torch.cuda.get_device_properties(0).total_memory
    redone, tokens, share = losses, before, 0.9
    while tokens == before and share > 0.5:  # until it no longer fits as it is
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(share * most)
        redone, tokens = train_tiny(f"{folder}/{share:.1f}", *wide)
        share -= 0.1
    torch.cuda.set_per_process_memory_fraction(1.0)
    return {
        "losses apart": apart(losses, redone),
        "tokens before": before,
        "tokens": tokens,
        "of the memory": share + 0.1,
    }


def check_merge(folder: str) -> Row:
    from lorasft.artifact import find_artifact
    from lorasft.merge.merge import merge

    merge(find_artifact(f"{folder}/a"), Path(folder, "merged"))  # raises where the merged weights answer otherwise
    return {"check": "holds"}


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
