"""What the benchmarks share: random bases, processes of their own, and the tables of docs/benchmarks.md."""

from __future__ import annotations

import contextlib
import datetime
import gc
import importlib
import importlib.metadata
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
TRL = "1.16.0"
LATE = ("bitsandbytes", "transformers.models.llama.modeling_llama", "peft.tuners.lora.bnb")  # imported on first use
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
             "num_key_value_heads": 4, "vocab_size": 32000},
    "m350": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 16,
             "num_key_value_heads": 8, "vocab_size": 32000},
    "tiny-152k": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
                  "num_key_value_heads": 4, "vocab_size": 151936},
}  # fmt: skip


def make_base(shape: dict[str, int], tokenizer: Path, *, folder: Path) -> None:
    """A random Llama of `shape` in bf16, with the files of a tokenizer beside it."""
    save_base("LlamaConfig", shape, tokenizer, folder=folder)


def save_base(config: str, sizes: dict[str, Any], tokenizer: Path, *, folder: Path) -> None:
    """A random model of a config class of transformers in bf16, with the files of a tokenizer beside it."""
    import torch
    import transformers

    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**sizes))
    model.to(torch.bfloat16).save_pretrained(folder)
    for file in tokenizer.iterdir():
        if file.name.startswith(("tokenizer", "special_tokens", "added_tokens", "chat_template", "vocab", "merges")):
            shutil.copyfile(file, folder / file.name)


def find_peers(venv: Path) -> str:
    """The python of the peers' environment, which is made where there is none."""
    python = str(venv.absolute() / "bin" / "python")
    asked = "import importlib.metadata as m; print(m.version('trl'))"
    if Path(python).exists():
        answer = subprocess.run([python, "-c", asked], capture_output=True, text=True).stdout.strip()
        if answer == TRL:
            return python
    print(f"installing TRL {TRL} into {venv} (once; torch is large)", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    packages = ["torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", f"trl=={TRL}"]
    pinned = ["-c", str(ROOT / "constraints.txt")]  # torch among them: never another than ours
    subprocess.run([python, "-m", "pip", "install", "--quiet", *pinned, *packages], check=True)
    return python


def settle() -> int:
    """The bytes that this process holds after its imports; its peak is counted anew where the kernel lets it."""
    for name in LATE:
        importlib.import_module(name)
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return status("VmRSS")


def peak() -> int:
    """The largest resident size of this process in bytes, since `settle`."""
    return status("VmHWM")


def status(name: str) -> int:
    """A size in bytes by its name in proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def run_process(python: str, arguments: list[str]) -> tuple[dict[str, Any], float]:
    """The JSON line that a process of its own prints last, and how many cores other processes kept busy meanwhile."""
    # As the command line sets it: long spinning makes the figures of a busy machine meaningless.
    quiet = {
        "GOMP_SPINCOUNT": "10000",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    environment = {**os.environ, **quiet, "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    started, busy, own = time.perf_counter(), _busy_seconds(), _children_seconds()
    done = subprocess.run([python, *arguments], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{shlex.join(arguments)} failed:\n{done.stderr[-4000:]}")
    foreign = (_busy_seconds() - busy) - (_children_seconds() - own)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result, max(0.0, foreign) / (time.perf_counter() - started)


def _busy_seconds() -> float:
    """CPU seconds that all processes of the machine have used."""
    user, nice, system = Path("/proc/stat").read_text(encoding="ascii").split()[1:4]
    return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK")


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A markdown table, its columns aligned for a terminal; all but the first to the right."""
    cells = [list(head), *map(list, lines)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    cells.insert(1, rule)
    padded = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in padded)


def write_section(title: str, text: str, *, busiest: float, more: Sequence[str] = ()) -> None:
    """Replace or append the section `title` of the page: `text`, and what made it, without this machine's paths.

    `busiest`: cores that other processes used during the worst of the runs.
    """
    words = [Path(word).name if Path(word).is_absolute() or Path(word).exists() else word for word in sys.argv[1:]]
    command = shlex.join(["python", f"scripts/{Path(sys.argv[0]).name}", *words])
    versions = ", ".join([*(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES), *more])
    machine = f"{datetime.date.today()}, {os.cpu_count()} cores, {_cpu()}, others on {busiest:.1f} cores at most"
    made = f"{machine};\n{versions}:\n`{command}`"
    head, *sections = PAGE.read_text(encoding="utf-8").rstrip("\n").split("\n\n## ")
    found = dict(section.split("\n", 1) for section in sections) | {title: f"\n{text}\n{made}"}
    parts = [head, *(f"## {name}\n{body}" for name, body in found.items())]
    PAGE.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _cpu() -> str:
    """The processor's name, and what it multiplies bf16 with."""
    facts = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    names = [line.partition(":")[2].strip() for line in facts.splitlines() if line.startswith("model name")]
    return " ".join([names[0] if names else "unknown", *(one for one in ("amx_bf16", "avx512_bf16") if one in facts)])
